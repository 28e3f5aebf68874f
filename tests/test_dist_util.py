"""One process or many: the environment, the time limit, and leaving together."""

import signal

import pytest

from conftest import ENDLESS, SMALL, has_trained, wait_for
from processes import Job


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
