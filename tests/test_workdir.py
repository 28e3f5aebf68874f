"""A run's folder: what the same command continues, --resume, --fresh, the lock, metrics and their curves."""

from dist_util import UserError

import json
import os
import re
import shutil
import signal
from contextlib import nullcontext

import pytest
import torch
from PIL import Image

import checkpoint
import defaults
import misc
import workdir
from conftest import (
    ENDLESS,
    LENGTH,
    SHORT_STAGE_2,
    SMALL,
    STAGE_1,
    TINY_NETWORK,
    TINY_RUN,
    assert_equal,
    assert_same_run,
    has_trained,
    images,
    metrics,
    run,
    tiny_checkpoint,
    wait_for,
    write_folder,
)
from processes import Job

# -------------------------------------------------------------------------------------------------- what continues what


def test_another_workdir_begins_from_the_checkpoint_that_resume_names(tmp_path):
    """To the same weights, optimizer and average; and the same command again goes on there."""
    shared = ["train.py", "--mode", "denoiser", *TINY_NETWORK, *TINY_RUN]
    run(*shared, "--workdir", tmp_path / "whole", "--dump_freq", "2")
    resume = [*shared, "--workdir", tmp_path / "rest", "--resume", tmp_path / "whole" / "DDPMpp-000002.pth"]
    run(*resume)
    a, b = (checkpoint.read(tmp_path / d / "DDPMpp-000003.pth") for d in ("whole", "rest"))
    for part in ("model", "ema"):
        assert all(torch.equal(a[part][k], b[part][k]) for k in a[part])
    assert all(torch.equal(a["optim"]["state"][i]["exp_avg"], b["optim"]["state"][i]["exp_avg"]) for i in a["optim"]["state"])
    again = run(*resume, "--train_steps", "4")
    assert "rest/DDPMpp-000003.pth at step 3 of 4" in again.stderr and (tmp_path / "rest" / "DDPMpp-000004.pth").exists()
    other = [*resume[:-1], tmp_path / "whole" / "DDPMpp-000003.pth", "--train_steps", "9"]
    assert "did not begin from" in run(*other, expect=2).stderr
    back = [*resume[:-3], tmp_path / "whole", *resume[-2:]]
    assert "leave --resume out to go on from its last checkpoint" in run(*back, expect=2).stderr


def test_a_run_that_continues_takes_its_settings_from_its_checkpoint(tmp_path):
    odd = ["--sigma_data", "0.5", "--no-centered", "--lr", "1e-4"]
    run("train.py", *TINY_NETWORK, *TINY_RUN, *odd, "--workdir", tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    with open(metrics, "a") as file:
        file.write('{"step": 4, "loss": 1.0}\n{"step": 5, "lo')  # what a run that was killed later may leave
    checkpoint = tmp_path / "run" / "DDPMpp-000003.pth"
    run("train.py", "--resume", tmp_path / "run" / "latest.pth", "--train_steps", "5", "--workdir", tmp_path / "run")
    saved = torch.load(tmp_path / "run" / "DDPMpp-000005.pth", weights_only=True)["config"]
    assert saved["network"]["sigma_data"] == 0.5 and not saved["data"]["centered"] and saved["train"]["lr"] == 1e-4
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [1, 2, 3, 4, 5]
    for flags, message in ((["--train_steps", "3"], "at step 3 already"), (["--sigma_data", "2"], "--sigma_data is 2.0")):
        done = run("train.py", "--resume", checkpoint, *flags, "--workdir", tmp_path / "new", expect=2)
        assert message in done.stderr and not (tmp_path / "new").exists()


def test_a_finished_run_has_nothing_left_to_do_and_says_where_it_is(tmp_path):
    outputs = []
    for name in ("first", "again"):
        job = Job(tmp_path / name, *STAGE_1, "--workdir", tmp_path / "run")
        assert job.wait() == [0]
        outputs.append((job.out(), (tmp_path / "run" / "metrics.jsonl").read_bytes()))
    assert outputs[0] == outputs[1] and outputs[0][0].endswith("DDPMpp-000012.pth\n")


def test_the_command_that_began_from_another_run_continues_when_that_run_has_gone_on_or_is_gone(tmp_path):
    assert Job(tmp_path / "log", *STAGE_1, "--workdir", tmp_path / "source").wait() == [0]
    link = tmp_path / "source" / "latest.pth"
    shared = [*STAGE_1, "--train_steps", "24", "--resume", link, "--workdir", tmp_path / "run"]
    assert Job(tmp_path / "first", *shared, fault=("step", 5)).wait() == [-signal.SIGKILL]
    assert Job(tmp_path / "on", *STAGE_1, "--train_steps", "15", "--workdir", tmp_path / "source").wait() == [0]
    second = Job(tmp_path / "second", *shared, fault=("step", 5))
    assert second.wait() == [-signal.SIGKILL] and "at step 15 of 24" in second.err(), second.err()
    link.unlink()
    third = Job(tmp_path / "third", *shared)
    assert third.wait() == [0] and "at step 18 of 24" in third.err(), third.err()
    other = Job(tmp_path / "other", *shared, "--resume", tmp_path / "source" / "DDPMpp-000015.pth")
    assert other.wait() == [2] and "holds a run that did not begin from" in other.err()


def test_another_number_of_ranks_goes_on_with_the_same_images_and_says_what_differs(tmp_path):
    """2 ranks of 4, then 1 of 4; and from 1 rank of 8 to 2, for which 8 does not fit."""
    for before, after, bsz in ((2, 1, ["--bsz", "4"]), (1, 2, [])):
        start_with = [part for part in STAGE_1 if part not in ("--bsz", "4")] if not bsz else STAGE_1
        run = ["--workdir", tmp_path / f"{before}"]
        first = [*start_with, *run] if bsz else ["train.py", *TINY_NETWORK, *LENGTH, "--global_bsz", "8", "--bsz", "8", *run]
        assert -signal.SIGKILL in Job(tmp_path / "a", *first, ranks=before, fault=("step", 8)).wait()
        second = first if bsz else [part for i, part in enumerate(first) if "--bsz" not in first[max(0, i - 1) : i + 1]]
        job = Job(tmp_path / f"b{before}", *second, ranks=after)
        assert job.wait() == [0] * after, job.err()
        assert f"continuing on {after} rank{'s' * (after > 1)} of 4 what ran on {before} of {4 if bsz else 8}" in job.err()
        assert checkpoint.read(tmp_path / f"{before}" / "DDPMpp-000012.pth")["config"]["train"]["global_bsz"] == 8
        assert [line["step"] for line in metrics(tmp_path / f"{before}")] == [5, 10, 12]


# ------------------------------------------------------------------------------------------------- --fresh and the lock


def test_fresh_begins_anew_only_where_it_destroys_nothing_unless_forced(tmp_path):
    shared = [*STAGE_1, "--workdir", tmp_path / "run", "--fresh"]
    assert Job(tmp_path / "log", *shared).wait() == [0]
    job = Job(tmp_path / "refused", *shared, "--seed", "1")
    assert job.wait() == [2] and "holds a run, which --fresh would overwrite" in job.err()
    assert Job(tmp_path / "log", *shared, "--seed", "1", "--force").wait() == [0]
    assert Job(tmp_path / "log", *STAGE_1, "--seed", "1", "--workdir", tmp_path / "other").wait() == [0]
    assert_same_run(tmp_path / "run", tmp_path / "other")


def test_fresh_under_torchrun_overwrites_nothing(tmp_path):
    """It may start a job again, for a machine that joins too, of which its count of restarts says nothing."""
    shared, torchrun = [*STAGE_1, "--fresh", "--force", "--workdir", tmp_path / "run"], {"TORCHELASTIC_RUN_ID": "job7"}
    assert Job(tmp_path / "first", *shared, environment=torchrun, fault=("step", 8)).wait() == [-signal.SIGKILL]
    again = Job(tmp_path / "again", *shared, environment=torchrun)
    assert again.wait() == [2] and "or leave --fresh out (torchrun may start a job again" in again.err(), again.err()
    going_on = Job(tmp_path / "on", *STAGE_1, "--workdir", tmp_path / "run", environment=torchrun)
    assert going_on.wait() == [0] and "at step 6 of 12" in going_on.err(), going_on.err()
    anew = Job(tmp_path / "alone", *shared)
    assert anew.wait() == [0] and "continuing" not in anew.err(), anew.err()


def test_fresh_is_refused_where_torchrun_may_restart(tmp_path):
    """Before anything is trained, not after the first restart."""
    restarts = {"TORCHELASTIC_RUN_ID": "job7", "TORCHELASTIC_MAX_RESTARTS": "3"}
    job = Job(tmp_path / "log", *STAGE_1, "--fresh", "--workdir", tmp_path / "run", environment=restarts)
    assert job.wait() == [2] and "leave out --fresh, or torchrun's --max-restarts" in job.err(), job.err()
    assert not (tmp_path / "run").exists()


def test_a_workdir_takes_one_run_at_a_time(tmp_path):
    arguments = ["train.py", *SMALL, *ENDLESS, "--workdir", tmp_path / "run"]
    first = Job(tmp_path / "first", *arguments)
    wait_for(lambda: has_trained(tmp_path / "run"), "line of metrics")
    second = Job(tmp_path / "second", *arguments)
    assert second.wait(30) == [2] and "is in use by another run" in second.err()
    first.signal(signal.SIGTERM)
    assert first.wait(20) == [143]


# -------------------------------------------------------------------------------------------- what a command is refused

CPU = torch.device("cpu")


def plan(folder=None, flags=(), **run):
    """workdir.make_plan() of a command with these settings of the script, and flags."""
    return workdir.make_plan(defaults.TrainRun(workdir=str(folder) if folder else None, **run), dict(flags), CPU)


def copy_of(models, tmp_path, name):
    return shutil.copytree(models / name, tmp_path / name, symlinks=True)


@pytest.mark.parametrize("flags", [{"lr": 1.0}, {"global_bsz": 16}, {"seed": 3}, {"num_steps": 9}], ids=str)
def test_a_refused_flag_names_the_two_ways_there_are(models, tmp_path, flags):
    """Another folder for a new run, or --resume into one; the second is what it says."""
    folder = copy_of(models, tmp_path, "ode")
    with pytest.raises(UserError, match=f"--{next(iter(flags))} is .* and was") as caught:
        plan(folder, flags)
    found = re.search(r"choose another --workdir .*--resume (\S+) --workdir NEW", str(caught.value))
    assert found and found[1] == str(folder / "DDPMpp-000004.pth"), str(caught.value)
    going_on = plan(tmp_path / "new", {**flags, "train_steps": 6}, resume=found[1])
    assert going_on.start == 4 and not going_on.in_place and going_on.origin["path"] == found[1]


def test_the_grid_of_stage_2_is_called_by_its_flags(models, tmp_path):
    """--num_steps and --rho, in what is refused too."""
    with pytest.raises(UserError, match="--num_steps is 9 and was 2; --rho is 2.0 and was 1.0"):
        plan(copy_of(models, tmp_path, "flow"), {"num_steps": 9, "rho": 2.0})
    with pytest.raises(UserError, match="--num_steps is 65536: it must be from 1 to 4095"):
        plan(tmp_path / "new", {"mode": "characteristic", "num_steps": 65536}, teacher=str(models / "ode" / "latest.pth"))
    flags = {"mode": "characteristic", "time_grid": "karras"}
    with pytest.raises(UserError, match="--time_grid is karras: it must be one of t, cosine"):
        plan(tmp_path / "new", flags, teacher=str(models / "ode" / "latest.pth"))
    found = plan(tmp_path / "new", {**flags, "time_grid": "t"}, teacher=str(models / "ode" / "latest.pth")).config
    assert (found.distil.grid_spacing, found.sampling.time_grid) == ("t", "t")


def test_resume_into_a_folder_that_holds_another_run_is_refused(models, tmp_path):
    with pytest.raises(UserError, match="holds a run that did not begin from"):
        plan(copy_of(models, tmp_path, "ode"), {"train_steps": 9}, resume=str(models / "flow" / "latest.pth"))


def test_stage_2_goes_on_with_the_teacher_that_it_began_with(models, tmp_path):
    """Without --teacher: the file is known.  One that is gone or another is named."""
    folder, teacher = copy_of(models, tmp_path, "flow"), copy_of(models, tmp_path, "ode") / "DDPMpp-000004.pth"
    found = plan(folder, {"train_steps": 6})
    assert found.start == 4 and found.teacher_file["path"] == str(models / "ode" / "DDPMpp-000004.pth")
    assert not found.teacher.is_flow_map and found.config.distil.grid_steps == 2

    latest = folder / "DDPMpp-000004.pth"
    content = torch.load(latest, weights_only=True)
    content["run"]["teacher"]["path"] = str(teacher)  # a teacher that we may change
    torch.save(content, latest)
    assert plan(folder, {"train_steps": 6}).teacher_file["path"] == str(teacher)
    shutil.copy(teacher.with_name("DDPMpp-000002.pth"), teacher)
    with pytest.raises(UserError, match=f"{teacher} is not the teacher that {latest} began with.*--teacher"):
        plan(folder, {"train_steps": 6})
    teacher.unlink()
    with pytest.raises(UserError, match=f"the teacher of {latest} is no longer at {teacher}: .*--teacher"):
        plan(folder, {"train_steps": 6})
    moved = plan(folder, {"train_steps": 6}, teacher=str(models / "ode" / "latest.pth"))
    assert moved.start == 4 and moved.teacher_file["path"] == str(models / "ode" / "latest.pth")


def test_the_command_without_its_teacher_continues_stage_2(models, tmp_path):
    """And makes what the command with it makes."""
    for name, more in (("with", ["--teacher", models / "ode" / "DDPMpp-000004.pth"]), ("without", [])):
        shutil.copytree(models / "flow", tmp_path / name, symlinks=True)
        job = Job(tmp_path / f"log.{name}", *SHORT_STAGE_2, *more, "--train_steps", "6", "--workdir", tmp_path / name)
        assert job.wait() == [0] and "at step 4 of 6" in job.err(), job.err()
    assert_equal(*(checkpoint.read(tmp_path / name / "DDPMpp-000006.pth") for name in ("with", "without")))


def test_stage_2_hides_no_labels(tmp_path):
    """A null label would be regressed on the trajectories of a class."""
    teacher = tiny_checkpoint(tmp_path / "teacher", label_dim=10, label_dropout=0.5)
    stage_2 = {"mode": "characteristic"}
    found = plan(tmp_path / "flow", stage_2, teacher=str(teacher))
    assert found.teacher.config.network.label_dropout == 0.5
    assert found.config.network.label_dropout == 0 and found.config.network.label_dim == 10
    with pytest.raises(UserError, match="--label_dropout is for stage 1"):
        plan(tmp_path / "flow", {**stage_2, "label_dropout": 0.1}, teacher=str(teacher))
    assert plan(tmp_path / "flow", {**stage_2, "label_dropout": 0.0}, teacher=str(teacher)).config.network.label_dropout == 0


# --------------------------------------------------------------------------------------------------- metrics and curves


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_have_a_clock_and_what_was_seen_and_curves_come_with_the_first_samples(tmp_path):
    """The clock goes on where a killed run goes on, and where --resume begins a new folder, which has the history too."""
    run, often = tmp_path / "run", ["--log_freq", "2", "--sampling_freq", "4"]
    assert Job(tmp_path / "first", *STAGE_1, *often, "--workdir", run, fault=("step", 6)).wait() == [-signal.SIGKILL]
    Image.open(run / "loss.png").verify()
    assert [path.name for path in (run / "samples").iterdir()] == ["000004.png"]
    assert Job(tmp_path / "second", *STAGE_1, *often, "--workdir", run).wait() == [0]
    resume = ["--resume", run / "DDPMpp-000009.pth", "--train_steps", "11", "--workdir", tmp_path / "new"]
    assert Job(tmp_path / "third", *STAGE_1, *often, *resume).wait() == [0]
    for folder, steps in ((run, [2, 4, 6, 8, 10, 12]), (tmp_path / "new", [2, 4, 6, 8, 10, 11])):
        lines = lines_of(folder)
        assert [line["step"] for line in lines] == steps
        assert [line["images_seen"] for line in lines] == [8 * step for step in steps]
        clock = [line["seconds"] for line in lines]
        assert clock == sorted(clock) and clock[0] >= 0
    assert lines_of(run)[:4] == lines_of(tmp_path / "new")[:4] and (tmp_path / "new" / "loss.png").exists()


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn, instead of files of them."""
    figures = []
    monkeypatch.setattr(misc, "write_figure", lambda path, figure, **options: figures.append((path, figure)))
    return figures


def curves(figure):
    return {ax.get_title(): [list(map(float, line.get_xdata())) for line in ax.lines] for ax in figure.axes}


def write_lines(folder, *lines):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_curves_of_an_earlier_version_are_drawn_too(tmp_path, drawn):
    """Without a clock, and with `images` for the images that were scored."""
    old = [{"step": n, "loss": 1 / n, "grad_norm": 1.0, "images_per_s": 5.0, "lr": 1e-3} for n in (1, 2, 3)]
    write_lines(tmp_path, *old, {"step": 3, "pixel_fid": 2.0, "images": 2048})
    assert len(workdir.read_metrics(tmp_path)) == 4
    workdir.draw_curves(tmp_path)
    ((path, figure),) = drawn
    assert path == tmp_path / "loss.png"
    assert curves(figure) == {"denoising loss": [[1, 2, 3]], "learning rate": [[1, 2, 3]], "pixel FID": [[3]]}


def test_curves_of_stage_2_have_no_sum_whose_weight_drifts(tmp_path, drawn):
    lines = [
        {"step": n, "loss": 3.0, "distance": 1.0, "denoising": 2.0, "weight": 0.5, "lr": 1e-3, "seconds": n} for n in (1, 2)
    ]
    write_lines(tmp_path, *lines, {"step": 2, "fid": 9.0, "images_scored": 5, "seconds": 3})
    workdir.draw_curves(tmp_path)
    found = curves(drawn[0][1])
    assert set(found) == {"distance", "denoising loss", "learning rate", "FID"}
    assert all(line == [[1, 2]] for title, line in found.items() if title != "FID")


def test_a_folder_without_metrics_has_no_curves(tmp_path, drawn):
    workdir.draw_curves(tmp_path)
    write_lines(tmp_path, {"step": 1, "skipped": 1})
    workdir.draw_curves(tmp_path)
    assert drawn == []


@pytest.mark.parametrize(
    ("bsz", "global_bsz", "share", "fits"),
    [(1, 8, 0.25, False), (2, 8, 0.8, False), (4, 16, 0.8, False), (8, 8, 1.0, False), (8, 8, 0.05, False)]
    + [(8, 8, 0.9, True), (2, 8, 0.25, True), (4, 16, 0.7, True), (1, 8, 0.0, True)],
)
def test_each_loss_of_stage_2_needs_images(bsz, global_bsz, share, fits):
    """In training alone: a model that is trained is read whatever it was trained with."""
    flags = {"mode": "characteristic", "bsz": bsz, "global_bsz": global_bsz, "dsm_share": share}
    with nullcontext() if fits else pytest.raises(UserError, match="--dsm_share"):
        workdir.check_parts(defaults.resolve(flags))
    workdir.check_parts(defaults.resolve({**flags, "dsm_weight": 0.0}))


def test_what_may_be_a_slip_is_said_in_one_line_each(tmp_path):
    """A warm-up longer than half of the run, small pictures that are enlarged, grey ones learned in colour."""
    write_folder(tmp_path / "data", images(20, (1, 6, 6)))
    options = ["--data_name", "folder", "--data_path", tmp_path / "data", "--image_size", "8", *TINY_NETWORK, *TINY_RUN]
    job = Job(tmp_path / "log", "train.py", *options, "--lr_rampup_steps", "9", "--workdir", tmp_path / "run")
    assert job.wait() == [0], job.err()
    for line in (
        "the warm-up of 9 steps is long for a run of 3 (--lr_rampup_steps)",
        "images of 6x6 pixels are enlarged to 8",
        "images are grey",
    ):
        assert job.err().count(line) == 1, job.err()


def test_fresh_alone_removes_no_file(tmp_path):
    """Of a folder that holds no run: what lies there is somebody's."""
    folder = tmp_path / "run"
    (folder / "samples").mkdir(parents=True)
    (folder / "samples" / "recording.wav").write_text("mine")
    assert Job(tmp_path / "log", *STAGE_1, "--workdir", folder, "--fresh").wait() == [0]
    assert (folder / "samples" / "recording.wav").read_text() == "mine"


def test_a_lonely_pointer_that_is_a_file_is_not_overwritten(models, tmp_path):
    """cp -L and downloads make files of links."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "latest.pth").write_bytes((models / "ode" / "latest.pth").read_bytes())
    with pytest.raises(UserError, match="latest.pth is no link to a checkpoint"):
        plan(tmp_path / "run", {})


def test_the_bank_may_lie_in_a_folder_whose_name_is_not_utf_8(tmp_path):
    folder, form = tmp_path / os.fsdecode(b"w\xe9"), ({}, 2, (2, 3), torch.float16, torch.device("cpu"))
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system has no such names")
    with workdir.Bank(folder, *form).writing(1, 5) as slot:
        slot.fill_(3)
    again = workdir.Bank(folder, *form)
    assert again.holds(1, 5) and (again.states[1] == 3).all()


def test_the_bank_is_computed_again_where_its_record_is_damaged_and_takes_nobodys_files(tmp_path):
    shape, cpu = (2, 3), torch.device("cpu")
    for content in ('{"about": {}, "held": {"0": [Infinity, 1]}}', "[" * 100000, "[]", "no JSON"):
        (tmp_path / "bank-0.json").write_text(content)
        bank = workdir.Bank(tmp_path, {}, 2, shape, torch.float32, cpu)
        assert not bank.holds(0, 0)
    (tmp_path / "bank-notes.txt").write_text("mine")
    (tmp_path / "bank-1.bin").mkdir()
    workdir.remove_banks(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bank-1.bin", "bank-notes.txt"]
    (tmp_path / "bank-0.bin").mkdir()
    with pytest.raises(UserError, match="cannot keep the bank"):
        workdir.Bank(tmp_path, {}, 2, shape, torch.float32, cpu)
