"""Draw a grid of images from a checkpoint; with --trajectory, the path of each from noise to data.

python teaser.py --mode characteristic --checkpoint CKPT --num_steps 1
python teaser.py --mode denoiser --checkpoint CKPT --num_steps 20 --trajectory
"""

import dist_util
from dist_util import UserError

from dataclasses import replace
from pathlib import Path

import torch

import dataset
import defaults
import generator
import misc


def draw_classes(path, trained, run):
    """A row for each class, with its name: the images of the same seeds."""
    count, names, columns = trained.config.network.label_dim, trained.config.data.class_names, run.columns or 10
    if not count or run.trajectory:
        raise UserError("--per_class is for a conditional model, and not with --trajectory")
    seeds = range(run.start_seed, run.start_seed + columns)
    of_class = [replace(trained, config=trained.config.replace("sampling", class_idx=i)) for i in range(count)]
    picture, cell = misc.tile(torch.cat([model.images(seeds) for model in of_class]), columns)
    figure, (ax,) = misc.new_figure(1, 0.6 * columns + 1, 0.6 * count + 0.2)
    ax.imshow(picture.permute(1, 2, 0))
    ax.set_yticks([(i + 0.5) * cell for i in range(count)], names if len(names) == count else range(count))
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
    seeds = range(run.start_seed, run.start_seed + run.nsampling)
    generator.check_seeds(seeds[0], seeds[-1])
    with dist_util.session() as device:
        if dist_util.world_size() > 1:
            raise UserError("teaser.py draws one picture: run it with python, not with torchrun")
        trained = generator.load_model(run.checkpoint, flags, device, guide=run.guide)
        dest = Path(run.dest or Path(run.checkpoint).parent / f"teaser-{trained.config.task.mode}.png")
        misc.check_writable(dest)
        if run.per_class:
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
