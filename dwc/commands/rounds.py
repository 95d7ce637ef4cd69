"""`dwc consolidate --state`: a round on the same scans, in which each site's new factor replaces its old one."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from jsonargparse import ArgumentParser, Namespace

from dwc.base.errors import InputError, printable
from dwc.commands.judging import print_verdicts, warn

if TYPE_CHECKING:
    from dwc.damping import Chosen
    from dwc.posterior import Posterior
    from dwc.signing import TrustedKeys
    from dwc.site_factors import Factors

    Judge: TypeAlias = Callable[[Posterior, Callable[[float], Factors], Sequence[float]], Chosen]

__all__ = ["add_flags", "take_round"]


def add_flags(parser: ArgumentParser) -> None:
    """The flags of rounds on the same scans."""
    parser.add_argument(
        "--state", type=Path | None, default=None,
        help="rounds on the same scans: file of the sites' factors, created if missing. Each site is known by the name "
        "of its file, trains from its own cavity, and its new factor replaces its old one",
    )  # fmt: skip
    parser.add_argument(
        "--damping", type=float | Literal["auto"] | None, default=None,
        help="with --state: share of a new factor, above 0 and at most 1; default 1/S for the S sites given; auto: "
        "doubled from there while the organization's held-out scans get more likely, see --data",
    )  # fmt: skip
    parser.add_argument(
        "--cavities", type=Path | None, default=None,
        help="with --state: new folder for each site's next prior, <site>.safetensors; keep those of past rounds, "
        "which are the --earlier ones of sites that answer late",
    )  # fmt: skip


def take_round(values: Namespace) -> None:
    """Replace the factors of the sites that answered, take out others, and write network, cavities and state.

    The state is written last: a killed command is repeated with the same files.
    """
    from dwc.base.files import check_suffix, open_folder
    from dwc.base.locks import held
    from dwc.posterior import Posterior
    from dwc.signing import TrustedKeys
    from dwc.site_factors import check_share

    answers = _by_name(values.sites)
    gone = [_name(path) for path in values.without]
    if not answers and not gone:
        raise InputError("SITES must be given, the posteriors of those that answered, or `without`")
    if values.damping not in (None, "auto"):
        check_share("damping", values.damping)  # before scans are read
    state = check_suffix(values.state)
    given = {path.resolve(): path for path in (values.prior, *values.sites, *values.earlier)}
    if values.out.resolve() == state.resolve():
        raise InputError(f"`out` {values.out}: is the `state` file; give another")
    _keep(check_suffix(values.out), "out", given)
    _keep(state, "state", given)
    if values.cavities:
        open_folder(values.cavities)
    trusted = TrustedKeys(values.trusted) if values.trusted else None
    prior = Posterior.load(values.prior)
    judge = _judge(values)
    with held(state.with_name(f".{state.name}.lock")) as alone:
        if not alone:
            raise InputError(f"{state}: another command is changing it; wait for its end")
        _change(values, prior, answers, gone, trusted, given, judge)


def _change(
    values: Namespace,
    prior: "Posterior",
    answers: Mapping[str, Path],
    gone: Sequence[str],
    trusted: "TrustedKeys | None",
    given: Mapping[Path, Path],
    judge: "Judge | None",
) -> None:
    """The round itself, while nobody else changes the state."""
    from dwc.damping import doubled, format_trials, worse
    from dwc.influence import limit_powers, measure
    from dwc.posterior import Posterior
    from dwc.site_factors import Factors

    factors = Factors.load(values.state, prior) if values.state.exists() else Factors(prior)
    before, n_sites = factors.posterior(), max(1, len(answers))
    cavities = {cavity.sha256: cavity for cavity in map(Posterior.load, values.earlier)}
    now = {name: factors.cavity(name) for name in answers}  # before the first factor is replaced
    sites, influences = {}, {}
    for name, path in answers.items():
        site = Posterior.load(path)
        if trusted:
            trusted.require(site, name)
        cavity = cavities.get(str(site.metadata.get("prior_sha256")), now[name])
        factors.check(name, site, cavity)
        sites[name], influences[name] = (site, cavity), measure(site, cavity)
    powers = limit_powers(list(influences.values()), values.max_influence)

    def after(damping: float) -> Factors:
        replaced = factors.copy()
        for (name, (site, cavity)), power in zip(sites.items(), powers, strict=True):
            if power > 0:
                replaced.replace(name, site, cavity=cavity, damping=damping, power=power)
        for name in gone:
            replaced.remove(name)
        return replaced

    damping = 1 / n_sites if values.damping is None else values.damping
    if judge:
        chosen = judge(before, after, doubled(n_sites) if damping == "auto" else [damping])
        factors, damping = chosen.factors, chosen.trial.damping
    else:
        factors = after(damping)
    network = factors.posterior(str(values.out))
    next_priors = {}
    if values.cavities:
        next_priors = {name: values.cavities / f"{name}.safetensors" for name in factors.sites}
    for name, path in next_priors.items():
        _keep(path, "cavities", {**given, values.state.resolve(): values.state, values.out.resolve(): values.out})
        if path.exists() and Posterior.load(path).sha256 != factors.cavity(name).sha256:
            raise InputError(f"{path}: is there already, and a site that answers late needs it; give new `cavities`")
    for name, path in next_priors.items():
        factors.cavity(name).save(path)
    network.save(values.out)
    factors.save(values.state)
    print_verdicts(
        {str(answers[name]): influence for name, influence in influences.items()}, powers, values.max_influence
    )
    _report(values.out, factors, damping)
    if judge:
        print(format_trials(chosen))
        warn([worse(chosen.trial)] if chosen.trial.is_worse else [])


def _judge(values: Namespace) -> "Judge | None":
    """A function that tries dampings on the held-out scans, if there are any; they are read before the sites are."""
    from dwc.base.devices import choose_device
    from dwc.damping import choose_damping
    from dwc.held_out import HeldOut

    if values.data is None:
        if values.damping == "auto":
            raise InputError("`damping` auto: needs the organization's scans to choose on; give `data`, or a number")
        return None
    if values.validation_sub_volumes < 1:
        raise InputError(f"`validation_sub_volumes` {values.validation_sub_volumes}: give 1 or more")
    device = choose_device(values.device)
    held_out = HeldOut.of(values.data, values.prior, values.label_map)
    data = held_out.prepare(values.cache_dir or values.out.parent / "cache")
    return partial(choose_damping, data=data, at_most=values.validation_sub_volumes, device=device)


def _by_name(paths: Sequence[Path]) -> dict[str, Path]:
    """The sites' files by the sites' names."""
    found: dict[str, Path] = {}
    for path in paths:
        if found.setdefault(_name(path), path) != path:
            raise InputError(f"{path}: has the site's name of {found[_name(path)]}; name each file as its site")
    return found


def _name(path: Path) -> str:
    """The site's name: the file's without its ending; a name may have points."""
    return path.name.removesuffix(".safetensors")


def _keep(path: Path, parameter: str, given: Mapping[Path, Path]) -> None:
    """Refuse to write over what was given: it is needed if the command is repeated, or a site comes late."""
    if path.resolve() in given:
        raise InputError(f"`{parameter}`: would be written over {given[path.resolve()]}; give another place")


def _report(out: Path, factors: "Factors", damping: float) -> None:
    network = factors.posterior()
    print(f"damping {damping:.3g}; share of the precision that all factors add:")
    for name, share in factors.shares().items():
        print(printable(f"  {name:<20}{share:>7.1%}"))
    n_volumes = network.metadata.get("n_volumes")
    print(printable(f"{out}  ({len(factors.sites)} sites, {n_volumes} volumes, sha256 {network.sha256[:12]})"))
