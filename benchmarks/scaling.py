"""Seconds per training step in one process and in several that share each batch, on this machine.

    python -m benchmarks.scaling [--processes 1 2] [--device cpu] [--width 16] [--batch-size 4]

Runs `torchrun -m dwc.train` and reads its log: data loading, forward, backward, gradient exchange and Adam, without
validation. The global batch is fixed (strong scaling), each process has one CPU thread, the kinds of run alternate, and
the median over epochs is reported, without each run's first epoch. "Apart" runs as many processes at once, each alone
on its share of the batch and without exchange: the difference to one process is the cost of the shared machine, the
difference to the joint run the cost of the exchange.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import torch

from dwc.data.grid import Grid
from dwc.simulation.scans import write_site
from dwc.training.log import read_log

__all__ = ["main", "table"]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--batch-size", "--batch_size", type=int, default=4, help="a multiple of all --processes")
    parser.add_argument("--steps", type=int, default=4, help="per epoch")
    parser.add_argument("--epochs", type=int, default=3, help="per run; the first is not counted")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each kind")
    values = parser.parse_args(arguments)
    if odd := [n for n in values.processes if n < 1 or values.batch_size % n]:
        parser.error(f"--batch-size {values.batch_size}: cannot be split evenly by {odd[0]} processes; give a multiple")
    if values.device == "cuda" and max(values.processes) > torch.cuda.device_count():
        parser.error(f"--processes {max(values.processes)}: PyTorch finds {torch.cuda.device_count()} GPUs here")
    kinds = [(n, together) for n in values.processes for together in (True, False) if together or n > 1]
    seconds: defaultdict[tuple[int, bool], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        manifest = write_site(folder, "H", 2, 0, grid=Grid(64, 4.0))
        for repeat in range(values.repeats):
            for n, together in kinds:
                seconds[n, together] += _run(manifest, Path(folder) / f"{repeat}-{n}-{together}", n, together, values)
    print(table({kind: statistics.median(times) for kind, times in seconds.items()}, values.batch_size))
    print(
        f"median of {len(seconds[kinds[0]])} epochs of {values.steps} steps; MeshNet of Table 1, width {values.width}, "
        f"vi, {values.device}; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}"
    )


def table(seconds: dict[tuple[int, bool], float], batch_size: int) -> str:
    """One line per number of processes and kind of run; efficiency is the speedup divided by the processes."""
    alone = seconds[min(seconds)[0], True] * min(seconds)[0]
    lines = [f"{'processes':<12}{'s/step':>9}{'sub-volumes/s':>15}{'speedup':>9}{'efficiency':>12}"]
    for (n, together), step in sorted(seconds.items(), key=lambda item: (item[0][0], not item[0][1])):
        name = f"{n}{'' if together else ' apart'}"
        lines.append(f"{name:<12}{step:>9.3f}{batch_size / step:>15.2f}{alone / step:>9.2f}{alone / step / n:>12.2f}")
    return "\n".join(lines)


def _run(manifest: Path, out: Path, n: int, together: bool, values: argparse.Namespace) -> list[float]:
    """Seconds per step of the slowest process in each epoch except the first."""
    flags = {
        "mode": "vi", "data": manifest, "cache-dir": manifest.parent / "cache", "label-map": "coarse", "grid-size": 64,
        "voxel-size": 4.0, "width": values.width, "epochs": values.epochs, "steps-per-epoch": values.steps,
        "validation-sub-volumes": 0, "device": values.device,
        "batch-size": values.batch_size if together else values.batch_size // n,
    }  # fmt: skip
    words = ["dwc.train", *(str(word) for key, value in flags.items() for word in (f"--{key}", value))]
    launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={n}", "-m"] if together else []
    outs = [out] if together else [out.with_name(f"{out.name}-{i}") for i in range(n)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", *launch, *words, "--out", str(folder)],
            env=_environment(None if together else i), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        for i, folder in enumerate(outs)
    ]  # fmt: skip
    codes = [process.wait() for process in processes]
    if any(codes):
        sys.exit(f"a run failed; to see why, run: {' '.join(['python -m', *launch, *words, '--out', str(outs[0])])}")
    logs = [read_log(folder / "log.jsonl") for folder in outs]
    return [max(row["seconds"] for row in rows) / values.steps for rows in zip(*logs, strict=True)][1:]


def _environment(gpu: int | None) -> dict[str, str]:
    """One thread, and for a process that runs apart its own GPU, which torchrun assigns otherwise."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if gpu is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu] if visible else str(gpu)
    return environment


if __name__ == "__main__":
    main()
