"""Facts of the machine code of the kernels with specialized warps, compiled for an sm_90 that need not be there."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, sys
from benchmarks.kernel_report_compile import asked_of_triton, compiled_facts, loops_with
from dwc_kernels.kernels.chips import CHIPS
from dwc_kernels.kernels.specialized.variant import candidates
from dwc_kernels.kernels.tiles import problem_of

facts = {}
for kind in ("forward", "grad_input"):
    problem = problem_of(kind, "bf16", 10, (32,) * 3, 96, 96, (3,) * 3)
    tile = candidates(problem, CHIPS["sm_90"])[0]
    found = compiled_facts(asked_of_triton(problem, tile, "sm_90"), "sm_90", {"num_warps": tile.warps})
    code = found.pop("code")["sass"]
    found["loops"] = {stem: loops_with(code, stem) for stem in ("HGMMA", "UTMALDG", "MUFU.SQRT")}
    facts[kind] = found
print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def facts():
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", ["forward", "grad_input"])
def test_ptxas_overlaps_the_matrix_instructions(facts, kind):
    assert not facts[kind]["serialized"]
    assert facts[kind]["matrix_opcode"].startswith("HGMMA.64x64x16.F32.BF16")
    assert facts[kind]["loop"]["matrix"] == 16  # mean and variance, wide and tail, of two planes and two steps
    assert facts[kind]["full_waits"] == 2  # eight are in flight at a time
    assert facts[kind]["barriers"] <= 4


@pytest.mark.parametrize("kind", ["forward", "grad_input"])
def test_loops_that_multiply_copy_or_draw_touch_no_local_memory(facts, kind):
    loops = facts[kind]["loops"]
    assert len(loops["HGMMA"]) == 2  # of the two groups of warps
    assert len(loops["UTMALDG"]) >= 1
    assert len(loops["MUFU.SQRT"]) == (1 if kind == "forward" else 0)
    for stem in ("HGMMA", "MUFU.SQRT"):
        assert all(not loop["local"] for loop in loops[stem])


def test_two_warps_draw_noise_in_a_short_loop(facts):
    (loop,) = facts["forward"]["loops"]["MUFU.SQRT"]
    assert loop["instructions"] < 200  # read from memory once, and not for every tile


def test_what_is_kept_on_the_stack_is_little(facts):
    assert all(fact["stack"] <= 128 for fact in facts.values())
    assert all(fact["shared"] <= 227 << 10 for fact in facts.values())
