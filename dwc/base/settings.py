"""The base of all settings: frozen dataclasses that check types and values when they are made.

One declaration serves Python callers, YAML files, flags and help. Anything that depends on files (a prior, a manifest)
is resolved later.
"""

import os
import re
import types
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cache, reduce
from numbers import Integral, Real
from operator import or_
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from dwc.base.errors import InputError

__all__ = ["Settings"]

_S = TypeVar("_S", bound="Settings")


@dataclass(frozen=True)
class Settings:
    """Base of settings dataclasses; types are checked when an object is made.

    numpy integers and floats are accepted, strings become absolute paths where a path is expected, lists become tuples
    and mappings nested settings; NaN and infinity are refused. A subclass that restricts values extends
    ``__post_init__``.
    """

    def __post_init__(self) -> None:
        # Trust default numbers and strings, so that help, which shows them, does not import pydantic.
        trusted = {each.name: each.default for each in fields(self) if isinstance(each.default, int | float | str)}
        given = [each.name for each in fields(self) if getattr(self, each.name) is not trusted.get(each.name, MISSING)]
        if not given:
            return
        from pydantic import ValidationError

        cls: Any = type(self)
        adapters = _adapters(cls)
        for name in given:
            value = _nested(name, cls, getattr(self, name))
            try:
                parsed = adapters[name].validate_python(value)
            except ValidationError as error:
                raise InputError(f"`{name}` {value!r}: {_reason(error)}") from error
            object.__setattr__(self, name, parsed)

    def _require(self, name: str, met: bool, remedy: str) -> None:
        """Refuse the value of a setting unless a condition is met; `name` may be dotted."""
        if not met:
            value: Any = self
            for part in name.split("."):
                value = value[part] if isinstance(value, Mapping) else getattr(value, part)
            shown = list(value) if isinstance(value, tuple) else value
            raise InputError(f"`{name}` {shown}: {remedy}")

    def _require_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            self._require(name, value is None or value > 0, "give a positive number")

    @classmethod
    def check_type(cls: type[_S], value: Any, name: str) -> _S:
        """Return the value if it is settings of this class, for functions that take them."""
        if not isinstance(value, cls):
            raise InputError(f"`{name}` {value!r}: give {cls.__name__}(...)")
        return value

    def to_json(self) -> dict[str, Any]:
        """The settings as plain values, from which they can be made again."""
        return {name: _plain(value) for name, value in asdict(self).items()}


def _nested(name: str, cls: Any, value: Any) -> Any:
    """A mapping as nested settings; errors give the full name, such as `map.lr`."""
    hint = get_type_hints(cls)[name] if isinstance(value, Mapping) else None
    kinds = [kind for kind in (hint, *get_args(hint)) if isinstance(kind, type) and issubclass(kind, Settings)]
    if not kinds:
        return value
    names = {each.name for each in fields(kinds[0])}
    if odd := sorted(value.keys() - names, key=str):
        raise InputError(f"`{name}.{odd[0]}`: there is no such setting; the settings are {', '.join(sorted(names))}")
    try:
        return kinds[0](**value)
    except InputError as error:
        raise InputError(re.sub(rf"`({'|'.join(names)})\b", rf"`{name}.\1", str(error))) from error


@cache
def _adapters(cls: Any) -> dict[str, Any]:
    from pydantic import ConfigDict, TypeAdapter

    config = ConfigDict(strict=True, arbitrary_types_allowed=True)
    hints = get_type_hints(cls)
    return {field.name: TypeAdapter(_strict(hints[field.name]), config=None if _is_model(hints[field.name]) else config)
            for field in fields(cls)}  # fmt: skip


def _is_model(hint: Any) -> bool:
    """Whether pydantic accepts no configuration for a type, as for dataclasses, which check themselves."""
    return isinstance(hint, type) and hasattr(hint, "__dataclass_fields__")


def _strict(hint: Any) -> Any:
    """The type with pydantic's checks added."""
    from pydantic import BeforeValidator, Field, InstanceOf, Strict

    arguments: Any = tuple(_strict(argument) if argument is not ... else ... for argument in get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        return reduce(or_, arguments)
    if get_origin(hint) is tuple:
        return Annotated[types.GenericAlias(tuple, arguments), BeforeValidator(_ordered), Strict(False)]
    if get_origin(hint) in (list, dict):
        return types.GenericAlias(get_origin(hint), arguments)
    if _is_model(hint):
        return InstanceOf[hint]  # type: ignore[misc]
    if hint is int:
        return Annotated[int, BeforeValidator(_number(int, Integral))]
    if hint is float:
        return Annotated[float, BeforeValidator(_number(float, Real)), Field(allow_inf_nan=False)]
    if hint is Path:
        return Annotated[Path, BeforeValidator(_path), Strict(False)]
    return hint


def _number(cls: type, kind: type) -> Any:
    def parse(value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, kind):
            return value
        try:
            return cls(value)
        except OverflowError as error:
            raise ValueError("too large") from error

    return parse


def _ordered(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else None  # a set has no order


def _path(value: Any) -> Any:
    return Path(os.path.abspath(os.path.expanduser(value))) if isinstance(value, str | Path) else value


def _reason(error: Any) -> str:
    """What pydantic expected, in a few words; for a union, its first member."""
    first = error.errors(include_url=False)[0]
    if first["type"] == "value_error":
        return "is too large"
    text = first["msg"].removeprefix("Input should be ")
    if first["type"] == "is_instance_of":
        text = "its settings, as a mapping"
    return f"give {_PLAIN_WORDS.get(text, text)}"


_PLAIN_WORDS = {
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid string": "text",
    "a valid boolean": "True or False",
    "a valid tuple": "a list",
    "a valid list": "a list",
    "a valid dictionary": "a mapping",
    "Input is not a path for <class 'pathlib.Path'>": "a path",
    "Input is not a valid path for <class 'pathlib.Path'>": "a path",
}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    return value
