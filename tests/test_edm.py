"""EDM's networks as they are published: pickles whose classes travel as source text."""

from dist_util import UserError

import collections
import io
import json
import pickle
import sys
import types

import numpy as np
import pytest
import torch

import checkpoint
import defaults
import generator
import network
import sde
from conftest import GOLDEN, golden_tensor, run

NAMES = ("vp", "vp-conditional", "ve")


def persistence():
    """A module as EDM's torch_utils.persistence, so that pickles name what theirs name."""

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("a pickle ran code of its own")

    module = types.ModuleType("torch_utils.persistence")
    _reconstruct_persistent_obj.__module__, _reconstruct_persistent_obj.__qualname__ = (
        module.__name__,
        "_reconstruct_persistent_obj",
    )
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj
    sys.modules["torch_utils"], sys.modules["torch_utils.persistence"] = types.ModuleType("torch_utils"), module
    return _reconstruct_persistent_obj


class Pickler(pickle.Pickler):
    """torch's containers by their class, all other modules as EDM's persistent classes: its layers are its own."""

    def reducer_override(self, x):
        if isinstance(x, torch.nn.Module) and not isinstance(x, torch.nn.ModuleDict):
            name = getattr(x, "class_name", type(x).__name__)
            source = "raise AssertionError('a pickle ran code of its own')"
            meta = {"type": "class", "version": 6, "module_src": source, "class_name": name, "state": x.__dict__}
            return persistence(), (meta,)
        return NotImplemented


class Preconditioned(torch.nn.Module):
    def __init__(self, model, options, class_name="EDMPrecond"):
        super().__init__()
        self.model, self._init_args, self._init_kwargs, self.class_name = model, (), options, class_name
        self.skip_scale = np.sqrt(0.5)


def export(path, net, options, class_name="EDMPrecond", protocol=4):
    """Write a UNet as EDM would; the augmentation pipeline's layer is in it if the options have augment_dim."""
    if options.get("augment_dim"):
        net.map_augment = torch.nn.Linear(options["augment_dim"], options["model_channels"], bias=False)
    with open(path, "wb") as file:
        Pickler(file, protocol).dump({"ema": Preconditioned(net, options, class_name), "loss_fn": None})
    return path


def golden(name, folder):
    """(arrays, path of a pickle that holds the network they were computed with)."""
    arrays = {
        key: torch.from_numpy(value) if value.ndim else str(value) for key, value in np.load(GOLDEN / f"edm-{name}.npz").items()
    }
    options, shapes = json.loads(arrays["kwargs"]), json.loads(arrays["shapes"])
    net = checkpoint.build_model(checkpoint.edm_config(options, "x")).net
    state = dict(net.state_dict())
    for key, value in state.items():
        if not key.endswith(("resample_filter", "freqs")):
            assert list(value.shape) == shapes[key]
            state[key] = golden_tensor(key, tuple(value.shape))
    if "freqs" in arrays:
        state["map_noise.freqs"] = arrays["freqs"]
    net.load_state_dict(state)
    return arrays, export(folder / f"edm-{name}.pkl", net, options)


@pytest.mark.parametrize("name", NAMES)
def test_published_network_is_edms_denoiser_in_our_coordinates(name, tmp_path):
    arrays, path = golden(name, tmp_path)
    model = generator.load_model(path)
    sigma, labels = arrays["sigma"].double(), arrays.get("labels")
    y = arrays["x"].double() * (1 + sigma[:, None, None, None])
    w = (1 + sigma**2).sqrt()
    t = sigma**2 / (w * (1 + w))
    with torch.no_grad():
        found = model.model((y / w[:, None, None, None]).float(), t, label=labels)
    assert (found - arrays["denoised"]).norm() < 1e-4 * arrays["denoised"].norm()


@pytest.mark.parametrize("steps", [3, 18])
@pytest.mark.parametrize("name", NAMES)
def test_images_are_those_of_edms_own_sampler(name, steps, tmp_path):
    arrays, path = golden(name, tmp_path)
    model = generator.load_model(path).sampled(num_steps=steps)
    seeds = arrays["seeds"].tolist()
    state, images = model.states(seeds)[-1], model.images(seeds).permute(0, 2, 3, 1)
    assert generator.nfe(model.config) == 2 * steps - 1
    assert (state - arrays[f"state{steps}"]).norm() < 1e-4 * arrays[f"state{steps}"].norm()
    difference = (images.int() - arrays[f"images{steps}"].int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3


def test_eval_draws_them_without_any_flag(tmp_path):
    arrays, path = golden("vp-conditional", tmp_path)
    assert arrays["seeds"][:2].tolist() == [0, 1]
    run("eval.py", "--checkpoint", path, "--workdir", tmp_path / "out", "--format", "npz", "--end_seed", 1)
    found = np.load(tmp_path / "out" / "images.npz")["arr_0"]
    assert np.abs(found.astype(int) - arrays["images18"][:2].numpy()).max() <= 1


def small(folder, protocol=4, class_name="EDMPrecond", **options):
    kwargs = {"img_resolution": 8, "img_channels": 1, "model_type": "SongUNet", "model_channels": 8, "channel_mult": [1, 2]}
    kwargs |= {"num_blocks": 1, "attn_resolutions": [4], "label_dim": 0, "augment_dim": 9}
    torch.manual_seed(0)
    config = checkpoint.edm_config(kwargs, "x")
    kwargs |= options
    return export(folder / "edm.pkl", checkpoint.build_model(config).net, kwargs, class_name, protocol)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_of_all_protocols_are_read_and_fp16_is_computed_in_float32(protocol, tmp_path):
    model = generator.load_model(small(tmp_path, protocol, use_fp16=True), {"data_name": "digits"})
    assert model.config.data.data_name == "digits" and model.images(range(2)).shape == (2, 1, 8, 8)
    assert model.config.sampling.eval_eps1 == pytest.approx(0.012499, abs=1e-6)
    assert model.config.sampling.eval_eps0 == pytest.approx(2e-6, rel=1e-3)


def test_flow_map_is_distilled_from_a_pickle_and_goes_on(tmp_path):
    teacher, flow = small(tmp_path), tmp_path / "flow"
    common = ["train.py", "--mode", "characteristic", "--teacher", teacher, "--data_name", "digits", "--teacher_solver", "edm"]
    common += [
        "--num_steps",
        "4",
        "--bank_size",
        "16",
        "--bsz",
        "8",
        "--global_bsz",
        "16",
        "--nsampling",
        "4",
        "--workdir",
        flow,
    ]
    run(*common, "--train_steps", "2")
    run(*common, "--train_steps", "4")
    model = generator.load_model(flow / "latest.pth")
    assert model.is_flow_map and model.step == 4 and model.config.network.time_input == "log_snr"
    assert model.config.train.train_eps1 == model.config.sampling.eval_eps1 == pytest.approx(0.012499, abs=1e-6)
    assert torch.stack(model.states(range(2))).isfinite().all()
    objective = [*common[:-1], tmp_path / "semigroup", "--objective", "semigroup", "--train_steps", "1"]
    run(*objective)


def test_other_networks_and_hostile_pickles_are_one_line(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("code of a stranger ran",)

    class Global:
        def __reduce__(self):
            return getattr, ("", "join")

    good, twice = small(tmp_path).read_bytes(), checkpoint.Shell()
    twice.state = {"_parameters": {}, "_buffers": {}, "_modules": {}}
    for _ in range(40):  # 2^40 modules to walk through
        upper = checkpoint.Shell()
        upper.state = {"_parameters": {}, "_buffers": {}, "_modules": {"a": twice, "b": twice}}
        twice = upper
    with pytest.raises(ValueError, match="in two places"):
        list(checkpoint._tensors(twice))
    cases = {
        "asks for builtins.print": pickle.dumps({"ema": Evil()}),
        "asks for builtins.getattr": pickle.dumps(Global()),
        "asks for os.system": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
        "asks for posix.system": b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R.",
        "damaged or without": good[: len(good) // 2],
        "or without": pickle.dumps({"ema": {"w": 1}}),
        "asks for collections.deque": pickle.dumps(collections.deque()),
    }
    for message, content in cases.items():
        path = tmp_path / "bad.pkl"
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            generator.load_model(path)
    for message, options in {
        "VPPrecond of a SongUNet": {"class_name": "VPPrecond"},
        "EDMPrecond of a DhariwalUNet": {"model_type": "DhariwalUNet"},
        "neither DDPM": {"encoder_type": "skip"},
        "does not fit": {"label_dim": "ten"},
        "is unknown|not|missing": {"model_channels": 16},
    }.items():
        with pytest.raises(UserError, match=message):
            generator.load_model(small(tmp_path, **options))
    with pytest.raises(UserError, match="image_size"):
        generator.load_model(small(tmp_path), {"data_name": "cifar"})


def test_storages_in_a_pickle_are_read_as_tensors_alone(tmp_path):
    """torch.storage._load_from_bytes is torch.load without weights_only: a pickle within the pickle could run code."""

    class Evil:
        def __reduce__(self):
            return print, ("code of a stranger ran",)

    inner = io.BytesIO()
    torch.save(Evil(), inner, _use_new_zipfile_serialization=False)
    path = tmp_path / "bad.pkl"

    class Outer:
        def __reduce__(self):
            return torch.storage._load_from_bytes, (inner.getvalue(),)

    path.write_bytes(pickle.dumps({"ema": Outer()}))
    with pytest.raises(UserError, match="damaged or without"):
        generator.load_model(path)


# -------------------------------------------------------------------------------------------------------- the mathematics


def test_log_snr_is_exact_at_both_ends_and_finite_at_one():
    sigma = torch.tensor([2e-3, 1e-4, 1.0, 80.0, 1e3], dtype=torch.float64)
    w = (1 + sigma**2).sqrt()
    assert torch.allclose(sde.log_sigma(sigma**2 / (w * (1 + w))), sigma.log(), rtol=0, atol=1e-9)
    assert sde.log_sigma(torch.ones(1)).isfinite()


def test_karras_grid_is_even_in_a_root_of_sigma():
    ts = sde.karras_grid(18, 1 - 1 / (1 + 80**2) ** 0.5, 2e-6)
    sigma = (sde.beta(ts) / sde.alpha(ts))[:-1]
    assert sigma[0] == pytest.approx(80) and sigma[-1] == pytest.approx(0.002, rel=1e-3) and ts[-1] == 0
    steps = (sigma ** (1 / 7)).diff()
    assert torch.allclose(steps, steps.mean().expand(17)) and sde.karras_grid(1, 0.9, 0.1).tolist() == [0.9, 0]


def test_time_grid_and_solver_are_for_our_networks_too():
    config = defaults.resolve({"data_name": "digits", "time_input": "log_snr", "time_grid": "karras", "ode_solver": "edm"})
    assert config.sampling.rho == 7 and defaults.resolve({"time_grid": "karras", "rho": 3.0}).sampling.rho == 3
    model = checkpoint.build_model(config)
    assert isinstance(model, network.Denoiser) and model.at("bf16").time_input == "log_snr"
    trained = generator.Trained(model.eval().requires_grad_(False), config, torch.zeros(1, 8, 8), 0, "")
    assert trained.images(range(2)).shape == (2, 1, 8, 8) and generator.nfe(config) == 39
