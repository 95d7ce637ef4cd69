"""One run in many processes: which of `torchrun`'s ranks this one is, and what the ranks tell each other.

A run in one process never gets past the first line of each function here. Ranks share out work by position, exchange
plain JSON values, and average gradients in the order of the ranks, so that a run's bits are a function of its seed and
the number of ranks. The first rank writes and speaks for all. What is shared out is the caller's business.
"""

import contextlib
import json
import sys
import textwrap
from collections.abc import Iterator, Sequence
from datetime import timedelta
from inspect import signature
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from dwc.base import launcher
from dwc.base.errors import InputError

__all__ = [
    "barrier", "gather", "is_main", "joined", "mean", "merge", "rank", "replicate", "say_once", "share", "world_size",
]  # fmt: skip

_T = TypeVar("_T")
# Ranks wait for each other while a cohort is prepared; a rank that dies is noticed at once, by torchrun and by gloo.
_PATIENCE = timedelta(hours=12)
_A_MOMENT = timedelta(seconds=10)
_AT_MOST = 400  # characters of a library's error: its cause, not the stack below
_BUFFERS = "forward_sync_buffers"  # what newer versions of PyTorch call broadcast_buffers


def world_size() -> int:
    """Number of ranks; 1 outside of `ranks`."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process among them, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this is the rank that writes and shows progress."""
    return rank() == 0


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Join the other processes of this `torchrun` for as long as the context lasts; alone, do nothing.

    Gradients on GPUs travel by NCCL, everything else by gloo. GPU i belongs to the machine's process i.

    Raises
    ------
    InputError
        If another rank has ended before its work was done, or cannot be reached. A rank that ends tells why itself, see
        `say_once`; of a network or a full disk only the library's words tell, so the line carries them.
    """
    if launcher.processes() == 1 or dist.is_initialized():
        yield
        return
    has_gpu = torch.cuda.is_available() and launcher.local_rank() < torch.cuda.device_count()
    if has_gpu:
        torch.cuda.set_device(launcher.local_rank())
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if has_gpu else "gloo", timeout=_PATIENCE)
        yield
        barrier()  # what the first rank writes last is there before any rank returns
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or any(name in str(error) for name in ("gloo", "NCCL"))):
            raise
        raise InputError(
            "the processes of this run have lost each other; start it again, a training with --resume "
            f"({textwrap.shorten(str(error), _AT_MOST, placeholder=' ...')})"
        ) from error
    dist.destroy_process_group()  # after an error there is nobody left to agree on it with


def share(items: Sequence[_T]) -> list[_T]:
    """This rank's part of the items: every world_size-th, beginning at its rank."""
    return list(items[rank() :: world_size()])


def merge(parts: Sequence[Sequence[_T]]) -> list[_T]:
    """The items of which each rank has made its `share`, in their order again."""
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


def gather(value: Any) -> list[Any]:
    """Every rank's value, by rank; all ranks wait for the last.

    Parameters
    ----------
    value : JSON
        Numbers, strings, lists and dicts; NaN and infinity pass.
    """
    if world_size() == 1:
        return [value]
    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([len(content)]))
    padded = torch.zeros(max(map(int, sizes)), dtype=torch.uint8)
    padded[: len(content)] = content
    contents = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(contents, padded)
    return [json.loads(content[: int(size)].numpy().tobytes()) for content, size in zip(contents, sizes, strict=True)]


def barrier() -> None:
    """Wait until every rank has come here."""
    gather(None)


def mean(values: Sequence[float]) -> list[float]:
    """The mean over the ranks of each number, the same bits on every rank."""
    rows = gather(list(values))
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)] if len(rows) > 1 else rows[0]


def replicate(network: nn.Module) -> nn.Module:
    """The network whose backward leaves the mean of the ranks' gradients in `network`'s parameters.

    Hold on to it: gradients are exchanged for as long as it lives. Buffers, such as priors, are the same everywhere
    from the start and are not sent again with each step.
    """
    if world_size() == 1:
        return network
    buffers = _BUFFERS if _BUFFERS in signature(DistributedDataParallel).parameters else "broadcast_buffers"
    options: dict[str, Any] = {buffers: False}
    replica = DistributedDataParallel(network, **options)
    replica.register_comm_hook(None, _mean_in_order)
    return replica


# DDP checks the hook's annotations, and dist.GradBucket is not in every build.
def _mean_in_order(state: None, bucket) -> torch.futures.Future[Tensor]:  # type: ignore[no-untyped-def]
    """Add a bucket's gradients up in the order of the ranks.

    An all-reduce of three ranks or more adds in an order that depends on an element's place in its bucket, and buckets
    are laid out anew after the first step: a resumed run would end in other bits than one that was never stopped.
    """
    gradient = bucket.buffer()
    parts = gradient.new_empty(world_size() * len(gradient))

    def add_up(_: torch.futures.Future) -> Tensor:
        first, *others = parts.view(world_size(), -1)
        for part in others:
            first += part
        return gradient.copy_(first).div_(world_size())

    return dist.all_gather_into_tensor(parts, gradient, async_op=True).get_future().then(add_up)


def say_once(line: str) -> None:
    """Print a line on stderr, from whichever rank has something to say first: an error's cause, not its echoes."""
    store = None
    if launcher.processes() > 1:
        with contextlib.suppress(RuntimeError):  # from the store: better said twice than not at all
            store, _, _ = next(iter(rendezvous("env://", timeout=_A_MOMENT)))
            if store.add("dwc/speakers", 1) > 1:
                store.wait(["dwc/said"], _A_MOMENT)  # the launcher ends all ranks when one has ended
                return
    # The first rank may be drawing its progress bar: others begin a line of their own.
    print(f"\n{line}" if launcher.rank() else line, file=sys.stderr, flush=True)
    if store is not None:
        store.set("dwc/said", "")
