"""Errors that end a command with one line.

Bad input has exit code 2, work of which a part failed 1, a signal 128 plus its number.
"""

__all__ = ["InputError", "Interrupted", "PartlyFailed", "difference", "one_line", "printable"]


class InputError(ValueError):
    """Bad input, in one line: the file or parameter, what is wrong with it, and the remedy.

    Unprintable characters in the message, for example in a file name, become question marks.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class PartlyFailed(Exception):
    """A command has done what it could; the message says how much failed and where the reasons are."""


class Interrupted(Exception):
    """A signal ended a run after a complete step, with its state on disk; the message says how to resume.

    Attributes
    ----------
    signal_number : int
        As in `signal`; the exit code of a command is 128 plus it.
    stopped : str
        What was stopped, and where its state is. The message is this and the `remedy`.
    """

    def __init__(self, signal_number: int, stopped: str, remedy: str) -> None:
        super().__init__(f"{stopped}; {remedy}")
        self.signal_number, self.stopped = signal_number, stopped


def difference(theirs: object, ours: object) -> tuple[str, str]:
    """Two header entries for an error message: what differs in them, and their names, shortened."""
    both = [entry if isinstance(entry, dict) else {} for entry in (theirs, ours)]
    keys = [key for key in {**both[1], **both[0]} if key == "name" or both[0].get(key) != both[1].get(key)]
    first, second = (", ".join(f"{key} {str(entry.get(key, 'missing'))[:40]}" for key in keys) for entry in both)
    return first if both[0] else "missing", second if both[1] else "missing"


def printable(text: str) -> str:
    """The text with control characters replaced by question marks."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def one_line(text: str) -> str:
    """Untrusted text for a terminal or log: printable, at most 400 characters."""
    return printable(text[:400])
