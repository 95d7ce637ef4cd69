"""The sweep of compilations: what it covers, that it resumes, and, behind the marker `sweep`, that nothing spills."""

import csv
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import kernel_sweep
from benchmarks.kernel_sweep import ARCHITECTURES, DTYPES, EDGES, Fact, cases, summary
from dwc_kernels.kernels.tiles import BARRIERS

TABLE = Path(__file__).parents[2] / "docs" / "results" / "kernels" / "sweep.csv"
FACT = Fact("0", "sm_90", "bf16", "forward", 96, 96, 3, "31", "tile", 255, 0, 0, 0, 0, 12, 16, 1000, 900)
# One narrow and one wide layer at an edge that is no multiple of 4, each on its chip.
SAMPLE = [
    ("sm_90", "bf16", "forward", 96, 96, 3, 31),
    ("sm_89", "tf32", "grad_weight", 96, 96, 3, 32),
    ("sm_80", "bf16", "grad_input", 21, 21, 3, 32),
    ("sm_80", "bf16", "grad_input", 96, 50, 1, 32),
]


def test_every_chip_dtype_kernel_shape_and_size_is_a_case():
    found = {(arch, p.dtype, p.kind, *shape, edge) for arch, shape, p, _, edges in cases() for edge in edges.split()}
    n_shapes = len(kernel_sweep.shapes())
    assert len(found) == len(ARCHITECTURES) * len(DTYPES) * 3 * n_shapes * len(EDGES)
    assert all((*case[:-1], str(case[-1])) in found for case in SAMPLE)


def test_the_sweep_compiles_only_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(kernel_sweep, "source_hash", lambda kind: "now")
    monkeypatch.setattr(kernel_sweep, "shapes", lambda: [(16, 16, 1)])
    compiled = []

    def compile_one(arch, shape, problem, tile, edges):
        compiled.append((arch, problem.kind, edges))
        if len(compiled) == 3:
            raise KeyboardInterrupt
        spelled, source = kernel_sweep.spelled(tile), kernel_sweep.source_hash(problem.kind)
        return replace(FACT, source=source, arch=arch, dtype=problem.dtype, kind=problem.kind, channels=shape[0],
                       filters=shape[1], kernel=shape[2], edges=edges, tile=spelled)  # fmt: skip

    monkeypatch.setattr(kernel_sweep, "compiled", compile_one)
    arguments = ["--out", str(tmp_path), "--arch", "sm_90", "--dtype", "bf16"]
    with pytest.raises(KeyboardInterrupt):
        kernel_sweep.main(arguments)
    assert kernel_sweep.main(arguments) == 0
    assert len(compiled) == len(set(compiled)) + 1  # the interrupted one twice
    before = len(compiled)
    assert kernel_sweep.main(arguments) == 0
    assert len(compiled) == before
    monkeypatch.setattr(kernel_sweep, "source_hash", lambda kind: "changed")
    assert kernel_sweep.main(arguments) == 0
    assert len(compiled) > before


def test_a_kill_loses_no_finished_compilation(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(kernel_sweep, "source_hash", lambda kind: "now")
    monkeypatch.setattr(kernel_sweep, "shapes", lambda: [(16, 16, 1)])
    path, on_disk = tmp_path / "sweep.csv", []

    def compile_one(arch, shape, problem, tile, edges):
        on_disk.append(len(kernel_sweep.read(path)))  # what a kill in this compilation would leave
        return replace(FACT, source="now", arch=arch, dtype=problem.dtype, kind=problem.kind, channels=shape[0],
                       filters=shape[1], kernel=shape[2], edges=edges, tile=kernel_sweep.spelled(tile))  # fmt: skip

    monkeypatch.setattr(kernel_sweep, "compiled", compile_one)
    for dtype in ("bf16", "fp16"):
        assert kernel_sweep.main(["--out", str(tmp_path), "--arch", "sm_90", "--dtype", dtype]) == 0
    assert on_disk == list(range(len(on_disk)))
    before = path.read_text()

    def killed(*_):
        raise SystemExit  # before anything of the old file is gone

    monkeypatch.setattr(kernel_sweep, "write_whole", killed)
    with pytest.raises(SystemExit):
        kernel_sweep.main(["--out", str(tmp_path)])
    assert path.read_text() == before


def test_another_compiler_is_another_source(monkeypatch):
    source_hash = kernel_sweep.source_hash.__wrapped__
    before = source_hash("forward")
    assert "ptxas" in kernel_sweep.compiler()
    monkeypatch.setattr(kernel_sweep, "compiler", lambda: "another")
    assert source_hash("forward") != before


def test_the_summary_says_how_many_of_how_many_and_names_what_spills():
    text = summary([FACT, replace(FACT, edges="45", spills=28, local=7)], 9)
    assert text.startswith("2 of 9 compilations.\n")
    assert "| sm_90 | bf16 | forward | 2 | 1 | 28 | 96->96 k3 (45): 28 |" in text


def test_the_committed_table_agrees_with_the_model_of_shared_memory():
    facts = kernel_sweep.read(TABLE)
    assert facts
    for fact in facts:
        assert 0 <= fact.shared - fact.shared_model <= BARRIERS, fact


@pytest.mark.sweep
@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: " ".join(map(str, case)))
def test_nothing_spills_outside_the_network_s_shapes(case):
    arch, dtype, kind, channels, filters, kernel, edge = case
    program = (
        "import csv, sys\nfrom dataclasses import asdict\nfrom benchmarks.kernel_sweep import cases, compiled\n"
        "arch, dtype, kind, *shape, edge = sys.argv[1:]\n"
        "for case in cases((arch,), (dtype,)):\n"
        "    if case[1] == tuple(map(int, shape)) and case[2].kind == kind and edge in case[4].split():\n"
        "        fact = asdict(compiled(*case))\n"
        "writer = csv.DictWriter(sys.stdout, list(fact))\nwriter.writeheader()\nwriter.writerow(fact)\n"
    )
    words = [arch, dtype, kind, *map(str, (channels, filters, kernel, edge))]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", program, *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (fact,) = csv.DictReader(done.stdout.splitlines())
    assert fact["spills"] == fact["stack"] == fact["local"] == "0", fact
