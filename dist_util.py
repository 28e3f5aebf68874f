"""Running on many processes, under torchrun (NCCL on GPUs, gloo on CPUs), or on one: rank 0, without a process group."""

import os
import signal
import sys
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from pathlib import Path

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
HANDLED = [number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]  # nohup
while (_spare := os.open(os.devnull, os.O_RDWR)) < 3:  # where 0 to 2 are closed, a checkpoint would be opened as stderr
    pass
os.close(_spare)


class UserError(Exception):
    """A mistake of the user's, told by rank 0 in one line.  All ranks raise it, with agree() where one may meet it alone."""


def _leave(number, frame):
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"\nstopped by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)


_script = Path(getattr(sys.modules["__main__"], "__file__", None) or "/").resolve()
if _script.parent == Path(__file__).resolve().parent and _script.stem in (
    "train",
    "eval",
    "fid",
    "teaser",
    "compare",
    "checkpoint",
):
    for _number in HANDLED:  # its imports take seconds, in which Ctrl-C would be a traceback; launch() has better answers
        signal.signal(_number, _leave)
    if {"-h", "--help"} & set(sys.argv[1:]):  # which is to be there at once, so before torch
        import defaults

        with suppress(UserError):  # launch() tells it
            defaults.parse(_script.stem, description=sys.modules["__main__"].__doc__)

os.environ.setdefault("USER", str(os.getuid()))  # torch asks for a name, which a container's user may not have

import ctypes  # noqa: E402
import datetime  # noqa: E402
import time  # noqa: E402
import traceback  # noqa: E402
import warnings  # noqa: E402

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402


class LoneError(UserError):
    """A UserError that one rank raises while the others go on with their work; that rank prints it."""


class Stopped(BaseException):
    """The run was asked to stop, by this signal; a note says more.  Like KeyboardInterrupt, no `except Exception` takes it."""

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
    found = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    if not {"RANK", "WORLD_SIZE"} & found.keys():
        return False
    with suppress(ValueError, KeyError):
        place, world, local, port = (int(found[name]) for name in VARIABLES if name != "MASTER_ADDR")
        if 0 <= place < world and local >= 0 and 0 <= port < 2**16 and "MASTER_ADDR" in found:
            return True
    here = " ".join(f"{name}={value}" for name, value in found.items())
    needed = f"ranks need {', '.join(VARIABLES)}, and a RANK from 0 to WORLD_SIZE - 1"
    raise LoneError(f"the environment has {here}, but {needed}: start with torchrun, or unset RANK and WORLD_SIZE")


@contextmanager
def session():
    """Join the other ranks, if any; gives the torch.device of this rank."""
    global _place
    launched, device = _launched(), torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) if launched else 0)
        count = torch.cuda.device_count()
        if device.index >= count:  # one such rank of a machine says it
            refusal = LoneError if device.index == count else UserError
            raise refusal(f"--nproc_per_node is more than the number of GPUs of this machine, {count}: lower it")
        torch.cuda.set_device(device)
    else:
        keep_memory()
    if launched:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=_timeout(), **_meeting_place())
        _place = (dist.get_rank(), dist.get_world_size())
        if any(arguments != sys.argv[1:] for arguments in gather(sys.argv[1:])):
            raise UserError("the ranks were started with different arguments: start all with the same command")
    yield device
    gather(None)  # leave together: a rank that closes its connections early can bring the others down
    if launched:  # after an error the others may be gone, and leaving politely could wait for them
        dist.destroy_process_group()


def keep_memory():
    """Let the process keep freed memory for the next tensors, until it ends.

    By default glibc gives large blocks back, and the system fills each page with zeros when they are needed again.  That took
    40 % of the time of a forward pass on a CPU: benchmarks/README.md.
    """
    with suppress(OSError, AttributeError):  # another C library
        c = ctypes.CDLL(None)
        c.mallopt(-4, 0)  # M_MMAP_MAX: large blocks are part of the heap, too
        c.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap does not shrink


def _timeout():
    """How long ranks wait for each other: the environment variable DIST_TIMEOUT, in seconds, or half an hour."""
    text = os.environ.get("DIST_TIMEOUT", "1800")
    with suppress(ValueError):
        if 1 <= float(text) <= 10**6:  # much more overflows in gloo
            return datetime.timedelta(seconds=float(text))
    raise UserError(f"the environment variable DIST_TIMEOUT is {text}: it must be a number of seconds, from 1 to 1000000")


def _meeting_place():
    """Where ranks find each other, as arguments of init_process_group; by default what torchrun says.

    Ranks publish their addresses in a store.  When torchrun 2.11 restarts ranks, the addresses of the dead are still in it,
    and a rank that reads one waits for nobody.  So on one machine each restart gets names of its own in the store, by the
    number of the restart.  On several machines that number can differ: there users set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.
    """
    env = os.environ
    restarts = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and env.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if not restarts or env["GROUP_WORLD_SIZE"] != "1":
        return {}
    store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), timeout=_timeout())
    store = dist.PrefixStore(f"restart {env['TORCHELASTIC_RESTART_COUNT']}", store)
    return {"store": store, "rank": int(env["RANK"]), "world_size": int(env["WORLD_SIZE"])}


# ------------------------------------------------------------------------------------------------- leaving, and signals


class StopSignals:
    """Context in which SIGNALS are noted, and ranks tell each other with check() or poll(), to leave together."""

    def __init__(self):
        self.received = None

    def __enter__(self):
        self.before = {number: signal.signal(number, self.note) for number in HANDLED}
        return self

    def __exit__(self, kind, error, where):
        if self.received is None and kind is not Stopped:
            for number, handler in self.before.items():
                signal.signal(number, handler)
        elif self.received and kind and is_loss_of_a_rank(error):
            raise Stopped(self.received) from error  # the other was asked to stop as well, and did not finish its step

    def note(self, number, frame):
        if self.received is None:
            self.received, name = number, signal.Signals(number).name
            with suppress(OSError):  # the terminal or pipe may have gone with the same signal
                if rank() == 0:
                    os.write(2, f"\n{name}: keeping what is done, then leaving (kill -9 leaves without)\n".encode())

    def _exchange(self, number):
        """The signal that any rank has received, SIGTERM first, or None; and the sum over the ranks of a number."""
        votes = torch.tensor([*(self.received == kind for kind in SIGNALS), number], dtype=torch.float64)
        *votes, total = sum_over_ranks(votes).tolist()
        return next((kind for kind, count in zip(SIGNALS, votes) if count), None), total

    def check(self):
        """The signal that asks the run to stop, or None.  All ranks call this together; it costs one message of 32 bytes."""
        return self._exchange(0)[0]

    def poll(self, busy=True):
        """Stopped on all ranks if any has received a signal; else whether any is busy.  All ranks call this together."""
        number, busy = self._exchange(busy)
        if number:
            raise Stopped(number, "; the same command continues")
        return bool(busy)


def is_loss_of_a_rank(error):
    """Whether an exception is that of gloo or NCCL when another rank has gone, or has been waited for too long."""
    return isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and "gloo" in str(error)


def _stop(number, frame):
    raise Stopped(number)


class Unfailing:
    """A stderr that nobody may be left to read (`| tee`, a full disk, a daemon's): what it cannot write stops no run."""

    def __init__(self, stream):
        self.stream = stream or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")

    def write(self, text):
        with suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self):
        with suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def launch(main):
    """Run a script's main() and leave.  One line and an exit status for a UserError: 2, and for a signal: 128 + its number."""
    with redirect_stderr(Unfailing(sys.stderr)):
        _launch(main)


def _launch(main):
    for number in HANDLED:
        signal.signal(number, _stop)
    with suppress(AttributeError):  # a notebook's stdout cannot, a closed one is None
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files need not be text
    try:
        status = _run(main)
    except Stopped as stopped:  # while it was leaving already
        status = 128 + stopped.number
    except Exception:
        if "RANK" not in os.environ:
            raise
        traceback.print_exc()
        status = 1
    finally:
        for number in HANDLED:  # it is leaving, and would do so with a traceback or another status
            signal.signal(number, signal.SIG_IGN)
    if "IPython" in sys.modules:  # %run in a notebook, which goes on
        sys.exit(status)
    # The interpreter is not torn down: threads of torch that want its lock would abort the process (one run of two ranks in
    # sixty), a thread that reads from a disk that does not answer would be waited for, and so would ranks that are gone.
    sys.stderr.flush()
    os._exit(status)


def one_line(text):
    """The text with what a terminal would take for a command written out."""
    return "".join(c if c >= " " and c != "\x7f" else repr(c)[1:-1] for c in str(text))


def told(error):
    """What is said of a UserError or an OSError."""
    named = isinstance(error, OSError) and error.strerror
    return f"{error.strerror}{f': {error.filename}' if error.filename else ''}" if named else str(error)


def _refuse(error, speaks):
    """The exit status of a command that is refused, once the rank that speaks has said why."""
    if speaks:  # in one line, whatever names of files and values from files hold
        print(f"error: {one_line(error)}", file=sys.stderr)
    else:
        time.sleep(2)  # torchrun stops all ranks when the first leaves: let rank 0 speak
    return 2


def _run(main):
    """The exit status of main()."""
    several = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    speaks = not several or os.environ["RANK"] == "0"
    try:
        main()
        print(end="", flush=True)
    except UserError as error:
        return _refuse(error, speaks or isinstance(error, LoneError))
    except Stopped as stopped:
        if speaks:
            print(f"\nstopped by {signal.Signals(stopped.number).name}{stopped.note}", file=sys.stderr)  # a bar may be open
        return 128 + stopped.number
    except BrokenPipeError:  # the reader of stdout went away (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # of the machine: a path too long, a folder that may not be read, a full disk behind stdout
        return _refuse(told(error), True)
    except (RuntimeError, MemoryError) as error:  # torch's OutOfMemoryError is a RuntimeError
        text = (str(error).strip() or "out of memory").splitlines()[0]
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
            advice = "lower --bsz (training), --eval_bsz (sampling), --bank_size or the size of the network"
            print(f"error: out of memory on rank {rank()}: {advice} ({text})", file=sys.stderr)
            return 2
        if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            advice = "it needs a C++ compiler and Python's headers, on a GPU Triton; or leave it out"
            return _refuse(f"--compile failed: {advice} ({text[:300]})", speaks)
        if text.startswith("Symlink loop"):
            return _refuse(text, speaks)
        if not several or not is_loss_of_a_rank(error):
            raise
        print(f"rank {rank()} leaves: it lost another rank, or waited too long for it ({text})", file=sys.stderr)
        return 1
    return 0


# -------------------------------------------------------------------------------------------------------- collectives


def parallel(model, static=False):
    """The model to train, in a DistributedDataParallel if there are ranks; `static`: a step is one pass, always the same."""
    if not dist.is_initialized():
        return model
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")  # of 1x1 convolutions in bfloat16
    options = {"broadcast_buffers": False, "gradient_as_bucket_view": True, "static_graph": static}
    return torch.nn.parallel.DistributedDataParallel(model, **options)


def accumulating(model):
    """Context in which backward() of a parallel() model leaves gradients to a later one to average."""
    return model.no_sync() if dist.is_initialized() else nullcontext()


def gather(value):
    """List of every rank's (picklable) value, on every rank."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def gather_rows(mine):
    """The rows (n, ...) of all ranks on rank 0, None on others; rank r gives the rows r, r + world_size, ...  On the CPU."""
    if not dist.is_initialized():
        return mine
    parts = [None] * world_size() if rank() == 0 else None
    dist.gather_object(mine, parts)
    if rank() == 0:
        rows = torch.empty(sum(map(len, parts)), *mine.shape[1:], dtype=mine.dtype)
        for r, part in enumerate(parts):
            rows[r :: world_size()] = part
        return rows


def agree(function):
    """function() on every rank; if it raised UserError or OSError on any, that error (of the lowest rank) on all of them."""
    result, message = None, None
    try:
        result = function()
    except (UserError, OSError) as error:
        message = told(error)
    for other in gather(message):
        if other is not None:
            raise UserError(other)
    return result


def on_first_rank(function):
    """function() on rank 0 alone while the others wait; its UserError is everybody's.  Returns its value to rank 0."""
    return agree(function if rank() == 0 else lambda: None)


def sum_over_ranks(tensor):
    """Elementwise sum of the ranks' tensors."""
    total = tensor.clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total
