"""What `make setup` installs: by hash where the lock was tried, of the constraints' versions everywhere. Releases."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

import dwc
import dwc_kernels

ROOT = Path(__file__).parents[1]
FILTER = "awk '/^[a-z]/"

needs_make = pytest.mark.skipif(not (shutil.which("make") and shutil.which("awk")), reason="needs make and awk")


def steps(folder: Path, interpreter: str) -> list[str]:
    """The commands of `make setup` under an interpreter that says it is this one."""
    python = folder / "python"
    python.write_text(f"#!/bin/sh\necho {interpreter}\n")
    python.chmod(0o755)
    words = ["make", "--dry-run", "--always-make", "setup", f"PYTHON={python}"]
    return subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()


@needs_make
def test_setup_installs_by_hash_where_the_lock_was_tried_and_by_version_elsewhere(tmp_path):
    tried = steps(tmp_path, "CPython 3.11 Linux x86_64")
    assert [line.split()[:4] for line in tried if "--require-hashes" in line] == [
        [".venv/bin/python", "-m", "pip", "install"]
    ]
    for other in ("CPython 3.12 Linux x86_64", "CPython 3.11 Darwin arm64", "PyPy 3.11 Linux x86_64"):
        assert steps(tmp_path, other) == [line for line in tried if "hashe" not in line and FILTER not in line]


@needs_make
def test_what_setup_installs_by_hash_is_the_lock_without_torch_and_cuda(tmp_path):
    (line,) = [line for line in steps(tmp_path, "CPython 3.11 Linux x86_64") if line.startswith(FILTER)]
    words = ["bash", "-c", line.split(" > ")[0]]
    hashed = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    left_out = set(pins((ROOT / "requirements.lock").read_text())) - set(pins(hashed))
    assert "torch==2.13.0" in left_out
    assert all(re.match(r"(torch|torchvision|nvidia-[a-z0-9-]+|cuda-[a-z]+)==", pin) for pin in left_out)


def test_the_lock_has_hashes_for_every_package_and_the_constraints_versions():
    locked = pins((ROOT / "requirements.lock").read_text())
    assert all(locked.values())
    constraints = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    for line in constraints:
        name, version = line.partition(";")[0].strip().split("==")
        assert f"{re.sub('[-_.]+', '-', name).lower()}=={version}" in locked


def test_the_version_stands_in_one_place_and_the_citation_and_changelog_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    latest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert {dwc.__version__, dwc_kernels.__version__, citation["version"], latest[1]} == {dwc.__version__}


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> tuple[Path, Path]:
    """A wheel and a source distribution of a copy of this tree, the wheel made from the source distribution."""
    folder = tmp_path_factory.mktemp("release")
    built = {".*", "build", "dist", "demo", "runs", "site", "*.egg-info"}
    left_out = shutil.ignore_patterns("__pycache__", *built)
    shutil.copytree(ROOT, folder / "tree", ignore=lambda at, names: left_out(at, names) if at == str(ROOT) else set())
    code = "import sys, setuptools.build_meta as b; getattr(b, 'build_' + sys.argv[1])(sys.argv[2])"

    def build(tree: Path, kind: str) -> Path:
        words = [sys.executable, "-W", "ignore", "-c", code, kind, str(folder)]
        subprocess.run(words, cwd=tree, check=True, capture_output=True)
        (made,) = folder.glob("*.whl" if kind == "wheel" else "*.tar.gz")
        return made

    source = build(folder / "tree", "sdist")
    with tarfile.open(source) as archive:
        archive.extractall(folder, filter="data")
    return build(folder / f"dwc-{dwc.__version__}", "wheel"), source


def test_the_wheel_holds_every_file_of_both_packages_and_the_licences(distributions):
    ours = {
        path.relative_to(ROOT).as_posix()
        for package in ("dwc", "dwc_kernels")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".md")
    }
    with zipfile.ZipFile(distributions[0]) as wheel:
        names = set(wheel.namelist())
    about = {name for name in names if ".dist-info/" in name}
    assert ours <= names
    assert {name.partition("/")[0] for name in names - about} == {"dwc", "dwc_kernels"}
    assert {f"dwc-{dwc.__version__}.dist-info/licenses/{name}" for name in ("LICENSE", "NOTICE")} <= about


def test_the_source_distribution_holds_the_tests_and_what_they_read(distributions):
    with tarfile.open(distributions[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("tests", "benchmarks", "docs", "examples")
    ours = {path.relative_to(ROOT).as_posix() for folder in folders for path in (ROOT / folder).rglob("*.[pmc][ydsn]*")}
    files = {"LICENSE", "NOTICE", "CHANGELOG.md", "CITATION.cff", "Makefile", "constraints.txt", "hubconf.py"}
    assert {name for name in ours if "__pycache__" not in name} | files <= names


def test_an_installed_wheel_runs_without_the_source_tree(distributions, tmp_path):
    """The libraries it needs are those of this environment, since PyTorch alone takes minutes to install."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    words = ("--python", python, "install", "--quiet", "--no-deps", "--no-index", distributions[0])
    said(sys.executable, "-m", "pip", *words, cwd=tmp_path)
    (site_packages,) = (tmp_path / "env" / "lib").glob("*/site-packages")
    libraries = [folder for folder in sys.path if folder.endswith("site-packages")]
    (site_packages / "libraries.pth").write_text("\n".join(libraries))
    code = "import dwc, dwc.data.labels as labels; print(dwc.__file__, labels.LabelMap.load('coarse').n_classes)"
    assert said(python, "-I", "-c", code, cwd=tmp_path) == f"{site_packages}/dwc/__init__.py 9"


@pytest.mark.release
@pytest.mark.parametrize("kind", ["*.whl", "*.tar.gz"])
def test_a_release_in_a_bare_environment_runs_the_demo(kind, tmp_path):
    """Of what `make dist` has made; what it needs comes from PyPI."""
    (release,) = (ROOT / "dist").glob(kind)
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    words = ("install", "--quiet", "--disable-pip-version-check", "-c", ROOT / "constraints.txt", f"{release}[study]")
    said(python, "-m", "pip", *words, cwd=tmp_path)
    assert said(python.with_name("dwc"), "--version", cwd=tmp_path) == f"dwc {dwc.__version__}"
    assert "Dice in %" in said(python.with_name("dwc"), "demo", "--preset", "smoke", "--out", "demo", cwd=tmp_path)
    assert (tmp_path / "demo" / "segmentation.png").stat().st_size > 10_000


def said(*words: object, cwd: Path) -> str:
    """What a program printed that does not find this source tree."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(word) for word in words], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def pins(text: str) -> dict[str, int]:
    """Number of hashes of each `name==version` of a lock."""
    found: dict[str, int] = {}
    for line in text.splitlines():
        if match := re.match(r"([a-z][^ ]*==[^ ]+)", line):
            pin = match[1]
            found[pin] = 0
        elif "--hash=sha256:" in line:
            found[pin] += 1
    return found
