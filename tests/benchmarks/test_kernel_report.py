"""The facts of the compiled machine code that the kernels are built for, for first, middle and last layer of Table 1.

The report runs in processes of its own, because this one interprets.
"""

import json
import os
import subprocess
import sys

import pytest
from filelock import FileLock

from benchmarks.kernel_report import inside_share, layer_problem, visited_share
from benchmarks.shapes import LAYERS as NETWORK
from dwc_kernels.kernels.chips import CHIPS
from dwc_kernels.kernels.tiles import BARRIERS, choose, estimate, loop_issue

KINDS = ("forward", "grad_input", "grad_weight")
LAYERS = {
    ("sm_80", "bf16"): ("conv2",),
    ("sm_89", "bf16"): ("conv2",),
    ("sm_90", "bf16"): ("conv1", "conv2", "classes"),
    ("sm_90", "tf32"): ("conv2",),
    ("sm_100", "bf16"): ("conv1", "conv2", "classes"),
    ("sm_100", "tf32"): ("conv1", "conv2"),
}
LAYER_OF = {layer.name: layer for layer in NETWORK}
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


@pytest.mark.parametrize(("arch", "dtype"), [("sm_90", "bf16"), ("sm_80", "bf16")])
def test_a_strided_forward_spills_nothing(arch, dtype):
    program = (
        "import sys\nfrom benchmarks.kernel_report_compile import compile_kernel\n"
        "from dwc_kernels.kernels.chips import CHIPS\nfrom dwc_kernels.kernels.tiles import choose, problem_of\n"
        "arch, dtype = sys.argv[1:]\n"
        "problem = problem_of('forward', dtype, 10, (16,) * 3, 96, 96, (3,) * 3, (2,) * 3)\n"
        "c = compile_kernel(problem, choose(problem, CHIPS[arch]), arch)\n"
        "print(c.spills, c.stack, c.local, c.serialized)\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", program, arch, dtype]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "0 0 0 False\n", done.stderr


SMALL_KERNELS = """
import sys, torch
from benchmarks.kernel_report_compile import asked_by, compiled_facts
from dwc_kernels import kernels
from dwc_kernels.kernels.noise import normal

arch, dtype, channels = sys.argv[1], sys.argv[2], int(sys.argv[3])
of = dict(dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
x, g = (torch.zeros(1, c, 2, 8, 8, **of).to(memory_format=torch.channels_last_3d) for c in (channels, 96))
weight, bias = torch.zeros(96, channels, 3, 3, 3, **of), torch.zeros(96, **of)
one, seed = (1, 1, 1), torch.tensor(0)

def step():
    kernels.forward(x, weight, weight, bias, bias, one, one, one, 1, seed)
    kernels.grad_weight(g, g, x, weight, one, one, one, 1, bias_sigma=bias)
    kernels.grad_bias(g, g, bias)
    normal(g, seed)

for name, asked in sorted(asked_by(step, arch, dtype).items()):
    if name not in ("forward_kernel", "grad_weight_kernel"):
        facts = compiled_facts(asked, arch, {})
        print(name, facts["spills"], facts["stack"], facts["local"])
"""


@pytest.mark.parametrize("channels", [1, 96])  # folded and not
@pytest.mark.parametrize(("arch", "dtype"), [("sm_80", "bf16"), ("sm_90", "bf16"), ("sm_90", "tf32")])
def test_the_small_kernels_of_a_step_compile_and_spill_nothing(arch, dtype, channels):
    command = [sys.executable, "-c", SMALL_KERNELS, arch, dtype, str(channels)]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    names = ("grad_bias_kernel", "normal_kernel", "pack_kernel", "sum_kernel")
    assert done.stdout.splitlines() == [f"{name} 0 0 0" for name in names], done.stdout + done.stderr


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
        assert fact["loads"] == boxes


@pytest.mark.parametrize(
    ("arch", "dtype", "kind", "limit"),
    [
        ("sm_90", "bf16", "forward", 0.8),
        ("sm_90", "bf16", "grad_input", 1.0),
        ("sm_90", "bf16", "grad_weight", 1.0),
        ("sm_90", "tf32", "forward", 1.0),
        ("sm_90", "tf32", "grad_input", 1.1),
        ("sm_100", "bf16", "grad_weight", 1.1),
    ],
)
def test_main_loops_are_not_bound_by_instruction_issue(report, arch, dtype, kind, limit):
    assert report(arch, dtype, "conv2", kind)["issue_ratio"] <= limit


def test_one_philox_block_serves_four_elements(report):
    """Of the 96 elements of a thread, 7 rounds of 2 wide products each per 4; the first round is partly constant."""
    folder = report("sm_90", "bf16", "conv2", "forward")["folder"]
    sass = (folder / "forward_sm_90_bf16_96x96x27.sass").read_text()
    per_thread = 4 * 4 * 8 * 96 // 128
    assert sass.count("IMAD.HI.U32") + sass.count("IMAD.WIDE.U32") <= 1.25 * per_thread / 4 * 7 * 2


@pytest.mark.parametrize(("kind", "dtype"), [(kind, dtype) for kind in KINDS for dtype in ("bf16", "tf32")])
def test_tf32_is_rounded_by_the_instruction_that_keeps_nan(report, kind, dtype):
    folder = report("sm_90", dtype, "conv2", kind)["folder"]
    ptx = (folder / f"{kind}_sm_90_{dtype}_96x96x27.ptx").read_text()
    assert ("cvt.rna.tf32.f32" in ptx) == (dtype == "tf32")
    assert "-8192" not in ptx  # the mask of a rounding by hand


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("arch", "dtype", "layer"), CASES)
def test_the_model_of_shared_memory_agrees_with_the_compiler(report, arch, dtype, layer, kind):
    fact = report(arch, dtype, layer, kind)
    assert 0 <= fact["shared"] - fact["shared_model"] <= BARRIERS


def test_waits_and_barriers_of_the_main_loops_are_counted(report):
    for kind in KINDS:
        fact = report("sm_90", "bf16", "conv2", kind)
        # Products of two blocks wait for all in flight; squares of one do not.
        assert (0 < fact["full_waits"] <= 4) if kind != "forward" else fact["full_waits"] == 0
        assert 0 < fact["barriers"] <= 9


def test_the_report_s_times_are_the_estimate_with_the_compiled_instructions():
    problem = layer_problem(LAYER_OF["conv2"], "forward", "bf16")
    chip, tile = CHIPS["sm_90"], choose(problem, CHIPS["sm_90"])
    usual = estimate(problem, tile, chip)
    assert estimate(problem, tile, chip, issue=loop_issue(problem, tile)) == usual
    assert estimate(problem, tile, chip, issue=10 * loop_issue(problem, tile))["total"] > usual["total"]
    # The model lets the forward multiply no faster than bf16 products were measured to run.
    flops = 4 * LAYER_OF["conv2"].macs * 10 * 32**3
    assert flops / (usual["total"] / chip.clock) < 795e12


def test_dump_holds_ptx_cubin_and_sass(report):
    folder = report("sm_90", "bf16", "conv2", "forward")["folder"]
    assert {p.suffix for p in folder.iterdir()} == {".ptx", ".cubin", ".sass", ".json"}


def test_the_share_of_taps_left_after_skipping_is_what_enumeration_says():
    assert visited_share((32, 32, 32), (4, 8, 8), 3, 1) == 1.0
    for dilation, inside in ((4, 0.77), (8, 0.58)):
        share = visited_share((32, 32, 32), (4, 8, 8), 3, dilation)
        assert inside - 0.01 < inside_share((32, 32, 32), 3, dilation) <= share <= 1.0
    assert visited_share((32, 32, 32), (4, 8, 8), 3, 8) == pytest.approx((5 / 6) ** 3)
