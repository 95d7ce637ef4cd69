"""Time the op on the GPU at hand against what PyTorch offers: ``python -m benchmarks.gpu [--out DIR]``.

Correctness comes first: no time is printed for a layer whose output or gradients are off. Then forward, backward and
both, per layer of Table 1 and for the whole network, for

    ours         the Triton kernels, channels_last_3d
    contiguous   two cuDNN convolutions and the elementwise composition, contiguous
    channels     the same, channels_last_3d
    compiled     the same under torch.compile
    mean         a single conv3d, the lower bound

with medians and quartiles of CUDA-graph replays, the host's time for the same call without a graph, peak memory,
TFLOP/s and the share of the matrix-product rate that this GPU was measured to reach. Its L2 bandwidth is measured by a
copy. On a machine without a GPU it says so, prints the memory table and exits with 0.
"""

import argparse
import contextlib
import csv
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.composition import composition
from benchmarks.memory import print_table
from benchmarks.shapes import LAYERS, SAMPLES, SIZE, Layer
from dwc_kernels import ffg_conv3d
from dwc_kernels.noise import normal
from dwc_kernels.timing import capture_stream, device_times, host_time, l2_bandwidth

__all__ = ["Timing", "main"]

DEVICE, ACTIVITY = "cuda", ProfilerActivity.CUDA
DTYPES = {"bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}
ROUNDING = {"bf16": 2.0**-8, "tf32": 2.0**-11, "fp32": 2.0**-23}  # of the operands
MATMUL = 8192  # rows of the matrices whose product is the ceiling
SEED = 7


@contextlib.contextmanager
def settings_restored() -> Iterator[None]:
    """Put PyTorch's precision and cuDNN settings back, whatever happens; what follows a general setting still does."""
    precisions = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    general, benchmark = torch.backends.cudnn.fp32_precision, torch.backends.cudnn.benchmark
    before = ["none" if p.fp32_precision == general else p.fp32_precision for p in precisions]
    try:
        yield
    finally:
        for setting, value in zip(precisions, before, strict=True):
            setting.fp32_precision = value
        torch.backends.cudnn.benchmark = benchmark


@dataclass(frozen=True)
class Timing:
    """One contender on one layer: milliseconds, bytes and rates."""

    device: str
    layer: str
    dtype: str
    contender: str
    phase: str
    median_ms: float
    first_quartile_ms: float
    third_quartile_ms: float
    host_ms: float
    peak_mb: float
    tflops: float
    share_of_matmul: float


def matmul_tflops(dtype: torch.dtype) -> float:
    """The matrix-product ceiling of this GPU, measured on square matrices."""
    a, b = (torch.randn(MATMUL, MATMUL, device=DEVICE, dtype=dtype) for _ in range(2))
    return 2 * MATMUL**3 / statistics.median(device_times(lambda: a @ b, 20)) / 1e9


def tensors(layers: tuple[Layer, ...], dtype: torch.dtype, samples: int) -> tuple[Tensor, list[list[Tensor]]]:
    """An input and each layer's weight_mu, weight_sigma, bias_mu, bias_sigma."""
    gen = torch.Generator(DEVICE).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE, generator=gen).to(dtype)

    parameters = []
    for layer in layers:
        shape = (layer.filters, layer.channels, *(layer.kernel,) * 3)
        mu = randn(*shape) * (2 / layer.channels / layer.kernel**3) ** 0.5
        parameters.append([mu, mu.abs() * 0.1, randn(layer.filters) * 0.1, randn(layer.filters).abs() * 0.01])
    x = randn(samples, layers[0].channels, *SIZE)
    return x.requires_grad_(), [[t.requires_grad_() for t in p] for p in parameters]


def network(op: Callable[..., Tensor], layers: tuple[Layer, ...]) -> Callable[..., Tensor]:
    """The layers in a row, with ReLUs between them."""

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        for i, layer in enumerate(layers):
            x = op(x, *parameters[4 * i : 4 * i + 4], padding=layer.padding, dilation=layer.dilation)
            x = F.relu(x) if layer is not layers[-1] else x
        return x

    return run


def mean_only(
    x: Tensor, weight_mu: Tensor, weight_sigma: Tensor, bias_mu: Tensor, bias_sigma: Tensor, **geometry: Any
) -> Tensor:
    """One convolution with the means."""
    return F.conv3d(x, weight_mu, bias_mu, **geometry)


CONTENDERS = {
    "ours": (ffg_conv3d, torch.channels_last_3d, False),
    "contiguous": (composition, torch.contiguous_format, False),
    "channels": (composition, torch.channels_last_3d, False),
    "compiled": (composition, torch.channels_last_3d, True),
    "mean": (mean_only, torch.channels_last_3d, False),
}


def errors(layer: Layer, dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """Relative errors of ours and of the composition in the same dtype, against fp64, on one sample."""
    x, (parameters,) = tensors((layer,), dtype, 1)
    geometry: dict[str, Any] = dict(padding=layer.padding, dilation=layer.dilation)
    eps = normal(torch.empty(1, layer.filters, *SIZE, device=DEVICE), SEED)

    def results(op: Callable[..., Tensor], inputs: list[Tensor], **options: Any) -> list[Tensor]:
        inputs = [t.detach().requires_grad_() for t in inputs]
        y = op(*inputs, **geometry, **options)
        g = torch.randn(y.shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1)).to(dtype).to(y.dtype)
        return [y.detach(), *torch.autograd.grad(y, inputs, g)]

    inputs = [x, *parameters]
    exact = results(composition, [t.double() for t in inputs], eps=eps.double())
    ours = results(ffg_conv3d, inputs, seed=SEED, backend="triton")
    composed = results(composition, inputs, eps=eps.to(dtype))
    names = ("y", "x", "weight_mu", "weight_sigma", "bias_mu", "bias_sigma")
    return {
        name: tuple(((t.double() - e).norm() / e.norm()).item() for t in (o, c))
        for name, e, o, c in zip(names, exact, ours, composed, strict=True)
    }


def measure(
    name: str, layers: tuple[Layer, ...], dtype: str, contender: str, ceiling: float, repeats: int
) -> list[Timing]:
    """Forward, backward and both of one contender."""
    op, layout, compiled = CONTENDERS[contender]
    x, parameters = tensors(layers, DTYPES[dtype], SAMPLES)
    x = x.detach().to(memory_format=layout).requires_grad_(len(layers) == 1)
    inputs = [x, *(t for p in parameters for t in p)]
    wanted = [t for t in inputs if t.requires_grad]
    run = network(op, layers)
    if compiled:
        torch.compiler.reset()  # all layers are one function to the compiler, and it gives up after a few versions
        run = torch.compile(run, dynamic=False)
    with capture_stream():  # where the graphs of its backward are captured
        y = run(*inputs)
    g = torch.randn_like(y)
    flops = 2 * sum(layer.macs for layer in layers) * x[:, 0].numel() * (1 if contender == "mean" else 2)
    phases = {
        "forward": (lambda: run(*inputs), 1),
        "backward": (lambda: torch.autograd.grad(y, wanted, g, retain_graph=True, allow_unused=True), 2),
        "step": (lambda: torch.autograd.grad(run(*inputs), wanted, g, allow_unused=True), 3),
    }
    timings = []
    for phase, (call, passes) in phases.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        peak = (torch.cuda.max_memory_allocated() - before) / 1e6
        host = host_time(call, repeats)
        first, median, third = statistics.quantiles(device_times(call, repeats), n=4)
        rate = flops * passes / median / 1e9
        device = torch.cuda.get_device_name()
        timings.append(
            Timing(device, name, dtype, contender, phase, median, first, third, host, peak, rate, rate / ceiling)
        )
    return timings


def kernel_names(layers: tuple[Layer, ...], dtype: str) -> list[str]:
    """The kernels that cuDNN chose for the composition, by time."""
    x, parameters = tensors(layers, DTYPES[dtype], SAMPLES)
    with profile(activities=[ACTIVITY]) as seen:
        network(composition, layers)(x, *(t for p in parameters for t in p)).sum().backward()
    return [e.key for e in sorted(seen.key_averages(), key=lambda e: -e.self_device_time_total)[:6]]


def plot(timings: list[Timing], path: Path) -> None:
    """Bars of the full step per layer and contender."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    dtypes = list(dict.fromkeys(t.dtype for t in timings))
    figure, axes = pyplot.subplots(len(dtypes), figsize=(10, 3.2 * len(dtypes)), squeeze=False, layout="constrained")
    for ax, dtype in zip(axes[:, 0], dtypes, strict=True):
        steps = [t for t in timings if t.dtype == dtype and t.phase == "step"]
        layers = list(dict.fromkeys(t.layer for t in steps))
        for i, contender in enumerate(CONTENDERS):
            by_layer = {t.layer: t.median_ms for t in steps if t.contender == contender}
            positions = [j + 0.16 * (i - 2) for j, layer in enumerate(layers) if layer in by_layer]
            ax.bar(positions, list(by_layer.values()), 0.15, label=contender)
        ax.set_xticks(range(len(layers)), layers)
        ax.set(ylabel="forward and backward [ms]", yscale="log", title=f"{timings[0].device}, {dtype}")
    axes[0, 0].legend(ncols=len(CONTENDERS))
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder for the CSV and the plot")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16", "tf32", "fp32"])
    parser.add_argument("--repeats", type=int, default=50)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.gpu: no GPU here; python -m benchmarks.kernel_report shows what the compiler says")
        print_table(["bf16", "fp32"])
        return 0
    with settings_restored():
        return measure_all(options)


def measure_all(options: argparse.Namespace) -> int:
    """Check and time every layer and the network in every dtype that was asked for."""
    options.out.mkdir(parents=True, exist_ok=True)
    torch.backends.cudnn.benchmark = True  # what is compared with gets cuDNN's best kernels
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}")
    print(f"L2 moves {l2_bandwidth(DEVICE) / 1e12:.2f} TB/s, by copies of 8 MiB")
    print_table(["bf16", "fp32"])
    timings: list[Timing] = []
    wrong: list[str] = []
    for dtype in options.dtype:
        how = "ieee" if dtype == "fp32" else "tf32"
        torch.backends.cudnn.conv.fp32_precision = torch.backends.cuda.matmul.fp32_precision = how
        ceiling = matmul_tflops(DTYPES[dtype])
        print(f"{dtype}: matrix products reach {ceiling:.0f} TFLOP/s; cuDNN runs {kernel_names(LAYERS[1:2], dtype)}")
        works = {layer.name: (layer,) for layer in LAYERS} | {"network": LAYERS}
        for name, layers in works.items():
            off = {}
            for layer in layers:
                found = errors(layer, DTYPES[dtype])
                off |= {n: e for n, e in found.items() if not e[0] <= 2 * e[1] + ROUNDING[dtype]}
            if off:
                print(f"{dtype} {name}: wrong, not timed: {off}", file=sys.stderr)
                wrong.append(name)
                continue
            for contender in CONTENDERS:
                rows = measure(name, layers, dtype, contender, ceiling, options.repeats)
                timings += rows
                for t in rows:
                    print(f"{t.dtype:5}{t.layer:9}{t.contender:11}{t.phase:9}{t.median_ms:9.3f} ms "
                          f"[{t.first_quartile_ms:.3f}, {t.third_quartile_ms:.3f}] host {t.host_ms:.3f} ms "
                          f"{t.tflops:6.0f} TFLOP/s "
                          f"{t.share_of_matmul:5.0%} of matmul {t.peak_mb:8.1f} MB", flush=True)  # fmt: skip
    with (options.out / "gpu.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Timing)])
        writer.writeheader()
        writer.writerows(asdict(t) for t in timings)
    if timings:
        plot(timings, options.out / "gpu.png")
    print(f"wrote {options.out}/gpu.csv and gpu.png")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
