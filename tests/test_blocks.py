import math

import numpy as np
import pytest
import torch

from dwc.base.memory import free_memory
from dwc.blocks import divide, extent, memory, plan_blocks
from dwc.data.head import head_box
from dwc.simulation.phantom import make_phantom
from dwc.simulation.scans import load_sites, simulate

DILATIONS = (1, 1, 1, 2, 4, 8, 1)
WHOLE = (slice(0, 256),) * 3


@pytest.mark.parametrize("site", load_sites())
def test_the_heads_box_holds_all_of_the_brain_and_leaves_air_out(site):
    for seed in range(2):
        image, codes = simulate(make_phantom(64, 3.0, seed), site, voxel_size=3.0, seed=seed)
        box = head_box(image)
        brain = (codes > 0) & (codes < 50)
        assert brain[box].sum() == brain.sum()
        assert math.prod(extent(box)) < 0.9 * image.size


@pytest.mark.parametrize("image", [np.zeros((6, 7, 8), np.uint8), np.full((6, 7, 8), 9, np.uint8)], ids=["0", "9"])
def test_where_no_head_stands_out_the_box_is_the_whole_volume(image):
    assert head_box(image) == (slice(0, 6), slice(0, 7), slice(0, 8))


def test_a_few_bright_voxels_in_the_air_do_not_widen_the_box():
    image = np.zeros((64, 64, 64), np.uint8)
    image[20:40, 20:40, 20:40] = 100
    image[2, 3, 5] = image[60, 60, 60] = 255
    assert head_box(image) == (slice(19, 41),) * 3


def test_blocks_cover_their_region_once():
    region = (slice(3, 20), slice(0, 11), slice(5, 6))
    count = np.zeros((24, 12, 8), int)
    for block in divide(region, (4, 3, 1)):
        count[block] += 1
    assert (count[region] == 1).all()
    assert count.sum() == 17 * 11


@pytest.mark.parametrize("limit", [1e8, 1e9, 4e9, 64e9])
def test_blocks_stay_within_the_memory_limit_and_are_as_few_as_it_allows(limit):
    blocks = plan_blocks(WHOLE, (256,) * 3, DILATIONS, 96, 50, limit)
    assert memory(extent(blocks[len(blocks) // 2]), (256,) * 3, DILATIONS, 96, 50) <= limit
    assert sum(math.prod(extent(block)) for block in blocks) == 256**3
    assert len(blocks) == 1 or len(plan_blocks(WHOLE, (256,) * 3, DILATIONS, 96, 50, 2 * limit)) < len(blocks)


def test_free_memory_is_more_than_nothing_and_less_than_the_machine_holds():
    assert 1e7 < free_memory(torch.device("cpu")) < 1e14
