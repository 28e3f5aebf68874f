"""Everything that touches the disk or a seed: data sets, checkpoints, the moving average, images from seeds, statistics."""

import copy
import dataclasses
import errno
import hashlib
import http.client
import io
import json
import math
import os
import random
import re
import signal
import struct
import sys
import tempfile
import urllib.request
import warnings
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from PIL import Image, UnidentifiedImageError
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
    A process that is killed here leaves its temporary path: see remove_leftovers().
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if sync and not temporary.is_symlink():
            sync_to_disk(temporary)
        os.replace(temporary, path)
        if sync:
            sync_to_disk(path.parent)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save hides it behind a RuntimeError
        if not isinstance(cause, OSError):
            raise
        full = cause.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "free some space or choose another place" if full else "choose another place"
        raise UserError(f"cannot write {path}: {cause.strerror or cause}; {advice}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync_to_disk(path):
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_leftovers(folder, name=None):
    """Remove what atomic() left in a folder, of all its files or of one, when its process was killed."""
    which = ".*" if name is None else re.escape(name)
    for path in Path(folder).glob(".*.tmp"):
        if re.fullmatch(rf"\.{which}\.\d+\.tmp", path.name):
            with suppress(OSError):
                path.unlink()


def check_writable(path, advice="name another file"):
    """UserError if it is plain that a file `path` cannot be written: before the work that makes its content, not after."""
    path = Path(path)
    try:
        place = next(parent for parent in path.absolute().parents if parent.exists())
        path.exists()
    except OSError as error:  # a folder that may not be entered, a name that is too long
        raise UserError(f"cannot write {path}: {error.strerror}; {advice}") from error
    if path.is_dir() or not place.is_dir():
        why = "it is a folder" if path.is_dir() else f"{place} is a file"
        raise UserError(f"cannot write {path}: {why}; {advice}")
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise UserError(f"cannot write {path}: {place} is not writable ({error.strerror}); {advice}") from error


def check_folder(folder, flag):
    """UserError unless results can be written into a folder, which may be missing."""
    folder = Path(folder)
    try:
        is_file = folder.exists() and not folder.is_dir()
    except OSError:
        is_file = False  # check_writable says what is wrong with it
    if is_file:
        raise UserError(f"--{flag} {folder} is a file: choose a folder")
    check_writable(folder / "any", f"choose another --{flag}")


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


PNG_END = b"\0\0\0\0IEND\xaeB`\x82"  # the last chunk


def is_whole_png(path):
    """Whether there is a PNG file to its end: after a power cut one that was just written may be empty or cut short."""
    try:
        with open(path, "rb") as file:
            file.seek(-len(PNG_END), os.SEEK_END)
            return file.read() == PNG_END
    except OSError:  # there is none, or one of fewer bytes
        return False


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
        unit_scale=unit == "B",
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

    @property
    def shape(self):
        """(C, H, W) of the images."""
        return tuple(self.images.shape[1:])

    def fingerprint(self):
        """SHA-256 of images and labels: what a run that continues compares."""
        digest = hashlib.sha256(self.images.contiguous().numpy())
        digest.update(self.labels.numpy())
        return digest.hexdigest()

    def __getitems__(self, indices):
        return self.images[indices], self.labels[indices]


SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # what Pillow is let try, whatever a file's name: fewer decoders for hostile files
LARGEST_FILE = 2**28  # bytes of an image in a zip, unpacked
warnings.simplefilter("error", Image.DecompressionBombWarning)  # 90 million pixels are no image to learn from


def decode(data):
    """Pillow image in mode L or RGB from the bytes of a file; ValueError or OSError saying why it cannot be one.

    Black and white becomes grey, palettes become RGB, and opaque alpha is dropped: nothing of the picture is lost.  What
    would lose something is refused: transparency, more than 8 bits, CMYK, several frames.
    """
    deep = data[:8] == b"\x89PNG\r\n\x1a\n" and data[24:25] == b"\x10"  # Pillow would drop the low bits of 16 without a word
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        if getattr(image, "n_frames", 1) > 1:
            raise ValueError(f"it has {image.n_frames} frames: keep one of them")
        image.load()
    if deep or image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
        depth = "16 bits" if deep else f"mode {image.mode}"
        raise ValueError(f"it has {depth}: convert it to 8-bit grey or RGB first")
    if image.mode in ("LA", "RGBA") or "transparency" in image.info:
        if image.convert("RGBA").getchannel("A").getextrema()[0] < 255:
            raise ValueError("it has transparent pixels: put it on a background first")
        image.info.pop("transparency", None)
    mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
    return image if image.mode == mode else image.convert(mode)


class ImageFiles(torch.utils.data.Dataset):
    """Images of a flat folder, of class folders (nested or not) or of a zip of either, in the order of their names.

    The first folder level under `path`, where there is one, is the class.  With `size` and `channels` images are cropped to
    their central square, resized (Lanczos) and converted, and files that are not images are passed over.  Without, as scores
    want it, images are taken as they are and must be alike, and a file that is not an image is an error (but for eval.json).
    decode() says which kinds are read.  Batches are uint8 (N, C, H, W) and int64 labels (N,).
    """

    def __init__(self, path, size=None, channels=None):
        self.path, self.size, self.channels = Path(path), size, channels
        self.zip = self.zip_owner = self.first_shape = None
        try:
            self.is_folder = self.path.is_dir()
            if self.is_folder:
                names = list(_files_under(self.path))
            elif zipfile.is_zipfile(self.path):
                with zipfile.ZipFile(self.path) as archive:
                    members = [member for member in archive.infolist() if not member.is_dir()]
                names = [member.filename for member in members]
                for member in members:
                    if member.filename.startswith("/") or ".." in member.filename.split("/"):
                        raise UserError(f"{self.path} holds {member.filename}, a path that leads out of it: pack it again")
                    if member.file_size > LARGEST_FILE:
                        raise UserError(
                            f"{self.path} holds {member.filename} of {member.file_size} bytes: too large for an image"
                        )
            else:
                raise UserError(f"{self.path} is neither a folder nor a zip of images")
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"cannot read {self.path}: {getattr(error, 'strerror', None) or error}") from error
        self.names, others = [], []
        for name in sorted(names):
            if not any(part.startswith((".", "__MACOSX")) for part in name.split("/")):
                is_image = os.path.splitext(name)[1].lower() in SUFFIXES
                (self.names if is_image else others).append(name)
        others = [name for name in others if name.split("/")[-1] != "eval.json"]
        images = f"{len(self.names)} image{'s' * (len(self.names) != 1)}"
        if not self.names:
            beside = f" (among {len(others)} files, such as {others[0]})" if others else ""
            raise UserError(
                f"no images in {self.path}{beside}: expected {', '.join(sorted(SUFFIXES))} files, flat or in class folders"
            )
        if others and size is None:
            raise UserError(f"{self.path} holds {images} and {len(others)} other files, such as {others[0]}: move them away")
        if others:
            log(f"{self.path} holds {images} and {len(others)} other files, such as {others[0]}, which are passed over")
        folders = [n.split("/")[0] if "/" in n else "" for n in self.names]
        self.classes = sorted(set(folders))
        index = {name: i for i, name in enumerate(self.classes)}
        self.labels = torch.tensor([index[f] for f in folders])

    def __len__(self):
        return len(self.names)

    def __getstate__(self):
        return {**self.__dict__, "zip": None, "zip_owner": None}

    @property
    def shape(self):
        """(C, H, W) of the images."""
        if self.first_shape is None:
            self.first_shape = tuple(self.read(0).shape)
        return self.first_shape

    def fingerprint(self):
        """SHA-256 of all names and of 64 of the files: what a run that continues compares.

        All files would take as long as reading them.  Packing a folder into a zip changes nothing.
        """
        digest = hashlib.sha256("\n".join(self.names).encode(errors="surrogateescape"))
        for index in sorted({i * (len(self) - 1) // 63 for i in range(64)}):
            digest.update(self.use(index, lambda data: data))
        return digest.hexdigest()

    def use(self, index, function):
        """function(bytes of a file); UserError naming the file if it cannot be read or the function fails."""
        name = self.names[index]
        try:
            if self.is_folder:
                with open(os.path.join(self.path, name), "rb") as file:
                    return function(file.read())
            if self.zip_owner != os.getpid():  # a forked worker must not share its parent's place in the file
                self.zip, self.zip_owner = zipfile.ZipFile(self.path), os.getpid()
            return function(self.zip.read(name))
        except Exception as error:  # of the file, of the zip (encrypted: RuntimeError), or of Pillow, which raises many kinds
            why = "it is damaged or no image" if isinstance(error, UnidentifiedImageError) else error
            raise UserError(f"cannot read image {name}, one of {len(self)} in {self.path}: {why}") from error

    def read(self, index):
        """uint8 tensor (C, H, W)."""
        image = self.use(index, decode)
        if self.size is not None:
            image = image.convert("L" if self.channels == 1 else "RGB")
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            box = (left, top, left + side, top + side)
            if image.size != (self.size, self.size):
                image = image.resize((self.size, self.size), Image.Resampling.LANCZOS, box=box)
        pixels = torch.from_numpy(np.array(image))
        return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()

    def __getitems__(self, indices):
        images = [self.read(i) for i in indices]
        for i, image in zip(indices, images):
            if tuple(image.shape) != self.shape:
                first, other = ("x".join(map(str, (*shape[1:], shape[0]))) for shape in (self.shape, image.shape))
                raise UserError(
                    f"images of different sizes or colours among the {len(self)} in {self.path}: "
                    f"{self.names[0]} is {first}, {self.names[i]} is {other}"
                )
        return torch.stack(images), self.labels[indices]


def _files_under(folder):
    def refuse(error):
        raise error

    seen = set()  # links are followed, and may lead back
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        here = os.stat(place)
        if (here.st_dev, here.st_ino) in seen:
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        inside = os.path.relpath(place, folder).replace(os.sep, "/")
        yield from names if inside == "." else (f"{inside}/{name}" for name in names)


class ArrayOnDisk(torch.utils.data.Dataset):
    """uint8 images (N, H, W, C) at `offset` of a file, as a data set of batches (B, C, H, W), all of class 0."""

    def __init__(self, path, offset, shape):
        self.path, self.offset, self.array_shape = path, offset, shape

    def __len__(self):
        return self.array_shape[0]

    @property
    def shape(self):
        """(C, H, W) of the images."""
        height, width, channels = self.array_shape[1:]
        return channels, height, width

    def __getitems__(self, indices):
        array = np.memmap(self.path, np.uint8, "r", self.offset, self.array_shape)  # of this batch alone: pages go when it does
        return torch.from_numpy(array[indices]).permute(0, 3, 1, 2), torch.zeros(len(indices), dtype=torch.long)


def refuse_bombs(archive):
    """ValueError if a zip holds a gigabyte or more that is packed to less than a hundredth."""
    if any(member.file_size >= 2**30 and member.file_size > 100 * member.compress_size for member in archive.infolist()):
        raise ValueError("a few bytes that would fill the memory")


def load_array(path):
    """Data set of the uint8 images `arr_0` (N, H, W, 1 or 3) of an npz file, as samplers of others write them.

    They stay on the disk and are read when needed, unless the npz is compressed.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            refuse_bombs(archive)
            member = archive.getinfo("arr_0.npy")
        if member.compress_type == zipfile.ZIP_STORED:
            with open(path, "rb") as file:
                file.seek(member.header_offset)
                file.seek(sum(struct.unpack("<HH", file.read(30)[26:])), os.SEEK_CUR)  # past the name and the extra field
                major, _ = np.lib.format.read_magic(file)
                read_header = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
                shape, columns_first, dtype = read_header(file)
                if dtype.hasobject or columns_first or file.tell() + math.prod(shape) > os.path.getsize(path):
                    raise ValueError("not a plain array, or not all of it")
                array = ArrayOnDisk(path, file.tell(), shape)
        else:
            with np.load(path, allow_pickle=False) as archive:
                array = archive["arr_0"]
                shape, dtype = array.shape, array.dtype
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # damaged zip, missing or pickled array
        raise UserError(f"{path} is not an npz file with an array `arr_0` of images, or it is damaged") from error
    if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape:
        raise UserError(f"{path} holds {dtype} {shape}: expected uint8 images (N, H, W, 1 or 3)")
    if isinstance(array, ArrayOnDisk):
        return array
    images = torch.from_numpy(array).permute(0, 3, 1, 2)
    return MemoryImages(images, torch.zeros(len(images), dtype=torch.long))


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
    path, advice = Path(data.data_path), "--data_path names the folder or zip of images, or use --data_name digits"
    if data.data_name == "afhq":
        path, advice = path / "afhq" / "train", "unpack AFHQ so that it holds cat/, dog/ and wild/, or use --data_name digits"
    try:
        if not path.exists() or data.data_name == "afhq" and not path.is_dir():
            raise UserError(f"{path} is missing: {advice}")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; {advice}") from error
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
        total = torch.zeros(dataset.shape, dtype=torch.float64)
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


def _ignore_signals(worker):
    """A reading process is ended by its parent (dist_util.launch): a signal to all would end it first, and with it the run."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


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
        worker_init_fn=_ignore_signals,
    )
    with worker_errors(LoneError):
        yield from loader


@contextmanager
def worker_errors(kind):
    """UserErrors of a data set as `kind`, also those of a worker process, which come with its traceback in their text."""
    try:
        yield
    except UserError as error:
        raise kind(str(error).strip().splitlines()[-1].removeprefix("dist_util.UserError: ")) from error


def _as_it_is(batch):
    return batch


def one_hot(labels, label_dim):
    """Labels (B,) to (B, label_dim) float32, or None for a model without classes."""
    return torch.nn.functional.one_hot(labels, label_dim).float() if label_dim else None


# --------------------------------------------------------------------------------------------------- checkpoints

FORMAT = 1
LARGEST_NETWORK = 2e10  # parameters


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

    def make():
        return network.UNet(data.image_size, data.image_channels, two_times=two_times, **net)

    try:
        with torch.device("meta"):  # no memory: how large would it be?
            size = sum(p.numel() for p in make().parameters())
        if size > LARGEST_NETWORK:
            raise UserError(f"a network of {size:.1e} parameters: lower --model_channels, --channel_mult or --num_blocks")
        unet = make()
    except ValueError as error:  # of GroupNorm
        raise UserError(f"--model_channels {config.network.model_channels} does not suit the network: {error}") from error
    return network.Denoiser(unet, sigma_data, M)


def checkpoints(workdir):
    """The paths of a folder's checkpoints, by step."""
    found = ((re.fullmatch(r"DDPMpp-(\d+)\.pth", path.name), path) for path in Path(workdir).glob("DDPMpp-*.pth"))
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def latest_checkpoint(workdir):
    """What {workdir}/latest.pth points to; where that is missing, the last checkpoint; None without a checkpoint.

    It is missing when the first checkpoint's process was killed before pointing to it, or lost in copying.
    """
    pointer = Path(workdir) / "latest.pth"
    if pointer.is_symlink():
        return pointer.parent / os.readlink(pointer)
    return (checkpoints(workdir) or [None])[-1]


def save_checkpoint(workdir, model, ema, optim, step, config, mean, run, keep=0):
    """{workdir}/DDPMpp-{step}.pth, atomically; returns the path.

    Every random number of training is drawn from a generator seeded by (seed, purpose, step, round, rank), so the random
    state is the seed and the step.  `run` is a dict of what else a run needs to continue.

    Then latest.pth is pointed to it, and of the checkpoints the last `keep` are kept, all if 0.  In this order, each waiting
    for the disk, so that latest.pth never points to what is not there, or not whole.
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
        "run": run,
        "format": FORMAT,
    }
    with atomic(path) as temporary, open(temporary, "wb") as file:  # given a name, torch would write it into the file
        torch.save(content, file)
    with atomic(path.with_name("latest.pth")) as temporary:
        os.symlink(path.name, temporary)
    remove_old(workdir, keep)
    return path


def remove_old(workdir, keep):
    """Of a folder's checkpoints, up to what latest.pth points to, keep the last ones, so many of them, or all if 0.

    One beyond it is left by a kill before the pointing, and does not count: it is written again.
    """
    known, latest = checkpoints(workdir), latest_checkpoint(workdir)
    known = known[: known.index(latest) + 1] if latest in known else []
    for old in known[:-keep] if keep else []:
        with suppress(OSError):  # somebody else removed it
            old.unlink()


def load_checkpoint(path):
    """The dict of a checkpoint, on the CPU.  Loads tensors and plain values only: no code in the file ever runs."""
    try:
        with warnings.catch_warnings():  # of torch about tensors that are refused below
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"there is no checkpoint {path}") from error
    except (IsADirectoryError, PermissionError) as error:
        raise UserError(f"cannot read checkpoint {path}: {error.strerror}; name a .pth file") from error
    except Exception as error:  # whatever the unpickler meets in a damaged or hostile file
        raise UserError(f"{path} is not a checkpoint of tensors and plain values, or it is damaged") from error
    if not isinstance(content, dict) or not all(isinstance(content.get(k), dict) for k in ("model", "ema")):
        raise UserError(f"{path} is not a checkpoint: it has no 'model' and 'ema' state dicts")
    step = content.get("step", 0)
    if type(step) is not int or not 0 <= step < 2**63:
        raise UserError(f"{path} is damaged: its step is {step!r}")
    written = content.get("format", FORMAT)
    if type(written) is not int or written != FORMAT:
        raise UserError(f"{path} has format {written!r}, this version reads {FORMAT}: update the software")
    if not all(x.layout is torch.strided and x.device.type == "cpu" for x in tensors_in(content)):
        raise UserError(f"{path} is damaged: it holds tensors that are not dense or without values")
    return content


def tensors_in(content):
    """All tensors in dicts and lists, which may be nested deeply or hold themselves."""
    left, seen = [content], set()
    while left:
        value = left.pop()
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            left.extend(value.values() if isinstance(value, dict) else value)


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
    if not wrong:
        wrong = [f"{k} holds {state[k].dtype}" for k in own if not state[k].is_floating_point()]
        wrong = wrong or [f"{k} is not finite" for k in own if not state[k].isfinite().all()]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{path} does not fit this network: {'; '.join(wrong[:3])}{more}")
    net.load_state_dict(state)


def load_optimizer(optim, state, path):
    """load_state_dict of a RAdam optimizer but for its settings, which stay; UserError unless every parameter has its state."""
    (parameters,) = (group["params"] for group in optim.param_groups)
    try:
        states = [{k: v.clone() for k, v in state["state"][i].items()} for i in range(len(parameters))]
        fits = all(s[k].shape == p.shape for p, s in zip(parameters, states) for k in ("exp_avg", "exp_avg_sq"))
        whole = len(state["state"]) == len(states) and all(
            s.keys() == {"step", "exp_avg", "exp_avg_sq"}
            and all(v.dtype == torch.float32 and v.isfinite().all() for v in s.values())
            and s["step"].shape == ()
            and s["step"] >= 0
            and (s["exp_avg_sq"] >= 0).all()
            for s in states
        )
    except Exception as error:  # whatever another dict runs into
        raise UserError(f"{path} does not hold the optimizer of this run, or it is damaged") from error
    if not whole or not fits:
        why = "it is damaged" if not whole else "it is that of another network"
        raise UserError(f"{path} does not hold the optimizer of this run: {why}")
    optim.load_state_dict({"state": dict(enumerate(states)), "param_groups": optim.state_dict()["param_groups"]})


@dataclasses.dataclass
class Trained:
    """A model ready to sample from: moving-average weights, evaluation mode, no gradients."""

    model: network.Denoiser
    config: defaults.Config
    mean: torch.Tensor  # (C, H, W), zeros where the checkpoint does not say
    step: int
    path: str
    knows_mean: bool = True

    def record(self, seeds):
        """How the images of these seeds are made: what eval.json and statistics hold about them."""
        return {
            "checkpoint": str(self.path),
            "sha256": file_hash(self.path),
            "step": self.step,
            "nfe": nfe(self.config),
            "start_seed": seeds[0],
            "end_seed": seeds[-1],
            "config": defaults.to_dict(self.config),
        }


def override(config, flags, path, sections=("task", "data", "network"), free=("dropout", "label_dropout")):
    """The configuration of the checkpoint `path` with explicit flags over it.

    UserError with the list of the flags that differ in these sections: by default in what shaped the weights and cannot be
    another.  Flags in `free`, or of where and how the data is read, may always differ.
    """
    free = ("data_path", "num_workers", *free)
    settings = {key: value for name in sections for key, value in vars(getattr(config, name)).items() if key not in free}
    different = [
        f"--{key} is {flags[key]} and was {value}" for key, value in settings.items() if flags.get(key, value) != value
    ]
    if different:
        raise UserError(f"{path} was made with other settings: {'; '.join(different)}: leave them out, or train a new model")
    return defaults.resolve(flags, config)


def check_mean(mean, config, path):
    """UserError unless the mean that a checkpoint holds is that of images of its configuration."""
    shape = (config.data.image_channels, config.data.image_size, config.data.image_size)
    if (
        not isinstance(mean, torch.Tensor)
        or tuple(mean.shape) != shape
        or mean.dtype != torch.float32
        or not mean.isfinite().all()
    ):
        raise UserError(f"{path} is damaged: its mean is not a finite image of {shape}")


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
    check_mean(mean, config, path)
    model = model.eval().requires_grad_(False).to(device)
    return Trained(model, config, mean.to(device), content.get("step", 0), path, knows_mean)


# ------------------------------------------------------------------------------------------------------- sampling


def check_seeds(start, end):
    """UserError unless start ... end are seeds of images."""
    if not 0 <= start <= end:
        raise UserError(f"--start_seed {start} --end_seed {end}: seeds run from 0, start to end, both included")
    if end - start >= 10**7 or end >= 2**63:
        raise UserError(f"--start_seed {start} --end_seed {end}: at most 10000000 seeds, each below 2^63")


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


def generate(trained, seeds, desc="sampling", poll=None):
    """Yield (seeds, uint8 images (B, C, H, W)) in batches of eval_bsz, with a progress bar.

    poll() is called after each step of the solver: by raising, it ends work that takes long.
    """
    with progress(len(seeds), desc) as bar:
        for start in range(0, len(seeds), trained.config.sampling.eval_bsz):
            batch = seeds[start : start + trained.config.sampling.eval_bsz]
            for x in solve(trained, batch):  # noqa: B007 (the last is the images)
                if poll:
                    poll()
            yield batch, to_uint8(x, trained.config.data.centered)
            bar.update(len(batch))


class Generated:
    """The images of a trained model with these seeds, as a set to be measured that never touches the disk.

    With StopSignals.poll as `poll`, the ranks that draw them stop together.
    """

    def __init__(self, trained, seeds, poll=None):
        self.trained, self.seeds, self.poll = trained, seeds, poll

    def __len__(self):
        return len(self.seeds)

    @property
    def shape(self):
        """(C, H, W) of the images."""
        return tuple(self.trained.mean.shape)


# -------------------------------------------------------------------------------------------------------- weights

WEIGHTS = {
    # flag: (file, where it is published, what needs it)
    "inception_weights": (
        "pt_inception-2015-12-05-6726825d.pth",
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights",
        "Inception features need",
    ),
    "lpips_weights": (
        "lpips_weights.pt",
        "https://github.com/photosynthesis-team/piq/releases/download/v0.4.0",
        "--loss_norm lpips needs",
    ),
    "vgg_weights": ("vgg16-397923af.pth", "https://download.pytorch.org/models", "--loss_norm lpips needs"),
}


def published_hash(flag):
    """First eight digits of the SHA-256 of a published weights file, as its name has them; empty where it has none."""
    found = re.search(r"-([0-9a-f]{8})\.pth$", WEIGHTS[flag][0])
    return found[1] if found else ""


def weights_file(flag, path, download):
    """(path, SHA-256) of a published weights file: `path`, or its own name in weights/; rank 0 downloads it if asked to.

    A published name that ends in -XXXXXXXX.pth promises how the SHA-256 begins: UserError if a file of that name does not keep
    it, or if there is no file.
    """
    name, place, need = WEIGHTS[flag]
    path, url = Path(path or Path("weights") / name), f"{place}/{name}"
    promised = published_hash(flag) if path.name == name else ""

    def fetch():
        fail = f"cannot download {url} to {path}"
        with atomic(path) as temporary:
            try:
                with urllib.request.urlopen(url, timeout=60) as reply, open(temporary, "wb") as file:
                    expected = int(reply.headers["Content-Length"] or 0)
                    with progress(expected or None, name, unit="B") as bar:
                        while block := reply.read(1 << 20):
                            bar.update(file.write(block))
            except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
                raise UserError(f"{fail}: {' '.join(str(error).split())}") from error
            if expected and temporary.stat().st_size != expected:
                raise UserError(f"{fail}: it broke off after {temporary.stat().st_size} of {expected} bytes; try again")
            digest = file_hash(temporary)
            if not digest.startswith(published_hash(flag)):
                raise UserError(f"{fail}: its SHA-256 is {digest}, not {published_hash(flag)}...; it was not kept")
        log(f"downloaded {path}, SHA-256 {digest}")

    def find():
        if path.is_dir():
            raise UserError(f"{path} is a folder: --{flag} names a file")
        if not path.is_file():
            raise UserError(f"{need} {path}: get it from {url}, name yours with --{flag}, or add --download")
        try:
            digest = file_hash(path)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        if not digest.startswith(promised):
            raise UserError(f"{path} is damaged or another file: its SHA-256 begins with {digest[:8]}; remove it and get {url}")
        return path, digest

    if download:
        dist_util.on_first_rank(lambda: None if path.exists() else fetch())
    return dist_util.agree(find)


# ------------------------------------------------------------------------------------------------------- features
# A feature extractor maps uint8 images (B, C, H, W) to features (B, d).  `unit` is what the features are to be divided by;
# `metadata` is what two statistics must have in common to be compared.


class Pixels:
    """Raw pixels in [0, 1].  As uint8, with unit 255, so that their sums are exact."""

    unit = 255
    metadata = {"features": "pixels", "preprocessing": "uint8/255", "precision": "exact sums of integers"}

    def __init__(self, device):
        self.device = device

    def dimension(self, shape):
        return math.prod(shape)

    def __call__(self, images):
        return images.to(self.device).flatten(1)


class Inception:
    """The 2,048 features of FID's InceptionV3, with the weights of a file; UserError if it holds others."""

    unit = 1

    def __init__(self, device, path, digest):
        import inception  # which imports torchvision: slow, and pixels do without

        try:
            net = inception.Inception(torch.load(path, map_location="cpu", weights_only=True))
        except Exception as error:  # whatever the unpickler meets in a damaged or hostile file; other tensors
            why = f": {error}" if isinstance(error, ValueError) else ""
            raise UserError(f"{path} does not hold the weights of FID's InceptionV3{why}") from error
        self.network, self.device = net.to(device), device
        self.metadata = {
            "features": "inception",
            "weights": digest,
            "preprocessing": inception.PREPROCESSING,
            "precision": "float32 features, float64 sums",
        }

    def dimension(self, shape):
        return 2048

    def __call__(self, images):
        parts = images.split(256 if self.device.type == "cuda" else 32)  # the activations of 32 images take 0.3 GB
        return torch.cat([self.network(part.to(self.device)) for part in parts])


def load_features(name, device, weights=None, download=False):
    """The feature extractor `name`, "pixels" or "inception"; every rank calls this together."""
    if name == "pixels":
        return Pixels(device)
    path, digest = weights_file("inception_weights", weights, download)
    extract = dist_util.agree(lambda: Inception(device, path, digest))
    published = published_hash("inception_weights")
    if not digest.startswith(published):
        log(f"warning: {path} is not the published file (SHA-256 {published}...): its scores compare with none but its own")
    return extract


def choose_features(asked, channels, reference=None):
    """What `--features auto` stands for: the reference's features, or pixels for grey images and inception for colour.

    UserError if the reference has others than those asked for.
    """
    if reference is None:
        return asked if asked != "auto" else "pixels" if channels == 1 else "inception"
    theirs = reference.metadata.get("features") or ("inception" if len(reference.mu) == 2048 else "pixels")
    if asked not in ("auto", theirs):
        raise UserError(f"--features is {asked}, but the reference holds {theirs}: leave it out, or make the reference again")
    return theirs


def metadata_of(extract, shape, n):
    """What statistics of n images (C, H, W) say about themselves."""
    return {"n": n, "image": list(shape), **extract.metadata}


# ------------------------------------------------------------------------------------------------------ statistics


@dataclasses.dataclass
class Statistics:
    """Mean and covariance of the features of a set of images, and how they came to be."""

    mu: np.ndarray  # (d,) float64
    sigma: np.ndarray  # (d, d) float64, that of numpy.cov, over n - 1
    metadata: dict  # n, image, features, ...; empty for files of other tools
    features: torch.Tensor | None = None  # (n, d) float32, for KID, precision and recall; on rank 0 alone


BATCH = 256  # images at a time; 256 * 255^2 < 2^24, so that float32 adds up as many products of bytes without rounding


def subset(total, count, seed):
    """`count` of the indices 0 ... total - 1, in order, drawn from the seed alone; UserError if there are too few."""
    if count is None or count == total:
        return range(total)
    if count > total:
        raise UserError(f"--num is {count}, but there are only {total} images")
    return sorted(random.Random(derive_seed(seed, "subset", total)).sample(range(total), count))


def read(source, indices, num_workers=0):
    """Yield the uint8 images (B, C, H, W), B up to BATCH, of a data set or of Generated images, with a progress bar."""
    if isinstance(source, Generated):
        rest = torch.empty(0, *source.shape, dtype=torch.uint8)
        whole = isinstance(indices, range)  # then seeds are not written out: there may be many
        seeds = source.seeds[indices.start : indices.stop : indices.step] if whole else [source.seeds[i] for i in indices]
        for _, images in generate(source.trained, seeds, poll=source.poll):
            *full, rest = torch.cat([rest, images]).split(BATCH)
            yield from full
        if len(rest):
            yield rest
        while source.poll and source.poll(busy=False):  # until the ranks with more batches have theirs
            pass
        return
    chunks = [list(indices[i : i + BATCH]) for i in range(0, len(indices), BATCH)]
    workers = min(num_workers, len(chunks))
    loader = torch.utils.data.DataLoader(source, batch_sampler=chunks, collate_fn=_as_it_is, num_workers=workers)
    with progress(len(indices), "statistics") as bar, worker_errors(UserError):
        for images, _ in loader:
            yield images
            bar.update(len(images))


def measure(source, extract, made=None, count=None, seed=0, keep=False, num_workers=0):
    """Statistics of the features of a data set or of Generated images, or of a seeded subset of `count`.

    Each rank takes every world_size-th image, and every image counts once.  Pixels are added up exactly, as integers (for
    fewer than 10^11 images), so that their statistics do not depend on the ranks; other features in float64.  With `keep`,
    the features themselves are gathered on rank 0.  `made` is added to the metadata.
    UserError for fewer than two images, for more than 20,000 features, and for images that cannot be read.
    """
    indices = subset(len(source), count, seed)
    n, world = len(indices), dist_util.world_size()
    if n < 2:
        raise UserError(f"{n} image{'s' * (n != 1)}: a covariance needs two or more")

    def add_up():
        dimension = extract.dimension(source.shape)
        if dimension > 20000:  # the matrix alone would take 3 GB
            size = "x".join(map(str, (*source.shape[1:], source.shape[0])))
            raise UserError(
                f"images of {size} have {dimension} pixels: too many for their covariance; use --features inception"
            )
        total = torch.zeros(dimension, dtype=torch.float64, device=extract.device)
        outer = torch.zeros(dimension, dimension, dtype=torch.float64, device=extract.device)
        mine = indices[dist_util.rank() :: world]
        kept, done = torch.empty(len(mine) if keep else 0, dimension), 0
        for images in read(source, mine, num_workers):
            features = extract(images)
            if keep:
                kept[done : done + len(images)] = features.float() / extract.unit
                done += len(images)
            rows = features.float() if features.dtype == torch.uint8 else features.double()
            total += rows.sum(0)
            outer += rows.T @ rows
        return total, outer, kept

    total, outer, kept = dist_util.agree(add_up)
    total, outer = (dist_util.sum_over_ranks(x).cpu() for x in (total, outer))
    # In place, since the matrix may be large.  For pixels the numerator is exact while its integers stay below 2^53, which is
    # up to 370,000 images; beyond, it is as good as float64 gets.
    sigma = outer.mul_(n).addr_(total, total, alpha=-1).div_(n * (n - 1) * extract.unit**2)
    features = dist_util.gather_rows(kept, n) if keep else None
    record = {**metadata_of(extract, source.shape, n), **(made or {})}
    if n != len(source):
        record["subset"] = {"of": len(source), "seed": seed}
    return Statistics((total / (n * extract.unit)).numpy(), sigma.numpy(), record, features)


def write_statistics(dest, statistics):
    """npz with float64 `mu` and `sigma`, as pytorch-fid and EDM write them; `metadata` (JSON), and `features` if kept."""
    arrays = {"mu": statistics.mu, "sigma": statistics.sigma, "metadata": json.dumps(statistics.metadata)}
    if statistics.features is not None:
        arrays["features"] = statistics.features.numpy()
    remove_leftovers(Path(dest).parent, Path(dest).name)
    with atomic(dest) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def check_record(made_by):
    """ValueError, AttributeError unless the record of how images were made, eval.json, holds sections of settings or none."""
    if not all(isinstance(section, dict) for section in made_by.get("config", {}).values()):
        raise ValueError("no configuration")


def read_statistics(path, features=False):
    """Statistics of a file, ours or of other tools; with `features`, UserError if it holds none."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            refuse_bombs(archive.zip)
            mu, sigma = archive["mu"], archive["sigma"]
            if mu.dtype.kind not in "fiu" or sigma.dtype.kind not in "fiu":
                raise ValueError("not real numbers")
            mu, sigma = mu.astype(np.float64), sigma.astype(np.float64)
            metadata = json.loads(str(archive["metadata"])) if "metadata" in archive else {}
            kept = (
                torch.from_numpy(archive["features"].astype(np.float32, copy=False))
                if features and "features" in archive
                else None
            )
            kinds = {"n": int, "image": list, "subset": dict, "made_by": dict}
            if not all(isinstance(metadata.get(name, kind()), kind) for name, kind in kinds.items()):
                raise ValueError("metadata of another kind")
            check_record(metadata.get("made_by", {}))
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}: make it with fid.py --mode ref or --mode gen") from error
    except Exception as error:  # damaged zip, pickled arrays, missing names, not numbers
        raise UserError(f"{path} is not a statistics file with `mu` and `sigma`, or it is damaged") from error
    matching = mu.ndim == 1 and len(mu) and sigma.shape == (len(mu), len(mu))
    if not (matching and np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise UserError(f"{path} does not hold finite statistics: mu {mu.shape}, sigma {sigma.shape}")
    if np.abs(sigma - sigma.T).max() > 1e-6 * np.abs(sigma).max():
        raise UserError(f"{path} does not hold a covariance: sigma is not symmetric")
    try:  # eigenvalues below zero by more than rounding, of sums in float32 too, make this fail
        shifted = sigma.copy()
        shifted.flat[:: len(mu) + 1] += 1e-4 * sigma.diagonal().max() + np.finfo(np.float64).tiny
        scipy.linalg.cholesky(shifted, overwrite_a=True)
    except np.linalg.LinAlgError as error:
        raise UserError(f"{path} does not hold a covariance: sigma has negative eigenvalues") from error
    if features and kept is None:
        raise UserError(f"{path} holds no features, which kid and pr need: make it again with --metrics fid,kid,pr")
    if features and (kept.ndim != 2 or kept.shape[1] != len(mu) or not kept.isfinite().all()):
        raise UserError(f"{path} does not hold finite features (n, {len(mu)}): {tuple(kept.shape)}")
    return Statistics(mu, sigma, metadata, kept)


def check_comparable(reference, dimension, metadata, force=False):
    """UserError unless images with so many features, and this metadata, are of the reference's feature space.

    With `force` only the number of features must agree.  Warns of statistics that say nothing about themselves, and of few
    images.
    """
    theirs = reference.metadata
    for name, one in (("reference", theirs), ("images", metadata)):
        if not one:
            log(f"warning: the statistics of the {name} do not say how they were made: nothing but their size is checked")
        if one.get("features") == "inception" and one.get("n", 2048) < 2048:
            log(f"warning: {one['n']} images ({name}) for 2,048 features: the score is large for that alone")
    names = [k for k in ("features", "weights", "image", "preprocessing", "precision") if k in theirs and k in metadata]
    text = "; ".join(f"{k} {theirs[k]} and {metadata[k]}" for k in names if theirs[k] != metadata[k])
    if dimension != len(reference.mu):
        text = f" ({text})" if text else ": they are of different sizes or feature spaces"
        raise UserError(f"the reference has {len(reference.mu)} features and the images {dimension}{text}")
    if text and not force:
        raise UserError(f"the reference and the images do not compare: {text} (--force compares them all the same)")
    if text:
        log(f"warning: comparing what differs: {text}")


def frechet_distance(a, b):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) of two Statistics: the squared 2-Wasserstein distance of
    Gaussians (FID, arXiv 1706.08500, eq. 6).

    The trace of the root is the sum of the roots of the eigenvalues of sigma2 sigma1, which are those of the symmetric
    A^T sigma2 A where sigma1 = A A^T, so real: by Cholesky where sigma1 is definite, else by its eigenvectors, where
    eigenvalues within rounding of zero count as zero, since the root of 1e-16 would be 1e-8.
    """
    tiny = 16 * np.finfo(np.float64).eps

    def roots(values, scale):
        return np.sqrt(np.where(values > tiny * scale, values, 0))

    try:
        pivots = scipy.linalg.cholesky(a.sigma).diagonal()
        definite = pivots.min() ** 2 > len(pivots) * tiny * pivots.max() ** 2
    except np.linalg.LinAlgError:
        definite = False
    if definite:
        root = np.sqrt(np.maximum(scipy.linalg.eigh(b.sigma, a.sigma, type=2, driver="gv", eigvals_only=True), 0)).sum()
    else:
        values, vectors = scipy.linalg.eigh(a.sigma, driver="evd")
        half = vectors * roots(values, values[-1])
        root = roots(scipy.linalg.eigvalsh(half.T @ b.sigma @ half), values[-1] * np.linalg.norm(b.sigma)).sum()
    return max(float(np.square(a.mu - b.mu).sum() + np.trace(a.sigma) + np.trace(b.sigma) - 2 * root), 0.0)


def open_images(path):
    """(set of images, metadata) of a folder, zip or npz; metadata["made_by"] is eval.py's record beside them, or empty.

    UserError if the folder lacks images that the record speaks of.
    """
    if Path(path).suffix == ".npz":
        return load_array(path), {"source": str(path), "made_by": {}}
    images = ImageFiles(path)
    record, made_by = Path(path) / "eval.json", {}
    if record.is_file():
        try:
            made_by = json.loads(record.read_text())
            expected = made_by["end_seed"] - made_by["start_seed"] + 1
            check_record(made_by)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{record} is damaged: make the images again, or remove it") from error
        if len(images) != expected:
            raise UserError(
                f"{path} holds {len(images)} of the {expected} images that its eval.json speaks of: the same eval.py "
                "command makes the others"
            )
    return images, {"source": str(path), "made_by": made_by}
