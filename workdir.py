"""A run's folder: what it holds, what the same command continues there, who may write to it, and its metrics.

{workdir}/DDPMpp-{step}.pth, latest.pth     checkpoints; see checkpoint.py
{workdir}/config.json                       the configuration, for people
{workdir}/metrics.jsonl, loss.png           a line every log_freq steps, and what it looks like
{workdir}/samples/{step}.png                grids of images
{workdir}/bank-{rank}.bin, .json            stage 2's bank, while the run is under way
{workdir}/.lock                             held by the run that writes here
"""

import dist_util
from dist_util import LoneError, UserError

import fcntl
import json
import math
import os
import re
import shutil
import time
import zlib
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import checkpoint
import defaults
import generator
import misc
import network

# What may change when the same run continues; docs/reliability.md says what bsz and train_steps do to it.
FREE = ("train_steps", "bsz", "log_freq", "sampling_freq", "dump_freq", "nsampling", "val_freq")
FREE += ("fid_freq", "fid_num", "eval_bsz")


@dataclass
class Plan:
    """What is to be trained, where, and from where on."""

    config: defaults.Config
    workdir: Path
    saved: checkpoint.Saved | None  # the checkpoint to go on from
    origin: dict | None  # path, sha256 and step of the checkpoint that the run in workdir began from with --resume
    teacher: generator.Trained | None
    teacher_file: dict | None  # path and sha256
    in_place: bool  # whether it continues what is in its own workdir
    init: dict | None  # content, path and sha256 of the checkpoint whose weights a new run begins with
    measures_sigma: bool  # --sigma_data auto

    @property
    def start(self):
        """Steps that are done already."""
        return self.saved.step if self.saved else 0


def make_plan(run, flags, device):
    """The Plan of a command: a run that goes on keeps its settings, a student takes data and network from its teacher."""
    check_flags(run)
    workdir = choose_folder(run, flags)
    held = None if begins_anew(run, workdir) else load_last(workdir)
    if not held and not run.fresh and (workdir / "metrics.jsonl").exists():
        misc.log(f"{workdir} holds metrics but no checkpoint: the run begins anew there")
    named = load_named(run, workdir, held)
    saved = held or named
    settings, measures_sigma = dict(flags), flags.get("sigma_data") == "auto"
    if measures_sigma:
        if run.teacher:
            raise UserError("--sigma_data auto is for stage 1: the flow map has its teacher's")
        del settings["sigma_data"]
        if saved:
            misc.log(f"--sigma_data stays {saved.config.network.sigma_data}, as the run began")
    mode = saved.config.task.mode if saved else flags.get("mode", "denoiser")
    if named and flags.get("mode", mode) != mode:
        raise UserError(f"--mode is {flags['mode']}, but --resume {run.resume} is a {mode}; stage 2 takes --teacher alone")
    if mode == "characteristic":
        settings = {defaults.IN_STAGE_2.get(name, name): value for name, value in settings.items()}
        if "ode_solver" in settings:
            misc.log("a flow map has no --ode_solver, it changes nothing: --teacher_solver is that of the teacher's ODE")
        if settings.get("label_dropout"):
            raise UserError("--label_dropout is for stage 1: leave it out, since the flow map needs every label")
    if saved:
        again = f"choose another --workdir for a new run, or go on from here with --resume {saved.path} --workdir NEW"
        strict = {"sections": tuple(defaults.SECTIONS), "free": FREE, "advice": f"leave them out, {again}"} if held else {}
        config = checkpoint.override(saved.config, settings, saved.path, **strict)
    teacher, teacher_file = find_teacher(run, settings, mode, saved, device)
    init = find_init(run, saved)
    if not saved:
        inherited = inherit(settings, teacher, init)
        config = defaults.resolve({"precision": network.fastest_precision(device), **inherited, **settings})
    if teacher and config.distil.teacher_guidance != 1:
        generator.check_guidance(teacher)
    if not teacher and config.sampling.guidance != 1:
        raise UserError("--guidance is for sampling, and for stage 2, which distils it: leave it out")
    if saved and (saved.step > config.train.train_steps or named and named.step == config.train.train_steps):
        raise UserError(f"{saved.path} is at step {saved.step} already: to train longer, raise --train_steps")
    check_room(config, workdir)
    origin = held.origin if held else None
    if named:
        origin = {"path": os.path.abspath(named.path), "sha256": misc.file_hash(named.path), "step": named.step}
    return Plan(config, workdir, saved, origin, teacher, teacher_file, held is not None, init, measures_sigma)


def check_flags(run):
    """UserError where train.py's own flags do not go together."""
    if run.keep < 0:
        raise UserError(f"--keep is {run.keep}: it must be a number of checkpoints, or 0 for all")
    if run.resume and run.fresh:
        raise UserError("--resume continues and --fresh begins anew: leave one out")
    if run.force and not run.fresh:
        raise UserError("--force is for --fresh, to remove the run that --workdir holds: add it, or leave --force out")
    if run.init and run.resume:
        raise UserError("--resume goes on with a run and --init begins one: leave one out")


def find_init(run, saved):
    """What --init gives a new run, {content, path, sha256}, or None; UserError where a run that goes on began otherwise."""
    if not run.init:
        return None
    path = os.path.abspath(run.init)
    if saved and (saved.init or {}).get("path") != path:
        raise UserError(f"{saved.path} did not begin with --init {run.init}: leave it out, or begin a new run")
    return None if saved else {"content": checkpoint.read(run.init), "path": path, "sha256": misc.file_hash(path)}


def inherit(flags, teacher, init):
    """{setting: value} that a new run takes: all of its teacher's, or of --init those that do not depend on its data."""
    if teacher:  # the flow map begins where the teacher's sampling does
        found = {**vars(teacher.config.data), **vars(teacher.config.network), "label_dropout": 0.0}
        return found | dict.fromkeys(("train_eps1", "eval_eps1"), teacher.config.sampling.eval_eps1)
    if not init or "config" not in init["content"]:
        return {}
    config = defaults.from_dict(init["content"]["config"])
    found = {name: value for name, value in vars(config.network).items() if name not in ("label_dim", "label_dropout")}
    size = flags.get("image_size") or defaults.preset(flags.get("data_name", "digits"), "denoiser")["image_size"]
    there = [res in config.network.attn_resolutions for res in defaults.resolutions(config)]
    attention = tuple(size >> level for level, attends in enumerate(there) if attends)
    return {**found, "attn_resolutions": attention, "centered": config.data.centered}


def condition(config, plan, classes):
    """The configuration of a model that is conditional on so many classes; UserError where a checkpoint says otherwise."""
    if classes < 2:
        raise UserError("--conditional: the data has no classes; --data_path names what holds their folders")
    if plan.saved or plan.teacher:
        if config.network.label_dim != classes:
            path = plan.saved.path if plan.saved else plan.teacher.path
            raise UserError(f"--conditional: the data has {classes} classes, and {path} has {config.network.label_dim}")
        return config
    if config.network.label_dim not in (0, classes):
        raise UserError(
            f"--label_dim is {config.network.label_dim}, and the data has {classes} classes: --conditional is enough"
        )
    return config.replace("network", label_dim=classes)


def choose_folder(run, flags):
    """--workdir, or logs/{data_name}-{mode} with what flags, --resume and --teacher say."""
    config, before = defaults.Config(), run.resume or (run.teacher if flags.get("mode") == "characteristic" else None)
    if before and not run.workdir:
        config = defaults.from_dict(checkpoint.read(before).get("config", {}))
    data_name, mode = flags.get("data_name", config.data.data_name), flags.get("mode", config.task.mode)
    folder = Path(run.workdir or f"logs/{data_name}-{mode}")
    misc.check_folder(folder, "workdir")
    return folder


def begins_anew(run, workdir):
    """Whether --fresh is to begin anew here; UserError where that would overwrite a run without --force, or under torchrun."""
    torchrun = "TORCHELASTIC_RUN_ID" in os.environ  # a job that it starts again would remove what it has done itself
    if run.fresh and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        raise UserError("--fresh would begin anew at each restart: leave out --fresh, or torchrun's --max-restarts")
    if run.fresh and checkpoint.latest_checkpoint(workdir) and (torchrun or not run.force):
        advice = "leave --fresh out (torchrun may start a job again: no --force there)" if torchrun else "add --force"
        raise UserError(f"--workdir {workdir} holds a run, which --fresh would overwrite: choose another, or {advice}")
    return run.fresh


def load_last(workdir):
    """The Saved of a folder's last checkpoint, None without one; UserError says what to do if it is lost or damaged."""
    latest = checkpoint.latest_checkpoint(workdir)
    if latest is None and (workdir / "latest.pth").exists():
        raise UserError(f"{workdir}/latest.pth is no link to a checkpoint: call it DDPMpp-000000.pth, with its step, to go on")
    if latest is None:
        return None
    try:
        return checkpoint.load_run(latest)
    except UserError as error:
        advice = f"put a good one there, or remove it and {workdir}/latest.pth to continue from the checkpoint before it"
        raise UserError(f"{error}: {advice}") from error


def load_named(run, workdir, held):
    """The Saved of --resume, from which a new run begins.  None without --resume, or where --workdir holds a run: `held`.

    That goes on instead.  --resume may name what it began from, even if that is gone, or its own latest.pth; else UserError.
    """
    if not held:
        return checkpoint.load_run(run.resume) if run.resume else None
    known = (held.origin and held.origin["path"], os.path.abspath(workdir / "latest.pth"))
    if run.resume and os.path.abspath(run.resume) not in known:
        advice = "leave --resume out to go on from its last checkpoint, or choose another folder"
        raise UserError(f"--workdir {workdir} holds a run that did not begin from {run.resume}: {advice}")
    return None


def find_teacher(run, flags, mode, saved, device):
    """(teacher of stage 2, its file's path and sha256), or (None, None) in stage 1; a run that continues knows its file."""
    if mode == "denoiser":
        if run.teacher:
            raise UserError("--teacher is for stage 2: add --mode characteristic, or leave it out")
        return None, None
    known = saved.teacher if saved else None
    path = run.teacher or (known["path"] if known else None)
    if not path:
        raise UserError("--teacher is missing: stage 2 needs the checkpoint of stage 1")
    if not run.teacher and not Path(path).is_file():
        raise UserError(f"the teacher of {saved.path} is no longer at {path}: say where it is with --teacher")
    of_model = defaults.MODEL_SETTINGS - {"mode", "compile"}
    teacher = generator.load_model(path, {name: value for name, value in flags.items() if name in of_model}, device)
    if teacher.is_flow_map:
        raise UserError(f"{path} is a flow map: --teacher takes a denoiser, from train.py --mode denoiser")
    if known and known["sha256"] != teacher.sha256:
        raise UserError(f"{path} is not the teacher that {saved.path} began with: name that with --teacher, or begin a new run")
    return teacher, {"path": os.path.abspath(path), "sha256": teacher.sha256}


def bank_slots(config):
    """How many batches of global_bsz solutions the bank of stage 2 holds, without the one that is never trained on."""
    return math.ceil(config.distil.bank_size / config.train.global_bsz)


def bank_bytes(config):
    """What the bank of stage 2 takes, over all ranks; 0 where there is none."""
    distil, data = config.distil, config.data
    if config.task.mode == "denoiser" or distil.objective != "trajectory":
        return 0
    states = (bank_slots(config) + 1) * config.train.global_bsz * (distil.grid_steps + 1)
    values = states * data.image_channels * data.image_size**2
    return values * getattr(torch, distil.bank_dtype).itemsize


def check_room(config, workdir):
    """UserError unless the disk of the workdir has room for the bank."""
    place = next(p for p in (workdir, *workdir.absolute().parents) if p.exists())
    room = shutil.disk_usage(place).free + sum(path.stat().st_size for path in bank_files(workdir))
    if bank_bytes(config) > room:
        held = f"holds {bank_bytes(config) / 2**30:.1f} GiB, and {place} has room for {room / 2**30:.1f}"
        raise UserError(f"the bank of stage 2 {held}: free some, lower --bank_size, or take --bank_dtype float16")


def check_data(images, plan):
    """The fingerprint of the data; UserError if it is not that of the run that continues."""
    found, saved = images.fingerprint(), plan.saved
    if saved and saved.data != found:
        differ = f"{len(images)} images, and had {saved.images}"
        differ = differ if len(images) != saved.images else f"other images than the {saved.images} it had"
        raise UserError(f"the data has {differ} in {saved.path}: name those with --data_path, or begin a new run")
    return found


def fit_to_ranks(plan, flags):
    """The configuration, with another --bsz where a run continues on ranks that need it, or UserError; logs what differs."""
    config, saved, world = plan.config, plan.saved, dist_util.world_size()
    train = config.train
    share, rest = divmod(train.global_bsz, world)
    if saved and "bsz" not in flags and not rest and share % train.bsz:
        config = defaults.resolve({"bsz": next(n for n in range(train.bsz, 0, -1) if share % n == 0)}, config)
    elif train.global_bsz % (train.bsz * world):
        must = f"it must be a multiple of --bsz times the ranks, {train.bsz} x {world}"
        raise UserError(f"--global_bsz is {train.global_bsz}: {must}{'' if rest else f'; try --bsz {share}'}")
    if plan.teacher:
        check_parts(config)
    if train.lr_rampup_steps > train.train_steps / 2:
        misc.log(f"the warm-up of {train.lr_rampup_steps} steps is long for a run of {train.train_steps} (--lr_rampup_steps)")
    if saved and train.lr_decay == "cosine" and saved.config.train.train_steps != train.train_steps:
        misc.log(f"the cosine of the learning rate now ends at step {train.train_steps}: it is another from here on")
    if saved and (saved.ranks, saved.bsz) != (world, config.train.bsz):
        ranks = f"{world} rank{'s' * (world > 1)} of {config.train.bsz} what ran on {saved.ranks} of {saved.bsz}"
        misc.log(f"continuing on {ranks}: the same images, but other draws of noise, dropout and bank, and so other weights")
    return config


def stage_1_images(share, offset, n):
    """How many of the n images of a part, from `offset` of the batch on, are for the stage-1 loss: a `share` of the batch."""
    return round((offset + n) * share) - round(offset * share)


def check_parts(config):
    """UserError unless --dsm_share leaves pairs to each part of a batch, and a batch has images for the stage-1 loss."""
    train, distil = config.train, config.distil
    share = distil.dsm_share if distil.objective == "trajectory" and distil.dsm_weight else 0
    parts = [stage_1_images(share, offset, train.bsz) for offset in range(0, train.global_bsz, train.bsz)]
    if share and (max(parts) == train.bsz or not sum(parts)):
        must = f"0, or such that both losses get images of a --bsz of {train.bsz} and a --global_bsz of {train.global_bsz}"
        raise UserError(f"--dsm_share is {share}: it must be {must}")


def lock(workdir):
    """A handle on {workdir}/.lock that keeps other runs out for as long as this process lives; UserError if one is in."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        handle = open(workdir / ".lock", "a")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"cannot write {workdir}: {error.strerror}; choose another --workdir") from error
    for _ in range(11):
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            time.sleep(0.5)  # it may be a process of this command that was killed and is still leaving
        except OSError:  # a file system without locks
            return handle
    raise UserError(f"--workdir {workdir} is in use by another run: wait for it, or choose another")


def prepare(plan, config, remove, keep):
    """Make the folder ready, without an earlier run if `remove`; returns the handle of lock().  It may be killed anywhere."""
    folder, before = plan.workdir, history(plan)
    handle = lock(folder)
    if not remove and checkpoint.latest_checkpoint(folder) != (plan.saved.path if plan.in_place else None):
        raise UserError(f"--workdir {folder} has just been written to by another run: start the command again")
    for place in (folder, folder / "samples"):
        misc.remove_leftovers(place)
    misc.write_json(folder / "config.json", defaults.to_dict(config))
    with misc.atomic(folder / "metrics.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in before))
    if remove:
        for path in (*checkpoint.checkpoints(folder), folder / "latest.pth", folder / "loss.png"):
            path.unlink(missing_ok=True)
        remove_banks(folder)
        shutil.rmtree(folder / "samples", ignore_errors=True)
    if plan.in_place:  # it may have been killed before
        checkpoint.remove_old(folder, keep)
    return handle


class Bank:
    """Batches of the teacher's solutions: `states` (slots, *shape), each slot with the batch of a number.

    A run keeps them in {folder}/bank-{rank}.bin, which is the memory of `states` on a CPU and mirrors it on a GPU.  Beside it,
    .json says which batch each slot holds, its CRC-32, and what the batches are made from, `about`: a run that continues
    computes again what it lacks.  Without a folder they are in memory alone.  UserError if the disk has no room.
    """

    def __init__(self, folder, about, slots, shape, dtype, device):
        self.about, self.held, size = about, {}, slots * math.prod(shape)
        self.record = folder and folder / f"bank-{dist_util.rank()}.json"
        if folder:
            path, nbytes = self.record.with_suffix(".bin"), size * dtype.itemsize
            try:
                with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
                    file.truncate(nbytes)
                    if hasattr(os, "posix_fallocate"):  # a full disk is an error here, and a crash when it is written to
                        os.posix_fallocate(file.fileno(), 0, nbytes)
                kept = torch.from_numpy(np.memmap(path, str(dtype).removeprefix("torch."), shape=size))
            except OSError as error:
                with suppress(OSError):
                    path.unlink(missing_ok=True)
                what, why = f"the bank of {nbytes / 2**30:.3g} GiB", error.strerror
                raise UserError(f"cannot keep {what} in {folder}: {why}; free some space, or lower --bank_size") from error
            with suppress(Exception):  # there is none, or it is damaged: all is computed again
                found = json.loads(self.record.read_text())
                held = {slot: [int(number), int(crc)] for slot, (number, crc) in found["held"].items()}
                self.held = held if found["about"] == json.loads(json.dumps(about)) else {}
        else:
            kept = torch.empty(size, dtype=dtype)
        self.kept = kept.view(slots, *shape)
        self.states = self.kept if device.type == "cpu" else torch.empty_like(self.kept, device=device)

    def holds(self, slot, number):
        """Whether a slot holds this batch, as it was written."""
        held, crc = self.held.get(str(slot), (None, None))
        if held != number or crc != zlib.crc32(self.kept[slot].numpy()):
            return False
        if self.states is not self.kept:
            self.states[slot] = self.kept[slot]
        return True

    @contextmanager
    def writing(self, slot, number):
        """Gives the slot, (*shape), to write the batch to."""
        if self.held.pop(str(slot), None):
            self.note()
        yield self.states[slot]
        if self.record:
            if self.states is not self.kept:
                self.kept[slot] = self.states[slot]
            self.held[str(slot)] = [number, zlib.crc32(self.kept[slot].numpy())]
            self.note()

    def note(self):
        try:
            misc.write_json(self.record, {"about": self.about, "held": self.held})
        except UserError as error:
            raise LoneError(str(error)) from error


def bank_files(folder):
    return [path for path in folder.glob("bank-*") if re.fullmatch(r"bank-\d+\.(bin|json)", path.name) and path.is_file()]


def remove_banks(folder):
    for path in bank_files(folder):
        path.unlink(missing_ok=True)


def read_metrics(workdir):
    """The lines of metrics.jsonl as dicts, without a last one that a kill cut short; UserError if it is damaged."""
    path = workdir / "metrics.jsonl"
    try:
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        lines = [json.loads(line) for line in lines]
        if not all(type(line["step"]) is int and type(line.get("seconds", 0.0)) in (int, float) for line in lines):
            raise ValueError("a step or a time that is no number")
        return lines
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: repair it, or move it away") from error


def history(plan):
    """The lines of metrics.jsonl up to the step that a run goes on from, in its own folder or in that of --resume."""
    return [line for line in read_metrics(plan.saved.path.parent) if line["step"] <= plan.start] if plan.saved else []


def append_metrics(workdir, line):
    """Add a line to metrics.jsonl; LoneError if the disk refuses."""
    try:
        with open(workdir / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise LoneError(f"cannot write {workdir}/metrics.jsonl: {error.strerror}; free some space") from error


# Titles of panels, by what lines of metrics.jsonl hold; stage 1 calls its loss `loss`, stage 2 `denoising`.
PANELS = {"loss": "denoising loss", "denoising": "denoising loss", "distance": "distance", "lr": "learning rate"}
PANELS |= {
    "one_step": "one step; dotted: new noise",
    "val_loss": "held-out denoising loss",
    "pixel_fid": "pixel FID",
    "fid": "FID",
}


def draw_curves(workdir):
    """loss.png from metrics.jsonl: a panel for each thing that it holds."""
    lines = read_metrics(workdir)
    held = {name for line in lines for name in line}
    if "distance" in held:
        held.discard("loss")  # stage 2's is a sum whose weight drifts
    shown, bins = [name for name in PANELS if name in held], [line["val_bins"] for line in lines if "val_bins" in line]
    if shown:
        panels = len(shown) + bool(bins)
        figure, axes = misc.new_figure(panels, 3.2 * panels, 2.8)
        for ax, name in zip(axes, shown):
            steps, values = zip(*((line["step"], line[name]) for line in lines if name in line))
            ax.plot(steps, values, "." if len(steps) == 1 else "-")
            if name == "one_step":
                ax.plot(steps, [line["one_step_new"] for line in lines if name in line], ":", color="C0")
            ax.set(title=PANELS[name], xlabel="step", yscale="linear" if name == "lr" else "log")
        for values, style in zip((bins[0], bins[-1]) if bins else (), (":", "-")):  # dotted: the first time
            axes[-1].plot([(i + 0.5) / len(values) for i in range(len(values))], values, style, color="C0")
            axes[-1].set(title="held-out loss by time", xlabel="t", yscale="log")
        misc.write_figure(workdir / "loss.png", figure, dpi=100)
