"""What is odd about scans beside each other: duplicates, mirrored scans, one subject under two names."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from dwc.data.findings import CheckedScan, Finding, odd
from dwc.data.manifest import namesakes
from dwc.data.scan import Scan

__all__ = ["compare"]

_FEW_SCANS = 3  # of a site, below which no scan is compared with its neighbours


def compare(checked: Sequence[CheckedScan]) -> list[CheckedScan]:
    """The scans with what is found when each is compared with the others."""
    found: dict[int, list[Finding]] = defaultdict(list)
    for look in (_duplicates, _mirrored, _subjects):
        for number, findings in look(checked).items():
            found[number] += findings
    return [replace(one, findings=(*one.findings, *found.get(number, ()))) for number, one in enumerate(checked)]


def _duplicates(checked: Sequence[CheckedScan]) -> dict[int, list[Finding]]:
    """The same scan under two names: an error if one is trained on and the other tested on."""
    first: dict[str, int] = {}
    found = defaultdict(list)
    for number, one in enumerate(checked):
        if one.content is None:
            continue
        twin = checked[first.setdefault(one.content, number)]
        if twin is one:
            continue
        if one.scan.split != twin.scan.split:
            found[number].append(Finding("error", "duplicate", _leak(one.scan, twin.scan)))
        else:
            what = f"holds the same scan as {twin.scan.image}; leave one out"
            found[number].append(odd("duplicate", one.scan.image, what))
    return found


def _leak(one: Scan, twin: Scan) -> str:
    """What to say of one scan in both parts of the split."""
    return f"{one.image}: holds the same scan as {twin.image}, one to train and one to test on; leave one out"


def _mirrored(checked: Sequence[CheckedScan]) -> dict[int, list[Finding]]:
    """Scans whose axes are of another handedness than most of their site's: a flip in a conversion shows so."""
    of_site = defaultdict(list)
    for number, one in enumerate(checked):
        if "right_handed" in one.facts:
            of_site[one.scan.site].append(number)
    found = defaultdict(list)
    for site, numbers in of_site.items():
        right = [number for number in numbers if checked[number].facts["right_handed"]]
        left = [number for number in numbers if not checked[number].facts["right_handed"]]
        few, many = sorted((right, left), key=len)
        if len(numbers) > _FEW_SCANS and len(few) * 4 <= len(many):
            for number in few:
                scan = checked[number].scan
                what = f"its axes {checked[number].facts['axes']} are mirrored against the others of site {site}"
                found[number].append(odd("left and right", scan.image, f"{what}; check that left is left"))
    return found


def _subjects(checked: Sequence[CheckedScan]) -> dict[int, list[Finding]]:
    """Subjects that may be one person under two names."""
    alike = namesakes(one.scan for one in checked)
    found = defaultdict(list)
    for names in alike:
        number = next(number for number, one in enumerate(checked) if one.scan.subject == names[-1])
        what = f"subjects {' and '.join(names)} may be one person; name each in one way"
        found[number].append(odd("subject", checked[number].scan.image, what))
    return found
