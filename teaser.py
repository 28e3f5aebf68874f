"""Draw a grid of images from a checkpoint; with --trajectory, the path of each from noise to data.

python teaser.py --mode characteristic --checkpoint CKPT --num_steps 1
python teaser.py --mode denoiser --checkpoint CKPT --num_steps 20 --trajectory
"""

import dist_util
from dist_util import UserError

from dataclasses import dataclass
from pathlib import Path

import torch

import dataset
import defaults
import generator
import misc
from defaults import file, setting


@dataclass(frozen=True)
class Run:
    """picture"""

    checkpoint: str | None = file("checkpoint to sample from")
    dest: str | None = file("PNG file for the picture; teaser-{mode}.png beside the checkpoint if left out", ".png")
    start_seed: int = setting(0, "first seed; the next ones follow")
    nsampling: int = setting(64, "images in the grid; with --trajectory, rows")
    columns: int = setting(0, "images in a row of the grid; 0 for a square")
    trajectory: bool = setting(False, "a row for each image: the states from noise to data, up to 11 of them")


def main():
    run, flags = defaults.parse(
        Run, ["task", "data", "network", "sampling", "speed"], description=__doc__, source="the checkpoint's"
    )
    defaults.required(run, "checkpoint")
    for name, least in (("nsampling", 1), ("columns", 0)):
        if not least <= getattr(run, name) <= 2**16:
            raise UserError(f"--{name} is {getattr(run, name)}: it must be from {least} to {2**16}")
    seeds = range(run.start_seed, run.start_seed + run.nsampling)
    generator.check_seeds(seeds[0], seeds[-1])
    with dist_util.session() as device:
        if dist_util.world_size() > 1:
            raise UserError("teaser.py draws one picture: run it with python, not with torchrun")
        trained = generator.load_model(run.checkpoint, flags, device)
        dest = Path(run.dest or Path(run.checkpoint).parent / f"teaser-{trained.config.task.mode}.png")
        if run.trajectory:
            states = [dataset.to_uint8(x, trained.config.data.centered) for x in generator.solve(trained, seeds)]
            shown = torch.linspace(0, len(states) - 1, min(len(states), 11)).round().long().tolist()
            images = torch.stack([states[i] for i in shown], dim=1).flatten(0, 1)  # rows: seeds, columns: times
            misc.write_grid(dest, images, columns=len(shown))
        else:
            misc.write_grid(dest, trained.images(seeds), columns=run.columns or round(run.nsampling**0.5))
        print(dest)


if __name__ == "__main__":
    dist_util.launch(main)
