"""The ranks that `torchrun` gives each process through its environment, read without PyTorch."""

import os

__all__ = ["local_processes", "local_rank", "processes", "rank"]


def processes() -> int:
    """Number of processes started together, on all machines."""
    return _number("WORLD_SIZE", 1)


def rank() -> int:
    """This process's rank among all processes."""
    return _number("RANK", 0)


def local_processes() -> int:
    """Number of processes on this machine, which share its cores and GPUs."""
    return _number("LOCAL_WORLD_SIZE", 1)


def local_rank() -> int:
    """This process's rank on this machine, which is the index of its GPU."""
    return _number("LOCAL_RANK", 0)


def _number(name: str, alone: int) -> int:
    return int(os.environ[name]) if "TORCHELASTIC_RUN_ID" in os.environ else alone
