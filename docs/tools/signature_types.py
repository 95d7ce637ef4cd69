"""Show parameters with the types and defaults of the signature.

Where a docstring documents several parameters in one entry, the parser gives all of them those of the first.
"""

from typing import Any

import griffe


class SignatureTypes(griffe.Extension):
    """Correct the parsed docstrings of a package's functions and constructors."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Walk the package once it is loaded."""
        self._correct(pkg)

    def _correct(self, owner: griffe.Object) -> None:
        for member in owner.members.values():
            if member.is_alias:
                continue
            if member.is_class or member.is_module:
                self._correct(member)
            constructor = member.members.get("__init__") if member.is_class else member
            if isinstance(constructor, griffe.Function) and member.docstring is not None:
                parameters = {parameter.name: parameter for parameter in constructor.parameters}
                member.docstring.parser = griffe.Parser.numpy
                for section in member.docstring.parsed:  # kept, and rendered later
                    if section.kind is griffe.DocstringSectionKind.parameters:
                        for entry in section.value:
                            if entry.name in parameters:
                                entry.annotation = parameters[entry.name].annotation
                                entry.value = parameters[entry.name].default
