"""Time work on a GPU apart from the host that launches it: CUDA graphs for the one, a clock for the other."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

__all__ = ["capture_stream", "captured", "device_times", "host_time", "l2_bandwidth"]

WARMUP = 3  # calls before a capture: they compile, plan and fill the allocator
L2_MIB = 8  # of the buffer whose copy stays within L2


@contextlib.contextmanager
def capture_stream() -> Iterator[None]:
    """Run in the stream in which `captured` captures: a backward belongs to the stream of its forward."""
    graph = torch.cuda.graph
    if graph.default_capture_stream is None:
        graph.default_capture_stream = torch.cuda.Stream()
    graph.default_capture_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(graph.default_capture_stream):
        yield
    torch.cuda.current_stream().wait_stream(graph.default_capture_stream)


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """A function that replays the call as a CUDA graph, so that the host launches once."""
    with capture_stream():
        for _ in range(WARMUP):
            call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def device_times(call: Callable[[], Any], repeats: int) -> list[float]:
    """Milliseconds of each replay of the call, by the GPU's own events."""
    replay = captured(call)
    replay()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return times


def host_time(call: Callable[[], Any], repeats: int) -> float:
    """Median milliseconds until the call returns, with the GPU idle before it: what the host does for one call."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    torch.cuda.synchronize()
    return statistics.median(times)


def l2_bandwidth(device: str, copies: int = 50) -> float:
    """Bytes per second that L2 was measured to move: reads and writes of copies that stay within it."""
    source = torch.zeros(L2_MIB << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        for _ in range(copies):
            target.copy_(source)

    return 2 * source.numel() * copies / (1e-3 * statistics.median(device_times(copy, 10)))
