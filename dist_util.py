"""Running on one process or many: under torchrun (NCCL on GPUs, gloo on CPUs), or with plain `python`.

Every function works in both cases; without torchrun there is one rank, number 0.
"""

import datetime
import os
import sys
import time
from contextlib import contextmanager

import torch
import torch.distributed as dist


class UserError(Exception):
    """A mistake of the user's, met by all ranks together; its text says what is wrong and how to mend it, in one line."""


class LoneError(UserError):
    """One that this rank met by itself, while the others are at work."""


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
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=30))
    try:
        yield device
        gather(None)  # leave together: a rank that closes its connections early can bring the others down
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def launch(main):
    """Run a script's main() and leave; a UserError becomes one line, from one rank, and exit status 2."""
    status = _run(main)
    if "RANK" in os.environ:
        # Threads of torch that outlive the process group may want the interpreter's lock while it is being torn down, which
        # aborts the process, and with it the job: one run of two ranks in sixty.  So it is not torn down.
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
    except KeyboardInterrupt:
        if rank() == 0:
            print("stopped", file=sys.stderr, flush=True)
        return 130
    except BrokenPipeError:  # the reader of stdout went away (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
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


def average_gradients(parameters):
    """Replace each gradient by its mean over the ranks, in one message."""
    if world_size() == 1:
        return
    grads = [p.grad for p in parameters]
    flat = sum_over_ranks(torch.cat([g.flatten() for g in grads])) / world_size()
    torch._foreach_copy_(grads, [f.view_as(g) for f, g in zip(flat.split([g.numel() for g in grads]), grads)])
