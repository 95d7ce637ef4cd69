"""What ends a command in one line: input that a person can mend (exit code 2), or a signal (128 plus its number)."""

__all__ = ["InputError", "Interrupted", "brief"]


class InputError(ValueError):
    """Bad input, named in one line: the file or setting, what is wrong with it, and the remedy."""


class Interrupted(Exception):
    """A signal ended a run after a whole step; its checkpoint is on disk and the message says how to resume."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.signal_number = signal_number


def brief(value: object) -> str:
    """A header's entry, short enough for a line of an error."""
    return ", ".join(f"{key} {str(part)[:20]}" for key, part in value.items()) if isinstance(value, dict) else "missing"
