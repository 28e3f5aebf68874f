"""Runs that are killed, stopped, moved, starved of disk or fed with NaN, and go on."""

import dist_util

import errno
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

import checkpoint
import generator
import train
import workdir
from conftest import (
    ENDLESS,
    ROOT,
    SMALL,
    STAGE_1,
    STAGE_2,
    TINY_NETWORK,
    assert_equal,
    assert_same_run,
    has_trained,
    metrics,
    wait_for,
)
from processes import Job, free_port

OBJECTIVES = ("denoiser", "trajectory", "semigroup")


def command(objective, teacher):
    return STAGE_1 if objective == "denoiser" else [*STAGE_2, "--objective", objective, "--teacher", teacher]


def assert_latest_loads(workdir):
    latest = checkpoint.latest_checkpoint(workdir)
    assert latest is None or checkpoint.load_run(latest).step == int(latest.stem[-6:])
    for path in checkpoint.checkpoints(workdir):
        checkpoint.read(path)


FAULTS = {  # where a run is killed, and the calls of it that a run makes
    "step": 12, "backward": 24, "write": 5, "fsync": 16, "before rename": 12, "after rename": 12, "pointer": 5, "removal": 2,
}  # fmt: skip


def survive(tmp_path, objective, ranks, kills, seed, teacher):
    """Kill a run so many times, each time somewhere else, continue it, and compare it with one that was left alone."""
    rng = random.Random(f"{objective} {ranks} {seed}")
    arguments, killed, attempts = [*command(objective, teacher), "--keep", rng.choice("12")], [], 0
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


UNDER_NOHUP = pytest.mark.skipif(signal.SIGHUP not in dist_util.HANDLED, reason="nohup: runs go on when the terminal closes")


@pytest.mark.parametrize(
    ("number", "ranks", "asked"),
    [
        (signal.SIGTERM, 1, None),
        (signal.SIGINT, 1, None),
        pytest.param(signal.SIGHUP, 1, None, marks=UNDER_NOHUP),
        (signal.SIGTERM, 2, None),
        (signal.SIGTERM, 2, [1]),
    ],
)
def test_a_signal_ends_all_ranks_after_a_checkpoint_from_which_the_run_goes_on(tmp_path, number, ranks, asked):
    """Also if one rank alone is told, and not the first; and if Ctrl-C is pressed again and again."""
    shared = ["train.py", *SMALL]
    job = Job(tmp_path / "log", *shared, *ENDLESS, "--workdir", tmp_path / "run", ranks=ranks)
    wait_for(lambda: has_trained(tmp_path / "run"), "line of metrics")
    time.sleep(0.2)
    for _ in range(25 if number == signal.SIGINT else 1):
        job.signal(number, asked)
        time.sleep(0.02)
    assert job.wait(20) == [128 + number] * ranks, job.err()
    assert job.err().count(f"stopped by {number.name}; the same command continues") == 1 and "Traceback" not in job.err()
    step = checkpoint.load_run(checkpoint.latest_checkpoint(tmp_path / "run")).step
    for name in ("run", "whole"):
        end = [*ENDLESS[2:], "--train_steps", step + 7, "--workdir", tmp_path / name]
        assert Job(tmp_path / f"log.{name}", *shared, *end, ranks=ranks).wait() == [0] * ranks
    last = [checkpoint.read(tmp_path / name / f"DDPMpp-{step + 7:06d}.pth") for name in ("run", "whole")]
    assert_equal(*last)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def stop_in_round(calls):
    """A signal in some backward pass of this process, which may make 64 more of them until all ranks know, and alone none."""
    real, made = torch.Tensor.backward, iter(range(1, 10**9))
    most = 64 if os.environ.get("WORLD_SIZE", "1") != "1" else 0

    def backward(loss):
        now = next(made)
        if now == calls:
            os.kill(os.getpid(), signal.SIGTERM)
        if now > calls + most:
            os._exit(99)
        real(loss)

    torch.Tensor.backward = backward


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_between_rounds_ends_the_run_with_the_state_of_the_last_finished_step(tmp_path, ranks):
    """A step of many rounds takes minutes on a CPU.  The same command continues to the same bits."""
    length = ["--train_steps", "6", "--log_freq", "2", "--sampling_freq", "0", "--global_bsz", "32", "--bsz", 2 // ranks]
    command = ["train.py", *TINY_NETWORK, "--dropout", "0.2", *length]
    stopped = Job(
        tmp_path / "log", *command, "--workdir", tmp_path / "run", ranks=ranks, prepare=partial(stop_in_round, 2 * 16 + 5)
    )
    assert stopped.wait(30) == [143] * ranks, stopped.err()
    step = checkpoint.load_run(checkpoint.latest_checkpoint(tmp_path / "run")).step
    assert step == 2 if ranks == 1 else 2 <= step < 6
    assert f"step={step + 1}" in stopped.err() and stopped.err().count("stopped by SIGTERM; the same command continues") == 1
    for name in ("run", "whole"):
        job = Job(tmp_path / f"log.{name}", *command, "--workdir", tmp_path / name, ranks=ranks)
        assert job.wait() == [0] * ranks, job.err()
    assert_equal(*(checkpoint.read(tmp_path / name / "DDPMpp-000006.pth") for name in ("run", "whole")))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_ranks_that_are_sent_different_signals_leave_with_the_same_status(tmp_path):
    job = Job(tmp_path / "log", "train.py", *SMALL, *ENDLESS, "--workdir", tmp_path / "run", ranks=2)
    wait_for(lambda: has_trained(tmp_path / "run"), "line of metrics")
    for rank, number in enumerate((signal.SIGINT, signal.SIGTERM)):
        job.signal(signal.SIGSTOP, [rank])
        job.signal(number, [rank])
    job.signal(signal.SIGCONT)
    assert job.wait(20) in ([143, 143], [130, 130]), job.err()
    assert "stopped by" in job.err() and "Traceback" not in job.err()


def exhaust_memory(steps):
    """From some step on there is no memory left, and a signal has just been received."""
    real, calls = torch.Tensor.backward, iter(range(10**9))

    def backward(loss):
        if next(calls) == steps:
            os.kill(os.getpid(), signal.SIGTERM)
            raise torch.OutOfMemoryError("DefaultCPUAllocator: can't allocate memory")
        real(loss)

    torch.Tensor.backward = backward


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_does_not_hide_why_a_run_failed(tmp_path, ranks):
    job = Job(tmp_path / "log", *STAGE_1, "--workdir", tmp_path / "run", ranks=ranks, prepare=partial(exhaust_memory, 9))
    assert job.wait(20) == [2] * ranks and "error: out of memory on rank 0" in job.err(), job.err()


def test_a_signal_to_reading_processes_too_ends_in_a_checkpoint(tmp_path):
    """As from a terminal or from torchrun, which tell the whole process group."""
    more = ["--num_workers", "2", "--dump_freq", "100000", "--workdir", tmp_path / "run"]
    process = start([sys.executable, "train.py", *SMALL, *ENDLESS, *more])
    wait_for(lambda: has_trained(tmp_path / "run"), "line of metrics")
    os.killpg(process.pid, signal.SIGTERM)
    err = process.communicate(timeout=30)[1]
    assert process.returncode == 143 and "Traceback" not in err, err
    assert checkpoint.latest_checkpoint(tmp_path / "run").exists()


@pytest.mark.parametrize(("ranks", "asked"), [(1, [0]), (2, [1])])
def test_a_signal_interrupts_a_score_which_is_made_when_the_run_goes_on(tmp_path, ranks, asked):
    reference = tmp_path / "digits.npz"
    assert Job(tmp_path / "log.ref", "fid.py", "--mode", "ref", "--data_name", "digits", "--dest", reference).wait() == [0]
    scoring = ["--ref_path", reference, "--fid_freq", "5", "--num_steps", "50", "--train_steps", "8", "--sampling_freq", "0"]
    command = ["train.py", *SMALL, *scoring, "--workdir", tmp_path / "run"]
    job = Job(tmp_path / "log", *command, "--fid_num", "20000", ranks=ranks)  # would take minutes
    wait_for(lambda: "sampling:" in job.err(), "score")
    job.signal(signal.SIGTERM, asked)
    assert job.wait(10) == [143] * ranks, job.err()
    again = Job(tmp_path / "again", *command, "--fid_num", "5", "--eval_bsz", "1", ranks=ranks)  # 3 batches and 2
    assert again.wait() == [0] * ranks, again.err()
    scores = [line["step"] for line in metrics(tmp_path / "run") if "pixel_fid" in line]
    assert scores == [5, 8] and [line["step"] for line in metrics(tmp_path / "run")] == [5, 5, 8, 8]


def torchrun(*options):
    return [sys.executable, "-m", "torch.distributed.run", *map(str, options)]


QUIET = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "0"}


def start(command, prefix=(), **environment):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    everything = {**QUIET, **environment}
    return subprocess.Popen([*prefix, *map(str, command)], cwd=ROOT, env=everything, start_new_session=True, **pipes)


def test_torchrun_that_is_stopped_leaves_a_checkpoint(tmp_path):
    """What a scheduler does: SIGTERM to the agent."""
    command = [*torchrun("--standalone", "--nproc_per_node", 2), "train.py", *SMALL, *ENDLESS, "--workdir", tmp_path / "run"]
    agent = start(command)
    wait_for(lambda: has_trained(tmp_path / "run"), "line of metrics")
    agent.send_signal(signal.SIGTERM)
    err = agent.communicate(timeout=25)[1]
    assert "stopped by SIGTERM" in err and checkpoint.latest_checkpoint(tmp_path / "run").exists(), err


# ------------------------------------------------------------------------------------------------ torchrun's restarts

DIES_ONCE = f"""
import os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import dist_util, processes, train
if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    processes._inject("step", 8)
dist_util.launch(train.main)
"""


@pytest.mark.parametrize("machines", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_torchrun_restarts_a_run_whose_rank_was_killed(tmp_path, teacher, machines):
    (tmp_path / "script.py").write_text(DIES_ONCE)
    arguments = command("trajectory", teacher)
    meet = ["--rdzv_backend", "c10d", "--rdzv_id", "job", "--rdzv_endpoint", f"127.0.0.1:{free_port()}"]
    options = ["--nnodes", machines, "--nproc_per_node", 2 // machines, "--max-restarts", 1, *meet]
    script = [*torchrun(*options), tmp_path / "script.py", *arguments[1:], "--workdir", tmp_path / "killed"]
    agents = [start(script, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=str(machines - 1)) for _ in range(machines)]
    errs = [agent.communicate(timeout=120)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0] * machines, errs
    assert any("continuing" in err and "at step 6 of 12" in err for err in errs), errs
    assert Job(tmp_path / "log", *arguments, "--workdir", tmp_path / "whole", ranks=2).wait() == [0, 0]
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.fixture(params=["localhost", "network namespaces"])
def two_machines(request):
    """For each of two agents: a prefix of its command, and its options; the first holds the rendezvous."""
    port = free_port()
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


# ------------------------------------------------------------------------------------------- ranks that fail or hang


@pytest.mark.parametrize("victim", [0, 1])
def test_the_others_leave_when_a_rank_is_killed(tmp_path, victim):
    """Without anybody who would end them, and soon."""
    job = Job(tmp_path / "log", "train.py", *SMALL, *ENDLESS, "--workdir", tmp_path / "run", ranks=2)
    wait_for(lambda: has_trained(tmp_path / "run"), "line of metrics")
    job.signal(signal.SIGKILL, [victim])
    statuses = job.wait(20)
    assert statuses[victim] == -signal.SIGKILL and statuses[1 - victim] == 1
    assert f"rank {1 - victim} leaves: it lost another rank" in job.err() and "Traceback" not in job.err()


# ------------------------------------------------------------------------------------------------------ full disks


def limit_files(size):
    """From now on no file of this process grows beyond `size` bytes, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_ends_the_run_with_one_line_and_keeps_what_was_saved(tmp_path, ranks):
    run = [*STAGE_1, "--workdir", tmp_path / "run"]
    assert Job(tmp_path / "first", *run, fault=("step", 8), ranks=ranks).wait()[0] == -signal.SIGKILL
    job = Job(tmp_path / "full", *run, ranks=ranks, prepare=partial(limit_files, 200_000))
    assert job.wait() == [2] * ranks
    errors = [line for line in job.err().splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "DDPMpp-000009.pth: File too large; choose another place" in errors[0], job.err()
    assert checkpoint.latest_checkpoint(tmp_path / "run").name == "DDPMpp-000006.pth" and "Traceback" not in job.err()
    assert not list((tmp_path / "run").glob(".*.tmp"))
    for name in ("run", "whole"):
        assert Job(tmp_path / f"log.{name}", *STAGE_1, "--workdir", tmp_path / name, ranks=ranks).wait() == [0] * ranks
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def fill_disk_for_metrics():
    def full(path, mode="r"):
        if str(path).endswith("metrics.jsonl") and mode == "a":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return open(path, mode)

    workdir.open = full


@pytest.mark.parametrize("ranks", [1, 2])
def test_metrics_that_cannot_be_written_end_the_run_with_one_line(tmp_path, ranks):
    readers = ["--num_workers", "1"]  # which end with the run
    run = [*STAGE_1, *readers, "--workdir", tmp_path / "run"]
    job = Job(tmp_path / "log", *run, ranks=ranks, prepare=fill_disk_for_metrics)
    assert job.wait()[0] == 2 and job.err().count("error: cannot write") == 1 and "Traceback" not in job.err()
    assert "metrics.jsonl: No space left on device; free some space" in job.err()
    assert Job(tmp_path / "again", *STAGE_1, "--workdir", tmp_path / "run", ranks=ranks).wait() == [0] * ranks
    assert [line["step"] for line in metrics(tmp_path / "run")] == [5, 10, 12]


# ------------------------------------------------------------------------------------------- losses that are not finite


class Poisoned:
    """An objective whose loss is NaN, or infinite, or its gradient, at some steps."""

    def __init__(self, real, steps, how):
        self.real, self.steps, self.how, self.step = real, steps, how, -1

    def __getattr__(self, name):
        return getattr(self.real, name)

    def __call__(self, *arguments):
        loss, logs = self.real(*arguments)
        self.step += 1
        if self.step in self.steps and dist_util.rank() == dist_util.world_size() - 1:
            loss = loss * float("nan") if self.how == "loss" else loss + 1e30 * (1e30 * loss)
            logs = {**logs, "loss": loss} if self.how == "loss" else logs
        return loss, logs


def poison(steps, how):
    real = train.Denoising
    train.Denoising = lambda *args: Poisoned(real(*args), steps, how)


@pytest.mark.parametrize(("how", "ranks"), [("loss", 1), ("gradient", 1), ("loss", 2)])
def test_steps_without_finite_gradients_are_skipped_and_counted(tmp_path, how, ranks):
    """Also if they are those of the last rank alone."""
    rounds = ["--bsz", str(8 // ranks)]  # one round a step, so that calls are steps
    job = Job(
        tmp_path / "log", *STAGE_1, *rounds, "--workdir", tmp_path / "run", ranks=ranks, prepare=partial(poison, {3, 6}, how)
    )
    assert job.wait() == [0] * ranks, job.err()
    saved = checkpoint.read(tmp_path / "run" / "DDPMpp-000012.pth")
    assert all(v.isfinite().all() for part in ("model", "ema") for v in saved[part].values())
    assert saved["run"]["skipped"] == 2 and saved["optim"]["state"][0]["step"] == 10
    lines = metrics(tmp_path / "run")
    assert [line.get("skipped") for line in lines] == [1, 1, None]
    assert all(math.isfinite(value) for line in lines for value in line.values())


def test_a_run_without_finite_gradients_stops_and_keeps_its_last_good_checkpoint(tmp_path):
    length = ["--train_steps", "100"]
    bad = set(range(7, 100))
    shared = [*STAGE_1, *length, "--bsz", "8"]
    job = Job(tmp_path / "log", *shared, "--workdir", tmp_path / "run", prepare=partial(poison, bad, "loss"))
    assert job.wait() == [2] and "no finite loss or gradient in 20 steps, up to step 27: look at" in job.err(), job.err()
    latest = checkpoint.latest_checkpoint(tmp_path / "run")
    assert latest.name == "DDPMpp-000006.pth"  # not one of the steps that were skipped
    advice = f"begin a new run from the last good checkpoint, --resume {latest} --workdir NEW, with a lower --lr"
    assert advice in job.err()
    better = Job(tmp_path / "new", *STAGE_1, "--resume", latest, "--workdir", tmp_path / "new", "--lr", "1e-4")
    assert better.wait() == [0], better.err()


def test_a_run_all_of_whose_steps_were_skipped_has_failed(tmp_path):
    run = [*STAGE_1, "--bsz", "8", "--workdir", tmp_path / "run"]
    job = Job(tmp_path / "log", *run, prepare=partial(poison, set(range(12)), "loss"))
    assert job.wait() == [2] and "in 12 steps, up to step 12: look at the data, or begin again with a lower --lr" in job.err()
    assert not checkpoint.checkpoints(tmp_path / "run")
    assert Job(tmp_path / "log", *STAGE_1, "--workdir", tmp_path / "good").wait() == [0]
    further = ["--resume", tmp_path / "good" / "latest.pth", "--train_steps", "15", "--workdir", tmp_path / "further"]
    job = Job(tmp_path / "further.log", *run, *further, prepare=partial(poison, set(range(12)), "loss"))
    assert job.wait() == [2] and "in 3 steps, up to step 15" in job.err(), job.err()


def test_a_checkpoint_that_a_skipped_step_put_off_is_written_after_the_next_good_one(tmp_path):
    """And so is that of a signal."""
    run = [*STAGE_1, "--bsz", "8", "--keep", "0", "--workdir"]
    job = Job(tmp_path / "log", *run, tmp_path / "run", prepare=partial(poison, {2, 8, 9}, "loss"))
    assert job.wait() == [0], job.err()
    assert [int(path.stem[-2:]) for path in checkpoint.checkpoints(tmp_path / "run")] == [4, 6, 11, 12]
    job = Job(tmp_path / "stopped", *run, tmp_path / "stopped", prepare=partial(stop_and_poison, {4, 5}))
    assert job.wait() == [143], job.err()
    assert checkpoint.latest_checkpoint(tmp_path / "stopped").name == "DDPMpp-000007.pth"


def stop_and_poison(steps):
    poison(steps, "loss")
    real, calls = train.accumulate, iter(range(10**9))

    def stopping(*args):
        if next(calls) == min(steps):
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    train.accumulate = stopping


def ruin(step):
    """Make a weight infinite in some step of the optimizer."""
    real, calls = torch.optim.RAdam.step, iter(range(10**9))

    def ruining(self, *args):
        real(self, *args)
        if next(calls) == step:
            self.param_groups[0]["params"][0].data.view(-1)[0] = float("inf")

    torch.optim.RAdam.step = ruining


@pytest.mark.parametrize(("step", "error"), [(8, "the weights are not finite, up to step 9"), (7, "no finite loss or")])
def test_weights_that_are_not_finite_are_never_saved(tmp_path, step, error):
    run = [*STAGE_1, "--train_steps", "40", "--bsz", "8", "--workdir", tmp_path / "run"]
    job = Job(tmp_path / "log", *run, prepare=partial(ruin, step))
    assert job.wait() == [2] and error in job.err(), job.err()
    for path in checkpoint.checkpoints(tmp_path / "run"):
        assert all(v.isfinite().all() for part in ("model", "ema") for v in checkpoint.read(path)[part].values())
    assert checkpoint.latest_checkpoint(tmp_path / "run").name == "DDPMpp-000006.pth"


def spoil():
    """Make the last rank's images for a score infinite, in its first batch."""
    real = generator.solve

    def spoiling(trained, seeds, *arguments):
        last = dist_util.rank() == dist_util.world_size() - 1 and list(seeds) == [1, 3]
        yield from (x / 0 if last else x for x in real(trained, seeds, *arguments))

    generator.solve = spoiling


def test_images_of_one_rank_that_are_not_finite_end_a_score_on_all_with_one_line(tmp_path):
    reference = tmp_path / "digits.npz"
    assert Job(tmp_path / "log", "fid.py", "--mode", "ref", "--data_name", "digits", "--dest", reference).wait() == [0]
    scoring = ["--ref_path", reference, "--fid_freq", "2", "--fid_num", "16", "--eval_bsz", "2", "--num_steps", "3"]
    run = [*STAGE_1, *scoring, "--bsz", "4", "--workdir", tmp_path / "run"]
    job = Job(tmp_path / "log", *run, ranks=2, prepare=spoil)
    assert job.wait() == [2, 2] and job.err().count("makes images that are not finite") == 1, job.err()


# ---------------------------------------------------------------------------------------------------- work that goes on


@pytest.mark.parametrize("ranks", [1, 2])
def test_statistics_that_an_interruption_left_out_are_made_by_the_same_command(tmp_path, teacher, ranks):
    command = ["fid.py", "--mode", "gen", "--checkpoint", teacher, "--end_seed", "20", "--num_steps", "3", "--dest"]
    assert Job(tmp_path / "log", *command, tmp_path / "whole.npz", ranks=ranks).wait() == [0] * ranks
    for fault in ("fsync", "before rename"):
        job = Job(tmp_path / "cut", *command, tmp_path / "out" / "cut.npz", ranks=ranks, fault=(fault, 1))
        assert -signal.SIGKILL in job.wait() and not (tmp_path / "out" / "cut.npz").exists()
    assert Job(tmp_path / "again", *command, tmp_path / "out" / "cut.npz", ranks=ranks).wait() == [0] * ranks
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["cut.npz"]
    assert (tmp_path / "out" / "cut.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()


def test_what_one_rank_left_out_is_shared_among_all(tmp_path, teacher):
    command = ["eval.py", "--checkpoint", teacher, "--end_seed", "30", "--eval_bsz", "4", "--num_steps", "3"]
    for name in ("whole", "cut"):
        assert Job(tmp_path / "log", *command, "--workdir", tmp_path / name, ranks=2).wait() == [0, 0]
    for path in (tmp_path / "cut").glob("*[13579].png"):  # those of the second rank, 15, in batches of 4
        path.unlink()
    job = Job(tmp_path / "again", *command, "--workdir", tmp_path / "cut", ranks=2)
    assert job.wait() == [0, 0] and "15 of 31 are missing, in 4 batches" in job.err() and " 8/8 " in job.err(), job.err()
    for path in (tmp_path / "whole").glob("*.png"):
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()


def test_images_that_an_interruption_left_out_are_made_and_the_others_left_alone(tmp_path, teacher):
    """By the same command: equal to the last bit, since whole batches are drawn again."""
    command = ["eval.py", "--checkpoint", teacher, "--end_seed", "20", "--eval_bsz", "4", "--num_steps", "3"]
    for ranks in (1, 2):
        whole, cut = tmp_path / f"whole-{ranks}", tmp_path / f"cut-{ranks}"
        assert Job(tmp_path / "log", *command, "--workdir", whole, ranks=ranks).wait() == [0] * ranks
        job = Job(tmp_path / "cut", *command, "--workdir", cut, ranks=ranks, fault=("before rename", 8))
        assert -signal.SIGKILL in job.wait()
        done = {path: path.stat().st_mtime_ns for path in cut.glob("[0-9]*.png")}
        assert 6 <= len(done) < 21 and len(list(cut.glob(".*.tmp"))) == 1
        assert Job(tmp_path / "again", *command, "--workdir", cut, ranks=ranks).wait() == [0] * ranks
        assert {path: path.stat().st_mtime_ns for path in done} == done
        assert sorted(p.name for p in cut.iterdir()) == sorted(p.name for p in whole.iterdir())
        assert all(path.read_bytes() == (whole / path.name).read_bytes() for path in cut.glob("*.png"))
    for name, damage in (("000003.png", b""), ("000007.png", (whole / "000007.png").read_bytes()[:-5])):
        (cut / name).write_bytes(damage)  # what a power cut may leave
    assert Job(tmp_path / "again", *command, "--workdir", cut, ranks=2).wait() == [0, 0]
    assert all(path.read_bytes() == (whole / path.name).read_bytes() for path in whole.glob("*.png"))
    other = Job(tmp_path / "other", *command, "--rho", "2", "--workdir", cut)
    assert other.wait() == [2] and "holds images made with other rho: choose another folder" in other.err()


@pytest.mark.slow
def test_a_lost_machine_leaves_the_others_to_go_on(tmp_path):
    """The elastic command of the README: --nnodes 1:2, then everything of one agent is killed."""
    length = ["--train_steps", "150", "--dump_freq", "10", "--log_freq", "10", "--sampling_freq", "0"]
    shared = ["train.py", *SMALL, *length, "--workdir", tmp_path / "run"]
    options = ["--nnodes", "1:2", "--nproc_per_node", 1, "--rdzv_backend", "c10d", "--rdzv_id", "job", "--max-restarts", 2]
    options += ["--rdzv_endpoint", f"127.0.0.1:{free_port()}"]
    options += ["--rdzv_conf", "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3"]
    agents = []
    for _ in range(2):
        agents.append(start([*torchrun(*options), *shared], TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"))
        time.sleep(1)  # so that the first holds the rendezvous
    wait_for(lambda: len(checkpoint.checkpoints(tmp_path / "run")) > 1, "checkpoint")
    workers = subprocess.run(["pgrep", "-P", str(agents[1].pid)], capture_output=True, text=True, check=True).stdout.split()
    for process in (*map(int, workers), agents[1].pid):
        os.kill(process, signal.SIGKILL)
    agents[1].communicate()
    err = agents[0].communicate(timeout=200)[1]
    assert agents[0].returncode == 0 and "continuing on 1 rank of 4 what ran on 2 of 4" in err, err
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(10, 151, 10))


# ------------------------------------------------------------------------------------- what is written to, and read from


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
def test_a_stderr_that_cannot_be_written_stops_no_run(tmp_path):
    """Of `| tee` when Ctrl-C took tee first, or of a log on a full disk."""
    with open("/dev/full", "w") as full:
        command = [sys.executable, ROOT / "train.py", *TINY_NETWORK, "--train_steps", "2", "--workdir", tmp_path / "run"]
        done = subprocess.run([str(part) for part in command], stderr=full, stdout=subprocess.DEVNULL)
    assert done.returncode == 0 and (tmp_path / "run" / "DDPMpp-000002.pth").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
def test_a_full_disk_behind_stdout_is_one_line(models, tmp_path):
    command = [sys.executable, ROOT / "teaser.py", "--checkpoint", models / "flow" / "latest.pth", "--dest", tmp_path / "x"]
    with open("/dev/full", "w") as full:
        done = subprocess.run([str(part) for part in command], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == "error: No space left on device", done.stderr
