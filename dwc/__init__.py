"""Distributed weight consolidation: train Bayesian segmentation networks apart, consolidate them once."""

from importlib.metadata import version

__version__ = version("dwc")

__all__ = ["__version__"]
