"""Speed and memory of scoring, as ratios within one run: the numbers of the README's page docs/scores.md.

  frechet     the Fréchet distance in 2,048 dimensions against scipy.linalg.sqrtm of the product
  inception   InceptionV3 features against the same network unfolded, contiguous and channels-last (random weights)
  pixels      pixel statistics of 60,000 PNG files of MNIST, two ranks against one (needs the data set in data/)
  memory      peak memory of fid.py for a tenth of those files and all of them, and for Inception of 512 and 2,048
Prints a table row for each; medians of --repeats.  Run it with nothing else on the machine.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import scipy.linalg
import timing
import torch

import dataset
import defaults
import fid
import inception
import misc

ROOT = Path(__file__).resolve().parent.parent


def medians(options, functions):
    """{name: median seconds of a call}, the functions taking turns."""
    taken = timing.in_turns({name: timing.stopwatch(call) for name, call in functions.items()}, options.repeats, "timing")
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def frechet(options):
    """Covariances of 10,000 samples each, of different spectra in different axes, as those of features are."""
    rng, d = np.random.default_rng(0), 2048

    def sample():
        x = rng.standard_normal((10000, d)) * (1 + np.arange(d)) ** -0.5
        x = x @ np.linalg.qr(rng.standard_normal((d, d)))[0] + 0.1 * rng.standard_normal(d)
        return fid.Statistics(x.mean(0), np.cov(x.T), {})

    def by_root():
        root = scipy.linalg.sqrtm(a.sigma @ b.sigma)
        return float(np.square(a.mu - b.mu).sum() + np.trace(a.sigma) + np.trace(b.sigma) - 2 * np.trace(root).real)

    a, b = sample(), sample()
    value, expected = fid.frechet_distance(a, b), by_root()
    ours, theirs = medians(options, {"ours": lambda: fid.frechet_distance(a, b), "sqrtm": by_root}).values()
    times = f"{ours:.2f} s, sqrtm {theirs:.2f} s: {theirs / ours:.1f} times faster"
    print(f"| Fréchet distance, 2,048 dimensions | {times}; relative difference {abs(value / expected - 1):.0e} |")


def random_weights():
    """A state dict with the shapes of the published one; variances keep activations of order one."""
    generator, state = torch.Generator().manual_seed(0), {}
    shapes = json.loads((ROOT / "tests" / "golden" / "inception-keys.json").read_text())
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.zeros(shape, dtype=torch.long)
        elif len(shape) > 1:
            state[name] = torch.randn(shape, generator=generator) * (2 / np.prod(shape[1:])) ** 0.5
        else:
            state[name] = torch.ones(shape) if name.endswith(("running_var", "bn.weight")) else torch.zeros(shape)
    return state


def features(options):
    state = random_weights()
    plain, last = (inception.Inception({k: v.clone() for k, v in state.items()}, fold=False) for _ in range(2))
    last.net.to(memory_format=torch.channels_last)  # channels-last alone: convolutions follow the layout of their weights
    ours = inception.Inception(state)
    images = torch.randint(0, 256, (32, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected, value = plain(images), ours(images)
    difference = float((value - expected).abs().max() / expected.abs().max())
    nets = {"plain": plain, "last": last, "ours": ours}
    base, layout, mine = medians(options, {name: lambda net=net: net(images) for name, net in nets.items()}).values()
    times = f"{32 / mine:.1f} images/s, plain {32 / base:.1f}: {base / mine:.2f} times faster"
    alone = f"channels-last alone {base / layout:.2f}"
    print(f"| Inception features, batch 32 | {times} ({alone}); greatest difference {difference:.0e} |")


def write_mnist(folder, data_path):
    images = dataset.load(defaults.resolve({"data_name": "mnist", "data_path": data_path}).data).images
    with misc.progress(len(images), "writing PNG files") as bar:
        for i, image in enumerate(images):
            misc.write_png(folder / f"{i:06d}.png", image)
            bar.update()


def pixels_in_a_rank(folder):
    """What each rank of `pixels` runs: prints the seconds of the pass, listing the folder included."""
    with timing.dist_util.session() as device:
        timing.dist_util.gather(None)
        start = time.perf_counter()
        found = fid.measure(dataset.ImageFiles(folder), fid.Pixels(device))
        spent = time.perf_counter() - start
        if timing.dist_util.rank() == 0:
            print(json.dumps([spent, float(np.trace(found.sigma)), found.metadata["n"]]))


def pixels(options, folder):
    def ranks(n):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n)]
        command = [sys.executable, *launcher, __file__, "--timed", str(folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        return json.loads(done.stdout)

    runs = {1: [], 2: []}
    for _ in range(options.repeats):
        for n in runs:
            start = time.perf_counter()
            runs[n].append([*ranks(n), time.perf_counter() - start])
    assert len({(trace, n) for found in runs.values() for _, trace, n, _ in found}) == 1  # the same to the last bit
    one, two = (statistics.median(found[0] for found in runs[n]) for n in (1, 2))
    whole_one, whole_two = (statistics.median(found[3] for found in runs[n]) for n in (1, 2))
    print(f"| Pixel statistics, {runs[1][0][2]:,} PNG files | one rank {one:.1f} s, two {two:.1f} s: ", end="")
    print(f"{one / two:.2f} times faster (with start-up {whole_one:.1f} and {whole_two:.1f} s); equal to the last bit |")


def memory(options, folder):
    def peak(*arguments):
        """GB; a small process of its own starts fid.py, since a large one would pass its size on to the child."""
        code = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
        code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
        command = [sys.executable, "-c", code, sys.executable, "fid.py", "--mode", "gen", "--img_folder", str(folder)]
        command += arguments
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return int(done.stdout.splitlines()[-1]) / (1e9 / 1024 if sys.platform != "darwin" else 1e9)

    dest = str(folder.parent / "statistics.npz")
    few, many = (peak("--dest", dest, "--num", n) for n in ("6000", "60000"))
    print(f"| Peak memory, pixels | 6,000 images {few:.2f} GB, 60,000 images {many:.2f} GB |", flush=True)
    weights = folder.parent / "inception.pth"
    torch.save(random_weights(), weights)
    shared = ("--dest", dest, "--features", "inception", "--inception_weights", str(weights))
    few, many = (peak(*shared, "--num", n) for n in ("512", "2048"))
    print(f"| Peak memory, Inception | 512 images {few:.2f} GB, 2,048 images {many:.2f} GB |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["frechet", "inception", "pixels", "memory"], help="which (default: all)")
    parser.add_argument("--repeats", type=int, default=5, help="of each timing (default: 5)")
    parser.add_argument("--data_path", default="data", help="where MNIST is (default: data)")
    parser.add_argument("--timed", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.timed:
        pixels_in_a_rank(options.timed)
        return
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, scipy {scipy.__version__}"
    print(
        f"{versions}, {torch.get_num_threads()} threads, medians of {options.repeats}\n\n| what | measured |\n|---|---|",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "mnist"
        if {"pixels", "memory"} & set(options.only):
            folder.mkdir()
            write_mnist(folder, options.data_path)
        for name, task in (("frechet", frechet), ("inception", features)):
            if name in options.only:
                task(options)
                sys.stdout.flush()
        for name, task in (("pixels", pixels), ("memory", memory)):
            if name in options.only:
                task(options, folder)


if __name__ == "__main__":
    main()
