"""Errors that end a command with one line.

Bad input has exit code 2, work of which a part failed 1, a signal 128 plus its number.
"""

__all__ = ["InputError", "Interrupted", "PartlyFailed", "brief", "one_line", "printable"]


class InputError(ValueError):
    """Bad input, in one line: the file or parameter, what is wrong with it, and the remedy.

    Unprintable characters in the message, for example in a file name, become question marks.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class PartlyFailed(Exception):
    """A command has done what it could; the message says how much failed and where the reasons are."""


class Interrupted(Exception):
    """A signal ended a run after a complete step, with its state on disk; the message says how to resume."""

    def __init__(self, signal_number: int, stopped: str, remedy: str) -> None:
        super().__init__(f"{stopped}; {remedy}")
        self.signal_number, self.stopped = signal_number, stopped


def brief(value: object) -> str:
    """A header entry, shortened for an error message."""
    return ", ".join(f"{key} {str(part)[:20]}" for key, part in value.items()) if isinstance(value, dict) else "missing"


def printable(text: str) -> str:
    """The text with control characters replaced by question marks."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def one_line(text: str) -> str:
    """Untrusted text for a terminal or log: printable, at most 400 characters."""
    return printable(text[:400])
