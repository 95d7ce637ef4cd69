"""Standard normal noise as a function of (seed, element index) alone.

Element ``i`` of a tensor, counted in logical (row-major) order whatever its memory layout, belongs to group ``i // 4``
and is lane ``i % 4`` of it. Philox-4x32 with 7 rounds (Salmon et al. 2011: enough for BigCrush) turns (seed, group)
into four 32-bit words, and two Box-Muller pairs turn the words into four normals. So noise depends on no generator
state, device, layout, tile or thread. This file is the PyTorch twin of the Triton device function; it draws no seeds.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["N_ROUNDS", "normal", "philox"]

N_ROUNDS = 7
_MASK = 0xFFFFFFFF
# Multipliers and key increments of Philox-4x32 (Salmon et al. 2011, section 3.3).
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
# For numpy: the multipliers, and what the key words of rounds 2 to 6 add to those of round 0.
_FACTORS = np.array([[_M1], [_M0]], np.uint64)
_LATER_STEPS = np.array([[[r * w & _MASK] for w in (_W0, _W1)] for r in range(2, N_ROUNDS)], np.uint64)

_ANGLE = 2.0 * math.pi * 2.0**-32  # of a signed word, as a fraction of a turn

Key = int | Tensor  # half of a seed

# Groups drawn at a time by each of several threads, fewer of which PyTorch would not split, and by one alone, which
# keeps them in its cache.
_CHUNK, _ALONE = 1 << 15, 1 << 14


def philox(counter: tuple[Tensor, ...], key: tuple[Key, Key], n_rounds: int = N_ROUNDS) -> tuple[Tensor, ...]:
    """Philox-4x32 block function.

    Parameters
    ----------
    counter : tuple of 4 int64 tensors
        Counter words in [0, 2^32), all of one shape.
    key : tuple of 2 int or int64 scalar tensors
        Key words in [0, 2^32).
    n_rounds : int
        Number of rounds; 7 pass BigCrush.

    Returns
    -------
    tuple of 4 int64 tensors
        Random words in [0, 2^32).
    """
    even, odd = _philox(torch.stack(counter[::2]), torch.stack(counter[1::2]), key, n_rounds)
    return even[0], odd[0], even[1], odd[1]


def _philox(even: Tensor, odd: Tensor, key: tuple[Key, Key], n_rounds: int) -> tuple[Tensor, Tensor]:
    """The same on words 0 and 2, and 1 and 3, each [2, ...], which are overwritten: two words in an operation."""
    product = torch.empty_like(even)
    (first, third), odds, products = even.unbind(), odd.unbind(), product.unbind()
    for keys in _round_keys(key, n_rounds, even).unbind():
        # The product of two 32-bit words fills all 64 bits and int64 wraps, which keeps the bits. Only even words are
        # multiplied, so only they need their high half cleared; odd ones carry theirs along until the end.
        torch.mul(third, _M1, out=products[0])
        torch.mul(first, _M0, out=products[1])
        torch.bitwise_right_shift(product, 32, out=even)
        even.bitwise_xor_(odd).bitwise_xor_(keys).bitwise_and_(_MASK)
        odd, product, odds, products = product, odd, products, odds
    return even, odd.bitwise_and_(_MASK)


def _philox_by_numpy(counter: NDArray[np.uint64], seed: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """The same on groups below 2^32, [n], by numpy.

    Words 1 to 3 of these counters are 0, so the first two rounds act on one word each. The high halves of the odd words
    are left as they are.
    """
    k_0, k_1 = seed & _MASK, (seed >> 32) & _MASK
    l_0, l_1 = (k_0 + _W0) & _MASK, (k_1 + _W1) & _MASK
    even, odd, product = np.empty((3, 2, *counter.shape), np.uint64)
    np.multiply(counter, _M0, out=odd[1])
    np.right_shift(odd[1], 32, out=even[1])
    even[1] ^= k_1
    np.multiply(even[1], _M1, out=odd[0])
    np.right_shift(odd[0], 32, out=even[0])
    even[0] ^= l_0
    np.bitwise_xor(odd[1], (_M0 * k_0 >> 32) ^ l_1, out=even[1])
    even[1] &= _MASK
    odd[1] = _M0 * k_0 & _MASK
    for keys in (np.array([[k_0], [k_1]], np.uint64) + _LATER_STEPS) & _MASK:
        np.multiply(even[::-1], _FACTORS, out=product)
        np.right_shift(product, 32, out=even)
        even ^= odd
        even ^= keys
        even &= _MASK
        odd, product = product, odd
    return even, odd


def _round_keys(key: tuple[Key, Key], n_rounds: int, like: Tensor) -> Tensor:
    """The key words of each round, [n_rounds, 2, 1, ...]; made where the seed is, so that no one waits for it."""
    steps = torch.arange(n_rounds, device=like.device)
    words = torch.stack([(k + steps * w) & _MASK for k, w in zip(key, (_W0, _W1), strict=True)], 1)
    return words.view(n_rounds, 2, *[1] * (like.dim() - 1))


def _uniforms(group: Tensor, seed: Tensor | int) -> tuple[Tensor, Tensor]:
    """Two uniform numbers in (0, 1] and two angles in [-pi, pi) for each group, both fp32 [2, ...]."""
    even, odd = group.new_zeros(2, *group.shape), group.new_zeros(2, *group.shape)
    torch.bitwise_and(group, _MASK, out=even[0])
    torch.bitwise_right_shift(group, 32, out=odd[0])
    even, odd = _philox(even, odd, (seed & _MASK, (seed >> 32) & _MASK), N_ROUNDS)
    signed = odd.bitwise_left_shift_(32).bitwise_right_shift_(32)
    return even.to(torch.float32).mul_(2.0**-32).add_(2.0**-33), signed.to(torch.float32).mul_(_ANGLE)


def _uniforms_by_numpy(group: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """The same for groups below 2^32 by numpy, whose calls cost half as much as PyTorch's on one thread."""
    even, odd = _philox_by_numpy(group.view(-1).numpy().view(np.uint64), seed)
    u, angle = even.view(np.int64).astype(np.float32), odd.astype(np.int32).astype(np.float32)
    u *= 2.0**-32
    u += 2.0**-33
    angle *= _ANGLE
    return torch.from_numpy(u).view(2, *group.shape), torch.from_numpy(angle).view(2, *group.shape)


def _four_normals(group: Tensor, seed: Tensor | int, out: Tensor) -> None:
    """Write the normals of each group (int64, any shape, ascending) to out[lane], lane = 0..3 (fp32)."""
    if isinstance(seed, int) and group.is_cpu and group.numel() <= _ALONE and group.view(-1)[-1].item() <= _MASK:
        u, angle = _uniforms_by_numpy(group, seed)
    else:
        u, angle = _uniforms(group, seed)
    radius = u.log_().mul_(-2.0).sqrt_()  # finite, for u > 0
    torch.mul(radius, angle.cos(), out=out[0::2])
    torch.mul(radius, angle.sin_(), out=out[1::2])


def normal(like: Tensor, seed: Tensor | int) -> Tensor:
    """Draw N(0, 1) noise for every element of a tensor.

    Parameters
    ----------
    like : Tensor
        Gives shape, device and memory layout of the result; its values are not read.
    seed : int or int64 scalar Tensor
        Any 64-bit integer. A tensor on a GPU is never read by the host.

    Returns
    -------
    Tensor
        fp32 noise with the strides of ``like`` where they are dense. Element ``i`` in logical order depends on
        (seed, i) alone.
    """
    if isinstance(seed, Tensor) and seed.device.type == "cpu":
        seed = int(seed)
    if like.numel() == 0:
        return torch.empty_like(like, dtype=torch.float32)
    channels_last = like.dim() == 5 and like.stride(1) == 1 and math.prod(like.shape[2:]) % 4 == 0
    if channels_last and like.is_contiguous(memory_format=torch.channels_last_3d):
        return _channels_last(like, seed)
    eps = _row_major(like, seed)
    return eps if like.is_contiguous() else torch.empty_like(like, dtype=torch.float32).copy_(eps)


def _chunk(eps: Tensor) -> int:
    """Groups to draw at a time."""
    if eps.device.type != "cpu":
        return 1 << 22
    threads = torch.get_num_threads()
    return _ALONE if threads == 1 else _CHUNK * threads


def _row_major(like: Tensor, seed: Tensor | int) -> Tensor:
    """Noise of a tensor's shape, row-major: lanes are neighbours in memory."""
    n_groups = -(-like.numel() // 4)
    eps = torch.empty(4 * n_groups, dtype=torch.float32, device=like.device)
    lanes = eps.view(n_groups, 4).T
    chunk = _chunk(eps)
    for start in range(0, n_groups, chunk):
        stop = min(start + chunk, n_groups)
        _four_normals(torch.arange(start, stop, device=eps.device), seed, lanes[:, start:stop])
    return eps[: like.numel()].view(like.shape)


def _channels_last(like: Tensor, seed: Tensor | int) -> Tensor:
    """Noise of a channels_last_3d tensor in memory order: channels are neighbours, lanes of a group a row apart."""
    eps = torch.empty_like(like, dtype=torch.float32)
    n, channels = eps.shape[:2]
    rows = math.prod(eps.shape[2:]) // 4  # groups in one channel's volume
    lanes = eps.permute(0, 2, 3, 4, 1).view(n, rows, 4, channels)
    first = torch.arange(n * channels, device=eps.device).view(n, 1, channels) * rows
    step = max(1, _chunk(eps) // channels)  # rows at a time, of one sample or of several whole ones
    samples = max(1, step // rows)
    for sample in range(0, n, samples):
        some = slice(sample, sample + samples)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            row = torch.arange(start, stop, device=eps.device)[:, None]
            _four_normals(first[some] + row, seed, lanes[some, start:stop].movedim(2, 0))
    return eps
