"""Score images: Fréchet distance, KID, precision and recall between two sets of images.

  python fid.py --mode ref --data_name digits --dest stats/digits.npz              statistics of a data set
  python fid.py --mode gen --img_folder OUT --dest stats/out.npz                   of images: a folder, a zip, an npz
  python fid.py --mode gen --checkpoint CKPT --end_seed 9999 --dest stats/out.npz  of a model's images, without files
  python fid.py --mode fid --ref_path stats/digits.npz --stat_path stats/out.npz   their distance, one number on stdout
  python fid.py --mode fid --ref_path stats/digits.npz --img_folder OUT            the last two in one (or --checkpoint)

Features are raw pixels for grey images, which makes a "pixel FID", and those of FID's InceptionV3 for colour;
--features chooses otherwise.  Neither compares with the other, nor pixels across image sizes.
"""

import csv
import math
from dataclasses import dataclass, fields
from pathlib import Path

import torch

import defaults
import dist_util
import misc
from defaults import setting
from dist_util import UserError

METRICS = ("fid", "kid", "pr")


@dataclass(frozen=True)
class Run:
    """scoring"""

    mode: str = setting(
        "fid", "ref: statistics of --data_name; gen: of images; fid: scores of images against --ref_path", ("ref", "gen", "fid")
    )
    dest: str | None = setting(None, "npz file for the statistics (ref, gen)")
    img_folder: str | None = setting(
        None, "images (gen, fid): a folder or zip, flat or in class folders, or an npz with uint8 `arr_0` (N, H, W, C)"
    )
    checkpoint: str | None = setting(
        None, "instead of --img_folder, the model to draw images from: those that eval.py writes with the same flags"
    )
    start_seed: int = setting(0, "with --checkpoint: first seed")
    end_seed: int = setting(49999, "with --checkpoint: last seed, included")
    stat_path: str | None = setting(None, "instead of --img_folder, the npz file that --mode gen made of them (fid)")
    ref_path: str | None = setting(None, "npz file with the reference's statistics (fid)")
    features: str = setting(
        "auto",
        "pixels in [0, 1], or 2,048 of FID's InceptionV3; auto: those of --ref_path, else pixels for grey and inception "
        "for colour",
        ("auto", "pixels", "inception"),
    )
    metrics: str = setting(
        "fid",
        "which scores, with commas and each once: fid; kid (and its standard error); pr (improved precision and recall, "
        "k = 3). The last two need --metrics in ref and gen too, which then store every image's features (inception: 8 kB)",
    )
    num: int | None = setting(
        None, "number of images to take, a subset drawn from --seed; under torchrun write `torchrun ... -- fid.py ... --num N`"
    )
    seed: int = setting(0, "of the subset")
    force: bool = setting(False, "compare statistics that say they were made differently")
    csv: str | None = setting(None, "file to append the scores and how the images were made to, as a row (fid)")
    inception_weights: str | None = setting(
        None, f"file of the InceptionV3's weights; weights/{misc.WEIGHTS['inception_weights'][0]} if left out"
    )
    download: bool = setting(False, "fetch the weights where they are published, if their file is missing")


# ------------------------------------------------------------------------------------------------------- scores


def kid(x, y, block=1000):
    """Kernel Inception Distance (arXiv 1801.01401) of features (n, d) and (m, d): an unbiased estimate and its standard error.

    The squared maximum mean discrepancy for the kernel (x.y/d + 1)^3, unbiased, so that it may be negative.  Both sets are
    shuffled, each in its own way (the same in every run), and cut into as many blocks, 10 or more, of at most `block` images;
    estimates of different blocks are independent, so their mean has a standard error.  One shuffle for both would pair images
    that correspond, such as those of the same seeds, and bias the estimate.  UserError for fewer than two images a block.
    """
    blocks = max(10, math.ceil(max(len(x), len(y)) / block))
    if min(len(x), len(y)) < 2 * blocks:
        raise UserError(f"kid needs {2 * blocks} images or more in both sets, and there are {len(x)} and {len(y)}")

    def shuffled(z, seed):
        order = torch.randperm(len(z), generator=torch.Generator().manual_seed(seed)).to(z.device)
        return z[order].tensor_split(blocks)

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a):
        k = kernel(a, a)
        return (k.sum() - k.trace()) / (len(a) * (len(a) - 1))

    estimates = []
    with misc.progress(blocks, "kid", unit="block") as bar:
        for a, b in zip(shuffled(x, 0), shuffled(y, 1)):
            a, b = a.double(), b.double()
            estimates.append(within(a) + within(b) - 2 * kernel(a, b).mean())
            bar.update()
    estimates = torch.stack(estimates)
    return float(estimates.mean()), float(estimates.std() / blocks**0.5)


def precision_recall(real, fake, k=3, block=2000):
    """Improved precision and recall (arXiv 1904.06991) of features (n, d) and (m, d).

    Precision is the share of fake images within the reach of a real one, recall that of real ones within the reach of a
    fake one; the reach of an image is the distance to its k-th nearest neighbour in its own set.  UserError unless both sets
    hold more than k images.
    """
    if min(len(real), len(fake)) <= k:
        raise UserError(f"pr needs more than {k} images in both sets, and there are {len(real)} and {len(fake)}")
    slack = 1e-7 * float(max(real.norm(dim=1).max(), fake.norm(dim=1).max()))  # rounding of the distance of equal images

    def distances(rows, others):
        for start, other in zip(range(0, len(others), block), others.split(block)):
            yield slice(start, start + len(other)), torch.cdist(rows.double(), other.double())

    with misc.progress(2 * len(real) + len(fake), "precision and recall") as bar:

        def reach(x):
            found = []
            for rows in x.split(block):
                nearest = torch.empty(len(rows), 0, dtype=torch.float64, device=x.device)
                for _, d in distances(rows, x):  # the image itself, at 0, among them
                    nearest = torch.cat([nearest, d], 1)
                    nearest = nearest.topk(min(k + 1, nearest.shape[1]), largest=False).values
                found.append(nearest.amax(1) + slack)
                bar.update(len(rows))
            return torch.cat(found)

        reach_real, reach_fake = reach(real), reach(fake)
        precise, recalled = (torch.zeros(len(x), dtype=torch.bool, device=x.device) for x in (fake, real))
        for start, rows in zip(range(0, len(real), block), real.split(block)):
            mine = slice(start, start + len(rows))
            for other, d in distances(rows, fake):
                precise[other] |= (d <= reach_real[mine, None]).any(0)
                recalled[mine] |= (d <= reach_fake[other]).any(1)
            bar.update(len(rows))
    return float(precise.double().mean()), float(recalled.double().mean())


def score(reference, images, metrics, device):
    """{name: value} of the scores of two Statistics; kid and pr from their features, on `device`."""
    values = {}
    if {"kid", "pr"} & set(metrics):
        real, fake = reference.features.to(device), images.features.to(device)
    for metric in metrics:
        if metric == "fid":
            values["fid"] = misc.frechet_distance(reference, images)
        elif metric == "kid":
            values["kid"], values["kid_stderr"] = kid(real, fake)
        else:
            values["precision"], values["recall"] = precision_recall(real, fake)
    return values


def show(value, digits=4):
    """So many decimals, and never -0.0000."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


# -------------------------------------------------------------------------------------------------------- table

COLUMNS = (
    "mode", "dataset", "step", "solver", "num_steps", "nfe", "eps0", "churn", "s_min", "s_max", "gamma", "FID",
    "kid", "kid_stderr", "precision", "recall", "n", "subset_of", "subset_seed", "start_seed", "end_seed", "class_idx", "eps1",
    "rho", "image", "features", "weights", "forced", "source", "sha256", "ref_path", "reference",
)  # fmt: skip


def read_table(path):
    """The text of the table `path`, empty if there is none; UserError if it is not one of ours."""
    try:
        text = Path(path).read_text() if Path(path).exists() else ""
    except (OSError, ValueError) as error:  # ValueError: not UTF-8
        raise UserError(f"cannot read --csv {path}: {getattr(error, 'strerror', None) or 'it is not text'}") from error
    if text and text.splitlines()[0] != ",".join(COLUMNS):
        raise UserError(f"--csv {path} has other columns than these rows: name another file")
    return text


def append_row(path, values, metadata, ref_path, forced):
    """One line of `path`, with a header if it is new; hashes are SHA-256: of the Inception's weights, of the checkpoint, of the
    reference's file.  What is unknown of others' images stays empty.
    """
    made_by = metadata.get("made_by", {})
    config = made_by.get("config", {})
    mode, data, sampling = (config.get(name, {}) for name in ("task", "data", "sampling"))
    mode = mode.get("mode")
    solver = "flow map" if mode == "characteristic" else "sde" if sampling.get("sde") else sampling.get("ode_solver")
    subset = metadata.get("subset", {})
    shown = {"FID" if name == "fid" else name: show(value, 4 if name == "fid" else 7) for name, value in values.items()}
    row = {
        "mode": mode, "dataset": data.get("data_name"), "step": made_by.get("step"), "solver": solver,
        "num_steps": sampling.get("num_steps"), "nfe": made_by.get("nfe"), "eps0": sampling.get("eval_eps0"),
        **{name: sampling.get(name) for name in ("churn", "s_min", "s_max", "gamma")},
        **shown, "n": metadata.get("n"), "subset_of": subset.get("of"), "subset_seed": subset.get("seed"),
        "start_seed": made_by.get("start_seed"), "end_seed": made_by.get("end_seed"),
        "class_idx": sampling.get("class_idx"), "eps1": sampling.get("eval_eps1"), "rho": sampling.get("rho"),
        "image": "x".join(map(str, metadata.get("image", []))), "features": metadata.get("features"),
        "weights": metadata.get("weights"), "forced": forced or None, "source": metadata.get("source"),
        "sha256": made_by.get("sha256"), "ref_path": ref_path, "reference": misc.file_hash(ref_path),
    }  # fmt: skip
    old = read_table(path)
    with misc.atomic(path) as temporary, open(temporary, "w", newline="") as file:
        file.write(old)
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if not old:
            writer.writeheader()
        writer.writerow(row)


# ---------------------------------------------------------------------------------------------------- the three modes


def open_source(run, flags, device):
    """(set of images, what the statistics record of its making) of the data set, --img_folder or --checkpoint."""
    if run.mode == "ref":
        data = defaults.resolve(flags).data
        source = misc.load_data(data)
        made = {"source": data.data_name}
        if isinstance(source, misc.ImageFiles):
            made["source"] = f"{source.path}, central squares resized to {data.image_size} (Lanczos)"
        return source, made
    if run.img_folder:
        return misc.open_images(run.img_folder)
    trained = misc.load_model(run.checkpoint, flags, device)
    seeds = range(run.start_seed, run.end_seed + 1)
    return misc.Generated(trained, seeds), {"source": str(run.checkpoint), "made_by": trained.record(seeds)}


def make_statistics(run, flags, metrics, device, reference=None):
    """Statistics of the images that the flags name; every rank measures its share."""
    source, made = dist_util.agree(lambda: open_source(run, flags, device))
    shape = dist_util.agree(lambda: source.shape)
    features = misc.choose_features(run.features, shape[0], reference)
    extract = misc.load_features(features, device, run.inception_weights, run.download)
    if reference is not None:  # before the work, not after it
        n = run.num or len(source)
        misc.check_comparable(reference, extract.dimension(shape), misc.metadata_of(extract, shape, n), run.force)
    workers = defaults.resolve({k: flags[k] for k in ("data_name", "num_workers") if k in flags}).data.num_workers
    keep = bool({"kid", "pr"} & set(metrics))
    return misc.measure(source, extract, made, run.num, run.seed, keep, workers)


def check(run, flags):
    """The metrics asked for; UserError where flags are missing or do not go together."""
    metrics = run.metrics.split(",")
    if not set(metrics) <= set(METRICS) or len(set(metrics)) < len(metrics):
        raise UserError(
            f"--metrics is {run.metrics}: it takes some of {','.join(METRICS)}, each once, with commas and no spaces"
        )
    sources = ("checkpoint", "img_folder", "stat_path")[: {"ref": 0, "gen": 2, "fid": 3}[run.mode]]
    takes = {"ref": ["dest"], "gen": ["dest", *sources], "fid": ["ref_path", "csv", *sources]}[run.mode]
    for name in ("dest", "ref_path", "stat_path", "img_folder", "checkpoint", "csv"):
        if getattr(run, name) is not None and name not in takes:
            raise UserError(f"--{name} is not for --mode {run.mode}: leave it out, or choose another --mode")
    if run.force and run.mode != "fid":
        raise UserError("--force is for --mode fid, which compares: leave it out")
    defaults.required(run, takes[0])
    if sources and sum(getattr(run, name) is not None for name in sources) != 1:
        raise UserError(f"--mode {run.mode} takes one of {', '.join(f'--{name}' for name in sources[::-1])}")
    if run.checkpoint is None:
        given = [f.name for f in fields(defaults.Network) + fields(defaults.Sampling) if f.name in flags]
        given += [name for name in ("start_seed", "end_seed") if getattr(run, name) != getattr(Run, name)]
        if given:
            raise UserError(f"--{given[0]} is for images drawn with --checkpoint: leave it out")
        given = [f.name for f in fields(defaults.Data) if f.name in flags and f.name not in ("data_name", "num_workers")]
        if given and run.mode != "ref":
            raise UserError(f"--{given[0]} is for --mode ref: images are scored as they are; leave it out")
    else:
        misc.check_seeds(run.start_seed, run.end_seed)
    if run.stat_path and (run.num is not None or run.features != "auto"):
        raise UserError("--num and --features are for images: --stat_path is what --mode gen made of them already")
    if run.num is not None and run.num < 2:
        raise UserError(f"--num is {run.num}: a covariance needs two images or more")
    if run.num is None and run.seed != Run.seed:
        raise UserError("--seed is that of the subset of --num images: add --num, or leave it out")
    return metrics


def main():
    run, flags = defaults.parse(
        Run, ["data", "network", "sampling"], description=__doc__, source="the checkpoint's, or by preset"
    )
    metrics = check(run, flags)
    needs_features = bool({"kid", "pr"} & set(metrics))

    def read(path):  # features stay on the first rank, which computes the scores
        return dist_util.agree(lambda: misc.read_statistics(path, needs_features and dist_util.rank() == 0))

    def report(reference, images):
        values = score(reference, images, metrics, device)
        single = len(values) == 1
        print("\n".join(show(value) if single else f"{name} {show(value)}" for name, value in values.items()), flush=True)
        if run.csv:
            append_row(run.csv, values, images.metadata, run.ref_path, run.force)
        if "kid" in values:  # four decimals are few for it
            misc.log(f"1000 kid = {1000 * values['kid']:.4f}, standard error {1000 * values['kid_stderr']:.4f}")

    with dist_util.session() as device:
        written = run.csv if run.mode == "fid" else run.dest
        dist_util.on_first_rank(lambda: written and misc.check_writable(written))
        dist_util.on_first_rank(lambda: run.csv and read_table(run.csv))
        if run.mode == "fid":
            reference = read(run.ref_path)
            if run.stat_path:
                images = read(run.stat_path)
                misc.check_comparable(reference, len(images.mu), images.metadata, run.force)
            else:
                images = make_statistics(run, flags, metrics, device, reference)
        else:
            statistics = make_statistics(run, flags, metrics, device)
            dist_util.on_first_rank(lambda: misc.write_statistics(run.dest, statistics))
    if dist_util.rank() == 0:  # alone: precision of large sets can take longer than ranks wait for each other
        if run.mode == "fid":
            report(reference, images)
        else:
            print(run.dest)


if __name__ == "__main__":
    dist_util.launch(main)
