"""How a tile is chosen: by the model, or by what was measured on the device. No kernel runs here."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks.shapes import LAYERS, SAMPLES, SIZE
from dwc_kernels import tune
from dwc_kernels.kernels import tiles, tuned
from dwc_kernels.kernels.chips import CHIPS
from dwc_kernels.kernels.launch import chip_of
from dwc_kernels.kernels.tiles import KINDS, Problem, Tile, candidates, choose, estimate

LAYER = Problem("forward", "bf16", SAMPLES, SIZE, 96, 96, (3, 3, 3))


@pytest.mark.parametrize("arch", CHIPS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "tf32", "ieee"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_has_a_tile_that_fits(kind, dtype, arch):
    for layer in LAYERS:
        problem = Problem(kind, dtype, SAMPLES, SIZE, layer.channels, layer.filters, (layer.kernel,) * 3)
        tile = choose(problem, CHIPS[arch])
        assert tiles.shared_bytes(problem, tile, CHIPS[arch]) <= CHIPS[arch].shared
        assert tiles.registers(problem, tile, CHIPS[arch]) <= CHIPS[arch].holds
        for n in (*tile.box, tile.channels, tile.wide, tile.warps):
            assert n & (n - 1) == 0  # Triton's ranges are powers of two


@pytest.mark.parametrize("kind", KINDS)
def test_every_candidate_is_made_of_powers_of_two(kind):
    for tile in candidates(Problem(kind, "bf16", 2, (5, 7, 9), 21, 50, (3, 3, 3)), CHIPS["sm_90"]):
        for n in (*tile.box, tile.channels, tile.wide, tile.warps):
            assert n & (n - 1) == 0  # as Triton's ranges need


def test_the_product_of_splits_and_boxes_stays_below_2_to_the_31():
    problem = Problem("grad_weight", "bf16", 30, (256, 256, 256), 27, 96, (1, 1, 1))
    tile = choose(problem, CHIPS["sm_90"])
    boxes = problem.samples * tiles.boxes(problem.size, tile.box)
    assert 1 < tiles.splits(problem, tile, CHIPS["sm_90"]) < 2**31 / boxes


def test_96_filters_get_96_columns_and_two_programs_on_a_multiprocessor():
    tile = choose(LAYER, CHIPS["sm_90"])
    assert (tile.wide, tile.tail) == (64, 32)
    assert tiles.resident(LAYER, tile, CHIPS["sm_90"]) == 2


def test_a_small_problem_gets_smaller_tiles_to_fill_the_chip():
    small = Problem("forward", "bf16", 1, (16, 16, 16), 96, 96, (3, 3, 3))
    assert tiles.programs(small, choose(small, CHIPS["sm_90"])) > tiles.programs(small, choose(LAYER, CHIPS["sm_90"]))


def test_the_choice_is_the_least_estimate():
    chip = CHIPS["sm_90"]
    least = min(estimate(LAYER, t, chip)["total"] for t in candidates(LAYER, chip))
    assert estimate(LAYER, choose(LAYER, CHIPS["sm_90"]), chip)["total"] == least


def test_a_measured_tile_is_used_and_other_layers_keep_the_model_s(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured = Tile((2, 4, 8), 32, 64, 0, 16, 4, 2)
    tune.store(tuned.tuned_path("Some GPU/80GB"), {tuned.tuned_key(LAYER): asdict(measured)})
    tune.store(tuned.tuned_path("Some GPU/80GB"), {"another": asdict(measured)})
    assert tuned.tile_for(LAYER, replace(CHIPS["sm_90"], name="Some GPU/80GB")) == measured
    assert set(json.loads(tuned.tuned_path("Some GPU/80GB").read_text())) == {tuned.tuned_key(LAYER), "another"}
    assert tuned.tile_for(LAYER, replace(CHIPS["sm_90"], name="another GPU")) == choose(LAYER, CHIPS["sm_90"])


@pytest.mark.parametrize(
    ("capability", "arch"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_80"),
        ((8, 9), "sm_80"),
        ((9, 0), "sm_90"),
        ((10, 3), "sm_100"),
        ((12, 0), "sm_120"),
    ],
)
def test_a_device_runs_its_chip_s_code_with_its_own_name_and_sizes(capability, arch, monkeypatch):
    major, minor = capability
    device = SimpleNamespace(
        name="a GPU", major=major, minor=minor, multi_processor_count=7, shared_memory_per_block_optin=99 << 10
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    chip = chip_of.__wrapped__(torch.device("cuda", 0))
    assert (chip.arch, chip.name, chip.multiprocessors, chip.shared) == (arch, "a GPU", 7, 99 << 10)
    for kind in KINDS:
        problem = replace(LAYER, kind=kind)
        assert tiles.shared_bytes(problem, choose(problem, chip), chip) <= 99 << 10


@pytest.mark.parametrize("content", ["{", '{"a": 1}', '{"a": {"box": [1, 2, 3]}}', "[]"])
def test_a_broken_file_of_tiles_is_named(tmp_path, monkeypatch, content):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tuned.tuned_path("gpu")
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(ValueError, match=r"gpu\.json"):
        tuned.tile_for(LAYER, replace(CHIPS["sm_90"], name="gpu"))


VALID = {"box": [2, 4, 8], "channels": 16, "wide": 32, "tail": 0, "chunk": 8, "warps": 8, "stages": 2}


@pytest.mark.parametrize(
    "change",
    [
        {"box": [3, 4, 8]},
        {"box": [4, 8]},
        {"box": "248"},
        {"box": [1, 1, 8]},
        {"box": [64, 64, 64]},
        {"channels": "16"},
        {"channels": 8},
        {"wide": 48},
        {"tail": -16},
        {"chunk": 0},
        {"warps": 2.0},
        {"stages": True},
        {"unknown": 1},
    ],
    ids=str,
)
def test_a_stored_tile_that_no_kernel_runs_with_is_one_line_that_names_the_file(tmp_path, monkeypatch, change):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path, chip = tuned.tuned_path("gpu"), replace(CHIPS["sm_90"], name="gpu")
    path.parent.mkdir()
    path.write_text(json.dumps({tuned.tuned_key(LAYER): VALID}))
    assert tuned.tile_for(LAYER, chip) == Tile(**{**VALID, "box": (2, 4, 8)})
    path.write_text(json.dumps({tuned.tuned_key(LAYER): VALID | change}))
    with pytest.raises(ValueError, match=r"gpu\.json.*; delete it, or run python -m dwc_kernels\.tune again") as raised:
        tuned.tile_for(LAYER, chip)
    assert "\n" not in str(raised.value)


def test_a_strided_problem_has_measured_tiles_of_its_own():
    strided = replace(LAYER, stride=(2, 2, 2))
    assert tuned.tuned_key(strided) != tuned.tuned_key(LAYER)


@pytest.mark.parametrize(
    ("module", "code"), [("dwc_kernels.tune", 2), ("benchmarks.gpu", 0), ("benchmarks.tile_times", 2)]
)
def test_commands_that_need_a_gpu_say_so_in_one_line(module, code):
    environment = os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-m", module], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert (done.stdout + done.stderr).count("no GPU") == 1
