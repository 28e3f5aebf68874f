"""Score images: Frechet distance, KID, precision and recall between two sets of images.

  python fid.py --mode ref --data_name digits --dest stats/digits.npz              statistics of a data set
  python fid.py --mode gen --img_folder OUT --dest stats/out.npz                   of images: a folder, a zip, an npz
  python fid.py --mode gen --checkpoint CKPT --end_seed 9999 --dest stats/out.npz  of a model's images, without files
  python fid.py --mode fid --ref_path stats/digits.npz --stat_path stats/out.npz   their distance, one number on stdout
  python fid.py --mode fid --ref_path stats/digits.npz --img_folder OUT            the last two in one (or --checkpoint)

Features are raw pixels for grey images, which makes a "pixel FID", and those of FID's InceptionV3 for colour;
--features chooses otherwise.  Neither compares with the other, nor pixels across image sizes.
"""

import dist_util
from dist_util import UserError

import csv
import fcntl
import json
import math
import os
import random
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import scipy.linalg
import torch

import dataset
import defaults
import generator
import misc

# ------------------------------------------------------------------------------------------------------ features
# A feature extractor maps uint8 images (B, C, H, W) to features (B, d), to be divided by `unit`.  `metadata` is what two
# statistics must have in common to be compared.


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
        self.network, self.device = net.to(device), torch.device(device)
        self.metadata = {"features": "inception", "weights": digest, "preprocessing": inception.PREPROCESSING}
        self.metadata["precision"] = "float32 features, float64 sums"

    def dimension(self, shape):
        return 2048

    def __call__(self, images):
        parts = images.split(256 if self.device.type == "cuda" else 32)  # the activations of 32 images take 0.3 GB
        return torch.cat([self.network(part.to(self.device)) for part in parts])


def load_features(name, device="cpu", weights=None, download=False):
    """The feature extractor `name`, "pixels" or "inception"; every rank calls this together."""
    if defaults.choose("features", name, ("pixels", "inception")) == "pixels":
        return Pixels(device)
    path, digest = misc.weights_file("inception_weights", weights, download)
    return dist_util.agree(lambda: Inception(device, path, digest))


def choose_features(asked, channels, reference=None):
    """The name of the features asked for, or of the reference's, whatever "auto" stands for; UserError if these differ."""
    if reference is None:
        return asked if asked != "auto" else "pixels" if channels == 1 else "inception"
    theirs = reference.metadata.get("features") or ("inception" if len(reference.mu) == 2048 else "pixels")
    if asked not in ("auto", theirs):
        raise UserError(f"--features is {asked}, but the reference holds {theirs}: leave it out, or make the reference again")
    return theirs


def extractor(reference, shape, n, device, files, asked="auto", force=False):
    """The feature extractor for n images (C, H, W), with the files of an InceptionFile; all ranks call this together.

    UserError if they do not compare with the reference, if there is one.
    """
    found = load_features(choose_features(asked, shape[0], reference), device, files.inception_weights, files.download)
    if reference is not None:
        check_comparable(reference, found.dimension(shape), metadata_of(found, shape, n), force)
    return found


def metadata_of(extract, shape, n):
    """What statistics of n images (C, H, W) say about themselves."""
    return {"n": n, "image": list(shape), **extract.metadata}


# ------------------------------------------------------------------------------------------------------ statistics


@dataclass
class Statistics:
    """Mean and covariance of the features of a set of images, and how they came to be."""

    mu: np.ndarray  # (d,) float64
    sigma: np.ndarray  # (d, d) float64, that of numpy.cov, over n - 1
    metadata: dict  # n, image, features, ...; empty for files of other tools
    features: torch.Tensor | None = None  # (n, d) float32, for KID, precision and recall; on rank 0 alone


WORKERS = 2  # threads of the scripts that decode beside the features
BATCH = 256  # images at a time; 256 * 255^2 < 2^24, so that float32 adds up as many products of bytes without rounding


def subset(total, count, seed):
    """`count` of the indices 0 ... total - 1, in order, drawn from the seed alone; UserError if there are too few."""
    if count is None or count == total:
        return range(total)
    if count > total:
        raise UserError(f"--num is {count}, but there are only {total} images")
    return sorted(random.Random(misc.derive_seed(seed, "subset", total)).sample(range(total), count))


def measure(source, extract, made=None, count=None, seed=0, keep=False, num_workers=0):
    """Statistics of the features of a data set, of Generated images or of a uint8 tensor (N, C, H, W); or of a seeded subset.

    Pixels are added up exactly, as integers, so that their statistics do not depend on the ranks; other features in float64.
    With `keep`, rank 0 gets the features themselves.  `made` is added to the metadata.  UserError for fewer than two images,
    too many pixels, and what cannot be read.
    """
    if isinstance(source, torch.Tensor):
        if source.dtype != torch.uint8 or source.ndim != 4:
            raise UserError(f"images are {source.dtype} {tuple(source.shape)}: they must be uint8 (N, C, H, W)")
        source = dataset.MemoryImages(source)
    indices = subset(len(source), count, seed)
    n = len(indices)
    if n < 2:
        raise UserError(f"{n} image{'s' * (n != 1)}: a covariance needs two or more")

    def add_up():
        dimension = extract.dimension(source.shape)
        if dimension > 20000:  # the matrix alone would take 3 GB
            raise UserError(f"{dimension} values an image are too many for their covariance; use --features inception")
        total = torch.zeros(dimension, dtype=torch.float64, device=extract.device)
        outer = torch.zeros(dimension, dimension, dtype=torch.float64, device=extract.device)
        mine, kept = indices[dist_util.rank() :: dist_util.world_size()], [torch.empty(0, dimension)]
        drawn = isinstance(source, generator.Generated)  # in the batches of eval.py, for the same rounding
        size = source.trained.config.sampling.eval_bsz if drawn else BATCH
        batches = (mine[i : i + size] for i in range(0, len(mine), size))
        with misc.progress(len(mine), "sampling" if drawn else "statistics") as bar:
            for images, _ in dataset.read_ahead(source, batches, 0 if drawn else num_workers):
                for part in images.split(BATCH):
                    features = extract(part)
                    rows = features.float() if features.dtype == torch.uint8 else features.double()
                    total += rows.sum(0)
                    outer += rows.T @ rows
                    kept += [(features.float() / extract.unit).cpu()] if keep else []
                bar.update(len(images))
        if drawn:
            source.await_others()
        return total, outer, torch.cat(kept)

    total, outer, kept = dist_util.agree(add_up)
    total, outer = (dist_util.sum_over_ranks(x).cpu() for x in (total, outer))
    if not total.isfinite().all():
        raise UserError(f"the features {extract.metadata['features']} are not finite: are its weights damaged?")
    # In place: it may be large.  For pixels the numerator is exact while its integers stay below 2^53, up to 370,000 images.
    sigma = outer.mul_(n).addr_(total, total, alpha=-1).div_(n * (n - 1) * extract.unit**2)
    features = dist_util.gather_rows(kept) if keep else None
    record = {**metadata_of(extract, source.shape, n), **(made or {})}
    if n != len(source):
        record["subset"] = {"of": len(source), "seed": seed}
    return Statistics((total / (n * extract.unit)).numpy(), sigma.numpy(), record, features)


def write_statistics(dest, statistics):
    """npz with float64 `mu` and `sigma`, as pytorch-fid and EDM write them; `metadata` (JSON), and `features` if kept."""
    arrays = {"mu": statistics.mu, "sigma": statistics.sigma, "metadata": json.dumps(statistics.metadata)}
    if statistics.features is not None:
        arrays["features"] = statistics.features.numpy()
    misc.remove_leftovers(Path(dest).parent, Path(dest).name)
    with misc.atomic(dest) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def find(path):
    """The file that a path means: stats/x is stats/x.npz where there is none of that name."""
    return path if Path(path).exists() or not Path(f"{path}.npz").exists() else f"{path}.npz"


def read_statistics(path, features=False):
    """Statistics of a file, ours or of other tools; with `features`, UserError if it holds none."""
    path = find(path)
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder: fid.py --mode gen --img_folder {path} --dest x.npz makes statistics of images")
    held = ""
    try:
        archive = np.load(path, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            held = f": it holds one array {archive.shape}"
        with archive:
            dataset.refuse_bombs(archive.zip)
            held = f": it holds {', '.join(archive.files[:5])}"
            mu, sigma = (archive[name].astype(np.float64, casting="same_kind") for name in ("mu", "sigma"))
            metadata = json.loads(str(archive["metadata"])) if "metadata" in archive else {}
            kept = None
            if features and "features" in archive:
                kept = torch.from_numpy(archive["features"].astype(np.float32, copy=False))
            kinds = {"n": int, "image": list, "subset": dict, "made_by": dict}
            if not all(isinstance(metadata.get(name, kind()), kind) for name, kind in kinds.items()):
                raise ValueError("metadata of another kind")
            dataset.check_record(metadata.get("made_by", {}))
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}: make it with fid.py --mode ref or --mode gen") from error
    except Exception as error:  # damaged zip, pickled arrays, missing names, not numbers
        reason = f"{path} is not a statistics file with `mu` and `sigma`, or it is damaged"
        raise UserError(f"{reason}{held}; fid.py --mode ref or --mode gen makes one") from error
    check_statistics(mu, sigma, kept, path)
    if features and kept is None:
        raise UserError(f"{path} holds no features, which kid and pr need: make it again with --metrics fid,kid,pr")
    return Statistics(mu, sigma, metadata, kept)


def check_statistics(mu, sigma, kept, path):
    """UserError unless statistics are finite, sigma is a covariance, and the features kept, if any, go with them."""
    matching = mu.ndim == 1 and len(mu) and sigma.shape == (len(mu), len(mu))
    small = all((np.abs(x) < 1e50).all() for x in (mu, sigma))  # so that scores are finite; not of NaN
    if not (matching and small):
        raise UserError(f"{path} does not hold finite statistics: mu {mu.shape}, sigma {sigma.shape}")
    if np.abs(sigma - sigma.T).max() > 1e-6 * np.abs(sigma).max():
        raise UserError(f"{path} does not hold a covariance: sigma is not symmetric")
    if scipy.linalg.eigvalsh(sigma)[0] < -1e-4 * sigma.diagonal().max():  # more than rounding, of sums in float32 too
        raise UserError(f"{path} does not hold a covariance: sigma has negative eigenvalues")
    if kept is not None and (kept.ndim != 2 or kept.shape[1] != len(mu) or not kept.isfinite().all()):
        raise UserError(f"{path} does not hold finite features (n, {len(mu)}): {tuple(kept.shape)}")


def check_comparable(reference, dimension, metadata, force=False):
    """UserError unless images with so many features, and this metadata, are of the reference's feature space; a warning where
    nothing is said, of few images, and, with `force`, of all that differs but the number of features.
    """
    theirs = reference.metadata
    for name, one in (("reference", theirs), ("images", metadata)):
        if not one:
            misc.log(f"warning: the statistics of the {name} do not say how they were made: nothing but their size is checked")
        if one.get("features") == "inception" and one.get("n", 2048) < 2048:
            misc.log(f"warning: {one['n']} images ({name}) for 2,048 features: the score is large for that alone")
    names = [k for k in ("features", "weights", "image", "preprocessing", "precision") if k in theirs and k in metadata]
    text = "; ".join(f"{k} {theirs[k]} and {metadata[k]}" for k in names if theirs[k] != metadata[k])
    if dimension != len(reference.mu):
        text = f" ({text})" if text else ": they are of different sizes or feature spaces"
        if theirs.get("image", [])[:1] == [1] and metadata.get("image", [])[:1] == [3]:
            text += "; --img_folder in the place of --stat_path takes grey pictures that were saved as colour for grey ones"
        raise UserError(f"the reference has {len(reference.mu)} features and the images {dimension}{text}")
    if text and not force:
        raise UserError(f"the reference and the images do not compare: {text} (--force compares them all the same)")
    if text:
        misc.log(f"warning: comparing what differs: {text}")


def frechet_distance(a, b):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) of two Statistics: the squared 2-Wasserstein distance of
    Gaussians (FID, arXiv 1706.08500, eq. 6).

    The trace of the root is the sum of the roots of the eigenvalues of sigma1 sigma2.  With sigma1 = P L L^T P^T, the Cholesky
    decomposition with pivots, which singular matrices have too, they are those of the symmetric L^T P^T sigma2 P L.  Values
    within rounding of zero count as zero, since the root of 1e-16 would be 1e-8.  UserError where their sizes differ.
    """
    if len(a.mu) != len(b.mu):
        raise UserError(f"statistics of {len(a.mu)} and of {len(b.mu)} features do not compare")
    factor, pivots, rank, _ = scipy.linalg.lapack.dpstrf(a.sigma, lower=1)
    half, order = np.tril(factor)[:, :rank], pivots - 1
    values = scipy.linalg.eigvalsh(half.T @ b.sigma[np.ix_(order, order)] @ half)
    rounding = 16 * np.finfo(np.float64).eps * np.linalg.norm(a.sigma) * np.linalg.norm(b.sigma)
    root = np.sqrt(values[values > rounding]).sum()
    return max(float(np.square(a.mu - b.mu).sum() + np.trace(a.sigma) + np.trace(b.sigma) - 2 * root), 0.0)


# ------------------------------------------------------------------------------------------------------- scores


def kid(x, y, block=1000):
    """Kernel Inception Distance (arXiv 1801.01401) of features (n, d) and (m, d): an unbiased estimate and its standard error.

    The squared maximum mean discrepancy for the kernel (x.y/d + 1)^3, which may be negative.  Both sets are cut into as many
    blocks, 10 or more, of at most `block` images.  Each is shuffled in its own way, the same in every run: one shuffle for both
    would pair images of the same seeds, and bias the estimate.  UserError for fewer than two images a block.
    """
    blocks = max(10, math.ceil(max(len(x), len(y)) / block))
    if min(len(x), len(y)) < 2 * blocks:
        raise UserError(f"kid needs {2 * blocks} images or more in both sets, and there are {len(x)} and {len(y)}")

    def shuffled(z, seed):
        order = torch.randperm(len(z), generator=torch.Generator().manual_seed(seed)).to(z.device)
        return z[order].double().tensor_split(blocks)

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a):
        k = kernel(a, a)
        return (k.sum() - k.trace()) / (len(a) * (len(a) - 1))

    pairs = zip(shuffled(x, 0), shuffled(y, 1))
    estimates = torch.stack([within(a) + within(b) - 2 * kernel(a, b).mean() for a, b in pairs])
    return float(estimates.mean()), float(estimates.std() / blocks**0.5)


def precision_recall(real, fake, k=3, block=512):
    """Improved precision and recall (arXiv 1904.06991) of features (n, d) and (m, d).

    Precision is the share of fake images within the reach of a real one, recall the reverse; reach is the distance to the k-th
    nearest neighbour in the own set.  UserError unless both sets hold more than k images.
    """
    if min(len(real), len(fake)) <= k:
        raise UserError(f"pr needs more than {k} images in both sets, and there are {len(real)} and {len(fake)}")
    real, fake = real.double(), fake.double()
    slack = 1e-7 * max(real.norm(dim=1).max(), fake.norm(dim=1).max())  # rounding of the distance of equal images
    precise, recalled = torch.zeros(len(fake), dtype=torch.bool, device=fake.device), 0
    with misc.progress(2 * len(real) + len(fake), "precision and recall") as bar:

        def distances(points, others):
            for rows in points.split(block):
                yield torch.cdist(rows, others)
                bar.update(len(rows))

        def reach(x):  # k + 1, since an image itself, at 0, is the nearest
            return torch.cat([d.topk(k + 1, largest=False).values.amax(1) for d in distances(x, x)]) + slack

        reach_fake = reach(fake)
        for d, near in zip(distances(real, fake), reach(real).split(block)):
            precise |= (d <= near[:, None]).any(0)
            recalled += int((d <= reach_fake).any(1).sum())
    return float(precise.double().mean()), recalled / len(real)


def score(reference, images, metrics, device):
    """{name: value} of the scores of two Statistics; kid and pr from their features, on `device`."""
    values = {}
    if metrics != ["fid"]:
        real, fake = reference.features.to(device), images.features.to(device)
    for metric in metrics:
        if metric == "fid":
            values["fid"] = frechet_distance(reference, images)
        elif metric == "kid":
            values["kid"], values["kid_stderr"] = kid(real, fake)
        else:
            values["precision"], values["recall"] = precision_recall(real, fake)
    return values


def show(value, digits=4):
    """So many decimals, and never -0.0000."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


COLUMNS = (
    "mode", "dataset", "step", "solver", "num_steps", "nfe", "eps0", "churn", "s_min", "s_max", "gamma", "FID",
    "kid", "kid_stderr", "precision", "recall", "n", "subset_of", "subset_seed", "start_seed", "end_seed", "class_idx", "eps1",
    "rho", "image", "features", "weights", "forced", "source", "sha256", "ref_path", "reference", "time_grid", "guidance",
    "guide", "raw", "begin", "network_precision",
)  # fmt: skip


def read_table(path):
    """The text of the table `path`, empty if there is none; UserError if it is not one of ours."""
    try:
        text = Path(path).read_text() if Path(path).exists() else ""
    except (OSError, ValueError) as error:  # ValueError: not UTF-8
        raise UserError(f"cannot read --csv {path}: {getattr(error, 'strerror', None) or 'it is not text'}") from error
    if text and text.splitlines()[0] != ",".join(COLUMNS):
        raise UserError(f"--csv {path} has other columns than these rows: name another file")
    return text if text.endswith("\n") or not text else text + "\n"


def table_row(values, metadata, ref_path, forced=False):
    """A row of a table of scores, by COLUMNS; hashes are SHA-256, and what is unknown is left out."""
    made_by, subset = metadata.get("made_by", {}), metadata.get("subset", {})
    mode, data, sampling, speed = (made_by.get("config", {}).get(name, {}) for name in ("task", "data", "sampling", "speed"))
    solver = "sde" if sampling.get("sde") else sampling.get("ode_solver")
    row = {name: metadata.get(name) for name in ("n", "features", "weights", "source")}
    row |= {name: made_by.get(name) for name in ("step", "nfe", "start_seed", "end_seed", "sha256", "guide", "raw")}
    row |= {name: sampling.get(name) for name in ("num_steps", "churn", "s_min", "s_max", "gamma", "class_idx")}
    row |= {name: sampling.get(name) for name in ("rho", "time_grid", "guidance")}
    row |= {"begin": json.dumps(made_by["begin"]) if "begin" in made_by else None, "network_precision": speed.get("precision")}
    row |= {"eps0": sampling.get("eval_eps0"), "eps1": sampling.get("eval_eps1"), "dataset": data.get("data_name")}
    row |= {"mode": mode.get("mode"), "solver": "flow map" if mode.get("mode") == "characteristic" else solver}
    row |= {"subset_of": subset.get("of"), "subset_seed": subset.get("seed"), "forced": forced or None}
    row |= {
        "image": "x".join(map(str, metadata.get("image", []))),
        "ref_path": ref_path,
        "reference": misc.file_hash(find(ref_path)),
    }
    row |= {"FID" if name == "fid" else name: show(value, 4 if name == "fid" else 7) for name, value in values.items()}
    return row


def write_table(path, rows, before=""):
    """Write rows of table_row() to `path`, with a header, or after the text `before` of read_table()."""
    with misc.atomic(path) as temporary, open(temporary, "w", newline="", errors="backslashreplace") as file:
        file.write(before)
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if not before:
            writer.writeheader()
        writer.writerows(rows)


def append_row(path, row):
    """Add a row of table_row() to the table `path`; others that add one at the same time take turns."""
    path = os.path.realpath(path)  # a link stays one
    folder = Path(path).parent
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        write_table(path, [row], read_table(path))
    finally:
        os.close(handle)


def open_source(run, flags, device):
    """(set of images, what the statistics record of its making) of the data set, --img_folder or --checkpoint."""
    if run.mode == "ref":
        data = defaults.resolve(flags).data
        source, name = dataset.load(data), data.data_name + (" test" if data.split == "test" else "")
        if isinstance(source, dataset.ImageFiles):
            name = f"{source.path}, upright central squares resized to {data.image_size} (Lanczos)"
        return source, {"source": name}
    if run.img_folder:
        return dataset.open_images(run.img_folder)
    trained = generator.load_model(run.checkpoint, flags, device, guide=run.guide)
    seeds = range(run.start_seed, run.end_seed + 1)
    return generator.Generated(trained, seeds), {"source": str(run.checkpoint), "made_by": trained.record(seeds)}


def make_statistics(run, flags, metrics, device, reference=None):
    """Statistics of the images that the flags name; every rank measures its share."""
    source, made = dist_util.agree(lambda: open_source(run, flags, device))
    if run.mode != "ref" and run.checkpoint:
        generator.check_same_on_all_ranks(run.checkpoint, made["made_by"]["sha256"])
    shape = dist_util.agree(lambda: source.shape)
    if reference and reference.metadata.get("image") == [1, *shape[1:]] and shape[0] == 3 and run.img_folder and not run.force:
        source = dataset.Grey(source)  # many tools write grey images as RGB
    n = run.num or len(source)  # what does not compare is refused before the work, not after it
    extract = extractor(reference, source.shape, n, device, run, run.features, run.force)
    workers = defaults.resolve({"num_workers": flags.get("num_workers", WORKERS)}).data.num_workers
    return measure(source, extract, made, run.num, run.seed, metrics != ["fid"], workers)


def check(run, flags):
    """The metrics asked for; UserError where flags are missing or do not go together."""
    metrics = run.metrics.split(",")
    if not set(metrics) <= {"fid", "kid", "pr"} or len(set(metrics)) < len(metrics):
        raise UserError(f"--metrics is {run.metrics}: it takes some of fid,kid,pr, each once, with commas and no spaces")
    sources = {"ref": (), "gen": ("img_folder", "checkpoint"), "fid": ("stat_path", "img_folder", "checkpoint")}[run.mode]
    takes = ("ref_path", "csv", "force", *sources) if run.mode == "fid" else ("dest", *sources)
    given = [f.name for f in fields(defaults.FidRun) if getattr(run, f.name) != f.default] + list(flags)
    places = ("dest", "ref_path", "stat_path", "img_folder", "checkpoint", "csv", "force")
    drawing = ("start_seed", "end_seed", "guide", *(f.name for f in fields(defaults.Network) + fields(defaults.Sampling)))
    reading = [f.name for f in fields(defaults.Data) if f.name not in ("data_name", "num_workers")]

    def refuse(names, why):
        for name in given:
            if name in names:
                raise UserError(f"--{name} {why}")

    refuse(set(places) - set(takes), f"is not for --mode {run.mode}: leave it out, or choose another --mode")
    defaults.required(run, takes[0])
    if sources and sum(name in given for name in sources) != 1:
        raise UserError(f"--mode {run.mode} takes one of {', '.join(f'--{name}' for name in sources)}")
    if run.checkpoint:
        generator.check_seeds(run.start_seed, run.end_seed)
    else:
        refuse(drawing, "is for images drawn with --checkpoint: leave it out")
    if not run.checkpoint and run.mode != "ref":
        refuse(reading, "is for --mode ref: images are scored as they are; leave it out")
    if run.mode == "ref":
        refuse(("flip",), "is for training: the reference is the images as they are; leave it out")
    if run.stat_path:
        refuse(("num", "features"), "is for images: --stat_path is what --mode gen made of them already")
    theirs = (run.img_folder, os.path.join(run.img_folder, "images.npz")) if run.dest and run.img_folder else ()
    if any(Path(run.dest).resolve() == Path(path).resolve() for path in theirs):
        raise UserError(f"--dest {run.dest} is the file of the images: name another")
    if run.num is None:
        refuse(("seed",), "is that of the subset of --num images: add --num, or leave it out")
    elif run.num < 2:
        raise UserError(f"--num is {run.num}: a covariance needs two images or more")
    return metrics


def main():
    run, flags = defaults.parse("fid", description=__doc__)
    metrics = check(run, flags)

    def read(path):  # features stay on the first rank, which computes the scores
        return dist_util.agree(lambda: read_statistics(path, metrics != ["fid"] and dist_util.rank() == 0))

    with dist_util.session() as device:
        written = run.csv if run.mode == "fid" else run.dest
        dist_util.on_first_rank(lambda: written and misc.check_writable(written))
        dist_util.on_first_rank(lambda: run.csv and read_table(run.csv))
        reference = read(run.ref_path) if run.mode == "fid" else None
        if run.stat_path:
            images = read(run.stat_path)
            check_comparable(reference, len(images.mu), images.metadata, run.force)
        else:
            images = make_statistics(run, flags, metrics, device, reference)
        if run.mode != "fid":
            dist_util.on_first_rank(lambda: write_statistics(run.dest, images))
    if dist_util.rank() == 0:  # alone: precision of large sets can take longer than ranks wait for each other
        report(run, metrics, reference, images, device)


def report(run, metrics, reference, images, device):
    """Print the scores, and append them to --csv; or print where the statistics are."""
    if run.mode != "fid":
        print(run.dest)
        return
    values = score(reference, images, metrics, device)
    print("\n".join(show(value) if len(values) == 1 else f"{name} {show(value)}" for name, value in values.items()), flush=True)
    if "n" in images.metadata:
        misc.log(f"of {images.metadata['n']:,} images: compare it with scores of as many alone, as fewer score worse")
    if run.csv:
        append_row(run.csv, table_row(values, images.metadata, run.ref_path, run.force))
    if "kid" in values:  # four decimals are few for it
        misc.log(f"1000 kid = {1000 * values['kid']:.4f}, standard error {1000 * values['kid_stderr']:.4f}")


if __name__ == "__main__":
    dist_util.launch(main)
