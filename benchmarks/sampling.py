"""From seeds to files: PNG files against torchvision's save_image, and eval.py against the bare calls of the network.

The images are those of the MNIST flow map in checkpoints/, in one evaluation each.  All ways take turns.

With --inception N, something else is timed, once: drawing N colour images of 32x32 in one step, by an untrained flow map of
the cifar preset in strict float32, and scoring them in the same process by the Fréchet distance of Inception features, with
random weights.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import scores
import timing
import torch
from torchvision.utils import save_image

import checkpoint
import defaults
import eval
import fid
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
        seconds = timing.stopwatch(lambda: function(folder))()
        shutil.rmtree(folder)
        return seconds

    return call


def drawn_and_scored(num, device, begun):
    config = defaults.resolve({"data_name": "cifar", "mode": "characteristic"})
    model = checkpoint.build_model(config).to(device).eval().requires_grad_(False)
    trained = generator.Trained(model, config, torch.zeros(3, 32, 32, device=device), 0, "")
    noise = torch.randint(0, 256, (256, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        torch.save(scores.random_weights(), Path(folder) / "weights.pth")
        extract = fid.load_features("inception", device, Path(folder) / "weights.pth")
    reference = fid.measure(noise, extract)
    ready = time.perf_counter()
    trained.images(range(num))
    drawn = time.perf_counter()
    fid.frechet_distance(reference, fid.measure(generator.Generated(trained, range(num)), extract))
    scored = time.perf_counter()
    print(f"{timing.machine()}\n\n| {num} colour images of 32x32, one step | s |\n|---|---|\n| drawn | {drawn - ready:.1f} |")
    print(f"| drawn and scored | {scored - drawn:.1f} |\n| the same, and loading both networks | ", end="")
    print(f"{scored - drawn + ready - begun:.1f} |", flush=True)


def main():
    begun = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=10000, help="images (default: 10000)")
    parser.add_argument("--repeats", type=int, default=5, help="of each way, in turns (default: 5)")
    parser.add_argument("--inception", type=int, default=0, metavar="N", help="time this many images drawn and scored")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where files are written (default: %(default)s)")
    options = parser.parse_args()
    seeds = range(options.num)
    with timing.dist_util.session() as device:
        if options.inception:
            return drawn_and_scored(options.inception, device, begun)
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
            "the network alone": timing.stopwatch(bare),
            "eval.py --format npz": in_folders(lambda folder: eval.make_npz(folder, trained, seeds), options.folder),
            "eval.py --format png": in_folders(lambda folder: eval.make_pngs(folder, trained, seeds), options.folder),
        }
        table("one-step generation", timing.in_turns(making, options.repeats, "generation"), "the network alone")


if __name__ == "__main__":
    main()
