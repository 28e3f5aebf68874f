"""Train the denoiser (stage 1) or distil its ODE into the flow map (stage 2).

python train.py --data_name digits --mode denoiser --workdir logs/digits-denoiser
python train.py --data_name digits --mode characteristic --teacher logs/digits-denoiser/DDPMpp-000600.pth
torchrun --standalone --nproc_per_node=4 train.py --data_name cifar --mode denoiser --bsz 256
"""

import dist_util
from dist_util import Stopped, UserError

import dataclasses
import datetime
import json
import math
import time
from contextlib import nullcontext
from pathlib import Path

import torch

import checkpoint
import dataset
import defaults
import fid
import generator
import misc
import network
import sde
import workdir

# ----------------------------------------------------------------------------------------------------- objectives
# A step's batch is split into parts, one for each round of each rank.  An objective is called with a part: images
# (B, C, H, W), one-hot labels or None, a random generator on their device, and the offset of its first image in the batch.  It
# returns a scalar to differentiate and what to log, {name: scalar tensor}; the mean over all parts is the step's value.


def normal(like, source):
    return torch.randn(like.shape, generator=source, device=like.device)


def mean(values):
    return values.mean() if len(values) else values.sum()


def training_times(n, settings, source):
    """(n,) times, uniform on [train_eps0, 1]."""
    t = torch.rand(n, generator=source, device=source.device)
    return settings.train_eps0 + (1 - settings.train_eps0) * t


class Objective:
    """Base: the Denoiser to train, maybe a dist_util.parallel() one, and for stage 2 a generator.Trained and a distance."""

    def __init__(self, model, config, teacher=None, distance=None, ema=None):
        self.model, self.config, self.teacher, self.distance, self.ema = model, config, teacher, distance, ema

    def begin(self, step, folder=None):
        """Called once, when the run is sure to begin, with the number of steps that are done already and its workdir."""

    def start_step(self, step):
        """Called before each optimizer step."""

    def watch(self):
        """{name: number} to log beside the means, every log_freq steps; all ranks call it together."""
        return {}

    def work(self, start, end, rounds):
        """For --dry_run: passes of bsz images, (forward and backward, without gradients), from step `start` to `end`."""
        return (end - start) * rounds, 0


class Denoising(Objective):
    """Stage 1."""

    def __call__(self, x0, label, source, offset=0):
        t = training_times(len(x0), self.config.train, source)
        d = self.model(sde.interpolate(x0, normal(x0, source), t), t, label=label)
        loss = sde.denoising_loss(d, x0, t, self.config.network.sigma_data).mean()
        return loss, {"loss": loss}


class Distillation(Objective):
    """What the objectives of stage 2 share: the grid, the teacher's steps, and adding the stage-1 loss."""

    def __init__(self, *args):
        super().__init__(*args)
        train, distil = self.config.train, self.config.distil
        ts = sde.GRIDS[distil.grid_spacing](distil.grid_steps, 1 - train.train_eps1, train.train_eps0, distil.grid_rho)
        self.ts = ts.to(self.teacher.mean.device)
        self.ratio = None
        self.denoise = generator.guided(self.teacher, distil.teacher_guidance)  # the teacher's, of the ODE to distil

    def teacher_step(self, label):
        """The step(x, t, s) of the teacher's ODE along one trajectory."""
        return sde.solver(self.config.distil.teacher_solver, lambda x, t: self.denoise(x, t, label=label))

    @torch.no_grad()
    def target(self, x0, z, t, label):
        """What the stage-1 loss regresses on: None for the images, or what a guided teacher says, whose ODE leads elsewhere."""
        distil = self.config.distil
        if distil.teacher_guidance == 1 or not distil.dsm_weight or not len(x0):
            return None
        return self.denoise(sde.interpolate(x0, z, t), t, label=label)

    def evaluations(self):
        """Those of the teacher for one solution on the grid."""
        train, distil = self.config.train, self.config.distil
        grid = {"num_steps": distil.grid_steps, "rho": distil.grid_rho, "sde": False, "churn": False}
        grid |= {"eval_eps0": train.train_eps0, "eval_eps1": train.train_eps1, "ode_solver": distil.teacher_solver}
        grid |= {"guidance": distil.teacher_guidance, "time_grid": distil.grid_spacing}
        return generator.nfe(self.teacher.config.replace("sampling", **grid))

    def combine(self, distance, denoising, offset):
        """The scalar to differentiate, from two scalars; `denoising` is None where there is no stage-1 loss."""
        distil = self.config.distil
        if denoising is None:
            return distance, {"loss": distance, "distance": distance}
        weight = torch.full_like(distance, distil.dsm_weight).detach()
        if distil.adaptive_weight:
            weight = weight * self.balance(distance, denoising, offset)
        loss = distance + weight * denoising
        return loss, {"loss": loss, "distance": distance, "denoising": denoising, "weight": weight}

    def balance(self, distance, denoising, offset):
        """sde.adaptive_weight of the two losses, over all ranks and rounds of a step.

        With several rounds that of the step before, `ratio`; in the very first step that of the rounds so far.
        """
        last, train = getattr(self.model, "module", self.model).net.output.weight, self.config.train
        gradients = [torch.autograd.grad(loss, last, retain_graph=True)[0] for loss in (distance, denoising)]
        gradients = [dist_util.sum_over_ranks(gradient) for gradient in gradients]
        a_round = train.bsz * dist_util.world_size()
        if offset >= a_round:
            gradients = [total + gradient for total, gradient in zip(self.gradients, gradients)]
        self.gradients, before, now = gradients, self.ratio, sde.adaptive_weight(*gradients)
        if offset >= train.global_bsz - a_round:  # the last round; a step that is not finite is skipped and leaves no trace
            finite = torch.stack([gradient.isfinite().all() for gradient in gradients]).all()
            if before is not None:
                self.ratio = torch.where(finite, now, before)
            elif finite:
                self.ratio = now
        return now if before is None or a_round == train.global_bsz else before


class Trajectory(Distillation):
    """The paper's regression on the teacher's solutions, which are kept in a bank: see workdir.Bank.

    The bank is a ring of batches of global_bsz solutions, of which each rank holds its share, a function of (seed, rank, number
    of the batch).  Which batches it holds is a function of the step.  Behind them it has batch -1, which is never trained on.
    """

    def __init__(self, *args):
        super().__init__(*args)
        distil, train, device = self.config.distil, self.config.train, self.ts.device
        self.share = train.global_bsz // dist_util.world_size()
        self.dsm_share = distil.dsm_share if distil.dsm_weight else 0  # of each batch
        self.slots = workdir.bank_slots(self.config)
        self.labels = torch.zeros(self.slots + 1, self.share, dtype=torch.long, device=device)
        self.pairs = sde.pair_probabilities(distil.grid_steps, distil.one_step_share, distil.to_data_share).flatten().to(device)

    def begin(self, step, folder=None):
        distil, shape = self.config.distil, (len(self.ts), self.share, *self.teacher.mean.shape)
        about = {"ranks": dist_util.world_size(), "device": self.ts.device.type, "torch": torch.__version__}
        about |= {name: value for name, value in defaults.to_dict(self.config).items() if name in ("network", "speed")}
        about |= {name: getattr(self.config.train, name) for name in ("seed", "global_bsz", "bsz", "train_eps0", "train_eps1")}
        names = ("teacher_solver", "teacher_guidance", "grid_steps", "grid_rho", "grid_spacing", "bank_dtype")
        about |= {name: getattr(distil, name) for name in names}
        about |= {"teacher": self.teacher.sha256, "mean": misc.tensor_hash(self.teacher.mean)} if folder else {}
        form = (self.slots + 1, shape, getattr(torch, distil.bank_dtype), self.ts.device)
        self.bank = dist_util.agree(lambda: workdir.Bank(folder, about, *form))
        self.first = self.replaced(step)
        with misc.progress((self.slots + 1) * self.share, "teacher's solutions") as bar:
            for number in (*range(self.first, self.first + self.slots), -1):
                self.fill(number, bar)

    def start_step(self, step):
        """Refresh the bank: the oldest batch makes place for a new one every bank_refresh_freq steps."""
        while self.first < self.replaced(step):
            self.fill(self.first + self.slots)
            self.first += 1

    def replaced(self, step):
        """How many batches have been replaced before this step."""
        freq = self.config.distil.bank_refresh_freq
        return step // freq if freq else 0

    def work(self, start, end, rounds):
        return (end - start) * rounds, (self.solved(start, end) + 1) * rounds * self.evaluations()

    def solved(self, start, end):
        """How many batches the bank holds for training, one after the other, from step `start` to `end`."""
        return self.slots + self.replaced(max(end - 1, start)) - self.replaced(start)

    def pairs_of_each(self, start, end):
        """How many pairs are drawn of each solution in these steps, in the mean."""
        return (1 - self.dsm_share) * (end - start) / self.solved(start, end)

    @torch.no_grad()
    def fill(self, number, bar=None):
        """Put this rank's share of a batch into its place in the ring, if it is not there."""
        train, label_dim, device = self.config.train, self.config.network.label_dim, self.ts.device
        seed = misc.derive_seed(train.seed, "bank", dist_util.rank(), number)
        source, slot = torch.Generator(device).manual_seed(seed), self.slots if number < 0 else number % self.slots
        z = torch.randn((self.share, *self.teacher.mean.shape), generator=source, device=device)
        if label_dim:
            self.labels[slot] = torch.randint(label_dim, (self.share,), generator=source, device=device)
        if not self.bank.holds(slot, number):
            with self.bank.writing(slot, number) as states:
                for part in torch.arange(self.share).split(4 * train.bsz):  # without a graph, four times as many fit
                    step = self.teacher_step(dataset.one_hot(self.labels[slot, part], label_dim))
                    x = sde.start(z[part], self.teacher.mean, train.train_eps1)
                    for k, state in enumerate(sde.sample(step, x, self.ts)):
                        states[k, part] = state.to(states.dtype)
        if bar:
            bar.update(self.share)

    @torch.no_grad()
    def watch(self):
        """The distance in one step, of the moving average: on the oldest batch of the bank, and on the one that is new to it.

        Where the second is far larger, it knows the bank by heart: more solutions help then, and more steps do not.
        """
        found, noise, data = {}, 0, -1  # indices of times
        for name, slot in (("one_step", self.first % self.slots), ("one_step_new", self.slots)):
            total = torch.zeros((), device=self.ts.device)
            for part in torch.arange(self.share).split(self.config.train.bsz):
                x, end = self.bank.states[slot][noise, part].float(), self.bank.states[slot][data, part].float()
                label = dataset.one_hot(self.labels[slot, part], self.config.network.label_dim)
                t, s = self.ts[noise].expand(len(x)), self.ts[data].expand(len(x))
                total += self.distance(self.ema.flow_map(x, t, s, label), end).sum()
            found[name] = dist_util.sum_over_ranks(total).item() / self.config.train.global_bsz
        return found

    def draw_pairs(self, n, source):
        """(n,) indices k < l of times, and slots and places of solutions in the bank."""
        ends = len(self.ts)
        pair = torch.multinomial(self.pairs, n, replacement=True, generator=source)
        which = torch.randint(self.slots * self.share, (n,), generator=source, device=pair.device)
        return pair // ends, pair % ends, which // self.share, which % self.share

    def __call__(self, x0, label, source, offset=0):
        train, net, share = self.config.train, self.config.network, self.dsm_share
        n_dsm = workdir.stage_1_images(share, offset, len(x0))
        all_dsm = workdir.stage_1_images(share, 0, train.global_bsz)
        n, parts = len(x0) - n_dsm, train.global_bsz / len(x0)
        k, l, slot, which = self.draw_pairs(n, source)
        states = self.bank.states[slot, torch.stack([k, l]), which].to(x0.dtype)
        x0 = x0[:n_dsm]
        t, z = training_times(n_dsm, train, source), normal(x0, source)
        target = self.target(x0, z, t, label if label is None else label[:n_dsm])
        if label is not None:
            label = torch.cat([dataset.one_hot(self.labels[slot, which], net.label_dim), label[:n_dsm]])
        denoise = lambda x, t, s: self.model(x, t, s, label)
        distances, dsm = sde.trajectory_losses(
            denoise,
            states=states,
            k=k,
            l=l,
            ts=self.ts,
            x0=x0,
            z=z,
            t=t.to(self.ts.dtype),
            sigma=net.sigma_data,
            distance=self.distance,
            on_data=self.config.distil.loss_norm == "lpips",
            target=target,
        )
        # This part has n of the step's pairs and n_dsm of its images for stage 1.  Other parts may have one more or less, so
        # the means are weighted: in the mean over all parts, each pair and each image of the step counts the same.
        distance = mean(distances) * (n * parts / (train.global_bsz - all_dsm))
        return self.combine(distance, mean(dsm) * (n_dsm * parts / all_dsm) if all_dsm else None, offset)


class Semigroup(Distillation):
    """What the authors' released code runs: consistency of the flow map along a few steps of the teacher."""

    def __init__(self, *args):
        super().__init__(*args)
        distil = self.config.distil
        lengths = torch.arange(1, min(distil.teacher_steps, distil.grid_steps) + 1, dtype=torch.float64)
        self.lengths = torch.ones_like(lengths) if distil.teacher_steps_strategy == "uniform" else lengths

    def work(self, start, end, rounds):
        steps = float((self.lengths * torch.arange(1, 1 + len(self.lengths))).sum() / self.lengths.sum())  # in the mean
        teacher = steps * self.evaluations() / (len(self.ts) - 1)
        others = 4  # of x_u: the student's and the average's; of x_t: the average's, and its gradient with respect to the input
        return 2 * (end - start) * rounds, (end - start) * rounds * (teacher + others)

    def __call__(self, x0, label, source, offset=0):
        K, n = len(self.ts) - 1, len(x0)
        on_host = torch.Generator().manual_seed(misc.derive_seed(source.initial_seed(), "length"))
        steps = 1 + int(torch.multinomial(self.lengths, 1, generator=on_host))  # one number for the part, as in CTM
        i = (torch.rand(n, generator=source, device=x0.device) * (K + 1 - steps)).long()
        j = i + steps
        k = j + (torch.rand(n, generator=source, device=x0.device) * (K + 1 - j)).long()
        z, z_dsm = normal(x0, source), normal(x0, source)
        t = training_times(n, self.config.train, source)
        twice = None if label is None else torch.cat([label, label])
        denoise = lambda x, t, s: self.model(x, t, s, label if len(x) == n else twice)
        distances, dsm = sde.semigroup_losses(
            denoise,
            lambda x, t, s: self.ema(x, t, s, label),
            self.teacher_step(label),
            x0=x0,
            z=z,
            i=i,
            n=steps,
            k=k,
            ts=self.ts,
            z_dsm=z_dsm,
            t=t.to(self.ts.dtype),
            sigma=self.config.network.sigma_data,
            distance=self.distance,
            target=self.target(x0, z_dsm, t, label),
        )
        return self.combine(distances.mean(), dsm.mean() if self.config.distil.dsm_weight else None, offset)


OBJECTIVES = {"trajectory": Trajectory, "semigroup": Semigroup}  # of stage 2


def make_distance(run, config, device):
    """--loss_norm, of two batches of images in the model's range -> (B,); LPIPS pools by averages, as in the reference."""
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


def learning_rate(step, train):
    """Rate of optimizer step `step` (from 0): linear warm-up, then constant or half a cosine to 0 at train_steps."""
    warmup = min((step + 1) / max(train.lr_rampup_steps, 1), 1.0)
    decay = 0.5 * (1 + math.cos(math.pi * step / train.train_steps)) if train.lr_decay == "cosine" else 1.0
    return train.lr * warmup * decay


def accumulate(model, objective, draw, rounds, after_round=lambda last: False):
    """Gradients of the mean of the objective over rounds and ranks, left in .grad; returns the means over rounds of its logs.

    draw(r) gives the objective's arguments in round r.  None is returned, for a step given up, once after_round(last) is true.
    """
    totals = {}
    for r in range(rounds):
        last = r == rounds - 1
        with nullcontext() if last else dist_util.accumulating(model):
            loss, logs = objective(*draw(r))
            (loss / rounds).backward()  # in the last round, gradients are averaged over the ranks meanwhile
        for name, value in logs.items():
            totals[name] = totals.get(name, 0.0) + value.detach() / rounds
        if after_round(last):
            return None
    return totals


def seed_round(source, seed, step, r):
    """Start this rank's random streams for a round of a step: `source` for noise and times, torch's own for dropout."""
    source.manual_seed(misc.derive_seed(seed, "noise", step, r, dist_util.rank()))
    torch.manual_seed(misc.derive_seed(seed, "dropout", step, r, dist_util.rank()))


class Validation:
    """Denoising loss on up to 2,048 held-out images, always at the same times and with the same noise; all ranks take part.

    A flow map of a guided teacher learns what that says instead, so its loss may well rise.
    """

    def __init__(self, config, device):
        if config.data.split == "test":
            raise UserError("--val_freq is for images that are held out, and --split test trains on them: leave one out")
        data = dataclasses.replace(config.data, split="test", flip=False)

        def load():
            try:
                return dataset.load(data)
            except UserError as error:
                raise UserError(f"--val_freq: {error}") from error

        held = dist_util.agree(load)
        names = dataset.check_classes(held, config.network.label_dim)[0]
        if config.network.label_dim and names != config.data.class_names:
            raise UserError(f"--split test has the classes {', '.join(names)}, not those of the training images")
        n, self.config = min(len(held), 2048), config
        self.bins = min(n, 10)  # of times, evenly spaced
        images, labels = dist_util.agree(lambda: held.batch([i * len(held) // n for i in range(n)]))
        source = torch.Generator().manual_seed(0)
        place = (torch.randperm(n, generator=source) + 0.5) / n  # of classes, which are often in order, each gets all times
        t = config.train.train_eps0 + (1 - config.train.train_eps0) * place
        z, x0 = torch.randn(images.shape, generator=source), dataset.to_model(images, config.data.centered)
        mine = slice(dist_util.rank(), None, dist_util.world_size())
        whole = (x0, z, t, dataset.one_hot(labels, config.network.label_dim), (self.bins * place).long())
        self.parts = [part if part is None else part[mine].to(device) for part in whole]

    @torch.no_grad()
    def __call__(self, trained, poll):
        sums = torch.zeros(2, self.bins, dtype=torch.float64)
        for i in range(0, len(self.parts[0]), self.config.sampling.eval_bsz):
            x0, z, t, label, bins = (p if p is None else p[i : i + self.config.sampling.eval_bsz] for p in self.parts)
            d = trained.model(sde.interpolate(x0, z, t), t, t if trained.is_flow_map else None, label)
            losses = sde.denoising_loss(d, x0, t, self.config.network.sigma_data).double().cpu()
            sums.index_add_(1, bins.cpu(), torch.stack([losses, torch.ones_like(losses)]))
        total, count = dist_util.sum_over_ranks(sums)
        return {"val_loss": float(total.sum() / count.sum()), "val_bins": (total / count).tolist()}


class Score:
    """Fréchet distance of --fid_num images to the statistics --ref_path, in their feature space; all ranks take part."""

    def __init__(self, run, config, shape, device):
        if not run.ref_path:
            raise UserError("--ref_path is missing: --fid_freq scores against the statistics of fid.py --mode ref")
        self.reference, self.count = dist_util.agree(lambda: fid.read_statistics(run.ref_path)), config.train.fid_num
        self.sha256 = dist_util.on_first_rank(lambda: misc.file_hash(fid.find(run.ref_path)))
        self.extract = fid.extractor(self.reference, shape, self.count, device, run)
        self.name = "pixel_fid" if self.extract.metadata["features"] == "pixels" else "fid"

    def __call__(self, trained, poll):
        images = fid.measure(generator.Generated(trained, range(self.count), poll), self.extract)
        distance = dist_util.on_first_rank(lambda: fid.frechet_distance(self.reference, images))
        return {self.name: distance, "images_scored": self.count, "reference": self.sha256}


def draw_samples(folder, trained, step):
    """samples/{step}.png, a grid of --nsampling images of seeds 0, 1, ...; and loss.png."""
    count, path = trained.config.train.nsampling, folder / "samples" / f"{step:06d}.png"
    with misc.not_fatal(path):
        misc.write_grid(path, trained.images(range(count)), columns=math.ceil(math.sqrt(count)))
    with misc.not_fatal(folder / "loss.png"):
        workdir.draw_curves(folder)


# --------------------------------------------------------------------------------------------------------- the run

SKIPPED_IN_A_ROW = 20  # steps without finite gradients after which a run gives up


class Training:
    """A run: what may refuse does so when it is made, then begin() takes its folder, and run() is the loop."""

    def __init__(self, run, flags, device):
        plan = dist_util.agree(lambda: workdir.make_plan(run, flags, device))
        if plan.teacher:
            generator.check_same_on_all_ranks(plan.teacher.path, plan.teacher.sha256)
        if len(set(dist_util.gather(plan.config.speed.precision))) > 1:
            raise UserError("the ranks would compute in different precisions: say one with --precision")
        if len(set(dist_util.gather((str(plan.saved and plan.saved.path), plan.start)))) > 1:
            raise UserError(f"the ranks see different runs in --workdir {plan.workdir}: put it where all machines see the same")
        defaults.choose("objective", plan.config.distil.objective, OBJECTIVES)
        defaults.choose("loss_norm", plan.config.distil.loss_norm, (*sde.DISTANCES, "lpips"))
        config, self.images, fingerprint, mean = load_data(run, plan, flags, device)
        if run.ref_path and not config.train.fid_freq:
            raise UserError("--ref_path is for --fid_freq, the steps between scores: add it, or leave --ref_path out")
        self.scores = []  # (steps between them, the name of what is found, function)
        if config.train.val_freq:
            self.scores.append((config.train.val_freq, "val_loss", Validation(config, device)))
        if config.train.fid_freq:
            score = Score(run, config, self.images.shape, device)
            self.scores.append((config.train.fid_freq, score.name, score))
        distance = make_distance(run, config, device) if plan.teacher else None
        for name, section in defaults.to_dict(config).items():
            if name == "distil" and not plan.teacher:
                continue
            shown = {key: value for key, value in section.items() if key not in ("class_names", "class_counts")}
            misc.log(f"{name:8}  " + "  ".join(f"{key}={json.dumps(value)}" for key, value in shown.items()))
        self.config, self.folder, self.keep, self.start = config, plan.workdir, run.keep, plan.start
        self.plan, self.state = plan, make_state(plan, config, self.images, fingerprint, mean)
        self.rounds = config.train.global_bsz // (config.train.bsz * dist_util.world_size())
        self.model = dist_util.parallel(self.state.model, static=plan.teacher is None and self.rounds == 1)
        kind = OBJECTIVES[config.distil.objective] if plan.teacher else Denoising
        self.objective = kind(self.model, config, plan.teacher, distance, self.state.ema.module)
        if plan.saved and plan.saved.ratio is not None:
            self.objective.ratio = torch.tensor(plan.saved.ratio, device=device)
        passes = self.objective.work(0, 1, self.rounds)[0] / self.rounds  # of an image: two for semigroup
        self.generator, self.flops = torch.Generator(device), passes * checkpoint.flops(config)

    def begin(self, remove):
        """Take the folder for this run, and make the data and the objective ready; `remove` what an earlier run left there."""
        plan, train = self.plan, self.config.train
        self.lock = dist_util.on_first_rank(lambda: workdir.prepare(plan, self.config, remove and not plan.saved, self.keep))
        self.begun = time.perf_counter() - next((x["seconds"] for x in workdir.history(plan)[::-1] if "seconds" in x), 0)
        self.steps = train.train_steps - (plan.origin["step"] if plan.origin else 0)  # of the run in this folder
        self.last_saved = plan.start if plan.in_place else None
        self.in_a_row = 0  # steps skipped since the last good one
        self.asked, self.owed = None, False  # a signal to stop, and a checkpoint: both wait for a step that is not skipped
        self.shown = {}
        self.lately, self.since_start = misc.Meter(train.global_bsz, self.flops), misc.Meter(train.global_bsz, self.flops)
        if plan.start < train.train_steps:
            self.objective.begin(plan.start, plan.workdir)
        self.data = dataset.batches(self.images, self.config.data, train, plan.start)

    def run(self):
        """Train until train_steps; Stopped, after a checkpoint, when a signal asks for it."""
        state, train = self.state, self.config.train
        total, done = train.train_steps * train.global_bsz, state.step * train.global_bsz
        with dist_util.StopSignals() as self.stop, misc.progress(total, self.config.task.mode, initial=done) as self.bar:
            if self.last_saved == state.step:
                self.draw_and_score()  # what is missing of it where a run was stopped
            while state.step < train.train_steps:
                if self.step():
                    self.report()
                    self.asked = self.asked or self.stop.check()
                    self.owed = self.owed or self.due(train.dump_freq)
                if (self.asked or self.owed) and not self.in_a_row:
                    self.save()
                    self.owed = False
                    if self.asked:
                        raise Stopped(self.asked, "; the same command continues")
                self.draw_and_score()
            self.save()
        if self.since_start.steps:
            speed = self.since_start.line(self.generator.device)
            misc.log("  ".join(f"{name}={value}" for name, value in speed.items()))
        if dist_util.rank() == 0:
            workdir.remove_banks(self.folder)
            print(self.folder / f"DDPMpp-{train.train_steps:06d}.pth", flush=True)
            with misc.not_fatal("loss.png"):
                workdir.draw_curves(self.folder)

    def step(self):
        """One step of the optimizer, skipped if its gradients are not finite; False if it was given up for a signal."""
        state, train, begun = self.state, self.config.train, time.perf_counter()
        self.objective.start_step(state.step)
        state.optim.zero_grad(set_to_none=True)
        logs = accumulate(self.model, self.objective, self.draw, self.rounds, self.after_round)
        if logs is None:
            return False
        logs["grad_norm"] = torch.nn.utils.clip_grad_norm_(state.model.parameters(), 1.0)
        if math.isfinite(logs["grad_norm"]):  # where the step waits for the device; the same on all ranks
            for group in state.optim.param_groups:
                group["lr"] = learning_rate(state.step, train)
            state.optim.step()
            state.ema.update(state.model, state.step)
            state.window.add(logs)
            self.in_a_row = 0
        else:
            state.window.skipped, self.in_a_row = state.window.skipped + 1, self.in_a_row + 1
            self.shown["skipped"] = state.skipped = state.skipped + 1
        state.step += 1
        if self.in_a_row == min(SKIPPED_IN_A_ROW, self.steps):
            self.give_up(f"no finite loss or gradient in {self.in_a_row} steps")
        for meter in (self.lately, self.since_start):
            meter.steps, meter.seconds = meter.steps + 1, meter.seconds + time.perf_counter() - begun
        return True

    def describe(self):
        """Print how large the run would be and how long it would take: a few steps are timed, and nothing is kept."""
        config, train, model = self.config, self.config.train, self.state.model
        misc.log("timing a few steps")
        x = torch.zeros(train.bsz, *self.state.mean.shape, device=self.generator.device)
        t = torch.full((len(x),), 0.5, device=x.device)
        label = dataset.one_hot(torch.zeros_like(t, dtype=torch.long), config.network.label_dim)
        passes, evaluations = self.objective.work(self.start, train.train_steps, self.rounds)
        seconds = passes * misc.timed(lambda: model(x, t, t if self.plan.teacher else None, label).square().mean().backward())
        if evaluations:
            with torch.no_grad():
                seconds += evaluations * misc.timed(lambda: self.plan.teacher.model(x, t, label=label))
        steps = train.train_steps - self.start
        lines = {
            "parameters": f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} million",
            "operations": f"{self.flops / 1e9:.2f} GFLOP an image, forward and backward",
            "images": f"{steps * train.global_bsz:,} in {steps:,} steps",
            "time": f"about {datetime.timedelta(seconds=round(seconds))} on {dist_util.world_size()} x {x.device.type}",
        }
        if workdir.bank_bytes(config):
            pairs = self.objective.pairs_of_each(self.start, train.train_steps)
            size = f"{workdir.bank_bytes(config) / 1e9:.2f} GB"
            lines["bank"] = f"{size} in {self.folder}; about {pairs:.1f} pairs are drawn of each solution"
        if dist_util.rank() == 0:
            print("\n".join(f"{name:12}{value}" for name, value in lines.items()))

    def draw(self, r):
        """The objective's arguments for a round of the present step."""
        train, device = self.config.train, self.generator.device
        begun = time.perf_counter()
        images, labels = next(self.data)
        for meter in (self.lately, self.since_start):
            meter.waited += time.perf_counter() - begun
        seed_round(self.generator, train.seed, self.state.step, r)
        x0 = dataset.to_model(images.to(device, non_blocking=True), self.config.data.centered)
        x0 = dataset.flip(x0, self.generator) if self.config.data.flip else x0
        offset = (r * dist_util.world_size() + dist_util.rank()) * train.bsz
        return x0, dataset.one_hot(labels.to(device, non_blocking=True), self.config.network.label_dim), self.generator, offset

    def after_round(self, last):
        """Whether the present step is given up, for a signal."""
        self.bar.set_postfix({"step": self.state.step + 1, **self.shown}, refresh=False)
        self.bar.update(self.config.train.bsz * dist_util.world_size())
        if last:
            return False
        self.asked = self.asked or self.stop.check()
        return bool(self.asked) and not self.in_a_row

    def due(self, freq):
        """Whether something that is done every `freq` steps, and at the end, follows the last step."""
        done = self.state.step
        return bool(freq and done and (done % freq == 0 or done == self.config.train.train_steps))

    def report(self):
        """A line of metrics.jsonl every log_freq steps."""
        state, train = self.state, self.config.train
        if not self.due(train.log_freq):
            return
        line = {
            "step": state.step,
            **state.window.means(),
            **self.objective.watch(),
            "lr": learning_rate(state.step - 1, train),
        }
        line |= self.lately.line(self.generator.device)
        line["images_seen"] = state.step * train.global_bsz
        self.note(line)
        if "loss" in line:
            self.shown["loss"] = f"{line['loss']:.4g}"
        state.window, self.lately = checkpoint.Window(self.generator.device), misc.Meter(train.global_bsz, self.flops)

    def note(self, line):
        """Add a line to metrics.jsonl, with the wall-clock time of the run, without that between a stop and going on."""
        if dist_util.rank() == 0:
            workdir.append_metrics(self.folder, {**line, "seconds": round(time.perf_counter() - self.begun, 1)})

    def save(self):
        """A checkpoint of the last step, if there is none.  Not after skipped steps, unless the run ends: it may be bad."""
        done = self.state.step
        if done and done != self.last_saved and (not self.in_a_row or done == self.config.train.train_steps):
            if not self.state.is_finite():
                self.give_up("the weights are not finite")
            ratio = getattr(self.objective, "ratio", None)
            self.state.facts["ratio"] = None if ratio is None else ratio.item()
            self.state.save(self.folder, self.keep)
            self.last_saved = done

    def draw_and_score(self):
        """The grid of samples and the score that follow the last step, if they are due and not there."""
        state, config = self.state, self.config
        done, new = state.step, state.step > self.start
        trained = generator.Trained(state.ema.module.at("fp32"), config, state.mean, done, "")  # as eval.py does by default
        if self.due(config.train.sampling_freq):
            missing = new or not (self.folder / "samples" / f"{done:06d}.png").exists()
            dist_util.on_first_rank(lambda: missing and draw_samples(self.folder, trained, done))
        for freq, name, score in self.scores:
            known = not new and any(x["step"] == done and name in x for x in workdir.read_metrics(self.folder))
            if self.due(freq) and not dist_util.gather(known)[0]:
                if name != "val_loss":  # a score may take long, and be stopped
                    self.save()
                found = score(trained, self.stop.poll)
                if dist_util.rank() == 0:
                    self.note({"step": done, **found})
                    self.shown[name] = f"{found[name]:.4f}"
                    self.bar.set_postfix(self.shown)

    def give_up(self, what):
        held = checkpoint.latest_checkpoint(self.folder)
        again = f"a new run from the last good checkpoint, --resume {held} --workdir NEW, with" if held else "again with"
        raise UserError(f"{what}, up to step {self.state.step}: look at the data, or begin {again} a lower --lr")


def load_data(run, plan, flags, device):
    """(configuration, images, their fingerprint, their mean) of a Plan, on all ranks; the configuration with what was found."""
    config, teacher = workdir.fit_to_ranks(plan, flags), plan.teacher
    may_download = plan.saved is None or "data_path" in flags  # else it may be looking where the run did not
    images = dist_util.agree(lambda: dataset.load(config.data, may_download))
    fingerprint = dist_util.gather(dist_util.on_first_rank(lambda: workdir.check_data(images, plan)))[0]
    if run.conditional:
        config = workdir.condition(config, plan, len(images.class_names))
    if config.network.label_dropout and not config.network.label_dim:
        raise UserError("--label_dropout is for a model with classes: add --conditional, or leave it out")
    names, counts = dataset.check_classes(images, config.network.label_dim)
    theirs = teacher.config.data.class_names if teacher and config.network.label_dim else ()
    if theirs and names != theirs:
        raise UserError(f"the data has the classes {', '.join(names)}, and {teacher.path} has {', '.join(theirs)}")
    if isinstance(images, dataset.ImageFiles):
        place = Path(config.data.data_path) if config.data.data_name == "folder" else images.path  # test/ is data, too
        if plan.workdir.resolve().is_relative_to(place.resolve()):
            raise UserError(f"--workdir {plan.workdir} lies in --data_path: its pictures would be data; choose another")
        for line in images.conversions() if dist_util.rank() == 0 else ():
            misc.log(line)
    images = dist_util.agree(lambda: dataset.resident(images, device))
    if plan.saved or teacher and teacher.knows_mean:
        mean = plan.saved.mean if plan.saved else teacher.mean
    else:
        mean, sigma = dataset.data_moments(images, config.data)
        if plan.measures_sigma:
            config = defaults.resolve({"sigma_data": round(sigma, 4)}, config)
    return config.replace("data", class_names=names, class_counts=counts), images, fingerprint, mean.to(device)


def make_state(plan, config, images, fingerprint, mean):
    """The TrainingState that a run begins with or goes on from."""
    teacher = plan.teacher
    torch.manual_seed(config.train.seed)
    model = checkpoint.build_model(config).to(mean.device).train()
    if teacher:
        teacher.mean, teacher.model = mean, teacher.model.at(config.speed.precision)
        network.start_from_teacher(model.net, teacher.model.net)
    began = plan.saved.init if plan.saved else None
    if plan.init:
        began = {name: plan.init[name] for name in ("path", "sha256")}
        weights = plan.init["content"]["ema"]
        for line in dist_util.agree(lambda: list(checkpoint.init_weights(model.net, weights, began["path"]))):
            misc.log(line)
    state = checkpoint.TrainingState(model, config, mean, len(images), fingerprint, plan.origin, plan.teacher_file, began)
    if plan.saved:
        state.restore(plan.saved)
        left = config.train.train_steps - plan.start
        does = f"continuing {plan.saved.path}" if left else f"nothing is left to do, {plan.saved.path} is"
        misc.log(f"{does} at step {plan.start} of {config.train.train_steps}")
    if config.speed.compile:  # in place, after the average was copied from it
        for net in (model.net, *([teacher.model.net] if teacher else [])):
            network.compile_in_place(net)
    return state


def main():
    run, flags = defaults.parse("train", description=__doc__)
    with dist_util.session() as device:
        training = Training(run, flags, device)
        if run.dry_run:
            training.describe()
        else:
            training.begin(remove=run.force)
            training.run()
        del training  # a DistributedDataParallel that outlives the process group can hang


if __name__ == "__main__":
    dist_util.launch(main)
