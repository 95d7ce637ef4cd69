"""What every part builds on: errors, files, locks, processes, ranks, tables."""
