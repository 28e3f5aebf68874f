"""One process or many: the environment, the time limit, and leaving together."""

import dist_util

import os
import re
import shlex
import signal
import subprocess
import sys

import pytest
import torch

import misc
from conftest import ENDLESS, ROOT, SMALL, has_trained, launch, wait_for
from processes import Job

# ------------------------------------------------------------------------------------------------------ the environment

COMPLETE = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"WORLD_SIZE": "2"}, "RANK"),
        ({"RANK": "0"}, "WORLD_SIZE"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
        ({**COMPLETE, "RANK": "2"}, "RANK=2"),
        ({**COMPLETE, "RANK": "-1"}, "RANK=-1"),
        ({**COMPLETE, "WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        ({**COMPLETE, "RANK": "first"}, "RANK=first"),
        ({**COMPLETE, "WORLD_SIZE": ""}, "WORLD_SIZE="),
        ({**COMPLETE, "LOCAL_RANK": "x"}, "LOCAL_RANK"),
        ({**COMPLETE, "MASTER_PORT": "x"}, "MASTER_PORT"),
        ({**COMPLETE, "MASTER_PORT": "99999"}, "MASTER_PORT=99999"),
    ],
    ids=str,
)
def test_half_an_environment_of_ranks_is_one_line(tmp_path, variables, named):
    """As a cluster's shell leaves it: half the batch and half the images would be made, in silence."""
    job = Job(tmp_path / "log", "fid.py", "--mode", "ref", "--dest", tmp_path / "x", environment=variables)
    assert job.wait() == [2] and not (tmp_path / "x.npz").exists(), job.err()
    lines = job.err().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: the environment has ") and named in lines[0], job.err()
    assert "torchrun" in lines[0] and "unset" in lines[0]


def test_no_file_is_opened_in_the_place_of_a_closed_stderr(tmp_path):
    """A daemon's: what is said there would be written into a checkpoint."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import dist_util; f = open('x', 'w'); f.write(str(f.fileno()))"
    command = f"cd {shlex.quote(str(tmp_path))} && exec {sys.executable} -c {shlex.quote(code)} 0<&- 1>&- 2>&-"
    assert subprocess.run(["sh", "-c", command]).returncode == 0
    assert int((tmp_path / "x").read_text()) == 3


def test_half_an_environment_is_one_line_from_the_start(tmp_path, monkeypatch):
    """Of a script as users start it."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = launch("fid.py", "--mode", "ref", "--dest", tmp_path / "x", expect=2)
    assert done.stderr.startswith("error: the environment has WORLD_SIZE=2") and done.stderr.count("\n") == 1


def test_there_is_one_rank_without_torchrun_whatever_a_cluster_says(monkeypatch):
    cluster = {"MASTER_ADDR": "node7", "MASTER_PORT": "1", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}
    cluster |= {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "GROUP_RANK": "1"}
    for name, value in cluster.items():
        monkeypatch.setenv(name, value)
    with dist_util.session() as device:
        assert (dist_util.rank(), dist_util.world_size()) == (0, 1) and device.index in (None, 0)
        assert not torch.distributed.is_initialized()
        assert dist_util.gather(5) == [5] and dist_util.agree(lambda: 6) == 6


def pretend_to_have_one_gpu():
    torch.cuda.is_available, torch.cuda.device_count = (lambda: True), (lambda: 1)


def test_more_ranks_than_gpus_are_refused_in_one_line(tmp_path):
    """Rank 0 has one, so that another has to say it, and no more than one."""
    for rank, lines in ((1, ["error: --nproc_per_node is more than the number of GPUs of this machine, 1: lower it"]), (2, [])):
        place = {**COMPLETE, "WORLD_SIZE": "3", "RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = ["fid.py", "--mode", "ref", "--dest", tmp_path / "x"]
        job = Job(tmp_path / f"{rank}", *command, environment=place, prepare=pretend_to_have_one_gpu)
        assert job.wait() == [2] and job.err().splitlines() == lines


def test_gradients_are_averaged_by_torch_where_there_are_ranks_and_there_alone():
    """The names in a state dict stay: it is taken from the model inside."""
    model = torch.nn.Linear(2, 1)
    assert dist_util.parallel(model) is model
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = dist_util.parallel(model)
        assert isinstance(wrapped, torch.nn.parallel.DistributedDataParallel) and wrapped.module is model
        with dist_util.accumulating(wrapped):
            assert not wrapped.require_backward_grad_sync
        assert wrapped.require_backward_grad_sync
    finally:
        torch.distributed.destroy_process_group()
    with dist_util.accumulating(model):
        pass


# ------------------------------------------------------------------------------------------------------- the time limit


@pytest.mark.parametrize("limit", ["soon", "0", "nan", "1e13"])
def test_a_timeout_that_is_no_time_is_refused(tmp_path, limit):
    arguments = ["train.py", *SMALL, *ENDLESS, "--workdir", tmp_path / "run"]
    job = Job(tmp_path / "log", *arguments, ranks=2, environment={"DIST_TIMEOUT": limit})
    assert job.wait() == [2, 2] and job.err().count("error: the environment variable DIST_TIMEOUT") == 1, job.err()


def test_no_rank_waits_longer_than_the_timeout_for_one_that_stands_still(tmp_path):
    limit = {"DIST_TIMEOUT": "4"}
    arguments = ["train.py", *SMALL, *ENDLESS, "--workdir", tmp_path / "run"]
    job = Job(tmp_path / "log", *arguments, ranks=2, environment=limit)
    wait_for(lambda: has_trained(tmp_path / "run"), "line of metrics")
    job.signal(signal.SIGSTOP, [1])
    job.processes[0].join(20)
    assert job.processes[0].exitcode == 1 and "waited too long" in job.err()
    job.signal(signal.SIGKILL, [1])
    job.wait(5)


# -------------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("received", [(signal.SIGTERM, None), (signal.SIGINT, signal.SIGTERM), (None, None)])
def test_ranks_tell_each_other_about_signals_with_one_message(monkeypatch, received):
    """SIGTERM counts more than SIGINT, and any rank's counts for all."""
    ranks, sent = [dist_util.StopSignals() for _ in received], []

    def votes_of_all(votes):
        sent.append(votes)
        return sum(torch.tensor([*(rank.received == kind for kind in dist_util.SIGNALS), 0]) for rank in ranks)

    monkeypatch.setattr(dist_util, "sum_over_ranks", votes_of_all)
    for rank, number in zip(ranks, received):
        if number:
            rank.note(number, None)
    assert [rank.check() for rank in ranks] == [signal.SIGTERM if any(received) else None] * 2
    assert [(votes.shape, votes.device.type) for votes in sent] == [((4,), "cpu")] * 2


@pytest.mark.parametrize(("script", "ranks"), [("eval.py", 1), ("eval.py", 2), ("fid.py", 1)])
def test_scripts_that_are_stopped_leave_with_one_line(models, tmp_path, script, ranks):
    images = {"eval.py": ["--workdir", tmp_path / "out"], "fid.py": ["--mode", "gen", "--dest", tmp_path / "x.npz"]}[script]
    command = [script, "--checkpoint", models / "ode" / "latest.pth", "--end_seed", "999999", "--eval_bsz", "4", *images]
    job = Job(tmp_path / "log", *command, ranks=ranks)
    wait_for(lambda: "img/s" in job.err(), "image")
    job.signal(signal.SIGTERM)
    assert job.wait(20) == [143] * ranks, job.err()
    lines = re.split(r"[\r\n]+", job.err())
    assert [line for line in lines if line and "img/s" not in line] == ["stopped by SIGTERM"] and job.out() == ""


def stop_in_the_first_bar():
    """SIGTERM while a progress bar is being made: it has drawn itself, and nobody closes it."""
    real = misc.Bar.__init__

    def made(self, *args, **kwargs):
        real(self, *args, **kwargs)
        os.kill(os.getpid(), signal.SIGTERM)

    misc.Bar.__init__ = made


def test_the_line_of_a_signal_stands_alone_behind_a_bar_that_is_not_finished(models, tmp_path):
    command = ["fid.py", "--checkpoint", models / "ode" / "latest.pth", "--end_seed", "99", "--mode", "gen", "--dest", "x.npz"]
    job = Job(tmp_path / "log", *command, prepare=stop_in_the_first_bar, cwd=tmp_path)
    assert job.wait(20) == [143], job.err()
    assert "stopped by SIGTERM" in job.err().splitlines(), job.err()
    assert not (tmp_path / "x.npz").exists() and not list(tmp_path.glob("out/.*.tmp"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_script_is_being_imported_is_one_line(number):
    """Python reports each import; torch takes most of the time."""
    command = [sys.executable, "-X", "importtime", "train.py", "--dry_run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        lines = iter(process.stderr.readline, "")
        assert any("torch." in line for line in lines)
        process.send_signal(number)
        rest = [line.strip() for line in lines if not line.startswith("import time:")]
        assert process.wait(20) == 128 + number and process.stdout.read() == ""
    assert [line for line in rest if line] == [f"stopped by {number.name}"]


def test_ranks_that_were_started_with_different_arguments_are_told(tmp_path):
    """--seed on one of them alone would else train something that no configuration describes."""
    from processes import free_port

    port, jobs = str(free_port()), []
    for rank in (0, 1):
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = ["train.py", "--workdir", tmp_path / "run", "--seed", rank]
        jobs.append(Job(tmp_path / f"log{rank}", *command, environment=place))
    assert [job.wait() for job in jobs] == [[2], [2]]
    assert "error: the ranks were started with different arguments" in jobs[0].err() and not (tmp_path / "run").exists()
