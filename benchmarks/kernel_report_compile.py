"""Compile a kernel for a chip that is not there and read the facts off the machine code. No GPU, no driver.

The real launcher runs, on a volume of a few voxels, up to the point where Triton would compile: types, constants and
what is known of the arguments are those of a call on the GPU.
"""

import contextlib
import io
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction, jit
from triton.runtime.driver import driver

from dwc_kernels import kernels
from dwc_kernels.kernels import launch
from dwc_kernels.kernels.chips import CHIPS, WARP
from dwc_kernels.kernels.tiles import Problem, Tile

__all__ = [
    "Asked",
    "Compiled",
    "asked_by",
    "asked_of_triton",
    "compile_kernel",
    "compiled_facts",
    "loops_with",
    "run_tool",
]

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
}
MATRIX = ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA", "UTCMMA", "QGMMA")
CLASSES = {
    "matrix": MATRIX,
    "copy": ("UTMALDG", "UTMASTG", "LDGSTS", "LDGDEPBAR", "UTCBAR", "LDG"),
    "shared": ("LDSM", "LDS", "STS", "STSM"),
    "tensor memory": ("LDTM", "STTM", "UTCCP"),
    "local": ("LDL", "STL"),
    "float": ("HMUL2", "HFMA2", "FMUL", "FADD", "FFMA", "MUFU", "F2FP", "F2F"),
    "branch": ("BRA", "BSSY", "BSYNC", "EXIT", "WARPSYNC", "NANOSLEEP"),
    "wait": ("BAR", "SYNCS", "DEPBAR", "WARPGROUP", "CCTL", "FENCE", "MEMBAR", "ERRBAR"),
}


@dataclass(frozen=True)
class Compiled:
    """One compiled kernel: facts from the compiler and the disassembly."""

    kind: str
    arch: str
    dtype: str
    tile: Tile
    registers: int
    spills: int  # bytes stored plus loaded, static
    stack: int  # bytes
    shared: int  # bytes
    serialized: bool  # ptxas gave up overlapping matrix instructions
    full_waits: int  # per iteration: waits of sm_90 for every matrix instruction in flight
    barriers: int  # per iteration: barriers of all warps of a program
    local: int  # instructions on local memory, anywhere in the kernel
    calls: int  # of slow paths; the traps that guard tensor memory are none
    loop: dict[str, int] = field(repr=False)  # instructions of the main loop by class
    loop_instructions: int
    elected: int  # of them, those that one warp runs and the others jump over
    matrix_opcode: str
    loads: int  # of boxes of voxels per iteration, by the copy engine
    code: dict[str, str | bytes] = field(repr=False)  # "ptx", "cubin", "sass"

    @property
    def resident_warps(self) -> int:
        """Warps that share a multiprocessor, by registers and by shared memory."""
        chip = CHIPS[self.arch]
        by_registers = 65536 // (self.tile.warps * WARP * -(-self.registers // 8) * 8)
        return max(1, min(by_registers, chip.shared // max(1, self.shared + 1024))) * self.tile.warps


class Asked(NamedTuple):
    """What a launcher's call asks Triton to compile."""

    function: JITFunction
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]  # such as divisibility by 16


class _Offline:
    """In place of Triton's driver: a device of the wanted chip, on which nothing can run."""

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def get_current_device(self) -> str:
        return self.arch

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.arch]


def asked_by(call: Callable[[], Any], arch: str, dtype: str) -> dict[str, Asked]:
    """What Triton would compile when launchers are called, by the names of the kernels."""
    seen: dict[str, Asked] = {}

    def remember(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        found = fn.jit_function
        seen[found.fn.__name__] = Asked(found, compile["signature"], compile["constants"], compile["configs"][0])
        return True  # neither compile nor launch

    with (
        mock.patch.object(launch, "chip_of", return_value=CHIPS[arch]),
        mock.patch.object(launch, "operand_dtype", return_value=dtype),
        mock.patch.object(launch, "why_not_triton", return_value=None),
        mock.patch.object(knobs.runtime, "jit_cache_hook", remember),
        mock.patch.object(jit, "serialize_specialization_data", return_value=""),  # for hooks, as JSON; unused here
        mock.patch.object(driver, "_active", _Offline(arch)),
    ):
        call()
    return seen


def asked_of_triton(problem: Problem, tile: Tile, arch: str, *, bias: bool = True) -> Asked:
    """What Triton would compile for a problem."""
    channels, filters = problem.channels, problem.columns
    if problem.kind == "grad_input":
        channels, filters = filters, channels
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(problem.dtype, torch.float32)
    size = (1, 1, 4 + problem.size[2] % 4)
    x = torch.zeros(1, channels, *(n * s for n, s in zip(size, problem.stride, strict=True)), dtype=dtype)
    g = torch.zeros(1, filters, *size, dtype=dtype)
    weight = torch.zeros(filters, channels, *problem.kernel, dtype=dtype)
    biases = [torch.zeros(filters, dtype=dtype)] * 2 if bias else [None] * 2
    geometry: tuple[Any, ...] = (problem.stride, tuple(k // 2 for k in problem.kernel), (1, 1, 1), 1)
    call: Callable[[], Any] = {
        "forward": lambda: kernels.forward(x, weight, weight, *biases, *geometry, torch.tensor(0), tile=tile),
        "grad_input": lambda: kernels.grad_input(g, g, x, weight, weight, *geometry, tile=tile),
        "grad_weight": lambda: kernels.grad_weight(g, g, x, weight, *geometry, bias_sigma=biases[0], tile=tile),
    }[problem.kind]
    return asked_by(call, arch, problem.dtype)[f"{problem.kind}_kernel"]


def compile_kernel(problem: Problem, tile: Tile, arch: str, *, bias: bool = True) -> Compiled:
    """Compile one kernel for one chip."""
    asked = asked_of_triton(problem, tile, arch, bias=bias)
    facts = compiled_facts(asked, arch, {"num_warps": tile.warps, "num_stages": tile.stages})
    return Compiled(problem.kind, arch, problem.dtype, tile, **facts)


def compiled_facts(asked: Asked, arch: str, options: dict[str, int]) -> dict[str, Any]:
    """Compile what Triton is asked; what assembler and disassembly say of it, by the names of `Compiled`."""
    if asked.function.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as Source
    else:
        Source = ASTSource
    source, log = Source(*asked), io.StringIO()
    with mock.patch.object(knobs.nvidia, "dump_ptxas_log", True), contextlib.redirect_stdout(log):
        compiled = triton.compile(source, target=TARGETS[arch], options=options)
    said = log.getvalue() or _assembled_again(compiled.asm["ptx"])
    return {"shared": compiled.metadata.shared, **_assembler_facts(said), **_code_facts(compiled.asm)}


def run_tool(tool: str, *arguments: str) -> str:
    """What a tool of Triton's wheel prints."""
    binary = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    done = subprocess.run([str(binary), *arguments], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def _assembled_again(ptx: str) -> str:
    """What ptxas says of a kernel that Triton found in its cache, called as Triton calls it."""
    target = re.search(r"\.target (\w+)", ptx)[1]
    assembler = "ptxas-blackwell" if target.startswith("sm_1") else "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        return run_tool(
            assembler,
            "-v",
            "--regAllocOptLevel=2",
            f"--gpu-name={target}",
            str(path),
            "-o",
            str(path.with_suffix(".o")),
        )


def _assembler_facts(said: str) -> dict[str, Any]:
    """Registers, stack and spills, as ptxas prints them."""
    frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    return {
        "registers": int(re.search(r"Used (\d+) registers", said)[1]),
        "stack": int(frame[1]),
        "spills": int(frame[2]) + int(frame[3]),
        "serialized": "wgmma.mma_async instructions are serialized" in said,
    }


def _code_facts(code: Any) -> dict[str, Any]:
    """The code itself, and what the disassembly of the cubin shows."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(code["cubin"])
        sass = run_tool("nvdisasm", "-c", str(cubin))
    return {"code": {"ptx": code["ptx"], "cubin": code["cubin"], "sass": sass}, **_loop_facts(*_listing(sass))}


def _listing(sass: str) -> tuple[list[str], dict[str, int]]:
    """The instructions of a disassembly in order, and where each label stands among them."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if found := re.match(r"^(\.L\w+):", line):
            labels[found[1]] = len(instructions)
        elif found := re.match(r"^\s+/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
            instructions.append(found[1])
    return instructions, labels


def _opcode(instruction: str) -> str:
    """The operation without its predicate and modifiers."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]


def _is(opcode: str, names: tuple[str, ...]) -> bool:
    """Whether an opcode is one of a class, by its stem."""
    return opcode.split(".")[0] in names


def _backward_branches(instructions: list[str], labels: dict[str, int]) -> list[range]:
    """The lines from the target of every backward branch to the branch."""
    spans = []
    for end, text in enumerate(instructions):
        found = re.search(r"\bBRA\b.*`\((\.L\w+)\)", text)
        if found and labels.get(found[1], end + 1) <= end:
            spans.append(range(labels[found[1]], end + 1))
    return spans


def loops_with(sass: str, opcode: str) -> list[dict[str, int]]:
    """The innermost loops with an instruction: how many instructions they have, and how many on local memory."""
    instructions, labels = _listing(sass)
    opcodes = [_opcode(t) for t in instructions]
    spans = _backward_branches(instructions, labels)
    # Waits jump out of line and back into the middle of a loop.
    spans = [s for s in spans if not any(o.start < s.start < o.stop < s.stop for o in spans)]
    spans = [s for s in spans if any(o.startswith(opcode) for o in opcodes[s.start : s.stop])]
    inner = [s for s in spans if not any(o != s and s.start <= o.start and o.stop <= s.stop for o in spans)]
    local = [sum(_is(o, CLASSES["local"]) for o in opcodes[s.start : s.stop]) for s in inner]
    return [{"instructions": len(s), "local": n} for s, n in zip(inner, local, strict=True)]


def _loop_facts(instructions: list[str], labels: dict[str, int]) -> dict[str, Any]:
    """The main loop by class of instruction: the shortest backward branch that spans the matrix instructions."""
    spans = _backward_branches(instructions, labels)
    is_matrix = [_is(_opcode(t), MATRIX) for t in instructions]
    counts = [sum(is_matrix[s.start : s.stop]) for s in spans]
    # Waits jump out of line and back, around more than the loop; a peeled first iteration may be among it.
    lines = min((s for s, n in zip(spans, counts, strict=True) if 2 * n >= max(counts) > 0), key=len, default=range(0))
    span = instructions[lines.start : lines.stop]
    # On sm_100 one warp issues matrix instructions, and the others jump over them by a uniform branch.
    elected = 0
    for start in lines:
        found = re.search(r"\bBRA\.U\b.*`\((\.L\w+)\)", instructions[start])
        if found and start < labels[found[1]] <= lines.stop and any(is_matrix[start : labels[found[1]]]):
            elected += labels[found[1]] - start - 1
    classes: Counter[str] = Counter()
    for text in span:
        classes[next((name for name, stems in CLASSES.items() if _is(_opcode(text), stems)), "integer, moves")] += 1
    matrix = Counter(re.split(r"[\s]", _opcode(t))[0] for t in span if _is(_opcode(t), MATRIX))
    everywhere = [_opcode(t) for t in instructions]
    return {
        "loop": dict(classes.most_common()),
        "loop_instructions": len(span),
        "elected": elected,
        "full_waits": sum(bool(re.search(r"WARPGROUP\.DEPBAR.*gsb0, 0x0", t)) for t in span),
        "barriers": sum(_opcode(t).startswith("BAR.SYNC") for t in span),
        "matrix_opcode": matrix.most_common(1)[0][0] if matrix else "",
        "loads": sum("UTMALDG.5D" in t for t in span),
        "local": sum(_is(o, CLASSES["local"]) for o in everywhere),
        "calls": sum(bool(re.search(r"CALL.*__internal(?!.*guardrail)", t)) for t in instructions),
    }
