"""x"""
from dataclasses import dataclass


@dataclass(frozen=True)
class SimulationSettings:
    """x

    Parameters
    ----------
    sites
        n
    """
    sites: int = 3
def simulate(s): pass
