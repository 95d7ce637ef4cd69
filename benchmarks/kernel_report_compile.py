"""Compile a kernel for a chip that is not there and read the facts off the machine code. No GPU, no driver.

The signature is the launcher's: the same descriptors, pointers and constants that a call on the GPU would compile for.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dwc_kernels.kernels.forward import forward_kernel
from dwc_kernels.kernels.grad_input import grad_input_kernel
from dwc_kernels.kernels.grad_weight import grad_weight_kernel
from dwc_kernels.kernels.launch import loop_constants
from dwc_kernels.kernels.tiles import CHIPS, STACKED_ROWS, Problem, Tile

__all__ = ["Compiled", "compile_kernel"]

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
KERNELS = {"forward": forward_kernel, "grad_input": grad_input_kernel, "grad_weight": grad_weight_kernel}
MATRIX = ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA", "UTCMMA", "QGMMA", "v_mfma")
CLASSES = {
    "matrix": MATRIX,
    "copy": ("UTMALDG", "UTMASTG", "LDGSTS", "LDGDEPBAR", "UTCBAR", "LDG", "global_load", "buffer_load"),
    "shared": ("LDSM", "LDS", "STS", "STSM", "ds_"),
    "tensor memory": ("LDTM", "STTM", "UTCCP"),
    "local": ("LDL", "STL", "scratch_"),
    "float": ("HMUL2", "HFMA2", "FMUL", "FADD", "FFMA", "MUFU", "F2FP", "v_mul_f", "v_pk_mul", "v_cvt", "v_fma"),
    "branch": ("BRA", "BSSY", "BSYNC", "EXIT", "WARPSYNC", "NANOSLEEP", "s_cbranch", "s_branch"),
    "wait": ("BAR", "SYNCS", "DEPBAR", "WARPGROUP", "CCTL", "FENCE", "MEMBAR", "ERRBAR", "s_waitcnt", "s_barrier"),
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
    local: int  # instructions on local memory, anywhere in the kernel
    calls: int  # of slow paths; the traps that guard tensor memory are none
    loop: dict[str, int] = field(repr=False)  # instructions of the main loop by class
    loop_instructions: int
    matrix_opcode: str
    loads: int  # of boxes of voxels per iteration, by the copy engine
    code: dict = field(repr=False)  # "ptx", "cubin", "sass" or "amdgcn"

    @property
    def resident_warps(self) -> int:
        """Warps that share a multiprocessor, by registers and by shared memory."""
        chip = CHIPS[self.arch]
        per_program = self.tile.warps * chip.warp * -(-self.registers // 8) * 8
        by_registers = (65536 if chip.warp == 32 else 131072) // per_program
        return max(1, min(by_registers, chip.shared // max(1, self.shared + 1024))) * self.tile.warps


def compile_kernel(problem: Problem, tile: Tile, arch: str, *, bias: bool = True) -> Compiled:
    """Compile one kernel for one chip."""
    kernel = KERNELS[problem.kind]
    signature, constants, attributes = launch_signature(problem, tile, arch, bias)
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    compiled = triton.compile(source, target=TARGETS[arch], options=options)
    facts = _nvidia_facts(compiled) if TARGETS[arch].backend == "cuda" else _amd_facts(compiled)
    return Compiled(problem.kind, arch, problem.dtype, tile, shared=compiled.metadata.shared, **facts)


def launch_signature(problem: Problem, tile: Tile, arch: str, bias: bool):
    """Types of the arguments, the constants, and which of them are multiples of 16, as the launcher passes them."""
    kernel = KERNELS[problem.kind]
    dtype = {"tf32": "fp32", "ieee": "fp32"}.get(problem.dtype, problem.dtype)
    how = problem.dtype if problem.dtype in ("tf32", "ieee") else "tf32"
    squares = "bf16" if dtype == "bf16" else "fp32"
    box = ", ".join(map(str, (1, *tile.box)))
    constants = dict(zip(("KD", "KH", "KW"), problem.kernel, strict=True), PRECISION=how, ARCH=arch)
    if problem.kind == "grad_weight":
        constants |= dict(zip(("BD", "BH", "BW"), tile.box, strict=True), N0=tile.wide, N1=tile.tail)
        constants["C_BLOCKS"] = -(-problem.channels // 32)
        types = {"x_desc": f"tensordesc<{dtype}[{box}, 32]>"}
        for suffix, n in (("", tile.wide), ("_tail", tile.tail)):
            types |= {f"{t}{suffix}_desc": f"tensordesc<{dtype}[{box}, {n}]>" if n else None for t in "gr"}
            types[f"out{suffix}_desc"] = f"tensordesc<fp32[1, {STACKED_ROWS}, {n}]>" if n else None
    else:
        names = ("BD", "BH", "BW", "BC", "C_BLOCKS", "C_STEPS", "N0", "N1")
        constants |= dict(zip(names, loop_constants(tile, problem.channels), strict=True), CHUNK=tile.chunk)
        types = {f"{t}_desc": f"tensordesc<{dtype}[{box}, {tile.channels}]>" for t in "xgr"}
        for suffix, n in (("", tile.wide), ("_tail", tile.tail)):
            for t, kind in (("mu", dtype), ("var", squares)):
                types[f"{t}{suffix}_desc"] = f"tensordesc<{kind}[1, {n}, {tile.channels}]>" if n else None
        types |= dict.fromkeys(("x", "dx", "y", "r"), f"*{dtype}") | {"seed": "*i64"}
        types |= dict.fromkeys(("bias_mu", "bias_sigma"), f"*{dtype}" if bias else None)
        if problem.kind == "forward":
            constants["ALIGNED"] = problem.size[2] % 4 == 0
    if arch in ("sm_80", "gfx942"):  # no copy engine for tensors: pointers
        types = {n: re.sub(r"tensordesc<(\w+)\[.*", r"*\1", t) if t else t for n, t in types.items()}
    signature = {}
    for name in kernel.arg_names:
        if name in constants or types.get(name, "") is None:
            signature[name], constants[name] = "constexpr", constants.get(name)
        else:
            signature[name] = types.get(name, "i32")
    multiples = [n for n, t in signature.items() if t.startswith("*")]
    multiples += [
        n for n in ("F", "C") if signature.get(n) == "i32" and problem.columns % 16 == problem.channels % 16 == 0
    ]
    attributes = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in multiples}
    return signature, constants, attributes


def _run(tool: str, *arguments: str) -> str:
    binary = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    done = subprocess.run([str(binary), *arguments], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def _nvidia_facts(compiled) -> dict:
    """What ptxas says about the PTX, and what the disassembly of the cubin shows."""
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        ptx.write_text(compiled.asm["ptx"])
        cubin.write_bytes(compiled.asm["cubin"])
        target = re.search(r"\.target (\w+)", compiled.asm["ptx"])[1]
        assembler = "ptxas-blackwell" if target.startswith("sm_10") else "ptxas"
        said = _run(assembler, "-v", f"--gpu-name={target}", str(ptx), "-o", str(Path(folder) / "out"))
        sass = _run("nvdisasm", "-c", str(cubin))
    used = re.search(r"Used (\d+) registers", said)
    frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    instructions, labels = _listing(sass, r"^(\.L\w+):", r"^\s+/\*[0-9a-f]+\*/\s+(.*?)\s*;")
    return {
        "registers": int(used[1]),
        "stack": int(frame[1]),
        "spills": int(frame[2]) + int(frame[3]),
        "serialized": "wgmma.mma_async instructions are serialized" in said,
        "code": {"ptx": compiled.asm["ptx"], "cubin": compiled.asm["cubin"], "sass": sass},
        **_loop_facts(instructions, labels, r"\bBRA\b.*`\((\.L\w+)\)"),
    }


def _amd_facts(compiled) -> dict:
    """The same from AMD's assembly, which carries its own counts."""
    text = compiled.asm["amdgcn"]

    def count(name: str) -> int:
        return int(re.search(rf"\.{name}:?\s+(\d+)", text)[1])

    instructions, labels = _listing(text, r"^(\.LBB\w+):", r"^\t([a-z]\w+.*)$")
    return {
        "registers": count("vgpr_count"),
        "stack": count("private_segment_fixed_size"),
        "spills": 4 * count("vgpr_spill_count"),
        "serialized": False,
        "code": {"amdgcn": text},
        **_loop_facts(instructions, labels, r"s_c?branch\w*\s+(\.LBB\w+)"),
    }


def _listing(text: str, label: str, instruction: str) -> tuple[list[str], dict[str, int]]:
    """The instructions of a disassembly in order, and where each label stands among them."""
    instructions, labels = [], {}
    for line in text.splitlines():
        if found := re.match(label, line):
            labels[found[1]] = len(instructions)
        elif found := re.match(instruction, line):
            instructions.append(found[1])
    return instructions, labels


def _opcode(instruction: str) -> str:
    """The operation without its predicate and modifiers."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]


def _is(opcode: str, names: tuple[str, ...]) -> bool:
    """Whether an opcode is one of a class: NVIDIA's by their stem, AMD's by how they begin."""
    return any(opcode.split(".")[0] == n or (n[0].islower() and opcode.startswith(n)) for n in names)


def _loop_facts(instructions: list[str], labels: dict[str, int], branch: str) -> dict:
    """The main loop by class of instruction: the shortest backward branch that spans the matrix instructions."""
    spans = []
    for end, text in enumerate(instructions):
        found = re.search(branch, text)
        if found and labels.get(found[1], end + 1) <= end:
            spans.append(instructions[labels[found[1]] : end + 1])
    counts = [sum(_is(_opcode(t), MATRIX) for t in s) for s in spans]
    # Waits jump out of line and back, around more than the loop; a peeled first iteration may be among it.
    span = min((s for s, n in zip(spans, counts, strict=True) if 2 * n >= max(counts) > 0), key=len, default=[])
    classes = Counter()
    for text in span:
        classes[next((name for name, stems in CLASSES.items() if _is(_opcode(text), stems)), "integer, moves")] += 1
    matrix = Counter(re.split(r"[\s]", _opcode(t))[0] for t in span if _is(_opcode(t), MATRIX))
    everywhere = [_opcode(t) for t in instructions]
    return {
        "loop": dict(classes.most_common()),
        "loop_instructions": len(span),
        "matrix_opcode": matrix.most_common(1)[0][0] if matrix else "",
        "loads": sum("UTMALDG.5D" in t for t in span),
        "local": sum(_is(o, CLASSES["local"]) for o in everywhere),
        "calls": sum(bool(re.search(r"CALL.*__internal(?!.*guardrail)|s_swappc", t)) for t in instructions),
    }
