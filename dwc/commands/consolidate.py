"""`dwc consolidate`: sites' posterior files and their prior in, one posterior file out."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from dwc.commands.arguments import new_parser, parse
from dwc.consolidation import Consolidation, LayerWeight
from dwc.files import check_suffix
from dwc.posterior import Posterior

__all__ = ["main"]


def main(arguments: Sequence[str]) -> None:
    """Consolidate the given files, one in memory at a time, and print each site's weight per layer.

    Raises
    ------
    InputError
        If an argument or a file is wrong.
    """
    parser = new_parser("consolidate", "Consolidate the posteriors of several sites, trained from one prior (Eq. 17).")
    parser.add_argument("sites", type=Path, nargs="+", help="posterior.safetensors of each site")
    parser.add_argument("--prior", type=Path, required=True, help="the posterior that every site started from")
    parser.add_argument("--out", type=Path, required=True, help="file to write, .safetensors")
    values = parse(parser, arguments)
    out = check_suffix(values.out)
    consolidation = Consolidation(Posterior.load(values.prior))
    for path in values.sites:
        consolidation.add(Posterior.load(path))
    posterior = consolidation.posterior(str(out))
    posterior.save(out)
    print(table(consolidation.report()))
    print(
        f"{out}  ({len(values.sites)} sites, {posterior.metadata['n_volumes']} volumes, sha256 {posterior.sha256[:12]})"
    )


def table(rows: Iterable[LayerWeight]) -> str:
    """The report for people, a line per layer and site."""
    lines = [
        "weight: with which a site's means enter; 1/S each averages the sites, 1 each adds up their shifts",
        f"{'layer':<20}{'weight':>8}{'added':>8}{'sigma/sigma_0':>15}{'|shift|/sigma_0':>17}  site",
    ]
    for row in sorted(rows, key=lambda row: row.layer):
        numbers = f"{row.weight:>8.3f}{row.added_share:>8.3f}{row.sigma_ratio:>15.4f}{row.shift:>17.3f}"
        lines.append(f"{row.layer:<20}{numbers}  {row.site}")
    return "\n".join(lines)
