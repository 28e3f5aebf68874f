"""The whole method on the digits, through the public scripts: what `make demo` runs.

Trains the denoiser, distils it, samples both with 1, 2, 5, 10 and 20 steps, scores and draws.  Prints each command before
running it, and at the end the pixel FID table, the time and memory spent, and where the pictures are.  Starts afresh each
time.
"""

import argparse
import csv
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS = (1, 2, 5, 10, 20)
END_SEED = 1799  # 1,800 images against the 1,797 digits


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", default="logs/demo", help="folder under logs/ for everything, emptied first")
    parser.add_argument("--objective", default="trajectory", choices=("trajectory", "semigroup"), help="of stage 2")
    parser.add_argument("--train_steps", type=int, help="of stage 2 (default: by preset)")
    parser.add_argument("--seed", type=int, default=0, help="of the training runs (default: 0)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="of the training runs (default: by processor)")
    parser.add_argument("--compile", action="store_true", help="compile the network for training")
    options = parser.parse_args()
    if options.seed < 0 or options.train_steps is not None and options.train_steps < 1:
        parser.error("--seed is 0 or more, and --train_steps 1 or more")
    work, begun, spent = options.workdir, time.perf_counter(), []
    if (ROOT / "logs").resolve() not in (ROOT / work).resolve().parents:
        parser.error(f"--workdir {work} is emptied first, so it must be a folder under logs/")
    shutil.rmtree(ROOT / work, ignore_errors=True)

    def run(*command):
        print("\n$ python " + " ".join(map(str, command)), flush=True)
        start = time.perf_counter()
        done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(done.returncode)
        spent.append((command[0], time.perf_counter() - start))
        print(done.stdout.strip(), flush=True)
        return done.stdout.splitlines()[-1]

    shared = ["--seed", options.seed, *(["--precision", options.precision] if options.precision else [])]
    shared += ["--compile"] if options.compile else []
    longer = ("--train_steps", options.train_steps) if options.train_steps else ()
    checkpoints = {}
    checkpoints["denoiser"] = run(
        "train.py", "--data_name", "digits", "--mode", "denoiser", "--workdir", f"{work}/denoiser", *shared
    )
    checkpoints["characteristic"] = run(
        *("train.py", "--data_name", "digits", "--mode", "characteristic", "--teacher", checkpoints["denoiser"]),
        *("--objective", options.objective, "--workdir", f"{work}/characteristic", *longer, *shared),
    )
    reference = run("fid.py", "--mode", "ref", "--data_name", "digits", "--dest", f"{work}/digits.npz")
    run(
        *("compare.py", "--denoiser", checkpoints["denoiser"], "--characteristic", checkpoints["characteristic"]),
        *("--ode_solver", "dpm", "--num_steps", *STEPS, "--ref_path", reference, "--end_seed", END_SEED),
        *("--dest", f"{work}/compare.png"),
    )
    run("teaser.py", "--checkpoint", checkpoints["characteristic"])
    run(
        *("teaser.py", "--checkpoint", checkpoints["denoiser"], "--trajectory", "--nsampling", 8),
        *("--dest", f"{work}/denoiser/trajectory.png"),
    )
    with open(ROOT / work / "compare-fid.csv", newline="") as file:
        scores = {(row["mode"], int(row["num_steps"])): float(row["FID"]) for row in csv.DictReader(file)}

    print(f"\nPixel FID of {END_SEED + 1:,} images against the 1,797 digits, by network evaluations (lower is better):\n")
    print("| NFE |" + "".join(f" {steps} |" for steps in STEPS) + "\n|---|" + "---|" * len(STEPS))
    for mode, title in (("denoiser", "denoiser, ODE (dpm)"), ("characteristic", "flow map")):
        print(f"| {title} |" + "".join(f" {scores[mode, steps]:.3f} |" for steps in STEPS))
    one, twenty = scores["characteristic", 1], scores["denoiser", 20]
    print(f"\nOne evaluation of the flow map scores {one / twenty:.2f} times its teacher's twenty,")
    print(f"and its teacher's one evaluation scores {scores['denoiser', 1] / one:.0f} times the flow map's.")
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (1e9 / 1024 if sys.platform != "darwin" else 1e9)
    stages = ", ".join(f"stage {i} {seconds:.0f} s" for i, (_, seconds) in enumerate(spent[:2], 1))
    print(f"Took {time.perf_counter() - begun:.0f} s ({stages}); peak memory {memory:.2f} GB.")
    pictures = ("compare.png", "compare-fid.png", "characteristic/teaser-characteristic.png", "denoiser/trajectory.png")
    print("Pictures: " + "  ".join(f"{work}/{name}" for name in pictures))


if __name__ == "__main__":
    main()
