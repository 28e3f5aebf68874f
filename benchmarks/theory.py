"""The paper's theory, measured on small targets: the order of solvers, and the rate at which one-step generation learns.

  python benchmarks/theory.py
  python benchmarks/theory.py --only rate --points 100000 --dest logs

The target is a mixture of four Gaussians in the plane.  Its denoiser is known, so the exact flow map is too.

orders  RMS distance between where K steps of a solver of sde.py lead and where the exact flow map leads, from the same noise:
        on the even grid of times and on a curved one.  Beside them the exact flow map itself, in K pieces, and one evaluation
        of a flow map that train.py's Trajectory regresses on K steps of deis.
rate    2-Wasserstein distance between images of a generator and of the target, 2,000 of each, by exact assignment, against the
        number of training points.  The plane is turned into spaces of 2, 16 and 64 dimensions, so the intrinsic dimension
        stays 2.  Both stages are train.py's objectives, with an MLP in the place of the U-Net.

Prints tables, and draws theory-orders.png and theory-rate.png.  What was seen is in docs/theory.md.
"""

import argparse
import io
import itertools
import math
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr
from pathlib import Path

import timing
import torch
from scipy.integrate import solve_ivp
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from torch import nn
from tqdm import tqdm

import checkpoint
import defaults
import generator
import misc
import network
import sde
import train

STEPS = (4, 8, 16, 32, 64, 128, 256)  # of the solvers
GRIDS = {1.0: "even grid (rho 1)", 2.0: "curved grid (rho 2)"}
DIMENSIONS = (2, 16, 64)
TAUGHT = (4, 8, 16, 32)  # deis steps that flow maps are regressed on
T_MAX, T_MIN = 1 - 1e-3, 1e-3
EXACT, FITTED, PLAIN = "exact flow map, K pieces", "flow map regressed on deis", "the training points"
OUT = ", out of the plane"
PARTS = ("", ", in the plane", OUT, ", from its teacher's ODE")


# ------------------------------------------------------------------------------------------------------------ the target


class Mixture:
    """Gaussians of standard deviation `std` around `means` (m, 2), of mean 0 in all: denoiser and flow map are known."""

    weights = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    means = torch.tensor([[0.85, 0.03], [-0.55, 0.83], [-1.05, -0.77], [0.35, -1.07]], dtype=torch.float64)
    std = 0.3

    def sample(self, n, generator):
        """(n, 2) points."""
        return self.around(torch.multinomial(self.weights, n, replacement=True, generator=generator), generator)

    def even_sample(self, n, generator):
        """The same with as many points of each component as its weight says: chance moves no mass from one to another."""
        shares = (self.weights.cumsum(0) * n).round().diff(prepend=torch.zeros(1)).long()
        return self.around(torch.repeat_interleave(torch.arange(len(shares)), shares), generator)

    def around(self, component, generator):
        return self.means[component] + self.std * torch.randn(len(component), 2, generator=generator, dtype=torch.float64)

    def sigma(self):
        """Standard deviation of a coordinate, in the mean over both."""
        return math.sqrt(self.std**2 + (self.weights @ self.means.square().sum(1)) / 2)

    def denoise(self, x, t, label=None):
        """E[X0 | Xt = x] for x (B, 2), t (B,): the components' posterior means, by the posterior weights of the components."""
        a, b2 = sde.like(sde.alpha(t), x), sde.like(sde.beta(t), x).square()
        variance = (a * self.std) ** 2 + b2
        squares = (x[:, None] - a[:, None] * self.means).square().sum(2)
        posterior = torch.softmax(self.weights.log() - squares / (2 * variance), 1)
        return b2 / variance * (posterior @ self.means) + a * self.std**2 / variance * x

    def flow_map(self, x, t, s):
        """Where the ODE carries x (B, 2), float64, from t to s, the same for all: Dormand-Prince, order 8, tolerance 1e-10."""

        def velocity(time, flat):
            y, times = torch.from_numpy(flat).view_as(x), torch.full((len(x),), time, dtype=torch.float64)
            return sde.velocity(y, self.denoise(y, times), times).flatten().numpy()

        solved = solve_ivp(velocity, (t[0].item(), s[0].item()), x.flatten().numpy(), method="DOP853", rtol=1e-10, atol=1e-11)
        return torch.from_numpy(solved.y[:, -1]).view_as(x)


TARGET = Mixture()


def draw(n, purpose, seed):
    """(n, 2) points of the target for one purpose, the same for every dimension; an even sample for the comparison."""
    sample = TARGET.even_sample if purpose == "comparison" else TARGET.sample
    return sample(n, torch.Generator().manual_seed(misc.derive_seed(seed, purpose)))


def rms(difference):
    """Root of the mean of the squared length of (B, d)."""
    return difference.square().sum(1).mean().sqrt().item()


def wasserstein(a, b):
    """2-Wasserstein distance of two sets of as many points, (n, d) each: the best of all n! assignments."""
    squares = cdist(a.double(), b.double(), "sqeuclidean")
    return math.sqrt(squares[linear_sum_assignment(squares)].mean())


# ------------------------------------------------------------------------------------------- an MLP, and its training


class Block(nn.Module):
    """Residual layer (B, width) -> (B, width), which the embeddings of the times scale and shift."""

    def __init__(self, width, two_times):
        super().__init__()
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, width)
        self.affine = nn.Linear(16, 3 * width)
        self.affine_s = nn.Linear(16, 3 * width) if two_times else None

    def forward(self, x, emb, emb_s):
        affine = self.affine(emb) + (0 if emb_s is None else self.affine_s(emb_s))
        keep, scale, shift = affine.chunk(3, 1)
        return x * (1 + keep) + self.outer(nn.functional.silu(self.inner(x) * (1 + scale) + shift))


class MLP(nn.Module):
    """In the place of network.UNet, for points (B, d); its names are those that network.start_from_teacher looks for."""

    def __init__(self, d, two_times, width=128, blocks=3):
        super().__init__()
        self.input, self.output = nn.Linear(d, width), nn.Linear(width, d)
        self.blocks = nn.ModuleList(Block(width, two_times) for _ in range(blocks))
        nn.init.zeros_(self.output.weight)

    def forward(self, x, noise, noise_s=None, label=None):
        emb, emb_s = (None if c is None else self.embed(c) for c in (noise, noise_s))
        x = self.input(x)
        for block in self.blocks:
            x = block(x, emb, emb_s)
        return self.output(x)

    @staticmethod
    def embed(c):
        """(B,) to (B, 16): sines and cosines of periods from 4 pi down."""
        angles = c.float()[:, None] * 2.0 ** torch.arange(-1, 7)
        return torch.cat([angles.sin(), angles.cos()], 1)


def settings(mode, steps, seed, **flags):
    """Those of train.py, with the digits' preset for what is not said here."""
    shared = {"train_steps": steps, "global_bsz": 256, "bsz": 256, "lr": 0.02, "ema_decay": 0.99, "seed": seed}
    shared |= {"sigma_data": TARGET.sigma(), "time_input": "log_snr", "M": 1.0, "precision": "fp32", "train_eps0": T_MIN}
    shared |= {"teacher_solver": "deis", "time_grid": "t", "grid_spacing": "t", "one_step_share": 0.4}
    return defaults.resolve({"mode": mode, **shared, "loss_norm": "l2", "train_eps1": 1 - T_MAX, **flags})


def fit(config, d, data, teacher=None):
    """The Trained of an objective of train.py, on points (n, d); where the teacher is a network, it starts from that."""
    torch.manual_seed(config.train.seed)
    net = MLP(d, two_times=teacher is not None)
    if teacher and isinstance(teacher.model, network.Denoiser):
        network.start_from_teacher(net, teacher.model.net)
    model = network.Denoiser(net, config.network.sigma_data, config.network.M, config.network.time_input)
    state = checkpoint.TrainingState(model, config, data.mean(0))
    kind = train.Trajectory if teacher else train.Denoising
    objective = kind(model, config, teacher, sde.DISTANCES[config.distil.loss_norm], state.ema.module)
    with redirect_stderr(io.StringIO()):  # the bank's own progress bar
        objective.begin(0)
    noise = torch.Generator()

    def loss():
        train.seed_round(noise, config.train.seed, state.step, 0)
        return objective(data[torch.randint(len(data), (config.train.global_bsz,), generator=noise)], None, noise)[0]

    take_step = timing.training_step(state, loss)
    while state.step < config.train.train_steps:
        objective.start_step(state.step)
        for group in state.optim.param_groups:
            group["lr"] = train.learning_rate(state.step, config.train)
        take_step()
    return generator.Trained(state.ema.module, config, state.mean, state.step, "")


# ------------------------------------------------------------------------------------------------------------- orders


def characteristics(end):
    """1,000 states at T_MAX, and where the exact flow map carries them, at the time `end` > 0."""
    x = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = sde.start(x, torch.zeros(2), 1 - T_MAX)
    return x, TARGET.flow_map(x, *torch.tensor([[T_MAX], [end]], dtype=torch.float64))


def solver_errors(rho):
    """{solver: [RMS error of K steps to T_MIN for K in STEPS]}, and that of the exact flow map in K pieces."""
    (x, exact), errors = characteristics(T_MIN), {}
    for name, K in itertools.product([*sde.SOLVERS, EXACT], STEPS):
        step = TARGET.flow_map if name == EXACT else sde.solver(name, TARGET.denoise)
        *_, end = sde.sample(step, x, sde.grid(K + 1, T_MAX, T_MIN, rho)[:-1])  # the step to 0 has an order of its own
        errors.setdefault(name, []).append(rms(end - exact))
    return errors


def regressed_errors(job):
    """RMS errors at t = 0 of K deis steps on the curved grid and one to 0, and of a flow map regressed on them."""
    K, steps = job
    config = settings("characteristic", steps, 0, grid_steps=K + 1, grid_rho=2.0)
    teacher = generator.Trained(TARGET.denoise, config, torch.zeros(2), 0, "")  # exact, but for its steps
    flow = fit(config, 2, draw(100000, "training", 0).float(), teacher).model.flow_map
    x, exact = characteristics(1e-9)
    *_, taught = sde.sample(sde.solver("deis", TARGET.denoise), x, sde.grid(K + 1, T_MAX, T_MIN, 2.0))
    with torch.no_grad():
        *_, made = sde.sample(flow, x.float(), sde.grid(1, T_MAX, T_MIN))
    return rms(taught - exact), rms(made - exact)


def measure_orders(options, pool):
    found = zip(*each(regressed_errors, [(K, options.steps) for K in TAUGHT], "flow maps", pool))
    regressed = dict(zip(("deis", FITTED), found))
    figure, axes = misc.new_figure(2, 10, 4)
    for ax, (rho, title) in zip(axes, GRIDS.items()):
        errors = solver_errors(rho)
        rows = {name: [f"{error:.2g}" for error in found] for name, found in errors.items()}
        for name in sde.SOLVERS:
            rows[name].append(f"{math.log2(errors[name][-2] / errors[name][-1]):.2f}")
            ax.plot(STEPS, errors[name], ".-", label=name)
        print_table(f"RMS error, {title}", [*(f"K = {K}" for K in STEPS), "order"], rows)
        for order, first in ((1, 0.6), (2, 0.3)):
            ax.plot(STEPS, [first * (STEPS[0] / K) ** order for K in STEPS], ":", color="grey", zorder=0)
            ax.text(STEPS[0], first, f"order {order} ", color="grey", ha="right")
        ax.set(title=title, xlabel="steps K", ylabel="RMS error", ylim=(8e-6, 30), xlim=(2.1, 300))
        finish(ax, STEPS)
    axes[1].plot(TAUGHT, regressed[FITTED], "ks", fillstyle="none", label=FITTED)
    axes[1].legend(fontsize="small")
    misc.write_figure(options.dest / "theory-orders.png", figure)
    rows = {name: [f"{error:.2g}" for error in errors] for name, errors in regressed.items()}
    print_table("RMS error at t = 0, curved grid", [f"K = {K}" for K in TAUGHT], rows)


# --------------------------------------------------------------------------------------------------------------- rate


def floors(job):
    """Distances from the points of the target of others of the target, and of n training points, each as often as needed."""
    seed, points, images = job
    sets = [draw(images, "floor", seed), *(draw(n, "training", seed)[torch.arange(images) % n] for n in points)]
    return [wasserstein(x, draw(images, "comparison", seed)) for x in sets]


def learned(job):
    """Both stages, trained on n points in d dimensions: the distance, its parts in and out of the plane, and that to the ODE.

    A coordinate has the target's variance for any d, as a pixel has, so the plane is stretched by sqrt(d/2).  Distances are
    divided by that.  What is out of the plane costs the same for any assignment: its mean square adds to that in the plane.
    The last is RMS, from the same noises, between one evaluation and 20 dpm steps of the denoiser, which taught it.
    """
    d, n, seed, steps, images = job
    noise = torch.Generator().manual_seed(misc.derive_seed(seed, "noise", d))
    stretch = math.sqrt(d / 2)
    plane = torch.linalg.qr(torch.randn(d, d, generator=noise, dtype=torch.float64))[0][:2]  # orthonormal rows
    data = (draw(n, "training", seed) @ plane * stretch).float()
    denoiser = fit(settings("denoiser", steps, seed), d, data)
    config = settings("characteristic", math.ceil(steps / 2), seed, grid_rho=2.0, teacher_solver="dpm")
    flow = fit(config, d, data, denoiser)
    x = sde.start(torch.randn(images, d, generator=noise), denoiser.mean, 1 - T_MAX)
    with torch.no_grad():
        *_, made = sde.sample(flow.model.flow_map, x, sde.grid(1, T_MAX, T_MIN))
        *_, taught = sde.sample(sde.solver("dpm", denoiser.model), x, sde.grid(config.distil.grid_steps, T_MAX, T_MIN, 2.0))
    made, taught = made.double() / stretch, taught.double() / stretch
    inside, outside = wasserstein(made @ plane.T, draw(images, "comparison", seed)), rms(made - made @ plane.T @ plane)
    return math.hypot(inside, outside), inside, outside, rms(made - taught)


def slope(points, distances):
    """Of the line through (log n, log distance), least squares; "" for less than two points."""
    logs = [[math.log(value) for value in values] for values in (points, distances)]
    return f"{statistics.linear_regression(*logs).slope:.2f}" if len(points) > 1 else ""


def measure_rate(options, pool):
    points, seeds, images = options.points, range(options.seeds), options.images
    jobs = list(itertools.product(DIMENSIONS, points, seeds, [options.steps], [images]))
    found = dict(zip(jobs, each(learned, jobs, "generators", pool)))
    floor, *plain = zip(*each(floors, [(seed, points, images) for seed in seeds], "floors", pool))
    floor, curves = summary(floor), {PLAIN: [summary(values) for values in plain]}
    for d, (part, name) in itertools.product(DIMENSIONS, enumerate(PARTS)):
        values = [[found[d, n, seed, options.steps, images][part] for seed in seeds] for n in points]
        curves[f"d = {d}{name}"] = [summary(x) for x in values]
    rows = {}
    for name, curve in curves.items():
        rows[name] = [f"{mean:.3f} ± {std:.3f}" for mean, std in curve]
        if not name.endswith(PARTS[2:]):
            above = [(n, math.sqrt(mean**2 - floor[0] ** 2)) for n, (mean, _) in zip(points, curve) if mean > 1.25 * floor[0]]
            rows[name] += [slope(points, [mean for mean, _ in curve]), slope(*zip(*above)) if above else ""]
    print_table("2-Wasserstein distance", [*(f"n = {n}" for n in points), "slope", "slope above the floor"], rows)
    print(f"The floor, {images} points of the target against {images} others: {floor[0]:.3f} ± {floor[1]:.3f}\n")
    draw_rate(points, curves, floor, options.dest / "theory-rate.png")


def draw_rate(points, curves, floor, path):
    """Picture of {name: [(mean, deviation) for each n]}."""
    figure, (ax,) = misc.new_figure(1, 7, 4.5)
    ax.errorbar(points, *zip(*curves[PLAIN]), fmt="k.--", capsize=3, label=PLAIN)
    for i, d in enumerate(DIMENSIONS):
        ax.errorbar(points, *zip(*curves[f"d = {d}"]), fmt=f"C{i}.-", capsize=3, label=f"one evaluation, d = {d}")
        if d > 2:
            ax.errorbar(points, *zip(*curves[f"d = {d}{OUT}"]), fmt=f"C{i}.:", capsize=3, label=f"its part{OUT}, d = {d}")
    ax.axhline(floor[0], color="grey", linestyle="-.", label="two samples of the target")
    ax.set(xlabel="training points n", ylabel="2-Wasserstein distance", ylim=(0.02, 0.6))
    finish(ax, points)
    ax.set_yticks(*[[0.02, 0.05, 0.1, 0.2, 0.5]] * 2)
    misc.write_figure(path, figure)


def summary(values):
    """Mean and standard deviation over the seeds."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


# ---------------------------------------------------------------------------------------------------------- the program


def each(function, jobs, desc, pool):
    """[function(job) for job in jobs], in the processes of a pool."""
    return list(tqdm(pool.map(function, jobs), desc, len(jobs)))


def print_table(title, columns, rows):
    """{name: [cells]} as Markdown; missing cells are empty."""
    print("| " + " | ".join([title, *columns]) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for name, cells in rows.items():
        print("| " + " | ".join([name, *cells, *[""] * (len(columns) - len(cells))]) + " |")
    print(flush=True)


def finish(ax, ticks):
    """Logarithmic axes, with `ticks` on the lower one."""
    ax.set(xscale="log", yscale="log")
    ax.set_xticks(ticks, ticks)
    ax.minorticks_off()
    ax.legend(fontsize="small")


MEASUREMENTS = {"orders": measure_orders, "rate": measure_rate}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=MEASUREMENTS, help="one of the two (default: both)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of the rate, for its error bars (default: 3)")
    parser.add_argument("--points", type=int, nargs="+", default=[50, 150, 500, 2000], help="n (default: 50 150 500 2000)")
    parser.add_argument("--images", type=int, default=2000, help="in each set that is compared (default: 2000)")
    parser.add_argument("--steps", type=int, default=1000, help="of training; half in the rate's stage 2 (default: 1000)")
    parser.add_argument("--processes", type=int, default=2, help="of one thread each (default: 2)")
    parser.add_argument("--dest", type=Path, default=Path("assets"), help="folder for the pictures (default: assets)")
    options, begun = parser.parse_args(), time.perf_counter()
    torch.set_num_threads(1)
    options.dest.mkdir(parents=True, exist_ok=True)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, spawn, torch.set_num_threads, (1,)) as pool:
        for name, measure in MEASUREMENTS.items():
            if options.only in (None, name):
                measure(options, pool)
    print(f"{timing.machine()} in each of {options.processes} processes, {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
