import subprocess
import sys

import pytest

PROGRAM = """
import sys
from dwc.cli import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
print(sorted({"torch", "nvflare", "pandas", "scipy"} & sys.modules.keys()))
"""


@pytest.mark.parametrize(
    "words",
    [
        ["consolidate"], ["posterior"], ["posterior", "audit"], ["federated"], ["federated", "amend"],
        ["federated", "simulate"], ["report"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_help_is_printed_without_the_heavy_libraries(words):
    run = [sys.executable, "-c", PROGRAM, *words, "--help"]
    said = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert "usage: dwc" in said
    assert said.splitlines()[-1] == "[]"
