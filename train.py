"""Train the denoiser (stage 1) or distil its ODE into the flow map (stage 2).

python train.py --data_name digits --mode denoiser --workdir logs/digits-denoiser
python train.py --data_name digits --mode characteristic --teacher logs/digits-denoiser/DDPMpp-000600.pth
torchrun --nproc_per_node=4 train.py --data_name cifar --mode denoiser --bsz 256
"""

import dataclasses
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import defaults
import dist_util
import misc
import network
import sde
from defaults import setting
from dist_util import UserError


@dataclass(frozen=True)
class Run:
    """files"""

    workdir: str | None = setting(None, "folder for checkpoints, metrics and pictures; logs/{data_name}-{mode} if left out")
    teacher: str | None = setting(None, "checkpoint of the denoiser to distil (mode characteristic)")
    resume: str | None = setting(None, "checkpoint to continue from")
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


def accumulate(model, objective, draw, rounds):
    """Gradients of the mean of the objective over rounds and ranks, left in .grad; returns the means over rounds of its logs.

    draw(r) gives the objective's arguments for round r of `rounds`.
    """
    totals = {}
    for r in range(rounds):
        loss, logs = objective(*draw(r))
        (loss / rounds).backward()
        for name, value in logs.items():
            totals[name] = totals.get(name, 0.0) + value.detach() / rounds
    dist_util.average_gradients(list(model.parameters()))
    return totals


# --------------------------------------------------------------------------------------------------------- the run


def configure(run, flags, device):
    """(configuration, teacher or None, checkpoint to continue from or None), or UserError.

    A run that continues takes its settings from its checkpoint, a student its data and network from its teacher.
    """
    saved = load_run(run.resume) if run.resume else None
    if saved:
        config = misc.override(defaults.from_dict(saved["config"]), flags, run.resume)
        if saved["step"] >= config.train.train_steps:
            raise UserError(f"{run.resume} is at step {saved['step']} already: to train longer, raise --train_steps")
    mode = config.task.mode if saved else flags.get("mode", "denoiser")
    if mode == "denoiser":
        if run.teacher:
            raise UserError("--teacher is for stage 2: add --mode characteristic, or leave it out")
        return config if saved else defaults.resolve(flags), None, saved
    if not run.teacher:
        raise UserError("--teacher is missing: stage 2, a run that continues too, needs the checkpoint of stage 1")
    teacher = misc.load_model(run.teacher, {k: v for k, v in flags.items() if k != "mode"}, device)
    if teacher.config.task.mode != "denoiser":
        raise UserError(f"{run.teacher} is a flow map: --teacher takes a denoiser, from train.py --mode denoiser")
    if not saved:
        config = defaults.resolve({**vars(teacher.config.data), **vars(teacher.config.network), **flags})
    elif (config.network, config.data) != (teacher.config.network, teacher.config.data):
        raise UserError(f"{run.teacher} is not the teacher of {run.resume}: their data or networks differ")
    return config, teacher, saved


def load_run(path):
    """The dict of a checkpoint that train.py wrote."""
    saved = misc.load_checkpoint(path)
    if not {"config", "optim", "step", "mean"} <= saved.keys():
        raise UserError(f"{path} holds no run to continue: it was not written by train.py")
    return saved


def check_workdir(workdir, resuming):
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir {workdir} is a file: choose a folder")
    if not resuming and any(workdir.glob("DDPMpp-*.pth")):
        raise UserError(
            f"--workdir {workdir} already holds a run: continue it with --resume CHECKPOINT, or choose another folder"
        )


def prepare_workdir(workdir, config, start):
    """Make the folder, save the configuration, and keep of metrics.jsonl what came before step `start`."""
    misc.write_json(workdir / "config.json", defaults.to_dict(config))
    metrics = [line for line in read_metrics(workdir) if line["step"] <= start]
    with misc.atomic(workdir / "metrics.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in metrics))


def read_metrics(workdir):
    """The lines of metrics.jsonl as dicts, without a last one that a kill cut short."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


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

    def __call__(self, trained):
        images = misc.measure(misc.Generated(trained, range(self.count)), self.extract)
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
    config, teacher, saved = dist_util.agree(lambda: configure(run, flags, device))
    cfg, rank, world = config.train, dist_util.rank(), dist_util.world_size()
    if cfg.global_bsz % (cfg.bsz * world):
        fitting = f"; try --bsz {cfg.global_bsz // world}" if cfg.global_bsz % world == 0 else ""
        raise UserError(
            f"--global_bsz is {cfg.global_bsz}: it must be a multiple of --bsz times the ranks, {cfg.bsz} x {world}{fitting}"
        )
    rounds = cfg.global_bsz // (cfg.bsz * world)
    workdir = Path(run.workdir or f"logs/{config.data.data_name}-{config.task.mode}")
    dist_util.on_first_rank(lambda: check_workdir(workdir, saved))
    torch.manual_seed(cfg.seed)
    model = misc.build_model(config).to(device).train()
    dataset = dist_util.agree(lambda: misc.load_data(config.data))
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
    start = 0
    if saved:
        misc.load_weights(model.net, saved["model"], run.resume)
        misc.load_weights(ema.module.net, saved["ema"], run.resume)
        optim.load_state_dict(saved["optim"])
        start = saved["step"]
        misc.log(f"continuing {run.resume} at step {start} of {cfg.train_steps}")
    dist_util.on_first_rank(lambda: prepare_workdir(workdir, config, start))

    if not teacher:
        objective = Denoising(model, config)
    elif config.distil.objective == "trajectory":
        objective = Trajectory(model, config, teacher, distance, device, start)
    else:
        objective = Semigroup(model, config, teacher, distance, device, ema)
    data = misc.batches(dataset, config.data, cfg, start)
    parameters = list(model.parameters())
    generator = torch.Generator(device)
    sums, since, shown, clock = {}, 0, {}, time.perf_counter()

    def record(line):
        if rank == 0:
            with open(workdir / "metrics.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")

    def draw_round(step, r):
        seed_round(generator, cfg.seed, step, r)
        images, labels = next(data)
        x0 = misc.to_model(images.to(device, non_blocking=True), config.data.centered)
        return x0, misc.one_hot(labels.to(device), config.network.label_dim), generator

    with misc.progress(cfg.train_steps * cfg.global_bsz, config.task.mode, initial=start * cfg.global_bsz) as bar:
        for step in range(start, cfg.train_steps):
            if teacher:
                objective.start_step(step)
            optim.zero_grad(set_to_none=True)
            logs = accumulate(model, objective, lambda r: draw_round(step, r), rounds)
            logs["grad_norm"] = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for group in optim.param_groups:
                group["lr"] = learning_rate(step, cfg)
            optim.step()
            ema.update(model, step)

            done = step + 1
            since += 1
            for name, value in logs.items():
                sums[name] = sums.get(name, 0.0) + value
            bar.update(cfg.global_bsz)
            if done % cfg.log_freq == 0 or done == cfg.train_steps:
                names = sorted(sums)
                values = dist_util.sum_over_ranks(torch.stack([sums[n].double().to(device) for n in names])) / world / since
                line = {"step": done, **dict(zip(names, values.tolist())), "lr": learning_rate(step, cfg)}
                seconds = time.perf_counter() - clock
                line["images_per_s"] = round(since * cfg.global_bsz / seconds, 1)
                record(line)
                shown["loss"] = f"{line['loss']:.4g}"
                bar.set_postfix(shown)
                sums, since, clock = {}, 0, time.perf_counter()
            last, paused = done == cfg.train_steps, time.perf_counter()
            if cfg.sampling_freq and (done % cfg.sampling_freq == 0 or last):
                picture = workdir / "samples" / f"{done:06d}.png"
                dist_util.on_first_rank(lambda: draw_samples(picture, preview(ema.module, config, mean)))
            if score and (done % cfg.fid_freq == 0 or last):
                value = score(preview(ema.module, config, mean))
                if rank == 0:
                    record({"step": done, score.name: value, "images": cfg.fid_num})
                    shown[score.name] = f"{value:.4f}"
                    bar.set_postfix(shown)
            if done % cfg.dump_freq == 0 or last:
                dist_util.on_first_rank(lambda: misc.save_checkpoint(workdir, model, ema, optim, done, config, mean.cpu()))
            clock += time.perf_counter() - paused  # images/s is that of training
    if rank == 0:
        print(workdir / f"DDPMpp-{cfg.train_steps:06d}.pth", flush=True)
        draw_loss_curve(workdir)


def main():
    run, flags = defaults.parse(Run, ["task", "data", "network", "train", "distil", "sampling"], description=__doc__)
    with dist_util.session() as device:
        train(run, flags, device)


if __name__ == "__main__":
    dist_util.launch(main)
