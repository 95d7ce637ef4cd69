"""A header in which anything was changed is refused in one line by whatever reads the file, or does no harm."""

import json
from dataclasses import replace
from typing import Any

import pytest

from dwc.base.errors import InputError
from dwc.base.files import save_tensors
from dwc.evaluation import scans_to_score
from dwc.inspection import inspect
from dwc.posterior import Posterior
from dwc.prediction import load_networks
from dwc.training.specification import resolve
from tests.made_json import places, with_entry

pytest_plugins = ["tests.tiny_runs"]
pytestmark = pytest.mark.usefixtures("one_thread")

WRONG: list[Any] = [None, True, -1, 0.5, 10**9, 10**400, "", "x", "\x1b[2J", [], {}, [10**6], {"a": []}, [1] * 9000]


def test_whatever_a_header_says_no_reader_ends_in_a_traceback(networks, settings, tmp_path):
    site, path = networks["a"], tmp_path / "odd.safetensors"
    manifest = tmp_path / "manifest.csv"  # without a split column: it is made again from the header
    for file in settings.data.parent.glob("*.nii.gz"):
        (tmp_path / file.name).symlink_to(file)
    manifest.write_text("\n".join(line.rpartition(",")[0] for line in settings.data.read_text().splitlines()))
    train = replace(
        settings, mode="vcl", prior=path, data=manifest, out=tmp_path / "run", label_map=None, grid_size=None,
        width=None, dilations=None,
    )  # fmt: skip
    readers = [
        lambda posterior: load_networks(posterior),
        lambda posterior: scans_to_score(manifest, [posterior], split="all"),
        lambda posterior: scans_to_score(manifest, [posterior], split="train"),
        lambda posterior: inspect(posterior),
        lambda posterior: resolve(train),
    ]
    refused = 0
    for place in places(site.metadata):
        for value in WRONG:
            header = with_entry(site.metadata, place, value)
            save_tensors(path, dict(site._tensors()), json.loads(json.dumps(header)))
            for reader in readers:
                try:
                    reader(Posterior.load(path))
                except InputError as error:
                    refused += 1
                    if "\n" in str(error):
                        raise
                except Exception as error:
                    raise AssertionError(f"{place} = {str(value)[:20]}: {type(error).__name__}: {error}") from error
    assert refused > 1000
