"""Noise is a pure function of (seed, element index), equal to the published generator, and standard normal."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dwc_kernels import noise
from dwc_kernels.noise import N_ROUNDS, normal, philox

# Random123's published vectors (kat_vectors): rounds, counter, key, result.
KNOWN_ANSWERS = [
    (7, "00000000 00000000 00000000 00000000", "00000000 00000000", "5f6fb709 0d893f64 4f121f81 4f730a48"),
    (7, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "5207ddc2 45165e59 4d8ee751 8c52f662"),
    (7, "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "4dfccaba 190a87f0 c47362ba b6b5242a"),
    (10, "00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (10, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (10, "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("n_rounds", "counter", "key", "result"), KNOWN_ANSWERS)
def test_philox_gives_the_published_known_answers(n_rounds, counter, key, result):
    out = philox(tuple(torch.tensor([w]) for w in words(counter)), tuple(words(key)), n_rounds)
    assert [int(w) for w in out] == words(result)


def one_normal(seed: int, index: int) -> float:
    """The definition, in Python's integers and floats."""
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    group, lane = divmod(index, 4)
    counter = (group & 0xFFFFFFFF, group >> 32, 0, 0)
    out = [int(w) for w in philox(tuple(torch.tensor([w]) for w in counter), key, N_ROUNDS)]
    first, second = out[lane // 2 * 2], out[lane // 2 * 2 + 1]
    radius = math.sqrt(-2 * math.log(first * 2.0**-32 + 2.0**-33))
    angle = 2 * math.pi * second * 2.0**-32
    return radius * (math.sin(angle) if lane % 2 else math.cos(angle))


@given(seed=st.integers(-(2**63), 2**63 - 1), index=st.integers(0, 119))
def test_each_element_is_the_function_of_its_seed_and_index(seed, index):
    eps = normal(torch.empty(2, 3, 4, 5), seed).flatten()
    assert eps[index].item() == pytest.approx(one_normal(seed, index), abs=2e-6)


@pytest.mark.parametrize(
    "shape", [(2, 5, 4, 2, 3), (3, 7, 3, 3, 5), (1, 1, 1, 1, 1), (2, 96, 8, 8, 8), (1, 3, 1, 1, 2)]
)
def test_noise_does_not_depend_on_the_layout(shape):
    like = torch.empty(shape)
    expected = normal(like, 11)
    for other in (like.to(memory_format=torch.channels_last_3d), torch.empty(shape[::-1]).permute(4, 3, 2, 1, 0)):
        assert torch.equal(normal(other, 11), expected)


def test_noise_does_not_depend_on_how_much_is_drawn():
    few, many = normal(torch.empty(1001), 5), normal(torch.empty(700_001), 5)
    assert torch.equal(few, many[:1001])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_noise_does_not_depend_on_the_number_of_threads(layout):
    like = torch.empty(2, 16, 32, 32, 32).to(memory_format=layout)  # several steps, each of which threads share
    threads, drawn = torch.get_num_threads(), []
    try:
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            drawn.append(normal(like, 5))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])


def test_noise_is_standard_normal():
    eps = normal(torch.empty(1_000_003), 2).double().numpy()
    assert stats.kstest(eps, "norm").pvalue > 1e-3
    assert abs(stats.kurtosis(eps)) < 0.03


def test_neighbours_samples_and_seeds_are_uncorrelated():
    n = 1 << 20
    a, b = normal(torch.empty(n), 2).double(), normal(torch.empty(n), 3).double()
    bound = 5 / math.sqrt(n)
    for shift in (1, 2, 3, 4, 96, 32 * 32):
        assert abs((a[shift:] * a[:-shift]).mean()) < bound, f"neighbours {shift} apart"
    assert abs((a * b).mean()) < bound, "two seeds"
    assert abs((a.square() - 1).mul(b.square() - 1).mean()) < 2 * bound, "magnitudes of two seeds"


@pytest.mark.parametrize("seed", [0, 7, -1, 2**62 + 77, -(2**63)])
def test_a_seed_that_stays_a_tensor_gives_the_same_words(seed):
    counter = tuple(torch.arange(5) + i for i in range(4))
    halves = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    as_tensors = philox(counter, tuple(map(torch.tensor, halves)))
    assert all(torch.equal(a, b) for a, b in zip(as_tensors, philox(counter, halves), strict=True))
    assert torch.equal(normal(torch.empty(9), torch.tensor(seed)), normal(torch.empty(9), seed))


@pytest.mark.parametrize("group", [0, 2**32 - 3, 2**32 - 1, 2**32, 2**40 + 5])
def test_groups_around_2_to_the_32_have_the_words_of_the_generator(group):
    """The CPU's shortcut for smaller groups ends there."""
    out, groups = torch.empty(4, 2), torch.tensor([group, group + 1])
    noise._four_normals(groups, 7, out)
    for column, counter in zip(out.T, groups.tolist(), strict=True):
        expected = [one_normal(7, 4 * counter + lane) for lane in range(4)]
        assert column.tolist() == pytest.approx(expected, abs=2e-6)


def test_the_high_half_of_the_seed_matters():
    like = torch.empty(64)
    assert not torch.equal(normal(like, 1), normal(like, 1 + (1 << 32)))
