"""A trained model and seeds, latents or images, to images; and images to latents.

model = generator.load_model("DDPMpp-000500.pth", {"num_steps": 1})
images = model.images(range(64))             # uint8 (64, C, H, W)
states = model.states(range(8))              # list of (8, C, H, W), from noise to data, in the model's range

A latent is a state at t = 1 - eval_eps1, where sampling begins.  A denoiser makes it of an image; its flow map decodes it, too:

latents = denoiser.encode(images)            # float32 (64, C, H, W), by its ODE from images to noise
again = model.decode(latents)                # uint8 (64, C, H, W)
edited = model.from_images(images, 0.5)      # uint8 (64, C, H, W), drawn from these images with the noise of t = 0.5
"""

import dist_util
from dist_util import UserError

import json
import os
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch

import checkpoint
import dataset
import defaults
import misc
import network
import sde

CHURN = ("churn", "s_min", "s_max", "gamma")
OF_DENOISERS = ("ode_solver", "guidance", "sde", *CHURN)  # a flow map uses none of these


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
    sha256: str = ""  # of the file that was read: a link, such as latest.pth of a run that goes on, names another one later

    @property
    def is_flow_map(self):
        return self.config.task.mode == "characteristic"

    def sampled(self, **settings):
        """The same model with other settings of sampling, {setting: value}."""
        return replace(self, config=self.config.replace("sampling", **settings))

    def images(self, seeds, given=None):
        """uint8 images (N, C, H, W) of a sequence of seeds, or of what is Given for them."""
        return torch.cat(
            [torch.empty(0, *self.mean.shape, dtype=torch.uint8), *(images for _, images in generate(self, seeds, given))]
        )

    def states(self, seeds):
        """The states (N, C, H, W) at all times of the grid, from noise to the images, in the model's range of pixels."""
        return list(solve(self, seeds))

    def latents(self, seeds):
        """The latents (N, C, H, W), float32, that the images of these seeds begin from."""
        noise = SeedNoise(seeds, self.mean.shape, self.mean.device)
        return sde.start(noise(), self.mean, self.config.sampling.eval_eps1).cpu()

    def encode(self, images, labels=None):
        """The latents (N, C, H, W), float32, of uint8 images (N, C, H, W) with classes `labels` (N,), by the denoiser's ODE.

        A model with classes needs labels, or a class_idx for all.  UserError for a flow map, which runs to data alone, for
        sde and churn, for less than 2 steps, and for images or labels that are not of the model's kind.
        """
        check_encoder(self)
        return encode(self, labelled(self, images, labels), range(len(images)))

    def decode(self, latents, labels=None):
        """uint8 images (N, C, H, W) of latents (N, C, H, W), by the denoiser's ODE or by the flow map; labels as in encode().

        UserError for sde and churn, and for latents that are not finite float32 of the model's shape.
        """
        return self.images(range(len(latents)), from_latents(self, latents, labels))

    def from_images(self, images, t, start_seed=0, labels=None):
        """uint8 images drawn from uint8 images (N, C, H, W) with the noise of time t, image i with that of start_seed + i.

        eval_eps0 < t <= 1 - eval_eps1; labels as in encode().  UserError for another t, images or labels of another kind.
        """
        seeds = range(start_seed, start_seed + len(images))
        return self.images(seeds, from_images(self, labelled(self, images, labels), t, start_seed))

    def record(self, seeds, given=None):
        """How the images of these seeds are made: what eval.json and statistics hold about them."""
        plain = defaults.to_dict(self.config)
        if self.is_flow_map:
            plain["sampling"] = {k: v for k, v in plain["sampling"].items() if k not in OF_DENOISERS}
        file = {"checkpoint": str(self.path), "sha256": self.sha256, "step": self.step}
        file |= {"raw": True} if self.raw else {}
        file |= {"guide": self.guide.sha256} if self.guide else {}
        file |= {"begin": given.record} if given else {}
        evaluations = nfe(self.config, given and given.t)
        return {**file, "nfe": evaluations, "start_seed": seeds[0], "end_seed": seeds[-1], "config": plain}


def load_model(path, flags=(), device="cpu", raw=False, guide=None):
    """The Trained of a checkpoint, with flags {setting: value} over its settings of sampling; UserError where they disagree.

    With `raw`, of the weights of its last step.  The flag class_idx may be the name of a class.  `guide` is the path of a
    weaker denoiser, for the flag guidance.
    A checkpoint without configuration, as others publish, takes everything from flags and presets.  A pickle of EDM's has one
    but for the name of its data.
    """
    file = os.path.realpath(path) if os.path.islink(path) else path
    content, flags = checkpoint.read(file), {"precision": "fp32", "compile": False, **dict(flags)}  # not as it was trained
    for name in flags:
        if name in defaults.SETTINGS and name not in defaults.MODEL_SETTINGS:
            raise UserError(f"{name} is a setting of training: it changes no model that is trained")
    if "config" in content:
        config = defaults.from_dict(content["config"])
        if "step" not in content and "data_name" in flags:
            known = {name: flags[name] for name in ("data_name", "split", "flip") if name in flags}
            config = defaults.resolve(known, config)
        if "class_idx" in flags:
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
    unused = [name for name in OF_DENOISERS if name in flags]
    if unused and config.task.mode == "characteristic":
        misc.log(f"{path} is a flow map, which has no {' and no '.join(unused)}: the image does not change")
    about = {"knows_mean": knows_mean, "raw": raw or content.get("raw") is True, "sha256": misc.file_hash(file)}
    found = Trained(model, config, mean.to(device), content.get("step", 0), path, **about)
    return replace(found, guide=load_guide(found, guide, device)) if guide or config.sampling.guidance != 1 else found


def check_same_on_all_ranks(path, sha256):
    """UserError on all ranks unless they read the same checkpoint at `path`."""
    if len(set(dist_util.gather(sha256))) > 1:
        raise UserError(f"{path} changed while it was read, as that of a run that goes on: give the command again")


def check_guidance(trained):
    """UserError unless a denoiser knows both images of a class and images without."""
    net = trained.config.network
    if not (net.label_dim and net.label_dropout):
        why = "trained with --label_dropout" if net.label_dim else "conditional"
        raise UserError(f"--guidance: {trained.path} must be {why}; eval.py, teaser.py and fid.py take --guide instead")


def load_guide(trained, path, device):
    """The Trained at `path` that guides another one, or None for a guide that is its own; UserError where that cannot be."""
    net, sampling = trained.config.network, trained.config.sampling
    if path is None:
        check_guidance(trained)
        return None
    if sampling.guidance == 1 or trained.is_flow_map:
        raise UserError("--guide is for the ODE of a denoiser with a --guidance that is not 1: add it, or leave --guide out")
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


def class_number(config, which, path):
    """The number of a class of this name or, where none has it, of this number; UserError if there is none of this name."""
    known, name = config.data.class_names, str(which)
    if type(which) is int and (name not in known or not config.network.label_dim):
        return which
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
    names += ["latents or images to begin from"] if found.get("begin") != record.get("begin") else []
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


def times(sampling, t_max):
    """The grid (num_steps + 1,) of the sampling settings, from t_max to data."""
    return sde.GRIDS[sampling.time_grid](sampling.num_steps, t_max, sampling.eval_eps0, sampling.rho)


def trajectory(config, model, x, noise, label=None, t_max=None):
    """Yield the states from x, at t_max or at 1 - eval_eps1, to data, as the sampling settings say.

    model(x, t [, s], label=label) is the denoiser, or that of a flow map with s; noise() gives normals of x's shape.
    """
    sampling = config.sampling
    t_max, denoise = t_max or 1 - sampling.eval_eps1, partial(model, label=label)

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
    return sde.sample(step, x, times(sampling, t_max).to(x.device), churn if sampling.churn else None)


def nfe(config, t_max=None):
    """Network evaluations that the sampling settings spend on an image: counted, with a number in the place of an image."""
    calls = []

    def model(x, t, s=None, label=None):
        calls.append(t)
        return x

    list(trajectory(config, model, torch.zeros(1, 1), lambda: torch.zeros(1, 1), t_max=t_max))
    return len(calls) * (1 if config.sampling.guidance == 1 else 2)


# ------------------------------------------------------------------------------------- latents, and images to begin from


@dataclass
class Given:
    """What images begin from in the place of noise: item i of a data set for the seed first + i."""

    items: dataset.MemoryImages  # of latents; or, if there is a t, of uint8 images
    t: float | None = None  # to which images go, with the noise of their seeds
    first: int = 0
    record: dict = field(default_factory=dict)  # what eval.json says about them

    def begin(self, seeds, z, centered):
        """(states (B, C, H, W), classes (B,), their time, None for 1 - eval_eps1) for these seeds with the noise z."""
        x, labels = (part.to(z.device) for part in self.items.batch([seed - self.first for seed in seeds]))
        if self.t is not None:
            x = sde.interpolate(dataset.to_model(x, centered), z, torch.tensor(self.t, dtype=torch.float64, device=z.device))
        return x, labels, self.t


def labelled(trained, items, labels=None, what="the images", dtype=torch.uint8):
    """The data set of images or latents (N, C, H, W) and the classes (N,) to draw them with: class_idx, else `labels`.

    UserError unless the model takes them.
    """
    labels = None if labels is None else torch.as_tensor(labels)
    shape, label_dim, class_idx = trained.mean.shape, trained.config.network.label_dim, trained.config.sampling.class_idx
    if items.dtype != dtype or items.shape[1:] != shape or not len(items):
        held, needed = (
            f"{str(x).removeprefix('torch.')} {tuple(y)}" for x, y in ((items.dtype, items.shape[1:]), (dtype, shape))
        )
        raise UserError(f"{what} are {len(items)} of {held}: the model takes {needed}")
    if dtype.is_floating_point and not items.isfinite().all():
        raise UserError(f"{what} are not finite")
    if class_idx >= 0:
        labels = torch.full((len(items),), class_idx)
    elif label_dim and labels is None:
        raise UserError(f"{what} come without classes, and the model has {label_dim}: add --class_idx")
    elif label_dim and (len(labels) != len(items) or not 0 <= int(labels.min()) <= int(labels.max()) < label_dim):
        raise UserError(f"{what} have other classes than the {label_dim} of the model: add --class_idx")
    return dataset.MemoryImages(items, labels)


def check_noiseless(trained):
    """UserError where sampling adds noise."""
    if trained.config.sampling.sde or trained.config.sampling.churn:
        raise UserError("--sde and --churn add noise, and an image and its latent would not make each other: leave them out")


def check_encoder(trained):
    """UserError unless this model, with its settings, encodes."""
    check_noiseless(trained)
    if trained.is_flow_map:
        advice = "encode with the denoiser that it was distilled from, and decode the latents with either"
        raise UserError(f"{trained.path or 'the model'} is a flow map, which runs to data alone: {advice}")
    if trained.config.sampling.num_steps < 2:
        raise UserError("--num_steps is 1: encoding takes 2 or more, since the first leaves the data without the network")


def from_latents(trained, latents, labels=None, what="the latents"):
    """The Given of latents, float32 (N, C, H, W), with classes (N,); UserError as in Trained.decode."""
    check_noiseless(trained)
    return Given(labelled(trained, latents, labels, what, torch.float32))


def from_images(trained, images, t, first=0):
    """The Given of a data set of labelled(), at time t; UserError unless eval_eps0 < t <= 1 - eval_eps1."""
    low, high = trained.config.sampling.eval_eps0, 1 - trained.config.sampling.eval_eps1
    if not low < t <= high:
        raise UserError(f"--t is {t}: it must be above eval_eps0, which is {low}, and at most 1 - eval_eps1, which is {high}")
    check_seeds(first, first + len(images) - 1)
    return Given(images, t, first)


@torch.no_grad()
def encode(trained, images, rows):
    """The latents (len(rows), C, H, W), float32 on the CPU, of items of a data set of labelled(), in batches of eval_bsz.

    The grid of sampling from its last step to its first: leave_data(), then the solver's steps up to 1 - eval_eps1.
    """
    config, sampling, found = trained.config, trained.config.sampling, [torch.empty(0, *trained.mean.shape)]
    ts = times(sampling, 1 - sampling.eval_eps1)[:-1].flip(0).to(trained.mean.device)
    with misc.progress(len(rows), "encoding") as bar:
        for start in range(0, len(rows), sampling.eval_bsz):
            batch, labels = images.batch(list(rows[start : start + sampling.eval_bsz]))
            label = dataset.one_hot(labels.to(ts.device), config.network.label_dim)
            step = sde.solver(sampling.ode_solver, partial(guided(trained, sampling.guidance), label=label))
            x0 = dataset.to_model(batch, config.data.centered).to(ts.device)
            *_, x = sde.sample(step, sde.leave_data(x0, ts[0]), ts)
            if not x.isfinite().all():
                raise UserError(f"{trained.path or 'the model'} makes latents that are not finite")
            found.append(x.cpu())
            bar.update(len(batch))
    return torch.cat(found)


def write_latents(path, latents, images, metadata, has_classes):
    """npz with float32 `latents` and the uint8 `images` they were made of, a data set of labelled(), both (N, C, H, W).

    Beside them `metadata` (JSON), and int64 `labels` (N,) if it has classes.
    """
    arrays = {"latents": latents.numpy(), "images": images.images.numpy(), "metadata": json.dumps(metadata)}
    arrays |= {"labels": images.labels.numpy()} if has_classes else {}
    with misc.atomic(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def read_latents(path):
    """(latents, images, labels or None, metadata) of a file of write_latents(); UserError if it is none, or damaged."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            dataset.refuse_bombs(archive.zip)
            latents, images = (torch.from_numpy(archive[name]) for name in ("latents", "images"))
            labels = torch.from_numpy(archive["labels"]) if "labels" in archive else None
            metadata = json.loads(str(archive["metadata"]))
        dataset.check_record(metadata)
        metadata["config"]["sampling"]["eval_eps1"] + 0.0  # TypeError unless it is a number, and these are strings
        "".join(metadata["config"].get("data", {}).get("class_names", ()))
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape != latents.shape:
            raise ValueError("images of another kind")
        if labels is not None and (labels.dtype != torch.int64 or labels.shape != latents.shape[:1]):
            raise ValueError("labels of another kind")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # damaged zip, missing or pickled arrays, metadata of another kind
        raise UserError(f"{path} is not a file of latents, as eval.py --encode writes them, or it is damaged") from error
    return latents, images, labels, metadata


def open_latents(trained, path):
    """(Given, uint8 images that were encoded) of a file of latents; UserError unless the model decodes them."""
    latents, images, labels, metadata = read_latents(path)
    given = from_latents(trained, latents, labels, f"the latents in {path}")
    found, data = metadata["config"].get("data", {}), trained.config.data
    names = tuple(found.get("class_names", ())) if trained.config.network.label_dim and labels is not None else ()
    if found.get("centered", True) != data.centered or names and data.class_names and names != data.class_names:
        raise UserError(f"the latents in {path} are of another range of pixels, or of other classes, than this model's")
    theirs, ours = metadata["config"]["sampling"]["eval_eps1"], trained.config.sampling.eval_eps1
    if theirs != ours:
        why = f"the latents in {path} are states at t = 1 - {theirs}, and sampling starts at 1 - {ours}"
        raise UserError(f"{why}: add --eval_eps1 {theirs}")
    return given, images


@torch.no_grad()
def solve(trained, seeds, given=None):
    """Yield the states (B, C, H, W), to data, of the images with these seeds; the last are the images.

    They begin from noise or, with their classes, from what is Given.  A generator draws the latent, then the class of a
    conditional model if none is asked for, then what churn or the SDE need.
    """
    config, mean, t_max = trained.config, trained.mean, None
    noise = SeedNoise(seeds, mean.shape, mean.device)
    z, label_dim, label = noise(), config.network.label_dim, None
    x = sde.start(z, mean, config.sampling.eval_eps1)
    if given is not None:
        x, label, t_max = given.begin(seeds, z, config.data.centered)
    elif label_dim and config.sampling.class_idx >= 0:
        label = torch.full((len(seeds),), config.sampling.class_idx, device=mean.device)
    elif label_dim:
        label = torch.cat([torch.randint(label_dim, (1,), generator=g) for g in noise.generators]).to(mean.device)
    denoise = guided(trained, config.sampling.guidance)
    yield from trajectory(config, denoise, x, noise, dataset.one_hot(label, label_dim), t_max)


def generate(trained, seeds, given=None, desc="sampling"):
    """Yield (seeds, uint8 images (B, C, H, W)) in batches of eval_bsz, with a progress bar."""
    bsz = trained.config.sampling.eval_bsz
    with misc.progress(len(seeds), desc) as bar:
        for start in range(0, len(seeds), bsz):
            batch = seeds[start : start + bsz]
            yield batch, Generated(trained, batch, given=given).batch(range(len(batch)))[0]
            bar.update(len(batch))


class Generated:
    """The images of a Trained with these seeds, or of what is Given for them, as a data set that is drawn when it is read.

    poll() is called after each step of the solver, and may end the work by raising, as StopSignals.poll does on all ranks.
    """

    def __init__(self, trained, seeds, poll=None, given=None):
        self.trained, self.seeds, self.poll, self.shape = trained, seeds, poll, tuple(trained.mean.shape)
        self.given = given

    def __len__(self):
        return len(self.seeds)

    def batch(self, indices):
        for x in solve(self.trained, [self.seeds[i] for i in indices], self.given):  # noqa: B007 (the last is the images)
            if self.poll:
                self.poll()
        if not x.isfinite().all():
            self.await_others()
            raise UserError(f"{self.trained.path or 'the model'} makes images that are not finite: its weights are no good")
        return dataset.to_uint8(x, self.trained.config.data.centered), torch.zeros(len(indices), dtype=torch.long)

    def await_others(self):
        """Poll until no rank has a step left, so that one with fewer batches, or with bad images, leaves with the rest."""
        while self.poll and self.poll(busy=False):
            pass
