"""Standard normal noise as a function of (seed, element index) alone.

Element ``i`` of a tensor, counted in logical (row-major) order whatever its memory layout, belongs to group ``i // 4``
and is lane ``i % 4`` of it. Philox-4x32 with 7 rounds (Salmon et al. 2011: enough for BigCrush) turns (seed, group)
into four 32-bit words, and two Box-Muller pairs turn the words into four normals. So noise depends on no generator
state, device, layout, tile or thread. This file is the PyTorch twin of the Triton device function; it draws no seeds.
"""

import math

import torch
from torch import Tensor

__all__ = ["N_ROUNDS", "normal", "philox"]

N_ROUNDS = 7
_MASK = 0xFFFFFFFF
# Multipliers and key increments of Philox-4x32 (Salmon et al. 2011, section 3.3).
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85

# Groups drawn at a time: large enough that PyTorch splits each step over threads, small enough for the caches.
_CHUNK = 1 << 17


def philox(counter: tuple[Tensor, ...], key: tuple[int, int], n_rounds: int = N_ROUNDS) -> tuple[Tensor, ...]:
    """Philox-4x32 block function.

    Parameters
    ----------
    counter : tuple of 4 int64 tensors
        Counter words in [0, 2^32), all of one shape.
    key : tuple of 2 int
        Key words in [0, 2^32).
    n_rounds : int
        Number of rounds; 7 pass BigCrush.

    Returns
    -------
    tuple of 4 int64 tensors
        Random words in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(n_rounds):
        # The product of two 32-bit words fills all 64 bits and int64 wraps, which keeps the bits. Only c0 and c2 are
        # multiplied, so only they need their high half cleared; c1 and c3 carry theirs along until the end.
        p0, p1 = c0 * _M0, c2 * _M1
        c0 = (p1 >> 32).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_MASK)
        c2 = (p0 >> 32).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_MASK)
        c1, c3 = p1, p0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1.bitwise_and_(_MASK), c2, c3.bitwise_and_(_MASK)


def _four_normals(group: Tensor, seed: int, out: Tensor) -> None:
    """Write the normals of each group (int64, any shape) to out[lane], lane = 0..3 (fp32)."""
    zero = torch.zeros_like(group)
    words = philox((group & _MASK, group >> 32, zero, zero), (seed & _MASK, (seed >> 32) & _MASK))
    for pair in (0, 2):
        # u in (0, 1], so the logarithm is finite; the angle is the signed word as a fraction of a turn, in [-1/2, 1/2).
        u = words[pair].to(torch.float32).mul_(2.0**-32).add_(2.0**-33)
        radius = u.log_().mul_(-2.0).sqrt_()
        turn = (words[pair + 1] << 32).bitwise_right_shift_(32).to(torch.float32).mul_(2.0**-32)
        angle = turn.mul_(2.0 * math.pi)
        torch.mul(radius, angle.cos(), out=out[pair])
        torch.mul(radius, angle.sin_(), out=out[pair + 1])


def normal(like: Tensor, seed: int) -> Tensor:
    """Draw N(0, 1) noise for every element of a tensor.

    Parameters
    ----------
    like : Tensor
        Gives shape, device and memory layout of the result; its values are not read.
    seed : int
        Any 64-bit integer.

    Returns
    -------
    Tensor
        fp32 noise with the strides of ``like`` where they are dense. Element ``i`` in logical order depends on
        (seed, i) alone.
    """
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


def _fill_contiguous(eps: Tensor, seed: int) -> None:
    """Fill a row-major tensor: lanes are neighbours in memory."""
    n_whole = eps.numel() // 4
    lanes = eps.view(-1)[: 4 * n_whole].view(n_whole, 4).T
    for start in range(0, n_whole, _CHUNK):
        stop = min(start + _CHUNK, n_whole)
        _four_normals(torch.arange(start, stop, device=eps.device), seed, lanes[:, start:stop])
    n_left = eps.numel() - 4 * n_whole
    if n_left:
        last = torch.empty(4, 1, device=eps.device)
        _four_normals(torch.tensor([n_whole], device=eps.device), seed, last)
        eps.view(-1)[4 * n_whole :] = last[:n_left, 0]


def _fill_channels_last(eps: Tensor, seed: int) -> None:
    """Fill a channels_last_3d tensor in memory order: channels are neighbours, a group's lanes lie one row apart."""
    n, channels = eps.shape[:2]
    rows = math.prod(eps.shape[2:]) // 4  # groups in one channel's volume
    lanes = eps.permute(0, 2, 3, 4, 1).view(n, rows, 4, channels)
    first = torch.arange(n * channels, device=eps.device).view(n, 1, channels) * rows
    step = max(1, _CHUNK // channels)
    for sample in range(n):
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            row = torch.arange(start, stop, device=eps.device)[:, None]
            _four_normals(first[sample] + row, seed, lanes[sample, start:stop].transpose(0, 1))
