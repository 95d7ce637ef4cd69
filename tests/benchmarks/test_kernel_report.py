"""The facts of the compiled machine code that the kernels are built for, for first, middle and last layer of Table 1.

The report runs in processes of its own, because this one interprets.
"""

import json
import os
import subprocess
import sys

import pytest
from filelock import FileLock

from benchmarks.kernel_report import inside_share, visited_share

KINDS = ("forward", "grad_input", "grad_weight")
LAYERS = {
    ("sm_80", "bf16"): ("conv2",),
    ("sm_89", "bf16"): ("conv2",),
    ("sm_90", "bf16"): ("conv1", "conv2", "classes"),
    ("sm_90", "tf32"): ("conv2",),
    ("sm_100", "bf16"): ("conv1", "conv2", "classes"),
    ("sm_100", "tf32"): ("conv1", "conv2"),
}
CASES = [(arch, dtype, layer) for (arch, dtype), layers in LAYERS.items() for layer in layers]


@pytest.fixture(scope="session")
def report(tmp_path_factory, worker_id):
    """A function that returns one fact sheet of the command's JSON; each arch and dtype is compiled once."""
    shared = tmp_path_factory.getbasetemp() if worker_id == "master" else tmp_path_factory.getbasetemp().parent

    def facts(arch: str, dtype: str, layer: str, kind: str) -> dict:
        folder = shared / "kernel_report" / f"{arch}_{dtype}"
        path = folder / "facts.json"
        with FileLock(shared / f"{arch}_{dtype}.lock"):
            if not path.exists():
                command = [sys.executable, "-m", "benchmarks.kernel_report", "--arch", arch, "--dtype", dtype]
                command += ["--layer", *LAYERS[arch, dtype], "--dump", folder, "--json", path]
                environment = os.environ | {"TRITON_INTERPRET": "0"}
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
                assert done.returncode == 0, done.stderr
                assert "Modelled, not measured" in done.stdout
        found = json.loads(path.read_text())["facts"]
        (fact,) = (f for f in found if f["kind"] == kind and layer in f["layers"])
        return fact | {"folder": folder}

    return facts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("arch", "dtype", "layer"), CASES)
def test_nothing_is_spilled_and_local_memory_is_never_touched(report, arch, dtype, layer, kind):
    fact = report(arch, dtype, layer, kind)
    assert fact["spills"] == fact["stack"] == fact["local"] == fact["calls"] == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("arch", "dtype", "layer"), CASES)
def test_tensor_cores_multiply_in_every_main_loop(report, arch, dtype, layer, kind):
    opcode = {"sm_80": "HMMA", "sm_89": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}[arch]
    fact = report(arch, dtype, layer, kind)
    assert fact["matrix_opcode"].startswith(opcode)
    assert fact["loop"]["matrix"] >= 4


@pytest.mark.parametrize("kind", KINDS)
def test_programs_fit_the_99_kb_of_desktop_and_inference_chips(report, kind):
    assert report("sm_89", "bf16", "conv2", kind)["shared"] <= 99 << 10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "layer"), [(d, layer) for a, d, layer in CASES if a == "sm_90"])
def test_ptxas_overlaps_the_matrix_instructions_of_sm_90(report, dtype, layer, kind):
    assert not report("sm_90", dtype, layer, kind)["serialized"]


def test_the_input_box_is_loaded_once_for_both_products_and_all_filters(report):
    for kind, boxes in (("forward", 1), ("grad_input", 2)):  # of x; of g and r
        fact = report("sm_90", "bf16", "conv2", kind)
        assert fact["tile"]["wide"] + fact["tile"]["tail"] == 96
        assert fact["loads"] == boxes * fact["tile"]["unroll"]  # one per block of channels


@pytest.mark.parametrize(
    ("arch", "dtype", "kind", "limit"),
    [
        ("sm_90", "bf16", "forward", 0.8),
        ("sm_90", "bf16", "grad_input", 1.0),
        ("sm_90", "bf16", "grad_weight", 1.0),
        ("sm_90", "tf32", "forward", 1.0),
        ("sm_90", "tf32", "grad_input", 1.0),
        ("sm_100", "bf16", "grad_weight", 1.0),
    ],
)
def test_main_loops_are_not_bound_by_instruction_issue(report, arch, dtype, kind, limit):
    assert report(arch, dtype, "conv2", kind)["issue_ratio"] <= limit


def test_one_philox_block_serves_four_elements(report):
    """Of the 96 elements of a thread, 7 rounds of 2 wide products each per 4; the first round is partly constant."""
    folder = report("sm_90", "bf16", "conv2", "forward")["folder"]
    sass = (folder / "forward_sm_90_bf16_96x96x27.sass").read_text()
    per_thread = 4 * 8 * 8 * 96 // 256
    assert sass.count("IMAD.HI.U32") + sass.count("IMAD.WIDE.U32") <= 1.25 * per_thread / 4 * 7 * 2


def test_dump_holds_ptx_cubin_and_sass(report):
    folder = report("sm_90", "bf16", "conv2", "forward")["folder"]
    assert {p.suffix for p in folder.iterdir()} == {".ptx", ".cubin", ".sass", ".json"}


def test_the_share_of_taps_left_after_skipping_is_what_enumeration_says():
    assert visited_share((32, 32, 32), (4, 8, 8), 3, 1) == 1.0
    for dilation, inside in ((4, 0.77), (8, 0.58)):
        share = visited_share((32, 32, 32), (4, 8, 8), 3, dilation)
        assert inside - 0.01 < inside_share((32, 32, 32), 3, dilation) <= share <= 1.0
    assert visited_share((32, 32, 32), (4, 8, 8), 3, 8) == pytest.approx((5 / 6) ** 3)
