"""Render the pages of all reports: one look, and nothing asked for from elsewhere.

Templates escape what they print. A page runs the scripts that came with dwc and no other (Content-Security-Policy),
so that text from a file, such as a scan's name, cannot run either.
"""

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dwc import __version__

__all__ = ["data_address", "is_ours", "render"]

_MARK = '<meta name="generator" content="dwc">'  # by which a page of an earlier report is known


def render(template: str, *, scripts: Sequence[str] = (), viewer: str | None = None, **shown: Any) -> bytes:
    """A page from a file of templates/, with `scripts` of that folder inside; `viewer` is the address of NiiVue."""
    environment = _environment()
    texts = [_text(name) for name in scripts]
    page = environment.get_template(template).render(
        style=_text("style.css"), scripts=texts, viewer=viewer, policy=_policy(texts, viewer), mark=Markup(_MARK),
        version=__version__, **shown,
    )  # fmt: skip
    return page.encode()


def data_address(content: bytes, kind: str) -> str:
    """The content of a picture as an address that a page can hold; `kind` is png, webp and so on."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def is_ours(path: Path) -> bool:
    """Whether a page was rendered here."""
    return _MARK in path.read_text(encoding="utf-8", errors="replace")[:4000]


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("dwc.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip


def _text(name: str) -> Markup:
    """A file of templates/ as it is; it is part of dwc."""
    environment = _environment()
    assert environment.loader is not None
    return Markup(environment.loader.get_source(environment, name)[0])


def _policy(scripts: Sequence[str], viewer: str | None) -> str:
    """What the page may load: pictures and styles in it, and these scripts by their digests."""
    allowed = [f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in scripts]
    rules = {
        "default-src": ["'none'"],
        "img-src": ["data:"],
        "style-src": ["'unsafe-inline'"],
        "script-src": allowed or ["'none'"],
        "base-uri": ["'none'"],
        "form-action": ["'none'"],
    }
    if viewer:
        rules["script-src"] = [*allowed, "'self'"]
        rules["connect-src"] = ["data:"]  # NiiVue's own fonts
    return "; ".join(f"{name} {' '.join(values)}" for name, values in rules.items())
