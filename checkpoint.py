"""Weights on disk: what a checkpoint holds, the average of the weights, and files of others.

  python checkpoint.py logs/mnist/latest.pth mnist.pth

As a script: write what one publishes, the averaged weights, configuration and mean of a checkpoint, without what only training
needs.  Prints SHA-256, size and path.
"""

import dist_util
from dist_util import UserError

import copy
import io
import math
import os
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import defaults
import misc
import network

FORMAT = 1


class EMA:
    """Moving average of a module's parameters and buffers, with decay min(decay, (1 + step)/(10 + step)) at each step."""

    def __init__(self, module, decay):
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, module, step):
        decay = min(self.decay, (1 + step) / (10 + step))
        mine, other = ([*net.parameters(), *net.buffers()] for net in (self.module, module))
        torch._foreach_lerp_(mine, other, 1 - decay)


def build_model(config):
    """Denoiser of a configuration, with fresh weights; two times if the mode is characteristic."""
    options = {**vars(config.network), "two_times": config.task.mode == "characteristic"}
    precondition = [options.pop(name) for name in ("sigma_data", "M", "time_input")]
    make = partial(network.UNet, config.data.image_size, config.data.image_channels, **options)
    try:
        with torch.device("meta"):  # no memory: how large would it be?
            size = sum(p.numel() for p in make().parameters())
    except ValueError as error:  # of GroupNorm
        raise UserError(f"--model_channels {config.network.model_channels} does not suit the network: {error}") from error
    if size > 2e10:
        raise UserError(f"a network of {size:.1e} parameters: lower --model_channels, --channel_mult or --num_blocks")
    return network.Denoiser(make(), *precondition, config.speed.precision)


def flops(config):
    """Floating-point operations of the network, forward and backward, for one image, as torch counts them; none is done."""
    data, label_dim = config.data, config.network.label_dim
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        net = build_model(config).net
        x, t = torch.empty(1, data.image_channels, data.image_size, data.image_size), torch.empty(1)
        out = net(x, t, t if net.two_times else None, torch.empty(1, label_dim) if label_dim else None)
        torch.autograd.backward(out.sum())
    return counter.get_total_flops()


def checkpoints(workdir):
    """The paths of a folder's checkpoints, by step."""
    found = ((re.fullmatch(r"DDPMpp-(\d+)\.pth", path.name), path) for path in Path(workdir).glob("DDPMpp-*.pth"))
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def latest_checkpoint(workdir):
    """What {workdir}/latest.pth points to; the last checkpoint where that was lost or never made; None without any."""
    pointer = Path(workdir) / "latest.pth"
    if pointer.is_symlink():
        return pointer.parent / os.readlink(pointer)
    return (checkpoints(workdir) or [None])[-1]


def point_to(path):
    """Make latest.pth a link to a checkpoint beside it, or remove it where links cannot be made."""
    pointer = path.with_name("latest.pth")
    try:
        with misc.atomic(pointer) as temporary:
            os.symlink(path.name, temporary)
    except UserError:
        with suppress(OSError):
            pointer.unlink(missing_ok=True)  # the last checkpoint counts then, see latest_checkpoint()
        misc.log(f"warning: {pointer} cannot be made a link here: name {path.name}; to go on, none is needed")


def remove_old(workdir, keep):
    """Keep the last `keep` checkpoints up to that of latest.pth, or all if 0.  A later one stays: its run writes it again."""
    known, latest = checkpoints(workdir), latest_checkpoint(workdir)
    known = known[: known.index(latest) + 1] if latest in known else []
    for old in known[:-keep] if keep else []:
        old.unlink(missing_ok=True)  # somebody else may have removed it


def read(path):
    """The content of a checkpoint, ours or of others, as a dict in which `ema` is a state dict; UserError for other files.

    Tensors and plain values alone are loaded, to the CPU: no code in the file ever runs.
    """
    if is_pickle(path):
        return read_edm(path)
    try:
        with warnings.catch_warnings():  # of torch about tensors that are refused below
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():  # torch does not look
            raise ValueError("what it holds is not what was written")
    except FileNotFoundError as error:
        raise UserError(f"there is no checkpoint {path}") from error
    except OSError as error:
        raise UserError(f"cannot read checkpoint {path}: {error.strerror}; name a .pth file") from error
    except Exception as error:  # whatever the unpickler meets in a damaged or hostile file
        why = _kind(path, str(error))
        raise UserError(f"{path} is not a checkpoint of tensors and plain values, or it is damaged{why}") from error
    content = find_weights(content, path)
    step, written = content.get("step", 0), content.get("format", FORMAT)
    if type(step) is not int or not 0 <= step < 2**63:
        raise UserError(f"{path} is damaged: its step is {step!r}")
    if type(written) is not int or written != FORMAT:
        raise UserError(f"{path} has format {written!r}, this version reads {FORMAT}: update the software")
    return content


def _kind(path, error):
    """What a file is that torch cannot load, and what to do; empty if unknown."""
    with open(path, "rb") as file:
        head, found = file.read(9), re.search(r"GLOBAL ([\w.]+)", error)
    if head[8:] == b"{":
        return ": it looks like safetensors; load it with that package and torch.save its dict of tensors"
    if not found and head[:1] != b"\x80":
        return ""
    kind = "numpy values" if found and "numpy" in found[1] else "Python objects, which are never loaded"
    name = f" ({found[1]})" if found else ""
    return f": it holds {kind}{name}; torch.save the state dict of tensors, and plain numbers, instead"


# ------------------------------------------------------------------------------------------------- EDM's pickles
# {'ema': EDMPrecond, ...}: modules whose classes travel as source text, which is never executed here.


def is_pickle(path):
    """Whether a file is a bare pickle.  torch.save writes none: its files are zips, or begin with a number of its own."""
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError:
        return False
    return head[:1] == b"\x80" and b"l\xfc\x9cF\xf9 j\xa8P\x19" not in head


class Shell:
    """What a pickled module is read as: the name of its class, and its attributes."""

    class_name, state = "", {}

    def __setstate__(self, state):
        self.state = state


def _persistent(meta):
    shell = Shell()
    shell.class_name, shell.state = meta["class_name"], meta["state"]
    return shell


def _storage(content):
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _tensor(storage, offset, size, stride, *ignored):
    """ValueError for one that is larger than what is stored: torch would fill up with whatever is in the memory."""
    if len(size) != len(stride):
        raise ValueError("a tensor with other strides than sizes")
    if min((offset, *size, *stride)) < 0 or offset + sum((n - 1) * step for n, step in zip(size, stride)) >= storage._size():
        raise ValueError("a tensor without its numbers")
    return torch._utils._rebuild_tensor_v2(storage, offset, size, stride, False, {})


def _scalar(kind, content):
    return np.frombuffer(content, {"f4": "<f4", "f8": "<f8", "i4": "<i4", "i8": "<i8", "b1": "?"}[kind.state[0]])[0].item()


class _Kind(Shell):
    """numpy.dtype(...), of which the first argument is kept."""

    def __init__(self, *arguments):
        self.state = arguments

    def __setstate__(self, state):
        """The byte order, always the usual one."""


SAFE = {  # (module, name): what a pickle gets for it; all that it may ask for
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent,
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("dnnlib.util", "EasyDict"): dict,
    ("copy_reg", "_reconstructor"): lambda *ignored: Shell(),
    ("copyreg", "_reconstructor"): lambda *ignored: Shell(),
    ("builtins", "object"): object,
    ("__builtin__", "object"): object,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *ignored: tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("torch.nn.modules.container", "ModuleDict"): Shell,
    ("torch.nn.modules.container", "ModuleList"): Shell,
    ("torch.nn.modules.container", "Sequential"): Shell,
    ("numpy", "dtype"): _Kind,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("_codecs", "encode"): lambda text, encoding: text.encode("latin1"),
}


class _Refused(Exception):
    """A pickle asks for what SAFE does not hold."""


class _Call:
    """A function that a pickle may call, and whose own attributes, such as its defaults, it cannot set."""

    __slots__ = ("function",)

    def __init__(self, function):
        self.function = function

    def __call__(self, *arguments):
        return self.function(*arguments)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) not in SAFE:
            raise _Refused(f"it asks for {module}.{name}, which is not loaded: it could run code of strangers")
        found = SAFE[module, name]
        return found if isinstance(found, type) else _Call(found)


def read_edm(path):
    """The content of a pickle that EDM publishes (arXiv 2206.00364): `ema`, a state dict, and `config`.  None of it runs.

    Weights of its augmentation pipeline are left out: they add zero in sampling.  UserError for any other pickle.
    """
    try:
        with open(path, "rb") as file:
            content = _Unpickler(file).load()
        net, state = content["ema"], content["ema"].state
        options = dict(state["_init_kwargs"])
        kind, model = net.class_name, options.get("model_type", "DhariwalUNet")
        held = f"{kind} of a {model}"  # some values have no text
    except OSError as error:
        raise UserError(f"cannot read checkpoint {path}: {error.strerror}") from error
    except _Refused as error:
        raise UserError(f"{path} is a pickle that is not loaded: {error}") from error
    except Exception as error:  # whatever the unpickler meets in a damaged or hostile file
        raise UserError(f"{path} is a pickle, but damaged or without one of EDM's networks as 'ema'") from error
    if kind != "EDMPrecond" or model != "SongUNet":
        raise UserError(f"{path} holds a {held}: of EDM's networks, EDMPrecond of SongUNet is supported")
    config = edm_config(options, path)
    try:
        weights = {name: value for name, value in _tensors(state["_modules"]["model"]) if not name.startswith("map_augment")}
    except Exception as error:  # likewise
        raise UserError(f"{path} is damaged: the network in it has no weights") from error
    return {"ema": weights, "config": defaults.to_dict(config)}


def _tensors(module, prefix="", seen=()):
    """(name, tensor) of a Shell, as state_dict() would name them; ValueError where a module is held twice: that may not end."""
    seen = seen or set()
    if id(module) in seen:
        raise ValueError("a module in two places")
    seen.add(id(module))
    for kind in ("_parameters", "_buffers"):
        yield from ((prefix + name, value) for name, value in module.state[kind].items() if value is not None)
    for name, child in module.state["_modules"].items():
        if child is not None:
            yield from _tensors(child, f"{prefix}{name}.", seen)


def edm_config(options, path):
    """The Config of EDMPrecond's arguments; those left out have EDM's defaults.  Sampling as in its generate.py."""
    names = ("embedding_type", "channel_mult_noise", "resample_filter", "encoder_type")
    parts = [options.get(name, usual) for name, usual in zip(names, ("positional", 1, [1, 1], "standard"))]
    kinds = {
        name: [embedding, width, list(taps), "residual" if residual else "standard"]
        for name, (embedding, width, taps, residual) in network.ARCHITECTURES.items()
    }
    architecture = next((name for name, kind in kinds.items() if kind == parts), None)
    usual = {"model_channels": 128, "channel_mult": [1, 2, 2, 2], "channel_mult_emb": 4, "num_blocks": 4}
    usual |= {"attn_resolutions": [16], "dropout": 0.1, "label_dim": 0, "label_dropout": 0.0, "sigma_data": 0.5}
    found = {name: options.get(name, value) for name, value in usual.items()}
    found |= {"image_size": options.get("img_resolution"), "image_channels": options.get("img_channels")}
    found = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
    try:
        if architecture is None or options.get("decoder_type", "standard") != "standard":
            told = ", ".join(f"{name} {value}" for name, value in zip(names, parts))
            raise ValueError(f"it is neither DDPM++ nor NCSN++: {told}")
        low, high = max(options.get("sigma_min", 0), 0.002), min(options.get("sigma_max", math.inf), 80.0)
        if not low < high:
            raise ValueError(f"sigma_min {low} and sigma_max {high}")
        w = [math.sqrt(1 + sigma**2) for sigma in (low, high)]
        sampling = {"ode_solver": "edm", "time_grid": "karras", "num_steps": 18, "rho": 7.0}
        sampling |= {"eval_eps0": low**2 / (w[0] * (1 + w[0])), "eval_eps1": 1 / w[1]}
        kind = {"data_name": "folder", "architecture": architecture, "time_input": "log_snr"}
        return defaults.resolve({**kind, **found, **sampling})
    except (UserError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise UserError(f"{path} holds a network that does not fit: {error}") from error


def find_weights(content, path):
    """A checkpoint's content with `ema`, from what others save: averaged weights by other names, or the only ones."""
    if isinstance(content, dict):
        for name in ("ema", "model_ema", "ema_model", "state_dict_ema", "params_ema", "state_dict", "model"):
            if isinstance(content.get(name), dict):
                return {**content, "ema": content[name]}
        if content and all(isinstance(value, torch.Tensor) for value in content.values()):
            return {"ema": content}
        held = f"it holds {', '.join(map(str, list(content)[:5]))}"
    else:
        held = f"it is a {type(content).__name__}"
    raise UserError(f"{path} is not a checkpoint: it has no 'model' and 'ema' state dicts; {held}")


def is_finite(x):
    """Whether a value of a checkpoint is a tensor of finite floating-point numbers, dense and on the CPU."""
    dense = isinstance(x, torch.Tensor) and x.layout is torch.strided and x.device.type == "cpu" and not x.is_nested
    with suppress(RuntimeError):  # of four bits, which torch does not convert
        return dense and x.is_floating_point() and bool(x.float().isfinite().all())
    return False


WRAPPERS = ("module.", "_orig_mod.", "model.", "net.")  # what DataParallel, compile and others put before every name


def unwrap(state):
    """A state dict without the prefixes of WRAPPERS."""
    while prefix := next((p for p in WRAPPERS if state and all(str(k).startswith(p) for k in state)), None):
        state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state


def load_weights(net, state, path):
    """Strict load_state_dict of an unwrap()ped state dict; UserError names what differs."""
    state, own, wrong = unwrap(state), net.state_dict(), []

    def differ(names, what):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            wrong.append(f"{', '.join(map(str, names[:3]))}{more} {what(names[0])}")

    shapes = {k: () if getattr(state[k], "is_nested", True) else tuple(state[k].shape) for k in own if k in state}
    fit = [k for k in shapes if shapes[k] == own[k].shape]
    differ([k for k in own if k not in state], lambda _: "is missing")
    differ([k for k in state if k not in own], lambda _: "is unknown")
    differ([k for k in shapes if k not in fit], lambda k: f"is {shapes[k]}, not {tuple(own[k].shape)}")
    differ([k for k in fit if not is_finite(state[k])], lambda _: "is not finite, or not of floating-point numbers")
    if wrong:
        raise UserError(f"{path} does not fit this network: {'; '.join(wrong)}")
    net.load_state_dict(state)


def init_weights(net, state, path):
    """Load what fits of a state dict, and yield lines that list the rest; UserError if nothing does.

    Names hold resolutions, "enc.28x28_conv.weight": those of images of another size are renamed, level by level.  Classes that
    begin afresh begin at zero, so that the network begins as the one without them.
    """
    own, level = net.state_dict(), re.compile(r"(?<=^...\.)(\d+)x\1(?=_)")

    def levels(names):
        return sorted({int(found[1]) for name in names if (found := level.search(name))}, reverse=True)

    state = {str(name): value for name, value in unwrap(state).items()}
    renamed = dict(zip(levels(state), levels(own)))
    state = {level.sub(lambda found: "{0}x{0}".format(renamed.get(int(found[1]))), k): v for k, v in state.items()}
    fits = {k: v for k, v in state.items() if k in own and is_finite(v) and v.shape == own[k].shape}
    if not fits:
        raise UserError(f"--init {path}: none of its {len(state)} tensors fits this network")
    zero = {k: torch.zeros_like(v) for k, v in own.items() if k.startswith("map_label")}
    net.load_state_dict({**own, **zero, **fits})
    for what, names in (("begin afresh", own.keys() - fits), ("are left out", state.keys() - fits)):
        if names:
            yield f"--init {path}: {len(names)} tensors {what}: {', '.join(sorted(map(str, names)))}"


def override(config, flags, path, sections=("task", "data", "network"), free=("dropout", "label_dropout"), advice=None):
    """The configuration of the checkpoint `path` with explicit flags over it; UserError lists those that may not differ.

    These are all of `sections`, by default those that fix what the weights can be, but for `free` and how the data is read.
    """
    free = ("data_path", "num_workers", *free)
    was = {key: value for name in sections for key, value in vars(getattr(config, name)).items() if key not in free}
    different = [f"--{defaults.flag_of(k)} is {flags[k]} and was {old}" for k, old in was.items() if flags.get(k, old) != old]
    if different:
        raise UserError(f"{path} was made with other settings: {'; '.join(different)}: {advice or 'leave them out'}")
    return defaults.resolve(flags, config)


def check_mean(mean, config, path):
    """UserError unless the mean that a checkpoint holds is that of images of its configuration."""
    shape = (config.data.image_channels, config.data.image_size, config.data.image_size)
    if not is_finite(mean) or mean.dtype != torch.float32 or mean.shape != shape:
        raise UserError(f"{path} is damaged: its mean is not a finite image of {shape}")


class Window:
    """Sums, in float64, of what the steps since the last line of metrics.jsonl logged, on this rank."""

    def __init__(self, device):
        self.device, self.sums, self.steps, self.skipped = device, {}, 0, 0

    def add(self, logs):
        self.steps += 1
        for name, value in logs.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.double()

    def means(self):
        """{name: mean over steps and ranks}, and how many steps were skipped if any; all ranks call this together."""
        names, found = sorted(self.sums), {}
        if names:
            sums = torch.stack([self.sums[name] for name in names])
            means = dist_util.sum_over_ranks(sums) / dist_util.world_size() / self.steps
            found = dict(zip(names, means.tolist()))
        return {**found, **({"skipped": self.skipped} if self.skipped else {})}

    def content(self):
        """What a checkpoint holds of it; all ranks call this together."""
        sums = dist_util.gather({name: value.item() for name, value in self.sums.items()})
        return {"steps": self.steps, "skipped": self.skipped, "sums": sums}

    def restore(self, content):
        """The inverse; on more ranks than before some take the sums of another, on fewer some sums are left out."""
        mine = content["sums"][dist_util.rank() % len(content["sums"])]
        self.sums = {name: torch.tensor(value, dtype=torch.float64, device=self.device) for name, value in mine.items()}
        self.steps, self.skipped = content["steps"], content["skipped"]


@dataclass
class Saved:
    """What the checkpoint of a run holds; see load_run()."""

    path: Path
    config: defaults.Config
    step: int
    mean: torch.Tensor  # (C, H, W) of the data
    ranks: int  # that the run had
    bsz: int
    images: int  # of the data
    data: str  # the data's fingerprint
    skipped: int  # steps
    window: dict  # Window.content()
    origin: dict | None  # path, sha256 and step of the checkpoint that the run began from with --resume
    teacher: dict | None  # path and sha256 of the teacher's checkpoint
    weights: dict = field(repr=False)  # model, ema, optim
    init: dict | None = None  # path and sha256 of the checkpoint whose weights the run began with
    ratio: float | None = None  # the objective's, of the last step: see train.Distillation.balance


def load_run(path):
    """The Saved of a checkpoint that train.py wrote; UserError for another, a damaged one, or one of an earlier version."""
    content = read(path)
    if not {"model", "config", "optim", "mean", "run"} <= content.keys():
        raise UserError(f"{path} holds no run to continue: it was not written by train.py, or by an earlier version")
    config, run = defaults.from_dict(content["config"]), content["run"]
    if isinstance(run, dict) and isinstance(run.get("teacher"), str):  # earlier versions kept its hash alone
        run = {**run, "teacher": {"path": "", "sha256": run["teacher"]}}
    check_mean(content["mean"], config, path)
    try:
        weights = {name: dict(content[name]) for name in ("model", "ema", "optim")}
        saved = Saved(Path(path), config, content.get("step", 0), content["mean"], **run, weights=weights)
        window, sums, files = saved.window, saved.window["sums"], [saved.origin, saved.teacher, saved.init]
        counts = [saved.ranks - 1, saved.bsz, saved.images, saved.skipped, window["steps"], window["skipped"]]
        counts += [saved.origin["step"]] if saved.origin else []
        numbers = [saved.ratio or 0.0, *(value for part in sums for value in part.values())]
        whole = [
            len(sums) == saved.ranks and all(sorted(part) == sorted(sums[0]) for part in sums),
            all(type(n) is int and 0 <= n < 2**63 for n in counts),
            all(type(value) is float and math.isfinite(value) for value in numbers),
            all(file is None or type(file["path"]) is type(file["sha256"]) is str for file in files),
        ]
        if not all(whole):
            raise ValueError("values of another kind")
    except Exception as error:  # whatever values of another kind run into
        raise UserError(f"what {path} holds of its run cannot be continued: it is damaged, or of another version") from error
    return saved


class TrainingState:
    """All that changes while a run trains, and what else its checkpoints hold; alone in knowing their keys.

    All random numbers come from generators seeded by (seed, purpose, step, round, rank): seed and step are the random state.
    """

    def __init__(self, model, config, mean, images=0, data="", origin=None, teacher=None, init=None):
        self.model, self.config, self.mean = model, config, mean
        self.facts = {"images": images, "data": data, "origin": origin, "teacher": teacher, "init": init}  # see Saved
        self.ema = EMA(model, config.train.ema_decay)
        self.optim = torch.optim.RAdam(model.parameters(), lr=config.train.lr)
        self.window, self.step, self.skipped = Window(mean.device), 0, 0

    def restore(self, saved):
        """Go on where a Saved ended; UserError if it is of another network or optimizer."""
        load_weights(self.model.net, saved.weights["model"], saved.path)
        load_weights(self.ema.module.net, saved.weights["ema"], saved.path)
        self._load_optimizer(saved.weights["optim"], saved.path)
        self.window.restore(saved.window)
        self.step, self.skipped = saved.step, saved.skipped

    def _load_optimizer(self, state, path):
        """load_state_dict but for the settings, which stay; UserError unless every parameter has its state."""
        try:
            states = [{k: v.clone() for k, v in state["state"][i].items()} for i in range(len(state["state"]))]
            for p, s in zip(self.model.parameters(), states, strict=True):
                shapes = {k: v.shape for k, v in s.items()}
                finite = all(is_finite(v) and v.dtype == torch.float32 for v in s.values())
                fits = shapes == {"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape} and s["step"] >= 0
                if not finite or not fits or (s["exp_avg_sq"] < 0).any():
                    raise ValueError("values of another kind")
        except Exception as error:  # whatever another dict runs into
            raise UserError(f"{path} does not hold the optimizer of this run, or it is damaged") from error
        groups = self.optim.state_dict()["param_groups"]
        self.optim.load_state_dict({"state": dict(enumerate(states)), "param_groups": groups})

    def is_finite(self):
        """Whether all weights are finite numbers, on all ranks; all ranks call this together."""
        nets = (self.model, self.ema.module)
        return all(dist_util.gather(all(bool(x.isfinite().all()) for net in nets for x in net.state_dict().values())))

    def save(self, workdir, keep=0):
        """Write {workdir}/DDPMpp-{step}.pth and return its path; all ranks call this together, and the first one writes.

        latest.pth is moved on after that, and old ones are removed last: what latest.pth points to is always whole.
        """
        path = Path(workdir) / f"DDPMpp-{self.step:06d}.pth"
        net, ema = self.model.net, self.ema.module.net
        content = {"model": net.state_dict(), "ema": ema.state_dict(), "optim": self.optim.state_dict(), "step": self.step}
        content |= {"config": defaults.to_dict(self.config), "mean": self.mean.cpu(), "format": FORMAT}
        content["random"] = {"seed": self.config.train.seed, "step": self.step}
        content["run"] = {**self.facts, "ranks": dist_util.world_size(), "bsz": self.config.train.bsz}
        content["run"] |= {"skipped": self.skipped, "window": self.window.content()}

        def write():
            with misc.atomic(path) as temporary, open(temporary, "wb") as file:  # torch would write a name into the file
                torch.save(content, file)
            point_to(path)
            remove_old(workdir, keep)

        dist_util.on_first_rank(write)
        return path


def publish(src, dest, half=False, raw=False):
    """Write a checkpoint's weights, configuration and mean to `dest`; `half`: in float16, `raw`: those of the last step.

    UserError unless the weights are those of the configuration, and finite in float16 too.
    """
    content = read(src)
    if os.path.lexists(dest) and (not os.path.isfile(dest) or os.path.islink(dest) or os.path.samefile(src, dest)):
        raise UserError(f"{dest} is a folder, a link, or the source itself: name another file")
    if os.path.isfile(dest) and "optim" in read(dest):
        raise UserError(f"{dest} is a checkpoint that a run goes on from: name another file")
    if "config" not in content or raw and not isinstance(content.get("model"), dict):
        raise UserError(f"{src} holds no {'weights of its last step' if 'config' in content else 'configuration'}")
    config = defaults.from_dict(content["config"])
    net = build_model(config).net
    load_weights(net, content["model" if raw else "ema"], src)
    if "mean" in content:
        check_mean(content["mean"], config, src)
    weights, parameters = net.state_dict(), {name for name, _ in net.named_parameters()}
    if half:  # buffers stay: frequencies of times need their digits
        weights = {name: x.half() if name in parameters else x for name, x in weights.items()}
        load_weights(net, weights, f"{src} in float16")
    kept = {name: content[name] for name in ("step", "mean", "config", "format") if name in content}
    kept |= {"raw": True} if raw or content.get("raw") is True else {}
    with misc.atomic(dest) as temporary, open(temporary, "wb") as file:
        torch.save({"format": FORMAT, **kept, "ema": weights}, file)


def main():
    run, _ = defaults.parse("checkpoint", description=__doc__)
    with dist_util.session():
        dist_util.on_first_rank(lambda: publish(run.src, run.dest, run.half, run.raw))
        if dist_util.rank() == 0:
            print(f"{misc.file_hash(run.dest)}  {os.path.getsize(run.dest) / 1e6:.2f} MB  {run.dest}")


if __name__ == "__main__":
    dist_util.launch(main)
