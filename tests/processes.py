"""Scripts run in processes that are forked from one that has imported torch already, so that killing many of them is quick.

They are processes of their own all the same: killed with SIGKILL, with their own files, environment and process group.
"""

import contextlib
import importlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def _kill():
    os.kill(os.getpid(), signal.SIGKILL)


def _inject(what, nth):
    """Kill this process (SIGKILL) at the nth call of something that training does."""
    import torch

    calls = 0

    def patch(owner, name, instead, counts=lambda *args: True):
        real = getattr(owner, name)

        def counted(*args, **kwargs):
            nonlocal calls
            calls += counts(*args)
            return instead(real, *args, **kwargs) if calls == nth else real(*args, **kwargs)

        setattr(owner, name, counted)

    def before(real, *args, **kwargs):
        _kill()

    def after(real, *args, **kwargs):
        real(*args, **kwargs)
        _kill()

    def halfway(real, content, file):
        """Half of a checkpoint reaches the disk."""
        real(content, file)
        file.flush()
        file.truncate(file.tell() // 2)
        _kill()

    places = {
        "step": (torch.optim.RAdam, "step", before),
        "backward": (torch.Tensor, "backward", after),
        "write": (torch, "save", halfway),
        "fsync": (os, "fsync", before),
        "before rename": (os, "replace", before),
        "after rename": (os, "replace", after),
        "pointer": (os, "symlink", after),
        "removal": (Path, "unlink", after, lambda path: path.name.startswith("DDPMpp-")),
    }
    patch(*places[what])


def impatient():
    """Ranks other than the first give it time to speak before torchrun ends them all; here nobody does."""
    import dist_util

    dist_util.time.sleep = lambda seconds: None


def _child(argv, cwd, environment, output, fault, prepare):
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False, buffering=1) for number in (1, 2))  # noqa: SIM115
    multiprocessing.set_start_method("fork", force=True)  # as in a process that was not forked from a server
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = argv
    module = importlib.import_module(Path(argv[0]).stem)
    import dist_util

    if prepare:
        prepare()
    if fault:
        _inject(*fault)
    dist_util.launch(module.main)


def _context():
    """The forkserver, which imports the scripts when it starts, and conftest for the tests' functions (`prepare`)."""
    context = multiprocessing.get_context("forkserver")
    if not hasattr(_context, "started"):
        before = dict(os.environ)
        os.environ.update(PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
        try:
            context.set_forkserver_preload(
                [
                    "train",
                    "eval",
                    "fid",
                    "teaser",
                    "compare",
                    "conftest",
                    "processes",
                    "torchvision.utils",
                    "matplotlib.figure",
                    "matplotlib.backends.backend_agg",
                ]
            )
            from multiprocessing.forkserver import ensure_running

            ensure_running()
        finally:
            os.environ.clear()
            os.environ.update(before)
        _context.started = True
    return context


def free_port():
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Job:
    """A script running on one rank, or on several gloo ranks without torchrun: nobody restarts them, nobody ends the others."""

    def __init__(self, output, *command, ranks=1, fault=None, faulty_rank=0, environment=(), prepare=None, cwd=ROOT):
        """`output`: beginning of the paths for stdout and stderr; `fault`: see _inject(); `prepare`: called in the process."""
        port = str(free_port())
        self.outputs, self.processes = [f"{output}.{rank}" for rank in range(ranks)], []
        for rank in range(ranks):
            env = dict(environment)
            if ranks > 1:
                env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
                env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            fault_here = fault if rank == faulty_rank else None
            args = ([str(part) for part in command], cwd, env, self.outputs[rank], fault_here, prepare)
            process = _context().Process(target=_child, args=args)
            process.start()
            self.processes.append(process)

    def wait(self, timeout=60):
        """The exit status of every rank, minus the signal's number for a killed one; AssertionError if one hangs."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0, end - time.monotonic()))
        hanging = [i for i, process in enumerate(self.processes) if process.exitcode is None]
        for i in hanging:
            self.processes[i].kill()
        assert not hanging, f"ranks {hanging} hang\n{self.err()}"
        return [process.exitcode for process in self.processes]

    def signal(self, number, ranks=None):
        for process in self.processes if ranks is None else [self.processes[rank] for rank in ranks]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)

    def text(self, name):
        return "".join(Path(f"{output}.{name}").read_text() for output in self.outputs if Path(f"{output}.{name}").exists())

    def out(self):
        return self.text("out")

    def err(self):
        return self.text("err")
