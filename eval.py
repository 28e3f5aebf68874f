"""Turn seeds into images: {workdir}/{seed:06d}.png, or one images.npz, by the denoiser's ODE or by the flow map.

  python eval.py --mode denoiser --checkpoint CKPT --workdir OUT --end_seed 99 --ode_solver deis --num_steps 20
  torchrun --standalone --nproc_per_node=4 eval.py --checkpoint CKPT --workdir OUT --end_seed 49999

An image depends on its seed alone, not on the number of ranks or the batch size.  {workdir}/eval.json records how the
images were made.  The same command again makes those that are missing.

Images to noise, to OUT/latents.npz, by the ODE of a denoiser; and back, by any model.  The way back prints the PSNR:

  python eval.py --checkpoint CKPT --encode FOLDER --workdir OUT
  python eval.py --checkpoint CKPT --latents OUT/latents.npz --workdir AGAIN

Images with the noise of time t, and from there to data; image i has the noise of seed start_seed + i, and its number:

  python eval.py --checkpoint CKPT --from FOLDER --t 0.5 --workdir OUT
"""

import dist_util
from dist_util import UserError

import json
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import dataset
import defaults
import generator
import misc

DRAWN = defaults.EvalRun()  # what flags are when they are left out


def check_flags(run):
    """UserError where flags do not go together."""
    flags = {"--encode": run.encode, "--latents": run.latents, "--from": run.from_}
    given = [flag for flag, value in flags.items() if value is not None]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} begin from different things: choose one")
    if run.from_ is None and run.t is not None:
        raise UserError(f"--t is {run.t}, which is the time for the images of --from: add --from, or leave it out")
    if run.from_ is not None and run.t is None:
        raise UserError("--from needs --t, the time whose noise its images get: add it, such as --t 0.5")
    if given and run.end_seed != DRAWN.end_seed:
        raise UserError(f"--end_seed is {run.end_seed}, but {given[0]} says how many images there are: leave it out")
    if given and run.start_seed != DRAWN.start_seed and run.from_ is None:
        raise UserError(f"--start_seed is {run.start_seed}, but {given[0]} draws no noise: leave it out")
    if run.encode is not None and run.format != DRAWN.format:
        raise UserError(f"--format is {run.format}, which is that of images: --encode makes latents, so leave it out")
    for flag in ("--encode", "--from"):
        if flags[flag] is not None and Path(run.workdir).resolve().is_relative_to(Path(flags[flag]).resolve()):
            raise UserError(f"--workdir {run.workdir} lies in the folder of {flag}, whose images it would join: choose another")
    generator.check_seeds(run.start_seed, run.start_seed if given else run.end_seed)


def open_images(folder, trained):
    """The data set of the images that --encode or --from names, in their order; UserError unless the model takes them all.

    Where the model's data were cropped and resized, they are too.  Classes are the class folders: by their names where the
    checkpoint knows those of its data, else in their order.
    """
    images, _ = dataset.open_images(folder, labels=True)
    if isinstance(images, dataset.ImageFiles) and trained.config.data.data_name in ("folder", "afhq"):
        images.channels, images.size = trained.mean.shape[:2]  # cropped and resized, as the model's data were
    names, label_dim = images.class_names, trained.config.network.label_dim
    known = trained.config.data.class_names or (names if len(names) == label_dim else ())
    pixels, labels = images.batch(range(len(images)))
    labels = torch.tensor([known.index(name) if name in known else -1 for name in names])[labels] if any(names) else None
    return generator.labelled(trained, pixels, labels, f"the images in {folder}")


def open_given(trained, run):
    """(what --latents or --from gives to begin from, the images to compare with); None for what there is none of."""
    if run.latents is not None:
        given, originals = generator.open_latents(trained, run.latents)
        return replace(given, record={"latents": misc.file_hash(run.latents)}), originals
    if run.from_ is not None:
        images = open_images(run.from_, trained)
        given = generator.from_images(trained, images, run.t, run.start_seed)
        return replace(given, record={"images": images.fingerprint(), "t": run.t}), None
    return None, None


def prepare(workdir, trained, form, seeds, given=None):
    """Make the folder and write eval.json; UserError if there is anything in it but images made in the same way.

    More seeds may be asked for than before, and another --eval_bsz, which changes no image but for rounding.
    """
    misc.check_folder(workdir, "workdir")
    record, path = trained.record(seeds, given), workdir / "eval.json"
    misc.remove_leftovers(workdir)
    array, pictures = workdir / "images.npz", any(workdir.glob("[!.]*.png"))
    held = {name for name, there in (("png", pictures), ("npz", array.is_file())) if there}
    if held - {form}:
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


def make_pngs(workdir, trained, seeds, given=None):
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
            for batch, images in generator.generate(trained, mine, given):
                for file in writing:
                    file.result()
                writing = [pool.submit(keep, seed, image) for seed, image in zip(batch, images)]
            for file in writing:
                file.result()

    dist_util.agree(write)
    return workdir


def make_npz(workdir, trained, seeds, given=None):
    """{workdir}/images.npz, with uint8 `arr_0` (N, H, W, C) in the order of the seeds, if it is missing; returns its path."""
    path = workdir / "images.npz"
    if not dist_util.gather(zipfile.is_zipfile(path))[0]:
        mine = dist_util.agree(lambda: trained.images(seeds[dist_util.rank() :: dist_util.world_size()], given))
        images = dist_util.gather_rows(mine.permute(0, 2, 3, 1).contiguous())

        def write():
            with misc.atomic(path) as temporary, open(temporary, "wb") as file:
                np.savez(file, images.numpy())

        dist_util.on_first_rank(write)
    return path


def encode(workdir, trained, folder):
    """{workdir}/latents.npz of the images in a folder, if it is missing; returns its path.  UserError if it is another."""
    generator.check_encoder(trained)
    images, path = dist_util.agree(lambda: open_images(folder, trained)), workdir / "latents.npz"
    record = {k: v for k, v in trained.record([0]).items() if k not in ("nfe", "start_seed", "end_seed")}
    record |= {"begin": {"images": images.fingerprint()}, "source": str(folder)}

    def prepare():
        misc.check_folder(workdir, "workdir")
        misc.remove_leftovers(workdir, path.name)
        different = generator.differences(record, generator.read_latents(path)[3]) if path.exists() else ()
        if different:
            raise UserError(f"{path} was made with other {', '.join(different)}: choose another --workdir")

    dist_util.on_first_rank(prepare)
    if not dist_util.gather(path.exists())[0]:
        rows = range(dist_util.rank(), len(images), dist_util.world_size())
        latents = dist_util.gather_rows(dist_util.agree(lambda: generator.encode(trained, images, rows)))
        has_classes = bool(trained.config.network.label_dim)
        dist_util.on_first_rank(lambda: generator.write_latents(path, latents, images, record, has_classes))
    return path


def psnr(a, b):
    """Peak signal-to-noise ratio (N,), in dB, of uint8 images (N, C, H, W): 10 log10(255^2 / mean squared difference)."""
    return 10 * (255**2 / (a.double() - b.double()).square().flatten(1).mean(1)).log10()


def main():
    run, flags = defaults.parse("eval", description=__doc__)
    defaults.required(run, "checkpoint", "workdir")
    check_flags(run)
    with dist_util.session() as device:
        trained = dist_util.agree(lambda: generator.load_model(run.checkpoint, flags, device, run.raw, run.guide))
        generator.check_same_on_all_ranks(run.checkpoint, trained.sha256)
        workdir = Path(run.workdir)
        if run.encode is not None:
            made, originals = encode(workdir, trained, run.encode), None
        else:
            given, originals = dist_util.agree(lambda: open_given(trained, run))
            end_seed = run.end_seed if given is None else run.start_seed + len(given.items) - 1
            seeds = range(run.start_seed, end_seed + 1)
            dist_util.on_first_rank(lambda: prepare(workdir, trained, run.format, seeds, given))
            made = (make_pngs if run.format == "png" else make_npz)(workdir, trained, seeds, given)
        if dist_util.rank() == 0:
            print(made)
            if originals is not None:
                values = psnr(originals, dataset.open_images(workdir)[0].batch(range(len(originals)))[0]).tolist()
                print("\n".join(f"PSNR {seed:06d} {value:.2f}" for seed, value in zip(seeds, values)))
                print(f"PSNR mean {sum(values) / len(values):.2f}")


if __name__ == "__main__":
    dist_util.launch(main)
