"""What `make setup` installs: by hash where the lock was tried, of the constraints' versions everywhere."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

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
    assert all(re.match(r"(torch|nvidia-[a-z0-9-]+|cuda-[a-z]+)==", pin) for pin in left_out)


def test_the_lock_has_hashes_for_every_package_and_the_constraints_versions():
    locked = pins((ROOT / "requirements.lock").read_text())
    assert all(locked.values())
    constraints = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    for line in constraints:
        name, version = line.partition(";")[0].strip().split("==")
        assert f"{re.sub('[-_.]+', '-', name).lower()}=={version}" in locked


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
