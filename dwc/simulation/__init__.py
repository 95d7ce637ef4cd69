"""Simulated heads and scans; nothing in training imports it."""
