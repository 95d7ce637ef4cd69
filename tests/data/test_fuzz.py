"""The readers against mutated headers and compressed streams, in a process of 4 GiB; `fuzz_readers` tells how."""

import json
import subprocess
import sys

import pytest


def _run(count: int, seed: int) -> dict:
    words = [sys.executable, "-m", "tests.data.fuzz_readers", "--count", str(count), "--seed", str(seed)]
    process = subprocess.run(words, capture_output=True, text=True, timeout=7200, check=False)
    assert process.stdout, process.stderr
    return json.loads(process.stdout)


def _check(state: dict, count: int) -> None:
    assert state["failures"] == []
    assert sum(state["outcomes"].values()) == count
    assert min(state["outcomes"]["refused"], state["outcomes"]["read as nibabel reads it"]) > count / 5


def test_mutated_files_are_refused_in_one_line_or_read_right():
    _check(_run(300, 0), 300)


@pytest.mark.fuzz
def test_twenty_thousand_mutated_files_are_refused_in_one_line_or_read_right():
    _check(_run(20_000, 4), 20_000)
