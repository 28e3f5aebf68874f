"""Runs that are killed, stopped, moved, starved of disk or fed with NaN, and go on."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

import misc
import train
from conftest import ROOT, TINY_NETWORK
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


# -------------------------------------------------------------------------------------------------------- signals

ENDLESS = ["--train_steps", "1000000", "--dump_freq", "1000000", "--sampling_freq", "0", "--lr_decay", "none", "--keep", "2"]
SMALL = [*TINY_NETWORK, "--dropout", "0.2", "--global_bsz", "8", "--bsz", "4", "--lr_rampup_steps", "6", "--log_freq", "5"]


def wait_for(condition, what, timeout=60):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"no {what} in {timeout} s"
        time.sleep(0.02)


def has_trained(workdir):
    path = workdir / "metrics.jsonl"
    return path.exists() and path.stat().st_size > 0


@pytest.mark.parametrize(
    ("number", "ranks", "asked"),
    [(signal.SIGTERM, 1, None), (signal.SIGINT, 1, None), (signal.SIGTERM, 2, None), (signal.SIGTERM, 2, [1])],
)
def test_a_signal_ends_all_ranks_after_a_checkpoint_from_which_the_run_goes_on(tmp_path, number, ranks, asked):
    """Also if one rank alone is told, and not the first."""
    shared = ["train.py", *SMALL]
    job = Job(tmp_path / "log", *shared, *ENDLESS, "--workdir", tmp_path / "run", ranks=ranks)
    wait_for(lambda: has_trained(tmp_path / "run"), "line of metrics")
    time.sleep(random.random() / 2)
    job.signal(number, asked)
    assert job.wait(20) == [128 + number] * ranks, job.err()
    assert job.err().count(f"stopped by {number.name}; the same command continues") == 1 and "Traceback" not in job.err()
    step = train.load_run(misc.latest_checkpoint(tmp_path / "run"))["step"]
    for name in ("run", "whole"):
        end = [*ENDLESS[2:], "--train_steps", step + 7, "--workdir", tmp_path / name]
        assert Job(tmp_path / f"log.{name}", *shared, *end, ranks=ranks).wait() == [0] * ranks
    last = [misc.load_checkpoint(tmp_path / name / f"DDPMpp-{step + 7:06d}.pth") for name in ("run", "whole")]
    assert_equal(*last)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_a_signal_interrupts_a_score_which_is_made_when_the_run_goes_on(tmp_path):
    reference = tmp_path / "digits.npz"
    assert Job(tmp_path / "log.ref", "fid.py", "--mode", "ref", "--data_name", "digits", "--dest", reference).wait() == [0]
    scoring = ["--ref_path", reference, "--fid_freq", "5", "--num_steps", "50", "--train_steps", "8", "--sampling_freq", "0"]
    command = ["train.py", *SMALL, *scoring, "--workdir", tmp_path / "run"]
    job = Job(tmp_path / "log", *command, "--fid_num", "20000")  # would take minutes
    wait_for(lambda: "sampling:" in job.err(), "score")
    job.signal(signal.SIGTERM)
    assert job.wait(10) == [143], job.err()
    assert Job(tmp_path / "again", *command, "--fid_num", "4").wait() == [0]
    scores = [line["step"] for line in metrics(tmp_path / "run") if "pixel_fid" in line]
    assert scores == [5, 8] and [line["step"] for line in metrics(tmp_path / "run")] == [5, 5, 8, 8]


def torchrun(*options):
    return [sys.executable, "-m", "torch.distributed.run", *map(str, options)]


QUIET = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def start(command, prefix=()):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*prefix, *map(str, command)], cwd=ROOT, env=QUIET, start_new_session=True, **pipes)


def test_torchrun_that_is_stopped_leaves_a_checkpoint(tmp_path):
    """What a scheduler does: SIGTERM to the agent."""
    command = [*torchrun("--standalone", "--nproc_per_node", 2), "train.py", *SMALL, *ENDLESS, "--workdir", tmp_path / "run"]
    agent = start(command)
    wait_for(lambda: has_trained(tmp_path / "run"), "line of metrics")
    agent.send_signal(signal.SIGTERM)
    err = agent.communicate(timeout=25)[1]
    assert "stopped by SIGTERM" in err and misc.latest_checkpoint(tmp_path / "run").exists(), err


# ------------------------------------------------------------------------------------------------ torchrun's restarts

DIES_ONCE = f"""
import os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import dist_util, processes, train
if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    processes._inject("step", 8)
dist_util.launch(train.main)
"""


def test_torchrun_restarts_a_run_whose_rank_was_killed(tmp_path, teacher):
    """--fresh does not begin anew then, nor does --force remove anything."""
    (tmp_path / "script.py").write_text(DIES_ONCE)
    arguments = command("trajectory", teacher)
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "DDPMpp-000099.pth").write_bytes(b"an earlier run")
    again = ["--workdir", tmp_path / "killed", "--fresh", "--force"]
    agent = start(
        [*torchrun("--standalone", "--nproc_per_node", 2, "--max-restarts", 1), tmp_path / "script.py", *arguments[1:], *again]
    )
    err = agent.communicate(timeout=120)[1]
    assert agent.returncode == 0 and "continuing" in err and "at step 6 of 12" in err, err
    assert Job(tmp_path / "log", *arguments, "--workdir", tmp_path / "whole", ranks=2).wait() == [0, 0]
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.fixture(params=["localhost", "network namespaces"])
def two_machines(request):
    """For each of two agents: a prefix of its command, and its options; the first holds the rendezvous."""
    port = 20000 + random.randrange(20000)
    if request.param == "localhost":
        yield [([], ["--rdzv_endpoint", f"127.0.0.1:{port}"])] * 2
        return
    names, a, b = [f"cl{os.getpid()}{x}" for x in "ab"], f"va{os.getpid()}", f"vb{os.getpid()}"
    steps = [
        f"netns add {names[0]}",
        f"netns add {names[1]}",
        f"link add {a} netns {names[0]} type veth peer {b} netns {names[1]}",
    ]
    for i, (name, link) in enumerate(zip(names, (a, b)), 1):
        steps += [f"-n {name} addr add 10.77.0.{i}/24 dev {link}", f"-n {name} link set {link} up", f"-n {name} link set lo up"]
    try:
        for step in steps:
            try:
                subprocess.run(["ip", *step.split()], check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"this system makes no network namespaces: {error}")
        yield [
            (
                ["ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME={link}"],
                ["--rdzv_endpoint", f"10.77.0.1:{port}", "--local_addr", f"10.77.0.{i}", "--rdzv_conf", f"is_host={i == 1}"],
            )
            for i, (name, link) in enumerate(zip(names, (a, b)), 1)
        ]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def test_two_agents_train_as_one_with_two_processes(tmp_path, teacher, two_machines):
    """The multi-node command of the README, on one machine."""
    arguments = command("semigroup", teacher)
    agents = []
    for prefix, options in two_machines:
        options = ["--nnodes", 2, "--nproc_per_node", 1, "--rdzv_backend", "c10d", "--rdzv_id", "job", *options]
        agents.append(start([*torchrun(*options), *arguments, "--workdir", tmp_path / "two"], prefix))
    outputs = [agent.communicate(timeout=120) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert Job(tmp_path / "log", *arguments, "--workdir", tmp_path / "one", ranks=2).wait() == [0, 0]
    assert_same_run(tmp_path / "one", tmp_path / "two")
