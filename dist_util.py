"""Running on one process or many: under torchrun (NCCL on GPUs, gloo on CPUs), or with plain `python`.

Every function works in both cases; without torchrun there is one rank, number 0, and no process group.
"""

import os
import signal
import sys
from pathlib import Path

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def _leave(number, frame):
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"\nstopped by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)


if Path(getattr(sys.modules["__main__"], "__file__", None) or "/").resolve().parent == Path(__file__).resolve().parent:
    for _number in SIGNALS:  # a script is starting: its imports take seconds, in which Ctrl-C would be a traceback
        signal.signal(_number, _leave)

import datetime  # noqa: E402
import time  # noqa: E402
import traceback  # noqa: E402
from contextlib import contextmanager, nullcontext, suppress  # noqa: E402

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402


class UserError(Exception):
    """A mistake of the user's, met by all ranks together; its text says what is wrong and how to mend it, in one line."""


class LoneError(UserError):
    """One that this rank met by itself, while the others are at work."""


class Stopped(BaseException):
    """The run was asked to stop: the signal, and what to say besides.  Like KeyboardInterrupt, no `except Exception` takes it."""

    def __init__(self, number, note=""):
        super().__init__(number, note)
        self.number, self.note = number, note


# -------------------------------------------------------------------------------------------------- the process group

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets
_place = (0, 1)  # rank and number of ranks, from session() on; also after the group is gone


def rank():
    return _place[0]


def world_size():
    return _place[1]


def _launched():
    """Whether torchrun started this process, or another launcher that sets its variables; LoneError if they are half set."""
    found = [name for name in ("RANK", "WORLD_SIZE") if name in os.environ]
    missing = [name for name in VARIABLES if name not in os.environ]
    if not found:
        return False
    here = ", ".join(f"{name}={os.environ[name]}" for name in found)
    if missing:
        raise LoneError(f"the environment has {here} but no {', '.join(missing)}: start with torchrun, or unset {found[0]}")
    with suppress(ValueError):
        if 0 <= int(os.environ["RANK"]) < int(os.environ["WORLD_SIZE"]) and int(os.environ["LOCAL_RANK"]) >= 0:
            return True
    raise LoneError(f"the environment has {here}, which is no place among ranks: start with torchrun, or unset {found[0]}")


@contextmanager
def session():
    """Join the other ranks, if any; gives the torch.device of this rank."""
    global _place
    launched, device = _launched(), torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) if launched else 0)
        if device.index >= torch.cuda.device_count():
            raise UserError(f"--nproc_per_node is more than the {torch.cuda.device_count()} GPUs of this machine: lower it")
        torch.cuda.set_device(device)
    if launched:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=_timeout(), **_meeting_place())
        _place = (dist.get_rank(), dist.get_world_size())
    yield device
    gather(None)  # leave together: a rank that closes its connections early can bring the others down
    if launched:  # after an error the others may be gone, and leaving politely could wait for them
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

    Ranks publish their addresses in a store.  When torchrun 2.11 restarts ranks, it gives them the old store, with the
    addresses of the dead ranks in it.  A rank that reads an old address waits for nobody.  So on one machine each restart
    gets names of its own in the store, by the number of the restart.  On several machines that number can differ, and the
    user has to tell torchrun to make a new store.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return {}
    if os.environ["GROUP_WORLD_SIZE"] != "1":
        if os.environ["RANK"] == "0":
            print("warning: for --max-restarts on several machines set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1", file=sys.stderr)
        return {}
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=_timeout())
    name = f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}"
    return {
        "store": dist.PrefixStore(name, store),
        "rank": int(os.environ["RANK"]),
        "world_size": int(os.environ["WORLD_SIZE"]),
    }


def torchrun_agent():
    """A name for torchrun's process on this machine, which lives as long as the job; None without torchrun.

    The name has the job's id, the machine, the process number and when the process began: no other job has it.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    agent, begun = os.getppid(), ""
    with suppress(OSError):  # systems without /proc
        begun = Path(f"/proc/{agent}/stat").read_text().rsplit(")", 1)[1].split()[19]  # ticks since the machine started
    return f"{os.environ['TORCHELASTIC_RUN_ID']} {os.uname().nodename} {agent} {begun}"


# ------------------------------------------------------------------------------------------------------------ signals


class StopSignals:
    """Context in which SIGTERM and SIGINT are noted instead of ending the process, so that work can be brought to an end.

    Ranks tell each other with check() or poll(), and leave together.  More signals change nothing, so that Ctrl-C pressed
    twice costs no checkpoint.
    """

    OFTEN = (
        64  # calls of check() for one message among the ranks, at most; fewer where a call comes less than 64 times a second
    )

    def __init__(self):
        self.received, self.left, self.every, self.since = None, 1, 1, time.monotonic()

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
                os.write(2, f"\n{name}: writing a checkpoint, then leaving (kill -9 leaves without)\n".encode())

    def _exchange(self, *numbers):
        """The signal that any rank has received, SIGTERM first, or None; and the sums of the numbers over the ranks."""
        mine = [float(self.received == number) for number in SIGNALS]
        votes = sum_over_ranks(torch.tensor([*mine, *numbers], dtype=torch.float64)).tolist()
        return next((number for number, count in zip(SIGNALS, votes) if count), None), votes[len(SIGNALS) :]

    def check(self):
        """The signal that asks the run to stop, or None.  All ranks call this together, as often as they like.

        They exchange one small message about once a second, and at least every 64th call.
        """
        if world_size() == 1:
            return self.received
        self.left -= 1
        if self.left:
            return None
        now = time.monotonic()
        number, (seconds,) = self._exchange(now - self.since)
        a_second = self.every * world_size() / max(seconds, 1e-9)  # so many calls take one
        self.every = self.left = max(1, min(self.OFTEN, int(a_second)))
        self.since = now
        return number

    def poll(self, busy=True):
        """Stopped on all ranks if any has received a signal; else whether any is busy.  All ranks call this together."""
        number, (busy,) = self._exchange(float(busy))
        if number:
            raise Stopped(number, "the same command continues")
        return bool(busy)


def is_loss_of_a_rank(error):
    """Whether an exception is that of gloo or NCCL when another rank has gone, or has been waited for too long."""
    return isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and "gloo" in str(error)


def _stop(number, frame):
    raise Stopped(number)


def launch(main):
    """Run a script's main() and leave; a UserError becomes one line, from one rank, and exit status 2.

    A signal that asks the script to stop becomes one line too, and 128 and its number: 143 for SIGTERM, 130 for SIGINT.
    """
    for number in SIGNALS:
        signal.signal(number, _stop)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files need not be text
    try:
        status = _run(main)
    except Stopped as stopped:  # while it was leaving already
        status = 128 + stopped.number
    finally:
        for number in SIGNALS:  # it is leaving, and would do so with a traceback or another status
            signal.signal(number, signal.SIG_IGN)
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
    several = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    speaks = not several or os.environ["RANK"] == "0"

    def say(text):
        print(text, file=sys.stderr, flush=True)

    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        if speaks or isinstance(error, LoneError):
            say(f"error: {error}")
        else:
            time.sleep(2)  # torchrun stops all ranks when the first leaves: let rank 0 speak
        return 2
    except Stopped as stopped:
        if speaks:
            say("; ".join(filter(None, [f"stopped by {signal.Signals(stopped.number).name}", stopped.note])))
        return 128 + stopped.number
    except BrokenPipeError:  # the reader of stdout went away (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (RuntimeError, MemoryError) as error:  # torch's OutOfMemoryError is a RuntimeError
        text = str(error).strip().splitlines() or ["out of memory"]
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text[0]:
            advice = "lower --bsz (training), --eval_bsz (sampling), --bank_size or the size of the network"
            say(f"error: out of memory on rank {rank()}: {advice} ({text[0]})")
            return 2
        if not several:
            raise
        if is_loss_of_a_rank(error):
            say(f"rank {rank()} leaves: it lost another rank, or waited too long for it ({text[0]})")
        else:
            traceback.print_exc()
        return 1
    return 0


# -------------------------------------------------------------------------------------------------------- collectives


def parallel(model, static=False):
    """The model to train: itself, or with ranks in a DistributedDataParallel, which averages gradients over them.

    `static` promises one forward and one backward pass a step, the same each time, and no other use of the graph.
    """
    if not dist.is_initialized():
        return model
    options = {"broadcast_buffers": False, "gradient_as_bucket_view": True, "static_graph": static}
    return torch.nn.parallel.DistributedDataParallel(model, **options)


def accumulating(model):
    """Context in which backward() of a parallel() model leaves gradients to a later one to average."""
    return model.no_sync() if dist.is_initialized() else nullcontext()


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
    rows = None
    if rank() == 0:
        rows = torch.empty(n, mine.shape[1])
        rows[:: world_size()] = mine
    for r in range(1, min(world_size(), n)):  # one after the other: rank 0 holds the whole and one part
        if rank() == r:
            dist.send(mine, 0)
        elif rank() == 0:
            part = torch.empty(len(range(r, n, world_size())), mine.shape[1])
            dist.recv(part, r)
            rows[r :: world_size()] = part
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
    """Elementwise sum of the ranks' tensors."""
    if not dist.is_initialized():
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total
