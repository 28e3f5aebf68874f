"""Small things that everything else uses: files, pictures, progress, speed, seeds of streams, weights that others publish."""

import dist_util
from dist_util import UserError

import errno
import hashlib
import http.client
import json
import os
import re
import resource
import sys
import tempfile
import urllib.request
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm


def temporary_path(path):
    """Where atomic() writes what will be `path`; remove_leftovers() knows it by its form."""
    folder, name = os.path.split(path)
    return Path(folder, f".{name}.{os.getpid()}.tmp")


@contextmanager
def atomic(path, sync=True):
    """A temporary path beside `path` to write to, renamed to it on success and removed on failure, but for a kill.

    Whoever looks sees the whole file or none; with `sync`, even after a power cut.  UserError when the disk refuses.
    """
    temporary, folder = temporary_path(path), os.path.dirname(path)
    try:
        if not os.path.isdir(folder or "."):
            os.makedirs(folder, exist_ok=True)
        yield temporary
        if sync and not temporary.is_symlink():
            sync_to_disk(temporary)
        os.replace(temporary, path)
        if sync:
            with suppress(OSError):  # some network file systems cannot do this for a folder
                sync_to_disk(folder or ".")
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch.save hides it behind a RuntimeError
        if not isinstance(cause, OSError):
            raise
        full = cause.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "free some space or choose another place" if full else "choose another place"
        raise UserError(f"cannot write {path}: {cause.strerror or cause}; {advice}") from error


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
        found = re.fullmatch(rf"\.{which}\.(\d+)\.tmp", path.name)
        if found and not is_alive(int(found[1])):
            with suppress(OSError):
                path.unlink()


def is_alive(number):
    """Whether there is a process of this number on this machine, other than this one."""
    try:
        os.kill(number, 0)
    except PermissionError:  # somebody else's
        return True
    except (OSError, OverflowError):
        return False
    return number != os.getpid()


def check_writable(path, advice="name another file"):
    """UserError where a file `path` plainly cannot be written.  For use before the work that makes its content."""
    folder, path = str(path).endswith("/"), Path(path)
    place = path
    try:
        if path.is_dir() or folder:
            raise UserError(f"cannot write {path}: it is a folder; {advice}")
        if path.exists() and not path.is_file():
            raise UserError(f"cannot write {path}: it is a device or a pipe, and would be replaced; {advice}")
        place = next(parent for parent in path.absolute().parents if parent.exists())
        tempfile.TemporaryFile(dir=place).close()
        with suppress(FileNotFoundError, NotADirectoryError):  # a name may be too long, with what atomic() adds
            os.stat(temporary_path(path))
    except OSError as error:  # also a folder that may not be entered, a name that is too long
        raise UserError(f"cannot write {path}: {place} is not writable ({error.strerror}); {advice}") from error


def check_folder(folder, flag):
    """UserError unless results can be written into a folder, which may be missing."""
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise UserError(f"--{flag} {folder} is a file: choose a folder")
    check_writable(Path(folder) / "any", f"choose another --{flag}")


def write_json(path, value):
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def file_hash(path):
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def tensor_hash(x):
    """SHA-256 of a tensor's values, in hex."""
    return hashlib.sha256(x.cpu().contiguous().numpy()).hexdigest()


def memory():
    """Bytes of memory of this machine, or of its container where that has a limit."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # the other kind of cgroup, none, or "max"
            found.append(int(Path(path).read_text()))
    return min(found)


def peak_memory():
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclass
class Meter:
    """Speed of the steps since it was made, on this rank."""

    images: int  # of a step, over all ranks
    flops: float  # of the network for an image; what stage 2's teacher computes is not counted
    steps: int = 0
    seconds: float = 0.0
    waited: float = 0.0  # of these, for data

    def line(self, device):
        """What metrics.jsonl holds of it; the peak memory is that of the GPU, else of the process."""
        rate = self.steps * self.images / self.seconds
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()
        return {
            "images_per_s": round(rate, 1),
            "data_share": round(self.waited / self.seconds, 4),
            "gflops_per_s": round(rate * self.flops / 1e9, 1),
            "memory_gb": round(peak / 1e9, 2),
        }


def timed(function):
    """Seconds that a call takes, the mean of three, after two that are not counted."""
    from torch.utils.benchmark import Timer  # for --dry_run alone

    return Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads()).timeit(3).mean


def derive_seed(*parts):
    """A seed for one purpose, from the run's seed and whatever tells the purpose apart; the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


class Bar(tqdm):
    """A tqdm that a signal may interrupt while it is being made, without a traceback when what there is of it goes."""

    def __del__(self):
        with suppress(AttributeError):
            super().__del__()


def progress(total, desc, unit="img", initial=0):
    """Progress bar on stderr, on rank 0 alone, with rate and time left."""
    often = 0.1 if sys.stderr.isatty() else 10  # seconds; a log file needs fewer lines
    options = {"disable": dist_util.rank() != 0, "mininterval": often, "dynamic_ncols": True, "file": sys.stderr}
    return Bar(total=total, initial=initial, desc=desc, unit=unit, unit_scale=unit == "B", **options)


def log(text):
    """A line on stderr, from rank 0 alone."""
    if dist_util.rank() == 0:
        tqdm.write("\n".join(map(dist_util.one_line, text.split("\n"))), file=sys.stderr)


def write_png(path, image, sync=False):
    """PNG file of a uint8 tensor (C, H, W), C = 1 or 3: atomic, but without `sync` it does not wait for the disk.

    Small images are not compressed: a file takes a block of 4,096 bytes anyway.  Others are, at zlib's level 1.
    """
    from torchvision.io import encode_png  # slow to import, and most runs draw nothing

    if max(image.shape) > 10**6:
        raise UserError(f"cannot write {path}: a PNG file has at most a million pixels a side, not {max(image.shape)}")
    encoded = encode_png(image, compression_level=int(image.numel() + image.shape[1] > 4000))
    with atomic(path, sync) as temporary, open(temporary, "wb") as file:
        file.write(encoded.numpy())


def is_whole_png(path):
    """Whether there is a PNG file to its end: after a power cut one that was just written may be empty or cut short."""
    with suppress(OSError), open(path, "rb") as file:  # there may be none, or one of fewer bytes
        file.seek(-12, os.SEEK_END)
        return file.read() == b"\0\0\0\0IEND\xaeB`\x82"  # the last chunk
    return False


def tile(images, columns):
    """uint8 images (N, C, H, W), small ones enlarged, as one picture (3, H', W') with white gaps; and a cell's size in it."""
    from torchvision.utils import make_grid  # slow to import, and most runs draw nothing

    scale = max(1, 64 // images.shape[-1])
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    return make_grid(images, nrow=columns, padding=scale, pad_value=255), images.shape[-1] + scale


def write_grid(path, images, columns):
    """PNG file of tile(images, columns)."""
    write_png(path, tile(images, columns)[0], sync=True)


def new_figure(columns, width, height):
    """A matplotlib figure that needs no display, and its row of axes; width and height in inches."""
    backend = os.environ.pop("MPLBACKEND", None)  # that of a notebook, or none that exists, would make the import fail
    try:
        from matplotlib.figure import Figure  # slow, and most commands draw nothing
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def write_figure(path, figure, dpi=150):
    """PNG file of a matplotlib figure."""
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png")


@contextmanager
def not_fatal(what):
    """Context in which a failure is a warning: a picture never ends a run."""
    try:
        yield
    except Exception as error:
        log(f"warning: cannot make {what}: {' '.join(str(error).split()) or type(error).__name__}")


WEIGHTS = {  # flag: (where it is published, what needs it)
    "inception_weights": (
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        "Inception features (others: --features pixels) need",
    ),
    "lpips_weights": (
        "https://github.com/photosynthesis-team/piq/releases/download/v0.4.0/lpips_weights.pt",
        "--loss_norm lpips needs",
    ),
    "vgg_weights": ("https://download.pytorch.org/models/vgg16-397923af.pth", "--loss_norm lpips needs"),
}


def weights_file(flag, path, download):
    """(path, SHA-256) of a published weights file: `path`, or its own name in weights/; rank 0 downloads it if asked to.

    A published name that ends in -XXXXXXXX.pth promises how the SHA-256 begins.  Where that is not kept, UserError for a file
    of this name, and a warning for one of another name.  UserError if there is no file.
    """
    url, need = WEIGHTS[flag]
    name = url.split("/")[-1]
    path = Path(path or Path("weights") / name)
    promised = "".join(re.findall(r"-([0-9a-f]{8})\.pth$", name))

    def find():
        try:
            digest = file_hash(path)
        except FileNotFoundError as error:
            raise UserError(f"{need} {path}: get it from {url}, name yours with --{flag}, or add --download") from error
        except OSError as error:
            raise UserError(f"cannot read --{flag} {path}: {error.strerror}") from error
        if not digest.startswith(promised) and path.name == name:
            raise UserError(f"{path} is damaged or another file: its SHA-256 begins with {digest[:8]}; remove it and get {url}")
        if not digest.startswith(promised):
            log(f"warning: {path} is not the published file (SHA-256 {promised}...): values compare with none but its own")
        return path, digest

    if download:
        dist_util.on_first_rank(lambda: None if path.exists() else fetch(url, path, promised))
    return dist_util.agree(find)


def fetch(url, path, promised):
    """Download a file; UserError, and no file, unless all of it comes and its SHA-256 begins as promised."""
    fail = f"cannot download {url} to {path}"
    with atomic(path) as temporary:
        try:
            with urllib.request.urlopen(url, timeout=60) as reply, open(temporary, "wb") as file:
                expected = int(reply.headers["Content-Length"] or 0)
                with progress(expected or None, path.name, unit="B") as bar:
                    while block := reply.read(1 << 20):
                        bar.update(file.write(block))
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            raise UserError(f"{fail}: {' '.join(str(error).split())}") from error
        size, digest = temporary.stat().st_size, file_hash(temporary)
        if expected and size != expected:
            raise UserError(f"{fail}: it broke off after {size} of {expected} bytes; try again")
        if not digest.startswith(promised):
            raise UserError(f"{fail}: its SHA-256 is {digest}, not {promised}...; it was not kept")
    log(f"downloaded {path}, SHA-256 {digest}")
