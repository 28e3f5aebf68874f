"""Running on one process or many: under torchrun (NCCL on GPUs, gloo on CPUs), or with plain `python`.

Every function works in both cases; without torchrun there is one rank, number 0.
"""

import datetime
import multiprocessing
import os
import signal
import sys
import time
import traceback
from contextlib import contextmanager

import torch
import torch.distributed as dist


class UserError(Exception):
    """A mistake of the user's, met by all ranks together; its text says what is wrong and how to mend it, in one line."""


class LoneError(UserError):
    """One that this rank met by itself, while the others are at work."""


class Stopped(Exception):
    """The run was asked to stop by a signal, and has kept what it should; the signal is its argument."""


def rank():
    return int(os.environ.get("RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def session():
    """Join the other ranks, if any; gives the torch.device of this rank."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"--nproc_per_node is more than the {torch.cuda.device_count()} GPUs of this machine: lower it")
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=_timeout(), **_meeting_place())
    yield device
    gather(None)  # leave together: a rank that closes its connections early can bring the others down
    if dist.is_initialized():  # after an error the others may be gone, and leaving politely could wait for them
        dist.destroy_process_group()


def _timeout():
    """How long ranks wait for each other: the environment variable DIST_TIMEOUT, in seconds, or half an hour."""
    text = os.environ.get("DIST_TIMEOUT", "1800")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0
    if not 1 <= seconds <= 10**6:  # much more overflows in gloo
        raise UserError(f"the environment variable DIST_TIMEOUT is {text}: it must be a number of seconds, from 1 to 1000000")
    return datetime.timedelta(seconds=seconds)


def _meeting_place():
    """Where ranks find each other, as arguments of init_process_group; by default what torchrun says.

    torchrun 2.11 gives the processes that it restarts the same store of addresses, in which those of the dead ones still are:
    who reads them before they are replaced connects to nobody.  On one machine the number of restarts tells them apart.  On
    several it differs, and torchrun has to be told to make a new store each time.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return {}
    if os.environ["GROUP_WORLD_SIZE"] != "1":
        if rank() == 0:
            print("warning: for --max-restarts on several machines set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1", file=sys.stderr)
        return {}
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=_timeout())
    name = f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}"
    return {"store": dist.PrefixStore(name, store), "rank": rank(), "world_size": world_size()}


SIGNALS = (signal.SIGTERM, signal.SIGINT)


def strongest(votes):
    """Of SIGNALS, with how many ranks have received each, the first that any has; or None."""
    return next((number for number, count in zip(SIGNALS, votes) if count), None)


class StopSignals:
    """Context in which SIGTERM and SIGINT are noted instead of ending the process: a step can be finished.

    Ranks tell each other with votes() and strongest(), or with poll(), and leave together.  More signals change nothing, so
    that Ctrl-C pressed twice costs no checkpoint.
    """

    def __init__(self):
        self.received = None

    def __enter__(self):
        self.before = {number: signal.signal(number, self.note) for number in SIGNALS}
        return self

    def __exit__(self, kind, error, where):
        if self.received is None and kind is not Stopped:
            for number, handler in self.before.items():
                signal.signal(number, handler)
        elif self.received and kind and is_loss_of_a_rank(error):
            raise Stopped(self.received) from error  # the other was asked to stop as well, and did not finish its step

    def note(self, number, frame):
        if self.received is None:
            self.received = number
            if rank() == 0:
                name = signal.Signals(number).name
                os.write(2, f"\n{name}: finishing the step and writing a checkpoint (kill -9 leaves without)\n".encode())

    def votes(self):
        """[0 or 1 for each of SIGNALS]: what this rank has received."""
        return [float(self.received == number) for number in SIGNALS]

    def poll(self, busy=True):
        """Stopped on all ranks if any has received a signal; else whether any is busy.  All ranks call this together."""
        *votes, busy = sum_over_ranks(torch.tensor([*self.votes(), float(busy)])).tolist()
        if number := strongest(votes):
            raise Stopped(number)
        return bool(busy)


def is_loss_of_a_rank(error):
    """Whether an exception is that of gloo or NCCL when another rank has gone, or has been waited for too long."""
    return isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and "gloo" in str(error)


def launch(main):
    """Run a script's main() and leave; a UserError becomes one line, from one rank, and exit status 2.

    A signal that asked the run to stop becomes 128 and its number: 143 for SIGTERM, 130 for SIGINT.
    """
    try:
        status = _run(main)
    finally:
        for number in SIGNALS:  # it is leaving, and would do so with a traceback or another status
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would complain of what follows
        for child in multiprocessing.active_children():  # that read images, which Python would wait for: they ignore signals
            child.kill()
    if "RANK" in os.environ:
        # Threads of torch that outlive the process group may want the interpreter's lock while it is being torn down, which
        # aborts the process, and with it the job: one run of two ranks in sixty.  So it is not torn down.  Nor is the process
        # group after an error, which could wait for ranks that are gone.
        sys.stderr.flush()
        os._exit(status)
    if status:
        sys.exit(status)


def _run(main):
    """The exit status of main()."""
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        if rank() == 0 or isinstance(error, LoneError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(2)  # torchrun stops all ranks when the first leaves: let rank 0 speak
        return 2
    except Stopped as stopped:
        if rank() == 0:
            name = signal.Signals(stopped.args[0]).name
            print(f"stopped by {name}; the same command continues", file=sys.stderr, flush=True)
        return 128 + stopped.args[0]
    except KeyboardInterrupt:
        if rank() == 0:
            print("stopped", file=sys.stderr, flush=True)
        return 130
    except BrokenPipeError:  # the reader of stdout went away (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (RuntimeError, MemoryError) as error:  # torch's OutOfMemoryError is a RuntimeError
        text = str(error).strip().splitlines() or ["out of memory"]
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text[0]:
            advice = "lower --bsz (training), --eval_bsz (sampling), --bank_size or the size of the network"
            print(f"error: out of memory on rank {rank()}: {advice} ({text[0]})", file=sys.stderr, flush=True)
            return 2
        if "RANK" not in os.environ:
            raise
        if is_loss_of_a_rank(error):
            print(
                f"rank {rank()} leaves: it lost another rank, or waited too long for it ({text[0]})",
                file=sys.stderr,
                flush=True,
            )
        else:
            traceback.print_exc()
        return 1
    return 0


def gather(value):
    """List of every rank's (picklable) value, on every rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def gather_rows(mine, n):
    """(n, d) float32 on rank 0, None on the others; rank r gives `mine`, the rows r, r + world_size, ...  All on the CPU."""
    if world_size() == 1:
        return mine
    device, rows = "cuda" if dist.get_backend() == "nccl" else "cpu", None
    if rank() == 0:
        rows = torch.empty(n, mine.shape[1])
        rows[:: world_size()] = mine
    for r in range(1, min(world_size(), n)):  # one after the other: rank 0 holds the whole and one part
        if rank() == r:
            dist.send(mine.to(device), 0)
        elif rank() == 0:
            part = torch.empty(len(range(r, n, world_size())), mine.shape[1], device=device)
            dist.recv(part, r)
            rows[r :: world_size()] = part.cpu()
    return rows


def agree(function):
    """function() on every rank; if it raised UserError on any, that error (of the lowest rank) on all of them."""
    result, message = None, None
    try:
        result = function()
    except UserError as error:
        message = str(error)
    for other in gather(message):
        if other is not None:
            raise UserError(other)
    return result


def on_first_rank(function):
    """function() on rank 0 alone while the others wait; its UserError is everybody's.  Returns its value to rank 0."""
    return agree(function if rank() == 0 else lambda: None)


def sum_over_ranks(tensor):
    """Elementwise sum of the ranks' tensors, on the tensor's device."""
    if not dist.is_initialized():
        return tensor
    total = tensor.to("cuda" if dist.get_backend() == "nccl" else "cpu", copy=True)
    dist.all_reduce(total)
    return total.to(tensor.device)


def average_gradients(parameters, votes):
    """Replace each gradient by its mean over the ranks; returns the sum over the ranks of `votes`, (n,).  In one message."""
    if world_size() == 1:
        return votes
    grads = [p.grad for p in parameters]
    flat = sum_over_ranks(torch.cat([votes.to(grads[0].dtype), *(g.flatten() for g in grads)]))
    votes, flat = flat[: len(votes)], flat[len(votes) :] / world_size()
    torch._foreach_copy_(grads, [f.view_as(g) for f, g in zip(flat.split([g.numel() for g in grads]), grads)])
    return votes
