"""Draw ODE against flow map: same seeds, 1, 2, 5, 10 and 20 steps, side by side; with --ref_path, their FID curves.

  python compare.py --denoiser CKPT --characteristic CKPT --dest compare.png
  python compare.py --denoiser CKPT --characteristic CKPT --dest compare.png --ref_path stats/digits.npz --end_seed 1799

The picture's rows are seeds, its two blocks the denoiser's ODE and the flow map.  The curves go to compare-fid.png and
compare-fid.csv, beside the picture; the features are those of --ref_path, pixels or Inception's.
"""

import dist_util
from dist_util import UserError

from pathlib import Path

import torch

import dataset
import defaults
import fid
import generator
import misc


def title(trained):
    sampling = trained.config.sampling
    return "flow map" if trained.is_flow_map else "denoiser, SDE" if sampling.sde else f"denoiser, ODE ({sampling.ode_solver})"


def draw_images(models, run):
    """The picture: rows are seeds, columns numbers of evaluations, a block for each model."""
    rows, columns = run.nsampling, len(run.num_steps)
    figure, axes = misc.new_figure(2, max(1.4 * columns, 3) + 1, 0.62 * rows + 0.7)
    for ax, trained in zip(axes, models.values()):
        blocks = [trained.sampled(num_steps=steps).images(range(rows)) for steps in run.num_steps]
        evaluations = [generator.nfe(trained.sampled(num_steps=steps).config) for steps in run.num_steps]
        picture, cell = misc.tile(torch.stack(blocks, 1).flatten(0, 1), columns)
        ax.imshow(picture.permute(1, 2, 0))
        ax.set(title=title(trained), xlabel="network evaluations", ylabel="seed")
        ax.set_xticks([(i + 0.5) * cell for i in range(columns)], evaluations)
        ax.set_yticks([(i + 0.5) * cell for i in range(rows)], range(rows))
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    misc.write_figure(run.dest, figure)


def find_images(folder, record):
    """The images in a folder and how they were made; UserError unless its eval.json agrees with `record`."""
    images, metadata = dataset.open_images(folder)
    different = generator.differences(record, metadata["made_by"])
    if different:
        raise UserError(f"{folder} was made with other {', '.join(different)}: make it again")
    return images, metadata


def score(models, run, device, num_workers):
    """The rows of the curves' table, as fid.py --csv writes them."""
    reference, seeds, rows = fid.read_statistics(run.ref_path), range(run.end_seed + 1), []
    extract = fid.extractor(reference, models["denoiser"].mean.shape, len(seeds), device, run)
    for mode, trained in models.items():
        for steps in run.num_steps:
            model = trained.sampled(num_steps=steps)
            images, made = generator.Generated(model, seeds), {"source": str(model.path), "made_by": model.record(seeds)}
            if run.images is not None:
                images, made = find_images(Path(run.images) / f"{mode}-{steps}", made["made_by"])
            found = fid.measure(images, extract, made, num_workers=num_workers)
            rows.append(fid.table_row({"fid": fid.frechet_distance(reference, found)}, found.metadata, run.ref_path))
    if len({(row["n"], row["start_seed"], row["end_seed"]) for row in rows}) > 1:
        raise UserError(f"the folders in {run.images} hold images of different seeds: make them with the same")
    return rows


def curve_files(run):
    """The picture and the table of the curves."""
    stem = Path(run.dest).with_suffix("")
    return f"{stem}-fid.png", f"{stem}-fid.csv"


def draw_curves(rows, models, run):
    """The FID of both models against evaluations, in curve_files()."""
    picture, table = curve_files(run)
    fid.write_table(table, rows)
    figure, (ax,) = misc.new_figure(1, 5, 3.5)
    for mode, trained in models.items():
        nfe, scores = zip(*((row["nfe"], float(row["FID"])) for row in rows if row["mode"] == mode))
        ax.plot(nfe, scores, "o-", label=title(trained))
    kind = "pixel FID" if rows[0]["features"] == "pixels" else "FID"
    ax.set(xlabel="network evaluations", ylabel=f"{kind}, {rows[0]['n']} images")
    ax.set_yscale("log", subs=[2, 5])
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("{x:g}")
    ax.set_xscale("log", subs=[])
    ticks = sorted({row["nfe"] for row in rows})
    ax.set_xticks(ticks, ticks)
    ax.legend()
    misc.write_figure(picture, figure)


def main():
    run, flags = defaults.parse("compare", description=__doc__)
    defaults.required(run, "denoiser", "characteristic")
    if not run.num_steps or not 1 <= min(run.num_steps) <= max(run.num_steps) <= 4096:
        raise UserError("--num_steps takes numbers from 1 to 4096")
    if not 1 <= run.nsampling <= 1000 or run.end_seed < 1:
        raise UserError("--nsampling is from 1 to 1000, and --end_seed at least 1")
    generator.check_seeds(0, run.end_seed)
    if run.images and not run.ref_path:
        raise UserError("--images is for the curves: add --ref_path, or leave it out")
    misc.check_writable(run.dest)
    for path in curve_files(run) if run.ref_path else ():
        misc.check_writable(path)
    with dist_util.session() as device:
        if dist_util.world_size() > 1:
            raise UserError("compare.py runs with python, not with torchrun; torchrun eval.py can make --images")
        models, of_its_ode = {}, (*generator.OF_DENOISERS, "time_grid", "rho")  # a flow map is drawn on even times
        for mode in ("denoiser", "characteristic"):
            takes = {k: v for k, v in flags.items() if mode == "denoiser" or k not in of_its_ode}
            models[mode] = generator.load_model(getattr(run, mode), takes, device)
            if models[mode].config.task.mode != mode:
                raise UserError(f"--{mode} {getattr(run, mode)} is a checkpoint of mode {models[mode].config.task.mode}")
        if models["denoiser"].mean.shape != models["characteristic"].mean.shape:
            raise UserError("the two checkpoints make images of different shapes")
        rows = score(models, run, device, flags.get("num_workers", fid.WORKERS)) if run.ref_path else []
        draw_images(models, run)
        if rows:
            draw_curves(rows, models, run)
        print("\n".join([run.dest, *(curve_files(run) if rows else [])]))


if __name__ == "__main__":
    dist_util.launch(main)
