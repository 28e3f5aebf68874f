"""What each choice of a recipe for MNIST is worth: short runs that differ from the first one in one choice, scored alike.

  python benchmarks/recipe.py --stage 1
  python benchmarks/recipe.py --stage 2 --teacher CKPT
  python benchmarks/recipe.py --stage curve --teacher CKPT      trajectory against semigroup: the score against the time spent

Each run is a train.py, whose command is printed.  A run that is done is not done again: give the same command to go on.  One
that was interrupted begins anew.  The score is the pixel FID against all training images, of images with seeds that nothing
else uses; stage 1: by dpm.  Minutes are of processor time, divided by the threads: what a run takes that has the machine to
itself.
"""

import argparse
import json
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import dist_util  # noqa: E402

import torch  # noqa: E402

import dataset  # noqa: E402
import defaults  # noqa: E402
import fid  # noqa: E402
import generator  # noqa: E402
import misc  # noqa: E402

SEED = 1_000_000  # the first of the images'
NFE = (1, 2, 5, 10)
SHARED = "--precision bf16 --sampling_freq 0 --train_eps0 1e-3 --dropout 0 --global_bsz 128 --bsz 128"
SHARED += " --lr 2e-3 --lr_rampup_steps 50 --lr_decay cosine --ema_decay 0.99"
STAGE_1 = f"{SHARED} --centered --sigma_data 0.6 --model_channels 16 --channel_mult 1 2 4 --num_blocks 2 --attn_resolutions"
STAGE_2 = f"{SHARED} --teacher_solver dpm --num_steps 20 --bank_size 2048 --bank_refresh_freq 32 --dsm_weight 0.5"

CHANGED = (
    f"import sys; sys.path.insert(0, {str(ROOT)!r}); import dist_util, sde, torch, train; {{}}; dist_util.launch(train.main)"
)
HUBER = "sde.DISTANCES['huber'] = lambda a, b: ((sde.l2(a, b) + {0}**2).sqrt() - {0}) * a[0].numel() ** 0.5"
# name: (what it is, flags that come after the base's, and what is changed in the code, which has no flag for it)
EITHER = {
    "base": ("the base", ""),
    "seed": ("the base, with another seed", "--seed 1"),
    "lr-1": ("learning rate 1e-3", "--lr 1e-3"),
    "lr-4": ("learning rate 4e-3", "--lr 4e-3"),
    "ema-95": ("EMA 0.95, not 0.99", "--ema_decay 0.95"),
    "batch": ("half the batch, twice the steps", "--global_bsz 64 --bsz 64 --train_steps {twice}"),
}
RUNS = {
    1: {
        **EITHER,
        "range": ("pixels in [0, 1], sigma_data 1: the reference's", "--centered false --sigma_data 1"),
        "sigma-1": ("sigma_data 1", "--sigma_data 1"),
        "constant": ("learning rate stays", "--lr_decay none"),
        "times": (
            "times from a logistic normal distribution, not even",
            "",
            "train.training_times = lambda n, of, source: "
            "torch.randn(n, generator=source, device=source.device).sigmoid().clamp(min=of.train_eps0)",
        ),
        "unweighted": ("the loss has weight 1 at all times", "", "sde.loss_weight = lambda t, sigma: torch.ones_like(t)"),
        "attention": ("attention at 7x7", "--attn_resolutions 7"),
        "dropout": ("dropout 0.1", "--dropout 0.1"),
        "wide": ("32 channels, a third of the steps", "--model_channels 32 --train_steps {third}"),
        "deep": ("4 blocks, half of the steps", "--num_blocks 4 --train_steps {half}"),
    },
    2: {
        **EITHER,
        "l2": ("squared distance, not huber", "--loss_norm l2"),
        "huber-3": ("a third of the huber distance's constant", "", HUBER.format(0.01)),
        "huber-10": ("ten times the huber distance's constant", "", HUBER.format(0.3)),
        "deis": ("the teacher's solver is deis", "--teacher_solver deis"),
        "one-step-1": ("a tenth of the pairs from noise to data, not 0.4", "--one_step_share 0.1"),
        "one-step-7": ("0.7 of the pairs from noise to data", "--one_step_share 0.7"),
        "dsm-0": ("no stage-1 loss", "--dsm_weight 0"),
        "dsm-2": ("stage-1 loss with weight 2, not 0.5", "--dsm_weight 2"),
        "bank-512": ("a bank of 512 solutions, not 2,048", "--bank_size 512"),
        "bank-8192": ("a bank of 8,192 solutions", "--bank_size 8192"),
        "kept": ("the bank is never renewed", "--bank_refresh_freq 0"),
        "K-10": ("a grid of 10 steps, not 20", "--num_steps 10"),
        "K-40": ("a grid of 40 steps", "--num_steps 40"),
    },
}


class Study:
    """Runs in a folder, and their scores."""

    def __init__(self, options, device):
        self.options, self.device, self.folder = options, device, Path(options.workdir)
        data = dataset.load(defaults.resolve({"data_name": "mnist", "data_path": options.data_path}).data)
        self.extract = fid.load_features("pixels", device)
        self.reference = fid.measure(data, self.extract)
        self.made_of = [data.fingerprint(), *([misc.file_hash(options.teacher)] if options.teacher else [])]

    def train(self, folder, flags, steps, change=None):
        """Minutes that train.py took, with a line of Python to run first."""
        shutil.rmtree(folder, ignore_errors=True)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [*shlex.split(flags), "--data_path", self.options.data_path, "--workdir", str(folder)]
        command += [] if "--train_steps" in command else ["--train_steps", str(steps)]
        command = [*(["-c", CHANGED.format(change)] if change else [str(ROOT / "train.py")]), *command]
        print("\n$ python " + shlex.join(command), file=sys.stderr, flush=True)
        done = subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL)
        if done.returncode:
            sys.exit(done.returncode)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
        return seconds / 60 / torch.get_num_threads()

    def score(self, checkpoint, steps):
        flags = {"num_steps": steps, "precision": "bf16"}
        flags |= {"ode_solver": "dpm"} if self.options.stage == "1" else {}
        trained = generator.load_model(checkpoint, flags, self.device)
        images = generator.Generated(trained, range(SEED, SEED + self.options.num))
        return fid.frechet_distance(self.reference, fid.measure(images, self.extract))

    def once(self, folder, work, *asked):
        """What work() returns, kept in a file of the folder, so that it is done once; an error if it is of something else."""
        path, asked = folder / "result.json", [self.options.num, *asked, *self.made_of]
        if not path.exists():
            misc.write_json(path, {"asked": asked, "found": work()})
        kept = json.loads(path.read_text())
        if kept["asked"] != asked:
            sys.exit(f"error: {path} is of {kept['asked']}, not of {asked}: remove {folder}, or choose another --workdir")
        return kept["found"]

    def choices(self):
        """A row for each choice of a stage."""
        options, stage = self.options, int(self.options.stage)
        mode = "--data_name mnist" if stage == 1 else f"--mode characteristic --teacher {shlex.quote(options.teacher)}"
        base, grid = (STAGE_1, (20,)) if stage == 1 else (STAGE_2, (1, 2, 5))
        print("| choice | minutes |" + "".join(f" {steps} |" for steps in grid) + "\n|---|---|" + "---|" * len(grid))
        for name, (title, flags, *change) in RUNS[stage].items():
            if options.runs and name not in options.runs:
                continue
            folder, steps = self.folder / f"stage-{stage}" / name, options.train_steps
            flags = f"{mode} {base} {flags.format(third=steps // 3, half=steps // 2, twice=steps * 2)}"

            def work():
                minutes = self.train(folder, flags, steps, *change)
                return {"minutes": minutes, "scores": [self.score(folder / "latest.pth", n) for n in grid]}

            found = self.once(folder, work, flags, steps, *change)
            scores = "".join(f" {value:.3f} |" for value in found["scores"])
            print(f"| {title} | {found['minutes']:.1f} |{scores}", flush=True)

    def curve(self):
        """Both objectives for the same time: a picture of the score of one step on the way, and a table of the end."""
        minutes, figure, (ax,) = None, *misc.new_figure(1, 5, 3.5)
        print("| objective | steps | minutes |" + "".join(f" {n} |" for n in NFE) + "\n|---|---|---|" + "---|" * len(NFE))
        for objective in ("trajectory", "semigroup"):
            base = f"--mode characteristic --teacher {shlex.quote(self.options.teacher)} {STAGE_2} --objective {objective}"
            base += " --keep 0 --dump_freq "
            folder, limit = self.folder / "curve" / objective, minutes

            def work():
                first, n = self.train(Path(f"{folder}-1"), base + "1", 1), self.options.train_steps  # with the bank
                if limit:
                    some = self.train(Path(f"{folder}-11"), base + "11", 11)
                    n = round((limit - first) / (some - first) * 10)
                freq = max(n // 8, 1)
                total = self.train(folder, base + str(freq), n)
                at = [i for i in range(freq, n + 1, freq) if i + freq <= n] + [n]
                on_the_way = [(first + (total - first) * i / n, self.score(folder / f"DDPMpp-{i:06d}.pth", 1)) for i in at]
                return {"curve": on_the_way, "steps": n, "scores": [self.score(folder / "latest.pth", k) for k in NFE]}

            found = self.once(folder, work, base, self.options.train_steps)
            minutes = found["curve"][-1][0]
            ax.plot(*zip(*found["curve"]), "o-", label=objective)
            scores = "".join(f" {value:.3f} |" for value in found["scores"])
            print(f"| `{objective}` | {found['steps']} | {minutes:.1f} |{scores}", flush=True)
        ax.set(xlabel="minutes of stage 2", ylabel=f"pixel FID, {self.options.num} images", yscale="log")
        ax.legend()
        misc.write_figure(self.folder / "curve.png", figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("1", "2", "curve"), required=True, help="what to compare")
    parser.add_argument("--teacher", help="denoiser of stages 2 and curve")
    parser.add_argument("--runs", nargs="+", help="names of some of a stage's runs (default: all)")
    parser.add_argument("--train_steps", type=int, default=300, help="of a run; of curve: of trajectory (default: 300)")
    parser.add_argument("--num", type=int, default=2000, help="images to score (default: 2000)")
    parser.add_argument("--data_path", default="data", help="where the data set is (default: data)")
    parser.add_argument("--workdir", default="logs/recipe", help="folder of the runs (default: logs/recipe)")
    options = parser.parse_args()
    known = {} if options.stage == "curve" else RUNS[int(options.stage)]
    if options.runs and not known.keys() >= set(options.runs):
        parser.error(f"--runs of stage {options.stage} are {', '.join(known) or 'none'}")
    if options.num < 2:
        parser.error("--num is at least 2: a covariance needs two images")
    if options.stage != "1" and not options.teacher:
        parser.error("stage 2 needs a denoiser: add --teacher")
    with dist_util.session() as device:
        study = Study(options, device)
        study.curve() if options.stage == "curve" else study.choices()


if __name__ == "__main__":
    dist_util.launch(main)
