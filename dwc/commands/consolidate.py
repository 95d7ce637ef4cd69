"""`dwc consolidate`: combine sites' posterior files and their prior into one posterior file."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentParser, Namespace

from dwc.base.errors import InputError, printable
from dwc.commands import rounds
from dwc.commands.arguments import new_parser, parse
from dwc.commands.judging import print_verdicts, warn

if TYPE_CHECKING:
    from dwc.consolidation import Consolidation, LayerWeight

__all__ = ["main"]

_FOR_AUTO = {"data": None, "validation_sub_volumes": 256, "label_map": None, "cache_dir": None, "device": "auto"}
_FOR_ROUNDS = {"damping": None, "cavities": None}


def main(arguments: Sequence[str]) -> None:
    """Consolidate the given files, with one in memory at a time, and print each site's weight per layer."""
    values = parse(_parser(), arguments)
    values.sites = values.sites or []
    if values.state is not None:
        of_one_round = {"temper": 1.0, "leave_one_out": False}
        if values.data is None:
            _refuse(values, _FOR_AUTO, "is for `damping` auto; give `data` too")
        _refuse(values, of_one_round, "is for a consolidation without `state`; leave it out")
        rounds.take_round(values)
        return
    _refuse(values, _FOR_ROUNDS, "is for rounds on the same scans; give `state` too")
    if not values.sites:
        raise InputError("SITES must be given, the posterior of each site")

    from dwc.base.files import check_suffix  # here, so that help does not import PyTorch
    from dwc.consolidation import Consolidation
    from dwc.influence import limit_powers, measure
    from dwc.posterior import Posterior
    from dwc.signing import TrustedKeys

    out = check_suffix(values.out)
    choose = _chooser(values) if values.temper == "auto" else None
    if choose is None:
        _refuse(values, _FOR_AUTO, "is for `temper` auto only; leave it out or give that")
    elif values.validation_sub_volumes < 1:
        raise InputError(f"`validation_sub_volumes` {values.validation_sub_volumes}: give a positive number")
    if values.leave_one_out and choose is None:
        raise InputError("`leave_one_out`: needs the organization's scans; give `temper` auto and `data`")
    prior = Posterior.load(values.prior)
    consolidation = Consolidation(prior).tempered(1.0 if choose else values.temper)
    earlier = {prior.sha256: prior for prior in map(Posterior.load, values.earlier)}
    trusted = TrustedKeys(values.trusted) if values.trusted else None

    def load(path: Path) -> tuple[Posterior, Posterior | None]:
        """A site, and its prior if it is an earlier one."""
        site = Posterior.load(path)
        if trusted:
            trusted.answers_for(site)
        return site, earlier.get(str(site.metadata.get("prior_sha256")))

    influences = []
    signed: dict[tuple[str, str], Path] = {}  # by key and prior: a site that was late may be in with two rounds
    consolidated: dict[Path, int] = {}
    for path in values.sites:  # read twice, so that only one site at a time is in memory
        site, its_prior = load(path)
        if trusted:
            key = trusted.signer(site), str(site.metadata.get("prior_sha256"))
            if key in signed:
                raise InputError(f"{path}: is signed by {key[0]}, as {signed[key]} is; a key answers for one site")
            signed[key] = path
        elif site.metadata.get("sites"):
            consolidated[path] = len(site.metadata["sites"])
        Consolidation(prior).add(site, prior=its_prior)  # refuses a wrong file before it is measured
        influences.append(measure(site, its_prior or prior))
    powers = limit_powers(influences, values.max_influence)
    entered = [path for path, power in zip(values.sites, powers, strict=True) if power > 0]
    for path, power in zip(values.sites, powers, strict=True):
        site, its_prior = load(path)
        if power > 0:
            consolidation.add(site, prior=its_prior, power=power)
    for path in values.without:
        site, its_prior = load(path)
        consolidation.remove(site, prior=its_prior)
    if choose:
        consolidation = consolidation.tempered(choose(consolidation, entered))
    posterior = consolidation.posterior(str(out))
    posterior.save(out)
    for (signer, _), path in signed.items():
        print(printable(f"{path}: signed by {signer}"))
    warn(
        f"{path}: lists {n} sites, which nobody has vouched for; its influence is judged as one site's, see `trusted`"
        for path, n in consolidated.items()
    )
    print_verdicts(dict(zip(map(str, values.sites), influences, strict=True)), powers, values.max_influence)
    warn(f"{out}: {name}: fp32 rounds {n} means by over 0.1 sigma" for name, n in posterior.coarse().items())
    if rows := consolidation.report():  # a file that a site was taken out of has none
        print(_table(rows))
    print(
        printable(
            f"{out}  ({consolidation.n_sites} sites, {posterior.metadata['n_volumes']} volumes, "
            f"lambda {consolidation.temper:g}, sha256 {posterior.sha256[:12]})"
        )
    )


def _parser() -> ArgumentParser:
    """The flags."""
    parser = new_parser("consolidate", "Consolidate the posteriors of several sites, trained from one prior (Eq. 17).")
    parser.add_argument("sites", type=Path, nargs="*", help="posterior.safetensors of each site, or consolidated files")
    parser.add_argument("--prior", type=Path, required=True, help="the posterior that every site started from")
    parser.add_argument("--out", type=Path, required=True, help="file to write, .safetensors")
    parser.add_argument(
        "--earlier", type=Path, nargs="+", default=[], help="earlier priors, for sites that answered late"
    )
    parser.add_argument("--without", type=Path, nargs="+", default=[], help="sites to remove from consolidated files")
    parser.add_argument(
        "--temper", type=float | Literal["auto"], default=1.0,
        help="lambda > 0 in prior^(1 - S lambda) prod_s q_s^lambda: 1 is Eq. 17, 1/S the geometric mean of S sites; "
        "auto: the best on the organization's held-out scans, see --data",
    )  # fmt: skip
    parser.add_argument(
        "--max_influence", type=float | None, default=None,
        help="limit each site's precision and pull on the means to this multiple of the median site's, with three "
        "sites or more; a server's default is 3",
    )  # fmt: skip
    parser.add_argument(
        "--trusted", type=Path | None, default=None,
        help="folder of public keys: NAME.pem of each site, organizations/NAME.pem of who may sign consolidated files; "
        "others are refused, and a key answers for one site",
    )  # fmt: skip
    parser.add_argument(
        "--leave_one_out", type=bool, default=False, help="with --temper auto: also score the result without each site"
    )
    parser.add_argument(
        "--data", type=Path | None, default=None,
        help="for --temper auto and --damping auto: the organization's manifest",
    )  # fmt: skip
    parser.add_argument(
        "--validation_sub_volumes", type=int, default=256, help="with --data: maximum number of sub-volumes"
    )
    parser.add_argument("--label_map", type=str | None, default=None, help="with --data: TSV, if the prior has its own")
    parser.add_argument(
        "--cache_dir", type=Path | None, default=None, help="folder for conformed scans; default beside --out"
    )
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="with --data")
    rounds.add_flags(parser)
    return parser


def _refuse(values: Namespace, defaults: Mapping[str, Any], why: str) -> None:
    """Refuse options that are of no use here."""
    for name, default in defaults.items():
        if values[name] != default:
            raise InputError(f"`{name}` {values[name]}: {why}")


def _chooser(values: Namespace) -> "Callable[[Consolidation, Sequence[Path]], float]":
    """A function that chooses lambda; what it needs is checked here, before the first site is read."""
    from dwc import tempering
    from dwc.base.devices import choose_device
    from dwc.held_out import HeldOut
    from dwc.posterior import Posterior

    if values.data is None:
        raise InputError("`temper` auto: needs the organization's scans to choose on; give `data`, or a number")
    if values.validation_sub_volumes < 1:
        raise InputError(f"`validation_sub_volumes` {values.validation_sub_volumes}: give 1 or more")
    device = choose_device(values.device)
    held_out = HeldOut.of(values.data, values.prior, values.label_map)

    def choose(consolidation: "Consolidation", sites: Sequence[Path]) -> float:
        data = held_out.prepare(values.cache_dir or values.out.parent / "cache")
        chosen, scores = tempering.choose_temper(
            consolidation, data, at_most=values.validation_sub_volumes, device=device
        )
        print(tempering.format_scores(scores, chosen))
        if values.leave_one_out:
            own = (Posterior.load(path) for path in sites if path not in values.without)
            for left_out in tempering.score_left_out(
                consolidation.tempered(chosen), own, data, at_most=values.validation_sub_volumes, device=device
            ):
                print(printable(str(left_out)))
        return chosen

    return choose


def _table(rows: "Iterable[LayerWeight]") -> str:
    """The sites' weights as text, one line per layer and site."""
    lines = [
        "weight: of the site's means; 1/S each averages the sites, 1 each adds up their shifts",
        f"{'layer':<20}{'weight':>8}{'added':>8}{'sigma/sigma_0':>15}{'|shift|/sigma_0':>17}  site",
    ]
    for row in sorted(rows, key=lambda row: row.layer):
        numbers = f"{row.weight:>8.3f}{row.added_share:>8.3f}{row.sigma_ratio:>15.4f}{row.shift:>17.3f}"
        lines.append(printable(f"{row.layer:<20}{numbers}  {row.site}"))
    return "\n".join(lines)
