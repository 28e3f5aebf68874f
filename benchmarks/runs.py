"""Whole runs of the scripts: --help, a first picture, the share of a step that goes to data, two ranks against one.

The data are made here: noise in the files of MNIST, and a folder of JPEG files.  Every run is a process of its own, as users
start it, and says its speed in metrics.jsonl.
"""

import argparse
import json
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
SMALL = "--model_channels 16 --channel_mult 1 2 4 --num_blocks 2 --attn_resolutions"
SCRIPTS = ("train", "eval", "fid", "teaser", "compare")


def make_mnist(folder, n=60000):
    """Files as torchvision keeps MNIST, of noise."""
    folder, noise = folder / "MNIST" / "raw", np.random.default_rng(0)
    folder.mkdir(parents=True)
    for kind, shape, most in (("images-idx3", (n, 28, 28), 256), ("labels-idx1", (n,), 10)):
        values = noise.integers(0, most, shape, dtype=np.uint8)
        header = struct.pack(f">{1 + len(shape)}i", 0x800 + len(shape), *shape)
        (folder / f"train-{kind}-ubyte").write_bytes(header + values.tobytes())


def make_folder(folder, n=10000, size=32):
    """JPEG files of smooth noise."""
    folder.mkdir()
    noise = np.random.default_rng(0)
    for i in range(n):
        small = Image.fromarray(noise.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        small.resize((size, size), Image.BICUBIC).save(folder / f"{i:05d}.jpg")


def train(workdir, flags, ranks=1, threads=2, steps=20, log_freq=10):
    """The last line of metrics.jsonl of a run of stage 1."""
    launch = f"-m torch.distributed.run --standalone --nproc_per_node={ranks}" if ranks > 1 else ""
    freqs = f"--train_steps {steps} --log_freq {log_freq} --sampling_freq 0 --dump_freq {steps}"
    command = f"{launch} train.py {flags} {freqs} --workdir {workdir}".split()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=True, capture_output=True)
    return json.loads((Path(workdir) / "metrics.jsonl").read_text().splitlines()[-1])


def data_share(place, repeats):
    print("\n| stage 1, 2 threads | images/s | data's share of a step |\n|---|---|---|", flush=True)
    small = f"--data_name folder --data_path {place}/folder --image_size 32 {SMALL} --bsz 64 --global_bsz 64"
    small += " --num_workers 0"  # the second epoch is that from step 157 to 312
    mnist = f"--data_name mnist --data_path {place} --bsz 64 --global_bsz 64"
    runs = {"mnist preset": (mnist, 20, 10), "10,000 JPEG files of 32x32, second epoch": (small, 320, 160)}
    for name, (flags, steps, log_freq) in runs.items():
        lines = [
            train(f"{place}/{name.split()[0]}-{i}", flags, steps=steps, log_freq=log_freq)
            for i in tqdm(range(repeats), desc=name, leave=False)
        ]
        rate, share = (statistics.median(line[key] for line in lines) for key in ("images_per_s", "data_share"))
        print(f"| {name} | {rate:.1f} | {100 * share:.2f} % |", flush=True)


def ranks(place, repeats):
    print("\n| stage 1, mnist preset, one thread a rank | images/s | against one rank |\n|---|---|---|", flush=True)
    rates = {1: [], 2: []}
    for i in tqdm(range(repeats), desc="ranks", leave=False):
        for count, found in rates.items():
            flags = f"--data_name mnist --data_path {place} --bsz 64 --global_bsz {64 * count}"
            found.append(train(f"{place}/ranks-{count}-{i}", flags, count, 1)["images_per_s"])
    ratio = statistics.median(two / one for one, two in zip(rates[1], rates[2]))
    for count, found in rates.items():
        print(f"| {count} rank{'s' * (count > 1)} | {statistics.median(found):.1f} | {ratio if count > 1 else 1:.2f} |")


def start_up(place, repeats):
    print("\n| command | s |\n|---|---|", flush=True)
    flow_map = "checkpoints/mnist-characteristic.pth"
    commands = {f"{script}.py --help": f"{script}.py --help" for script in SCRIPTS}
    commands[f"teaser.py --checkpoint {flow_map}: 64 images"] = f"teaser.py --checkpoint {flow_map} --dest {place}/teaser.png"
    for name, command in commands.items():
        taken = []
        for _ in range(repeats):
            begun = time.perf_counter()
            subprocess.run([sys.executable, *command.split()], cwd=ROOT, check=True, capture_output=True)
            taken.append(time.perf_counter() - begun)
        print(f"| `{name}` | {statistics.median(taken):.2f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="of each run (default: 5)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        make_mnist(Path(place))
        make_folder(Path(place) / "folder")
        print(f"Python {sys.version.split()[0]}, {os.cpu_count()} cores, medians of {options.repeats}")
        start_up(place, options.repeats)
        data_share(place, options.repeats)
        ranks(place, options.repeats)


if __name__ == "__main__":
    main()
