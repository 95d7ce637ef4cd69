"""The names of subjects: in paths, and in the spellings of one name."""

import re
import unicodedata
from pathlib import Path

__all__ = ["plain_name", "subject_of"]

_PUNCTUATION = r"(?<!\d)[\W_]+|[\W_]+(?!\d)"  # but for what keeps two numbers apart


def subject_of(image: Path) -> str | None:
    """`sub-...` in the path of an image."""
    for part in reversed(image.parts):
        if part.startswith("sub-"):
            return part.split("_")[0].split(".")[0]
    return None


def plain_name(subject: str) -> str:
    """A subject's name without what spreadsheets, tools and keyboards add or lose.

    These are case, other code points for the same letters, invisible characters, the prefix sub or subject, punctuation
    between words, zeros in front of numbers and `.0` behind one.
    """
    plain = unicodedata.normalize("NFKC", subject)
    plain = "".join(letter for letter in plain if unicodedata.category(letter) != "Cf").strip().casefold()
    plain = re.sub(r"^(subject|subj|sub)(?=[\W_]|\d)[\W_]*(?=\w)", "", re.sub(r"(?<=\d)\.0+$", "", plain))
    plain = re.sub(r"(?<=\d)[\W_]+(?=\d)", " ", re.sub(_PUNCTUATION, "", plain))
    return re.sub(r"(?<!\d)0+(?=\d)", "", plain) or subject
