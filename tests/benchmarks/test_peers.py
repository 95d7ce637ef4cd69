"""The comparison with other libraries runs with whichever of them are installed."""

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
