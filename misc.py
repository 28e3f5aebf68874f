"""Everything that touches the disk or a seed: data sets, checkpoints, the moving average, images from seeds, statistics."""

import copy
import dataclasses
import hashlib
import io
import json
import os
import sys
import zipfile
import zlib
from collections import deque
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from PIL import Image
from tqdm import tqdm

import defaults
import dist_util
import network
import sde
from dist_util import LoneError, UserError

# --------------------------------------------------------------------------------------------------------- files


@contextmanager
def atomic(path, sync=True):
    """A temporary path beside `path` to write to, renamed to it on success and removed on failure.

    Whoever looks sees the whole file or none; with `sync`, even after a power cut.  UserError when the disk refuses.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if sync:
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; free some space or choose another place") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path, value):
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def picture(image):
    """uint8 tensor (C, H, W), C = 1 or 3, as a Pillow image."""
    return Image.fromarray(image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy())


def write_png(path, image):
    """PNG file of a uint8 tensor (C, H, W): atomic, but without waiting for the disk."""
    with atomic(path, sync=False) as temporary:
        picture(image).save(temporary, format="PNG")


def tile(images, columns):
    """uint8 images (N, C, H, W) as one picture (3, H', W') with so many columns and white gaps; small images are enlarged.

    Returns the picture and the size in pixels of one cell, an image and its gap.
    """
    from torchvision.utils import make_grid  # slow to import, and most runs draw nothing

    scale = max(1, 64 // images.shape[-1])
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    return make_grid(images, nrow=columns, padding=scale, pad_value=255), images.shape[-1] + scale


def write_grid(path, images, columns):
    """PNG file of tile(images, columns)."""
    with atomic(path) as temporary:
        picture(tile(images, columns)[0]).save(temporary, format="PNG")


def file_hash(path):
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def progress(total, desc, unit="img", initial=0):
    """Progress bar on stderr, on rank 0 alone, with rate and time left."""
    return tqdm(
        total=total,
        initial=initial,
        desc=desc,
        unit=unit,
        file=sys.stderr,
        disable=dist_util.rank() != 0,
        dynamic_ncols=True,
        mininterval=0.1 if sys.stderr.isatty() else 10,  # seconds; a log file needs fewer lines
    )


def log(text):
    """A line on stderr, from rank 0 alone."""
    if dist_util.rank() == 0:
        tqdm.write(text, file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------- data


class MemoryImages(torch.utils.data.Dataset):
    """uint8 images (N, C, H, W) and int64 labels (N,) held in memory."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.images)

    def __getitems__(self, indices):
        return self.images[indices], self.labels[indices]


SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class ImageFiles(torch.utils.data.Dataset):
    """Images of a flat folder, of class folders or of a zip of either, in the order of their names.

    The first folder level under `path`, where there is one, is the class.  With `size` and `channels` images are cropped to
    their central square, resized (Lanczos) and converted; without, they are taken as they are and must be grey or RGB.
    Batches are uint8 (N, C, H, W) and int64 labels (N,).
    """

    def __init__(self, path, size=None, channels=None):
        self.path, self.size, self.channels = Path(path), size, channels
        self.zip = self.zip_owner = None
        try:
            if self.path.is_dir():
                names = [f.relative_to(self.path).as_posix() for f in self.path.rglob("*") if f.is_file()]
            elif zipfile.is_zipfile(self.path):
                with zipfile.ZipFile(self.path) as archive:
                    names = [n for n in archive.namelist() if not n.endswith("/")]
            else:
                raise UserError(f"{self.path} is neither a folder nor a zip of images")
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror or error}") from error
        visible = (n for n in names if not any(part.startswith((".", "__MACOSX")) for part in n.split("/")))
        self.names = sorted(n for n in visible if Path(n).suffix.lower() in SUFFIXES)
        if not self.names:
            raise UserError(f"no images in {self.path}: expected {', '.join(sorted(SUFFIXES))} files, flat or in class folders")
        folders = [n.split("/")[0] if "/" in n else "" for n in self.names]
        self.classes = sorted(set(folders))
        self.labels = torch.tensor([self.classes.index(f) for f in folders])

    def __len__(self):
        return len(self.names)

    def __getstate__(self):
        return {**self.__dict__, "zip": None, "zip_owner": None}

    def read(self, index):
        """uint8 tensor (C, H, W)."""
        name = self.names[index]
        try:
            if self.path.is_dir():
                data = (self.path / name).read_bytes()
            else:
                if self.zip_owner != os.getpid():  # a forked worker must not share its parent's place in the file
                    self.zip, self.zip_owner = zipfile.ZipFile(self.path), os.getpid()
                data = self.zip.read(name)
            with Image.open(io.BytesIO(data)) as image:
                image.load()
        except (OSError, ValueError, SyntaxError, zlib.error, zipfile.BadZipFile, Image.DecompressionBombError) as error:
            raise UserError(f"cannot read image {name} in {self.path}: {error}") from error
        if self.size is not None:
            image = image.convert("L" if self.channels == 1 else "RGB")
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            box = (left, top, left + side, top + side)
            if image.size != (self.size, self.size):
                image = image.resize((self.size, self.size), Image.Resampling.LANCZOS, box=box)
        elif image.mode not in ("L", "RGB"):
            raise UserError(f"image {name} in {self.path} has mode {image.mode}: convert it to 8-bit grey or RGB first")
        pixels = torch.from_numpy(np.array(image))
        return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()

    def __getitems__(self, indices):
        images = [self.read(i) for i in indices]
        for i, image in zip(indices, images):
            if image.shape != images[0].shape:
                shapes = " and ".join("x".join(map(str, x.shape)) for x in (images[0], image))
                raise UserError(f"images of different sizes in {self.path}: {shapes} ({self.names[i]})")
        return torch.stack(images), self.labels[indices]


TORCHVISION_FILES = {
    "mnist": ("MNIST", "MNIST/raw", "the unpacked {train,t10k}-{images-idx3,labels-idx1}-ubyte"),
    "cifar": ("CIFAR10", "cifar-10-batches-py", "data_batch_1 ... data_batch_5, test_batch, batches.meta"),
}


def load_data(data):
    """The training images of `--data_name` as a Dataset of uint8 batches; downloads on rank 0 where that is possible."""
    if data.data_name == "digits":
        with np.load(Path(__file__).parent / "data" / "digits.npz") as archive:
            levels, labels = archive["images"], archive["labels"]  # levels 0 ... 16
        images = np.floor(levels[:, None] * (255 / 16) + 0.5).astype(np.uint8)
        return MemoryImages(torch.from_numpy(images), torch.from_numpy(labels).long())
    if data.data_name in TORCHVISION_FILES:
        return _torchvision_data(data.data_name, data.data_path)
    path = Path(data.data_path)
    if data.data_name == "afhq":
        path = path / "afhq" / "train"
        if not path.is_dir():
            raise UserError(f"{path} is missing: unpack AFHQ so that it holds cat/, dog/ and wild/, or use --data_name digits")
    elif not path.exists():
        raise UserError(f"{path} is missing: --data_path names the folder or zip of images, or use --data_name digits")
    return ImageFiles(path, data.image_size, data.image_channels)


def _torchvision_data(name, root):
    from torchvision import datasets

    class_name, folder, files = TORCHVISION_FILES[name]

    def load(download):
        try:
            return getattr(datasets, class_name)(root, train=True, download=download)
        except (RuntimeError, OSError) as error:  # URLError is an OSError
            raise UserError(
                f"{name} is not in {Path(root) / folder} and could not be downloaded ({' '.join(str(error).split())}): "
                f"put {files} there, or use --data_name digits"
            ) from error

    dist_util.on_first_rank(lambda: load(download=True))
    found = load(download=False)
    images = torch.as_tensor(found.data)
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    return MemoryImages(images, torch.as_tensor(found.targets))


def to_model(images, centered):
    """uint8 images to float32 in [0, 1], or in [-1, 1] if centered."""
    images = images.float() / 255
    return 2 * images - 1 if centered else images


def to_uint8(x, centered):
    """The inverse: clamp, then floor(255 x + 0.5); on the CPU."""
    x = (x.float() + 1) / 2 if centered else x.float()
    return torch.floor(255 * x.clamp(0, 1) + 0.5).to(torch.uint8).cpu()


def data_mean(dataset, centered, bsz=256):
    """Mean image, float32 (C, H, W) in the model's range: each rank adds up its share."""
    mine = range(dist_util.rank(), len(dataset), dist_util.world_size())

    def add_up():
        total = torch.zeros(dataset.__getitems__([0])[0].shape[1:], dtype=torch.float64)
        with progress(len(mine), "data mean") as bar:
            for start in range(0, len(mine), bsz):
                images = dataset.__getitems__(list(mine[start : start + bsz]))[0]
                total += images.double().sum(0)
                bar.update(len(images))
        return total

    # Sums of uint8 are exact in float64: every rank count gives the same mean.
    total = dist_util.agree(add_up)
    mean = dist_util.sum_over_ranks(total) / len(dataset) / 255
    return (2 * mean - 1 if centered else mean).float()


def derive_seed(*parts):
    """A seed for one purpose, from the run's seed and whatever tells the purpose apart; the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


class Batches:
    """Index batches of one rank, without end, from optimizer step `start` on.

    The data order is one stream of shuffled epochs, a function of the seed alone; step n takes its images from position
    n global_bsz on, and rounds and ranks split them.  So a run that continues sees what it would have seen, and the
    number of ranks and the size of a round do not change which images a step uses.
    """

    def __init__(self, length, seed, start, global_bsz, bsz):
        self.length, self.seed, self.start, self.global_bsz, self.bsz = length, seed, start, global_bsz, bsz

    def __iter__(self):
        orders = {}
        position = self.start * self.global_bsz + dist_util.rank() * self.bsz
        while True:
            indices = []
            for p in range(position, position + self.bsz):
                epoch = p // self.length
                if epoch not in orders:
                    orders = {e: o for e, o in orders.items() if e == epoch - 1}
                    generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
                    orders[epoch] = torch.randperm(self.length, generator=generator).tolist()
                indices.append(orders[epoch][p % self.length])
            yield indices
            position += self.bsz * dist_util.world_size()


def batches(dataset, data, train, start):
    """Yield (uint8 images (bsz, C, H, W), labels (bsz,)) without end, one item a round, for this rank.

    LoneError for an image that cannot be read.
    """
    sampler = Batches(len(dataset), train.seed, start, train.global_bsz, train.bsz)
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=_as_it_is,
        num_workers=data.num_workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=data.num_workers > 0,
    )
    try:
        yield from loader
    except UserError as error:  # a worker's comes with its traceback in the text
        raise LoneError(str(error).strip().splitlines()[-1].removeprefix("dist_util.UserError: ")) from error


def _as_it_is(batch):
    return batch


def one_hot(labels, label_dim):
    """Labels (B,) to (B, label_dim) float32, or None for a model without classes."""
    return torch.nn.functional.one_hot(labels, label_dim).float() if label_dim else None


# --------------------------------------------------------------------------------------------------- checkpoints

FORMAT = 1


class EMA:
    """Moving average of a module's parameters and buffers, with decay min(decay, (1 + step)/(10 + step)) at each step."""

    def __init__(self, module, decay):
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, module, step):
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), 1 - decay)
        for mine, other in zip(self.module.buffers(), module.buffers()):
            mine.copy_(other)


def build_model(config):
    """Denoiser of a configuration, with fresh weights; two times if the mode is characteristic."""
    net, data = dataclasses.asdict(config.network), config.data
    sigma_data, M = net.pop("sigma_data"), net.pop("M")
    two_times = config.task.mode == "characteristic"
    try:
        unet = network.UNet(data.image_size, data.image_channels, two_times=two_times, **net)
    except ValueError as error:  # of GroupNorm
        raise UserError(f"--model_channels {config.network.model_channels} does not suit the network: {error}") from error
    return network.Denoiser(unet, sigma_data, M)


def save_checkpoint(workdir, model, ema, optim, step, config, mean):
    """{workdir}/DDPMpp-{step}.pth, atomically; returns the path.

    Every random number of training is drawn from a generator seeded by (seed, purpose, step, round, rank), so the random
    state is the seed and the step.
    """
    path = Path(workdir) / f"DDPMpp-{step:06d}.pth"
    content = {
        "model": model.net.state_dict(),
        "ema": ema.module.net.state_dict(),
        "optim": optim.state_dict(),
        "step": step,
        "config": defaults.to_dict(config),
        "mean": mean,
        "random": {"seed": config.train.seed, "step": step},
        "format": FORMAT,
    }
    with atomic(path) as temporary, open(temporary, "wb") as file:  # given a name, torch would write it into the file
        torch.save(content, file)
    return path


def load_checkpoint(path):
    """The dict of a checkpoint, on the CPU.  Loads tensors and plain values only: no code in the file ever runs."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"there is no checkpoint {path}") from error
    except (IsADirectoryError, PermissionError) as error:
        raise UserError(f"cannot read checkpoint {path}: {error.strerror}; name a .pth file") from error
    except Exception as error:  # whatever the unpickler meets in a damaged or hostile file
        raise UserError(f"{path} is not a checkpoint of tensors and plain values, or it is damaged") from error
    if not isinstance(content, dict) or not all(isinstance(content.get(k), dict) for k in ("model", "ema")):
        raise UserError(f"{path} is not a checkpoint: it has no 'model' and 'ema' state dicts")
    if content.get("format", FORMAT) != FORMAT:
        raise UserError(f"{path} has format {content['format']}, this version reads {FORMAT}: update the software")
    return content


def load_weights(net, state, path):
    """Strict load_state_dict, with the wrappers' prefixes of other implementations taken off."""
    for prefix in ("module.", "model.", "net."):
        if state and all(k.startswith(prefix) for k in state):
            state = {k[len(prefix) :]: v for k, v in state.items()}
    own = net.state_dict()
    wrong = [f"{k} is missing" for k in own if k not in state]
    wrong += [f"{k} is unknown" for k in state if k not in own]
    wrong += [
        f"{k} is {tuple(getattr(state[k], 'shape', ()))}, not {tuple(own[k].shape)}"
        for k in own
        if k in state and getattr(state[k], "shape", None) != own[k].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{path} does not fit this network: {'; '.join(wrong[:3])}{more}")
    net.load_state_dict(state)


@dataclasses.dataclass
class Trained:
    """A model ready to sample from: moving-average weights, evaluation mode, no gradients."""

    model: network.Denoiser
    config: defaults.Config
    mean: torch.Tensor  # (C, H, W), zeros where the checkpoint does not say
    step: int
    path: str
    knows_mean: bool = True

    def describe(self):
        """What statistics and result files record about a model."""
        return {"checkpoint": str(self.path), "sha256": file_hash(self.path), "step": self.step}


def override(config, flags, path):
    """The configuration of the checkpoint `path` with explicit flags over it.

    UserError for what shaped the weights (mode, data, network) and cannot be another.
    """
    free = ("data_path", "num_workers", "dropout", "label_dropout")
    for name in ("task", "data", "network"):
        for key, value in vars(getattr(config, name)).items():
            if key not in free and flags.get(key, value) != value:
                raise UserError(f"--{key} is {flags[key]}, but {path} was made with {value}: leave it out")
    return defaults.resolve(flags, config)


def load_model(path, flags, device):
    """Trained model of a checkpoint, its settings overridden by explicit flags where that makes sense.

    A checkpoint without configuration (published by others) takes everything from flags and presets.  UserError where
    flags, weights and configuration disagree.
    """
    content = load_checkpoint(path)
    flags = dict(flags)
    two_times = any(".affine_s." in k for k in content["ema"])
    if "config" in content:
        config = override(defaults.from_dict(content["config"]), flags, path)
    else:
        if "data_name" not in flags:
            raise UserError(f"{path} has no configuration: say --data_name, and its network's flags where they differ")
        mode = "characteristic" if two_times else "denoiser"
        if flags.setdefault("mode", mode) != mode:
            raise UserError(f"--mode is {flags['mode']}, but the weights in {path} are those of mode {mode}")
        config = defaults.resolve(flags)
    model = build_model(config)
    load_weights(model.net, content["ema"], path)
    mean = content.get("mean")
    knows_mean = mean is not None
    if not knows_mean:
        log(f"{path} does not hold the mean of its data: sampling starts from noise without it")
        mean = torch.zeros(config.data.image_channels, config.data.image_size, config.data.image_size)
    model = model.eval().requires_grad_(False).to(device)
    return Trained(model, config, mean.to(device), int(content.get("step", 0)), path, knows_mean)


# ------------------------------------------------------------------------------------------------------- sampling


class SeedNoise:
    """Standard normals (B, *shape), image i from a generator of its own, seeded with seeds[i].

    Drawn on the CPU, so that an image depends neither on its batch nor on the device.
    """

    def __init__(self, seeds, shape, device):
        self.generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        self.shape, self.device = shape, device

    def __call__(self):
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)


def nfe(config):
    """Network evaluations that the sampling settings spend on an image."""
    n, sampling = config.sampling.num_steps, config.sampling
    heun = config.task.mode == "denoiser" and sampling.ode_solver == "heun" and not sampling.sde
    return 2 * n - 1 if heun else n


@torch.inference_mode()
def solve(trained, seeds):
    """Yield the states (B, C, H, W), from noise to data, of the images with these seeds; the last are the images.

    Draws of each image's generator: the latent, then its class if the model is conditional and none is asked for, then what
    churn or the SDE need.
    """
    model, config, sampling = trained.model, trained.config, trained.config.sampling
    noise = SeedNoise(seeds, trained.mean.shape, trained.mean.device)
    x = sde.start(noise(), trained.mean, sampling.eval_eps1)
    label_dim, label = config.network.label_dim, None
    if label_dim:
        if sampling.class_idx >= 0:
            labels = torch.full((len(seeds),), sampling.class_idx)
        else:
            labels = torch.cat([torch.randint(label_dim, (1,), generator=g) for g in noise.generators])
        label = one_hot(labels, label_dim).to(x.device)

    def denoise(x, t):
        return model(x, t, label=label)

    if config.task.mode == "characteristic":
        step = lambda x, t, s: model.flow_map(x, t, s, label)  # noqa: E731
    elif sampling.sde:
        step = lambda x, t, s: sde.ancestral_step(denoise, noise, x, t, s)  # noqa: E731
    else:
        step = lambda x, t, s: sde.SOLVERS[sampling.ode_solver](denoise, x, t, s)  # noqa: E731
    t_max = 1 - sampling.eval_eps1

    def churn(x, t):
        if sampling.s_min <= t[0] <= sampling.s_max:
            return sde.churn(x, t, sampling.gamma, t_max, noise)
        return x, t

    ts = sde.grid(sampling.num_steps, t_max, sampling.eval_eps0, sampling.rho).to(x.device)
    yield from sde.sample(step, x, ts, churn if sampling.churn else None)


def generate(trained, seeds, desc="sampling"):
    """Yield (seeds, uint8 images (B, C, H, W)) in batches of eval_bsz, with a progress bar."""
    with progress(len(seeds), desc) as bar:
        for start in range(0, len(seeds), trained.config.sampling.eval_bsz):
            batch = seeds[start : start + trained.config.sampling.eval_bsz]
            x = deque(solve(trained, batch), maxlen=1).pop()
            yield batch, to_uint8(x, trained.config.data.centered)
            bar.update(len(batch))


# ------------------------------------------------------------------------------------------------------ statistics


def statistics(dataset, bsz=500):
    """(n, mean (d,), covariance (d, d)) of the pixels in [0, 1] of a dataset of uint8 batches, float64 numpy.

    Each rank adds up its share, every image once: sums of integers, exact in float64 (for fewer than 10^11 images), so the
    result does not depend on ranks or batches.  The covariance is that of numpy.cov, over n - 1.
    """
    mine = range(dist_util.rank(), len(dataset), dist_util.world_size())

    def add_up():
        shape = dataset.__getitems__([0])[0].shape[1:]
        dimension = shape.numel()
        if dimension > 20000:  # the matrix alone would take 3 GB
            raise UserError(f"images of {'x'.join(map(str, shape))} have {dimension} pixel features: that is too many to score")
        total, outer = torch.zeros(dimension, dtype=torch.float64), torch.zeros(dimension, dimension, dtype=torch.float64)
        with progress(len(mine), "statistics") as bar:
            for start in range(0, len(mine), bsz):
                images = dataset.__getitems__(list(mine[start : start + bsz]))[0]
                if images.shape[1:] != shape:
                    raise UserError(
                        f"images of different sizes in {dataset.path}: all must have the size of {dataset.names[0]}"
                    )
                pixels = images.flatten(1).double()
                total += pixels.sum(0)
                outer.addmm_(pixels.T, pixels)
                bar.update(len(pixels))
        return total, outer

    if len(dataset) < 2:
        raise UserError(f"{len(dataset)} image: a covariance needs two or more")
    total, outer = (dist_util.sum_over_ranks(x) for x in dist_util.agree(add_up))
    n = len(dataset)
    mu = total / n
    # n outer - total total^T is exact while the integers stay below 2^53; beyond, it is as good as float64 gets.
    sigma = (outer - torch.outer(mu, total)) / (n - 1)
    return n, (mu / 255).numpy(), (sigma / 255**2).numpy()


def write_statistics(dest, n, mu, sigma, metadata):
    """npz with float64 `mu` and `sigma`, as pytorch-fid and EDM write them, and how they came to be (`metadata`, JSON)."""
    with atomic(dest) as temporary, open(temporary, "wb") as file:
        np.savez(file, mu=mu, sigma=sigma, metadata=json.dumps({"n": n, "features": "pixels", **metadata}))


def read_statistics(path):
    """(mu, sigma, metadata dict) of a statistics file; the dict is empty for files of other tools."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            mu, sigma = archive["mu"].astype(np.float64), archive["sigma"].astype(np.float64)
            metadata = json.loads(str(archive["metadata"])) if "metadata" in archive else {}
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}: make it with fid.py --mode ref or --mode gen") from error
    except Exception as error:  # damaged zip, pickled arrays, missing names, not numbers
        raise UserError(f"{path} is not a statistics file with `mu` and `sigma`, or it is damaged") from error
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise UserError(f"{path} does not hold finite statistics: mu {mu.shape}, sigma {sigma.shape}")
    return mu, sigma, metadata


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), the squared 2-Wasserstein distance of Gaussians.

    The trace of the root is the sum of the roots of the eigenvalues of A^T sigma2 A, where sigma1 = A A^T: symmetric, so
    real, and sound for singular covariances.  Eigenvalues within rounding of zero count as zero, since the root of 1e-16
    would be 1e-8.
    """

    def roots(values, scale):
        floor = len(values) * np.finfo(np.float64).eps * scale
        return np.sqrt(np.where(values > floor, values, 0))

    values, vectors = scipy.linalg.eigh(sigma1)
    a = vectors * roots(values, values[-1])
    root = roots(scipy.linalg.eigvalsh(a.T @ sigma2 @ a), values[-1] * np.linalg.norm(sigma2)).sum()
    return max(float(np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * root), 0.0)


def folder_statistics(path):
    """(n, mu, sigma, metadata) of a folder or zip of images; metadata["made_by"] is eval.py's record, or empty.

    UserError if the folder lacks images that the record speaks of.
    """
    dataset = dist_util.agree(lambda: ImageFiles(path))
    record, made_by = Path(path) / "eval.json", {}
    if record.is_file():
        try:
            made_by = json.loads(record.read_text())
            expected = made_by["end_seed"] - made_by["start_seed"] + 1
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{record} is damaged: make the images again, or remove it") from error
        if len(dataset) != expected:
            raise UserError(
                f"{path} holds {len(dataset)} of the {expected} images that its eval.json speaks of: make them again"
            )
    n, mu, sigma = statistics(dataset)
    return n, mu, sigma, {"source": str(path), "made_by": made_by}
