"""What the benchmarks share: ways to do the same thing, timed in turns, so that a noisy machine is noisy to all of them."""

import multiprocessing
import platform
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dist_util

import torch
from tqdm import tqdm

import network

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine():
    """What a table was measured on, in a line."""
    where = torch.cuda.get_device_name(DEVICE) if DEVICE.type == "cuda" else f"{platform.processor() or platform.machine()} CPU"
    return f"torch {torch.__version__}, {where}, {torch.get_num_threads()} threads"


def matrix_rate(repeats=10):
    """Operations a second of a product of two bf16 matrices: the most that this machine computes.  The best of several."""
    n = 8192 if DEVICE.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=DEVICE, dtype=torch.bfloat16)
    return 2 * n**3 / min(stopwatch(lambda: (a @ b)[0, 0].item())() for _ in range(repeats))


class Process:
    """make(*arguments) in a process of its own, as a function of no arguments, which returns the seconds that a call took.

    Ways that are timed in turns do not share memory, caches of kernels or settings then.  A `plain` one has torch's dropout,
    and gives memory back to the system.
    """

    def __init__(self, make, *arguments, plain=False):
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=self.work, args=(other, make, arguments, plain), daemon=True)
        self.process.start()

    @staticmethod
    def work(pipe, make, arguments, plain):
        if plain:
            network.dropout = torch.nn.functional.dropout
        elif DEVICE.type == "cpu":
            dist_util.keep_memory()
        call = make(*arguments)
        repeats = 5 if DEVICE.type == "cuda" else 1  # a GPU that had to wait for its turn takes time to speed up
        while pipe.recv():
            pipe.send(stopwatch(lambda: [call() for _ in range(repeats)])() / repeats)

    def __call__(self):
        self.pipe.send(True)
        return self.pipe.recv()

    def close(self):
        self.pipe.send(False)
        self.process.join()


def stopwatch(function):
    """The same function, but it returns the seconds that it took."""

    def call():
        begun = time.perf_counter()
        function()
        return time.perf_counter() - begun

    return call


def training_step(state, loss):
    """A function that does a step of train.py on a TrainingState, loss() being what it differentiates, and waits for it."""

    def step():
        state.optim.zero_grad(set_to_none=True)
        loss().backward()
        norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), 1.0)
        state.optim.step()
        state.ema.update(state.model, state.step)
        state.step += 1
        return norm.item()

    return step


def in_turns(ways, repeats, desc):
    """{name: function that returns seconds} -> {name: [seconds of each turn]}, without the two first turns, which warm up."""
    taken = {name: [] for name in ways}
    with tqdm(total=(repeats + 2) * len(ways), desc=desc, leave=False) as bar:
        for turn in range(repeats + 2):
            for name, function in ways.items():
                seconds = function()
                if turn > 1:
                    taken[name].append(seconds)
                bar.update()
    return taken


def ratio(taken, plain, way):
    """How many times as fast a way is as the plain one: the median over the turns of the ratio in a turn."""
    return statistics.median(a / b for a, b in zip(taken[plain], taken[way]))
