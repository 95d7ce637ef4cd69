"""Standard normal noise as a function of (seed, element index) alone.

Element ``i`` of a tensor, counted in logical (row-major) order whatever its memory layout, belongs to group ``i // 4``
and is lane ``i % 4`` of it. Philox-4x32 with 7 rounds (Salmon et al. 2011: enough for BigCrush) turns (seed, group)
into four 32-bit words, and two Box-Muller pairs turn the words into four normals. So noise depends on no generator
state, device, layout, tile or thread. This file is the PyTorch twin of the Triton device function; it draws no seeds.
"""

import math

import numpy as np
import torch
from torch import Tensor

__all__ = ["N_ROUNDS", "normal", "philox"]

N_ROUNDS = 7
_MASK = 0xFFFFFFFF
# Multipliers and key increments of Philox-4x32 (Salmon et al. 2011, section 3.3).
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85

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


def _philox_by_numpy(group: Tensor, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The words of groups below 2^32 by numpy, whose calls cost half as much as PyTorch's on one thread.

    Words 1 to 3 of these counters are 0, so the first two rounds act on one word each.
    """
    counter = group.numpy().view(np.uint64)
    even, odd, product = (np.empty((2, *counter.shape), np.uint64) for _ in range(3))
    (k_0, k_1), (l_0, l_1), *keys = _key_words(key, N_ROUNDS)
    np.multiply(counter, _M0, out=odd[1])
    np.right_shift(odd[1], 32, out=even[1])
    even[1] ^= k_1
    np.multiply(even[1], _M1, out=odd[0])
    np.right_shift(odd[0], 32, out=even[0])
    even[0] ^= l_0
    np.bitwise_xor(odd[1], (_M0 * k_0 >> 32) ^ l_1, out=even[1])
    even[1] &= _MASK
    odd[1] = _M0 * k_0 & _MASK
    factors = np.array((_M1, _M0), np.uint64).reshape(2, *[1] * counter.ndim)
    for words in np.array(keys, np.uint64).reshape(-1, *factors.shape):
        np.multiply(even[::-1], factors, out=product)
        np.right_shift(product, 32, out=even)
        even ^= odd
        even ^= words
        even &= _MASK
        odd, product = product, odd
    odd &= _MASK
    return torch.from_numpy(even.view(np.int64)), torch.from_numpy(odd.view(np.int64))


def _key_words(key: tuple[int, int], n_rounds: int) -> list[list[int]]:
    """The two key words of each round."""
    return [[(k + r * w) & _MASK for k, w in zip(key, (_W0, _W1), strict=True)] for r in range(n_rounds)]


def _round_keys(key: tuple[Key, Key], n_rounds: int, like: Tensor) -> Tensor:
    """The key words of each round, [n_rounds, 2, 1, ...]; made where the seed is, so that no one waits for it."""
    shape = (n_rounds, 2, *[1] * (like.dim() - 1))
    if isinstance(key[0], int) and isinstance(key[1], int):
        return torch.tensor(_key_words((key[0], key[1]), n_rounds), device=like.device).view(shape)
    steps = torch.arange(n_rounds, device=like.device)
    return torch.stack([(k + steps * w) & _MASK for k, w in zip(key, (_W0, _W1), strict=True)], 1).view(shape)


def _four_normals(group: Tensor, seed: Tensor | int, out: Tensor) -> None:
    """Write the normals of each group (int64, any shape) to out[lane], lane = 0..3 (fp32)."""
    few = group.device.type == "cpu" and group.numel() <= _ALONE
    if isinstance(seed, int) and few and group.max() <= _MASK:
        even, odd = _philox_by_numpy(group, (seed & _MASK, (seed >> 32) & _MASK))
    else:
        even, odd = group.new_zeros(2, *group.shape), group.new_zeros(2, *group.shape)
        torch.bitwise_and(group, _MASK, out=even[0])
        torch.bitwise_right_shift(group, 32, out=odd[0])
        even, odd = _philox(even, odd, (seed & _MASK, (seed >> 32) & _MASK), N_ROUNDS)
    # u in (0, 1], so the logarithm is finite; the angle is the signed word as a fraction of a turn, in [-1/2, 1/2).
    u = even.to(torch.float32).mul_(2.0**-32).add_(2.0**-33)
    radius = u.log_().mul_(-2.0).sqrt_()
    turn = odd.bitwise_left_shift_(32).bitwise_right_shift_(32).to(torch.float32).mul_(2.0**-32)
    angle = turn.mul_(2.0 * math.pi)
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
    eps = torch.empty_like(like, dtype=torch.float32)
    if (
        like.dim() == 5
        and math.prod(like.shape[2:]) % 4 == 0
        and eps.is_contiguous(memory_format=torch.channels_last_3d)
    ):
        _fill_channels_last(eps, seed)
        return eps
    flat = eps if eps.is_contiguous() else torch.empty(like.shape, dtype=torch.float32, device=like.device)
    _fill_contiguous(flat, seed)
    return flat if flat is eps else eps.copy_(flat)


def _chunk(eps: Tensor) -> int:
    """Groups to draw at a time."""
    if eps.device.type != "cpu":
        return 1 << 22
    threads = torch.get_num_threads()
    return _ALONE if threads == 1 else _CHUNK * threads


def _fill_contiguous(eps: Tensor, seed: Tensor | int) -> None:
    """Fill a row-major tensor: lanes are neighbours in memory."""
    n_whole = eps.numel() // 4
    lanes = eps.view(-1)[: 4 * n_whole].view(n_whole, 4).T
    chunk = _chunk(eps)
    for start in range(0, n_whole, chunk):
        stop = min(start + chunk, n_whole)
        _four_normals(torch.arange(start, stop, device=eps.device), seed, lanes[:, start:stop])
    n_left = eps.numel() - 4 * n_whole
    if n_left:
        last = torch.empty(4, 1, device=eps.device)
        _four_normals(torch.tensor([n_whole], device=eps.device), seed, last)
        eps.view(-1)[4 * n_whole :] = last[:n_left, 0]


def _fill_channels_last(eps: Tensor, seed: Tensor | int) -> None:
    """Fill a channels_last_3d tensor in memory order: channels are neighbours, a group's lanes lie one row apart."""
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
