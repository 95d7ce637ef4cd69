"""Measures of a segmentation and of how two networks compare; no networks, files or pictures."""
