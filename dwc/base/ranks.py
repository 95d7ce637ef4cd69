"""One run in many processes started by `torchrun`: share work, gather values and average gradients.

Ranks share work by position, exchange JSON values, and average gradients in rank order, so that the result depends
only on the seed and the number of ranks. With one process, all of this does nothing.
"""

import contextlib
import gc
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
# Preparing a cohort can take hours; torchrun and gloo notice at once if a rank dies.
_TIMEOUT = timedelta(hours=12)
_SHORT_TIMEOUT = timedelta(seconds=10)
_MAX_CAUSE = 400  # characters of a library's error, without the stack trace that follows
_BUFFERS = "forward_sync_buffers"  # what newer versions of PyTorch call broadcast_buffers


def world_size() -> int:
    """Number of ranks; 1 outside `joined`."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank; 0 outside `joined`."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this is rank 0, which writes files and shows progress."""
    return rank() == 0


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Join the other processes of this `torchrun` within the context; does nothing in a single process.

    Gradients on GPUs use NCCL, everything else gloo; local rank i uses GPU i. If another rank ends early or cannot be
    reached, raises InputError with the library's message; the rank that failed reports its own cause, see `say_once`.
    """
    if launcher.processes() == 1 or dist.is_initialized():
        yield
        return
    has_gpu = torch.cuda.is_available() and launcher.local_rank() < torch.cuda.device_count()
    if has_gpu:
        torch.cuda.set_device(launcher.local_rank())
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if has_gpu else "gloo", timeout=_TIMEOUT)
        yield
        barrier()  # no rank returns before rank 0 has finished writing
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or any(name in str(error) for name in ("gloo", "NCCL"))):
            raise
        raise InputError(
            "the processes of this run have lost contact; start it again, with `resume` if it is a training run "
            f"({textwrap.shorten(str(error), _MAX_CAUSE, placeholder=' ...')})"
        ) from error
    gc.collect()  # replicas left in reference cycles end before the group that their threads use
    dist.destroy_process_group()  # not after an error, when other ranks may be gone


def share(items: Sequence[_T]) -> list[_T]:
    """This rank's items: every world_size-th, starting at its rank."""
    return list(items[rank() :: world_size()])


def merge(parts: Sequence[Sequence[_T]]) -> list[_T]:
    """The inverse of `share`: all ranks' parts as one list in the original order."""
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


def gather(value: Any) -> list[Any]:
    """Every rank's JSON value (NaN and infinity allowed), by rank; all ranks wait for the last."""
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
    """Wait until every rank gets here."""
    gather(None)


def mean(values: Sequence[float]) -> list[float]:
    """Mean of each number over the ranks, bitwise equal on every rank."""
    rows = gather(list(values))
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)] if len(rows) > 1 else rows[0]


def replicate(network: nn.Module) -> nn.Module:
    """A wrapper of the network whose backward leaves the mean of the ranks' gradients in `network`'s parameters.

    Keep a reference to it: gradients are exchanged only while it exists. Buffers, such as priors, are equal on all
    ranks and not sent.
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
    """Sum a bucket's gradients in rank order.

    With three ranks or more, an all-reduce sums in an order that depends on an element's position in its bucket, and
    buckets change after the first step, so that a resumed run would not give the same bits.
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
    """Print a line on stderr, on the first rank that calls this only, so that an error is reported once."""
    store = None
    if launcher.processes() > 1:
        with contextlib.suppress(RuntimeError):  # no store: print twice rather than not at all
            store, _, _ = next(iter(rendezvous("env://", timeout=_SHORT_TIMEOUT)))
            if store.add("dwc/speakers", 1) > 1:
                store.wait(["dwc/said"], _SHORT_TIMEOUT)  # the launcher ends all ranks once one has ended
                return
    # Rank 0 may be drawing its progress bar, so other ranks start a new line.
    print(f"\n{line}" if launcher.rank() else line, file=sys.stderr, flush=True)
    if store is not None:
        store.set("dwc/said", "")
