import json
import os
import signal
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from dwc.base.errors import InputError, Interrupted
from dwc.base.files import load_tensors, save_tensors
from dwc.base.locks import held
from dwc.data.augmentation import Augmentation
from dwc.data.labels import LabelMap
from dwc.posterior import Posterior
from dwc.training import log, loop, state
from dwc.training.loop import learning_rate_factor, train_network

pytest_plugins = ["tests.tiny_runs"]
pytestmark = pytest.mark.usefixtures("one_thread")


def rows_of(out: Path) -> list[dict]:
    """The log without its timings."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def same_checkpoint(left: Path, right: Path) -> bool:
    (tensors, header), (others, other) = (load_tensors(out / "checkpoint.safetensors") for out in (left, right))
    return header == other and tensors.keys() == others.keys() and all(
        torch.equal(tensors[name], others[name]) for name in tensors
    )  # fmt: skip


def test_each_network_of_the_chain_names_where_it_comes_from(networks):
    assert not networks["map"].is_bayesian
    assert networks["map"].metadata["prior_sha256"] is None
    assert networks["vi"].metadata["prior_sha256"] is None
    assert networks["vi"].metadata["training"]["init_sha256"] == networks["map"].sha256
    for name in ("a", "b"):
        assert networks[name].metadata["prior_sha256"] == networks["vi"].sha256
    assert networks["finetune"].metadata["prior_sha256"] == networks["dwc"].sha256
    assert networks["dwc"].metadata["n_volumes"] == 6
    for network in networks.values():
        assert network.metadata["label_map"]["name"] == "coarse"
        assert network.metadata["preprocessing"]["grid_size"] == 32
        assert network.metadata["architecture"]["width"] == 2
    assert networks["finetune"].metadata["training"]["n_sub_volumes"] == 1
    assert networks["a"].metadata["training"]["n_sub_volumes"] == 3
    assert networks["a"].metadata["n_volumes"] == 3


def test_no_path_leaves_a_site_with_its_posterior(networks, site):
    for network in networks.values():
        assert str(site.parent) not in json.dumps(network.metadata)
        assert "manifest" not in json.dumps(network.metadata)


def test_a_site_starts_at_its_prior_moves_from_it_and_never_widens(networks):
    prior, site = networks["vi"], networks["a"]
    assert all((site.sigma[name] <= prior.sigma[name]).all() for name in prior.sigma)
    moved = max((site.mu[name] - prior.mu[name]).abs().max().item() for name in prior.mu)
    assert 1e-3 < moved < 0.2  # two steps at 1e-2
    assert networks["vi"].sigma["layers.0.weight"].median() == pytest.approx(1e-3, rel=0.1)
    assert networks["vi"].mu["layers.0.weight"] == pytest.approx(networks["map"].mu["layers.0.weight"], abs=0.1)


def test_training_lowers_the_loss_and_the_run_folder_tells_it(settings, tmp_path):
    train_network(replace(settings, out=tmp_path / "run", epochs=4, steps_per_epoch=10, lr=3e-2))
    rows = rows_of(tmp_path / "run")
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert [row["step"] for row in rows] == [10, 20, 30, 40]
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    assert rows[-1]["dice_with_background"] > rows[0]["dice_with_background"]
    names = {path.name for path in (tmp_path / "run").iterdir()}
    files = {"config.yaml", "log.jsonl", "tensorboard", "checkpoint.safetensors", "posterior.safetensors"}
    assert names == {*files, ".lock"}


def test_log_and_tensorboard_follow_each_layers_distance_from_its_prior(settings, networks, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    prior = Path(networks["vi"].name)
    train_network(replace(settings, mode="vcl", prior=prior, out=tmp_path / "run", epochs=2))
    layers = rows_of(tmp_path / "run")[-1]["layers"]
    assert layers.keys() == {"layers.0", "layers.1"}
    assert 0.5 < layers["layers.0"]["sigma_ratio"] <= 1
    assert layers["layers.1"]["shift"] > 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [event.step for event in events.Scalars("validation/dice")] == [2, 4]
    assert events.Scalars("sigma_ratio/layers.0")[-1].value == pytest.approx(layers["layers.0"]["sigma_ratio"])


def test_the_number_of_workers_changes_no_bit(settings, networks, tmp_path):
    vcl = replace(settings, mode="vcl", prior=Path(networks["vi"].name), epochs=2)
    runs = [train_network(replace(vcl, out=tmp_path / str(workers), workers=workers)) for workers in (0, 2)]
    assert runs[0].sha256 == runs[1].sha256
    assert rows_of(tmp_path / "0") == rows_of(tmp_path / "2")


def test_a_stream_is_other_noise_on_the_same_split_and_a_run_keeps_its_own(settings, tmp_path):
    vi = replace(settings, mode="vi", epochs=1)
    runs = [train_network(replace(vi, stream=stream, out=tmp_path / str(stream))) for stream in (0, 7, 8)]
    assert len({run.sha256 for run in runs}) == 3
    assert [run.metadata["training"].get("stream") for run in runs] == [None, 7, 8]
    identities = [load_tensors(tmp_path / str(n) / "checkpoint.safetensors")[1]["state"]["identity"] for n in (0, 7)]
    assert identities[0]["data"] == identities[1]["data"]
    with pytest.raises(InputError, match="stream 7, now None"):
        train_network(replace(vi, out=tmp_path / "7"), resume=True)


def test_a_run_folder_is_one_runs_at_a_time(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_WORKERS_END_S", 0.0)
    run = replace(settings, epochs=1, out=tmp_path / "run")
    train_network(run)
    with held(tmp_path / "run" / ".lock"):
        before = (tmp_path / "run" / "checkpoint.safetensors").read_bytes()
        with pytest.raises(InputError, match=r"run: another dwc train is using it; wait until it ends"):
            train_network(replace(run, epochs=2), resume=True)
        assert (tmp_path / "run" / "checkpoint.safetensors").read_bytes() == before
    train_network(replace(run, epochs=2), resume=True)


def test_a_run_that_waited_for_another_in_its_folder_does_not_overwrite_it(settings, tmp_path, monkeypatch):
    """Both runs found the folder empty; the second gets the lock when the first ends."""
    first, second = (replace(settings, epochs=1, out=tmp_path / "run", seed=seed) for seed in (0, 1))
    alone = loop._alone_in

    @contextmanager
    def after_the_first(out):
        monkeypatch.setattr(loop, "_alone_in", alone)
        train_network(first)
        with alone(out):
            yield

    monkeypatch.setattr(loop, "_alone_in", after_the_first)
    with pytest.raises(InputError, match=r"is not empty; give another `out`"):
        train_network(second)
    assert Posterior.load(tmp_path / "run" / "posterior.safetensors").metadata["training"]["seed"] == 0


def test_other_settings_do_not_start_over_in_the_folder_of_a_run_that_lost_its_checkpoint(settings, tmp_path):
    run = replace(settings, epochs=1, out=tmp_path / "run")
    train_network(run)
    (tmp_path / "run" / "checkpoint.safetensors").unlink()
    with pytest.raises(InputError, match="has a posterior but no checkpoint to resume from; give another `out`"):
        train_network(run, resume=True)
    (tmp_path / "run" / "posterior.safetensors").unlink()
    with pytest.raises(InputError, match="the run was started with seed 0, now 1; give another `out`"):
        train_network(replace(run, seed=1), resume=True)
    train_network(run, resume=True)


def test_the_seed_decides_and_the_callers_random_numbers_stay_untouched(settings, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = train_network(replace(settings, epochs=1, out=tmp_path / "1"))
    assert torch.equal(torch.rand(3), expected)
    again = train_network(replace(settings, epochs=1, out=tmp_path / "2"))
    other = train_network(replace(settings, epochs=1, out=tmp_path / "3", seed=1))
    assert first.sha256 == again.sha256
    assert not torch.equal(first.mu["layers.0.weight"], other.mu["layers.0.weight"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["step", "validation"])
def test_a_signal_leaves_a_checkpoint_from_which_the_run_continues_bit_for_bit(
    settings, networks, tmp_path, monkeypatch, number, moment
):
    vcl = replace(settings, mode="vcl", prior=Path(networks["vi"].name))
    whole = train_network(replace(vcl, out=tmp_path / "whole"))

    method = {"step": "_step", "validation": "_validate"}[moment]
    original = getattr(loop._Run, method)

    def interrupt(run, *arguments):
        if run.state.step == (2 if moment == "step" else 4):
            os.kill(os.getpid(), number)
        return original(run, *arguments)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, method, interrupt)
        with pytest.raises(Interrupted, match=r"resume with: dwc train --config .*config\.yaml --resume") as stop:
            train_network(replace(vcl, out=tmp_path / "cut"))
    assert stop.value.signal_number == number
    assert signal.getsignal(signal.SIGINT) is before
    _, header = load_tensors(tmp_path / "cut" / "checkpoint.safetensors")
    assert header["state"]["step"] == (3 if moment == "step" else 4)
    assert header["state"]["epoch"] == 1
    with pytest.raises(InputError, match=r"is not empty; give another `out`, or `resume`"):
        train_network(replace(vcl, out=tmp_path / "cut"))
    assert train_network(replace(vcl, out=tmp_path / "cut"), resume=True).sha256 == whole.sha256
    assert same_checkpoint(tmp_path / "cut", tmp_path / "whole")
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")


@pytest.mark.parametrize("written", ["write_log", "save_checkpoint", "save_tensors"])
def test_a_kill_between_any_two_writes_is_mended_by_resuming(settings, tmp_path, monkeypatch, written):
    whole = train_network(replace(settings, out=tmp_path / "whole"))

    class Killed(BaseException):
        pass

    calls = []

    def die(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise Killed
        return originals[written](*arguments)

    module = {"write_log": log, "save_checkpoint": loop, "save_tensors": state}[written]
    originals = {written: getattr(module, written)}
    with monkeypatch.context() as patch:
        patch.setattr(module, written, die)
        with pytest.raises(Killed):
            train_network(replace(settings, out=tmp_path / "cut"))
    (tmp_path / "cut" / ".checkpoint.safetensors.abc.part").write_bytes(b"half")
    assert train_network(replace(settings, out=tmp_path / "cut"), resume=True).sha256 == whole.sha256
    assert same_checkpoint(tmp_path / "cut", tmp_path / "whole")
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")
    assert not list((tmp_path / "cut").glob(".*.part"))


def test_a_finished_run_resumes_to_itself_and_goes_on_for_more_epochs(settings, tmp_path):
    long = train_network(replace(settings, out=tmp_path / "long", epochs=2))
    short = replace(settings, out=tmp_path / "short", epochs=1)
    first = train_network(short)
    assert train_network(short, resume=True).sha256 == first.sha256
    assert train_network(replace(short, epochs=2), resume=True).sha256 == long.sha256


def test_varied_cubes_with_margins_resume_to_the_same_bits_with_any_number_of_workers(settings, tmp_path):
    varied = replace(settings, margin=3, augmentation=Augmentation(mirror=0.5, rotation=5, elastic=1, gamma=0.2))
    long = train_network(replace(varied, out=tmp_path / "long", epochs=2))
    train_network(replace(varied, out=tmp_path / "short", epochs=1, workers=2))
    assert train_network(replace(varied, out=tmp_path / "short", epochs=2), resume=True).sha256 == long.sha256
    plain = train_network(replace(settings, out=tmp_path / "plain", epochs=2))
    assert plain.sha256 != long.sha256


def test_the_header_names_random_cubes_and_stays_as_it_was_for_the_papers(settings, tmp_path):
    posteriors = [
        train_network(replace(settings, out=tmp_path / kind, epochs=1, cubes=kind)) for kind in ("random", "paper")
    ]
    random, paper = (posterior.metadata["training"] for posterior in posteriors)
    assert (random["cubes"], random["margin"], random["augmentation"]["gamma"]) == ("random", 0, 0.0)
    assert not {"cubes", "margin", "air_share", "augmentation"} & paper.keys()


def test_resuming_with_other_settings_is_refused_by_name(settings, tmp_path):
    run = replace(settings, out=tmp_path / "run", epochs=1)
    train_network(run)
    with pytest.raises(
        InputError,
        match=r"started with lr 0\.01, now 0\.02; batch_size 1, now 2; resume",
    ):
        train_network(replace(run, lr=2e-2, batch_size=2), resume=True)
    with pytest.raises(InputError, match="no such run to resume"):
        train_network(replace(run, out=tmp_path / "none"), resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="holds no run"):
        train_network(replace(run, out=tmp_path / "other"), resume=True)


BAD_DATA = {
    "image": (np.full((32, 32, 32), 7, np.uint8), "constant"),
    "nan": (np.full((32, 32, 32), np.nan, np.float32), "NaN"),
    "shape": (np.zeros((32, 32, 30), np.int16), "off the grid"),
    "fractions": (np.full((32, 32, 32), 0.5, np.float32), "not whole numbers"),
}


@pytest.mark.parametrize("kind", BAD_DATA)
@pytest.mark.parametrize("split", ["train", "test"])
def test_bad_data_leaves_a_folder_in_which_the_mended_run_starts(settings, site, tmp_path, kind, split):
    voxels, message = BAD_DATA[kind]
    bad = tmp_path / ("T1w.nii.gz" if kind in ("image", "nan") else "dseg.nii.gz")
    good = site / f"sub-1_{bad.name}"
    nibabel.save(nibabel.Nifti1Image(voxels, nibabel.load(good).affine), bad)
    pair = {"T1w.nii.gz": site / "sub-1_T1w.nii.gz", "dseg.nii.gz": site / "sub-1_dseg.nii.gz", bad.name: bad}
    rows = [f"{pair['T1w.nii.gz']},{pair['dseg.nii.gz']},{split}"]
    rows += [f"{site}/sub-{n}_T1w.nii.gz,{site}/sub-{n}_dseg.nii.gz,{part}" for n, part in ((0, "train"), (3, "test"))]
    (tmp_path / "manifest.csv").write_text("\n".join(["image,label,split", *rows]))
    run = replace(settings, data=tmp_path / "manifest.csv", out=tmp_path / "run", cache_dir=None, epochs=1)
    with pytest.raises(InputError, match=message):
        train_network(run)
    bad.write_bytes(good.read_bytes())
    train_network(run)
    assert (tmp_path / "run" / "posterior.safetensors").exists()


def test_resuming_with_other_data_of_the_same_number_is_refused(settings, site, tmp_path):
    text = (site / "manifest.csv").read_text().replace("sub-", f"{site}/sub-")
    manifest = tmp_path / "manifest.csv"
    manifest.write_text(text)
    run = replace(settings, data=manifest, out=tmp_path / "run", epochs=1)
    train_network(run)
    config = (tmp_path / "run" / "config.yaml").read_bytes()
    manifest.write_text(text.replace("sub-0_dseg", "sub-1_dseg"))
    with pytest.raises(InputError, match=r"`data` .*manifest\.csv: its train scans are not those"):
        train_network(replace(run, epochs=2), resume=True)
    manifest.write_text(text.replace("sub-3_dseg", "sub-1_dseg"))
    with pytest.raises(InputError, match=r"`data` .*manifest\.csv: its test scans are not those"):
        train_network(replace(run, epochs=2), resume=True)
    assert (tmp_path / "run" / "config.yaml").read_bytes() == config
    (tmp_path / "moved.csv").write_text(text)
    assert train_network(replace(run, data=tmp_path / "moved.csv"), resume=True).metadata["training"]["steps"] == 2


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_with_nothing_but_what_a_kill_left_is_a_new_run(settings, tmp_path, resume):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.yaml.abc.part").write_bytes(b"half")
    train_network(replace(settings, out=tmp_path / "run", epochs=1), resume=resume)
    assert not list((tmp_path / "run").glob(".*.part"))


def test_without_a_split_column_a_run_splits_as_its_base_did(settings, site, tmp_path):
    manifest = tmp_path / "manifest.csv"
    text = (site / "manifest.csv").read_text().replace("sub-", f"{site}/sub-")
    manifest.write_text("\n".join(line.rpartition(",")[0] for line in text.splitlines()))
    first = replace(settings, data=manifest, epochs=1, seed=1, test_fraction=0.3)
    base = train_network(replace(first, out=tmp_path / "map"))
    then = replace(first, mode="vi", init=Path(base.name))
    for changes in ({"seed": 2}, {"test_fraction": 0.5}):
        with pytest.raises(
            InputError, match=r"`init` .* split of `seed` 1 and `test_fraction` 0\.3; give the same, or a sp"
        ):
            train_network(replace(then, out=tmp_path / "vi", **changes))
    train_network(replace(then, out=tmp_path / "vi"))
    train_network(replace(then, out=tmp_path / "column", data=site / "manifest.csv", seed=2))


def test_a_label_map_is_known_by_its_content_and_keeps_the_name_of_the_base(settings, tmp_path):
    coarse = LabelMap.load("coarse")
    rows = [f"{i}\t{k}\t{coarse.names[k]}" for i, k in zip(coarse.ids, coarse.classes, strict=True)]
    paths = [tmp_path / name for name in ("ours.tsv", "theirs.tsv")]
    for path in paths:
        path.write_text("\n".join(["index\tclass\tname", *rows]))
    run = replace(settings, epochs=1)
    base = train_network(replace(run, label_map=str(paths[0]), out=tmp_path / "map"))
    vi = replace(run, mode="vi", init=Path(base.name), label_map=str(paths[1]), out=tmp_path / "vi")
    assert train_network(vi).metadata["label_map"] == base.metadata["label_map"]
    assert base.metadata["label_map"]["name"] == "ours"
    paths[1].write_text(paths[1].read_text().replace(coarse.names[1], "matter"))
    with pytest.raises(InputError, match=r"label map differs from this run's in name ours, sha256 .* name theirs"):
        train_network(replace(vi, out=tmp_path / "other"))


def test_a_base_whose_header_makes_no_network_is_refused_by_name(settings, networks, tmp_path):
    path = tmp_path / "odd.safetensors"
    base = networks["map"]
    for architecture in ("MeshNet", {**base.metadata["architecture"], "dilations": 3}):
        odd = Posterior(base.mu, {}, {**base.metadata, "architecture": architecture})
        save_tensors(path, dict(odd._tensors()), odd.metadata)  # `save` would refuse this
        with pytest.raises(InputError, match=r"odd\.safetensors: its .*architecture"):
            train_network(replace(settings, init=path, out=tmp_path / "run", dilations=None))


def test_one_cycle_reports_no_plateau(settings, tmp_path):
    still = replace(settings, lr=1e-9, steps_per_epoch=20, plateau_window=20, epochs=1, schedule="one_cycle")
    posterior = train_network(replace(still, out=tmp_path / "run"))
    assert posterior.metadata["training"]["plateau_step"] is None
    assert rows_of(tmp_path / "run")[-1]["plateau_step"] is None


def test_it_stops_after_the_epoch_in_which_the_loss_reached_its_plateau(settings, tmp_path):
    still = replace(settings, out=tmp_path / "run", lr=1e-9, steps_per_epoch=15, plateau_window=20, epochs=50)
    posterior = train_network(replace(still, stop_at_plateau=True))
    assert posterior.metadata["training"]["steps"] == 30
    assert posterior.metadata["training"]["plateau_step"] == 0
    assert rows_of(tmp_path / "run")[-1]["plateau_step"] == 0


def test_one_cycle_rises_to_the_learning_rate_and_falls_to_nothing():
    factors = [learning_rate_factor("one_cycle", step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.04)
    assert factors[30] == pytest.approx(1)
    assert factors[99] < 1e-3
    assert factors[:31] == sorted(factors[:31])
    assert factors[30:] == sorted(factors[30:], reverse=True)
    assert learning_rate_factor("constant", 7, 100) == 1


def test_rho_has_its_own_learning_rate(settings, networks, tmp_path):
    prior = networks["vi"]
    vcl = replace(settings, mode="vcl", prior=Path(prior.name), epochs=1)
    slow, fast = (train_network(replace(vcl, out=tmp_path / f"{rate}", rho_lr=rate)) for rate in (1e-4, 1.0))
    name = "layers.1.weight"
    assert (slow.sigma[name] / prior.sigma[name]).min() > 0.999
    assert (fast.sigma[name] / prior.sigma[name]).min() < 0.8
    torch.testing.assert_close(slow.mu[name], fast.mu[name], atol=5e-3, rtol=0)


def test_batches_do_not_depend_on_the_first_step():
    batches = list(loop._Batches(3, range(14)))
    assert list(loop._Batches(3, range(5, 14))) == batches[5:]
    assert [position for batch in batches for position in batch] == list(range(42))


def test_a_diverging_loss_ends_the_run_and_keeps_the_last_checkpoint(settings, tmp_path):
    with pytest.raises(InputError, match=r"the loss is (nan|inf) at step \d+; train again with a lower `lr`"):
        train_network(replace(settings, out=tmp_path / "run", lr=1e30, epochs=20))
    assert not (tmp_path / "run" / "posterior.safetensors").exists()


def test_bf16_autocast_trains_close_to_fp32(settings, tmp_path):
    fp32, bf16 = (
        train_network(replace(settings, out=tmp_path / precision, precision=precision, epochs=1))
        for precision in ("fp32", "bf16")
    )
    torch.testing.assert_close(fp32.mu["layers.0.weight"], bf16.mu["layers.0.weight"], atol=0.03, rtol=0)
    assert fp32.mu["layers.0.weight"].dtype == bf16.mu["layers.0.weight"].dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": None}, "`data` None: give a path"),
        ({"out": None}, "`out` None: give a path"),
        ({"mode": "vcl"}, "`mode` vcl: needs a posterior to start from; give `prior`"),
        ({"mode": "vi", "prior": "{vi}"}, "`mode` vi has the prior N.0, 1.; leave `prior` out"),
        ({"mode": "finetune", "prior": "{vi}", "init": "{map}"}, "starts from its prior; leave `init` out"),
        ({"mode": "vcl", "prior": "{map}"}, "is a MAP network; train one with `mode` vi"),
        ({"mode": "vcl", "prior": "missing.safetensors"}, "no such file"),
        ({"init": "{checkpoint}"}, r"checkpoint\.safetensors: is a checkpoint.*give its run's posterior\.safetensors"),
        ({"init": "{site}"}, "is a folder; give the .safetensors file in it"),
        ({"mode": "vcl", "prior": "{vi}", "width": 3}, "architecture differs from this run's in width"),
        ({"mode": "vcl", "prior": "{vi}", "label_map": "fifty"}, "differs from this run's in n_classes"),
        ({"mode": "vcl", "prior": "{vi}", "grid_size": 64}, "preprocessing differs from this run's in grid_size"),
        (
            {"mode": "vcl", "prior": "{vi}", "activation": "elu"},
            "`prior` .* architecture differs from this run's in activation relu, here activation elu",
        ),
        (
            {"init": "{map}", "intensity": "quantile"},
            "`init` .* preprocessing differs from this run's in intensity z-score per volume, here intensity quantiles",
        ),
        ({"intensity": "bogus"}, "`intensity` 'bogus': give 'z_score', 'min_max' or 'quantile'"),
        ({"init": "{vi}", "dilations": (2,)}, "`init` .* architecture differs from this run's in dilations"),
        ({"data": "missing.csv"}, r"missing\.csv"),
        ({"grid_size": 33}, "`grid_size` 33: give a multiple of 32"),
        ({"lr": 0}, "`lr` 0.0: give a positive number"),
        ({"lr": float("nan")}, "`lr` nan: give a finite number"),
        ({"batch_size": -1}, "`batch_size` -1: give a positive number"),
        ({"dilations": ()}, "`dilations` .*: give positive numbers"),
        ({"seed": -1}, "`seed` -1: give a number >= 0"),
        ({"plateau_window": 30}, "multiple of 20"),
        ({"label_map": "sixty"}, "sixty"),
        ({"mode": "bogus"}, "`mode` 'bogus': give 'map', 'vi', 'vcl' or 'finetune'"),
        ({"schedule": "bogus"}, "`schedule` 'bogus': give 'constant' or 'one_cycle'"),
        ({"lr": "3"}, "`lr` '3': give a number"),
        ({"width": 2.5}, "`width` 2.5: give a whole number"),
        ({"epochs": True}, "`epochs` True: give a whole number"),
        ({"stop_at_plateau": "yes"}, "`stop_at_plateau` 'yes': give True or False"),
        ({"dilations": 3}, "`dilations` 3: give a list"),
        ({"schedule": "one_cycle", "stop_at_plateau": True}, "`stop_at_plateau` True: one_cycle ends by itself"),
        ({"out": "{manifest}"}, "is a file; give a folder"),
        ({"out": "{manifest}/run"}, "not a writable folder|cannot be made"),
        ({"out": "{site}"}, "is not empty"),
        ({"out": "/proc/none/run"}, "/proc"),
        ({"device": "cuda"}, "finds no GPU"),
    ],
)
def test_bad_settings_are_refused_in_one_line_before_anything_is_made(
    settings, networks, site, tmp_path, changes, words
):
    if changes == {"device": "cuda"} and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    checkpoint = Path(networks["map"].name).with_name("checkpoint.safetensors")
    places = {
        "checkpoint": checkpoint,
        "vi": networks["vi"].name,
        "map": networks["map"].name,
        "site": site,
        "manifest": site / "manifest.csv",
    }
    changes = {key: value.format(**places) if isinstance(value, str) else value for key, value in changes.items()}
    with pytest.raises(InputError, match=words) as caught:
        train_network(replace(settings, **{"out": tmp_path / "run", **changes}))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_scans_without_labels_or_without_a_training_part_are_refused(settings, site, tmp_path):
    manifest = tmp_path / "manifest.csv"
    image, label = site / "sub-0_T1w.nii.gz", site / "sub-0_dseg.nii.gz"
    manifest.write_text(f"image,label\n{image},\n")
    with pytest.raises(InputError, match="has no label; training needs one"):
        train_network(replace(settings, data=manifest, out=tmp_path / "run"))
    manifest.write_text(f"image,label,split\n{image},{label},test\n")
    with pytest.raises(InputError, match="has no scan to train on"):
        train_network(replace(settings, data=manifest, out=tmp_path / "run"))


def test_without_held_out_scans_it_trains_and_reports_no_dice(settings, site, tmp_path):
    manifest = tmp_path / "manifest.csv"
    manifest.write_text(f"image,label,split\n{site}/sub-0_T1w.nii.gz,{site}/sub-0_dseg.nii.gz,train\n")
    train_network(replace(settings, data=manifest, out=tmp_path / "run", epochs=1))
    assert rows_of(tmp_path / "run")[0]["dice"] is None


def test_a_folder_that_holds_only_the_cache_is_empty(settings, tmp_path):
    (tmp_path / "run" / "cache").mkdir(parents=True)
    train_network(replace(settings, out=tmp_path / "run", epochs=1, cache_dir=None))
    assert list((tmp_path / "run" / "cache").iterdir())
