"""Errors, files, locks, processes, ranks and tables: the base of all other modules."""
