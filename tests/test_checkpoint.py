"""Weights on disk: what a checkpoint holds, the moving average, which files are kept, and files of others."""

from dist_util import UserError

import errno
import json
import os
import pickle
import signal
import stat
import struct

import numpy as np
import pytest
import torch

import checkpoint
import dataset
import generator
import misc
from conftest import SHORT_STAGE_1, STAGE_1, assert_equal, run, tiny_checkpoint, tiny_config
from processes import Job


def test_ema_follows_its_formula():
    module = torch.nn.Linear(1, 1)
    ema = checkpoint.EMA(module, 0.5)
    expected = module.weight.detach().clone()
    for step in range(20):
        with torch.no_grad():
            module.weight.add_(1)
        ema.update(module, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * module.weight.detach()
    torch.testing.assert_close(ema.module.weight, expected)


def test_checkpoint_holds_what_the_format_says(trained):
    content = torch.load(trained["denoiser"], weights_only=True)
    assert set(content) == {"model", "ema", "optim", "step", "config", "mean", "random", "run", "format"}
    assert content["step"] == 3 and content["mean"].shape == (1, 8, 8)
    assert not torch.equal(content["model"]["dec.8x8_aux_conv.bias"], content["ema"]["dec.8x8_aux_conv.bias"])


def test_equal_runs_write_equal_files(tmp_path):
    """So that the hash in a table of scores names the weights."""
    config = tiny_config()
    hashes = set()
    for folder in ("a", "b/longer"):
        torch.manual_seed(0)
        model = checkpoint.build_model(config)
        path = checkpoint.TrainingState(model, config, torch.zeros(1, 8, 8)).save(tmp_path / folder)
        assert f".pth.{os.getpid()}".encode() not in path.read_bytes()  # torch.save keeps the name of a path it is given
        hashes.add(misc.file_hash(path))
    assert len(hashes) == 1


# ---------------------------------------------------------------------------------------------------- files in a folder


def test_rotation_keeps_what_latest_points_to(tmp_path):
    """A kill between writing a checkpoint and pointing to it leaves a later one, which may be all that --keep 1 counts."""
    for step in (1, 2, 3):
        (tmp_path / f"DDPMpp-{step:06d}.pth").touch()
    (tmp_path / "latest.pth").symlink_to("DDPMpp-000002.pth")
    checkpoint.remove_old(tmp_path, 1)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["DDPMpp-000002.pth", "DDPMpp-000003.pth"]


def test_the_last_checkpoints_are_kept(tmp_path):
    assert Job(tmp_path / "log", *STAGE_1, "--workdir", tmp_path / "run").wait() == [0]
    names = sorted(path.name for path in (tmp_path / "run").glob("*.pth"))
    assert names == ["DDPMpp-000009.pth", "DDPMpp-000012.pth", "latest.pth"]
    assert Job(tmp_path / "log", *STAGE_1, "--keep", "0", "--workdir", tmp_path / "all").wait() == [0]
    assert len(checkpoint.checkpoints(tmp_path / "all")) == 4


def test_a_lost_pointer_and_a_damaged_checkpoint(tmp_path):
    """Copying may lose the link: the last checkpoint is found.  A damaged one is an error, never passed over in silence."""
    run = [*STAGE_1, "--workdir", tmp_path / "run"]
    assert Job(tmp_path / "first", *run, fault=("step", 8)).wait() == [-signal.SIGKILL]
    (tmp_path / "run" / "latest.pth").unlink()
    assert checkpoint.latest_checkpoint(tmp_path / "run").name == "DDPMpp-000006.pth"
    (tmp_path / "run" / "DDPMpp-000006.pth").write_bytes(b"damaged")
    job = Job(tmp_path / "second", *run)
    assert job.wait() == [2] and "DDPMpp-000006.pth is not a checkpoint" in job.err()


def refuse_links():
    """As on file systems without symbolic links."""

    def refuse(source, target):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    os.symlink = refuse


def refuse_to_sync_folders():
    """As on some network file systems."""
    real = os.fsync

    def sync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(handle)

    os.fsync = sync


@pytest.mark.parametrize(("limits", "links"), [(refuse_links, False), (refuse_to_sync_folders, True)])
def test_file_systems_that_cannot_do_everything_hold_runs_too(tmp_path, limits, links):
    """Training goes on, the last checkpoint is found, and the same command continues."""
    command = [*SHORT_STAGE_1, "--keep", "1", "--workdir", tmp_path / "run"]
    first = Job(tmp_path / "first", *command, prepare=limits)
    assert first.wait() == [0], first.err()
    assert checkpoint.latest_checkpoint(tmp_path / "run").name == "DDPMpp-000004.pth"
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "run")] == ["DDPMpp-000004.pth"]
    assert (tmp_path / "run" / "latest.pth").is_symlink() == links and not list((tmp_path / "run").glob(".*.tmp"))
    again = Job(tmp_path / "again", *command, "--train_steps", "6", prepare=limits)
    assert again.wait() == [0] and "DDPMpp-000004.pth at step 4 of 6" in again.err(), again.err()


def test_a_pointer_that_cannot_be_moved_on_is_removed(tmp_path, monkeypatch):
    """So that it never points to an earlier checkpoint than the last."""
    paths = [tmp_path / f"DDPMpp-{step:06d}.pth" for step in (1, 2)]
    for path in paths:
        path.touch()
    checkpoint.point_to(paths[0])
    assert checkpoint.latest_checkpoint(tmp_path) == paths[0]
    monkeypatch.setattr(os, "symlink", os.symlink)  # to be undone
    refuse_links()
    checkpoint.point_to(paths[1])
    assert checkpoint.latest_checkpoint(tmp_path) == paths[1] and not (tmp_path / "latest.pth").is_symlink()


# ------------------------------------------------------------------------------------------------------ files of others

TINY = {"data_name": "digits", "model_channels": 8, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,)}


def tiny_weights(mode="denoiser"):
    torch.manual_seed(1)
    return checkpoint.build_model(tiny_config(mode=mode)).net.state_dict()


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model."])
@pytest.mark.parametrize("place", [None, "ema", "model", "state_dict", "model_ema"])
def test_weights_of_others_load_under_any_wrapper_and_name(tmp_path, prefix, place):
    """DataParallel and torch.compile put names before every name; some save nothing but the weights."""
    own = tiny_weights()
    state = {f"{prefix}{name}": value for name, value in own.items()}
    others = {"model": {name: value + 1 for name, value in state.items()}} if place == "model_ema" else {}
    content = {**others, place: state, "epoch": 3, "args": {"lr": 1e-3}}
    torch.save(state if place is None else content, tmp_path / "x.pth")
    loaded = generator.load_model(tmp_path / "x.pth", TINY)
    assert all(torch.equal(value, own[name]) for name, value in loaded.model.net.state_dict().items())
    assert not loaded.is_flow_map and not loaded.knows_mean
    with pytest.raises(UserError, match="has no configuration: say --data_name"):
        generator.load_model(tmp_path / "x.pth")


def test_a_flow_map_of_others_is_known_by_its_weights(tmp_path):
    torch.save(tiny_weights("characteristic"), tmp_path / "x.pth")
    loaded = generator.load_model(tmp_path / "x.pth", TINY)
    assert loaded.is_flow_map and loaded.config.sampling.num_steps == 1


def test_names_that_are_missing_and_names_that_are_unknown_are_both_shown(tmp_path):
    state = tiny_weights()
    state["dec.8x8_aux_conv.scale"] = state.pop("dec.8x8_aux_conv.bias")
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(UserError, match="dec.8x8_aux_conv.bias is missing; dec.8x8_aux_conv.scale is unknown"):
        generator.load_model(tmp_path / "x.pth", TINY)
    torch.save({f"theirs.{name}": value for name, value in state.items()}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"and \d+ more.* missing; theirs\..* and \d+ more.* unknown"):
        generator.load_model(tmp_path / "x.pth", TINY)


class Settings:
    """Something that a pickle can hold, and that is no tensor."""


def safetensors(state):
    """The beginning of such a file: the length of its header, then the header."""
    header = json.dumps({name: {"dtype": "F32", "shape": list(v.shape), "data_offsets": [0, 4]} for name, v in state.items()})
    return struct.pack("<Q", len(header)) + header.encode() + bytes(4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (safetensors, "safetensors"),
        (lambda state: pickle.dumps({"ema": Settings()}), "Python objects|pickle"),
        (lambda state: {"ema": state, "args": Settings()}, r"it holds Python objects.*Settings"),
        (lambda state: torch.nn.Linear(1, 1), r"it holds Python objects.*Linear"),
        (lambda state: {"ema": state, "loss": np.float64(0.5)}, "it holds numpy values"),
        (lambda state: {"weights": {"ema": state}, "step": 3}, "no 'model' and 'ema' state dicts; it holds weights, step"),
        (lambda state: list(state.values()), "it is a list"),
    ],
)
def test_a_file_that_holds_no_weights_is_called_what_it_is(tmp_path, content, message):
    content = content(tiny_weights())
    if isinstance(content, bytes):
        (tmp_path / "x.pth").write_bytes(content)
    else:
        torch.save(content, tmp_path / "x.pth")
    with pytest.raises(UserError, match=message) as caught:
        checkpoint.read(tmp_path / "x.pth")
    assert "x.pth" in str(caught.value) and "\n" not in str(caught.value)


def test_a_flow_map_of_an_earlier_version_keeps_its_grid_and_is_drawn_in_one_step(tmp_path):
    """There the steps of stage 2's grid and of sampling were one setting."""
    path = tiny_checkpoint(tmp_path, mode="characteristic")
    content = torch.load(path, weights_only=True)
    plain = content["config"]
    for name in ("grid_steps", "grid_rho", "grid_spacing"):
        del plain["distil"][name]
    for name in ("class_names", "class_counts"):
        del plain["data"][name]
    plain["sampling"].update(num_steps=20, rho=2.0)
    del content["run"]["teacher"]
    torch.save(content, path)
    config = generator.load_model(path).config
    assert (config.distil.grid_steps, config.distil.grid_rho, config.sampling.num_steps) == (20, 2.0, 1)
    assert config.data.class_names == ()


def test_a_checkpoint_whose_tensors_were_changed_on_the_disk_is_not_continued(models, tmp_path):
    """One flipped byte inside a tensor: torch.load would not notice."""
    path = tmp_path / "x.pth"
    data = bytearray((models / "ode" / "DDPMpp-000004.pth").read_bytes())
    state = torch.load(models / "ode" / "DDPMpp-000004.pth", weights_only=True)["model"]
    largest = max(state.values(), key=torch.numel).numpy().tobytes()
    data[data.index(largest[:64]) + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="x.pth is not a checkpoint .* or it is damaged"):
        checkpoint.load_run(path)


@pytest.mark.parametrize("half", [False, True])
def test_published_weights_draw_the_same_images(models, tmp_path, half):
    source, dest = models / "flow" / "DDPMpp-000004.pth", tmp_path / "published.pth"
    out = run("checkpoint.py", source, dest, *(["--half"] if half else [])).stdout.split()
    assert out[0] == misc.file_hash(dest) and out[-1] == str(dest)
    assert dest.stat().st_size < source.stat().st_size / (6 if half else 3)
    assert set(checkpoint.read(dest)) == {"ema", "config", "mean", "step", "format"}
    a, b = (generator.load_model(path).images(range(8)).int() for path in (source, dest))
    assert (a - b).abs().max() <= (2 if half else 0)


def test_raw_weights_are_those_of_the_last_step(models, tmp_path):
    source = models / "ode" / "DDPMpp-000004.pth"
    run("checkpoint.py", source, tmp_path / "raw.pth", "--raw")
    content = checkpoint.read(source)
    assert_equal(dict(checkpoint.read(tmp_path / "raw.pth")["ema"]), dict(content["model"]))
    run("eval.py", "--checkpoint", source, "--raw", "--end_seed", "3", "--format", "npz", "--workdir", tmp_path / "out")
    drawn = dataset.open_images(tmp_path / "out")[0].batch(range(4))[0]
    assert torch.equal(drawn, generator.load_model(tmp_path / "raw.pth").images(range(4)))
    with pytest.raises(AssertionError, match="holds images made with other raw"):
        run("eval.py", "--checkpoint", source, "--end_seed", "3", "--format", "npz", "--workdir", tmp_path / "out")


def test_weights_that_do_not_fit_are_listed_and_the_others_begin_the_run():
    torch.manual_seed(0)
    old, new = (checkpoint.build_model(tiny_config(**flags)).net for flags in ({"label_dim": 3}, {"label_dim": 5}))
    state = {f"module.{name}": value + 1 for name, value in old.state_dict().items()}
    lines = list(checkpoint.init_weights(new, state, "x.pth"))
    assert lines == [
        "--init x.pth: 1 tensors begin afresh: map_label.weight",
        "--init x.pth: 1 tensors are left out: map_label.weight",
    ]
    for name, value in new.state_dict().items():
        assert torch.equal(value, 0 * value if name == "map_label.weight" else old.state_dict()[name] + 1)
