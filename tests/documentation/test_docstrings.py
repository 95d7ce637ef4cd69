"""Docstrings of what is public name every parameter, in numpydoc, so that the reference is complete."""

import re

import pytest

import dwc
import dwc_kernels

griffe = pytest.importorskip("griffe")
PUBLIC = [
    f"{package.__name__}.{name}" for package in (dwc, dwc_kernels) for name in package.__all__ if name != "__version__"
]
# A docstring may refer to another one, or to torch's, whose parameters it takes.
_REFERS = re.compile(r"[Aa]s `FFGConv3d[\w.]*`|as `FFGConv3d\.\w+`|`ffg_conv3d`")


@pytest.fixture(scope="module")
def packages():
    return {name: griffe.load(name, resolve_aliases=True) for name in ("dwc_kernels", "dwc")}


@pytest.mark.parametrize("path", PUBLIC)
def test_every_parameter_of_a_public_name_is_in_its_docstring(path, packages):
    package, name = path.split(".")
    found = packages[package][name]
    for documented, signature in _callables(found.final_target if found.is_alias else found):
        assert documented.docstring, documented.path
        text = _with_inherited(documented)
        names = [parameter.name for parameter in signature.parameters if parameter.name not in ("self", "cls")]
        missing = [] if _REFERS.search(text) else [name for name in names if not re.search(rf"\b{name}\b", text)]
        assert not missing, documented.path


@pytest.mark.parametrize("path", PUBLIC)
def test_a_parameters_section_names_only_parameters(path, packages):
    package, name = path.split(".")
    found = packages[package][name]
    for documented, signature in _callables(found.final_target if found.is_alias else found):
        known = {parameter.name.lstrip("*") for parameter in signature.parameters}
        for section in documented.docstring.parse("numpy"):
            if section.kind is griffe.DocstringSectionKind.parameters:
                assert {entry.name.lstrip("*") for entry in section.value} <= known, documented.path


def _callables(found):
    """A function, or a class with its constructor's signature and its public methods, each with its signature."""
    if not found.is_class:
        yield found, found
        return
    constructor = found.members.get("__init__")
    if constructor is not None and not constructor.is_alias:
        yield found, constructor
    for member in found.members.values():
        if not member.is_alias and member.is_function and not member.name.startswith("_"):
            yield member, member


def _with_inherited(documented):
    """The docstring, with those of the settings that a settings class inherits fields from."""
    bases = [base for base in documented.mro() if base.docstring] if documented.is_class else []
    return "\n".join(part.docstring.value for part in (documented, *bases))
