"""Drill: mutated posterior files. `pytest -m drill tests/drills/test_mutated_posteriors.py`

Seeded and resumable: DWC_DRILL_COUNT mutations (100,000 by default), the results so far in DWC_DRILL_OUT, a folder.
Every mutated file must be refused with an InputError or hold exactly what the original held. A few hundred run with
the ordinary tests.
"""

import json
import os
import random
import struct
from pathlib import Path

import pytest
import torch

from dwc.base.errors import InputError
from dwc.base.files import canonical_json
from dwc.consolidation import Consolidation
from dwc.posterior import Posterior
from tests.made_posteriors import a_prior, a_site

CHUNK = 1000
HOSTILE = [
    None, True, [], {}, [[]], {"a": 1}, -1, 0, 1, 2**53, 2**53 - 1, 10**30, 10**400, 1.5, -0.0, 1e308, "", "x",
    "\x1b[2J", "x" * 5000, ["ab"], [{"sha256": "ab", "n_volumes": 1}],
    [{"sha256": 7, "n_volumes": 1, "temper": 10**400}],
]  # fmt: skip


def split(content: bytes) -> tuple[dict, bytes]:
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def joined(head: dict, payload: bytes) -> bytes:
    text = json.dumps(head).encode()
    return struct.pack("<Q", len(text)) + text + payload


def flip(rng: random.Random, content: bytes) -> bytes:
    """One to eight bits, anywhere."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def flip_payload(rng: random.Random, content: bytes) -> bytes:
    head = 8 + struct.unpack("<Q", content[:8])[0]
    return content[:head] + flip(rng, content[head:])


def overwrite(rng: random.Random, content: bytes) -> bytes:
    start, length = rng.randrange(len(content)), rng.randint(1, 64)
    return content[:start] + rng.randbytes(length) + content[start + length :]


def cut(rng: random.Random, content: bytes) -> bytes:
    return content[: rng.randrange(len(content))]


def remove(rng: random.Random, content: bytes) -> bytes:
    start = rng.randrange(len(content))
    return content[:start] + content[start + rng.randint(1, 64) :]


def extend(rng: random.Random, content: bytes) -> bytes:
    return content + rng.randbytes(rng.randint(1, 64))


def entry(rng: random.Random, content: bytes) -> bytes:
    """An entry of dwc's own header replaced, added or removed; the digest stays."""
    head, payload = split(content)
    header = json.loads(head["__metadata__"]["dwc"])
    key = rng.choice([*header, "sites", "subjects"])
    if rng.random() < 0.2:
        header.pop(key, None)
    else:
        header[key] = rng.choice(HOSTILE)
    head["__metadata__"]["dwc"] = json.dumps(header)
    return joined(head, payload)


def as_format_1(rng: random.Random, content: bytes) -> bytes:
    """A hostile header in the old format, which has no digest: the schema alone stands guard. The payload is whole."""
    head, payload = split(entry(rng, content))
    header = json.loads(head["__metadata__"]["dwc"])
    header["format_version"] = 1
    head["__metadata__"] = {"dwc": json.dumps(header)}
    return joined(head, payload)


def nest(rng: random.Random, content: bytes) -> bytes:
    head, payload = split(content)
    depth = rng.choice([5, 50, 500, 990, 5000, 100_000])
    text = head["__metadata__"]["dwc"]
    head["__metadata__"]["dwc"] = text[:-1] + ',"training":' + "[" * depth + "]" * depth + "}"
    return joined(head, payload)


def layout(rng: random.Random, content: bytes) -> bytes:
    """safetensors' own description of a tensor: shape, type, place."""
    head, payload = split(content)
    name = rng.choice([name for name in head if name != "__metadata__"])
    what = rng.choice(["shape", "dtype", "data_offsets", "name", "metadata"])
    if what == "shape":
        head[name]["shape"] = rng.choice([[1] * 71, [0], [], [2**62, 4], [-1], [4, 1], [10**25], "x"])
    elif what == "dtype":
        head[name]["dtype"] = rng.choice(["F64", "BF16", "F8_E4M3", "F4", "I32", "U8", "BOOL", "C64", "X", 7])
    elif what == "data_offsets":
        head[name]["data_offsets"] = rng.choice([[0, 0], [0, 2**63], [4, 0], [-4, 4], [0, 16], ["a", "b"]])
    elif what == "name":
        head[rng.choice(["\x1b[2J.mu", ".mu", "mu", "a.b.c", "layers.0.bias.rho"])] = head.pop(name)
    else:
        head["__metadata__"] = rng.choice([None, [], {"dwc": 7}, {"dwc": ""}, {"dwc": "{"}, {}, {"other": "x"}])
    return joined(head, payload)


MUTATIONS = [flip, flip_payload, overwrite, cut, remove, extend, entry, as_format_1, nest, layout]


def content_of(posterior: Posterior) -> str:
    """Everything that a consolidation uses, but the format version: the old format is read too."""
    header = {key: value for key, value in posterior.metadata.items() if key != "format_version"}
    return canonical_json(header) + posterior_payload(posterior)


def posterior_payload(posterior: Posterior) -> str:
    return Posterior(posterior.mu, posterior.sigma, {"package_version": ""}).sha256


def outcome(mutate, rng: random.Random, original: Posterior, content: bytes, path: Path) -> str:
    """What became of one mutated file; raises if it is what must not happen."""
    path.write_bytes(mutate(rng, content))
    try:
        loaded = Posterior.load(path)
    except InputError as error:
        if "\n" in str(error):
            raise
        return "refused"
    assert posterior_payload(loaded) == posterior_payload(original), "an altered payload was accepted"
    if mutate is not as_format_1:
        assert content_of(loaded) == content_of(original), "an altered header was accepted"
        return "same content"
    try:  # what the old format lets through may not break what comes next
        consolidation = Consolidation(a_prior())
        consolidation.add(loaded)
        consolidation.posterior().save(path)
        Posterior.load(path)
    except InputError:
        return "refused later"
    return "old format, sound header"


def run(count: int, folder: Path) -> dict[str, int]:
    """`count` mutations in chunks, each with its own seed; finished chunks are read from the folder."""
    torch.set_num_threads(1)
    original = a_site(a_prior(), 1, n_volumes=3, training={"lr": 0.1, "epochs": 3})
    path = folder / "mutated.safetensors"
    original.save(path)
    content = path.read_bytes()
    total: dict[str, int] = {}
    for chunk in range((count + CHUNK - 1) // CHUNK):
        done = folder / f"chunk-{chunk}.json"
        if not done.exists():
            rng, seen = random.Random(chunk), dict[str, int]()
            for _ in range(min(CHUNK, count - chunk * CHUNK)):
                mutate = rng.choice(MUTATIONS)
                kind = f"{mutate.__name__}: {outcome(mutate, rng, original, content, path)}"
                seen[kind] = seen.get(kind, 0) + 1
            done.write_text(json.dumps(seen))
        for kind, n in json.loads(done.read_text()).items():
            total[kind] = total.get(kind, 0) + n
    return total


def test_a_few_hundred_mutated_files_are_refused_or_hold_what_they_held(tmp_path):
    total = run(500, tmp_path)
    assert sum(total.values()) == 500
    assert {kind.partition(":")[0] for kind in total} == {mutate.__name__ for mutate in MUTATIONS}
    assert total.get("flip_payload: refused", 0) > 20


@pytest.mark.drill
def test_a_hundred_thousand_mutated_files_are_refused_or_hold_what_they_held(tmp_path):
    folder = Path(os.environ.get("DWC_DRILL_OUT", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    count = int(os.environ.get("DWC_DRILL_COUNT", 100_000))
    total = run(count, folder)
    print(json.dumps(dict(sorted(total.items())), indent=2))
    assert sum(total.values()) == count
