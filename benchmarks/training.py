"""Images a second of a stage-1 step against the plain path.

The plain path is eager float32 with torch's dropout, and memory that is given back to the system: what a script does that
takes no care.  The way "fp32" is ours in the same precision.  Each way does the same step (forward, backward, clipping,
RAdam, moving average) on noise, in a process of its own, in turns.  The table has the medians of the rates, and of the ratios
to the plain path in a turn.  --compile adds compiled steps, and a minute or two for each.
"""

import argparse
import statistics

import timing
import torch

import checkpoint
import defaults
import network
import sde

SMALL = {"model_channels": 16, "channel_mult": (1, 2, 4), "num_blocks": 2, "attn_resolutions": ()}
NETWORKS = {  # name: (flags, images a step)
    "digits preset": ({"data_name": "digits"}, 128),
    "MNIST, 0.98M parameters": ({"data_name": "mnist", **SMALL}, 64),
    "mnist preset": ({"data_name": "mnist"}, 64),
    "cifar preset": ({"data_name": "cifar"}, 32),
}


def stepper(flags, bsz, precision, compiled):
    """A function that does one step and waits for it."""
    device, config = timing.DEVICE, defaults.resolve({**flags, "precision": precision})
    model = checkpoint.build_model(config).to(device).train()
    state = checkpoint.TrainingState(model, config, torch.zeros(1, device=device))
    if compiled:
        network.compile_in_place(model.net)
    data = config.data
    x = torch.randn(bsz, data.image_channels, data.image_size, data.image_size, device=device)
    t = torch.linspace(0.01, 0.99, bsz, device=device)
    return timing.training_step(state, lambda: sde.denoising_loss(model(x, t), x, t, config.network.sigma_data).mean())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--networks", nargs="+", default=list(NETWORKS)[:3], choices=NETWORKS, help="which (default: all but cifar)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="of each way, in turns (default: 5)")
    parser.add_argument("--compile", action="store_true", help="compiled steps too")
    options = parser.parse_args()
    print(f"{timing.machine()}, medians of {options.repeats}\n")
    print("| network, images a step | way | images/s | against the plain path |\n|---|---|---|---|", flush=True)
    ways = {"plain": ("fp32", False), "fp32": ("fp32", False), "bf16": ("bf16", False)}
    if options.compile:
        ways |= {"fp32, compiled": ("fp32", True), "bf16, compiled": ("bf16", True)}
    for name in options.networks:
        flags, bsz = NETWORKS[name]
        steps = {way: timing.Process(stepper, flags, bsz, *how, plain=way == "plain") for way, how in ways.items()}
        taken = timing.in_turns(steps, options.repeats, name)
        for way, seconds in taken.items():
            steps[way].close()
            rate, times = bsz / statistics.median(seconds), timing.ratio(taken, "plain", way)
            print(f"| {name}, {bsz} | {way} | {rate:.1f} | {times:.2f} |", flush=True)


if __name__ == "__main__":
    main()
