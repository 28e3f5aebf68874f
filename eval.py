"""Turn seeds into images: {workdir}/{seed:06d}.png, by the denoiser's ODE or by the flow map.

  python eval.py --mode denoiser --checkpoint CKPT --workdir OUT --end_seed 99 --ode_solver deis --num_steps 20
  torchrun --nproc_per_node=4 eval.py --mode characteristic --checkpoint CKPT --workdir OUT --end_seed 49999 --num_steps 1

An image depends on its seed alone, not on the number of ranks or the batch size.  {workdir}/eval.json records how the
images were made.
"""

from dataclasses import dataclass
from pathlib import Path

import defaults
import dist_util
import misc
from defaults import setting
from dist_util import UserError


@dataclass(frozen=True)
class Run:
    """files and seeds"""

    checkpoint: str | None = setting(None, "checkpoint to sample from")
    workdir: str | None = setting(None, "folder for the images")
    start_seed: int = setting(0, "first seed")
    end_seed: int = setting(49999, "last seed, included")


def prepare(workdir, trained, run):
    """Make the folder and write eval.json; UserError if there is anything in it already."""
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir {workdir} is a file: choose a folder")
    if workdir.exists() and any(workdir.iterdir()):
        raise UserError(f"--workdir {workdir} is not empty: choose another folder, so that sets of images do not mix")
    misc.write_json(workdir / "eval.json", trained.record(range(run.start_seed, run.end_seed + 1)))


def main():
    run, flags = defaults.parse(Run, ["task", "data", "network", "sampling"], description=__doc__)
    defaults.required(run, "checkpoint", "workdir")
    if not 0 <= run.start_seed <= run.end_seed:
        raise UserError(
            f"--start_seed {run.start_seed} --end_seed {run.end_seed}: seeds run from 0, start to end, both included"
        )
    with dist_util.session() as device:
        trained = dist_util.agree(lambda: misc.load_model(run.checkpoint, flags, device))
        workdir = Path(run.workdir)
        dist_util.on_first_rank(lambda: prepare(workdir, trained, run))
        seeds = range(run.start_seed + dist_util.rank(), run.end_seed + 1, dist_util.world_size())

        def write():
            for batch, images in misc.generate(trained, seeds):
                for seed, image in zip(batch, images):
                    misc.write_png(workdir / f"{seed:06d}.png", image)

        dist_util.agree(write)
        if dist_util.rank() == 0:
            print(workdir)


if __name__ == "__main__":
    dist_util.launch(main)
