"""Images a second of a stage-1 step against the plain path.

The plain path is eager float32 with torch's dropout, and memory that is given back to the system: what a script does that
takes no care.  The way "fp32" is ours in the same precision.  Each way does the same step (forward, backward, clipping,
RAdam, moving average) on noise, in a process of its own, in turns.  The table has the medians of the rates, and of the ratios
to the plain path in a turn.  The last column is the operations of the network, of those that this machine does in a product
of bf16 matrices.  A compiled way takes a minute or two before its first step.
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
WAYS = {  # name: (precision, compiled)
    "plain": ("fp32", False),
    "fp32": ("fp32", False),
    "bf16": ("bf16", False),
    "fp32, compiled": ("fp32", True),
    "bf16, compiled": ("bf16", True),
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
    parser.add_argument("--bsz", type=int, help="images a step (default: 128 for the digits, 64 for MNIST, 32 for cifar)")
    parser.add_argument("--ways", nargs="+", default=["fp32", "bf16"], choices=WAYS, help="beside the plain one")
    options = parser.parse_args()
    most = timing.matrix_rate()
    print(f"{timing.machine()}, bf16 matrices {most / 1e12:.3g} TFLOP/s, medians of {options.repeats}\n")
    columns = ("network, images a step", "way", "images/s", "against the plain path", "TFLOP/s", "of bf16 matrices")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    ways = {way: how for way, how in WAYS.items() if way == "plain" or way in options.ways}
    for name in options.networks:
        flags, bsz = NETWORKS[name]
        bsz, flops = options.bsz or bsz, checkpoint.flops(defaults.resolve(flags))
        steps = {way: timing.Process(stepper, flags, bsz, *how, plain=way == "plain") for way, how in ways.items()}
        taken = timing.in_turns(steps, options.repeats, name)
        for way, seconds in taken.items():
            steps[way].close()
            rate, times = bsz / statistics.median(seconds), timing.ratio(taken, "plain", way)
            line = f"| {name}, {bsz} | {way} | {rate:.1f} | {times:.2f}"
            print(f"{line} | {rate * flops / 1e12:.3g} | {100 * rate * flops / most:.0f} % |", flush=True)


if __name__ == "__main__":
    main()
