"""What ends a command in one line: input that a person can mend (exit code 2), or a signal (128 plus its number)."""

__all__ = ["InputError", "Interrupted", "brief", "one_line", "printable"]


class InputError(ValueError):
    """Bad input, named in one line: the file or setting, what is wrong with it, and the remedy.

    What is not printable in the message, such as a control character in a file's name, becomes a question mark.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class Interrupted(Exception):
    """A signal ended a run at a whole step, with its state on disk: where it stands, and how to go on."""

    def __init__(self, signal_number: int, stopped: str, remedy: str) -> None:
        super().__init__(f"{stopped}; {remedy}")
        self.signal_number, self.stopped = signal_number, stopped


def brief(value: object) -> str:
    """A header's entry, short enough for a line of an error."""
    return ", ".join(f"{key} {str(part)[:20]}" for key, part in value.items()) if isinstance(value, dict) else "missing"


def printable(text: str) -> str:
    """Text for a terminal or a log, without control characters."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def one_line(text: str) -> str:
    """What others may have written, fit for a terminal and a log: printable, and no more than 400 characters."""
    return printable(text[:400])
