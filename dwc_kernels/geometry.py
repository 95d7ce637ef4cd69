"""What a convolution's geometry says about shapes; no tensor is touched here."""

__all__ = ["Triple", "output_size", "same_padding", "transposed_output_size"]

Triple = tuple[int, int, int]


def output_size(size: Triple, kernel: Triple, stride: Triple, padding: Triple, dilation: Triple) -> Triple:
    """Voxels that come out along D, H, W; less than 1 where the padded volume is smaller than the dilated kernel."""
    return tuple(
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    )


def transposed_output_size(
    size: Triple, kernel: Triple, stride: Triple, padding: Triple, dilation: Triple, output_padding: Triple
) -> Triple:
    """Voxels that come out of a transposed convolution along D, H, W."""
    return tuple(
        (n - 1) * s - 2 * p + d * (k - 1) + o + 1
        for n, k, s, p, d, o in zip(size, kernel, stride, padding, dilation, output_padding, strict=True)
    )


def same_padding(kernel: Triple, dilation: Triple) -> list[tuple[int, int]]:
    """Zeros in front of and behind each axis for 'same': where they are odd in number, one more behind."""
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    return [(t // 2, t - t // 2) for t in total]
