"""Every block of code in the documentation: Python is run, commands are parsed by their own parser or run.

Pages in `RUN` are run from top to bottom, as a reader would, on tiny scans and networks. Elsewhere commands are only
parsed, as are those below `<!-- not run: REASON -->`.
"""

import argparse
import contextlib
import importlib
import io
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dwc import cli, layers_model
from dwc.commands import experiment
from dwc.data.grid import Grid
from dwc.posterior import Posterior
from dwc.simulation import scans
from dwc.training import loop
from dwc.training.settings import TrainSettings
from tests import made_models
from tests.documentation.pages import PAGES, ROOT, blocks

RUN = (
    "README.md", "docs/consortium.md", "docs/import.md", "docs/interfaces.md", "docs/lab.md", "docs/tutorial.md",
)  # fmt: skip
GRID = Grid(32, 6.0)
ELSEWHERE = ("cd", "git", "make", "nvflare", "openssl", "pip", "pytest", "source")  # not run: they act on the machine
pytest_plugins = ["tests.tiny_runs"]
pytestmark = pytest.mark.usefixtures("one_thread")


class Parsed(Exception):
    """Raised once a command has accepted its arguments."""


@pytest.fixture(scope="module", autouse=True)
def small():
    """Trainings of one step, simulated scans and imported networks of 32^3 voxels."""
    train, write_site = loop.train_network, scans.write_site

    def one_step(settings, **options):
        tiny = replace(settings, epochs=1, steps_per_epoch=1, batch_size=1, validation_sub_volumes=1, device="cpu")
        if settings.base is None:
            tiny = replace(tiny, grid_size=GRID.size, voxel_size=GRID.voxel_size, width=2, dilations=(1,))
        return train(tiny, **options)

    def few_scans(out_dir, site, n_train, n_test, **options):
        return write_site(out_dir, site, min(n_train, 2), min(n_test, 1), **{**options, "grid": GRID})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_network", one_step)
        patch.setattr(scans, "write_site", few_scans)
        patch.setattr(layers_model, "Grid", lambda: GRID)
        yield


@pytest.fixture(scope="module")
def stand_ins(small, one_thread, tmp_path_factory):
    """A folder with the files that the pages name."""
    folder = tmp_path_factory.mktemp("stand-ins")
    scans.write_site(folder, "H", 2, 1, grid=GRID)
    shutil.copy(folder / "H-000_T1w.nii.gz", folder / "scan.nii.gz")
    (folder / "scans").mkdir()
    shutil.copy(folder / "H-001_T1w.nii.gz", folder / "scans" / "1.nii.gz")
    for site in ("site", "oslo"):
        scans.write_site(folder / site, "N", 2, 1, grid=GRID)
    common = dict(cache_dir=folder / "cache", device="cpu")
    # As the pages train it, so that the q0 that a page trains has the same bits and goes with these sites.
    plain = TrainSettings(mode="map", data=folder / "manifest.csv", out=folder / "x/map", **common)
    loop.train_network(plain)
    start = folder / "x/map/posterior.safetensors"
    q0 = loop.train_network(replace(plain, mode="vi", init=start, out=folder / "x/q0"))
    q0.save(folder / "q0.safetensors")
    for seed, name in enumerate("abc"):
        generator = torch.Generator().manual_seed(seed)
        mu = {key: mean + 1e-4 * torch.randn(mean.shape, generator=generator) for key, mean in q0.mu.items()}
        sigma = {key: 0.9 * sigma_0 for key, sigma_0 in q0.sigma.items()}
        header = {**q0.metadata, "prior_sha256": q0.sha256}
        Posterior(mu, sigma, header).save(folder / f"{name}.safetensors")
    shutil.rmtree(folder / "x")
    for name, n_classes in (("model30chan50cls", 50), ("model5_gw_ae", 3)):
        layers = made_models.layers_of("elu")
        layers[-1] = made_models.conv("out", n_classes, 1)
        models = folder / "brainchop" / "public" / "models"
        models.mkdir(parents=True, exist_ok=True)
        made_models.write(models / name, layers)
    for subject in ("sub-01", "sub-02"):
        (folder / "bids" / subject / "anat").mkdir(parents=True)
        shutil.copy(folder / "scan.nii.gz", folder / "bids" / subject / "anat" / f"{subject}_T1w.nii.gz")
    (folder / "bids" / "dataset_description.json").write_text('{"Name": "two", "BIDSVersion": "1.10.0"}')
    shutil.copy(ROOT / "hubconf.py", folder)
    (folder / "dwc" / "data").mkdir(parents=True)
    shutil.copy(ROOT / "dwc" / "data" / "fifty_classes.tsv", folder / "dwc" / "data")
    return folder


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_every_block_of_a_page_runs(page, request, tmp_path, monkeypatch):
    whole = page in RUN
    if whole or any(block.language == "python" for block in blocks(page)):
        shutil.copytree(request.getfixturevalue("stand_ins"), tmp_path, dirs_exist_ok=True)
    if page == "docs/interfaces.md":  # other pages make this file
        shutil.copy(tmp_path / "q0.safetensors", tmp_path / "net.safetensors")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(block.text, page, "exec"), names)
            assert block.printed in (None, out.getvalue())
        elif block.language in ("", "bash", "console"):
            commands = list(block.commands())
            assert commands or not block.language, f"{page}: no known program in\n{block.text}"
            for command in commands:
                _check(command, is_run=whole and block.is_run)


def test_an_unknown_flag_in_a_page_is_found():
    with pytest.raises(AssertionError, match="no option --widht"):
        _check("dwc train --data m.csv --out run --widht 3", is_run=False)
    with pytest.raises(SystemExit):
        _check("python -m benchmarks.scaling --proceses 2", is_run=False)
    with pytest.raises(AssertionError):
        _check("make demonstration", is_run=False)
    with pytest.raises(AssertionError):
        _check("pytest -m published -k no_such_test", is_run=False)


def _check(command: str, *, is_run: bool) -> None:
    words = shlex.split(command, comments=True)
    while "=" in words[0]:
        words = words[1:]
    words = [file for word in words for file in (_expanded(word) if is_run else [word])]
    if words[0] == "torchrun":
        words = ["python", *words[words.index("-m") :]]
    program, *rest = words
    if program == "python" and rest[:2] in (["-m", "dwc.cli"], ["-m", "dwc.train"]):
        program, rest = "dwc", [*(["train"] if rest[1] == "dwc.train" else []), *rest[2:]]
    if program == "dwc":
        _run(rest) if is_run else _parse(rest)
    elif program == "python" and rest[0] == "-m" and rest[1].startswith("benchmarks."):
        _parse_benchmark(*rest[1:])
    elif program == "python" and rest[:2] == ["-m", "monai.bundle"]:
        return  # tests/export runs it
    elif program == "python" and rest[0].endswith(".py"):
        assert (ROOT / rest[0]).is_file(), command
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(rest) <= set(targets), command
    elif program == "pytest":
        _look_up_tests(rest)
    elif program == "pip":
        for extra in re.findall(r"\[(.+?)\]", command):
            assert f'"{extra}":' in (ROOT / "setup.py").read_text(), command
    elif is_run and program not in ELSEWHERE:
        subprocess.run(["bash", "-ec", command], check=True)


def _expanded(word: str) -> list[str]:
    matches = sorted(str(path) for path in Path().glob(word)) if "*" in word and not word.startswith("/") else []
    return matches or [word]


def _run(words: list[str]) -> None:
    out = io.StringIO()
    with contextlib.redirect_stderr(out), contextlib.redirect_stdout(out):
        code = cli.main(words)
    assert code == 0, f"dwc {shlex.join(words)}\n{out.getvalue()[-2000:]}"


def _parse(words: list[str]) -> None:
    """Let a command parse its arguments and make its settings, and stop there."""
    if words[0] in ("-h", "--help", "--version", "COMMAND"):
        return
    module = importlib.import_module(f"dwc.commands.{words[0]}")
    module = experiment if words[0] == "demo" else module
    parse = module.parse

    def parsed(*arguments):
        values = parse(*arguments)
        if words[0] == "train":
            TrainSettings(**{name: value for name, value in values.as_dict().items() if name != "resume"})
        if module is experiment:
            names = experiment.StudySettings.__dataclass_fields__
            experiment.StudySettings(**{name: value for name, value in values.as_dict().items() if name in names})
        raise Parsed

    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(out):
        patch.setattr(module, "parse", parsed)
        try:
            cli.main(words)
        except Parsed:
            return
    raise AssertionError(f"dwc {shlex.join(words)}\n{out.getvalue()}")


def _parse_benchmark(name: str, *words: str) -> None:
    module = importlib.import_module(name)
    parse = argparse.ArgumentParser.parse_args

    def parsed(*arguments, **options):
        parse(*arguments, **options)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parsed)
        patch.setattr(sys, "argv", [name, *words])
        with pytest.raises(Parsed):
            module.main()


def _look_up_tests(words: list[str]) -> None:
    """Markers, files and names of a pytest command exist."""
    markers = re.findall(r'^    "(\w+): ', (ROOT / "pyproject.toml").read_text(), re.M)
    paths = list((ROOT / "tests").rglob("test_*.py"))
    names = " ".join(name for path in paths for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M))
    for flag, value in zip(["", *words], words, strict=False):
        if flag == "-m":
            assert value in markers
        elif flag == "-k":
            assert value == "NAME" or value in names
        elif not value.startswith("-"):
            assert (ROOT / value.partition("::")[0]).exists(), value
