"""The tiles of specialized warps: where they can run, what they share, and who chooses them. Nothing runs here."""

import csv
import json
from dataclasses import asdict, replace

import pytest
import torch
import triton

from benchmarks.shapes import SAMPLES, SIZE
from dwc_kernels import kernels, tune
from dwc_kernels.kernels import launch, tiles, tuned
from dwc_kernels.kernels.chips import CHIPS
from dwc_kernels.kernels.specialized.variant import BARRIER_BYTES, candidates, variant_of
from dwc_kernels.kernels.tiles import Problem, Tile, choose, problem_of
from tests.dwc_kernels.h200 import RESULTS, mostly_sums, timed

FORWARD = Problem("forward", "bf16", SAMPLES, SIZE, 96, 96, (3, 3, 3))
GRAD_INPUT = replace(FORWARD, kind="grad_input")
H200 = replace(CHIPS["sm_90"], name="NVIDIA H200")


@pytest.mark.parametrize(
    "problem",
    [
        replace(FORWARD, dtype="fp16"),
        replace(FORWARD, dtype="tf32"),
        replace(FORWARD, kind="grad_weight"),
        replace(FORWARD, stride=(2, 2, 2)),
        problem_of("forward", "bf16", 1, SIZE, 1, 96, (3, 3, 3)),
    ],
    ids=["fp16", "tf32", "grad_weight", "stride", "folded"],
)
def test_specialized_warps_have_no_tile_for_what_they_cannot_run(problem):
    assert candidates(FORWARD, H200)
    assert candidates(problem, H200) == []


def test_specialized_warps_have_no_tile_on_other_chips_or_with_another_triton(monkeypatch):
    for arch in ("sm_80", "sm_89", "sm_100", "sm_120", "interpreter"):
        assert candidates(FORWARD, CHIPS[arch]) == []
    for release in ("3.5.1", "3.8.0", "4.0.0"):
        monkeypatch.setattr(triton, "__version__", release)
        assert candidates(FORWARD, H200) == []


@pytest.mark.parametrize("kernel", [(1, 1, 1), (3, 3, 3), (5, 5, 5), (1, 3, 7)])
@pytest.mark.parametrize("dilation", [(1, 1, 1), (2, 2, 2), (3, 1, 2), (8, 8, 8), (300, 300, 300)])
@pytest.mark.parametrize("problem", [FORWARD, GRAD_INPUT], ids=["forward", "grad_input"])
def test_slots_fit_the_memory_and_a_halo_holds_all_its_taps(problem, dilation, kernel):
    problem = replace(problem, kernel=kernel)
    for tile in candidates(problem, H200):
        v = variant_of(problem, tile, dilation, H200.shared)
        rows = (1 + v.pair) * v.row_slots * v.planes * v.lines * 8 * 32 * 2
        weights = 2 * v.weight_slots * tile.columns * 32 * 2
        noise = v.noise_slots * 64 * 32 * 4
        assert rows + weights + noise + BARRIER_BYTES <= H200.shared
        assert v.row_slots >= 2
        assert v.planes == 4 + v.share_d * v.dilation[0] * (kernel[0] - 1)
        assert v.lines == 8 + v.share_h * v.dilation[1] * (kernel[1] - 1)
        rest = v.lines - 8
        assert rest & (rest - 1) == 0  # boxes that are copied have powers of two


def test_taps_share_copies_until_the_dilation_takes_too_much_memory():
    def shared(problem):
        found = (variant_of(problem, candidates(problem, H200)[0], (d, d, d), H200.shared) for d in (1, 2, 4))
        return [v.share_d + v.share_h for v in found]

    assert shared(FORWARD) == [2, 1, 0]
    assert shared(GRAD_INPUT) == [2, 1, 0]


def test_the_model_never_chooses_specialized_warps():
    for kind in tiles.KINDS:
        problem = replace(FORWARD, kind=kind)
        assert all(not tile.specialized for tile in tiles.candidates(problem, H200))
        assert tuned.tile_for(problem, replace(H200, name="never measured")) == choose(problem, H200)


VALID = asdict(candidates(FORWARD, H200)[0])


def write(path, tile):
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({tuned.tuned_key(FORWARD): tile}))


def test_a_tuned_tile_of_specialized_warps_is_read_back(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    write(tuned.tuned_path("gpu"), VALID)
    assert tuned.tile_for(FORWARD, replace(H200, name="gpu")) == candidates(FORWARD, H200)[0]


@pytest.mark.parametrize("unroll", [1, 3])
def test_a_file_of_an_earlier_version_is_read_as_far_as_its_tiles_still_run(tmp_path, monkeypatch, unroll):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    stored = {
        "box": [4, 8, 8], "channels": 32, "unroll": unroll, "wide": 64, "tail": 32, "chunk": 8, "warps": 8, "stages": 4,
    }  # fmt: skip
    write(tuned.tuned_path("gpu"), stored)
    expected = Tile((4, 8, 8), 32, 64, 32, 8, 8, 4) if unroll == 1 else choose(FORWARD, H200)
    assert tuned.tile_for(FORWARD, replace(H200, name="gpu")) == expected


@pytest.mark.parametrize(
    "change", [{"specialized": 2}, {"specialized": None}, {"specialized": "true"}, {"warps": 8}, {"wide": 128}]
)
def test_a_stored_tile_that_specialized_warps_cannot_run_names_the_file(tmp_path, monkeypatch, change):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    write(tuned.tuned_path("gpu"), VALID | change)
    with pytest.raises(ValueError, match=r"gpu\.json.*python -m dwc_kernels\.tune again"):
        tuned.tile_for(FORWARD, replace(H200, name="gpu"))


def test_the_user_s_tile_goes_before_the_packaged_one_and_that_before_the_model_s(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    packaged = tuned.stored_tiles(tuned.measured_path(H200.name))[tuned.tuned_key(FORWARD)]
    assert tuned.tile_for(FORWARD, H200) == packaged
    other = next(t for t in tiles.candidates(FORWARD, H200) if t != packaged)
    tune.store(tuned.tuned_path(H200.name), {tuned.tuned_key(FORWARD): asdict(other)})
    assert tuned.tile_for(FORWARD, H200) == other
    assert tuned.tile_for(GRAD_INPUT, H200).specialized
    unknown = replace(FORWARD, columns=77)
    assert tuned.tile_for(unknown, H200) == choose(unknown, H200)


@pytest.mark.parametrize("user_s", [False, True])
def test_specialized_warps_that_this_triton_lacks_leave_the_choice_to_the_model(tmp_path, monkeypatch, user_s):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if user_s:
        tune.store(tuned.tuned_path(H200.name), {tuned.tuned_key(GRAD_INPUT): asdict(candidates(GRAD_INPUT, H200)[0])})
    monkeypatch.setattr(triton, "__version__", "3.8.0")
    assert tuned.tile_for(GRAD_INPUT, H200) == choose(GRAD_INPUT, H200)


def test_every_packaged_triton_tile_is_the_fastest_of_them_that_was_measured():
    packaged, times = tuned.stored_tiles(tuned.measured_path(H200.name)), timed()
    keys = {tuned.tuned_key(p): p for p in times if p.dtype == "bf16" and not mostly_sums(p)}
    assert packaged.keys() == keys.keys()
    for key, tile in packaged.items():
        if not tile.specialized:
            assert tile == min(times[keys[key]], key=times[keys[key]].get), key


def test_specialized_warps_are_packaged_where_they_were_fastest_at_every_dilation():
    packaged = tuned.stored_tiles(tuned.measured_path(H200.name))
    (key,) = [key for key, tile in packaged.items() if tile.specialized]
    assert key == tuned.tuned_key(GRAD_INPUT)
    assert packaged[key] == candidates(GRAD_INPUT, H200)[0]
    with (RESULTS / "gluon.csv").open() as file:
        rows = [r for r in csv.DictReader(file) if r["run"] == "second" and r["kind"] == "grad_input"]
    for dilation in "1248":
        times = {r["variant"]: float(r["median_us"]) for r in rows if r["dilation"] == dilation}
        # A halo of dilation 4 or 8 does not fit, and the launcher does without.
        ours = times["specialized, sharing 2" if dilation in "12" else "specialized, sharing 0"]
        assert ours < min(time for variant, time in times.items() if variant.startswith("triton"))
        if dilation == "1":
            assert ours < 1e3 * min(timed()[GRAD_INPUT].values())


class Launched(Exception):
    """In place of a launch, with what would be launched."""


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("keep_r", [True, False])
def test_a_forward_with_such_a_tile_launches_specialized_warps(monkeypatch, bias, keep_r):
    from dwc_kernels.kernels.specialized import launch as specialized

    def run_on(device, kernel, programs, *arguments, **options):
        raise Launched(programs, arguments, options)

    monkeypatch.setattr(launch, "chip_of", lambda _: H200)
    monkeypatch.setattr(launch, "operand_dtype", lambda *_: "bf16")
    monkeypatch.setattr(specialized, "run_on", run_on)
    x, mu = torch.zeros(2, 21, 20, 18, 31).bfloat16(), torch.zeros(50, 21, 3, 3, 3).bfloat16()
    biases = (mu[:, 0, 0, 0, 0],) * 2 if bias else (None, None)
    problem = problem_of("forward", "bf16", 2, (20, 18, 31), 21, 50, (3, 3, 3))
    tile = candidates(problem, H200)[1]
    with pytest.raises(Launched) as launched:
        kernels.forward(x, mu, mu, *biases, (1, 1, 1), (2,) * 3, (2,) * 3, 1, torch.tensor(0), keep_r=keep_r, tile=tile)
    programs, arguments, _ = launched.value.args
    assert programs == min(2 * 5 * 3 * 4, H200.multiprocessors)
    v = arguments[-1]
    assert (v.bias, v.keep_r, v.aligned, v.blocks, v.dilation) == (bias, keep_r, False, 1, (2, 2, 2))
    assert arguments[-12:-1] == (2 * 5 * 3 * 4, 20, 18, 31, 20, 18, 31, 50, 2, 2, 2)


@pytest.mark.parametrize("user_s", [False, True])
def test_a_tile_too_large_for_the_work_leaves_the_choice_to_the_model(tmp_path, monkeypatch, user_s):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if user_s:
        tune.store(tuned.tuned_path(H200.name), {tuned.tuned_key(GRAD_INPUT): asdict(candidates(GRAD_INPUT, H200)[0])})
    small = replace(GRAD_INPUT, samples=1, size=(16, 16, 16))
    assert tuned.tile_for(small, H200) == choose(small, H200)
