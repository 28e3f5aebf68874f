"""Steps a second of stage 2: regression on the teacher's solutions, `trajectory`, against the authors' code's `semigroup`.

Each way does the same step of train.py (the objective, backward, clipping, RAdam, moving average) on noise, in a process of
its own, in turns.  The network is untrained, which changes no time.  A step of `trajectory` carries its share of the bank's
renewal, a batch of new solutions every --bank_refresh_freq steps.  The last column is the time to fill the bank once, in
memory.  The plain path is `semigroup` in eager float32 with torch's dropout, and memory that is given back to the system.
Compiled, `semigroup` still computes its moving average without.
"""

import argparse
import itertools
import statistics

import timing
import torch
import torch.nn.functional as F

import checkpoint
import defaults
import generator
import network
import sde
import train

PRESETS = {"digits": 128, "mnist": 64, "cifar": 32}  # images a step


def settings(name, objective, precision):
    """(configuration, that of the teacher)."""
    flags = {"data_name": name, "bsz": PRESETS[name], "global_bsz": PRESETS[name], "precision": precision}
    return defaults.resolve({**flags, "mode": "characteristic", "objective": objective}), defaults.resolve(flags)


def worker(name, objective, precision, compiled, plain, what):
    """A function that does a "step", or a "renewal" of one batch of the bank, and waits for it."""
    if plain:
        network.dropout = F.dropout
    device, (config, of_teacher) = timing.DEVICE, settings(name, objective, precision)
    config = config.replace("distil", bank_size=config.train.global_bsz)
    shape = (config.data.image_channels, config.data.image_size, config.data.image_size)
    teacher = checkpoint.build_model(of_teacher).to(device).eval().requires_grad_(False)
    model = checkpoint.build_model(config).to(device).train()
    state = checkpoint.TrainingState(model, config, torch.zeros(shape, device=device))
    if compiled:
        for net in (model.net, teacher.net):
            network.compile_in_place(net)
    teacher = generator.Trained(teacher, of_teacher, state.mean, 0, "")
    distance = sde.DISTANCES[config.distil.loss_norm]
    objective = train.OBJECTIVES[objective](model, config, teacher, distance, state.ema.module)
    objective.begin(0)
    x0, numbers = torch.randn(config.train.bsz, *shape, device=device), itertools.count()

    def step():
        state.optim.zero_grad(set_to_none=True)
        draws = torch.Generator(device).manual_seed(next(numbers))
        objective(x0, None, draws)[0].backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        state.optim.step()
        state.ema.update(model, 0)
        return norm.item()

    def renewal():
        objective.fill(next(numbers))
        return objective.bank.states.sum().item()

    return {"step": step, "renewal": renewal}[what]


def measure(ways, name, what, repeats):
    """{way: [seconds]} of the ways {(objective, title): (precision, compiled)}."""
    running = {}
    for (objective, title), how in ways.items():
        plain = title == "plain"
        running[objective, title] = timing.Process(worker, name, objective, *how, plain, what, keep_memory=not plain)
    taken = timing.in_turns(running, repeats, f"{name}, {what}")
    for process in running.values():
        process.close()
    return taken


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["digits", "mnist"], choices=PRESETS, help="(default: digits mnist)")
    parser.add_argument("--repeats", type=int, default=7, help="of each way, in turns (default: 7)")
    parser.add_argument("--compile", action="store_true", help="compiled steps too")
    options = parser.parse_args()
    print(f"{timing.machine()}, medians of {options.repeats}\n")
    print("| preset, images a step | way | steps/s | against plain `semigroup` | against `semigroup`, same way | the bank, s |")
    print("|---|---|---|---|---|---|", flush=True)
    kinds = {"fp32": ("fp32", False), "bf16": ("bf16", False)}
    if options.compile:
        kinds["bf16, compiled"] = ("bf16", True)
    ways = {(objective, title): how for objective in ("semigroup", "trajectory") for title, how in kinds.items()}
    for name, bsz in PRESETS.items():
        if name not in options.presets:
            continue
        taken = measure({("semigroup", "plain"): ("fp32", False), **ways}, name, "step", options.repeats)
        renewals = measure({way: how for way, how in ways.items() if way[0] == "trajectory"}, name, "renewal", 3)
        for (objective, title), seconds in taken.items():
            bank = "-"
            if objective == "trajectory":
                distil, renewal = settings(name, objective, "fp32")[0].distil, statistics.median(renewals[objective, title])
                bank = f"{distil.bank_size / bsz * renewal:.0f}"
                seconds[:] = [step + renewal / distil.bank_refresh_freq for step in seconds]
            times = [timing.ratio(taken, ("semigroup", other), (objective, title)) for other in ("plain", title)]
            line = f"| {name}, {bsz} | `{objective}` {title} | {1 / statistics.median(seconds):.3g}"
            print(f"{line} | {times[0]:.2f} | {times[1]:.2f} | {bank} |", flush=True)


if __name__ == "__main__":
    main()
