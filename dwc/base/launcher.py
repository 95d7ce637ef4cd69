"""What `torchrun` tells each process of a run through its environment; a run of one process was told nothing.

No PyTorch is needed to know it. Joining the processes is `distributed`'s work.
"""

import os

__all__ = ["local_processes", "local_rank", "processes", "rank"]


def processes() -> int:
    """How many processes were started together, on all machines."""
    return _number("WORLD_SIZE", 1)


def rank() -> int:
    """Which of them this is, from 0."""
    return _number("RANK", 0)


def local_processes() -> int:
    """How many of them share this machine's cores and GPUs."""
    return _number("LOCAL_WORLD_SIZE", 1)


def local_rank() -> int:
    """Which of this machine's processes this is, from 0: the GPU it takes."""
    return _number("LOCAL_RANK", 0)


def _number(name: str, alone: int) -> int:
    return int(os.environ[name]) if "TORCHELASTIC_RUN_ID" in os.environ else alone
