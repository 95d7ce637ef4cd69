"""How far each site would move a consolidated posterior, judged before anything is summed.

A site with a tiny sigma or huge means can replace everybody else's result, and Eq. 17 does not notice. Here each site's
factor q_s / q_0 is measured over all weights and tensor by tensor, compared with the other sites' and with the volumes
it claims, and, if asked for, limited to a multiple of the median.
"""

import math
import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dwc.base.errors import InputError
from dwc.factors import Influence, Movement, measure

__all__ = ["MIN_SITES", "Influence", "limit_powers", "limited_because", "measure", "verdicts", "warnings_about"]

MIN_SITES = 3  # with fewer there is no majority, and no median to compare with
_EXCLUDED_BELOW = 0.01  # power: a site that would have to be weakened more than this is left out
_UNMOVED = 1e-6  # a median below this: most sites returned the prior, and nobody can be compared with them
_HARMLESS = 1.0  # then: the prior's own precision, or shifts of one sigma_0
_LOUD = 3.0  # times the median, to be warned about
_ONE_TENSOR = 3.0  # how much higher the limit is within one tensor, where honest sites differ more
_LOUD_IN_ONE_TENSOR = 5.0  # times the median, and times what the site has over all weights, to be warned about
_FAR = 100.0  # sigma_0, to be warned about
_SURE = 1e-3  # of sigma_0, likewise
_OPPOSED = 0.2  # correlation of a site's shift with minus the other sites' pull, likewise
_ALIKE = 0.9  # correlation of two sites' shifts, to be warned about if they are also much closer than the median pair,
_CLOSER = 1 / 3  # which is this multiple of its distance, 1 - |correlation|
_IN_A_TENSOR = (  # in the order of `Movement`
    "in {1}, it adds {0:.3g} times the precision of the median site",
    "in {1}, it pulls the means {0:.3g} times as hard as the median site",
    "in {1}, one weight gains {0:.3g} times the precision that any gains in the median site",
    "in {1}, one mean is pulled {0:.3g} times as hard as any in the median site",
    "in {1}, one mean moves {0:.3g} times as far as any in the median site",
)


def limit_powers(influences: Sequence[Influence], max_influence: float | None) -> list[float]:
    """The power of each site's factor that limits its precision and its pull to a multiple of the median site's.

    Parameters
    ----------
    influences : sequence of Influence
        Of all sites that enter one consolidation.
    max_influence : float or None
        Allowed multiple of the median over all weights; within one tensor, and for one weight of it, three times as
        much is allowed. Where most sites returned the prior, a multiple of the prior's own precision and sigma. None
        limits nobody.

    Returns
    -------
    list of float
        1 for sites within the limit, so that their consolidation is unchanged; 0 for a site that would have to be
        weakened a hundredfold, which is left out. With fewer than three sites, all are 1.
    """
    if max_influence is not None and not 0 < max_influence < math.inf:
        raise InputError(f"`max_influence` {max_influence}: give a positive number, a multiple of the median site's")
    if max_influence is None or len(influences) < MIN_SITES:
        return [1.0] * len(influences)
    powers = [_power(_most(multiples)[0], max_influence) for multiples in _multiples(influences)]
    return [power if power >= _EXCLUDED_BELOW else 0.0 for power in powers]


def limited_because(influences: Sequence[Influence], powers: Sequence[float]) -> list[str]:
    """Why `limit_powers` weakened a site, and whether its claimed volumes explain its influence; "" where it did not.

    A site with many more volumes than the others is right to have more influence, but volumes are only claimed.
    """
    volumes = max(statistics.median(x.n_volumes for x in influences), 1) if influences else 1
    reasons = []
    for own, multiples, power in zip(influences, _multiples(influences), powers, strict=True):
        (most, tensor), claimed = _most(multiples), own.n_volumes / volumes
        verdict = "more than its volumes explain"
        if most <= claimed:
            verdict = "as its volumes would explain; raise the limit if they are right"
        where = f" in {tensor}" if tensor else ""
        reason = (
            f"{multiples[tensor]:.3g} times the influence of the median site{where} for {claimed:.3g} times its "
            f"volumes, {verdict}"
        )
        reasons.append(reason if power < 1 else "")
    return reasons


def verdicts(influences: Mapping[str, Influence]) -> dict[str, str]:
    """One line per site: how far it moved, what it brings for its claimed volumes, and whether others agree."""
    precision = sum(one.precision for one in influences.values())
    volumes = sum(one.n_volumes for one in influences.values())
    agreement, _ = _agreement(list(influences.values()))
    return {
        name: f"moved {_per_volume(own):.3g} nats per volume, brings {_share(own.precision, precision)} of the added "
        f"precision for {_share(own.n_volumes, volumes)} of the volumes, agreement {agrees:.2f}"
        for (name, own), agrees in zip(influences.items(), agreement, strict=True)
    }


def warnings_about(influences: Mapping[str, Influence]) -> dict[str, list[str]]:
    """What is suspicious about each site, in plain words; sites without a warning are left out."""
    found: dict[str, list[str]] = {}
    names, everyone = list(influences), list(influences.values())
    _, opposed = _agreement(everyone)
    correlation, alike = _alike(everyone)
    in_one_tensor = _in_one_tensor(everyone)
    for index, (name, own) in enumerate(influences.items()):
        lines = [*_alone(own), *_against_volumes(own, everyone), *_against_median(own, everyone), *in_one_tensor[index]]
        copies = [other for other in names if other != name and own.copies(influences[other])]
        if copies:
            lines.append(f"it has tensors in common with {_and_more(copies)}")
        close = [k for k in alike[index].nonzero().flatten().tolist() if names[k] not in copies]
        if close:
            closest = max(correlation[index, k].abs().item() for k in close)
            lines.append(
                f"its means move like those of {_and_more([names[k] for k in close])} (correlation {closest:.2f}), "
                "as a copy with noise would"
            )
        if opposed[index]:
            lines.append("its means move against those of the other sites")
        if lines:
            found[name] = lines
    return found


def _agreement(everyone: Sequence[Influence]) -> tuple[list[float], list[bool]]:
    """Correlation of each site's shift with the other sites' pull on the means, and which sites are opposed to them.

    The most opposed site is set aside before the others are judged again, and no site's pull counts for more than the
    median site's: two sites of five with flipped signs do not make the honest ones look opposed.
    """
    if not everyone:
        return [], []
    shifts = torch.tensor([one.shift_sketch for one in everyone], dtype=torch.float64)
    pulls = torch.tensor([one.pull_sketch for one in everyone], dtype=torch.float64)
    norms = pulls.norm(dim=1)
    pulls = pulls * (norms.median() / norms.clamp(min=1e-30)).clamp(max=1)[:, None]
    limit = -max(_OPPOSED, 3 / math.sqrt(shifts.shape[1]))  # few weights correlate by chance
    kept = torch.ones(len(everyone), dtype=torch.bool)
    while True:
        rest = pulls[kept].sum(dim=0) - pulls * kept[:, None]
        agreement = torch.nn.functional.cosine_similarity(shifts, rest)
        worst = agreement.where(kept, math.inf).argmin()
        if kept.sum() < MIN_SITES or agreement[worst] >= limit:
            return agreement.tolist(), (~kept).tolist()
        kept[worst] = False


def _alike(everyone: Sequence[Influence]) -> tuple[Tensor, Tensor]:
    """Correlations [S, S] between all sites' shifts, and which pairs are much closer than the median pair.

    Sites that learned the same are close to each other too, but then all of them are.
    """
    n_sites = len(everyone)
    if n_sites < MIN_SITES:
        return torch.eye(n_sites), torch.zeros(n_sites, n_sites, dtype=torch.bool)
    shifts = torch.tensor([one.shift_sketch for one in everyone])
    shifts = torch.nn.functional.normalize(shifts)
    correlation = shifts @ shifts.T
    distance = 1 - correlation.abs()
    one, other = torch.triu_indices(n_sites, n_sites, 1)
    usual = distance[one, other].median()
    alike = (distance < _CLOSER * usual) & (distance < 1 - _ALIKE)
    return correlation, alike.fill_diagonal_(False)


def _alone(own: Influence) -> list[str]:
    """Warnings that need no other site."""
    lines = []
    if own.furthest > _FAR:
        lines.append(f"a mean is {own.furthest:.3g} sigma_0 from the prior's")
    if own.surest < _SURE:
        lines.append(f"a sigma is {own.surest:.3g} of the prior's")
    if own.n_volumes == 0:
        lines.append("it claims no training volumes")
    return lines


def _multiples(everyone: Sequence[Influence]) -> list[dict[str, float]]:
    """Per site, the largest multiple of what the median site does: over all weights, "", and in each tensor."""
    if not everyone:
        return []
    usual = _usual([x.precision for x in everyone]), _usual([x.shift for x in everyone])
    found = [{"": max(x.precision / usual[0], x.shift / usual[1])} for x in everyone]
    for own, multiples in zip(_in_tensors(everyone), found, strict=True):
        multiples |= {name: max(in_one) for name, in_one in own.items()}
    return found


def _in_tensors(everyone: Sequence[Influence]) -> list[dict[str, Movement]]:
    """Per site and tensor, the multiples of what the median site does there.

    Where it does less than in the whole network, they are multiples of what it does in the whole network.
    """
    precision, shift = _usual([x.precision for x in everyone]), _usual([x.shift for x in everyone])
    least = Movement(precision, shift, precision, shift, shift)
    found: list[dict[str, Movement]] = [{} for _ in everyone]
    for name in everyone[0].tensors:
        moved = [x.tensors[name] for x in everyone]
        medians = map(statistics.median, zip(*moved, strict=True))
        usual = [max(median, floor) for median, floor in zip(medians, least, strict=True)]
        for multiples, own in zip(found, moved, strict=True):
            multiples[name] = Movement(*(value / median for value, median in zip(own, usual, strict=True)))
    return found


def _most(multiples: Mapping[str, float]) -> tuple[float, str]:
    """The multiple that is furthest above what is allowed, as one over all weights, and the tensor; "" for all."""
    return max((multiple / _ONE_TENSOR if name else multiple, name) for name, multiple in multiples.items())


def _in_one_tensor(everyone: Sequence[Influence]) -> list[list[str]]:
    """Per site, a warning of the tensor where it does much more than the median site and than in the whole network."""
    if len(everyone) < MIN_SITES:
        return [[] for _ in everyone]
    lines: list[list[str]] = []
    for multiples, tensors in zip(_multiples(everyone), _in_tensors(everyone), strict=True):
        limit = _LOUD_IN_ONE_TENSOR * max(1.0, multiples[""])
        loud = sorted(((max(in_one), name) for name, in_one in tensors.items() if max(in_one) > limit), reverse=True)
        lines.append([])
        if loud:
            multiple, name = loud[0]
            more = f", and much more in {len(loud) - 1} other tensors" if len(loud) > 1 else ""
            lines[-1].append(_IN_A_TENSOR[tensors[name].index(multiple)].format(multiple, name) + more)
    return lines


def _against_volumes(own: Influence, everyone: Sequence[Influence]) -> list[str]:
    """A warning if a site brings much more precision than its share of the claimed volumes."""
    precision, volumes = sum(x.precision for x in everyone), sum(x.n_volumes for x in everyone)
    above_median = own.precision > _usual([x.precision for x in everyone])
    if not above_median or own.precision * volumes <= _LOUD * own.n_volumes * precision:
        return []
    return [
        f"it brings {_share(own.precision, precision)} of the added precision for {_share(own.n_volumes, volumes)} "
        "of the claimed volumes"
    ]


def _against_median(own: Influence, everyone: Sequence[Influence]) -> list[str]:
    """Warnings about a site that does much more, or for its claimed volumes much less or more, than the median site."""
    if len(everyone) < MIN_SITES:
        return []
    lines = []
    measures = {
        "it adds {:.3g} times the precision of the median site": [x.precision for x in everyone],
        "it pulls the means {:.3g} times as hard as the median site": [x.shift for x in everyone],
        "it moved {:.3g} times as far per volume (KL) as the median site": [_per_volume(x) for x in everyone],
        "it claims {:.3g} times as many volumes as the median site": [float(x.n_volumes) for x in everyone],
    }
    for text, values in measures.items():
        multiple = values[everyone.index(own)] / _usual(values)
        if multiple > _LOUD:
            lines.append(text.format(multiple))
    return lines


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole > 0 else "-"


def _per_volume(own: Influence) -> float:
    return own.kl / max(1, own.n_volumes)


def _power(value: float, cap: float) -> float:
    return 1.0 if value <= cap else cap / value


def _usual(values: Sequence[float]) -> float:
    """What the median site has; where most have nothing, what the prior has."""
    median = statistics.median(values)
    return median if median > _UNMOVED else _HARMLESS


def _and_more(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
