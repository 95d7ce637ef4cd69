"""The comparison with other libraries runs with whichever of them are installed."""

from pathlib import Path

import pytest

from benchmarks import peers


def test_local_reparameterization_has_less_gradient_variance_than_drawn_weights():
    table = peers.compare(channels=2, filters=3, size=5, batch=1, draws=5)
    ours, drawn = table.loc["dwc_kernels"], table.loc["dwc_kernels, drawn weights"]
    assert ours["var rho"] < drawn["var rho"]
    assert ours["KL error"] < 1e-5
    assert ours["eval() repeats"]
    assert (table.ms > 0).all()


def test_a_library_that_is_missing_is_named_and_not_needed(monkeypatch):
    def no_module(name):
        raise ImportError(f"no module {name}")

    monkeypatch.setattr(peers.importlib, "import_module", no_module)
    found, missing = peers.peers()
    assert [peer.name for peer in found] == ["dwc_kernels", "dwc_kernels, drawn weights"]
    assert len(missing) == 4


def test_the_page_of_the_layer_says_what_the_checks_find():
    page = (Path(peers.__file__).parents[1] / "docs" / "layer.md").read_text()
    header, *rows = [
        [cell.strip() for cell in line[1:-1].split("|")]
        for line in page[page.index("| | dwc_kernels |") :].split("\n\n")[0].splitlines()
    ]
    cells = {row[0]: dict(zip(header[1:], row[1:], strict=False)) for row in rows}
    found = peers.abilities()
    for name in found.columns:
        for ability in found.index:
            assert cells[ability][name.split(",")[0]].startswith(found.loc[ability, name]), (ability, name)


def test_torchbnn_has_no_3d_convolution():
    torchbnn = pytest.importorskip("torchbnn", reason="the column of torchbnn is checked where it is installed")
    assert not [name for name in dir(torchbnn) if "3d" in name.lower()]
