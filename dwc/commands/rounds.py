"""`dwc consolidate --state`: a round on the same scans, in which each site's new factor replaces its old one."""

from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from dwc.base.errors import InputError, printable

if TYPE_CHECKING:
    from dwc.site_factors import Factors

__all__ = ["add_flags", "take_round"]

_OF_ONE_ROUND = {"temper": 1.0, "max_influence": None, "leave_one_out": False, "data": None}  # not for factors


def add_flags(parser: ArgumentParser) -> None:
    """The flags of rounds on the same scans."""
    parser.add_argument(
        "--state", type=Path | None, default=None,
        help="rounds on the same scans: file of the sites' factors, created if missing. Each site is known by the name "
        "of its file, trains from its own cavity, and its new factor replaces its old one",
    )  # fmt: skip
    parser.add_argument(
        "--damping", type=float | None, default=None,
        help="with --state: share of a new factor, above 0 and at most 1; default 1/S for the S sites given",
    )  # fmt: skip
    parser.add_argument(
        "--cavities", type=Path | None, default=None,
        help="with --state: folder for each site's next prior, <site>.safetensors",
    )  # fmt: skip


def take_round(values: Namespace) -> None:
    """Replace the factors of the sites that answered, take out others, and write network, cavities and state.

    The state is written last: a killed command is repeated with the same files.
    """
    from dwc.base.files import check_suffix, open_folder
    from dwc.posterior import Posterior
    from dwc.signing import TrustedKeys
    from dwc.site_factors import Factors

    for name, default in _OF_ONE_ROUND.items():
        if values[name] != default:
            raise InputError(f"`{name}` {values[name]}: is for a consolidation without `state`; leave it out")
    out, state = check_suffix(values.out), check_suffix(values.state)
    if out.resolve() == state.resolve():
        raise InputError(f"`out` {out}: is the `state` file; give another")
    prior = Posterior.load(values.prior)
    factors = Factors.load(state, prior) if state.exists() else Factors(prior)
    trusted = TrustedKeys(values.trusted) if values.trusted else None
    answers = _by_name(values.sites)
    damping = 1 / len(answers) if values.damping is None else values.damping
    cavities = {cavity.sha256: cavity for cavity in map(Posterior.load, values.earlier)}
    now = {name: factors.cavity(name) for name in answers}  # before the first factor is replaced
    for name, path in answers.items():
        site = Posterior.load(path)
        if trusted:
            trusted.require(site, name)
        cavity = cavities.get(str(site.metadata.get("prior_sha256")), now[name])
        factors.replace(name, site, cavity=cavity, damping=damping)
    for path in values.without:
        factors.remove(path.stem)
    network = factors.posterior(str(out))
    if values.cavities:
        open_folder(values.cavities)
        for name in factors.sites:
            factors.cavity(name).save(values.cavities / f"{name}.safetensors")
    network.save(out)
    factors.save(state)
    _report(out, factors, damping)


def _by_name(paths: list[Path]) -> dict[str, Path]:
    """The sites' files by the sites' names."""
    found: dict[str, Path] = {}
    for path in paths:
        if found.setdefault(path.stem, path) != path:
            raise InputError(f"{path}: has the site's name of {found[path.stem]}; name each file as its site")
    return found


def _report(out: Path, factors: "Factors", damping: float) -> None:
    network = factors.posterior()
    print(f"damping {damping:.3g}; share of the precision that all factors add:")
    for name, share in factors.shares().items():
        print(printable(f"  {name:<20}{share:>7.1%}"))
    n_volumes = network.metadata.get("n_volumes")
    print(f"{out}  ({len(factors.sites)} sites, {n_volumes} volumes, sha256 {network.sha256[:12]})")
