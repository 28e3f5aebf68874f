"""Score images: Fréchet distances between statistics of sets of images.

  python fid.py --mode ref --data_name digits --dest stats/digits.npz              statistics of a data set
  python fid.py --mode gen --img_folder OUT --dest stats/out.npz                   statistics of images, from eval.py or not
  python fid.py --mode fid --ref_path stats/digits.npz --stat_path stats/out.npz   their distance, one number on stdout
  python fid.py --mode fid --ref_path stats/digits.npz --img_folder OUT            the last two in one

Features are the raw pixels in [0, 1], so the number is a "pixel FID", comparable neither with the FID of Inception features
nor across image sizes.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import defaults
import dist_util
import misc
from defaults import setting
from dist_util import UserError


@dataclass(frozen=True)
class Run:
    """scoring"""

    mode: str = setting(
        "fid", "ref: statistics of --data_name; gen: of --img_folder; fid: distance to --ref_path", ("ref", "gen", "fid")
    )
    dest: str | None = setting(None, "npz file for the statistics (ref, gen)")
    img_folder: str | None = setting(None, "folder or zip of images, flat or in class folders (gen, fid)")
    ref_path: str | None = setting(None, "npz file with the reference's statistics (fid)")
    stat_path: str | None = setting(None, "npz file with the images' statistics (fid; or --img_folder)")
    csv: str | None = setting(None, "file to append the score and how the images were made to, as a row (fid)")


COLUMNS = (
    "mode", "dataset", "step", "solver", "num_steps", "nfe", "eps0", "churn", "s_min", "s_max", "gamma", "FID",
    "n", "start_seed", "end_seed", "class_idx", "eps1", "rho", "features", "reference", "sha256",
)  # fmt: skip


def append_row(path, value, n, made_by, reference):
    """One line of `path`, with a header if it is new; hashes are SHA-256.  What is unknown of others' images stays empty."""
    config = made_by.get("config", {})
    mode, data, sampling = (config.get(name, {}) for name in ("task", "data", "sampling"))
    mode = mode.get("mode")
    solver = "flow map" if mode == "characteristic" else "sde" if sampling.get("sde") else sampling.get("ode_solver")
    row = {
        "mode": mode, "dataset": data.get("data_name"), "step": made_by.get("step"), "solver": solver,
        "num_steps": sampling.get("num_steps"), "nfe": made_by.get("nfe"), "eps0": sampling.get("eval_eps0"),
        **{name: sampling.get(name) for name in ("churn", "s_min", "s_max", "gamma")},
        "FID": f"{value:.4f}", "n": n, "start_seed": made_by.get("start_seed"), "end_seed": made_by.get("end_seed"),
        "class_idx": sampling.get("class_idx"), "eps1": sampling.get("eval_eps1"), "rho": sampling.get("rho"),
        "features": "pixels", "reference": misc.file_hash(reference), "sha256": made_by.get("sha256"),
    }  # fmt: skip
    path = Path(path)
    if path.is_dir():
        raise UserError(f"--csv {path} is a folder: name a file")
    old = path.read_text() if path.exists() else ""
    with misc.atomic(path) as temporary, open(temporary, "w", newline="") as file:
        file.write(old)
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if not old:
            writer.writeheader()
        writer.writerow(row)


def make_statistics(run, data):
    if run.mode == "gen":
        n, mu, sigma, metadata = misc.folder_statistics(run.img_folder)
    else:
        dataset = dist_util.agree(lambda: misc.load_data(data))
        n, mu, sigma = misc.statistics(dataset)
        metadata = {"source": data.data_name}
    dist_util.on_first_rank(lambda: misc.write_statistics(run.dest, n, mu, sigma, metadata))
    return run.dest


def score(run):
    mu_ref, sigma_ref, _ = dist_util.agree(lambda: misc.read_statistics(run.ref_path))
    if run.img_folder:
        n, mu, sigma, metadata = misc.folder_statistics(run.img_folder)
    else:
        mu, sigma, metadata = dist_util.agree(lambda: misc.read_statistics(run.stat_path))
        n = metadata.get("n")
    if mu.shape != mu_ref.shape:
        raise UserError(
            f"the reference has {len(mu_ref)} features and the images {len(mu)}: they are of different sizes or spaces"
        )
    value = misc.frechet_distance(mu_ref, sigma_ref, mu, sigma)
    if run.csv:
        dist_util.on_first_rank(lambda: append_row(run.csv, value, n, metadata.get("made_by", {}), run.ref_path))
    return f"{value:.4f}"


def main():
    run, flags = defaults.parse(Run, ["data"], description=__doc__)
    if run.mode == "fid":
        defaults.required(run, "ref_path")
        if (run.stat_path is None) == (run.img_folder is None):
            raise UserError("--mode fid takes one of --stat_path and --img_folder")
    else:
        defaults.required(run, *(["dest", "img_folder"] if run.mode == "gen" else ["dest"]))
    config = defaults.resolve(flags)
    with dist_util.session():
        result = score(run) if run.mode == "fid" else make_statistics(run, config.data)
        if dist_util.rank() == 0:
            print(result)


if __name__ == "__main__":
    dist_util.launch(main)
