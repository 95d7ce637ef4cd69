"""Runs in several processes, started as a user starts them; each start takes seconds, so each test checks a lot."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dwc import cli
from dwc.base import launcher, ranks
from dwc.base.devices import choose_device
from dwc.base.errors import InputError
from dwc.base.files import load_tensors
from dwc.base.seeds import seed_of
from dwc.training import loop, specification
from dwc.training.loop import train_network
from dwc.training.settings import TrainSettings
from tests import rank_program

pytest_plugins = ["tests.tiny_runs"]
pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "tests" / "rank_program.py"


def torchrun(*words, n: int = 2) -> tuple[int, str, str]:
    """Run `torchrun` as a user types it, except for the interpreter's path."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
    process = subprocess.run(
        [*start, *map(str, words)], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    return process.returncode, process.stdout, process.stderr


def flags(settings: TrainSettings) -> list[str]:
    """The settings as command-line arguments."""
    values = {key: value for key, value in settings.to_json().items() if value is not None}
    return [word for key, value in values.items() for word in (f"--{key}", json.dumps(value).strip('"'))]


def ends_in(error: str, message: str) -> None:
    """Assert that the run printed exactly one line of ours, matching `message`."""
    lines = [line for line in re.split(r"[\r\n]+", error) if line.startswith("dwc: ")]
    assert len(lines) == 1, error
    assert re.search(message, lines[0])


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def exit_codes(error: str) -> set[int]:
    """The exit codes of the ranks, as torchrun reports them."""
    return {int(code) for code in re.findall(r"exitcode\s*: (-?\d+)", error)}


def test_the_loss_curve_is_that_of_one_process_and_a_run_goes_on_with_another_number(settings, tmp_path):
    run = replace(settings, batch_size=3, cache_dir=tmp_path / "cache")  # two sub-volumes on one rank, one on the other
    many = replace(run, out=tmp_path / "many", epochs=1)
    train_network(many)
    shutil.rmtree(tmp_path / "cache")
    many = replace(many, epochs=4)
    _, printed, error = torchrun(PROGRAM, "mishap", 6, "SIGTERM", 1, *flags(many), "--resume")
    assert printed == ""
    ends_in(error, r"stopped by SIGTERM after step 7 of 8; resume with: dwc train --config .*config\.yaml --resume")
    assert exit_codes(error) <= {143, -15}
    assert load_tensors(tmp_path / "many" / "checkpoint.safetensors")[1]["state"]["step"] == 7
    assert len(list((tmp_path / "cache").glob("*/image.npy"))) == 4
    train_network(many, resume=True)
    train_network(replace(run, out=tmp_path / "one", epochs=4))
    ours, theirs = rows_of(tmp_path / "many"), rows_of(tmp_path / "one")
    assert len(ours) == len(theirs) == 4
    for row, other in zip(ours, theirs, strict=True):
        for name in ("loss", "nll", "penalty", "dice", "dice_with_background"):
            assert row[name] == pytest.approx(other[name], rel=2e-6), name
    assert ours[-1]["loss"] < 0.9 * ours[0]["loss"]


def test_ranks_draw_noise_of_their_own_and_leave_the_gradient_of_the_whole_batch(settings, tmp_path):
    short = flags(replace(settings, mode="vi", batch_size=2, epochs=1, out=tmp_path / "run", validation_sub_volumes=0))
    code, _, error = torchrun(PROGRAM, "facts", tmp_path / "facts.safetensors", 3, 250, *short)
    assert code == 0, error
    tensors, facts = load_tensors(tmp_path / "facts.safetensors")
    assert facts["ranks"] == [0, 1]
    assert facts["means"] == ["0.5", "nan"]
    assert facts["seeds"] == [[seed_of(0, step, rank) for step in (0, 1)] for rank in (0, 1)]
    assert len(set(facts["digests"])) == 1

    two_ranks, one_rank, a_third = tensors["gradients"], rank_program.gradients(3, 250), rank_program.gradients(1, 250)
    torch.testing.assert_close(two_ranks[0], one_rank[0], rtol=1e-5, atol=1e-7)
    two_ranks, one_rank, a_third = two_ranks[1:], one_rank[1:], a_third[1:]
    noisy = one_rank.std(0) > 1e-4 * one_rank.abs().mean()
    standard_error = ((two_ranks.var(0) + one_rank.var(0)) / 250).sqrt()[noisy]
    assert noisy.sum() > 50
    assert ((two_ranks.mean(0) - one_rank.mean(0)).abs()[noisy] / standard_error).max() < 4.5
    # Three draws of the noise. If both ranks drew the same, (2 eps_1 + eps_2) / 3, the ratios would be 5/3 and 5/9.
    assert 0.8 < (two_ranks.var(0) / one_rank.var(0))[noisy].median() < 1.25
    assert 0.27 < (two_ranks.var(0) / a_third.var(0))[noisy].median() < 0.42


def test_a_killed_rank_ends_all_and_resuming_is_exact_to_the_bit(settings, tmp_path):
    run = replace(settings, mode="vi", batch_size=4, workers=1)
    whole, cut = flags(replace(run, out=tmp_path / "whole")), flags(replace(run, out=tmp_path / "cut"))
    code, printed, error = torchrun("-m", "dwc.train", *whole, n=3)
    assert code == 0, error
    assert printed == f"{tmp_path / 'whole' / 'posterior.safetensors'}  (steps 6, no plateau seen)\n"

    _, _, error = torchrun(PROGRAM, "mishap", 5, "SIGKILL", 0, *cut, n=3)
    remedy = "start it again, with --resume if it is a training run"
    ends_in(error, rf"the processes of this run have lost contact; {remedy} \(.*gloo")
    assert exit_codes(error) <= {2, -9, -15}
    assert load_tensors(tmp_path / "cut" / "checkpoint.safetensors")[1]["state"]["step"] == 4

    code, _, error = torchrun("-m", "dwc.train", *cut, "--resume", n=3)
    assert code == 0, error
    for name in ("posterior.safetensors", "checkpoint.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_ranks_that_outlive_their_launcher_keep_their_run_folder(settings, tmp_path, monkeypatch):
    run = replace(settings, batch_size=2, epochs=100_000, out=tmp_path / "run", cache_dir=tmp_path / "cache")
    launched = training_ranks(run, tmp_path / "log")
    launched.kill()
    launched.wait()
    orphans = processes_with(str(tmp_path / "run"))
    try:
        assert len(orphans) == 2
        with monkeypatch.context() as patch:
            patch.setattr(loop, "_WORKERS_END_S", 0.0)
            with pytest.raises(InputError, match="another dwc train is using it"):
                train_network(run, resume=True)
    finally:
        for pid in orphans:
            os.kill(pid, signal.SIGKILL)
    train_network(replace(run, epochs=1), resume=True)  # the lock was released with them


def test_a_signal_to_the_launcher_leaves_a_whole_checkpoint(settings, tmp_path):
    run = replace(settings, batch_size=2, epochs=100_000, out=tmp_path / "run", cache_dir=tmp_path / "cache")
    launched = training_ranks(run, tmp_path / "log")
    launched.send_signal(signal.SIGTERM)
    launched.wait(120)
    (line,) = re.findall(r"dwc: stopped by SIGTERM after step (\d+) of", (tmp_path / "log").read_text())
    assert load_tensors(tmp_path / "run" / "checkpoint.safetensors")[1]["state"]["step"] == int(line)
    assert not processes_with(str(tmp_path / "run"))


def training_ranks(run: TrainSettings, log: Path) -> subprocess.Popen:
    """torchrun with two ranks that have reached their first checkpoint."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "dwc.train"]
    with log.open("wb") as output:
        launched = subprocess.Popen([*words, *flags(run)], env=environment, cwd=ROOT, stdout=output, stderr=output)
    until = time.monotonic() + 240
    while not (run.out / "checkpoint.safetensors").exists():
        assert launched.poll() is None, log.read_text()
        assert time.monotonic() < until
        time.sleep(0.1)
    return launched


def processes_with(word: str) -> list[int]:
    """The processes started with this argument."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if word.encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


@pytest.mark.parametrize("cause", ["NCCL error in: x.cpp\nLast error: No space left on device", "[gloo] refused"])
def test_an_error_of_the_network_is_told_in_its_own_words(monkeypatch, cause):
    def fail(*arguments, **options):
        raise RuntimeError(f"{cause}\nException raised from {'a very long stack ' * 100}")

    monkeypatch.setattr(launcher, "processes", lambda: 2)
    monkeypatch.setattr(ranks.dist, "init_process_group", fail)
    with pytest.raises(InputError) as error, ranks.joined():
        pass
    assert " ".join(cause.split()) in str(error.value)
    assert len(str(error.value)) < 520


def test_a_scan_that_one_rank_cannot_read_ends_all_in_one_line(settings, site, tmp_path):
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes((site / "sub-1_T1w.nii.gz").read_bytes()[:-3000])
    rows = [f"{site}/sub-0_T1w.nii.gz,{site}/sub-0_dseg.nii.gz,train", f"{bad},{site}/sub-1_dseg.nii.gz,train"]
    (tmp_path / "m.csv").write_text("\n".join(["image,label,split", *rows]))
    run = replace(settings, data=tmp_path / "m.csv", batch_size=2, out=tmp_path / "run", cache_dir=None)
    code, printed, error = torchrun("-m", "dwc.train", *flags(run))
    assert (code, printed) == (1, "")
    ends_in(error, r"bad\.nii\.gz: truncated or damaged")
    assert 2 in exit_codes(error)
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"cache", ".lock"}


def test_ranks_share_the_scans_to_predict(networks, site, tmp_path, capsys):
    scans = [site / f"sub-{n}_T1w.nii.gz" for n in range(3)]
    words = ["predict", "--network", networks["vi"].name, *scans, "--picture", "false", "--n_samples", "2"]
    code, printed, error = torchrun("-m", "dwc.cli", *words, "--out", tmp_path / "many")
    assert code == 0, error
    assert cli.main([*map(str, words), "--out", str(tmp_path / "one")]) == 0
    alone = capsys.readouterr().out.replace(str(tmp_path / "one"), str(tmp_path / "many"))
    assert sorted(printed.splitlines()) == sorted(alone.splitlines())
    assert len(list((tmp_path / "one").iterdir())) == 3 * 5 + 5
    for path in (tmp_path / "one").iterdir():
        assert (tmp_path / "many" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("n_ranks", [1, 2, 3, 8])
def test_shares_are_disjoint_and_merge_to_what_was_shared(monkeypatch, n_ranks):
    monkeypatch.setattr(ranks, "world_size", lambda: n_ranks)
    parts = []
    for rank in range(n_ranks):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        parts.append(ranks.share(list(range(7))))
    assert ranks.merge(parts) == list(range(7))


def test_the_first_rank_draws_the_noise_of_one_process_and_the_others_theirs():
    assert seed_of(3, 5, 0) == seed_of(3, 5)
    assert len({seed_of(3, step, rank) for step in range(20) for rank in range(20)}) == 400


def test_a_batch_smaller_than_the_number_of_ranks_is_refused(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(specification, "world_size", lambda: 4)
    with pytest.raises(InputError, match="`batch_size` 3: less than one sub-volume for each of the 4 processes"):
        specification.resolve(replace(settings, batch_size=3, out=tmp_path / "run"))


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(launcher, "local_rank", lambda: 2)
    with pytest.raises(InputError, match="more processes than GPUs here; give --nproc-per-node=2"):
        choose_device("auto")
    assert choose_device("cpu").type == "cpu"


def test_a_command_that_runs_in_one_process_refuses_many(monkeypatch, capsys):
    monkeypatch.setattr(launcher, "processes", lambda: 2)
    monkeypatch.setattr(ranks, "say_once", print)
    assert cli.main(["evaluate"]) == 2
    assert capsys.readouterr().out == "dwc: dwc evaluate runs in one process; start it without torchrun\n"
