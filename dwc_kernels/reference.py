"""The definition of the op in PyTorch: any device, any dtype, fast on the CPU.

With mean = conv(x, mu) + b_mu and var = conv(x^2, sigma^2) + b_sigma^2, the forward returns y = mean + sqrt(var) * eps
and r = eps / (2 sqrt(var)), which is 0 where var is 0. With g = dL/dy, dL/dmean = g and dL/dvar = g * r
(McClure et al. 2018, Eqs. 12-15). Every other backend is this function, faster. Arguments are already checked: tensors
are batched and of one dtype, stride, padding and dilation are triples.

On the CPU both convolutions run in channels_last_3d, the input gradient runs as a forward convolution with the mirrored
filter (PyTorch's own dilated backward can be several times slower), and the weight gradient is a sum of matrix products
that skip taps outside the volume. Wide 3x3x3 layers in fp32 take `winograd`'s shorter sums for all but the variance.
Where oneDNN has AVX-512, only dilated layers do so, and the others take PyTorch's own derivatives. Small volumes and
layers with more weights than voxels stay in the plain layout; very few voxels become `unfolded`'s matrix products.
"""

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from dwc_kernels import unfolded, winograd
from dwc_kernels.backends import _why_not_here
from dwc_kernels.correlation import correlate_both
from dwc_kernels.geometry import Triple, output_size
from dwc_kernels.noise import normal

__all__ = [
    "forward",
    "grad_bias",
    "grad_input",
    "grad_weight",
    "gradients",
    "multiplies_bf16",
    "native",
    "output_layout",
]

# Where fewer elements go in and out, changing their layout costs more than it wins: always, and where PyTorch hands
# them to oneDNN with AVX-512, which blocks whole vectors of channels by itself.
_FEW, _FEW_BLOCKED = 1 << 16, 1 << 20
# From how many products of input and output channels a tap's matrix product outruns PyTorch's own weight gradient.
_WIDE = 64 * 64


def multiplies_bf16() -> bool:
    """Whether this CPU has instructions for bf16 products; without, they are slower than fp32 ones."""
    known = torch.cpu.get_capabilities()
    return any(known.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def _working_dtype(x: Tensor, size: Triple, kernel: Triple, dilation: Triple) -> torch.dtype:
    """The dtype of products with x: fp16 never holds a square, and bf16 is kept only where it is fast and right.

    ``size`` is D, H, W of the convolution's input. Where the kernel reaches beyond it, oneDNN's bf16 products read
    memory that nobody wrote, or write past their own (PyTorch 2.13.0).
    """
    if x.dtype == torch.bfloat16 and x.is_cpu:
        short = any(n <= d * (k - 1) for n, k, d in zip(size, kernel, dilation, strict=True))
        return torch.float32 if short or not multiplies_bf16() else x.dtype
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def native(x: Tensor) -> Tensor:
    """The layout that convolves fastest on the CPU; elsewhere as it is."""
    if not x.is_cpu:
        return x
    n, channels, voxels = x.shape[0], x.shape[1], prod(x.shape[2:])
    if channels == 1:  # in either layout; PyTorch goes by the stride, which `contiguous` would leave alone
        return x.reshape(n, *x.shape[2:], 1).permute(0, 4, 1, 2, 3)
    if channels < 32 or voxels < 128 or not x.is_contiguous() or type(x) is not Tensor:
        return x.contiguous(memory_format=torch.channels_last_3d)
    # PyTorch transposes matrices in blocks, volumes element by element.
    out = torch.empty_like(x, memory_format=torch.channels_last_3d)
    for target, source in zip(
        out.permute(0, 2, 3, 4, 1).view(n, voxels, channels), x.view(n, channels, voxels), strict=True
    ):
        target.copy_(source.t())
    return out


def _stays_plain(
    x: Tensor,  # [N, C, D, H, W]
    weight: Tensor,  # [F, C / groups, kD, kH, kW], or of a transposed convolution [C, F / groups, ...]
    stride: Triple,
    dilation: Triple,
    n_outputs: int,
    transposed: bool = False,
) -> bool:
    """Whether PyTorch's own convolutions in the plain layout win, on the CPU without dilation.

    They do where there are more weights than voxels, for every copy of the weights, mirrored or in another layout,
    costs as much as they do; and for plain inputs that are small, of one channel, or of transposed, strided or 1x1x1
    convolutions.
    """
    if x.device.type != "cpu" or dilation != (1, 1, 1):
        return False
    n_elements = x.numel() + n_outputs
    if weight.numel() >= n_elements:
        return True
    if output_layout(x) == torch.channels_last_3d:
        return False
    if transposed or stride != (1, 1, 1) or prod(weight.shape[2:]) == 1 or x.shape[1] == 1 or n_elements < _FEW:
        return True
    blocked = weight.shape[0] % 16 == 0 and weight.shape[1] % 16 == 0 and x.shape[1] == weight.shape[1]
    taken = x.shape[0] > 1 or prod(x.shape[1:4]) > 20480  # by oneDNN
    return blocked and taken and n_elements < _FEW_BLOCKED and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _plain(x: Tensor) -> Tensor:
    return x.contiguous()


def output_layout(x: Tensor) -> torch.memory_format:
    """The memory format that outputs share with the input: told by its strides, as PyTorch's own convolutions do."""
    voxels_last = x.stride(1) == 1 and x.stride(4) >= x.shape[1] and prod(x.shape[1:]) > 1
    return torch.channels_last_3d if voxels_last else torch.contiguous_format


def forward(
    x: Tensor,  # [N, C, D, H, W]
    weight_mu: Tensor,  # [F, C / groups, kD, kH, kW]
    weight_sigma: Tensor,
    bias_mu: Tensor | None,  # [F]
    bias_sigma: Tensor | None,
    stride: Triple,
    padding: Triple,
    dilation: Triple,
    groups: int,
    seed: Tensor,  # int64 scalar
    *,
    keep_r: bool = True,
    transposed_size: Triple | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample the convolution, or with ``transposed_size``, the output's voxels, the transposed one with strides.

    Returns
    -------
    y, r : Tensor
        [N, F, D', H', W'] in the dtype of x: the sample, in the layout of x, and eps / (2 sqrt(var)), which is all that
        the backward needs next to x, in the layout that the backward will want; empty without ``keep_r``.
    """
    working = _working_dtype(x, transposed_size or x.shape[2:], weight_mu.shape[2:], dilation)
    size = transposed_size or output_size(x.shape[2:], weight_mu.shape[2:], stride, padding, dilation)
    n_filters = weight_mu.shape[1] * groups if transposed_size else weight_mu.shape[0]
    n_outputs = x.shape[0] * n_filters * prod(size)
    plain = _stays_plain(x, weight_mu, stride, dilation, n_outputs, transposed_size is not None)
    laid_out = _plain if plain else native
    h, mu, sigma = (laid_out(t.to(working)) for t in (x, weight_mu, weight_sigma))
    b_mu = None if bias_mu is None else bias_mu.to(working)
    b_var = None if bias_sigma is None else bias_sigma.to(working).square()
    if transposed_size:
        shape = torch.Size((x.shape[0], n_filters, *size))
        y = _transposed(h, mu, shape, stride, padding, dilation, groups)
        var = _transposed(_times(h, h), _times(sigma, sigma), shape, stride, padding, dilation, groups)
        if b_mu is not None and b_var is not None:
            y, var = y.add_(b_mu.view(-1, 1, 1, 1)), var.add_(b_var.view(-1, 1, 1, 1))
    elif unfolded.suits(h, mu, dilation, groups, x.shape[0] * prod(size)):
        y, var = unfolded.both_convolutions(h, mu, sigma, size, stride, padding)
        if b_mu is not None and b_var is not None:
            y, var = y.add_(b_mu.view(-1, 1, 1, 1)), var.add_(b_var.view(-1, 1, 1, 1))
    else:
        y = _conv3d(h, mu, b_mu, stride, padding, dilation, groups)
        # Direct: Winograd's differences could make a variance that is nearly 0 negative.
        squared = _times(h, h) if h.data_ptr() == x.data_ptr() else h.square_()
        var = F.conv3d(squared, _times(sigma, sigma), b_var, stride, padding, dilation, groups)
    std = var.sqrt_()
    eps = _noise(std, seed).to(working)
    y.addcmul_(std, eps)
    y = y.to(x.dtype).contiguous(memory_format=output_layout(x))
    if y._is_view():  # autograd would refuse to let an activation overwrite it in place
        y = y.new_empty(0).set_(y.untyped_storage(), y.storage_offset(), y.shape, y.stride())
    if not keep_r:  # no backward will follow
        return y, x.new_empty(0)
    r = torch.addcdiv(std.new_zeros(()), eps, std, value=0.5, out=eps)
    # A look at the values, which a GPU would have to be waited for.
    if std.device.type != "cpu" or (std.numel() and not std.amin() > 0):
        r.masked_fill_(std == 0, 0.0)
    if x.dtype == torch.float16:  # where std < 8e-6, 1 / std leaves its range; saturated, r keeps the gradient finite
        r.clamp_(-torch.finfo(x.dtype).max, torch.finfo(x.dtype).max)
    return y, r.to(x.dtype)


def _launches(x: Tensor) -> bool:
    """Whether a kernel can draw the noise of x, where the convolution itself could not run as one."""
    return x.is_cuda and _why_not_here(x.device.type, x.device.index) is None


def _noise(like: Tensor, seed: Tensor) -> Tensor:
    if not _launches(like):
        return normal(like, seed)
    from dwc_kernels.kernels import noise

    return noise.normal(like, seed)


def _conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Triple,
    padding: Triple,
    dilation: Triple,
    groups: int,
    times: Tensor | None = None,
) -> Tensor:
    """conv3d(x, weight), or of x * times."""
    geometry = (stride, padding, dilation)
    tiled = winograd.suits(x, weight.shape, *geometry)
    if not tiled or winograd.onednn_wins(x, weight.shape, *geometry, groups):
        return F.conv3d(_times(x, times), weight, bias, stride, padding, dilation, groups)
    y = winograd.convolve(x, weight, padding, dilation, times)
    return y if bias is None else y.add_(bias.view(-1, 1, 1, 1))


def grad_input(
    g: Tensor,  # [N, F, D', H', W']
    r: Tensor,
    x: Tensor,  # [N, C, D, H, W]
    weight_mu: Tensor,
    weight_sigma: Tensor,
    stride: Triple,
    padding: Triple,
    dilation: Triple,
    groups: int,
    *,
    transposed: bool = False,
) -> Tensor:
    """dL/dx = convT(g, mu) + 2 x * convT(g * r, sigma^2), in the dtype and layout of x; conv for convT."""
    working = _working_dtype(x, (g if transposed else x).shape[2:], weight_mu.shape[2:], dilation)
    plain = _stays_plain(x, weight_mu, stride, dilation, g.numel(), transposed)
    laid_out = _plain if plain else native
    g, r, h, mu, sigma = (laid_out(t.to(working)) for t in (g, r, x, weight_mu, weight_sigma))
    geometry = (stride, padding, dilation, groups)
    if transposed:
        dvar = _conv3d(g, _times(sigma, sigma), None, *geometry, times=r)
        dx = _conv3d(g, mu, None, *geometry)
    elif unfolded.suits(h, mu, dilation, groups, g.numel() // g.shape[1]):
        dx, dvar = unfolded.both_transposed(g, r, h, mu, sigma, stride, padding)
    else:
        dvar = _transposed(g, _times(sigma, sigma), h.shape, *geometry, times=r, plain=plain)
        dx = _transposed(g, mu, h.shape, *geometry, plain=plain)
    dx.addcmul_(dvar, h, value=2.0)
    return dx.to(x.dtype).contiguous(memory_format=output_layout(x))


def _transposed(
    g: Tensor,
    weight: Tensor,
    shape: torch.Size,
    stride: Triple,
    padding: Triple,
    dilation: Triple,
    groups: int,
    times: Tensor | None = None,
    plain: bool = False,
) -> Tensor:
    """The adjoint of conv3d(. , weight) applied to g, or to g * times."""
    reach = tuple(d * (k - 1) - p for d, k, p in zip(dilation, weight.shape[2:], padding, strict=True))
    like = _placeholder(shape, g)
    dense = dilation == (1, 1, 1) and groups == 1
    direct = dense and winograd.onednn_wins(like, weight.shape, stride, padding, dilation, groups)
    if g.device.type != "cpu" or stride != (1, 1, 1) or min(reach) < 0 or plain or direct:
        return _derivative(0, _times(g, times), like, weight, stride, padding, dilation, groups)
    # At stride 1 the adjoint is a convolution with the mirrored filter, inputs and outputs exchanged within a group.
    per_group = weight.unflatten(0, (groups, -1))  # [groups, F / groups, C / groups, kD, kH, kW]
    mirrored = native(per_group.transpose(1, 2).flatten(0, 1).flip(2, 3, 4))
    return _conv3d(g, mirrored, None, stride, reach, dilation, groups, times)


def grad_weight(
    g: Tensor,  # [N, F, D', H', W']
    r: Tensor,
    x: Tensor,  # [N, C, D, H, W]
    weight_sigma: Tensor,  # [F, C / groups, kD, kH, kW]
    stride: Triple,
    padding: Triple,
    dilation: Triple,
    groups: int,
    *,
    bias_sigma: Tensor | None = None,  # [F]
    wants_mu: bool = True,
    wants_sigma: bool = True,
    transposed: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dL/dmu = corr(x, g) and dL/dsigma = 2 sigma * corr(x^2, g * r), in the dtype of weight_sigma, then `grad_bias`.

    What is not wanted is empty, the gradients of the biases without ``bias_sigma``; r may be empty where no sigma's
    gradient is wanted.
    """
    shape = weight_sigma.shape
    working = _working_dtype(x, (g if transposed else x).shape[2:], shape[2:], dilation)
    geometry = (stride, padding, dilation, groups)
    dmu = dsigma = db_mu = db_sigma = weight_sigma.new_empty(0)
    plain = _stays_plain(x, weight_sigma, stride, dilation, g.numel(), transposed)
    # With one channel x has either layout, and PyTorch's sum over a plain g is faster where it is not oneDNN's.
    either = x.shape[1] == 1 and output_layout(g) == torch.contiguous_format and not transposed
    plain_sum = plain or (either and not winograd.onednn_wins(x, shape, *geometry))
    laid_out = _plain if plain_sum and x.device.type == "cpu" else native
    g, h = (laid_out(t.to(working)) for t in (g, x))
    r = laid_out(r.to(working)) if wants_sigma else r
    if bias_sigma is not None:
        db_mu, db_sigma = grad_bias(g, r, bias_sigma)
    # A transposed convolution's input is the output of the convolution whose weight it has.
    a, b, a_times, b_times = (g, h, r, h) if transposed else (h, g, h, r)
    # Dilated weight gradients are the one sum that oneDNN is slow at.
    direct = dilation == (1, 1, 1) and winograd.onednn_wins(a, shape, *geometry)
    tiled = winograd.suits(a, shape, stride, padding, dilation) and not direct
    wide = x.device.type == "cpu" and not plain and not direct and x.shape[1] * g.shape[1] >= _WIDE
    both = wants_mu and wants_sigma and not transposed
    if both and unfolded.suits(h, weight_sigma, dilation, groups, g.numel() // g.shape[1]):
        dmu, dsigma = unfolded.both_correlations(h, g, r, weight_sigma.to(working), stride, padding)
    elif both and wide and not tiled and stride == (1, 1, 1) and groups == 1:
        dmu, dvar = correlate_both(a, b, a_times, b_times, shape, padding, dilation)
        dsigma = _times_twice(dvar, weight_sigma)
    else:
        dmu = _correlate(tiled, a, None, b, None, shape, *geometry) if wants_mu else dmu
        if wants_sigma:
            dsigma = _times_twice(_correlate(tiled, a, a_times, b, b_times, shape, *geometry), weight_sigma)
    biased = bias_sigma is not None
    wanted = ((dmu, wants_mu), (dsigma, wants_sigma), (db_mu, wants_mu and biased), (db_sigma, wants_sigma and biased))
    out = (t.to(weight_sigma.dtype).contiguous() if want else weight_sigma.new_empty(0) for t, want in wanted)
    dmu, dsigma, db_mu, db_sigma = out
    return dmu, dsigma, db_mu, db_sigma


def gradients(
    g: Tensor,  # [N, F, D', H', W']
    r: Tensor,
    x: Tensor,  # [N, C, D, H, W]
    weight_mu: Tensor,
    weight_sigma: Tensor,
    stride: Triple,
    padding: Triple,
    dilation: Triple,
    groups: int,
    *,
    bias_sigma: Tensor | None = None,  # [F]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`grad_input` and all of `grad_weight`, with what they share formed once."""
    shape, geometry = weight_mu.shape, (stride, padding, dilation)
    laid_out = _plain if _stays_plain(x, weight_mu, stride, dilation, g.numel()) else native
    several = x.shape[1] > 1  # with one channel either layout may suit a sum
    g, h = (laid_out(g), laid_out(x)) if several else (g, x)
    dense = several and dilation == (1, 1, 1) and groups == 1
    few = unfolded.suits(h, weight_mu, dilation, groups, g[:, 0].numel())
    if few or not dense or not winograd.onednn_wins(h, shape, *geometry, groups):
        dx = grad_input(g, r, h, weight_mu, weight_sigma, *geometry, groups)
        dx = dx.contiguous(memory_format=output_layout(x))
        return dx, *grad_weight(g, r, h, weight_sigma, *geometry, groups, bias_sigma=bias_sigma)
    arguments = (*geometry, False, (0, 0, 0), 1, [True, True, False])
    backward = torch.ops.aten.convolution_backward
    sigma = laid_out(weight_sigma)
    dvar, dsigma, _ = backward(_times(g, laid_out(r)), _times(h, h), _times(sigma, sigma), None, *arguments)
    dx, dmu, _ = backward(g, h, laid_out(weight_mu), None, *arguments)
    dx = dx.addcmul_(dvar, h, value=2.0).contiguous(memory_format=output_layout(x))
    empty = weight_sigma.new_empty(0)
    biases = (empty, empty) if bias_sigma is None else grad_bias(g, r, bias_sigma)
    return dx, dmu.contiguous(), _times_twice(dsigma, weight_sigma), *biases


def grad_bias(g: Tensor, r: Tensor, bias_sigma: Tensor) -> tuple[Tensor, Tensor]:
    """dL/db_mu = sum g and dL/db_sigma = 2 b_sigma * sum g * r, both [F], in the dtype of bias_sigma.

    The latter is 0 where r is empty because nobody wants it.
    """
    voxels, wide = (0, 2, 3, 4), torch.promote_types(g.dtype, torch.float32)
    db_mu = g.sum(voxels, dtype=wide)
    db_var = (g.to(wide) * r).sum(voxels) if r.numel() else torch.zeros_like(db_mu)
    return db_mu.to(bias_sigma.dtype), (2 * bias_sigma * db_var).to(bias_sigma.dtype)


def _correlate(
    tiled: bool,  # whether `winograd` suits
    a: Tensor,
    a_times: Tensor | None,
    b: Tensor,
    b_times: Tensor | None,
    shape: torch.Size,
    stride: Triple,
    padding: Triple,
    dilation: Triple,
    groups: int,
) -> Tensor:
    """The weight gradient of a convolution of a * a_times, with b * b_times the gradient of its output."""
    if tiled:
        return winograd.correlate(a, b, padding, dilation, a_times, b_times)
    a, b = _times(a, a_times), _times(b, b_times)
    return _derivative(1, b, a, _placeholder(shape, a), stride, padding, dilation, groups)


def _times(x: Tensor, times: Tensor | None) -> Tensor:
    """x * times with the strides of x, also along a single channel, where PyTorch reads the layout from them."""
    return x if times is None else torch.mul(x, times, out=torch.empty_like(x))


def _times_twice(dvar: Tensor, sigma: Tensor) -> Tensor:
    """2 sigma * dvar, row-major, from a dvar that is overwritten."""
    dvar = dvar.contiguous()
    return torch.addcmul(dvar.new_zeros(()), dvar, sigma.to(dvar.dtype), value=2.0, out=dvar)


def _placeholder(shape: torch.Size, like: Tensor) -> Tensor:
    """A tensor of which only the shape will be read, in the layout of another."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=output_layout(like))


def _derivative(
    which: int,  # 0: by the input, 1: by the weight
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Triple,
    padding: Triple,
    dilation: Triple,
    groups: int,
) -> Tensor:
    """PyTorch's own derivative of a convolution.

    `torch.nn.grad` would stand an expanded number in for the tensor that it does not read, which passes for
    channels_last and can make the call an order of magnitude slower.
    """
    mask = [which == 0, which == 1, False]
    geometry = (stride, padding, dilation, False, (0, 0, 0), groups)
    return torch.ops.aten.convolution_backward(g, x, weight, None, *geometry, mask)[which]
