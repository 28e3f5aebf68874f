"""Every setting, its default and its meaning: presets, the command line made from them, and the plain form for files.

A setting is a field of one of the frozen dataclasses below; its name is its flag.  Values come, later ones winning, from
the field, from the preset of `--data_name` and `--mode`, from a checkpoint where one is read, and from the command line.
"""

import argparse
import dataclasses
import typing
from dataclasses import dataclass, field, fields

from dist_util import UserError


def setting(default, help, choices=None):
    return field(default=default, metadata={"help": help, "choices": choices})


# ------------------------------------------------------------------------------------------------------ settings


@dataclass(frozen=True)
class Task:
    """task"""

    mode: str = setting(
        "denoiser",
        "denoiser: stage 1, or sampling its ODE; characteristic: stage 2, or sampling its flow map",
        ("denoiser", "characteristic"),
    )


@dataclass(frozen=True)
class Data:
    """data"""

    data_name: str = setting("digits", "data set", ("digits", "mnist", "cifar", "afhq", "folder"))
    data_path: str = setting(
        "data",
        "where the images are; mnist, cifar: folder of the torchvision files, filled if missing; afhq: holds "
        "afhq/train/{cat,dog,wild}; folder: a flat folder, class folders or a zip of images; digits: not used",
    )
    image_size: int = setting(64, "height and width in pixels (afhq, folder: images are cropped to squares and resized)")
    image_channels: int = setting(3, "1 for grey, 3 for colour (free for folder alone)", (1, 3))
    centered: bool = setting(True, "pixels scaled to [-1, 1] instead of [0, 1]")
    num_workers: int = setting(0, "processes that read images, per rank; 0 reads in the training process")


@dataclass(frozen=True)
class Network:
    """network"""

    architecture: str = setting("ddpmpp", "U-Net of Song et al. in its DDPM++ or NCSN++ form", ("ddpmpp", "ncsnpp"))
    model_channels: int = setting(128, "channels at full resolution, before --channel_mult")
    channel_mult: tuple[int, ...] = setting((1, 2, 2, 2), "channels at each resolution, in model_channels")
    channel_mult_emb: int = setting(4, "width of the embeddings of time and label, in model_channels")
    num_blocks: int = setting(4, "residual blocks at each resolution")
    attn_resolutions: tuple[int, ...] = setting((16,), "resolutions in pixels with self-attention; no value for none")
    dropout: float = setting(0.1, "probability of zeroing a hidden activation in training")
    label_dim: int = setting(0, "number of classes to condition on; 0 for none")
    label_dropout: float = setting(0.0, "probability of hiding the label of a training image")
    sigma_data: float = setting(1.0, "standard deviation of the data that the preconditioning assumes")
    M: float = setting(999.0, "network's unit of time: it sees M t")


@dataclass(frozen=True)
class Train:
    """training"""

    train_steps: int = setting(10000, "optimizer steps in all")
    global_bsz: int = setting(1024, "images per optimizer step over all ranks and accumulation rounds")
    bsz: int = setting(128, "images per rank and round; global_bsz must be a multiple of bsz times the ranks")
    lr: float = setting(1e-3, "learning rate (RAdam, gradient norm clipped to 1)")
    lr_rampup_steps: int = setting(500, "steps of linear warm-up")
    lr_decay: str = setting(
        "none",
        "the rate, besides the warm-up: constant, or half a cosine from the first step to 0 at the last",
        ("none", "cosine"),
    )
    ema_decay: float = setting(0.999, "decay per step of the average of the weights: min(this, (1 + step)/(10 + step))")
    train_eps0: float = setting(1e-5, "least time trained, and last positive point of stage 2's grid (t = 0 is data)")
    train_eps1: float = setting(1e-3, "stage 2's grid starts at t = 1 - this")
    log_freq: int = setting(100, "steps between lines of metrics.jsonl")
    sampling_freq: int = setting(1000, "steps between grids of samples; 0 for none")
    dump_freq: int = setting(5000, "steps between checkpoints (the last step always writes one)")
    nsampling: int = setting(64, "images in a grid of samples")
    fid_freq: int = setting(0, "steps between scores of the moving average against --ref_path; 0 for none")
    fid_num: int = setting(2048, "images for such a score, of seeds from 0; from a flow map in one step")
    seed: int = setting(0, "seed of the initial weights, the data order and all noise")


@dataclass(frozen=True)
class Distil:
    """stage 2 (--mode characteristic)"""

    objective: str = setting(
        "trajectory",
        "trajectory: regression on stored solutions of the teacher's ODE (the paper); semigroup: consistency along the ODE "
        "(the authors' code)",
        ("trajectory", "semigroup"),
    )
    loss_norm: str = setting(
        "huber",
        "distance between images; lpips, a perceptual one, needs two files of weights and is slow without a GPU",
        ("l2", "huber", "lpips"),
    )
    teacher_solver: str = setting("deis", "solver of the teacher's ODE", ("euler", "heun", "deis"))
    dsm_weight: float = setting(1.0, "factor of the stage-1 loss at s = t")
    adaptive_weight: bool = setting(
        True, "scale the stage-1 loss to pull as hard at the last layer as the distance does, before --dsm_weight"
    )
    dsm_share: float = setting(0.25, "trajectory: share of each batch spent on the stage-1 loss")
    one_step_share: float = setting(0.4, "trajectory: share of pairs (noise, data)")
    to_data_share: float = setting(0.2, "trajectory: share of pairs (any time, data)")
    bank_size: int = setting(8192, "trajectory: solutions stored, per rank")
    bank_refresh_freq: int = setting(32, "trajectory: steps between replacing the oldest bsz solutions; 0 for never")
    bank_dtype: str = setting("float32", "trajectory: precision of the stored solutions", ("float32", "float16"))
    teacher_steps: int = setting(19, "semigroup: greatest number of teacher steps from t to u")
    teacher_steps_strategy: str = setting(
        "proportional",
        "semigroup: n teacher steps are drawn with probability as n, or the same for all n",
        ("proportional", "uniform"),
    )


@dataclass(frozen=True)
class Sampling:
    """sampling"""

    ode_solver: str = setting("deis", "solver of the denoiser's ODE (mode denoiser)", ("euler", "heun", "deis"))
    num_steps: int = setting(20, "steps from noise to data: network calls, 2n - 1 for heun; in training, stage 2's grid")
    rho: float = setting(1.0, "curvature of the time grid: t^(1/rho) is evenly spaced")
    eval_eps0: float = setting(1e-3, "last positive time of the grid (t = 0 is data)")
    eval_eps1: float = setting(1e-3, "sampling starts at t = 1 - this")
    sde: bool = setting(False, "sample the reverse SDE instead of the ODE (mode denoiser)")
    churn: bool = setting(False, "noise mollification: before a step, go back to t' = (1 + gamma) t with fresh noise")
    s_min: float = setting(0.0, "churn: least time at which it happens")
    s_max: float = setting(1.0, "churn: greatest time at which it happens")
    gamma: float = setting(0.1, "churn: how far back, relative to t")
    class_idx: int = setting(-1, "class to draw, for conditional models; -1 draws a class from each image's seed")
    eval_bsz: int = setting(256, "images per rank and batch")


SECTIONS = {"task": Task, "data": Data, "network": Network, "train": Train, "distil": Distil, "sampling": Sampling}


@dataclass(frozen=True)
class Config:
    """Everything a checkpoint records about how it was made."""

    task: Task = Task()
    data: Data = Data()
    network: Network = Network()
    train: Train = Train()
    distil: Distil = Distil()
    sampling: Sampling = Sampling()


# ------------------------------------------------------------------------------------------------------- presets

# Size, channels and range of the images, and their standard deviation for the preconditioning: 1 in the reference's
# checkpoints, whatever the range; for the digits that of their pixels in [-1, 1], 0.75, which trains faster.
DATA_PRESETS = {
    # data_name  size  channels  centered  num_workers  sigma_data
    "digits":   (8,    1,        True,     0,           0.75),
    "mnist":    (28,   1,        False,    0,           1.0),
    "cifar":    (32,   3,        True,     0,           1.0),
    "afhq":     (64,   3,        True,     2,           1.0),
    "folder":   (64,   3,        True,     2,           1.0),
}  # fmt: skip
DATA_COLUMNS = ("image_size", "image_channels", "centered", "num_workers", "sigma_data")

NETWORK_PRESETS = {
    # data_name  channels  mult          blocks  attention  dropout
    "digits":   (32,       (1, 2),       1,      (4,),      0.0),
    "mnist":    (32,       (1, 2, 2),    4,      (14,),     0.1),
    "cifar":    (128,      (1, 2, 2, 2), 4,      (16,),     0.1),
    "afhq":     (128,      (1, 2, 2, 2), 4,      (16,),     0.1),
    "folder":   (128,      (1, 2, 2, 2), 4,      (16,),     0.1),
}  # fmt: skip
NETWORK_COLUMNS = ("model_channels", "channel_mult", "num_blocks", "attn_resolutions", "dropout")

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
    ("folder", "denoiser"):       (400000, 1024,       32,   2e-4, 500,     "none",   0.9999, 1e-5,  100,  5000,    10000),
    ("folder", "characteristic"): (2000,   256,        16,   1e-4, 200,     "none",   0.9999, 1e-5,  50,   200,     500),
}  # fmt: skip
TRAIN_COLUMNS = (
    "train_steps", "global_bsz", "bsz", "lr", "lr_rampup_steps", "lr_decay", "ema_decay", "train_eps0", "log_freq",
    "sampling_freq", "dump_freq",
)  # fmt: skip

OTHER_PRESETS = {
    "digits": {"eval_eps0": 1e-2, "eval_bsz": 300, "bank_size": 2048, "bank_refresh_freq": 64, "dsm_weight": 0.5},
    "afhq": {"bank_size": 2048, "bank_dtype": "float16"},
    "folder": {"bank_size": 2048, "bank_dtype": "float16"},
}


def preset(data_name, mode):
    """{setting: value} that `--data_name` and `--mode` choose."""
    return {
        **dict(zip(DATA_COLUMNS, DATA_PRESETS[data_name])),
        **dict(zip(NETWORK_COLUMNS, NETWORK_PRESETS[data_name])),
        **dict(zip(TRAIN_COLUMNS, TRAIN_PRESETS[data_name, mode])),
        **OTHER_PRESETS.get(data_name, {}),
    }


# ------------------------------------------------------------------------------------------------------- configs


def resolve(flags, base=None):
    """Config from explicit flags {setting: value} over `base`, a Config, or over the preset they choose."""
    known = {f.name for section in SECTIONS.values() for f in fields(section)}
    values = {k: v for k, v in flags.items() if k in known}
    if base is None:
        base = Config()
        data_name, mode = values.get("data_name", base.data.data_name), values.get("mode", base.task.mode)
        values = {**preset(data_name, mode), **values}
    config = Config(
        **{
            name: dataclasses.replace(
                getattr(base, name), **{f.name: values[f.name] for f in fields(section) if f.name in values}
            )
            for name, section in SECTIONS.items()
        }
    )
    check(config)
    return config


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
            if not _fits(value, types[key]):
                raise UserError(f"setting '{name}.{key}' is {value!r} in the configuration: the file is damaged")
        sections[name] = SECTIONS[name](**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    config = Config(**sections)
    check(config)
    return config


def _fits(value, kind):
    if typing.get_origin(kind) is tuple:
        return isinstance(value, (list, tuple)) and all(type(v) is int for v in value)
    return type(value) is kind or (kind is float and type(value) is int)


# The greatest value is what could be meant: more would be a slip, and would fill the memory or take for ever.
LIMITS = {
    # setting: (least, greatest), both allowed
    **dict.fromkeys(["train_steps", "log_freq", "dump_freq"], (1, 2**31)),
    **dict.fromkeys(["lr_rampup_steps", "sampling_freq", "fid_freq", "bank_refresh_freq", "seed"], (0, 2**31)),
    **dict.fromkeys(["global_bsz", "bank_size"], (1, 2**24)),
    **dict.fromkeys(["bsz", "eval_bsz"], (1, 2**20)),
    **dict.fromkeys(["model_channels", "nsampling"], (1, 2**16)),
    **dict.fromkeys(["num_steps", "teacher_steps"], (1, 4096)),
    **dict.fromkeys(["channel_mult_emb", "num_blocks"], (1, 1024)),
    **dict.fromkeys(["dropout", "label_dropout", "ema_decay", "dsm_share", "one_step_share", "to_data_share"], (0, 1)),
    **dict.fromkeys(["s_min", "s_max"], (0, 1)),
    **dict.fromkeys(["dsm_weight", "gamma"], (0, 10**6)),
    "image_size": (1, 4096),
    "num_workers": (0, 1024),
    "label_dim": (0, 2**20),
    "class_idx": (-1, 2**20),
    "fid_num": (2, 2**24),
}
BETWEEN = {
    # setting: (low, high), both excluded
    **dict.fromkeys(["train_eps0", "train_eps1", "eval_eps0", "eval_eps1"], (1e-8, 1)),
    "lr": (0, 10),
    "sigma_data": (1e-4, 1e4),
    "M": (0, 1e6),
    "rho": (0.1, 100),
}


def check(config):
    """UserError, naming the flag, unless every value makes sense by itself and with the others."""

    def fail(name, value, must):
        raise UserError(f"--{name} is {value}: it must be {must}")

    for section in vars(config).values():
        for f in fields(section):
            value = getattr(section, f.name)
            choices = f.metadata["choices"]
            if choices and value not in choices:
                fail(f.name, value, f"one of {', '.join(map(str, choices))}")
            low, high = LIMITS.get(f.name, (None, None))
            if low is not None and not low <= value <= high:
                fail(f.name, value, f"from {low} to {high}")
            low, high = BETWEEN.get(f.name, (None, None))
            if low is not None and not low < value < high:
                fail(f.name, value, f"between {low} and {high}, both excluded")
    data, net, train, sampling = config.data, config.network, config.train, config.sampling
    size, channels, centered = DATA_PRESETS[data.data_name][:3]
    if data.data_name not in ("afhq", "folder") and data.image_size != size:
        fail("image_size", data.image_size, f"{size} for {data.data_name}")
    if data.data_name != "folder" and data.image_channels != channels:
        fail("image_channels", data.image_channels, f"{channels} for {data.data_name}")
    if not net.channel_mult or min(net.channel_mult) < 1 or max(net.channel_mult) > 1024:
        fail("channel_mult", net.channel_mult, "one or more numbers from 1 to 1024")
    if data.image_size % 2 ** (len(net.channel_mult) - 1):
        fail(
            "image_size",
            data.image_size,
            f"divisible by {2 ** (len(net.channel_mult) - 1)}, for {len(net.channel_mult)} resolutions",
        )
    if net.model_channels % 4:
        fail("model_channels", net.model_channels, "a multiple of 4")
    for low, high, where in ((train.train_eps0, train.train_eps1, "train"), (sampling.eval_eps0, sampling.eval_eps1, "eval")):
        if low >= 1 - high:
            fail(f"{where}_eps0", low, f"below 1 - {where}_eps1, which is {1 - high}")
    if config.distil.one_step_share + config.distil.to_data_share > 1:
        fail("to_data_share", config.distil.to_data_share, "at most 1 - one_step_share")
    if config.task.mode == "characteristic" and config.distil.objective == "trajectory" and config.distil.dsm_weight:
        share, dsm = config.distil.dsm_share, round(config.distil.dsm_share * train.bsz)
        if dsm == train.bsz or (share and not dsm):
            fail("dsm_share", share, f"0, or such that both losses get images of a --bsz of {train.bsz}")
    if config.task.mode == "characteristic" and sampling.sde:
        fail("sde", True, "left out, since the flow map has no SDE")
    if sampling.sde and sampling.churn:
        fail("churn", True, "left out with --sde, which adds noise at every step itself")
    if sampling.s_min > sampling.s_max:
        fail("s_min", sampling.s_min, f"at most s_max, which is {sampling.s_max}")
    if net.label_dim and sampling.class_idx >= net.label_dim:
        fail("class_idx", sampling.class_idx, f"below label_dim, which is {net.label_dim}")
    if not net.label_dim and sampling.class_idx >= 0:
        fail("class_idx", sampling.class_idx, "left out, since the model has no classes")


# -------------------------------------------------------------------------------------------------- command line


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{' '.join(message.split())} (see {self.prog} --help)")


def _boolean(text):
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")


def _add(parser, f, default):
    options = {"help": f"{f.metadata['help']} (default: {default})".replace("%", "%%"), "default": argparse.SUPPRESS}
    kind = next((k for k in typing.get_args(f.type) if k is not type(None)), f.type)  # `int | None`, tuple[int, ...] -> int
    if f.metadata["choices"]:
        options["choices"] = f.metadata["choices"]
    if kind is bool:
        parser.add_argument(f"--{f.name}", nargs="?", const=True, type=_boolean, metavar="True|False", **options)
        parser.add_argument(
            f"--no-{f.name}", dest=f.name, action="store_false", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
    elif typing.get_origin(f.type) is tuple:
        parser.add_argument(f"--{f.name}", nargs="*", type=kind, metavar="N", **options)
    else:
        metavar = None if f.metadata["choices"] else kind.__name__.upper()
        parser.add_argument(f"--{f.name}", type=kind, metavar=metavar, **options)


def parse(own, sections, argv=None, description="", source=None):
    """The command line: (own settings, {setting: value} given explicitly for the sections).

    own        dataclass of the script's own settings; they hide those of the sections with the same name
    sections   names of the SECTIONS whose flags the script takes; resolve() turns the second result into a Config
    source     where these have their defaults, for --help, if that is neither the field nor the preset
    """
    parser = _Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_preset_table([f.name for name in sections for f in fields(SECTIONS[name])]),
        allow_abbrev=False,
    )
    by_preset = {name for key in TRAIN_PRESETS for name in preset(*key)}
    for section in [own] + [SECTIONS[name] for name in sections]:
        group = parser.add_argument_group(section.__doc__)
        for f in fields(section):
            if section is own or f.name not in {mine.name for mine in fields(own)}:
                default = " ".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
                default = {None: "none", "": "none"}.get(default, "by preset" if f.name in by_preset else default)
                _add(group, f, default if section is own else source or default)
    flags = vars(parser.parse_args(argv))
    flags = {k: tuple(v) if isinstance(v, list) else v for k, v in flags.items()}
    mine = {f.name: flags.pop(f.name) for f in fields(own) if f.name in flags}
    return own(**mine), flags


def required(settings, *names):
    """UserError unless the script's own settings `names` were given."""
    for name in names:
        if getattr(settings, name) is None:
            raise UserError(f"--{name} is missing: {next(f for f in fields(settings) if f.name == name).metadata['help']}")


def _preset_table(wanted):
    """The presets of the settings in `wanted`: one line a setting, one column a preset, so that it fits a terminal."""
    others = sorted({name for values in OTHER_PRESETS.values() for name in values})
    names = [name for name in (*DATA_COLUMNS, *NETWORK_COLUMNS, *TRAIN_COLUMNS, *others) if name in wanted]
    columns = [["data_name", "mode", *names]]
    for data_name, mode in TRAIN_PRESETS:
        config = resolve({"data_name": data_name, "mode": mode})
        values = {k: v for section in vars(config).values() for k, v in vars(section).items()}
        shown = (" ".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in map(values.get, names))
        columns.append([data_name, mode, *shown])
    widths = [max(map(len, column)) for column in columns]
    lines = ("  ".join(v.ljust(w) for v, w in zip(line, widths)).rstrip() for line in zip(*columns))
    return "presets:\n" + "\n".join("  " + line for line in lines)
