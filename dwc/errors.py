"""The one error for input that a person can mend: commands print it as one line and leave with exit code 2."""

__all__ = ["InputError"]


class InputError(ValueError):
    """Bad input, named in one line: the file or setting, what is wrong with it, and the remedy."""
