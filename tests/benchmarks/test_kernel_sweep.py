"""The sweep of compilations: what it covers, that it resumes, and, behind the marker `sweep`, that nothing spills."""

import csv
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import kernel_sweep
from benchmarks.kernel_sweep import ARCHITECTURES, DTYPES, EDGES, Case, Fact, cases, summary
from dwc_kernels.kernels.chips import CHIPS
from dwc_kernels.kernels.tiles import BARRIERS, shared_bytes, tensor_columns

TABLE = Path(__file__).parents[2] / "docs" / "results" / "kernels" / "sweep.csv"
README = Path(__file__).parents[2] / "dwc_kernels" / "README.md"
FACT = Fact("0", "sm_90", "bf16", "forward", 96, 96, 3, "31", "tile", 255, 0, 0, 0, 0, 12, 16, 1000, 900)
# One narrow and one wide layer at an edge that is no multiple of 4, each on its chip.
SAMPLE = [
    ("sm_90", "bf16", "forward", 96, 96, 3, 31),
    ("sm_89", "tf32", "grad_weight", 96, 96, 3, 32),
    ("sm_80", "bf16", "grad_input", 21, 21, 3, 32),
    ("sm_80", "bf16", "grad_input", 96, 50, 1, 32),
    ("sm_90", "tf32", "forward", 96, 96, 3, 31),
    ("sm_120", "tf32", "grad_weight", 1, 96, 3, 32),
    ("sm_80", "bf16", "grad_weight", 64, 64, 3, 32),
]


@pytest.fixture(scope="module")
def every_case():
    """All cases; choosing their tiles takes seconds."""
    return cases()


def test_every_chip_dtype_kernel_shape_and_size_is_a_case(every_case):
    found = {
        (case.arch, case.problem.dtype, case.problem.kind, *case.shape, edge)
        for case in every_case
        for edge in case.edges.split()
    }
    n_shapes = len(kernel_sweep.shapes())
    assert len(found) == len(ARCHITECTURES) * len(DTYPES) * 3 * n_shapes * len(EDGES)
    assert all((*case[:-1], str(case[-1])) in found for case in SAMPLE)


def fact_of(case: Case) -> Fact:
    """A row of a case, without compiling."""
    channels, filters, kernel = case.shape
    return replace(
        FACT, source=kernel_sweep.source_hash(case), arch=case.arch, dtype=case.problem.dtype, kind=case.problem.kind,
        channels=channels, filters=filters, kernel=kernel, edges=case.edges, tile=kernel_sweep.spelled(case.tile),
    )  # fmt: skip


@pytest.fixture
def few_cases(monkeypatch):
    """A sweep of one shape, each of whose cases is compilation of its own."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(kernel_sweep, "shapes", lambda: [(16, 16, 1)])
    monkeypatch.setattr(kernel_sweep, "source_hash", lambda case: str(hash(case)))


def test_the_sweep_compiles_only_what_is_missing(few_cases, tmp_path, monkeypatch):
    compiled = []

    def compile_one(case):
        compiled.append(case)
        if len(compiled) == 3:
            raise KeyboardInterrupt
        return fact_of(case)

    monkeypatch.setattr(kernel_sweep, "compiled", compile_one)
    arguments = ["--out", str(tmp_path), "--arch", "sm_90", "--dtype", "bf16"]
    with pytest.raises(KeyboardInterrupt):
        kernel_sweep.main(arguments)
    assert kernel_sweep.main(arguments) == 0
    assert len(compiled) == len(set(compiled)) + 1  # the interrupted one twice
    before = len(compiled)
    assert kernel_sweep.main(arguments) == 0
    assert len(compiled) == before
    monkeypatch.setattr(kernel_sweep, "source_hash", lambda case: f"changed {case}")
    assert kernel_sweep.main(arguments) == 0
    assert len(compiled) > before


def test_cases_of_the_same_machine_code_are_compiled_once_and_listed_each(few_cases, tmp_path, monkeypatch):
    compiled = []

    def compile_one(case):
        compiled.append(case)
        return fact_of(case)

    monkeypatch.setattr(kernel_sweep, "compiled", compile_one)
    monkeypatch.setattr(kernel_sweep, "source_hash", lambda case: case.problem.kind)
    assert kernel_sweep.main(["--out", str(tmp_path), "--arch", "sm_90", "--dtype", "bf16"]) == 0
    facts = kernel_sweep.read(tmp_path / "sweep.csv")
    assert len(compiled) == 3 < len(facts)
    wanted = {kernel_sweep.key_of(case): case for case in cases(("sm_90",), ("bf16",))}
    assert {fact.key for fact in facts} == set(wanted)
    for fact in facts:
        case = wanted[fact.key]
        assert fact.shared_model == shared_bytes(case.problem, case.tile, CHIPS["sm_90"]) or case in compiled


def test_a_source_is_one_set_of_types_constants_and_options():
    """Sizes that the kernel takes as arguments share one; what is compiled in does not."""
    program = (
        "from dataclasses import replace\nfrom benchmarks.kernel_sweep import cases, source_hash\n"
        "case = cases(('sm_89',), ('bf16',), ('grad_input',))[0]\n"
        "work, tile = case.problem, case.tile\n"
        "same = [case, case._replace(problem=replace(work, size=(45, 45, 45), samples=1), edges='45')]\n"
        "others = [case._replace(arch='sm_80'), case._replace(problem=replace(work, dtype='fp16')),\n"
        "          case._replace(problem=replace(work, columns=1)), case._replace(tile=replace(tile, stages=2)),\n"
        "          case._replace(tile=replace(tile, warps=2))]\n"
        "print(len({source_hash(c) for c in same}), len({source_hash(c) for c in [case, *others]}), len(others))\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout == "1 6 5\n", done.stderr


def test_what_is_asked_most_comes_first():
    ordered = cases(("sm_89", "sm_90"), ("fp16", "bf16"))
    most = [case.problem.dtype == "bf16" and case.arch == "sm_90" for case in ordered]
    assert most == sorted(most, reverse=True)
    assert ordered[0].shape == (96, 96, 3)
    forwards = [case.problem.kind == "forward" for case in ordered[sum(most) :]]
    assert forwards == sorted(forwards)


def test_a_kill_loses_no_finished_compilation(few_cases, tmp_path, monkeypatch):
    path, on_disk = tmp_path / "sweep.csv", []

    def compile_one(case):
        on_disk.append(len(kernel_sweep.read(path)))  # what a kill in this compilation would leave
        return fact_of(case)

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
    device_code = kernel_sweep.device_code.__wrapped__
    before = device_code("forward")
    assert "ptxas" in kernel_sweep.compiler()
    monkeypatch.setattr(kernel_sweep, "compiler", lambda: "another")
    assert device_code("forward") != before


def test_the_summary_says_how_many_of_how_many_and_names_what_spills():
    text = summary([FACT, replace(FACT, edges="45", spills=28, local=7)], 9)
    assert text.startswith("2 of 9 cases, in 1 compilations.\n")
    assert "| sm_90 | bf16 | forward | 2 | 1 | 28 | 96->96 k3 (45): 28 |" in text


def test_the_committed_table_has_the_tiles_that_are_chosen_now_none_twice_and_agrees_with_the_model_of_them(every_case):
    chosen = {
        (case.arch, case.problem.dtype, case.problem.kind, *case.shape, case.edges, kernel_sweep.spelled(case.tile)): (
            shared_bytes(case.problem, case.tile, CHIPS[case.arch])
        )
        for case in every_case
    }
    committed = {
        (fact.arch, fact.dtype, fact.kind, fact.channels, fact.filters, fact.kernel, fact.edges, fact.tile): fact
        for fact in kernel_sweep.read(TABLE)
    }
    assert committed.keys() <= chosen.keys(), "the model of tiles has changed: run python -m benchmarks.kernel_sweep"
    assert len(committed) == len(kernel_sweep.read(TABLE)) > 0
    for asked, fact in committed.items():
        assert chosen[asked] == fact.shared_model, fact
        assert 0 <= fact.shared - fact.shared_model <= BARRIERS, fact


def test_no_committed_kernel_is_empty_or_serialized():
    for fact in kernel_sweep.read(TABLE):
        assert fact.registers >= 32, fact  # of an empty one ptxas says 4
        assert not fact.serialized, fact


def test_no_tile_needs_more_tensor_memory_than_there_is(every_case):
    for case in every_case:
        if CHIPS[case.arch].tensor_memory:
            assert tensor_columns(case.problem, case.tile) <= 512, case


def test_the_readme_counts_the_committed_cases_and_their_spills(every_case):
    facts = kernel_sweep.read(TABLE)
    assert TABLE.with_suffix(".md").read_text() == summary(facts, len(every_case)) + "\n"
    readme = " ".join(README.read_text().split())
    assert f"{len(facts)} of {len(every_case)} cases" in readme
    assert ("none of them spills" in readme) == (not any(f.spills or f.stack or f.local for f in facts))


@pytest.mark.sweep
@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: " ".join(map(str, case)))
def test_nothing_spills_outside_the_network_s_shapes(case):
    arch, dtype, kind, channels, filters, kernel, edge = case
    program = (
        "import csv, sys\nfrom dataclasses import asdict\nfrom benchmarks.kernel_sweep import cases, compiled\n"
        "arch, dtype, kind, *shape, edge = sys.argv[1:]\n"
        "for case in cases((arch,), (dtype,)):\n"
        "    if case.shape == tuple(map(int, shape)) and case.problem.kind == kind and edge in case.edges.split():\n"
        "        fact = asdict(compiled(case))\n"
        "writer = csv.DictWriter(sys.stdout, list(fact))\nwriter.writeheader()\nwriter.writerow(fact)\n"
    )
    words = [arch, dtype, kind, *map(str, (channels, filters, kernel, edge))]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", program, *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (fact,) = csv.DictReader(done.stdout.splitlines())
    assert fact["spills"] == fact["stack"] == fact["local"] == "0", fact
