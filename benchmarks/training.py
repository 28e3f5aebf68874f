"""Images a second of a stage-1 step against the plain path: eager, float32, standard layout.

Each way does the same step (forward, backward, clipping, RAdam, moving average) on noise, in turns; the table has the medians,
and the ratio to the plain path in the same run.  --compile adds compiled steps, and a minute or two for each.
"""

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import checkpoint  # noqa: E402
import defaults  # noqa: E402
import sde  # noqa: E402

SMALL = {"model_channels": 16, "channel_mult": (1, 2, 4), "num_blocks": 2, "attn_resolutions": ()}
NETWORKS = {  # name: (flags, images a step)
    "digits preset": ({"data_name": "digits"}, 128),
    "MNIST, 0.98M parameters": ({"data_name": "mnist", **SMALL}, 64),
    "mnist preset": ({"data_name": "mnist"}, 64),
    "cifar preset": ({"data_name": "cifar"}, 32),
}


def stepper(flags, bsz, precision, compiled, device):
    """A function that does one step and waits for it."""
    config = defaults.resolve({**flags, "precision": precision})
    model = checkpoint.build_model(config).to(device).train()
    state = checkpoint.TrainingState(model, config, torch.zeros(1, device=device))
    if compiled:
        model.net.compile(dynamic=False)
    data = config.data
    x = torch.randn(bsz, data.image_channels, data.image_size, data.image_size, device=device)
    t = torch.linspace(0.01, 0.99, bsz, device=device)

    def step():
        state.optim.zero_grad(set_to_none=True)
        sde.denoising_loss(model(x, t), x, t, config.network.sigma_data).mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        state.optim.step()
        state.ema.update(model, 0)
        return norm.item()

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--networks", nargs="+", default=list(NETWORKS)[:3], choices=NETWORKS, help="which (default: all but cifar)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="of each way, in turns (default: 5)")
    parser.add_argument("--compile", action="store_true", help="compiled steps too")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.processor() or platform.machine()} CPU"
    print(f"torch {torch.__version__}, {where}, {torch.get_num_threads()} threads, medians of {options.repeats}\n")
    print("| network | way | images/s | against eager float32 |\n|---|---|---|---|", flush=True)
    ways = [("fp32", False), ("bf16", False)] + [("fp32", True), ("bf16", True)] * options.compile
    for name in options.networks:
        flags, bsz = NETWORKS[name]
        steps = {way: stepper(flags, bsz, *way, device) for way in ways}
        taken = {way: [] for way in ways}
        for turn in tqdm(range(options.repeats + 1), desc=name, leave=False):
            for way, step in steps.items():
                begun = time.perf_counter()
                step()
                if turn:  # the first one warms up, and compiles
                    taken[way].append(time.perf_counter() - begun)
        medians = {way: statistics.median(seconds) for way, seconds in taken.items()}
        for (precision, compiled), seconds in medians.items():
            ratio = medians[ways[0]] / seconds
            print(f"| {name} | {precision}{', compiled' * compiled} | {bsz / seconds:.1f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
