"""From seeds to files: PNG files against torchvision's save_image, and eval.py against the bare calls of the network.

The images are those of the MNIST flow map in checkpoints/, in one evaluation each.  All ways take turns.
"""

import argparse
import shutil
import statistics
import tempfile
from pathlib import Path

import timing
import torch
from torchvision.utils import save_image

import eval
import generator
import misc

CHECKPOINT = Path(__file__).resolve().parent.parent / "checkpoints" / "mnist-characteristic.pth"


def table(title, taken, plain):
    print(f"\n| {title} | s | against the first |\n|---|---|---|")
    for way, seconds in taken.items():
        print(f"| {way} | {statistics.median(seconds):.2f} | {timing.ratio(taken, plain, way):.2f} |", flush=True)


def in_folders(function, place):
    """The function of an empty folder in `place`, which is removed afterwards, as one that returns the seconds it took."""

    def call():
        folder = Path(tempfile.mkdtemp(dir=place))
        seconds = timing.timed(lambda: function(folder))()
        shutil.rmtree(folder)
        return seconds

    return call


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=10000, help="images (default: 10000)")
    parser.add_argument("--repeats", type=int, default=5, help="of each way, in turns (default: 5)")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where files are written (default: %(default)s)")
    options = parser.parse_args()
    seeds = range(options.num)
    with timing.dist_util.session() as device:
        print(f"{timing.machine()}, {options.num} images of 28x28 in {options.folder}, medians of {options.repeats}")
        trained = generator.load_model(CHECKPOINT, {"num_steps": 1}, device)
        images = trained.images(seeds)

        def one_at_a_time(folder):
            for seed, image in zip(seeds, images.float() / 255):
                save_image(image, folder / f"{seed:06d}.png")

        def ours(folder):
            for seed, image in zip(seeds, images):
                misc.write_png(folder / f"{seed:06d}.png", image)

        writing = {"save_image": in_folders(one_at_a_time, options.folder), "write_png": in_folders(ours, options.folder)}
        table("writing PNG files", timing.in_turns(writing, options.repeats, "PNG"), "save_image")

        bsz, shape = trained.config.sampling.eval_bsz, trained.mean.shape

        @torch.no_grad()
        def bare():
            """The network alone on ready noise: what no tool can go below."""
            for start in range(0, options.num, bsz):
                x = torch.randn(min(bsz, options.num - start), *shape, device=device)
                t = torch.ones(len(x), device=device)
                out = trained.model(x, t, 0 * t)
            return out.sum().item()

        making = {
            "the network alone": timing.timed(bare),
            "eval.py --format npz": in_folders(lambda folder: eval.make_npz(folder, trained, seeds), options.folder),
            "eval.py --format png": in_folders(lambda folder: eval.make_pngs(folder, trained, seeds), options.folder),
        }
        table("one-step generation", timing.in_turns(making, options.repeats, "generation"), "the network alone")


if __name__ == "__main__":
    main()
