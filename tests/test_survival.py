"""Runs that are killed, stopped, moved, starved of disk or fed with NaN, and go on."""

import json
import random
import signal

import pytest
import torch

import misc
import train
from conftest import TINY_NETWORK
from processes import Job

LENGTH = ["--train_steps", "12", "--dump_freq", "3", "--log_freq", "5", "--sampling_freq", "4", "--nsampling", "2"]
BATCH = ["--global_bsz", "8", "--bsz", "4", "--lr_rampup_steps", "6", "--keep", "2"]
STAGE_1 = ["train.py", *TINY_NETWORK, "--dropout", "0.2", *LENGTH, *BATCH]
STAGE_2 = ["train.py", "--mode", "characteristic", *LENGTH, *BATCH, "--num_steps", "4", "--bank_size", "16"]
STAGE_2 += ["--bank_refresh_freq", "2", "--teacher_steps", "3", "--dsm_share", "0.5"]
OBJECTIVES = ("denoiser", "trajectory", "semigroup")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A denoiser with dropout, so that its students draw random numbers in the network too."""
    folder = tmp_path_factory.mktemp("teacher")
    assert Job(folder / "log", *STAGE_1, "--workdir", folder / "run").wait() == [0]
    return folder / "run" / "DDPMpp-000012.pth"


def command(objective, teacher):
    return STAGE_1 if objective == "denoiser" else [*STAGE_2, "--objective", objective, "--teacher", teacher]


def metrics(workdir):
    """What metrics.jsonl holds, but for the speed."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_s"} for line in lines]


def assert_equal(a, b, where=""):
    """Equal to the last bit: tensors, numbers, and whatever holds them."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b)):
            assert_equal(*pair, f"{where}.{i}")
    else:
        assert a == b, where


def assert_same_run(a, b):
    """Weights, optimizer, average, counters and metrics of two workdirs that trained to the end; pictures too."""
    assert_equal(*(misc.load_checkpoint(workdir / "DDPMpp-000012.pth") for workdir in (a, b)))
    assert metrics(a) == metrics(b) and [line["step"] for line in metrics(a)] == [5, 10, 12]
    names = [sorted(path.name for path in workdir.glob("**/*") if path.name != ".lock") for workdir in (a, b)]
    assert names[0] == names[1]
    for path in (a / "samples").iterdir():
        assert path.read_bytes() == (b / "samples" / path.name).read_bytes()


def assert_latest_loads(workdir):
    latest = misc.latest_checkpoint(workdir)
    assert latest is None or train.load_run(latest)["step"] == int(latest.stem[-6:])
    for path in misc.checkpoints(workdir):
        misc.load_checkpoint(path)


FAULTS = {  # where a run is killed, and the calls of it that a run makes
    "step": 12, "backward": 24, "write": 5, "fsync": 16, "before rename": 12, "after rename": 12, "pointer": 5, "removal": 3,
}  # fmt: skip


def survive(tmp_path, objective, ranks, kills, seed, teacher):
    """Kill a run so many times, each time somewhere else, continue it, and compare it with one that was left alone."""
    rng = random.Random(f"{objective} {ranks} {seed}")
    arguments, killed, attempts = command(objective, teacher), [], 0
    assert Job(tmp_path / "log.whole", *arguments, "--workdir", tmp_path / "whole", ranks=ranks).wait() == [0] * ranks
    round_of_kills = 0
    while len(killed) < kills:
        workdir, statuses = tmp_path / f"killed-{round_of_kills}", None
        while statuses != [0] * ranks:
            what = rng.choice(list(FAULTS))
            only_first = what not in ("step", "backward")  # which rank 0 does alone
            fault = (what, rng.randint(1, FAULTS[what])) if len(killed) < kills else None
            victim = 0 if only_first else rng.randrange(ranks)
            attempts += 1
            job = Job(
                tmp_path / f"log.{attempts}", *arguments, "--workdir", workdir, ranks=ranks, fault=fault, faulty_rank=victim
            )
            statuses = job.wait()
            if statuses != [0] * ranks:
                assert fault and statuses[victim] == -signal.SIGKILL and 0 not in statuses, job.err()
                killed.append(fault)
            assert_latest_loads(workdir)
        assert_same_run(tmp_path / "whole", workdir)
        round_of_kills += 1
    return killed


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_killed_anywhere_ends_as_if_it_had_been_left_alone(tmp_path, teacher, objective, ranks, record_property):
    record_property("kills survived", len(survive(tmp_path, objective, ranks, 4, 0, teacher)))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_killed_over_and_over_ends_as_if_it_had_been_left_alone(tmp_path, teacher, objective, ranks, record_property):
    record_property("kills survived", len(survive(tmp_path, objective, ranks, 34, 1, teacher)))
