"""What `dwc consolidate` says about the sites' influence: a verdict on each, then what to check before going on."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from dwc.base.errors import printable
from dwc.commands.arguments import in_flags

if TYPE_CHECKING:
    from dwc.influence import Influence

__all__ = ["print_verdicts", "warn"]


def print_verdicts(influences: "Mapping[str, Influence]", powers: Sequence[float], max_influence: float | None) -> None:
    """Print a line for each site, and warnings on the standard error."""
    from dwc.influence import MIN_SITES, verdicts

    for name, verdict in verdicts(influences).items():
        print(printable(f"{name}: {verdict}"))
    if max_influence is not None and len(influences) < MIN_SITES:
        warn([f"{len(influences)} sites have no median to be compared with: nobody's influence is limited"])
    warn(_doubts(influences, powers))


def warn(lines: Iterable[str]) -> None:
    """Print warnings, one line each."""
    for line in lines:
        print(printable(f"dwc: warning: {in_flags(line)}"), file=sys.stderr)


def _doubts(influences: "Mapping[str, Influence]", powers: Sequence[float]) -> Iterator[str]:
    """What to check before using the result, one line each."""
    from dwc.influence import limited_because, warnings_about

    warnings = warnings_about(influences)
    reasons = limited_because(list(influences.values()), powers)
    for site, power, reason in zip(influences, powers, reasons, strict=True):
        yield from (f"{site}: {line}" for line in warnings.get(site, ()))
        if power == 0:
            yield f"{site}: is left out, its influence is far above the limit: {reason}"
        elif power < 1:
            yield f"{site}: enters with power {power:.3g}, its influence is above the limit: {reason}"
