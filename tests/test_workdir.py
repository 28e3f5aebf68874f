"""A run's folder: what the same command continues, --resume, --fresh, the lock, metrics and their curves."""

import json
import signal
from functools import partial

import torch

import checkpoint
from conftest import (
    ENDLESS,
    LENGTH,
    SMALL,
    STAGE_1,
    TINY_NETWORK,
    TINY_RUN,
    assert_same_run,
    has_trained,
    metrics,
    pretend_machine,
    run,
    wait_for,
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
    assert "goes on from its last checkpoint" in run(*back, expect=2).stderr


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


def test_fresh_goes_on_when_torchrun_starts_it_again_and_only_then(tmp_path):
    """For whatever reason it does, a machine that joins too, of which torchrun's count of restarts says nothing."""
    shared = [*STAGE_1, "--fresh", "--force", "--workdir", tmp_path / "run"]
    agent = {"environment": {"TORCHELASTIC_RUN_ID": "none"}}  # its process here is the parent of all jobs
    assert Job(tmp_path / "first", *shared, **agent, fault=("step", 8)).wait() == [-signal.SIGKILL]
    again = Job(tmp_path / "again", *shared, **agent)
    assert again.wait() == [0] and "at step 6 of 12" in again.err(), again.err()
    counted = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "1"}
    wrapped = Job(tmp_path / "wrapped", *shared, environment=counted, prepare=partial(pretend_machine, "a"))
    assert wrapped.wait() == [0] and "at step 12 of 12" in wrapped.err(), wrapped.err()
    other_job = {"environment": {"TORCHELASTIC_RUN_ID": "other"}}
    elsewhere = {**agent, "prepare": partial(pretend_machine, "b")}
    for name, options in (("elsewhere", elsewhere), ("other", other_job), ("alone", {})):
        job = Job(tmp_path / name, *shared, **options)
        assert job.wait() == [0] and "continuing" not in job.err(), job.err()


def test_a_workdir_takes_one_run_at_a_time(tmp_path):
    arguments = ["train.py", *SMALL, *ENDLESS, "--workdir", tmp_path / "run"]
    first = Job(tmp_path / "first", *arguments)
    wait_for(lambda: has_trained(tmp_path / "run"), "line of metrics")
    second = Job(tmp_path / "second", *arguments)
    assert second.wait(30) == [2] and "is in use by another run" in second.err()
    first.signal(signal.SIGTERM)
    assert first.wait(20) == [143]
