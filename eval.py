"""Turn seeds into images: {workdir}/{seed:06d}.png, or one images.npz, by the denoiser's ODE or by the flow map.

  python eval.py --mode denoiser --checkpoint CKPT --workdir OUT --end_seed 99 --ode_solver deis --num_steps 20
  torchrun --standalone --nproc_per_node=4 eval.py --checkpoint CKPT --workdir OUT --end_seed 49999

An image depends on its seed alone, not on the number of ranks or the batch size.  {workdir}/eval.json records how the
images were made.  The same command again makes those that are missing.
"""

import dist_util
from dist_util import UserError

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import defaults
import generator
import misc


def prepare(workdir, trained, run):
    """Make the folder and write eval.json; UserError if there is anything in it but images made in the same way.

    More seeds may be asked for than before, and another --eval_bsz, which changes no image but for rounding.
    """
    misc.check_folder(workdir, "workdir")
    record, path = trained.record(range(run.start_seed, run.end_seed + 1)), workdir / "eval.json"
    misc.remove_leftovers(workdir)
    array, pictures = workdir / "images.npz", any(workdir.glob("*.png"))
    held = {name for name, there in (("png", pictures), ("npz", array.is_file())) if there}
    if held - {run.format}:
        raise UserError(f"--workdir {workdir} holds images in the other --format: choose another folder")
    if held and path.exists():
        try:
            found = json.loads(path.read_text())
            different = ["start_seed"] if found["start_seed"] != record["start_seed"] else []
            different += [f"seeds up to end_seed {found['end_seed']}"] if found["end_seed"] > record["end_seed"] else []
            different += generator.differences(record, found)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path} is damaged: remove {workdir}, or choose another folder") from error
        if different:
            raise UserError(f"--workdir {workdir} holds images made with other {', '.join(different)}: choose another folder")
        if found["end_seed"] < record["end_seed"]:
            array.unlink(missing_ok=True)  # all are made again
    elif workdir.exists() and any(other != path for other in workdir.iterdir()):
        raise UserError(f"--workdir {workdir} is not empty: choose another folder, so that sets of images do not mix")
    misc.write_json(path, record)


def image_path(workdir, seed):
    return workdir / f"{seed:06d}.png"


def all_batches(seeds, size):
    """The batches of `size` that each rank makes of its every world_size-th seed, in this order; the last may be smaller."""
    world = dist_util.world_size()
    shares = [seeds[rank::world] for rank in range(world)]
    return [share[i : i + size] for i in range(0, len(shares[0]), size) for share in shares if i < len(share)]


def lacking(workdir, batches):
    """The numbers of the batches of which an image is missing.  They are made again as a whole, to have the same rounding."""
    there = {path for path in workdir.glob("*.png") if misc.is_whole_png(path)}
    missing = [sum(image_path(workdir, seed) not in there for seed in batch) for batch in batches]
    found = [number for number, count in enumerate(missing) if count]
    if there:
        total = sum(map(len, batches))
        misc.log(f"{workdir} holds images already: {sum(missing)} of {total} are missing, in {len(found)} batches")
    return found


def make_pngs(workdir, trained, seeds):
    """A PNG file for each seed, those that are missing; returns the folder."""
    batches = all_batches(seeds, trained.config.sampling.eval_bsz)
    left = dist_util.gather(dist_util.on_first_rank(lambda: lacking(workdir, batches)))[0]
    mine = left[dist_util.rank() :: dist_util.world_size()]  # an equal share, also of what an interruption left
    mine = [seed for number in mine for seed in batches[number]]  # which generate() cuts again: all but the last are full

    def keep(seed, image):
        if not misc.is_whole_png(image_path(workdir, seed)):
            misc.write_png(image_path(workdir, seed), image)

    def write():
        with ThreadPoolExecutor(1) as pool:  # a batch is written while the next is computed
            writing = []
            for batch, images in generator.generate(trained, mine):
                for file in writing:
                    file.result()
                writing = [pool.submit(keep, seed, image) for seed, image in zip(batch, images)]
            for file in writing:
                file.result()

    dist_util.agree(write)
    return workdir


def make_npz(workdir, trained, seeds):
    """{workdir}/images.npz, with uint8 `arr_0` (N, H, W, C) in the order of the seeds, if it is missing; returns its path."""
    path = workdir / "images.npz"
    if not dist_util.gather(path.is_file())[0]:
        mine = dist_util.agree(lambda: trained.images(seeds[dist_util.rank() :: dist_util.world_size()]))
        images = dist_util.gather_rows(mine.permute(0, 2, 3, 1).contiguous())

        def write():
            with misc.atomic(path) as temporary, open(temporary, "wb") as file:
                np.savez(file, images.numpy())

        dist_util.on_first_rank(write)
    return path


def main():
    run, flags = defaults.parse("eval", description=__doc__)
    defaults.required(run, "checkpoint", "workdir")
    generator.check_seeds(run.start_seed, run.end_seed)
    with dist_util.session() as device:
        trained = dist_util.agree(lambda: generator.load_model(run.checkpoint, flags, device, run.raw, run.guide))
        workdir = Path(run.workdir)
        dist_util.on_first_rank(lambda: prepare(workdir, trained, run))
        make = make_pngs if run.format == "png" else make_npz
        made = make(workdir, trained, range(run.start_seed, run.end_seed + 1))
        if dist_util.rank() == 0:
            print(made)


if __name__ == "__main__":
    dist_util.launch(main)
