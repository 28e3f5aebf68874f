"""Images in: the data sets, files of images of any kind, batches in a fixed order, and what is refused.

A data set has a length, `shape` (C, H, W), `labels` (N,), `class_names` (one or none where there are no classes),
`batch(indices)` -> uint8 images (B, C, H, W) and int64 labels (B,), and `fingerprint()`, which a run that continues compares.
"""

import dist_util
from dist_util import LoneError, UserError

import gzip
import hashlib
import io
import json
import math
import os
import struct
import warnings
import zipfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

import misc


class MemoryImages:
    """uint8 images (N, C, H, W) and int64 labels (N,), or class 0, held in memory."""

    def __init__(self, images, labels=None, class_names=()):
        self.images, self.class_names, self.shape = images, class_names, tuple(images.shape[1:])
        self.labels = torch.zeros(len(images), dtype=torch.long) if labels is None else labels.long()

    def __len__(self):
        return len(self.images)

    def fingerprint(self):
        """SHA-256 of images and labels."""
        digest = hashlib.sha256(self.images.contiguous().numpy())
        digest.update(self.labels.numpy())
        return digest.hexdigest()

    def batch(self, indices):
        return self.images[indices], self.labels[indices]


SUFFIXES = (".bmp", ".jfif", ".jpeg", ".jpg", ".png", ".webp")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # all that Pillow may try, whatever a name says: fewer decoders for hostile files
warnings.filterwarnings("ignore", "Corrupt EXIF data")  # decode() does without
warnings.simplefilter("error", Image.DecompressionBombWarning)  # 90 million pixels are no image to learn from


def decode(data, upright=False):
    """Pillow image in mode L or RGB from the bytes of a file, `upright` if asked; ValueError or OSError if it is none.

    Palettes become RGB, opaque alpha is dropped, a phone's MPO file is its first picture.  What would lose something is
    refused: transparency, more than 8 bits, CMYK, several frames.
    """
    deep = data[:8] == b"\x89PNG\r\n\x1a\n" and data[24:25] == b"\x10"  # Pillow would drop the low bits of 16 without a word
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
            raise ValueError(f"it has {image.n_frames} frames: keep one of them")
        image.load()
    if deep or image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
        raise ValueError(f"it has {'16 bits' if deep else f'mode {image.mode}'}: convert it to 8-bit grey or RGB first")
    with suppress(Exception):  # a damaged tag is none
        image = ImageOps.exif_transpose(image) if upright else image
    if image.mode in ("LA", "RGBA") or "transparency" in image.info:
        if image.convert("RGBA").getchannel("A").getextrema()[0] < 255:
            raise ValueError("it has transparent pixels: put it on a background first")
        image.info.pop("transparency", None)
    mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _is_image(name):
    """By its ending alone."""
    return name.lower().endswith(SUFFIXES)


def _is_visible(name):
    """Whether a file or folder is neither hidden nor what macOS puts beside."""
    return not name.startswith((".", "__MACOSX"))


def _in_folder(folder):
    """The names of all files and folders below a folder, links followed; those of folders end with /, as in a zip."""

    def refuse(error):
        raise error

    names, seen, root = [], set(), os.path.join(folder, "")
    for place, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        if os.path.realpath(place) in seen:  # links may lead back
            folders.clear()
            continue
        folders.sort()  # of two links to one folder the first counts
        seen.add(os.path.realpath(place))
        inside = [*files, *(f"{name}/" for name in folders)]
        names += [os.path.join(place, name).removeprefix(root).replace(os.sep, "/") for name in inside]
    return names


def _in_zip(archive):
    """{name: member} of a zip, with / for backslashes; ValueError for what leads out of it or is too large."""
    members = {member.filename.replace("\\", "/"): member for member in archive.infolist()}
    for name, member in members.items():
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"it holds {name}, a path that leads out of it: pack it again")
        if member.file_size > 2**28:
            raise ValueError(f"it holds {name} of {member.file_size} bytes: too large for an image")
    return members


class ImageFiles:
    """Images of a flat folder, of class folders (nested or not) or of a zip of either, in the order of their names.

    The class is the first folder level, or what EDM's dataset.json says.  With `size` and `channels`, for training, images are
    turned upright, cropped to their central square, resized (Lanczos) and converted.  Without, for scores, they must be alike,
    and dataset.json is read for its `labels` alone.
    """

    def __init__(self, path, size=None, channels=None, labels=True):
        self.path, self.size, self.channels, self.archive = Path(path), size, channels, None
        try:
            if self.path.is_dir():
                found = _in_folder(self.path)
            else:
                self.archive = zipfile.ZipFile(self.path)
                found = self.members = _in_zip(self.archive)
        except FileNotFoundError as error:
            raise UserError(f"there is no folder or zip of images {self.path}") from error
        except zipfile.BadZipFile as error:
            raise UserError(f"{self.path} is neither a folder nor a zip of images: {error}") from error
        except Exception as error:  # OSError, and whatever a damaged zip runs into
            raise UserError(f"cannot read {self.path}: {getattr(error, 'strerror', None) or error}") from error
        visible = [n for n in sorted(found) if all(map(_is_visible, n.split("/")))]
        files = [n for n in visible if not n.endswith("/")]
        self.names = [n for n in files if _is_image(n)]
        others = sorted({n for n in files if n.split("/")[-1] not in ("eval.json", "dataset.json")} - set(self.names))
        if not self.names:
            beside = f" (among {len(others)} files, such as {others[0]})" if others else ""
            kinds = ", ".join(SUFFIXES)
            raise UserError(f"no images in {self.path}{beside}: expected {kinds} files, flat or in class folders")
        if others:
            held = f"{self.path} holds {len(self)} images and {len(others)} other files"
            misc.log(f"warning: {held}, such as {others[0]}: passed over")
        self.labelled_by = ["dataset.json"] if labels and "dataset.json" in files else []
        if self.labelled_by:
            return self._take_labels()
        places = [n.split("/")[0] if "/" in n else "" for n in self.names]
        self.class_names = tuple(sorted({*places, *(n.split("/")[0] for n in visible if "/" in n)}))
        numbers = {name: i for i, name in enumerate(self.class_names)}
        self.labels = torch.tensor([numbers[place] for place in places])

    def _take_labels(self):
        """Labels and classes of EDM's dataset.json, {"labels": [[name, class number], ...]}; null is one class."""
        try:
            listed = json.loads(self.use("dataset.json"))["labels"]
            labels = dict(listed or dict.fromkeys(self.names, 0))
            numbers = [labels[name] for name in self.names]
            if not all(type(number) is int and 0 <= number < 2**20 for number in numbers):
                raise ValueError("labels are not class numbers")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            missing = f"{error} has no label" if isinstance(error, KeyError) else error
            raise UserError(f"dataset.json in {self.path} does not label these images: {missing}; mend or remove it") from error
        self.labels, self.class_names = torch.tensor(numbers), tuple(map(str, range(max(numbers) + 1)))

    def __len__(self):
        return len(self.names)

    @cached_property
    def shape(self):
        return tuple(self.read(0).shape)

    def use(self, name, function=bytes):
        """function(bytes of a file); UserError naming the file if it cannot be read or the function fails."""
        try:
            data = self.archive.read(self.members[name]) if self.archive else (self.path / name).read_bytes()
            return function(data)
        except Exception as error:  # of the file, of the zip (encrypted: RuntimeError), or of Pillow, which raises many kinds
            why = "it is damaged or no image" if isinstance(error, UnidentifiedImageError) else error
            raise UserError(f"cannot read image {name}, one of {len(self)} in {self.path}: {why}") from error

    def sample(self):
        """The names of up to 64 images, evenly spaced."""
        return [self.names[i] for i in sorted({i * (len(self) - 1) // 63 for i in range(64)})]

    def fingerprint(self):
        """SHA-256 of all names and of 64 of the files, as all would take long; a folder and its zip have the same."""
        digest = hashlib.sha256("\n".join(self.names).encode(errors="surrogateescape"))
        for name in self.sample() + self.labelled_by:
            digest.update(self.use(name))
        return digest.hexdigest()

    def conversions(self):
        """Lines about what is done to the images that a reader may not expect, as 64 of them show."""
        found = []
        for name in self.sample():
            with suppress(UserError):  # it is named when it is read
                found.append(self.use(name, lambda data: Image.open(io.BytesIO(data), formats=FORMATS)))
        small = min((i.size for i in found if min(i.size) < self.size), default=None)
        if small:
            yield f"images of {small[0]}x{small[1]} pixels are enlarged to {self.size}: a smaller --image_size holds them"
        if self.channels == 3 and found and all(i.mode in ("1", "L", "LA") for i in found):
            yield "the images are grey, and the model is trained in colour: --image_channels 1 is for grey"

    def read(self, index):
        """uint8 tensor (C, H, W)."""
        training = self.size is not None
        image = self.use(self.names[index], lambda data: decode(data, upright=training))
        if training:
            size, mode = (self.size, self.size), "L" if self.channels == 1 else "RGB"
            image = ImageOps.fit(image.convert(mode), size, Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.array(image))
        return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()

    def batch(self, indices):
        images = [self.read(i) for i in indices]
        for i, image in zip(indices, images):
            if tuple(image.shape) != self.shape:
                first, other = ("x".join(map(str, (*shape[1:], shape[0]))) for shape in (self.shape, image.shape))
                named = f"{self.names[0]} is {first}, {self.names[i]} is {other}"
                raise UserError(f"images of different sizes or colours among the {len(self)} in {self.path}: {named}")
        return torch.stack(images), self.labels[indices]


class Grey:
    """A set of colour images whose three channels are equal, as the grey images that they are."""

    def __init__(self, images):
        self.images, self.shape = images, (1, *images.shape[1:])

    def __len__(self):
        return len(self.images)

    def batch(self, indices):
        images, labels = self.images.batch(indices)
        coloured = (images != images[:, :1]).flatten(1).any(1).nonzero().flatten().tolist()
        if coloured:
            index = indices[coloured[0]]
            name = self.images.names[index] if isinstance(self.images, ImageFiles) else f"image {index}"
            raise UserError(f"the reference is of grey images, and {name} has colours: they do not compare")
        return images[:, :1], labels


def refuse_bombs(archive):
    """ValueError if a zip holds a gigabyte or more that is packed to less than a hundredth."""
    if any(member.file_size >= 2**30 and member.file_size > 100 * member.compress_size for member in archive.infolist()):
        raise ValueError("a few bytes that would fill the memory")


def load_array(path):
    """MemoryImages of the uint8 images `arr_0` (N, H, W, 1 or 3) of an npz file, as samplers of others write them."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            refuse_bombs(archive.zip)
            array = archive["arr_0"]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # damaged zip, missing or pickled array
        raise UserError(f"{path} is not an npz file with an array `arr_0` of images, or it is damaged") from error
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] not in (1, 3) or 0 in array.shape:
        raise UserError(f"{path} holds {array.dtype} {array.shape}: expected uint8 images (N, H, W, 1 or 3)")
    return MemoryImages(torch.from_numpy(array).permute(0, 3, 1, 2))


def load_digits(data, download):
    if data.split == "test":
        raise UserError("--split test: the digits are all for training; take mnist, or a folder that holds train/ and test/")
    if data.data_path != type(data).data_path:
        raise UserError(f"the digits are not in {data.data_path}: leave --data_path out, or add --data_name folder")
    with np.load(Path(__file__).parent / "data" / "digits.npz") as archive:
        levels, labels = archive["images"], archive["labels"]  # levels 0 ... 16
    images = np.floor(levels[:, None] * (255 / 16) + 0.5).astype(np.uint8)
    return MemoryImages(torch.from_numpy(images), torch.from_numpy(labels), tuple("0123456789"))


def read_idx(path):
    """uint8 array of a file of MNIST's, packed by gzip or not, whatever its name says; UserError naming it if it is none."""
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
        if content[:3] != b"\0\0\x08":
            raise ValueError("it does not begin as such a file does")
        shape = struct.unpack_from(f">{content[3]}I", content, 4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError, struct.error, gzip.zlib.error) as error:
        raise UserError(f"{path} is damaged or no idx file of MNIST ({error}): remove it, and get it again") from error


def load_mnist(data, download):
    folder, part = Path(data.data_path) / "MNIST" / "raw", {"train": "train", "test": "t10k"}[data.split]

    def find():
        files = [folder / f"{part}-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1")]
        return [next((p for p in (file, file.with_name(f"{file.name}.gz")) if p.exists()), None) for file in files]

    _fetch("MNIST", data, download and not all(find()))
    if not all(find()):
        _fail("mnist", folder, f"{part}-images-idx3-ubyte and {part}-labels-idx1-ubyte, unpacked or .gz,")
    images, labels = map(read_idx, find())
    if labels.ndim != 1 or images.shape != (len(labels), 28, 28) or not labels.size > 0 or labels.max() > 9:
        raise UserError(f"{folder} holds images {images.shape} and labels {labels.shape}, not MNIST's: get the files again")
    return MemoryImages(torch.tensor(images[:, None]), torch.tensor(labels), tuple("0123456789"))


def load_cifar(data, download):
    from torchvision import datasets  # slow to import

    folder = Path(data.data_path) / datasets.CIFAR10.base_folder
    train = data.split == "train"
    files = datasets.CIFAR10.train_list if train else datasets.CIFAR10.test_list
    known = {name: datasets.utils.check_integrity(folder / name, md5) for name, md5 in files}
    _fetch("CIFAR10", data, download and not all(known.values()))
    try:
        # which unpickles files of the published MD5 alone
        found = datasets.CIFAR10(data.data_path, train=train, download=False)
    except (RuntimeError, OSError):
        other = [name for name in known if (folder / name).exists() and not known[name]]
        _fail("cifar", folder, f"{'data_batch_1 ... data_batch_5' if train else 'test_batch'} and batches.meta", other)
    images = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()
    return MemoryImages(images, torch.tensor(found.targets), tuple(found.classes))


def _fetch(name, data, wanted):
    """Let rank 0 download a data set of torchvision's if any rank wants it; a failure leaves no empty folders."""

    def fetch():
        from torchvision import datasets

        deepest = Path(data.data_path) / "MNIST" / "raw"
        missing = [p for p in (deepest, *deepest.parents) if not p.exists()]
        try:
            getattr(datasets, name)(data.data_path, train=True, download=True)
        except (RuntimeError, OSError) as error:  # URLError is an OSError
            misc.log(f"{name} could not be downloaded: {' '.join(str(error).split())}")
            for folder in missing:
                with suppress(OSError):
                    folder.rmdir()

    if any(dist_util.gather(wanted)):
        dist_util.on_first_rank(fetch)


def _fail(name, folder, files, other=()):
    there = f" (other files than the published: {', '.join(other)})" if other else ""
    advice = f"put {files} there, say another --data_path, or use --data_name digits"
    raise UserError(f"{name} is not in {folder.absolute()}{there}: {advice}")


SPLITS = {"train", "test", "val", "valid", "validation"}


def load_folder(data, download):
    """The images of --data_path; of train/ or test/ in it, by --split, where it holds these two folders.

    UserError where there are others beside them but val/, or all in a zip: test images are not to be trained on by mistake.
    """
    path, parts = Path(data.data_path), set()
    with suppress(OSError):  # ImageFiles says what is wrong then
        visible = [place for place in path.iterdir() if _is_visible(place.name)]
        parts = {f"{place.name}/" for place in visible if place.is_dir()}
        parts |= {place.name for place in visible if _is_image(place.name)}
    split = {"train/", "test/"} <= parts
    others = sorted(parts - {"train/", "test/", "val/"})
    if split and others:
        raise UserError(
            f"{path.absolute()} holds train/, test/ and {others[0]}: --data_path names one of them, or move that away"
        )
    if data.split == "test" and not split:
        raise UserError(f"--split test: {path.absolute()} must hold the folders train/ and test/")
    found = _files(path / data.split if split else path, data, "the images")
    named = sorted(name for name in found.class_names if name.lower() in SPLITS)
    if not split and len(named) > 1:
        held = f"{path.absolute()} holds {' and '.join(named)}, parts of a data set"
        raise UserError(f"{held}: call them train/ and test/ in a folder, or name one of them with --data_path")
    return found


def load_afhq(data, download):
    names = {"train": ("train",), "test": ("test", "val")}[data.split]  # the first version of the data set calls it val
    folder = Path(data.data_path, "afhq")
    path = next((folder / name for name in names if os.path.exists(folder / name)), folder / names[0])
    return _files(path, data, f"afhq/{names[0]}/{{cat,dog,wild}}")


def _files(path, data, what):
    with suppress(OSError):  # ImageFiles says what is wrong then
        if not path.exists():
            raise UserError(f"{path.absolute()} is missing: --data_path names what holds {what}, or use --data_name digits")
    return ImageFiles(path, data.image_size, data.image_channels)


# name: function of the settings, defaults.Data, and of whether missing files may be downloaded
DATASETS = {"digits": load_digits, "mnist": load_mnist, "cifar": load_cifar, "afhq": load_afhq, "folder": load_folder}


def load(data, download=True):
    """The images of the settings defaults.Data; missing files are downloaded where that is possible."""
    return DATASETS[data.data_name](data, download)


def check_classes(images, label_dim):
    """(names, counts) of a data set's classes, which are printed; UserError unless `label_dim`, if not 0, is their number."""
    counts = torch.bincount(images.labels, minlength=len(images.class_names)).tolist()
    names = images.class_names or ("",)
    shown = [f"{name or '(no folder)'} {count}" for name, count in zip(names, counts)]
    shown = ", ".join(shown if len(shown) <= 12 else [*shown[:11], f"and {len(shown) - 11} more"])
    if label_dim:
        splits = {name.lower() for name in names} <= SPLITS
        why = f"the data has {len(names)} class{'es' * (len(names) != 1)}"
        why = "there are pictures beside the class folders" if "" in names and len(names) > 1 else why
        why = "some classes have no images" if 0 in counts else why
        why = "these are parts of a data set, not classes" if splits else why
        if label_dim != len(names) or splits or "" in names or 0 in counts:
            raise UserError(f"--label_dim is {label_dim}, but {why}: found {shown}; --data_path names what holds the classes")
    if len(names) > 1 or label_dim:
        misc.log(f"classes: {shown}")
    return names, tuple(counts)


def to_model(images, centered):
    """uint8 images to float32 in [0, 1], or in [-1, 1] if centered."""
    images = images.float() / 255
    return 2 * images - 1 if centered else images


def flip(x, generator):
    """Images (B, C, H, W), each mirrored left to right with probability 1/2."""
    mirrored = torch.rand(len(x), generator=generator, device=x.device) < 0.5
    return torch.where(mirrored[:, None, None, None], x.flip(-1), x)


def to_uint8(x, centered):
    """The inverse: clamp, then floor(255 x + 0.5); on the CPU."""
    x = (x.float() + 1) / 2 if centered else x.float()
    return torch.floor(255 * x.clamp(0, 1) + 0.5).to(torch.uint8).cpu()


def data_moments(images, data, bsz=256):
    """(mean image, float32 (C, H, W), and standard deviation of all pixels) in the model's range, of images and, with flip,
    of their mirror images.  Sums of uint8 are exact in float64: any number of ranks agrees.
    """
    mine = range(dist_util.rank(), len(images), dist_util.world_size())

    def add_up():
        totals = torch.zeros(2, *images.shape, dtype=torch.float64)
        with misc.progress(len(mine), "data mean") as bar:
            for batch, _ in read_ahead(images, (mine[i : i + bsz] for i in range(0, len(mine), bsz)), data.num_workers):
                batch = batch.double()
                totals += torch.stack([batch.sum(0), batch.square().sum(0)]).cpu()
                bar.update(len(batch))
        return totals

    mean, square = dist_util.sum_over_ranks(dist_util.agree(add_up)) / len(images)
    sigma = float((square.mean() - mean.mean() ** 2).sqrt()) / 255
    mean = (mean + mean.flip(-1)) / 2 / 255 if data.flip else mean / 255
    return (2 * mean - 1 if data.centered else mean).float(), 2 * sigma if data.centered else sigma


def one_hot(labels, label_dim):
    """Labels (B,) to (B, label_dim) float32, or None for a model without classes."""
    return torch.nn.functional.one_hot(labels, label_dim).float() if label_dim else None


def index_batches(length, seed, start, global_bsz, bsz):
    """Yield lists of `bsz` indices for this rank, without end, from optimizer step `start` on.

    The order is one stream of shuffled epochs, a function of the seed alone.  Step n takes `global_bsz` images from position
    n global_bsz on, and its rounds and ranks split them: their numbers do not change which images a step uses.
    """

    @lru_cache(2)  # a batch may reach into the next epoch
    def order(epoch):
        generator = torch.Generator().manual_seed(misc.derive_seed(seed, "order", epoch))
        return torch.randperm(length, generator=generator).tolist()

    position = start * global_bsz + dist_util.rank() * bsz
    while True:
        yield [order(p // length)[p % length] for p in range(position, position + bsz)]
        position += bsz * dist_util.world_size()


class Resident:
    """A data set whose images are in memory or on a GPU, as uint8: each image of a file is decoded once."""

    def __init__(self, images, device):
        self.files, self.shape, self.labels = images, images.shape, images.labels.to(device)
        self.pixels = torch.empty(len(images), *images.shape, dtype=torch.uint8, device=device)
        self.there = bytearray(len(images))

    def __len__(self):
        return len(self.labels)

    def batch(self, indices):
        missing = [i for i in indices if not self.there[i]]
        if missing:
            self.pixels[missing] = self.files.batch(missing)[0].to(self.pixels.device)
            for i in missing:
                self.there[i] = True
        return self.pixels[indices], self.labels[indices]


def resident(images, device):
    """The same images for training: on the GPU if a quarter of what is free there holds them, else in as much of the memory."""
    size, cpu = len(images) * math.prod(images.shape), torch.device("cpu")
    if device.type == "cuda" and size <= torch.cuda.mem_get_info(device)[0] // 4:
        return Resident(images, device)
    world = dist_util.world_size()
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or world) if world > 1 else 1  # of this machine
    return Resident(images, cpu) if isinstance(images, ImageFiles) and size <= misc.memory() // 4 // ranks else images


def batches(images, data, train, start):
    """Yield (uint8 images (bsz, C, H, W), labels (bsz,)) without end, one item a round; LoneError if one cannot be read."""
    order = index_batches(len(images), train.seed, start, train.global_bsz, train.bsz)
    try:
        yield from read_ahead(images, order, data.num_workers, pin=torch.cuda.is_available())
    except UserError as error:
        raise LoneError(str(error)) from error


def read_ahead(images, order, workers, pin=False):
    """Yield images.batch(indices) for the lists of indices in `order`.  `workers` are threads, which need no shared memory."""

    def read(indices):
        batch = images.batch(list(indices))
        return tuple(part.pin_memory() for part in batch) if pin and batch[0].device.type == "cpu" else batch

    if not workers:
        yield from map(read, order)
        return
    pool, waiting = ThreadPoolExecutor(workers), deque()
    try:
        for indices in order:
            waiting.append(pool.submit(read, indices))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def check_record(made_by):
    """ValueError or AttributeError unless the configuration in eval.json, if there is one, has sections."""
    if not all(isinstance(section, dict) for section in made_by.get("config", {}).values()):
        raise ValueError("no configuration")


def open_images(path, labels=False):
    """(set of images, metadata) of a folder, zip or npz; metadata["made_by"] is eval.py's record beside them, or empty."""
    path, made_by = Path(path), {}
    if os.path.exists(path / "images.npz"):  # of eval.py --format npz; False where one may not look
        if picture := next((name for name in os.listdir(path) if _is_visible(name) and _is_image(name)), None):
            raise UserError(f"{path} holds images.npz and {picture}: give {path / 'images.npz'}, or move that away")
        path /= "images.npz"
    images = load_array(path) if path.suffix == ".npz" else ImageFiles(path, labels=labels)
    record = path.with_name("eval.json") if path.name == "images.npz" else path / "eval.json"
    if record.is_file():
        try:
            made_by = json.loads(record.read_text())
            expected = made_by["end_seed"] - made_by["start_seed"] + 1
            check_record(made_by)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{record} is damaged: make the images again, or remove it") from error
        if len(images) != expected:
            held = f"{path} holds {len(images)} of the {expected} images that its eval.json speaks of"
            raise UserError(f"{held}: the same eval.py command makes the others")
    return images, {"source": str(path), "made_by": made_by}
