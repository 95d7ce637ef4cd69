"""Data: from a list of scans on disk to sub-volumes for a network, and simulated sites for trying it all out."""
