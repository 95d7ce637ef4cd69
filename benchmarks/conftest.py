"""Collects what the layer benchmarks measured and prints it as one table at the end."""

import platform

import pandas as pd
import pytest
import torch

from dwc_kernels import reference

_COLUMNS = ["layout", "dtype", "dilation", "op_s", "composition_s", "noise_s", "op_bytes", "composition_bytes"]
_results = pytest.StashKey[list]()


@pytest.fixture(scope="session")
def results(request) -> list:
    return request.config.stash.setdefault(_results, [])


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash.get(_results, [])
    if not rows:
        return
    table = pd.DataFrame(rows, columns=_COLUMNS)
    total = table.groupby(["layout", "dtype"])[_COLUMNS[3:]].sum()
    total["speedup"] = total.op_s.rdiv(total.composition_s)
    total["noise_share"] = total.noise_s / total.op_s
    total["saved"] = total.op_bytes / total.composition_bytes
    native = "yes" if reference.multiplies_bf16() else "no"
    write = terminalreporter.write_line
    write("")
    machine = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    write(f"fp32 composition / op, medians; {machine}, bf16 instructions: {native}, torch {torch.__version__}")
    write(table.assign(speedup=table.composition_s / table.op_s).to_string(index=False, float_format="%.3f"))
    write("summed over dilations:")
    write(total.to_string(float_format="%.3f"))
