"""Draw a grid of images from a checkpoint; with --trajectory, the path of each from noise to data.

python teaser.py --mode characteristic --checkpoint CKPT --num_steps 1
python teaser.py --mode denoiser --checkpoint CKPT --num_steps 20 --trajectory

With --interpolate, the way from one seed to another, or between two images of a file of eval.py --encode:

python teaser.py --checkpoint CKPT --interpolate 3 8
python teaser.py --checkpoint CKPT --interpolate 0 5 --latents OUT/latents.npz
"""

import dist_util
from dist_util import UserError

from pathlib import Path

import torch

import dataset
import defaults
import generator
import misc
import sde

PLAIN = defaults.TeaserRun()  # what flags are when they are left out


def check_interpolation(run):
    """UserError where the flags of --interpolate do not go together."""
    if run.interpolate is None:
        if run.latents is not None:
            raise UserError("--latents is for --interpolate: add it, with the numbers of two images")
        return
    shown = " ".join(map(str, run.interpolate))
    if len(run.interpolate) != 2:
        raise UserError(f"--interpolate {shown}: it takes two numbers, such as --interpolate 3 8")
    for name in ("start_seed", "nsampling", "trajectory", "per_class"):
        if getattr(run, name) != getattr(PLAIN, name):
            raise UserError(f"--{name} is not for --interpolate, which draws a row of --columns images: leave it out")
    if run.columns == 1:
        raise UserError("--columns is 1: --interpolate draws 2 images or more")
    if run.latents is None and not 0 <= min(run.interpolate) <= max(run.interpolate) < 2**32:
        raise UserError(f"--interpolate {shown}: seeds run from 0, each below 2^32")


def interpolate(trained, run):
    """uint8 images (--columns, C, H, W) on the arc between two latents, those of two seeds or of two images of --latents."""
    ends, label = list(run.interpolate), None
    if run.latents is None:
        latents = trained.latents(ends)
        if trained.config.network.label_dim and trained.config.sampling.class_idx < 0:
            raise UserError("--interpolate between seeds needs one class for all: add --class_idx")
    else:
        held = generator.open_latents(trained, run.latents)[0].items
        if not 0 <= min(ends) <= max(ends) < len(held):
            shown = " ".join(map(str, ends))
            raise UserError(f"--interpolate {shown}: the latents in {run.latents} are numbered from 0 to {len(held) - 1}")
        latents, labels = held.batch(ends)
        if trained.config.network.label_dim and len(labels.unique()) > 1:
            raise UserError(
                f"--interpolate: the two images have classes {' and '.join(map(str, labels.tolist()))}: add --class_idx"
            )
        label = labels[:1]
    share = torch.linspace(0, 1, run.columns or 11, dtype=torch.float64)
    return trained.decode(sde.slerp(latents[:1], latents[1:], share), None if label is None else label.expand(len(share)))


def draw_classes(path, trained, run):
    """A row for each class, with its name: the images of the same seeds."""
    count, names, columns = trained.config.network.label_dim, trained.config.data.class_names, run.columns or 10
    names = [name.encode(errors="replace").decode() for name in names]  # of folders, which need not be text
    if not count or run.trajectory or run.nsampling != PLAIN.nsampling or trained.config.sampling.class_idx >= 0:
        raise UserError("--per_class is for a conditional model, without --trajectory, --nsampling and --class_idx")
    seeds = range(run.start_seed, run.start_seed + columns)
    picture, cell = misc.tile(torch.cat([trained.sampled(class_idx=i).images(seeds) for i in range(count)]), columns)
    figure, (ax,) = misc.new_figure(1, 0.6 * columns + 1, 0.6 * count + 0.2)
    ax.imshow(picture.permute(1, 2, 0))
    ax.set_yticks([(i + 0.5) * cell for i in range(count)], names if len(names) == count else range(count))
    for label in ax.get_yticklabels():
        label.set_parse_math(False)
    ax.set_xticks([])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    misc.write_figure(path, figure)


def main():
    run, flags = defaults.parse("teaser", description=__doc__)
    defaults.required(run, "checkpoint")
    for name, least in (("nsampling", 1), ("columns", 0)):
        if not least <= getattr(run, name) <= 2**16:
            raise UserError(f"--{name} is {getattr(run, name)}: it must be from {least} to {2**16}")
    if run.trajectory and run.columns:
        raise UserError("--columns is not for --trajectory, whose columns are times: leave it out")
    check_interpolation(run)
    seeds = range(run.start_seed, run.start_seed + run.nsampling)
    generator.check_seeds(seeds[0], seeds[-1])
    with dist_util.session() as device:
        if dist_util.world_size() > 1:
            raise UserError("teaser.py draws one picture: run it with python, not with torchrun")
        trained = generator.load_model(run.checkpoint, flags, device, guide=run.guide)
        dest = Path(run.dest or Path(run.checkpoint).parent / f"teaser-{trained.config.task.mode}.png")
        misc.check_writable(dest)
        if run.interpolate is not None:
            images = interpolate(trained, run)
            misc.write_grid(dest, images, columns=len(images))
        elif run.per_class:
            draw_classes(dest, trained, run)
        elif run.trajectory:
            states = [dataset.to_uint8(x, trained.config.data.centered) for x in generator.solve(trained, seeds)]
            shown = torch.linspace(0, len(states) - 1, min(len(states), 11)).round().long().tolist()
            images = torch.stack([states[i] for i in shown], dim=1).flatten(0, 1)  # rows: seeds, columns: times
            misc.write_grid(dest, images, columns=len(shown))
        else:
            misc.write_grid(dest, trained.images(seeds), columns=run.columns or round(run.nsampling**0.5))
        print(dest)


if __name__ == "__main__":
    dist_util.launch(main)
