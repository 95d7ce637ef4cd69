"""Distributed weight consolidation: train Bayesian segmentation networks apart, consolidate them once."""

from dwc_kernels.version import __version__

__all__ = ["__version__"]
