"""CPU time and memory of `dwc predict` on a scan, for several widths and memory limits.

    python -m benchmarks.whole_scan scan.nii.gz --out whole-scan [--widths 16 32 96] [--limits default 1 2 4]

The networks have Table 1's dilations, 50 classes and random weights, which cost as much as trained ones. Each
prediction is one process with one thread; its CPU time includes importing, reading, conforming and writing. MAP
networks take one pass, Bayesian ones one per draw of the weights. Writes whole_scan.csv row by row; a second call
continues.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

from dwc.data.labels import LabelMap
from dwc.meshnet import MeshNet
from dwc.posterior import Posterior

__all__ = ["main"]

PREPROCESSING = {"grid_size": 256, "voxel_size": 1.0, "sub_volume": 32, "intensity": "z-score per volume"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scan", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 32, 96])
    parser.add_argument("--kinds", nargs="+", choices=["map", "bayesian"], default=["map", "bayesian"])
    parser.add_argument("--limits", nargs="+", default=["default"], help="GB of a block, or default")
    parser.add_argument("--n-samples", type=int, default=1)
    values = parser.parse_args(arguments)
    values.out.mkdir(parents=True, exist_ok=True)
    table = values.out / "whole_scan.csv"
    rows = pd.read_csv(table, dtype={"limit_gb": str}).to_dict("records") if table.exists() else []
    known = {(row["network"], row["width"], row["limit_gb"], row["n_samples"]) for row in rows}
    for width in values.widths:
        for kind in values.kinds:
            network = _write_network(values.out, width, kind == "bayesian")
            for limit in values.limits:
                if (kind, width, limit, values.n_samples) in known:
                    continue
                cost = _predict(network, values.scan, limit, values.n_samples)
                rows.append({"network": kind, "width": width, "limit_gb": limit, "n_samples": values.n_samples, **cost})
                pd.DataFrame(rows).to_csv(table, index=False)
                print(pd.DataFrame(rows[-1:]).to_string(index=False, header=len(rows) == 1), flush=True)


def _write_network(out: Path, width: int, bayesian: bool) -> Path:
    """A posterior file with random weights."""
    path = out / f"{'bayesian' if bayesian else 'map'}-{width}.safetensors"
    if not path.exists():
        torch.manual_seed(0)
        label_map = LabelMap.load("fifty")
        Posterior.from_model(
            MeshNet(label_map.n_classes, width, bayesian=bayesian),
            label_map={"name": label_map.name, "sha256": label_map.sha256},
            preprocessing=PREPROCESSING,
        ).save(path)
    return path


def _predict(network: Path, scan: Path, limit: str, n_samples: int) -> dict[str, float]:
    """CPU seconds and peak memory in MB of one `dwc predict`."""
    out = network.with_suffix("")
    shutil.rmtree(out, ignore_errors=True)
    command = [
        sys.executable, "-m", "dwc.cli", "predict", str(scan), "--network", str(network), "--out", str(out),
        "--n-samples", str(n_samples), *([] if limit == "default" else ["--memory-limit", limit]),
    ]  # fmt: skip
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed")  # its reason is on stderr
    shutil.rmtree(out)
    return {"cpu_s": round(usage.ru_utime + usage.ru_stime, 1), "peak_mb": usage.ru_maxrss // 1024}


if __name__ == "__main__":
    main()
