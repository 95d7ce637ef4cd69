"""Run the examples as a user would."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize(
    ("script", "arguments", "expected"),
    [
        ("train_converted_unet.py", ["--steps", "3"], "voxels right on new scans"),
        ("posterior_as_prior.py", ["--steps", "3"], "with yesterday's posterior as prior"),
        ("uncertain_volume.py", ["--steps", "3", "--samples", "3"], "drawn weights:"),
    ],
)
def test_an_example_runs(script, arguments, expected, tmp_path):
    path = os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    out = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, check=True, capture_output=True, text=True
    )
    assert expected in out.stdout
    assert "nan" not in out.stdout
