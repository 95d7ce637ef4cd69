import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from dwc import __version__, cli
from dwc.base.files import load_tensors
from dwc.posterior import Posterior
from dwc.training import loop
from dwc.training.loop import train_network

pytest_plugins = ["tests.tiny_runs"]
pytestmark = pytest.mark.usefixtures("one_thread")


def start(*arguments) -> subprocess.Popen:
    """Start `dwc` as a user types it, except for the interpreter's path."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def dwc(*arguments) -> tuple[int, str, str]:
    process = start("dwc.cli", *arguments)
    out, error = process.communicate(timeout=120)
    return process.returncode, out, error


def flags_of(settings) -> list[str]:
    values = {name: value for name, value in settings.to_json().items() if value is not None}
    return [word for name, value in values.items() for word in (f"--{name}", json.dumps(value).strip('"'))]


def wait_for(path: Path, process: subprocess.Popen) -> None:
    until = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)


def same_weights_and_log(left: Path, right: Path) -> bool:
    tensors, others = (load_tensors(out / "posterior.safetensors")[0] for out in (left, right))
    logs = [
        [{**json.loads(line), "seconds": None} for line in (out / "log.jsonl").read_text().splitlines()]
        for out in (left, right)
    ]
    return logs[0] == logs[1] and all(torch.equal(tensors[name], others[name]) for name in tensors)


def test_help_and_version_name_the_commands_and_the_package(capsys):
    code, out, _ = dwc("--help")
    assert code == 0
    assert all(name in out for name in cli.COMMANDS)
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"dwc {__version__}\n"


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert f"usage: dwc {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sing"], "no command 'sing'; the commands are"),
        (["train"], "dwc: no data: give --data manifest.csv .* `make demo` or `dwc demo`"),
        (["train", "--mode", "magic"], "mode.*magic.*see dwc train --help"),
        (["train", "--width", "wide"], "dwc: --width wide: expected int; see dwc train --help"),
        (["train", "--dilations", "1,2"], r"dwc: --dilations 1,2: expected a list, such as \[1,1,2\]; see"),
        (["train", "--depth", "3"], "depth"),
        (["train", "--config", "none.yaml"], "none.yaml"),
        (["consolidate"], "prior|sites"),
        (["consolidate", "a.safetensors", "--prior", "p.safetensors", "--out", "c"], "ends in .safetensors"),
        (
            ["consolidate", "a.safetensors", "--prior", "p.safetensors", "--out", "c.safetensors"],
            "p.safetensors: no such",
        ),
    ],
)
def test_bad_arguments_are_one_line_on_stderr_and_exit_code_2(words, message, capsys):
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("dwc: ")
    assert re.search(message, captured.err)


def test_train_without_data_says_what_to_give_and_how_to_see_it_run():
    process = start("dwc.train")
    out, error = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert error.count("\n") == 1
    assert "--data manifest.csv" in error
    assert "make demo" in error


def test_train_prints_a_file_below_the_current_folder_by_its_relative_path(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *flags_of(replace(settings, epochs=1, out=Path("runs/map")))]) == 0
    assert capsys.readouterr().out == "runs/map/posterior.safetensors  (steps 2, no plateau seen)\n"


def test_flags_and_the_config_file_they_leave_give_the_same_run(settings, tmp_path):
    flags = flags_of(replace(settings, epochs=2, out=tmp_path / "flags"))
    code, out, error = dwc("train", *flags)
    assert code == 0, error
    assert out.startswith(str(tmp_path / "flags" / "posterior.safetensors"))
    assert re.search(r"loss \d+\.\d{4}, held-out Dice \d\.\d{3} at step \d", error)
    config = tmp_path / "flags" / "config.yaml"
    assert cli.main(["train", "--config", str(config), "--out", str(tmp_path / "config")]) == 0
    first, second = (Posterior.load(tmp_path / name / "posterior.safetensors") for name in ("flags", "config"))
    assert first.sha256 == second.sha256
    kept, again = (yaml.safe_load((tmp_path / name / "config.yaml").read_text()) for name in ("flags", "config"))
    assert {**kept, "out": None} == {**again, "out": None}


def test_after_kill_9_resume_ends_at_the_same_bits(settings, networks, tmp_path):
    vcl = replace(settings, mode="vcl", prior=Path(networks["vi"].name), epochs=8)
    killed = start("dwc.train", *flags_of(replace(vcl, out=tmp_path / "cut", workers=1)))
    wait_for(tmp_path / "cut" / "checkpoint.safetensors", killed)
    killed.kill()
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    _, header = load_tensors(tmp_path / "cut" / "checkpoint.safetensors")
    assert header["state"]["epoch"] < 8
    code, _, error = dwc("train", "--config", tmp_path / "cut" / "config.yaml", "--resume")
    assert code == 0, error
    train_network(replace(vcl, out=tmp_path / "whole"))
    assert same_weights_and_log(tmp_path / "cut", tmp_path / "whole")


def test_signals_end_a_run_with_their_codes_and_it_says_how_to_resume(settings, tmp_path):
    numbers = {signal.SIGTERM: 143, signal.SIGINT: 130}
    forever = replace(settings, epochs=10000, workers=1)
    runs = {number: start("dwc.train", *flags_of(replace(forever, out=tmp_path / number.name))) for number in numbers}
    for number, process in runs.items():
        wait_for(tmp_path / number.name / "checkpoint.safetensors", process)
        process.send_signal(number)
    for number, process in runs.items():
        _, error = process.communicate(timeout=60)
        assert process.returncode == numbers[number]
        last = error.splitlines()[-1]
        config = tmp_path / number.name / "config.yaml"
        assert f"stopped by {number.name} after step" in last
        assert last.endswith(f"resume with: dwc train --config {config} --resume")
        assert "Traceback" not in error
        load_tensors(tmp_path / number.name / "checkpoint.safetensors")


def test_a_signal_ends_the_demo_as_it_ends_training(tmp_path, monkeypatch, capsys):
    step = loop._Run._step

    def interrupted(run, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(run, *arguments)

    monkeypatch.setattr(loop._Run, "_step", interrupted)
    words = ["--grid_size", "32", "--voxel_size", "6.0", "--width", "2", "--dilations", "[1]", "--n_test", "1"]
    words += ["--n_train", '{"H": 1, "N": 1, "B": 1, "W": 1}', "--out", str(tmp_path / "demo")]
    assert cli.main(["demo", *words]) == 143
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("dwc: H MAP stopped by SIGTERM after step 1 of ")
    assert last.endswith("; the same command continues the study")


def test_consolidate_writes_a_prior_and_prints_each_sites_weight(networks, tmp_path):
    out = tmp_path / "c.safetensors"
    sites = [networks["a"].name, networks["b"].name]
    code, printed, error = dwc("consolidate", "--prior", networks["vi"].name, *sites, "--out", out)
    assert (code, error) == (0, "")
    assert Posterior.load(out).sha256 == networks["dwc"].sha256
    assert all(site in printed for site in sites)
    assert "layers.0.weight" in printed
    assert "2 sites, 6 volumes" in printed


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        (["a", "a"], "this site has been added already"),
        (["a", "map"], "a MAP network has no standard deviations"),
        (["a", "finetune"], "was trained from prior"),
        (["a", "cut"], "truncated or not a safetensors file"),
    ],
)
def test_a_site_that_does_not_fit_ends_consolidation_and_writes_nothing(networks, tmp_path, capsys, sites, message):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(Path(networks["a"].name).read_bytes()[:-9])
    paths = [str(cut) if site == "cut" else networks[site].name for site in sites]
    out = tmp_path / "c.safetensors"
    assert cli.main(["consolidate", "--prior", networks["vi"].name, *paths, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"dwc: {paths[-1]}: ")
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_a_full_disk_ends_training_in_one_line(settings, tmp_path, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # config.yaml fits, the first checkpoint does not
    try:
        code = cli.main(["train", *flags_of(replace(settings, width=16, out=tmp_path / "run"))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"dwc: .*(log\.jsonl|checkpoint\.safetensors): cannot be written", last)
    assert not list((tmp_path / "run").glob("*.safetensors"))
