"""Every setting, its default and its meaning: presets, the command line made from them, and the plain form for files.

A setting is a field of one of the frozen dataclasses below; its name is its flag.  Values come, later ones winning, from
the field, from the preset of `--data_name` and `--mode`, from a checkpoint where one is read, and from the command line.
"""

from dist_util import UserError

import argparse
import dataclasses
import difflib
import os
import typing
from dataclasses import dataclass, field, fields


def setting(default, help, limits=(None, None), choices=None, between=None, path=None, flag=True, positional=False):
    """A field that is a setting; values are within `limits` (least, greatest), among `choices`, or `between` two others.

    `path` is for a file or folder, in which `~` is home: an ending such as ".npz" that is added where it is missing, or "".
    `flag` is False for what is recorded, and no flag.
    """
    allowed = {"least": limits[0], "most": limits[1], "choices": choices, "between": between}
    return field(default=default, metadata={"help": help, "path": path, "flag": flag, "positional": positional, **allowed})


def file(help, ending="", positional=False):
    """A setting that is a file or a folder; a `positional` one must be given, by its place instead of a flag."""
    return setting(None, help, path=ending, positional=positional)


MANY, SHARE, TIME = 2**31, (0, 1), (1e-8, 1)
MODES = ("denoiser", "characteristic")


@dataclass(frozen=True)
class Task:
    mode: str = setting("denoiser", "denoiser: stage 1, characteristic: stage 2; a checkpoint refuses the other", choices=MODES)


@dataclass(frozen=True)
class Data:
    data_name: str = setting("digits", "data set", choices=lambda: tuple(DATA_PRESETS))
    data_path: str = setting(
        "data",
        "where the images are; mnist, cifar: folder of the torchvision files, filled if missing; afhq: holds "
        "afhq/train/{cat,dog,wild}; folder: a flat folder, class folders or a zip of images; digits: not used",
        path="",
    )
    split: str = setting(
        "train",
        "mnist, cifar, afhq, and a folder that holds train/ and test/: which of the two (the digits are all for training)",
        choices=("train", "test"),
    )
    image_size: int = setting(
        64, "pixels of a side (free for afhq and folder, which are cropped and resized; chooses folder's presets)", (1, 4096)
    )
    image_channels: int = setting(3, "1 for grey, 3 for colour (free for folder alone)", choices=(1, 3))
    centered: bool = setting(True, "pixels scaled to [-1, 1] instead of [0, 1]")
    flip: bool = setting(False, "mirror training images left to right at random")
    num_workers: int = setting(0, "threads that read images ahead, per rank; 0: read when needed (fid.py: 2)", (0, 1024))
    class_names: tuple[str, ...] = setting((), "the classes found in the data, in the order of their numbers", flag=False)
    class_counts: tuple[int, ...] = setting((), "how many images each of them has", flag=False)


@dataclass(frozen=True)
class Network:
    architecture: str = setting("ddpmpp", "U-Net of Song et al., DDPM++ or NCSN++", choices=("ddpmpp", "ncsnpp"))
    model_channels: int = setting(128, "channels at full resolution, before --channel_mult", (1, 2**16))
    channel_mult: tuple[int, ...] = setting((1, 2, 2, 2), "channels at each resolution, in model_channels")
    channel_mult_emb: int = setting(4, "width of the embeddings of time and label, in model_channels", (1, 1024))
    num_blocks: int = setting(4, "residual blocks at each resolution", (1, 1024))
    attn_resolutions: tuple[int, ...] = setting((16,), "resolutions in pixels with self-attention; no value for none")
    dropout: float = setting(0.1, "probability of zeroing a hidden activation in training", SHARE)
    label_dim: int = setting(0, "number of classes to condition on; 0 for none", (0, 2**20))
    label_dropout: float = setting(0.0, "stage 1: probability of hiding the label of a training image", SHARE)
    sigma_data: float = setting(
        1.0, "standard deviation of the data, for the preconditioning; auto: measured (train.py)", between=(1e-4, 1e4)
    )
    M: float = setting(999.0, "network's unit of time: it sees M t", between=(0, 1e6))
    time_input: str = setting(
        "t", "what the network sees of t: M t, or log_snr: ln(beta/alpha)/4, as EDM's do", choices=("t", "log_snr")
    )


@dataclass(frozen=True)
class Train:
    train_steps: int = setting(10000, "optimizer steps in all", (1, MANY))
    global_bsz: int = setting(1024, "images per optimizer step, over all ranks and accumulation rounds", (1, 2**24))
    bsz: int = setting(128, "images per rank and round; global_bsz must be a multiple of bsz times the ranks", (1, 2**20))
    lr: float = setting(1e-3, "learning rate (RAdam, gradient norm clipped to 1)", between=(0, 10))
    lr_rampup_steps: int = setting(500, "steps of linear warm-up", (0, MANY))
    lr_decay: str = setting("none", "after the warm-up; none: constant, cosine: half a cosine to 0", choices=("none", "cosine"))
    ema_decay: float = setting(0.999, "decay of the average of the weights: min(this, (1 + step)/(10 + step))", SHARE)
    train_eps0: float = setting(1e-5, "least time trained, and last positive time of stage 2's grid", between=TIME)
    train_eps1: float = setting(1e-3, "stage 2's grid starts at t = 1 - this", between=TIME)
    log_freq: int = setting(100, "steps between lines of metrics.jsonl", (1, MANY))
    sampling_freq: int = setting(1000, "steps between grids of samples, and loss.png; 0 for none", (0, MANY))
    dump_freq: int = setting(5000, "steps between checkpoints (the last step always writes one)", (1, MANY))
    nsampling: int = setting(64, "images in a grid of samples", (1, 2**16))
    val_freq: int = setting(0, "steps between denoising losses of the moving average on images of --split test", (0, MANY))
    fid_freq: int = setting(0, "steps between scores of the moving average against --ref_path; 0 for none", (0, MANY))
    fid_num: int = setting(2048, "images for such a score, of seeds from 0", (2, 2**24))
    seed: int = setting(0, "seed of the initial weights, the data order and all noise", (0, MANY))


@dataclass(frozen=True)
class Distil:  # stage 2
    objective: str = setting(
        "trajectory", "trajectory: regression on solutions of the ODE (paper); semigroup: consistency along it (authors' code)"
    )
    loss_norm: str = setting("huber", "distance of images: l2, huber, or lpips (perceptual; needs two files of weights)")
    grid_steps: int = setting(20, "steps of the grid of times (train.py's --num_steps)", (1, 4095), flag=False)
    grid_rho: float = setting(1.0, "curvature of that grid (train.py's --rho)", between=(0.1, 100), flag=False)
    grid_spacing: str = setting("t", "what it is even in (train.py's --time_grid)", choices=("t", "cosine"), flag=False)
    teacher_solver: str = setting("deis", "solver of the teacher's ODE: euler, heun, deis, dpm or edm")
    teacher_guidance: float = setting(1.0, "guidance of that ODE (train.py's --guidance)", (0, 100), flag=False)
    dsm_weight: float = setting(1.0, "factor of the stage-1 loss at s = t", (0, 10**6))
    adaptive_weight: bool = setting(True, "scale the stage-1 loss to the distance's gradient norm at the last layer")
    dsm_share: float = setting(0.25, "trajectory: share of each batch spent on the stage-1 loss", SHARE)
    one_step_share: float = setting(0.4, "trajectory: share of pairs (noise, data)", SHARE)
    to_data_share: float = setting(0.2, "trajectory: share of pairs (any time, data)", SHARE)
    bank_size: int = setting(8192, "trajectory: solutions stored, over all ranks", (1, 2**24))
    bank_refresh_freq: int = setting(32, "trajectory: steps between renewals of the oldest global_bsz; 0: never", (0, MANY))
    bank_dtype: str = setting("float32", "trajectory: precision of the solutions", choices=("float32", "float16"))
    teacher_steps: int = setting(19, "semigroup: greatest number of teacher steps from t to u", (1, 4096))
    teacher_steps_strategy: str = setting(
        "proportional", "semigroup: probability of n teacher steps: as n, or all equal", choices=("proportional", "uniform")
    )


@dataclass(frozen=True)
class Sampling:
    ode_solver: str = setting("deis", "solver of the denoiser's ODE: euler, heun, deis, dpm or edm; a flow map needs none")
    num_steps: int = setting(
        20, "steps from noise to data; heun calls more often (20, flow map 1; train.py in stage 2: its grid, 20)", (1, 4096)
    )
    time_grid: str = setting(
        "t",
        "t: even in t^(1/rho); cosine: even in arcsin(t^(0.5/rho)), fine at both ends; karras: even in (beta/alpha)^(1/rho); "
        "train.py in stage 2: of its grid, t or cosine",
        choices=("t", "cosine", "karras"),
    )
    rho: float = setting(1.0, "curvature of the time grid (7 where --time_grid karras is given)", between=(0.1, 100))
    eval_eps0: float = setting(1e-3, "last positive time of the grid (t = 0 is data)", between=TIME)
    eval_eps1: float = setting(1e-3, "sampling starts at t = 1 - this", between=TIME)
    guidance: float = setting(
        1.0,
        "push images away from what the denoiser says without a class, or from a weaker denoiser where there is --guide: 1 "
        "not at all; needs --label_dropout in stage 1; train.py distils it into the flow map",
        (0, 100),
    )
    sde: bool = setting(False, "sample the reverse SDE instead of the ODE (denoiser)")
    churn: bool = setting(False, "before a step, go back to t' = (1 + gamma) t with fresh noise (denoiser)")
    s_min: float = setting(0.0, "churn: least time at which it happens", SHARE)
    s_max: float = setting(1.0, "churn: greatest time at which it happens", SHARE)
    gamma: float = setting(0.1, "churn: how far back, relative to t", (0, 10**6))
    class_idx: int = setting(
        -1,
        "class to draw, for conditional models: its name or its number; -1: one from each image's seed",
        (-1, 2**20),
    )
    eval_bsz: int = setting(256, "images per rank and batch", (1, 2**20))


@dataclass(frozen=True)
class Speed:
    """speed"""

    precision: str = setting(
        "fp32",
        "of the network; all else is float32. fp32: strict; tf32: a GPU's matrix units; bf16: autocast (train.py: bf16 where "
        "the processor computes in it, else fp32; elsewhere fp32)",
        choices=("fp32", "tf32", "bf16"),
    )
    compile: bool = setting(False, "compile the network, which takes a minute or two; needs a C++ compiler")


SECTIONS = {"task": Task, "data": Data, "network": Network, "train": Train, "distil": Distil}
SECTIONS |= {"sampling": Sampling, "speed": Speed}
SETTINGS = {f.name: f for section in SECTIONS.values() for f in fields(section)}


@dataclass(frozen=True)
class Config:
    """Everything a checkpoint records about how it was made."""

    task: Task = Task()
    data: Data = Data()
    network: Network = Network()
    train: Train = Train()
    distil: Distil = Distil()
    sampling: Sampling = Sampling()
    speed: Speed = Speed()

    def replace(self, section, **values):
        """The same with other values in one section."""
        return dataclasses.replace(self, **{section: dataclasses.replace(getattr(self, section), **values)})


# ------------------------------------------------------------------------------------------------------- presets

# sigma_data is 1 as in the reference's checkpoints; for the digits the standard deviation of their pixels: they train faster.
DATA_PRESETS = {
    # data_name  size  channels  centered  workers  sigma_data  width  mult             blocks  attention  dropout
    "digits":   (8,    1,        True,     0,       0.75,       32,    (1, 2),          1,      (4,),      0.0),
    "mnist":    (28,   1,        False,    0,       1.0,        32,    (1, 2, 2),       4,      (14,),     0.1),
    "cifar":    (32,   3,        True,     0,       1.0,        128,   (1, 2, 2, 2),    4,      (16,),     0.1),
    "afhq":     (64,   3,        True,     2,       1.0,        128,   (1, 1, 2, 2, 2), 4,      (16,),     0.1),
    "folder":   (64,   3,        True,     2,       0.5,        64,    (1, 2, 2, 4),    2,      (16,),     0.1),
}  # fmt: skip
DATA_COLUMNS = (
    "image_size", "image_channels", "centered", "num_workers", "sigma_data", "model_channels", "channel_mult", "num_blocks",
    "attn_resolutions", "dropout",
)  # fmt: skip

TRAIN_PRESETS = {
    # data_name, mode              steps   global_bsz  bsz   lr    warm-up  decay     EMA     eps0   logs  samples  dump
    ("digits", "denoiser"):       (600,    128,        128,  4e-3, 100,     "cosine", 0.995,  1e-3,  50,   300,     600),
    ("digits", "characteristic"): (500,    128,        128,  4e-3, 50,      "cosine", 0.98,   1e-2,  50,   250,     500),
    ("mnist",  "denoiser"):       (10000,  1024,       256,  1e-3, 500,     "none",   0.999,  1e-5,  100,  1000,    2500),
    ("mnist",  "characteristic"): (2000,   256,        256,  1e-3, 200,     "none",   0.999,  1e-5,  50,   200,     500),
    ("cifar",  "denoiser"):       (400000, 1024,       128,  2e-4, 500,     "none",   0.9999, 1e-5,  100,  5000,    10000),
    ("cifar",  "characteristic"): (2000,   256,        32,   1e-4, 200,     "none",   0.9999, 1e-5,  50,   200,     500),
    ("afhq",   "denoiser"):       (400000, 1024,       32,   2e-4, 500,     "none",   0.9999, 1e-5,  100,  5000,    10000),
    ("afhq",   "characteristic"): (2000,   256,        16,   1e-4, 200,     "none",   0.9999, 1e-5,  50,   200,     500),
    ("folder", "denoiser"):       (50000,  64,         32,   1e-3, 500,     "cosine", 0.999,  1e-3,  100,  2000,    2000),
    ("folder", "characteristic"): (10000,  64,         32,   1e-3, 200,     "cosine", 0.999,  1e-3,  100,  1000,    1000),
}  # fmt: skip
TRAIN_COLUMNS = (
    "train_steps", "global_bsz", "bsz", "lr", "lr_rampup_steps", "lr_decay", "ema_decay", "train_eps0", "log_freq",
    "sampling_freq", "dump_freq",
)  # fmt: skip

# For --data_name folder, networks and runs for one GPU or a patient laptop: the first row that --image_size is not above, or
# the presets' of 64.
FOLDER_PRESETS = {
    # image_size: width  mult       blocks  attention  dropout  global_bsz  bsz  lr    bank_size
    8:           (32,    (1, 2),    1,      (4,),      0.0,     128,        128, 4e-3, 2048),
    16:          (32,    (1, 2),    2,      (8,),      0.0,     128,        128, 2e-3, 4096),
    32:          (32,    (1, 2, 4), 2,      (),        0.0,     128,        64,  2e-3, 4096),
}  # fmt: skip
FOLDER_COLUMNS = (
    "model_channels", "channel_mult", "num_blocks", "attn_resolutions", "dropout", "global_bsz", "bsz", "lr", "bank_size",
)  # fmt: skip
FOLDER_RUNS = {
    # image_size, mode         steps  warm-up samples dump
    (8,  "denoiser"):         (600,   100,    300,    600),
    (8,  "characteristic"):   (500,   50,     250,    500),
    (16, "denoiser"):         (4000,  500,    1000,   1000),
    (16, "characteristic"):   (2000,  200,    500,    500),
    (32, "denoiser"):         (20000, 500,    2000,   2000),
    (32, "characteristic"):   (5000,  200,    1000,   1000),
}  # fmt: skip
RUN_COLUMNS = ("train_steps", "lr_rampup_steps", "sampling_freq", "dump_freq")

# What is best on the digits and on MNIST (docs/mnist.md, docs/speed.md), where no recipe of the reference's is to be kept.
OURS = {"ode_solver": "dpm", "time_grid": "cosine", "grid_spacing": "cosine", "teacher_solver": "dpm"}
OURS |= {"one_step_share": 0.7, "dsm_weight": 0.5}
OTHER_PRESETS = {
    "digits": {"eval_eps0": 1e-2, "eval_bsz": 300, "bank_size": 2048, "bank_refresh_freq": 64, **OURS},
    "afhq": {"bank_size": 2048, "bank_dtype": "float16"},
    "folder": {"bank_size": 2048, "bank_dtype": "float16", **OURS},
}


def preset(data_name, mode, image_size=64):
    """{setting: value} that `--data_name` and `--mode` choose, and for folder the size of the images."""
    choose("data_name", data_name, DATA_PRESETS)
    choose("mode", mode, MODES)
    size = next((size for size in FOLDER_PRESETS if data_name == "folder" and image_size <= size), None)
    by_size = [*zip(FOLDER_COLUMNS, FOLDER_PRESETS[size]), *zip(RUN_COLUMNS, FOLDER_RUNS[size, mode])] if size else ()
    return {
        **dict(zip(DATA_COLUMNS, DATA_PRESETS[data_name])),
        **dict(zip(TRAIN_COLUMNS, TRAIN_PRESETS[data_name, mode])),
        **OTHER_PRESETS.get(data_name, {}),
        **({"num_steps": 1, "time_grid": "t"} if mode == "characteristic" else {}),  # how a flow map samples
        **dict(by_size),
    }


def resolutions(config):
    """Heights of the feature maps of a network, in pixels."""
    return [config.data.image_size >> level for level in range(len(config.network.channel_mult))]


def _drop_attention(config):
    """The same without attention at resolutions that the network lacks."""
    has = resolutions(config)
    return config.replace("network", attn_resolutions=tuple(r for r in config.network.attn_resolutions if r in has))


def resolve(flags, base=None):
    """Config from explicit flags {setting: value} over `base`, a Config, or over the preset they choose; or UserError."""
    for name in flags:
        if name not in SETTINGS:
            near = difflib.get_close_matches(name, SETTINGS, 1)
            raise UserError(f"there is no setting {name}{f': did you mean {near[0]}?' if near else ''}")
        if not fits(flags[name], SETTINGS[name].type):
            raise UserError(f"setting {name} is {flags[name]!r}: it must be of the kind of {SETTINGS[name].default!r}")
    config, values = base or Config(), flags
    if flags.get("time_grid", config.sampling.time_grid) != config.sampling.time_grid:  # another grid has its own usual rho
        values = flags = {"rho": 7.0 if flags["time_grid"] == "karras" else 1.0, **flags}
    if base is None:
        chosen = (flags.get(f.name, f.default) for f in (SETTINGS[name] for name in ("data_name", "mode", "image_size")))
        values = {**preset(*chosen), **flags}
    for name, section in SECTIONS.items():
        config = config.replace(name, **{f.name: values[f.name] for f in fields(section) if f.name in values})
    if base is None and "attn_resolutions" not in flags:
        config = _drop_attention(config)
    return check(config)


def to_dict(config):
    """Config -> nested dict of plain types, for JSON and for checkpoints."""
    return {
        name: {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(section).items()}
        for name, section in vars(config).items()
    }


def from_dict(plain):
    """The inverse of to_dict; settings left out keep their defaults.  UserError on unknown names and wrong types."""
    if not isinstance(plain, dict):
        raise UserError("the configuration is not a dictionary: the file was not written by this software")
    sections = {}
    for name, values in plain.items():
        if name not in SECTIONS or not isinstance(values, dict):
            raise UserError(f"unknown section '{name}' in the configuration: the file is from another version")
        types = {f.name: f.type for f in fields(SECTIONS[name])}
        for key, value in values.items():
            if key not in types:
                raise UserError(f"unknown setting '{name}.{key}' in the configuration: the file is from another version")
            if not fits(value, types[key]):
                raise UserError(f"setting '{name}.{key}' is {value!r} in the configuration: the file is damaged")
        sections[name] = SECTIONS[name](**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    config = Config(**sections)
    if config.task.mode == "characteristic" and "grid_steps" not in plain.get("distil", {}):
        # Earlier versions had one setting for the grid of stage 2 and for sampling.
        config = config.replace("distil", grid_steps=config.sampling.num_steps, grid_rho=config.sampling.rho)
        config = config.replace("sampling", num_steps=1, churn=False)
    return check(_drop_attention(config))


def fits(value, kind):
    """Whether a plain value is of an annotated type; whole numbers are floats too."""
    if typing.get_origin(kind) is tuple:
        return isinstance(value, (list, tuple)) and all(type(v) is typing.get_args(kind)[0] for v in value)
    return type(value) is kind or (kind is float and type(value) is int)


def choices(f):
    """The values that a setting may have, or None."""
    given = f.metadata["choices"]
    return given and tuple(given() if callable(given) else given)


IN_STAGE_2 = {  # train.py's flags: settings
    "num_steps": "grid_steps",
    "rho": "grid_rho",
    "time_grid": "grid_spacing",
    "guidance": "teacher_guidance",
}


WORDS = ("sigma_data", "class_idx")  # numbers for which a word may stand, "auto" or the name of a class


def flag_of(name):
    """The flag of a setting, which is its name but for the grid of stage 2."""
    return next((flag for flag, setting in IN_STAGE_2.items() if setting == name), name)


def choose(name, value, table):
    """table[value] of the setting `name`, or the value where the table is a list; UserError that lists what there is."""
    if value not in table:
        raise UserError(f"--{name} is {value}: it must be one of {', '.join(map(str, table))}")
    return table[value] if isinstance(table, dict) else value


def check(config):
    """The same Config; UserError, naming the flag, unless every value makes sense by itself and with the others."""
    values = {name: value for section in vars(config).values() for name, value in vars(section).items()}

    def require(name, holds, must):
        if not holds:
            raise UserError(f"--{flag_of(name)} is {values[name]}: it must be {must}")

    for name, f in SETTINGS.items():
        value, low, high = values[name], f.metadata["least"], f.metadata["most"]
        if f.metadata["choices"]:
            choose(flag_of(name), value, choices(f))
        if low is not None:
            require(name, low <= value <= high, f"from {low} to {high}")
        if f.metadata["between"]:
            low, high = f.metadata["between"]
            require(name, low < value < high, f"between {low} and {high}, both excluded")
    import sde  # and torch, which --help does without

    for name in ("ode_solver", "teacher_solver"):
        choose(name, values[name], sde.SOLVERS)
    data, net, distil, sampling = config.data, config.network, config.distil, config.sampling
    size, channels = DATA_PRESETS[data.data_name][:2]
    require("image_size", data.data_name in ("afhq", "folder") or data.image_size == size, f"{size} for {data.data_name}")
    require("image_channels", data.data_name == "folder" or data.image_channels == channels, f"{channels} for {data.data_name}")
    mult = net.channel_mult
    require("channel_mult", mult and min(mult) >= 1 and max(mult) <= 1024, "one or more numbers from 1 to 1024")
    factor = 2 ** (len(mult) - 1)
    below = data.image_size // factor * factor
    sizes = f"{below} or {below + factor}" if below else factor
    require("image_size", data.image_size % factor == 0, f"divisible by {factor}, for {len(mult)} resolutions, as {sizes} is")
    has = resolutions(config)
    require("attn_resolutions", set(net.attn_resolutions) <= set(has), f"some of the network's resolutions, {has}")
    require("model_channels", net.model_channels % 4 == 0, "a multiple of 4")
    for low, high in (("train_eps0", "train_eps1"), ("eval_eps0", "eval_eps1")):
        require(low, values[low] < 1 - values[high], f"below 1 - {high}, which is {1 - values[high]}")
    require("to_data_share", distil.one_step_share + distil.to_data_share <= 1, "at most 1 - one_step_share")
    flow_map = config.task.mode == "characteristic"
    for name in ("sde", "churn"):
        require(name, not (flow_map and values[name]), "left out, since the flow map has no SDE and no churn")
    require("guidance", not flow_map or sampling.guidance == 1, "left out: a flow map has that of its training")
    require("churn", not (sampling.sde and sampling.churn), "left out with --sde, which adds noise at every step itself")
    require("s_min", sampling.s_min <= sampling.s_max, f"at most s_max, which is {sampling.s_max}")
    must = f"below label_dim, which is {net.label_dim}" if net.label_dim else "left out, since the model has no classes"
    require("class_idx", sampling.class_idx < net.label_dim, must)
    return config


# ---------------------------------------------------------------------------------------- what each script asks for


@dataclass(frozen=True)
class InceptionFile:
    """weights of the Inception network"""

    inception_weights: str | None = file("InceptionV3's weights; weights/pt_inception-2015-12-05-6726825d.pth if left out")
    download: bool = setting(False, "fetch weights where they are published, if their files are missing")


@dataclass(frozen=True)
class TrainRun(InceptionFile):
    """files"""

    workdir: str | None = file("folder for checkpoints, metrics and pictures; logs/{data_name}-{mode} if left out")
    teacher: str | None = file("checkpoint of the denoiser to distil (mode characteristic)")
    resume: str | None = file("checkpoint that a run in a new --workdir begins from")
    init: str | None = file("checkpoint whose averaged weights a new run begins with, where they fit: fine-tuning")
    conditional: bool = setting(False, "condition on the classes found in the data: --label_dim is their number")
    fresh: bool = setting(False, "begin anew; refused where --workdir holds a run, unless with --force")
    force: bool = setting(False, "with --fresh: remove the checkpoints, metrics and pictures of the run that --workdir holds")
    dry_run: bool = setting(False, "say how large the run would be and how long it would take, and leave")
    keep: int = setting(5, "checkpoints to keep in --workdir, the last ones; 0 keeps all")
    ref_path: str | None = file("npz file with the reference's statistics (fid.py --mode ref), for --fid_freq")
    lpips_weights: str | None = file("LPIPS's channel weights; weights/lpips_weights.pt if left out")
    vgg_weights: str | None = file("the VGG16's weights, for LPIPS; weights/vgg16-397923af.pth if left out")


@dataclass(frozen=True)
class EvalRun:
    """files and seeds"""

    checkpoint: str | None = file("checkpoint to sample from")
    guide: str | None = file("a weaker denoiser that --guidance pushes away from: autoguidance")
    workdir: str | None = file("folder for the images")
    format: str = setting("png", "png: a file for each seed; npz: all in images.npz, as `arr_0`", choices=("png", "npz"))
    raw: bool = setting(False, "draw with the weights of the last step, not with their moving average")
    start_seed: int = setting(0, "first seed")
    end_seed: int = setting(49999, "last seed, included")
    encode: str | None = file("images to turn into {workdir}/latents.npz by the denoiser's ODE: a folder, a zip or an npz")
    latents: str | None = file("file of --encode to turn into images in the place of seeds; prints their PSNR", ".npz")
    from_: str | None = file("images to draw from in the place of noise, from --t on: a folder, a zip or an npz")
    t: float | None = setting(
        None, "with --from: time whose noise the images get; near 0 they stay, near 1 hardly anything does"
    )


@dataclass(frozen=True)
class FidRun(InceptionFile):
    """scoring"""

    mode: str = setting(
        "fid", "ref: statistics of --data_name; gen: of images; fid: their scores", choices=("ref", "gen", "fid")
    )
    dest: str | None = file("npz file for the statistics (ref, gen)", ".npz")
    img_folder: str | None = file("images (gen, fid): a folder or zip, or an npz with uint8 `arr_0` (N, H, W, C)")
    checkpoint: str | None = file("instead of --img_folder, the model to draw images from, as eval.py does")
    start_seed: int = setting(0, "with --checkpoint: first seed")
    end_seed: int = setting(49999, "with --checkpoint: last seed, included")
    guide: str | None = file("with --checkpoint: a weaker denoiser that --guidance pushes away from")
    stat_path: str | None = file("instead of --img_folder, the npz file that --mode gen made of them (fid)")
    ref_path: str | None = file("npz file with the reference's statistics (fid)")
    features: str = setting(
        "auto",
        "pixels in [0, 1], or 2,048 of FID's InceptionV3; auto: of --ref_path, else pixels for grey, inception for colour",
        choices=("auto", "pixels", "inception"),
    )
    metrics: str = setting(
        "fid",
        "scores, with commas: fid; kid; pr (precision and recall, k = 3). The last two need --metrics in ref and gen too",
    )
    num: int | None = setting(None, "take so many images, drawn by --seed; with torchrun: `torchrun ... -- fid.py ... --num N`")
    seed: int = setting(0, "of the subset")
    force: bool = setting(False, "compare statistics that say they were made differently")
    csv: str | None = file("file to append the scores and how the images were made to, as a row (fid)")


@dataclass(frozen=True)
class TeaserRun:
    """picture"""

    checkpoint: str | None = file("checkpoint to sample from")
    guide: str | None = file("a weaker denoiser that --guidance pushes away from: autoguidance")
    dest: str | None = file("PNG file for the picture; teaser-{mode}.png beside the checkpoint if left out", ".png")
    start_seed: int = setting(0, "first seed; the next ones follow")
    nsampling: int = setting(64, "images in the grid; with --trajectory, rows")
    columns: int = setting(0, "images in a row of the grid; 0 for a square")
    per_class: bool = setting(False, "a row for each class, with its name; --columns images in it (10)")
    trajectory: bool = setting(False, "a row for each image: the states from noise to data, up to 11 of them")
    interpolate: tuple[int, ...] = setting(
        None, "a row from one seed to another on the sphere of noise, of --columns images (11)"
    )
    latents: str | None = file("with --interpolate: file of eval.py --encode, of whose images the two numbers are", ".npz")


@dataclass(frozen=True)
class CompareRun(InceptionFile):
    """comparison"""

    denoiser: str | None = file("checkpoint of the denoiser")
    characteristic: str | None = file("checkpoint of the flow map")
    dest: str = setting("compare.png", "PNG file for the picture", path=".png")
    num_steps: tuple[int, ...] = setting((1, 2, 5, 10, 20), "numbers of steps to compare")
    nsampling: int = setting(8, "rows of the picture: seeds from 0")
    ref_path: str | None = file("npz file with the reference's statistics (fid.py --mode ref), for the curves")
    end_seed: int = setting(1799, "last seed, included, of the images scored for the curves")
    images: str | None = file("folder with images of eval.py in folders {mode}-{steps}, to score instead of making them again")


@dataclass(frozen=True)
class PublishRun:
    """weights"""

    src: str | None = file("checkpoint of training, of others, or a pickle of EDM's", positional=True)
    dest: str | None = file("file to write", ".pth", positional=True)
    half: bool = setting(False, "weights in float16, which takes half the size")
    raw: bool = setting(False, "the weights of the last step, not their moving average")


OF_MODEL, THEIRS = ("task", "data", "network", "sampling", "speed"), "the checkpoint's"
MODEL_SETTINGS = {f.name for name in OF_MODEL for f in fields(SECTIONS[name])}
SCRIPTS = {
    # name: (its own settings, the sections whose settings it takes, where --help says that these have their defaults)
    "train": (TrainRun, tuple(SECTIONS), None),
    "eval": (EvalRun, OF_MODEL, THEIRS),
    "teaser": (TeaserRun, OF_MODEL, THEIRS),
    "fid": (FidRun, OF_MODEL[1:], "the checkpoint's, or by preset"),
    "compare": (CompareRun, OF_MODEL[1:], THEIRS),
    "checkpoint": (PublishRun, (), None),
}


# -------------------------------------------------------------------------------------------------- command line


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{' '.join(message.split())} (see {self.prog} --help)")


def _boolean(text):
    if text.lower() not in ("true", "1", "yes", "false", "0", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() in ("true", "1", "yes")


def _number_or_word(kind):
    """A reader of numbers, and of what is no number as it is."""

    def read(text):
        try:
            return kind(text)
        except ValueError:
            return text

    return read


def _one_of(known):
    """A reader of names whose spelling does not matter: DDPMpp and DDPM++ are ddpmpp."""
    return lambda text: next((name for name in known if name == text.lower().replace("+", "p")), text)


def _path(ending):
    def read(text):
        if not text:
            raise argparse.ArgumentTypeError("it is empty")
        text = os.path.expanduser(text)
        return text if text.endswith((ending, "/")) else text + ending

    return read


def _add(parser, f, default, bare):
    options = {"help": f"{f.metadata['help']} (default: {default})".replace("%", "%%"), "default": argparse.SUPPRESS}
    flag, options["dest"] = f"--{f.name.rstrip('_')}", f.name  # --from is from_, as `from` is a word of Python's
    kind = next((k for k in typing.get_args(f.type) if k is not type(None)), f.type)  # `int | None`, tuple[int, ...] -> int
    known, ending = choices(f), f.metadata["path"]
    if f.metadata["positional"]:
        parser.add_argument(f.name, type=_path(ending), help=f.metadata["help"])
    elif known:
        parser.add_argument(flag, type=_one_of(known) if kind is str else kind, choices=known, **options)
    elif kind is bool and bare:  # a value that may follow would swallow the first positional
        parser.add_argument(flag, action="store_true", **options)
    elif kind is bool:
        parser.add_argument(flag, nargs="?", const=True, type=_boolean, metavar="True|False", **options)
        parser.add_argument(f"--no-{f.name}", action="store_false", **{**options, "help": argparse.SUPPRESS})
    elif typing.get_origin(f.type) is tuple:
        parser.add_argument(flag, nargs="*", type=kind, metavar="N", **options)
    elif ending is not None:
        parser.add_argument(flag, type=_path(ending), metavar="PATH", **options)
    else:
        read = _number_or_word(kind) if f.name in WORDS else kind
        parser.add_argument(flag, type=read, metavar=kind.__name__.upper(), **options)


def parse(script, argv=None, description=""):
    """A command line: (settings of the script's own, {setting: value} given explicitly for its sections, for resolve()).

    The script's own settings hide those of the sections with the same name.
    """
    own, sections, source = SCRIPTS[script]
    formatter = argparse.RawDescriptionHelpFormatter
    presets = _preset_table(sections) if sections else None
    parser = _Parser(description=description, formatter_class=formatter, epilog=presets, allow_abbrev=False)
    by_preset = {name for key in TRAIN_PRESETS for name in preset(*key)}
    for title, section in [(own.__doc__, own), *((name, SECTIONS[name]) for name in sections)]:
        group = parser.add_argument_group("distil, for --mode characteristic" if section is Distil else title)
        for f in fields(section):
            if f.metadata["flag"] and (section is own or f.name not in {mine.name for mine in fields(own)}):
                default = " ".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
                default = {None: "none", "": "none"}.get(default, default)
                if section is not own and title != "speed":
                    default = source or ("by preset" if f.name in by_preset else default)
                _add(group, f, default, bare=not sections)
    flags = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(parser.parse_args(argv)).items()}
    mine = {f.name: flags.pop(f.name) for f in fields(own) if f.name in flags}
    return own(**mine), flags


def required(settings, *names):
    """UserError unless the script's own settings `names` were given."""
    for name in names:
        if getattr(settings, name) is None:
            raise UserError(f"--{name} is missing: {next(f for f in fields(settings) if f.name == name).metadata['help']}")


def _preset_table(sections):
    """The presets of the settings in these sections: one line a setting, one column a preset."""
    wanted = {f.name for name in sections for f in fields(SECTIONS[name])}
    lines, presets = ["presets:"], [{"data_name": name, "mode": mode, **preset(name, mode)} for name, mode in TRAIN_PRESETS]
    for name, f in SETTINGS.items():
        if name in ("data_name", "mode") or name in wanted and any(name in values for values in presets):
            row = (values.get(name, f.default) for values in presets)
            row = (" ".join(map(str, value)) if isinstance(value, tuple) else str(value) for value in row)
            lines.append(f"  {name:18}" + "".join(f"{text:15}" for text in row).rstrip())
    sizes = ", ".join(map(str, FOLDER_PRESETS))
    lines.append(f"folder has smaller networks and shorter runs for an image_size of up to {sizes}: --dry_run shows them")
    return "\n".join(lines)
