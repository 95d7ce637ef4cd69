"""The facts of the compiled machine code that the kernels are built for, for the 96 -> 96, 3x3x3 layers of Table 1.

The report runs in a process of its own, because this one interprets.
"""

import json
import os
import subprocess
import sys

import pytest
from filelock import FileLock

CASES = [("sm_80", "bf16"), ("sm_90", "bf16"), ("sm_90", "tf32"), ("sm_100", "bf16"), ("sm_100", "tf32")]
KINDS = ("forward", "grad_input", "grad_weight")


@pytest.fixture(scope="session")
def report(tmp_path_factory, worker_id):
    """All facts, keyed by (arch, dtype, kind), as the command's JSON has them; compiled once."""
    shared = tmp_path_factory.getbasetemp() if worker_id == "master" else tmp_path_factory.getbasetemp().parent
    folder, facts = shared / "kernel_report", {}
    with FileLock(shared / "kernel_report.lock"):
        for arch in ("sm_80", "sm_90", "sm_100"):
            path = folder / f"{arch}.json"
            if not path.exists():
                command = [sys.executable, "-m", "benchmarks.kernel_report", "--layer", "conv2", "--arch", arch]
                command += ["--dtype", *(d for a, d in CASES if a == arch), "--dump", folder / arch, "--json", path]
                environment = os.environ | {"TRITON_INTERPRET": "0"}
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
                assert done.returncode == 0, done.stderr
                assert "Modelled, not measured" in done.stdout
            facts |= {(f["arch"], f["dtype"], f["kind"]): f for f in json.loads(path.read_text())["facts"]}
    facts["folder"] = folder
    return facts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("arch", "dtype"), CASES)
def test_nothing_is_spilled_and_local_memory_is_never_touched(report, arch, dtype, kind):
    fact = report[arch, dtype, kind]
    assert fact["spills"] == fact["stack"] == fact["local"] == fact["calls"] == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("arch", "dtype"), CASES)
def test_tensor_cores_multiply_in_every_main_loop(report, arch, dtype, kind):
    opcode = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}[arch]
    fact = report[arch, dtype, kind]
    assert fact["matrix_opcode"].startswith(opcode)
    assert fact["loop"]["matrix"] >= 4
    assert "matrix" in fact["loop"]


def test_ptxas_overlaps_the_matrix_instructions_of_sm_90(report):
    for dtype in ("bf16", "tf32"):
        for kind in KINDS:
            assert not report["sm_90", dtype, kind]["serialized"]


def test_the_input_box_is_loaded_once_for_both_products_and_all_filters(report):
    forward = report["sm_90", "bf16", "forward"]
    assert forward["tile"]["wide"] + forward["tile"]["tail"] == 96
    assert forward["loads"] == forward["tile"]["unroll"]  # one box per block of channels
    grad_input = report["sm_90", "bf16", "grad_input"]
    assert grad_input["tile"]["wide"] + grad_input["tile"]["tail"] == 96
    assert grad_input["loads"] == 2 * grad_input["tile"]["unroll"]  # one of g, one of r


@pytest.mark.parametrize(("kind", "limit"), [("forward", 0.8), ("grad_input", 1.0), ("grad_weight", 1.0)])
def test_main_loops_are_not_bound_by_instruction_issue(report, kind, limit):
    assert report["sm_90", "bf16", kind]["issue_ratio"] <= limit


def test_one_philox_block_serves_four_elements(report):
    """Of the 96 elements of a thread, 7 rounds of 2 wide products each per 4; the first round is partly constant."""
    sass = next((report["folder"] / "sm_90").glob("forward_sm_90_bf16_96x96x27.sass")).read_text()
    per_thread = 4 * 8 * 8 * 96 // 256
    assert sass.count("IMAD.HI.U32") + sass.count("IMAD.WIDE.U32") <= 1.25 * per_thread / 4 * 7 * 2


def test_dump_holds_ptx_cubin_and_sass(report):
    names = {p.suffix for p in (report["folder"] / "sm_90").iterdir()}
    assert names == {".ptx", ".cubin", ".sass"}


def test_the_share_of_taps_left_after_skipping_is_what_enumeration_says():
    from benchmarks.kernel_report import inside_share, visited_share

    assert visited_share((32, 32, 32), (4, 8, 8), 3, 1) == 1.0
    for dilation, inside in ((4, 0.77), (8, 0.58)):
        share = visited_share((32, 32, 32), (4, 8, 8), 3, dilation)
        assert inside - 0.01 < inside_share((32, 32, 32), 3, dilation) <= share <= 1.0
    assert visited_share((32, 32, 32), (4, 8, 8), 3, 8) == pytest.approx((5 / 6) ** 3)
