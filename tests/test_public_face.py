"""The public interface: names, import costs, help, and errors in terms of parameters."""

import importlib
import inspect
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import dwc
import dwc_kernels
from dwc import cli

ROOT = Path(__file__).parents[1]


def run_python(code: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in an empty folder with the source tree on its path and, with -S, without site-packages."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, *options, "-c", code], env=variables, capture_output=True, text=True)


def test_import_dwc_works_from_a_source_tree_that_is_not_installed_and_imports_nothing_heavy(tmp_path):
    code = (
        "import sys, importlib.metadata as m; m.distribution = m.version = None; import dwc; print(dwc.__version__); "
        "print([n for n in ('torch', 'numpy', 'pandas', 'pydantic') if n in sys.modules])"
    )
    done = run_python(code, "-S")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == [dwc_kernels.__version__, "[]"]


@pytest.mark.parametrize("name", dwc.__all__)
def test_every_public_name_is_there_typed_and_documented(name):
    value = getattr(dwc, name)
    if callable(value):
        assert inspect.getdoc(value)
    if inspect.isfunction(value):
        hints = inspect.get_annotations(value)
        assert set(inspect.signature(value).parameters) | {"return"} <= set(hints)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'trainer'"):
        _ = dwc.trainer


def test_no_public_function_shares_the_name_of_a_module():
    for package in (dwc, dwc_kernels):
        found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        modules = {name.rpartition(".")[2] for _, name, _ in found if ".commands." not in name}
        functions = {name for name in package.__all__ if inspect.isfunction(getattr(package, name))}
        assert not functions & modules


@pytest.mark.parametrize("command", [None, *cli.COMMANDS])
def test_help_imports_no_heavy_library(command):
    words = [] if command is None else [command]
    code = (
        "import sys\nfrom dwc import cli\n"
        f"try: cli.main([*{words!r}, '--help'])\nexcept SystemExit: pass\n"
        "heavy = [n for n in ('torch', 'pandas', 'scipy', 'matplotlib', 'nibabel', 'numpy') if n in sys.modules]\n"
        "print('HEAVY', heavy)"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    heavy = done.stdout.rpartition("HEAVY ")[2].strip()
    assert heavy in ("[]", "['numpy']"), heavy


def test_the_trainer_imports_neither_pandas_nor_the_statistics_of_scipy():
    code = "import sys, dwc.training.loop; print([n for n in ('pandas', 'scipy.stats') if n in sys.modules])"
    done = run_python(code)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize(("module", "extra"), [("nvflare", "federated"), ("matplotlib", "study"), ("jinja2", "study")])
def test_a_missing_extra_is_one_line_that_names_it(module, extra, monkeypatch, capsys):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(importlib, "import_module", absent)
    assert cli.main(["experiment"]) == 2
    assert (
        capsys.readouterr().err == f"dwc: dwc experiment needs {module}: pip install '.[{extra}]' in the clone of dwc\n"
    )


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["trian"], "no command 'trian'; did you mean train?"),
        (["train", "--data", "m.csv", "--out", "r", "--widht", "3"], "no option --widht; did you mean --width?"),
        (["train", "--data", "m.csv", "--out", "r", "--batch-size", "0"], "--batch-size 0: give a positive number"),
        (["train", "--data", "m.csv", "--out", "r", "--batch_size=0"], "--batch-size 0: give a positive number"),
        (["train", "--data", "m.csv"], "--out must be given"),
        (["predict", "scan.nii.gz", "--out", "o"], "--network must be given (a network comes from dwc train, or"),
        (["train", "--data", "m.csv", "--out", "r", "--mode", "vcl"], "--mode vcl: needs a posterior"),
    ],
)
def test_bad_input_is_named_as_flags_on_the_command_line(words, line, capsys):
    assert cli.main(words) == 2
    assert capsys.readouterr().err.startswith(f"dwc: {line}")
