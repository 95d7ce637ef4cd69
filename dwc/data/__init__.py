"""Data: from scans on disk to sub-volumes for a network."""
