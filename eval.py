"""Turn seeds into images: {workdir}/{seed:06d}.png, by the denoiser's ODE or by the flow map.

  python eval.py --mode denoiser --checkpoint CKPT --workdir OUT --end_seed 99 --ode_solver deis --num_steps 20
  torchrun --nproc_per_node=4 eval.py --mode characteristic --checkpoint CKPT --workdir OUT --end_seed 49999 --num_steps 1

An image depends on its seed alone, not on the number of ranks or the batch size.  {workdir}/eval.json records how the
images were made.  The same command again makes those that are missing.
"""

import json
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
    """Make the folder and write eval.json; UserError if there is anything in it but images made in the same way."""
    misc.check_folder(workdir, "workdir")
    record, path = trained.record(range(run.start_seed, run.end_seed + 1)), workdir / "eval.json"
    if workdir.exists():
        misc.remove_leftovers(workdir)
    if path.exists():
        try:
            found = json.loads(path.read_text())
            different = ["checkpoint"] if found["sha256"] != record["sha256"] else []
            different += [key for key in ("start_seed", "end_seed") if found[key] != record[key]]
            for section, settings in record["config"].items():
                different += [key for key in settings if found["config"][section][key] != settings[key]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged: remove {workdir}, or choose another folder") from error
        if different:
            raise UserError(f"--workdir {workdir} holds images made with other {', '.join(different)}: choose another folder")
    elif workdir.exists() and any(workdir.iterdir()):
        raise UserError(f"--workdir {workdir} is not empty: choose another folder, so that sets of images do not mix")
    misc.write_json(path, record)


def missing(workdir, seeds, size):
    """The batches of `size` of these seeds of which an image is missing, in one list, and the set of the missing seeds.

    Whole batches, so that images have the rounding that they would have had without an interruption.
    """
    lost = {seed for seed in seeds if not (workdir / f"{seed:06d}.png").exists()}
    batches = (seeds[i : i + size] for i in range(0, len(seeds), size))
    return [seed for batch in batches if not lost.isdisjoint(batch) for seed in batch], lost


def main():
    run, flags = defaults.parse(Run, ["task", "data", "network", "sampling"], description=__doc__)
    defaults.required(run, "checkpoint", "workdir")
    misc.check_seeds(run.start_seed, run.end_seed)
    with dist_util.session() as device:
        trained = dist_util.agree(lambda: misc.load_model(run.checkpoint, flags, device))
        workdir = Path(run.workdir)
        dist_util.on_first_rank(lambda: prepare(workdir, trained, run))
        seeds = range(run.start_seed + dist_util.rank(), run.end_seed + 1, dist_util.world_size())

        def write():
            again, lost = missing(workdir, seeds, trained.config.sampling.eval_bsz)
            if len(lost) < len(seeds):
                misc.log(f"{workdir} holds {len(seeds) - len(lost)} of {len(seeds)} images of this rank already")
            for batch, images in misc.generate(trained, again):
                for seed, image in zip(batch, images):
                    if seed in lost:
                        misc.write_png(workdir / f"{seed:06d}.png", image)

        dist_util.agree(write)
        if dist_util.rank() == 0:
            print(workdir)


if __name__ == "__main__":
    dist_util.launch(main)
