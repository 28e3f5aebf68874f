"""Steps a second of stage 2: regression on the teacher's solutions, `trajectory`, against the authors' code's `semigroup`.

Each way does the same step of train.py (the objective, backward, clipping, RAdam, moving average) on noise, in a process of
its own, in turns.  The network is untrained, which changes no time.  A step of `trajectory` carries its share of the bank's
renewal, a batch of new solutions every --bank_refresh_freq steps.  The last column is the time to fill the bank once, in
memory.  The plain path is `semigroup` in eager float32 with torch's dropout, and memory that is given back to the system;
for cifar it compares images by LPIPS, as the authors' code does, with random weights.  All else takes the default distance.
Compiled, `semigroup` still computes its moving average without.
"""

import argparse
import itertools
import statistics
import tempfile
from pathlib import Path
from types import SimpleNamespace

import timing
import torch
from torchvision.models import vgg16

import checkpoint
import defaults
import generator
import lpips
import network
import train

PRESETS = {"digits": 128, "mnist": 64, "cifar": 32}  # images a step


def settings(name, bsz, objective, precision, **flags):
    """(configuration, that of the teacher)."""
    shared = {"data_name": name, "bsz": bsz, "global_bsz": bsz, "precision": precision}
    return defaults.resolve({**shared, "mode": "characteristic", "objective": objective, **flags}), defaults.resolve(shared)


def distance(config, device):
    """--loss_norm; the weights of LPIPS are random."""
    with tempfile.TemporaryDirectory() as folder:
        run = SimpleNamespace(lpips_weights=Path(folder) / "lin.pt", vgg_weights=Path(folder) / "vgg.pth", download=False)
        if config.distil.loss_norm == "lpips":
            torch.save([torch.rand(channels) for channels in lpips.CHANNELS], run.lpips_weights)
            torch.save({f"features.{k}": v for k, v in vgg16().features.state_dict().items()}, run.vgg_weights)
        return train.make_distance(run, config, device)


def worker(name, bsz, objective, precision, compiled, norm, what):
    """A function that does a "step", or a "renewal" of one batch of the bank, and waits for it."""
    device, (config, of_teacher) = timing.DEVICE, settings(name, bsz, objective, precision, loss_norm=norm)
    config = config.replace("distil", bank_size=config.train.global_bsz)
    shape = (config.data.image_channels, config.data.image_size, config.data.image_size)
    teacher = checkpoint.build_model(of_teacher).to(device).eval().requires_grad_(False)
    model = checkpoint.build_model(config).to(device).train()
    state = checkpoint.TrainingState(model, config, torch.zeros(shape, device=device))
    if compiled:
        for net in (model.net, teacher.net):
            network.compile_in_place(net)
    teacher = generator.Trained(teacher, of_teacher, state.mean, 0, "")
    objective = train.OBJECTIVES[objective](model, config, teacher, distance(config, device), state.ema.module)
    objective.begin(0)
    x0, numbers = torch.randn(config.train.bsz, *shape, device=device), itertools.count()

    def loss():
        return objective(x0, None, torch.Generator(device).manual_seed(next(numbers)))[0]

    def renewal():
        objective.fill(next(numbers))
        return objective.bank.states.sum().item()

    return timing.training_step(state, loss) if what == "step" else renewal


def measure(ways, name, bsz, what, repeats):
    """{way: [seconds]} of the ways {(objective, title): (precision, compiled, distance)}."""
    running = {
        (objective, title): timing.Process(worker, name, bsz, objective, *how, what, plain=title == "plain")
        for (objective, title), how in ways.items()
    }
    taken = timing.in_turns(running, repeats, f"{name}, {what}")
    for process in running.values():
        process.close()
    return taken


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["digits", "mnist"], choices=PRESETS, help="(default: digits mnist)")
    parser.add_argument("--repeats", type=int, default=7, help="of each way, in turns (default: 7)")
    parser.add_argument("--bsz", type=int, help="images a step (default: 128 for the digits, 64 for MNIST, 32 for cifar)")
    kinds = ("fp32", "bf16", "bf16, compiled")
    parser.add_argument("--ways", nargs="+", default=kinds[:2], choices=kinds, help="(default: fp32 bf16)")
    options = parser.parse_args()
    print(f"{timing.machine()}, medians of {options.repeats}\n")
    print("| preset, images a step | way | steps/s | against plain `semigroup` | against `semigroup`, same way | the bank, s |")
    print("|---|---|---|---|---|---|", flush=True)
    kinds = {title: (title[:4], "compiled" in title, "huber") for title in options.ways}
    ways = {(objective, title): how for objective in ("semigroup", "trajectory") for title, how in kinds.items()}
    for name in options.presets:
        bsz, norm = options.bsz or PRESETS[name], "lpips" if name == "cifar" else "huber"
        taken = measure({("semigroup", "plain"): ("fp32", False, norm), **ways}, name, bsz, "step", options.repeats)
        renewals = measure({way: how for way, how in ways.items() if way[0] == "trajectory"}, name, bsz, "renewal", 3)
        for (objective, title), seconds in taken.items():
            bank = "-"
            if objective == "trajectory":
                distil, renewal = (
                    settings(name, bsz, objective, "fp32")[0].distil,
                    statistics.median(renewals[objective, title]),
                )
                bank = f"{distil.bank_size / bsz * renewal:.0f}"
                seconds[:] = [step + renewal / distil.bank_refresh_freq for step in seconds]
            times = [timing.ratio(taken, ("semigroup", other), (objective, title)) for other in ("plain", title)]
            line = f"| {name}, {bsz} | `{objective}` {title} | {1 / statistics.median(seconds):.3g}"
            print(f"{line} | {times[0]:.2f} | {times[1]:.2f} | {bank} |", flush=True)


if __name__ == "__main__":
    main()
