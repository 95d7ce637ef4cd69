"""Measures of a segmentation and comparisons of two networks."""
