"""Train the denoiser (stage 1) or distil its ODE into the flow map (stage 2).

python train.py --data_name digits --mode denoiser --workdir logs/digits-denoiser
python train.py --data_name digits --mode characteristic --teacher logs/digits-denoiser/DDPMpp-000600.pth
torchrun --nproc_per_node=4 train.py --data_name cifar --mode denoiser --bsz 256
"""

import dataclasses
import fcntl
import json
import math
import os
import shutil
import socket
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

import defaults
import dist_util
import misc
import network
import sde
from defaults import setting
from dist_util import LoneError, Stopped, UserError


@dataclass(frozen=True)
class Run:
    """files"""

    workdir: str | None = setting(None, "folder for checkpoints, metrics and pictures; logs/{data_name}-{mode} if left out")
    teacher: str | None = setting(None, "checkpoint of the denoiser to distil (mode characteristic)")
    resume: str | None = setting(
        None, "checkpoint that a new --workdir begins from; a --workdir that holds a run is continued without it"
    )
    fresh: bool = setting(False, "begin anew; refused where --workdir holds a run, unless with --force")
    force: bool = setting(False, "with --fresh: remove the checkpoints, metrics and pictures of the run that --workdir holds")
    keep: int = setting(5, "checkpoints to keep in --workdir, the last ones; 0 keeps all")
    ref_path: str | None = setting(None, "npz file with the reference's statistics (fid.py --mode ref), for --fid_freq")
    inception_weights: str | None = setting(
        None,
        f"file of the InceptionV3's weights, if --ref_path needs it; weights/{misc.WEIGHTS['inception_weights'][0]} if "
        "left out",
    )
    lpips_weights: str | None = setting(
        None, f"file of LPIPS's channel weights, for --loss_norm lpips; weights/{misc.WEIGHTS['lpips_weights'][0]} if left out"
    )
    vgg_weights: str | None = setting(
        None, f"file of the VGG16's weights, for --loss_norm lpips; weights/{misc.WEIGHTS['vgg_weights'][0]} if left out"
    )
    download: bool = setting(False, "fetch weights where they are published, if their files are missing")


# ----------------------------------------------------------------------------------------------------- objectives
# An objective is called with a round's images (B, C, H, W), one-hot labels or None, and a generator on their device; it
# returns the scalar to differentiate and what to log, {name: scalar tensor}.


def normal(like, generator):
    return torch.randn(like.shape, generator=generator, device=like.device)


def training_times(n, train, generator):
    """(n,) times, uniform on [train_eps0, 1]."""
    t = torch.rand(n, generator=generator, device=generator.device)
    return train.train_eps0 + (1 - train.train_eps0) * t


class Denoising:
    """Stage 1."""

    def __init__(self, model, config):
        self.model, self.config = model, config

    def __call__(self, x0, label, generator):
        t = training_times(len(x0), self.config.train, generator)
        d = self.model(sde.interpolate(x0, normal(x0, generator), t), t, label=label)
        loss = sde.denoising_loss(d, x0, t, self.config.network.sigma_data).mean()
        return loss, {"loss": loss}


class Distillation:
    """What the two objectives of stage 2 share: the grid, the teacher, and adding the stage-1 loss."""

    def __init__(self, model, config, teacher, distance, device):
        train, sampling = config.train, config.sampling
        self.model, self.config, self.teacher = model, config, teacher
        self.ts = sde.grid(sampling.num_steps, 1 - train.train_eps1, train.train_eps0, sampling.rho).to(device)
        self.distance = distance
        self.solver = sde.SOLVERS[config.distil.teacher_solver]

    def teacher_step(self, label):
        return lambda x, t, s: self.solver(lambda y, r: self.teacher.model(y, r, label=label), x, t, s)

    def start_step(self, step):
        """Called before each optimizer step."""

    def combine(self, distances, denoising):
        """The scalar to differentiate; the adaptive weight is that of this rank and round."""
        distil, distance = self.config.distil, distances.mean()
        if not len(denoising) or not distil.dsm_weight:
            return distance, {"loss": distance, "distance": distance}
        dsm, weight = denoising.mean(), distil.dsm_weight
        if distil.adaptive_weight:
            weight = weight * sde.adaptive_weight(distance, dsm, self.model.net.last_layer)
        loss = distance + weight * dsm
        return loss, {"loss": loss, "distance": distance, "denoising": dsm, "weight": torch.as_tensor(weight)}


class Trajectory(Distillation):
    """The paper's regression on the teacher's solutions, which are kept in a bank on the device.

    The bank is a ring of batches of solutions; batch b is a function of (seed, rank, b) alone, and which batches it holds
    at a step is a function of the step.
    """

    def __init__(self, model, config, teacher, distance, device, start):
        super().__init__(model, config, teacher, distance, device)
        distil, self.bsz = config.distil, config.train.bsz
        self.n_dsm = round(distil.dsm_share * self.bsz) if distil.dsm_weight else 0
        K, shape = config.sampling.num_steps, teacher.mean.shape
        self.pairs = sde.pair_probabilities(K, distil.one_step_share, distil.to_data_share).flatten().to(device)
        self.slots = math.ceil(distil.bank_size / self.bsz)
        dtype = getattr(torch, distil.bank_dtype)
        self.bank = torch.empty(K + 1, self.slots * self.bsz, *shape, dtype=dtype, device=device)
        self.labels = torch.zeros(self.slots * self.bsz, dtype=torch.long, device=device)
        self.first = self.replaced(start)

    def fill_bank(self):
        """Called once the run is sure to begin, since it takes time."""
        with misc.progress(self.slots * self.bsz, "teacher's solutions") as bar:
            for batch in range(self.first, self.first + self.slots):
                self.fill(batch)
                bar.update(self.bsz)

    def replaced(self, step):
        """How many batches have been replaced before this step."""
        freq = self.config.distil.bank_refresh_freq
        return step // freq if freq else 0

    @torch.no_grad()
    def fill(self, batch):
        seed = misc.derive_seed(self.config.train.seed, "bank", dist_util.rank(), batch)
        generator = torch.Generator(self.ts.device).manual_seed(seed)
        place = slice(batch % self.slots * self.bsz, (batch % self.slots + 1) * self.bsz)
        z = torch.randn((self.bsz, *self.teacher.mean.shape), generator=generator, device=self.ts.device)
        x = sde.start(z, self.teacher.mean, self.config.train.train_eps1)
        label_dim = self.config.network.label_dim
        if label_dim:
            self.labels[place] = torch.randint(label_dim, (self.bsz,), generator=generator, device=x.device)
        step = self.teacher_step(misc.one_hot(self.labels[place], label_dim))
        for k, state in enumerate(sde.sample(step, x, self.ts)):
            self.bank[k, place] = state.to(self.bank.dtype)

    def start_step(self, step):
        while self.first < self.replaced(step):
            self.fill(self.first + self.slots)
            self.first += 1

    def __call__(self, x0, label, generator):
        K = len(self.ts) - 1
        n_dsm = self.n_dsm
        n = len(x0) - n_dsm
        pair = torch.multinomial(self.pairs, n, replacement=True, generator=generator)
        k, l = pair // (K + 1), pair % (K + 1)
        which = torch.randint(self.bank.shape[1], (n,), generator=generator, device=k.device)
        states = self.bank[torch.stack([k, l]), which].to(x0.dtype)
        x0 = x0[:n_dsm]
        t, z = training_times(n_dsm, self.config.train, generator), normal(x0, generator)
        if label is not None:
            label = torch.cat([misc.one_hot(self.labels[which], self.config.network.label_dim), label[:n_dsm]])
        denoise = lambda x, t, s: self.model(x, t, s, label)  # noqa: E731
        sigma, on_data = self.config.network.sigma_data, self.config.distil.loss_norm == "lpips"
        return self.combine(
            *sde.trajectory_losses(denoise, states, k, l, self.ts, x0, z, t.to(self.ts.dtype), sigma, self.distance, on_data)
        )


class Semigroup(Distillation):
    """What the authors' released code runs: consistency of the flow map along a few steps of the teacher."""

    def __init__(self, model, config, teacher, distance, device, ema):
        super().__init__(model, config, teacher, distance, device)
        self.ema = ema.module
        lengths = torch.arange(1, min(config.distil.teacher_steps, len(self.ts) - 1) + 1, dtype=torch.float64)
        uniform = config.distil.teacher_steps_strategy == "uniform"
        self.lengths = (torch.ones_like(lengths) if uniform else lengths).to(device)

    def __call__(self, x0, label, generator):
        K, n = len(self.ts) - 1, len(x0)
        steps = 1 + torch.multinomial(self.lengths, 1, generator=generator)  # one number for the batch, as in CTM
        i = (torch.rand(n, generator=generator, device=x0.device) * (K + 1 - steps)).long()
        j = i + steps
        k = j + (torch.rand(n, generator=generator, device=x0.device) * (K + 1 - j)).long()
        z, z_dsm = normal(x0, generator), normal(x0, generator)
        t = training_times(n, self.config.train, generator)
        twice = None if label is None else torch.cat([label, label])
        denoise = lambda x, t, s: self.model(x, t, s, label if len(x) == n else twice)  # noqa: E731
        return self.combine(
            *sde.semigroup_losses(
                denoise,
                lambda x, t, s: self.ema(x, t, s, label),
                self.teacher_step(label),
                *(x0, z, i, j, k, self.ts, z_dsm, t.to(self.ts.dtype)),
                self.config.network.sigma_data,
                self.distance,
            )
        )


def make_distance(run, config, device):
    """--loss_norm as a function of two batches of images in the model's range, (B, C, H, W) each -> (B,).

    LPIPS as the reference has it: average pooling, images of fewer than 256 pixels resized to 224, grey repeated.
    """
    if config.distil.loss_norm != "lpips":
        return sde.DISTANCES[config.distil.loss_norm]
    import lpips  # which imports torchvision, slowly

    files = [misc.weights_file(name, getattr(run, name), run.download)[0] for name in ("lpips_weights", "vgg_weights")]

    def load():
        try:
            return lpips.LPIPS(*files, pooling="avg").to(device)
        except (ValueError, OSError) as error:
            raise UserError(f"{error}") from error

    perceptual, centered = dist_util.agree(load), config.data.centered
    return lambda a, b: perceptual(*(lpips.at_vgg_size((x + 1) / 2 if centered else x) for x in (a, b)))


# --------------------------------------------------------------------------------------------------- one step


def learning_rate(step, train):
    """Rate of optimizer step `step` (from 0): linear warm-up, then constant or half a cosine to 0 at train_steps."""
    warmup = min((step + 1) / max(train.lr_rampup_steps, 1), 1.0)
    decay = 0.5 * (1 + math.cos(math.pi * step / train.train_steps)) if train.lr_decay == "cosine" else 1.0
    return train.lr * warmup * decay


def accumulate(model, objective, draw, rounds, signals=(0, 0)):
    """Gradients of the mean of the objective over rounds and ranks, left in .grad.

    draw(r) gives the objective's arguments for round r of `rounds`; `signals` are this rank's StopSignals.votes().  Returns the
    means over rounds of the objective's logs, the signal that asked any rank to stop or None, and whether the loss was finite
    on all of them.
    """
    totals = {}
    for r in range(rounds):
        loss, logs = objective(*draw(r))
        (loss / rounds).backward()
        for name, value in logs.items():
            totals[name] = totals.get(name, 0.0) + value.detach() / rounds
    loss = totals["loss"]
    votes = torch.cat([loss.new_tensor(signals), ~torch.isfinite(loss)[None]])
    *signals, bad = dist_util.average_gradients(list(model.parameters()), votes).tolist()
    return totals, dist_util.strongest(signals), not bad


class Window:
    """Sums, in float64, of what the steps since the last line of metrics.jsonl logged, on this rank."""

    def __init__(self, device):
        self.device, self.sums, self.steps, self.skipped = device, {}, 0, 0

    def add(self, logs):
        self.steps += 1
        for name, value in logs.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.double()

    def means(self):
        """{name: mean over steps and ranks}, and how many steps were skipped if any; all ranks call this together."""
        names, found = sorted(self.sums), {}
        if names:
            sums = torch.stack([self.sums[name] for name in names])
            means = dist_util.sum_over_ranks(sums) / dist_util.world_size() / self.steps
            found = dict(zip(names, means.tolist()))
        return {**found, **({"skipped": self.skipped} if self.skipped else {})}

    def content(self):
        """What a checkpoint holds of it; all ranks call this together."""
        sums = dist_util.gather({name: value.item() for name, value in self.sums.items()})
        return {"steps": self.steps, "skipped": self.skipped, "sums": sums}

    def restore(self, content):
        """The inverse; where the number of ranks is another, each takes the mean."""
        ranks = content["sums"]
        if len(ranks) == dist_util.world_size():
            mine = ranks[dist_util.rank()]
        else:
            mine = {name: sum(sums[name] for sums in ranks) / len(ranks) for name in ranks[0]}
        self.sums = {name: torch.tensor(value, dtype=torch.float64, device=self.device) for name, value in mine.items()}
        self.steps, self.skipped = content["steps"], content["skipped"]


class Stopwatch:
    """Images per second since it was made, of `steps` steps of so many images."""

    def __init__(self, images):
        self.images, self.steps, self.begun = images, 0, time.perf_counter()

    def rate(self):
        return round(self.steps * self.images / (time.perf_counter() - self.begun), 1)

    @contextmanager
    def paused(self):
        begun = time.perf_counter()
        yield
        self.begun += time.perf_counter() - begun


# --------------------------------------------------------------------------------------------------------- the run

SKIPPED_IN_A_ROW = 20  # steps without finite gradients after which a run gives up
FREE = (  # what may change when the same run continues; README, "Reliability", says what bsz and train_steps do to it
    *("train_steps", "bsz", "log_freq", "sampling_freq", "dump_freq", "nsampling", "fid_freq", "fid_num", "eval_bsz"),
)


@dataclass
class Plan:
    """What is to be trained, where, and from where on."""

    config: defaults.Config
    workdir: Path
    teacher: misc.Trained | None
    saved: dict | None  # content of the checkpoint to continue
    path: Path | None  # that checkpoint
    origin: dict | None  # path and SHA-256 of the checkpoint that the run in workdir began from with --resume
    teacher_hash: str | None  # SHA-256 of the teacher's checkpoint

    @property
    def in_place(self):
        """Whether it continues what is in its own workdir."""
        return self.path is not None and self.path.parent.resolve() == self.workdir.resolve()


def make_plan(run, flags, device, agents):
    """The Plan of a command, or UserError; `agents` are what torchrun_agent() is on all ranks.

    A run that continues takes its settings from its checkpoint, a student its data and network from its teacher.  Whatever
    --workdir holds is continued; --resume names what a new --workdir begins from, --fresh begins anew.
    """
    if run.resume and run.fresh:
        raise UserError("--resume continues and --fresh begins anew: leave one out")
    if run.force and not run.fresh:
        raise UserError("--force is for --fresh, to remove the run that --workdir holds: add it, or leave --force out")
    if run.keep < 0:
        raise UserError(f"--keep is {run.keep}: it must be a number of checkpoints, or 0 for all")
    source = Path(run.resume) if run.resume else None
    latest, held = load_held(Path(run.workdir)) if source and run.workdir else (None, None)
    if held and held["run"]["origin"] and held["run"]["origin"]["path"] == os.path.abspath(source):
        source = latest  # the same command again: what was there may have gone on, or gone
    saved = load_run(source) if source else None
    mode = saved["config"].task.mode if saved else flags.get("mode", "denoiser")
    if flags.get("mode", mode) != mode:
        raise UserError(
            f"--mode is {flags['mode']}, but --resume {run.resume} is a {mode}; stage 2 begins with --teacher alone"
        )
    teacher, teacher_hash, inherited = None, None, {}
    if mode == "denoiser" and run.teacher:
        raise UserError("--teacher is for stage 2: add --mode characteristic, or leave it out")
    if mode == "characteristic":
        if not run.teacher:
            raise UserError("--teacher is missing: stage 2, a run that continues too, needs the checkpoint of stage 1")
        teacher = misc.load_model(run.teacher, {k: v for k, v in flags.items() if k != "mode"}, device)
        if teacher.config.task.mode != "denoiser":
            raise UserError(f"{run.teacher} is a flow map: --teacher takes a denoiser, from train.py --mode denoiser")
        teacher_hash = misc.file_hash(run.teacher)
        inherited = {**vars(teacher.config.data), **vars(teacher.config.network)}
    config = misc.override(saved["config"], flags, source) if saved else defaults.resolve({**inherited, **flags})
    workdir = Path(run.workdir or f"logs/{config.data.data_name}-{mode}")
    path, origin = source, None
    if saved:
        origin = {"path": os.path.abspath(source), "sha256": misc.file_hash(source), "step": saved["step"]}

    misc.check_folder(workdir, "workdir")
    if misc.latest_checkpoint(workdir) and run.fresh and not is_restart(workdir, agents):
        if not run.force:
            raise UserError(f"--workdir {workdir} holds a run, which --fresh would overwrite: choose another, or add --force")
    else:
        latest, held = load_held(workdir)
    if held:
        asked = Path(run.resume or "")
        if run.resume and asked.parent.resolve() == workdir.resolve() and asked.name != "latest.pth":
            raise UserError(f"--workdir {workdir} goes on from its last checkpoint: leave --resume out, or choose another")
        if source and source.resolve() != latest.resolve() and not began_from(held, origin):
            raise UserError(f"--workdir {workdir} holds a run that did not begin from {source}: choose another folder")
        path, saved = latest, held
        config = misc.override(saved["config"], flags, path, tuple(defaults.SECTIONS), FREE)
        origin = saved["run"]["origin"]
    check_bank(config, device)
    plan = Plan(config, workdir, teacher, saved, path, origin, teacher_hash)
    if saved:
        step, last = saved["step"], config.train.train_steps
        if step > last or step == last and not plan.in_place:
            raise UserError(f"{path} is at step {step} already: to train longer, raise --train_steps")
        if saved["run"]["teacher"] != teacher_hash:
            raise UserError(f"{run.teacher} is not the teacher that {path} began with: name that one, or begin a new run")
    return plan


def check_bank(config, device):
    """UserError if the memory of the machine, or of its GPU, cannot hold stage 2's bank, which every rank has one of."""
    data, distil = config.data, config.distil
    values = (config.sampling.num_steps + 1) * max(distil.bank_size, config.train.bsz)
    size = values * data.image_channels * data.image_size**2 * getattr(torch, distil.bank_dtype).itemsize
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    else:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if config.task.mode == "characteristic" and distil.objective == "trajectory" and size > there:
        raise UserError(
            f"the bank of stage 2 takes {size / 2**30:.1f} GiB on each rank, which has {there / 2**30:.1f}: lower --bank_size, "
            "or take --bank_dtype float16"
        )


def began_from(held, origin):
    """Whether a run, the dict of its checkpoint, began by --resume from the checkpoint at that path, or with that content."""
    mine = held["run"]["origin"]
    return mine is not None and (mine["path"] == origin["path"] or mine["sha256"] == origin["sha256"])


def load_held(workdir):
    """(path, load_run() of it) of the last checkpoint in a folder, (None, None) without one; UserError says what to remove."""
    misc.check_folder(workdir, "workdir")
    latest = misc.latest_checkpoint(workdir)
    if latest is None:
        return None, None
    if not latest.exists():
        raise UserError(
            f"{workdir}/latest.pth points to {latest.name}, which is missing: put it back, or remove latest.pth to "
            "continue from the last checkpoint there is"
        )
    try:
        return latest, load_run(latest)
    except UserError as error:
        raise UserError(f"{error}: remove it and {workdir}/latest.pth to continue from the checkpoint before it") from error


def torchrun_agent():
    """What tells the job of torchrun, and the process of torchrun on this machine, from all others; None without torchrun.

    That process lives as long as the job, through any restart.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    agent, begun = os.getppid(), ""
    with suppress(OSError):  # systems without /proc
        begun = Path(f"/proc/{agent}/stat").read_text().rsplit(")", 1)[1].split()[19]  # ticks since the machine started
    return f"{os.environ['TORCHELASTIC_RUN_ID']} {socket.gethostname()} {agent} {begun}"


def is_restart(workdir, agents):
    """Whether torchrun has started this run again, after a process died or a machine came: by the same command, --fresh too,
    but to go on.

    Its count says so, but stays 0 when a machine comes or goes; its process does, unless a shell is in between.
    """
    try:
        begun_by = (workdir / ".lock").read_text().splitlines()
    except OSError:
        return False
    job = os.environ.get("TORCHELASTIC_RUN_ID")
    counted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and any(line.split(" ")[0] == job for line in begun_by)
    return counted or any(agent in begun_by for agent in agents)


def load_run(path):
    """The dict of a checkpoint that train.py wrote, its configuration as a Config."""
    saved = misc.load_checkpoint(path)
    if not {"config", "optim", "step", "mean", "run"} <= saved.keys():
        raise UserError(f"{path} holds no run to continue: it was not written by train.py, or by an earlier version")
    config, run = defaults.from_dict(saved["config"]), saved["run"]
    misc.check_mean(saved["mean"], config, path)
    try:
        counts = [run[name] for name in ("ranks", "bsz", "images", "skipped")]
        counts += [run["window"]["steps"], run["window"]["skipped"], run["ranks"] - 1]
        sums, origin = run["window"]["sums"], run["origin"]
        if not all(type(n) is int and 0 <= n < 2**63 for n in counts):
            raise ValueError("numbers of another kind")
        if not all(part.keys() == sums[0].keys() and set(map(type, part)) <= {str} for part in sums):
            raise ValueError("ranks that logged different things")
        if not all(type(value) is float and math.isfinite(value) for part in sums for value in part.values()):
            raise ValueError("sums of another kind")
        if len(sums) != run["ranks"] or not {"teacher", "data"} <= run.keys():
            raise ValueError("parts are missing")
        kinds = {"path": str, "sha256": str, "step": int}
        if origin is not None and {name: type(value) for name, value in origin.items()} != kinds:
            raise ValueError("another origin")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"what {path} holds of its run cannot be continued: it is damaged, or of another version") from error
    return {**saved, "config": config}


def check_data(dataset, plan):
    """The fingerprint of the data; UserError if it is not that of the run that continues."""
    found = dataset.fingerprint()
    if plan.saved and plan.saved["run"]["data"] != found:
        had = plan.saved["run"]["images"]
        differ = f"{len(dataset)} images, and had {had}" if len(dataset) != had else f"other images than the {had} it had"
        raise UserError(f"the data has {differ} in {plan.path}: name those with --data_path, or begin a new run")
    return found


def fit_to_ranks(config, flags, saved):
    """The configuration with a --bsz that suits the ranks: a run that continues on others may need another; or UserError.

    Says what is no longer as it would have been.
    """
    train, world = config.train, dist_util.world_size()
    share, rest = divmod(train.global_bsz, world)
    if saved and "bsz" not in flags and not rest and share % train.bsz:
        config = defaults.resolve({"bsz": next(n for n in range(train.bsz, 0, -1) if share % n == 0)}, config)
    elif train.global_bsz % (train.bsz * world):
        fitting = f"; try --bsz {share}" if rest == 0 else ""
        raise UserError(
            f"--global_bsz is {train.global_bsz}: it must be a multiple of --bsz times the ranks, "
            f"{train.bsz} x {world}{fitting}"
        )
    if saved and train.lr_decay == "cosine" and saved["config"].train.train_steps != train.train_steps:
        misc.log(f"the cosine of the learning rate now ends at step {train.train_steps}: it is another from here on")
    before = (saved["run"]["ranks"], saved["run"]["bsz"]) if saved else (world, config.train.bsz)
    if before != (world, config.train.bsz):
        misc.log(
            f"continuing on {world} rank{'s' * (world > 1)} of {config.train.bsz} what ran on {before[0]} of {before[1]}: each "
            "step sees the same images, but noise, dropout and stage 2's bank are other draws, so that the weights will not be "
            "those of a run that went on as it was"
        )
    return config


def lock_workdir(workdir):
    """A handle on {workdir}/.lock that keeps other runs out of the folder for as long as this process lives.

    UserError if another run is in the folder.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = open(workdir / ".lock", "a+")  # noqa: SIM115
        for attempt in range(10, -1, -1):
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if not attempt:
                    raise UserError(f"--workdir {workdir} is in use by another run: wait for it, or choose another") from error
                time.sleep(0.5)  # it may be a process of this command that was killed and is still leaving
            except OSError:  # a file system without locks
                break
    except OSError as error:
        raise UserError(f"cannot write {workdir}: {error.strerror}; choose another --workdir") from error
    return lock


def prepare_workdir(plan, fresh, keep, agents):
    """Make and lock the folder, save the configuration, and keep of metrics.jsonl what came before the step to start from.

    Returns the lock.  Its file holds the `agents`, for is_restart(): none before all is removed for `fresh`, and then never
    fewer, wherever this is killed.
    """
    workdir, start = plan.workdir, plan.saved["step"] if plan.saved else 0
    lines = read_metrics(workdir) if plan.in_place else []
    lock = lock_workdir(workdir)
    if not fresh and misc.latest_checkpoint(workdir) != (plan.path if plan.in_place else None):
        raise UserError(f"--workdir {workdir} has just been written to by another run: start the command again")
    for folder in (workdir, workdir / "samples"):
        misc.remove_leftovers(folder)
    try:
        if fresh:
            lock.truncate(0)
            for path in (*misc.checkpoints(workdir), *(workdir / name for name in ("latest.pth", "metrics.jsonl", "loss.png"))):
                path.unlink(missing_ok=True)
            shutil.rmtree(workdir / "samples", ignore_errors=True)
        lock.seek(0)  # to open the file again and close it would give up the lock
        known = lock.read().splitlines()
        lock.write("".join(f"{agent}\n" for agent in sorted(set(agents) - {None, *known})))
        lock.flush()
    except OSError as error:
        raise UserError(f"cannot write {workdir}: {error.strerror}; choose another --workdir") from error
    if plan.in_place:  # it may have been killed before
        misc.remove_old(workdir, keep)
    misc.write_json(workdir / "config.json", defaults.to_dict(plan.config))
    with misc.atomic(workdir / "metrics.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines if line["step"] <= start))
    return lock


def read_metrics(workdir):
    """The lines of metrics.jsonl as dicts, without a last one that a kill cut short; UserError if it is damaged."""
    path = workdir / "metrics.jsonl"
    try:
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        lines = [json.loads(line) for line in lines]
        if not all(type(line["step"]) is int for line in lines):
            raise ValueError("a step that is no number")
        return lines
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: repair it, or move it away") from error


def preview(model, config, mean):
    """The model as it is drawn and scored during training: with the sampling settings, but a flow map in one step."""
    if config.task.mode == "characteristic":
        config = dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, num_steps=1))
    return misc.Trained(model, config, mean, 0, "")


def draw_samples(path, trained):
    """Grid of --nsampling images of seeds 0, 1, ..."""
    count = trained.config.train.nsampling
    images = torch.cat([images for _, images in misc.generate(trained, range(count), desc="samples")])
    misc.write_grid(path, images, columns=math.ceil(math.sqrt(count)))


class Score:
    """Fréchet distance of --fid_num images to the statistics --ref_path, in their feature space; all ranks take part."""

    def __init__(self, run, config, shape, device):
        if not run.ref_path:
            raise UserError("--ref_path is missing: --fid_freq scores against the statistics of fid.py --mode ref")
        self.reference, self.count = dist_util.agree(lambda: misc.read_statistics(run.ref_path)), config.train.fid_num
        features = misc.choose_features("auto", shape[0], self.reference)
        self.name = "pixel_fid" if features == "pixels" else "fid"
        self.extract = misc.load_features(features, device, run.inception_weights, run.download)
        made = misc.metadata_of(self.extract, shape, self.count)
        misc.check_comparable(self.reference, self.extract.dimension(shape), made)

    def is_recorded(self, workdir, step):
        return any(line["step"] == step and self.name in line for line in read_metrics(workdir))

    def __call__(self, trained, poll):
        images = misc.measure(misc.Generated(trained, range(self.count), poll), self.extract)
        return dist_util.on_first_rank(lambda: misc.frechet_distance(self.reference, images))


def draw_loss_curve(workdir):
    """loss.png from metrics.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = read_metrics(workdir)
    fig, ax = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for name in ("loss", "distance", "denoising"):
        mine = [line for line in lines if name in line]
        if mine:
            ax.plot([line["step"] for line in mine], [line[name] for line in mine], label=name)
    ax.set(xlabel="step", ylabel="training loss", yscale="log")
    ax.legend()
    with misc.atomic(workdir / "loss.png") as temporary:
        fig.savefig(temporary, dpi=120, format="png")
    plt.close(fig)


def seed_round(generator, seed, step, r):
    """Start this rank's random streams for a round of a step: `generator` for noise and times, torch's own for dropout."""
    generator.manual_seed(misc.derive_seed(seed, "noise", step, r, dist_util.rank()))
    torch.manual_seed(misc.derive_seed(seed, "dropout", step, r, dist_util.rank()))


def train(run, flags, device):
    agents = dist_util.gather(torchrun_agent())
    plan = dist_util.agree(lambda: make_plan(run, flags, device, agents))
    saved, teacher, workdir, in_place = plan.saved, plan.teacher, plan.workdir, plan.in_place
    start = saved["step"] if saved else 0
    if len(set(dist_util.gather((str(plan.path), start)))) > 1:
        raise UserError(f"the ranks see different runs in --workdir {workdir}: put it where all machines see the same files")
    config = fit_to_ranks(plan.config, flags, saved)
    cfg, rank, world = config.train, dist_util.rank(), dist_util.world_size()
    rounds = cfg.global_bsz // (cfg.bsz * world)
    torch.manual_seed(cfg.seed)
    model = misc.build_model(config).to(device).train()
    dataset = dist_util.agree(lambda: misc.load_data(config.data))
    data_hash = dist_util.on_first_rank(lambda: check_data(dataset, plan))
    classes = int(dataset.labels.max()) + 1
    if config.network.label_dim and config.network.label_dim < classes:
        raise UserError(f"--label_dim is {config.network.label_dim}, but the data has {classes} classes")
    if run.ref_path and not cfg.fid_freq:
        raise UserError("--ref_path is for --fid_freq, the steps between scores: add it, or leave --ref_path out")
    score = Score(run, config, dataset.shape, device) if cfg.fid_freq else None
    distance = make_distance(run, config, device) if teacher else None
    for name, section in defaults.to_dict(config).items():
        misc.log(f"{name:8}  " + "  ".join(f"{key}={json.dumps(value)}" for key, value in section.items()))

    if saved:
        mean = saved["mean"].to(device)
    elif teacher and teacher.knows_mean:
        mean = teacher.mean
    else:
        mean = misc.data_mean(dataset, config.data.centered).to(device)
    if teacher:
        teacher.mean = mean
        network.start_from_teacher(model.net, teacher.model.net)
    ema = misc.EMA(model, cfg.ema_decay)
    optim = torch.optim.RAdam(model.parameters(), lr=cfg.lr)
    window, skipped, in_a_row = Window(device), 0, 0
    if saved:
        misc.load_weights(model.net, saved["model"], plan.path)
        misc.load_weights(ema.module.net, saved["ema"], plan.path)
        misc.load_optimizer(optim, saved["optim"], plan.path)
        window.restore(saved["run"]["window"])
        skipped = saved["run"]["skipped"]
        misc.log(f"continuing {plan.path} at step {start} of {cfg.train_steps}")
    plan = dataclasses.replace(plan, config=config)
    if start == cfg.train_steps:
        objective = None
    elif not teacher:
        objective = Denoising(model, config)
    elif config.distil.objective == "trajectory":
        objective = Trajectory(model, config, teacher, distance, device, start)
    else:
        objective = Semigroup(model, config, teacher, distance, device, ema)
    anew = run.fresh and not saved
    lock = dist_util.on_first_rank(lambda: prepare_workdir(plan, anew, run.keep, agents))  # noqa: F841 (held until the end)
    if isinstance(objective, Trajectory):
        objective.fill_bank()
    data = misc.batches(dataset, config.data, cfg, start)
    parameters = list(model.parameters())
    generator = torch.Generator(device)
    shown, last_saved = {}, start if in_place else None
    asked, owed = None, False  # a signal to stop, and a checkpoint: both wait for a step that is not skipped

    def record(line):
        if rank == 0:
            try:
                with open(workdir / "metrics.jsonl", "a") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:
                raise LoneError(f"cannot write {workdir}/metrics.jsonl: {error.strerror}; free some space") from error

    def give_up(what, done):
        held = misc.latest_checkpoint(workdir)
        again = f"a new run from the last good checkpoint, --resume {held} --workdir NEW, with" if held else "again with"
        raise UserError(f"{what}, up to step {done}: look at the data, or begin {again} a lower --lr")

    def save(done):
        nonlocal last_saved
        if done != last_saved and (not in_a_row or done == cfg.train_steps):  # else it is not known to be good
            finite = all(x.isfinite().all() for net in (model, ema.module) for x in net.state_dict().values())
            if not all(dist_util.gather(finite)):
                give_up("the weights are not finite", done)
            kept = {"ranks": world, "bsz": cfg.bsz, "images": len(dataset), "data": data_hash, "skipped": skipped}
            kept |= {"origin": plan.origin, "teacher": plan.teacher_hash, "window": window.content()}
            state = (model, ema, optim, done, config, mean.cpu(), kept)
            dist_util.on_first_rank(lambda: misc.save_checkpoint(workdir, *state, run.keep))
            last_saved = done

    def draw_round(step, r):
        images, labels = next(data)  # before seeding, since a loader that starts its workers draws a number itself
        seed_round(generator, cfg.seed, step, r)
        x0 = misc.to_model(images.to(device, non_blocking=True), config.data.centered)
        return x0, misc.one_hot(labels.to(device), config.network.label_dim), generator

    def due(done, freq):
        return freq and done and (done % freq == 0 or done == cfg.train_steps)

    def draw_and_score(done):
        """What follows some steps; after a run was stopped here, what is missing of it."""
        if due(done, cfg.sampling_freq):
            picture = workdir / "samples" / f"{done:06d}.png"
            fresh = done > start or not picture.exists()
            dist_util.on_first_rank(lambda: fresh and draw_samples(picture, preview(ema.module, config, mean)))
        if score and due(done, cfg.fid_freq) and (done > start or not dist_util.gather(score.is_recorded(workdir, done))[0]):
            save(done)
            value = score(preview(ema.module, config, mean), stop.poll)
            if rank == 0:
                record({"step": done, score.name: value, "images": cfg.fid_num})
                shown[score.name] = f"{value:.4f}"
                bar.set_postfix(shown)

    images = cfg.train_steps * cfg.global_bsz
    with dist_util.StopSignals() as stop, misc.progress(images, config.task.mode, initial=start * cfg.global_bsz) as bar:
        if in_place:
            draw_and_score(start)
        clock = Stopwatch(cfg.global_bsz)
        for step in range(start, cfg.train_steps):
            if teacher:
                objective.start_step(step)
            optim.zero_grad(set_to_none=True)
            logs, stopping, finite = accumulate(model, objective, lambda r: draw_round(step, r), rounds, stop.votes())
            logs["grad_norm"] = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            if finite and math.isfinite(logs["grad_norm"]):
                for group in optim.param_groups:
                    group["lr"] = learning_rate(step, cfg)
                optim.step()
                ema.update(model, step)
                window.add(logs)
                in_a_row = 0
            else:  # equally on all ranks, whose gradients are the same
                skipped, in_a_row = skipped + 1, in_a_row + 1
                shown["skipped"] = skipped
                window.skipped += 1
                if in_a_row == min(SKIPPED_IN_A_ROW, cfg.train_steps - (plan.origin["step"] if plan.origin else 0)):
                    give_up(f"no finite loss or gradient in {in_a_row} steps", step + 1)

            done = step + 1
            bar.update(cfg.global_bsz)
            clock.steps += 1
            if done % cfg.log_freq == 0 or done == cfg.train_steps:
                line = {"step": done, **window.means(), "lr": learning_rate(step, cfg), "images_per_s": clock.rate()}
                record(line)
                if "loss" in line:
                    shown["loss"] = f"{line['loss']:.4g}"
                bar.set_postfix(shown)
                window, clock = Window(device), Stopwatch(cfg.global_bsz)
            with clock.paused():  # images/s is that of training
                asked, owed = asked or stopping, owed or due(done, cfg.dump_freq)
                if (asked or owed) and not in_a_row:
                    save(done)
                    owed = False
                    if asked:
                        raise Stopped(asked)
                draw_and_score(done)
                if done == cfg.train_steps:
                    save(done)
    if rank == 0:
        print(workdir / f"DDPMpp-{cfg.train_steps:06d}.pth", flush=True)
        draw_loss_curve(workdir)


def main():
    run, flags = defaults.parse(Run, ["task", "data", "network", "train", "distil", "sampling"], description=__doc__)
    with dist_util.session() as device:
        train(run, flags, device)


if __name__ == "__main__":
    dist_util.launch(main)
