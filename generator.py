"""A trained model and seeds, to images.

model = generator.load_model("DDPMpp-000500.pth", {"num_steps": 1})
images = model.images(range(64))             # uint8 (64, C, H, W)
states = model.states(range(8))              # list of (8, C, H, W), from noise to data, in the model's range
"""

from dist_util import UserError

from dataclasses import dataclass, replace
from functools import partial

import torch

import checkpoint
import dataset
import defaults
import misc
import network
import sde

CHURN = ("churn", "s_min", "s_max", "gamma")


@dataclass
class Trained:
    """A model ready to sample from: weights, of the moving average unless `raw`, in evaluation mode, without gradients."""

    model: network.Denoiser
    config: defaults.Config
    mean: torch.Tensor  # (C, H, W), zeros where the checkpoint does not say
    step: int
    path: str
    knows_mean: bool = True
    raw: bool = False  # weights of the last step
    guide: "Trained | None" = None  # a weaker one, for autoguidance

    @property
    def is_flow_map(self):
        return self.config.task.mode == "characteristic"

    def with_steps(self, num_steps):
        """The same model, to be sampled in another number of steps."""
        return replace(self, config=self.config.replace("sampling", num_steps=num_steps))

    def images(self, seeds):
        """uint8 images (N, C, H, W) of a sequence of seeds."""
        return torch.cat(
            [torch.empty(0, *self.mean.shape, dtype=torch.uint8), *(images for _, images in generate(self, seeds))]
        )

    def states(self, seeds):
        """The states (N, C, H, W) at all times of the grid, from noise to the images, in the model's range of pixels."""
        return list(solve(self, seeds))

    def record(self, seeds):
        """How the images of these seeds are made: what eval.json and statistics hold about them."""
        plain = defaults.to_dict(self.config)
        if self.is_flow_map:  # which uses none of these
            unused = ("ode_solver", "guidance", "sde", *CHURN)
            plain["sampling"] = {k: v for k, v in plain["sampling"].items() if k not in unused}
        file = {"checkpoint": str(self.path), "sha256": misc.file_hash(self.path), "step": self.step}
        file |= {"raw": True} if self.raw else {}
        file |= {"guide": misc.file_hash(self.guide.path)} if self.guide else {}
        return {**file, "nfe": nfe(self.config), "start_seed": seeds[0], "end_seed": seeds[-1], "config": plain}


def load_model(path, flags=(), device="cpu", raw=False, guide=None):
    """The Trained of a checkpoint, with flags {setting: value} over its settings of sampling; UserError where they disagree.

    With `raw`, of the weights of its last step.  The flag class_idx may be the name of a class.  `guide` is the path of a
    weaker denoiser, for the flag guidance.
    A checkpoint without configuration, as others publish, takes everything from flags and presets.  A pickle of EDM's has one
    but for the name of its data.
    """
    content, flags = checkpoint.read(path), {"precision": "fp32", "compile": False, **dict(flags)}  # not as it was trained
    for name in flags:
        if name in defaults.SETTINGS and name not in defaults.MODEL_SETTINGS:
            raise UserError(f"{name} is a setting of training: it changes no model that is trained")
    if "config" in content:
        config = defaults.from_dict(content["config"])
        if "step" not in content and "data_name" in flags:
            config = defaults.resolve({"data_name": flags["data_name"]}, config)
        if isinstance(flags.get("class_idx"), str):
            flags["class_idx"] = class_number(config, flags["class_idx"], path)
        config = checkpoint.override(config, flags, path)
    elif "data_name" not in flags:
        raise UserError(f"{path} has no configuration: say --data_name, and its network's flags where they differ")
    else:
        mode = "characteristic" if any(".affine_s." in str(name) for name in content["ema"]) else "denoiser"
        if flags.setdefault("mode", mode) != mode:
            raise UserError(f"--mode is {flags['mode']}, but the weights in {path} are those of mode {mode}")
        config = defaults.resolve(flags)
    model = checkpoint.build_model(config).eval().requires_grad_(False)
    if raw and not isinstance(content.get("model"), dict):
        raise UserError(f"{path} holds no weights of its last step: leave --raw out")
    checkpoint.load_weights(model.net, content["model" if raw else "ema"], path)
    data, knows_mean = config.data, "mean" in content
    if not knows_mean and "config" not in content:
        misc.log(f"{path} does not hold the mean of its data: sampling starts from noise without it")
    mean = content.get("mean", torch.zeros(data.image_channels, data.image_size, data.image_size))
    checkpoint.check_mean(mean, config, path)
    model = model.to(device)
    if config.speed.compile:
        network.compile_in_place(model.net)
    found = Trained(model, config, mean.to(device), content.get("step", 0), path, knows_mean, raw)
    return replace(found, guide=load_guide(found, guide, device)) if guide or config.sampling.guidance != 1 else found


def check_guidance(trained):
    """UserError unless a denoiser knows both images of a class and images without."""
    net = trained.config.network
    if not (net.label_dim and net.label_dropout):
        why = "trained with --label_dropout" if net.label_dim else "conditional"
        raise UserError(f"--guidance: {trained.path} must be {why}, or --guide name a weaker denoiser")


def load_guide(trained, path, device):
    """The Trained at `path` that guides another one, or None for a guide that is its own; UserError where that cannot be."""
    net, sampling = trained.config.network, trained.config.sampling
    if path is None:
        check_guidance(trained)
        return None
    if sampling.guidance == 1 or trained.is_flow_map:
        raise UserError("--guide is for the ODE of a denoiser with --guidance above 1: add it, or leave --guide out")
    guide = load_model(path, device=device)
    if guide.is_flow_map or guide.mean.shape != trained.mean.shape or guide.config.network.label_dim not in (0, net.label_dim):
        raise UserError(f"--guide {path} must be a denoiser of images and classes as {trained.path} has")
    if guide.config.data.centered != trained.config.data.centered:
        raise UserError(f"--guide {path} has another range of pixels than {trained.path}: see --centered")
    return guide


def guided(trained, w):
    """D(x, t, label=) of a denoiser with guidance w: against its guide's or, without one, against its own without a class."""
    if w == 1:
        return trained.model

    def denoise(x, t, label=None):
        if trained.guide:
            weak = trained.guide.model(x, t, label=label if trained.guide.config.network.label_dim else None)
            return sde.guided(trained.model(x, t, label=label), weak, w)
        twice = torch.cat([label, torch.zeros_like(label)])
        return sde.guided(*trained.model(torch.cat([x, x]), torch.cat([t, t]), label=twice).chunk(2), w)

    return denoise


def class_number(config, name, path):
    """The number of a class; UserError if the checkpoint's configuration knows none of this name."""
    known = config.data.class_names
    if name not in known or not config.network.label_dim:
        held = f"it knows {', '.join(known)}" if config.network.label_dim and any(known) else "it has no classes with names"
        raise UserError(f"--class_idx is {name}, and {path} has no such class: {held}")
    return known.index(name)


NO_MATTER = ("eval_bsz", "data_path", "num_workers", "dropout", "label_dropout", "compile")  # to images, but for rounding


def differences(record, found):
    """What of Trained.record() differs in a record that was found: "checkpoint", and settings that change the images.

    Settings that the found one lacks, from an earlier version, have their defaults.
    """
    names = ["checkpoint"] if found.get("sha256") != record["sha256"] else []
    names += [name for name in ("raw", "guide") if found.get(name) != record.get(name)]
    usual = defaults.to_dict(defaults.Config())
    for section, settings in record["config"].items():
        theirs = {**usual[section], **found.get("config", {}).get(section, {})}
        names += [name for name in settings if name not in NO_MATTER and theirs[name] != settings[name]]
    return names


def check_seeds(start, end):
    """UserError unless start ... end are seeds of images: torch's CPU generator tells 2^32 seeds apart, and no more."""
    if not 0 <= start <= end < min(start + 10**7, 2**32):
        rule = "seeds run from 0, start to end, both included: at most 10000000 seeds, each below 2^32"
        raise UserError(f"--start_seed {start} --end_seed {end}: {rule}")


class SeedNoise:
    """Standard normals (B, *shape), drawn on the CPU, image i by a generator with seeds[i]: batch and device change nothing."""

    def __init__(self, seeds, shape, device):
        for seed in (min(seeds), max(seeds)):
            check_seeds(seed, seed)
        self.generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        self.shape, self.device = shape, device

    def __call__(self):
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)


def trajectory(config, model, x, noise, label=None):
    """Yield the states from x, at t = 1 - eval_eps1, to data, as the sampling settings say.

    model(x, t [, s], label=label) is the denoiser, or that of a flow map with s; noise() gives normals of x's shape.
    """
    sampling = config.sampling
    t_max, denoise = 1 - sampling.eval_eps1, partial(model, label=label)

    def churn(x, t):
        if sampling.s_min <= t[0] <= sampling.s_max:
            return sde.churn(x, t, sampling.gamma, t_max, noise)
        return x, t

    if config.task.mode == "characteristic":
        step = lambda x, t, s: sde.transport(x, denoise(x, t, s), t, s)
    elif sampling.sde:
        step = partial(sde.ancestral_step, denoise, noise)
    else:
        step = sde.solver(sampling.ode_solver, denoise)
    ts = sde.GRIDS[sampling.time_grid](sampling.num_steps, t_max, sampling.eval_eps0, sampling.rho).to(x.device)
    return sde.sample(step, x, ts, churn if sampling.churn else None)


def nfe(config):
    """Network evaluations that the sampling settings spend on an image: counted, with a number in the place of an image."""
    calls = []

    def model(x, t, s=None, label=None):
        calls.append(t)
        return x

    list(trajectory(config, model, torch.zeros(1, 1), lambda: torch.zeros(1, 1)))
    return len(calls) * (1 if config.sampling.guidance == 1 else 2)


@torch.no_grad()
def solve(trained, seeds):
    """Yield the states (B, C, H, W), from noise to data, of the images with these seeds; the last are the images.

    A generator draws the latent, then the class of a conditional model if none is asked for, then what churn or the SDE need.
    """
    config, mean = trained.config, trained.mean
    noise = SeedNoise(seeds, mean.shape, mean.device)
    x, label_dim, label = sde.start(noise(), mean, config.sampling.eval_eps1), config.network.label_dim, None
    if label_dim and config.sampling.class_idx >= 0:
        label = torch.full((len(seeds),), config.sampling.class_idx, device=mean.device)
    elif label_dim:
        label = torch.cat([torch.randint(label_dim, (1,), generator=g) for g in noise.generators]).to(mean.device)
    denoise = guided(trained, config.sampling.guidance)
    yield from trajectory(config, denoise, x, noise, dataset.one_hot(label, label_dim))


def generate(trained, seeds, desc="sampling"):
    """Yield (seeds, uint8 images (B, C, H, W)) in batches of eval_bsz, with a progress bar."""
    bsz = trained.config.sampling.eval_bsz
    with misc.progress(len(seeds), desc) as bar:
        for start in range(0, len(seeds), bsz):
            batch = seeds[start : start + bsz]
            yield batch, Generated(trained, batch).batch(range(len(batch)))[0]
            bar.update(len(batch))


class Generated:
    """The images of a Trained with these seeds, as a data set that is drawn when it is read.

    poll() is called after each step of the solver, and may end the work by raising, as StopSignals.poll does on all ranks.
    """

    def __init__(self, trained, seeds, poll=None):
        self.trained, self.seeds, self.poll, self.shape = trained, seeds, poll, tuple(trained.mean.shape)

    def __len__(self):
        return len(self.seeds)

    def batch(self, indices):
        for x in solve(self.trained, [self.seeds[i] for i in indices]):  # noqa: B007 (the last is the images)
            if self.poll:
                self.poll()
        if not x.isfinite().all():
            raise UserError(f"{self.trained.path or 'the model'} makes images that are not finite: its weights are no good")
        return dataset.to_uint8(x, self.trained.config.data.centered), torch.zeros(len(indices), dtype=torch.long)
