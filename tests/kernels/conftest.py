"""Triton decides at its import whether kernels are interpreted, so this comes before any test imports it."""

import os
import sys

interpreted = os.environ.get("TRITON_INTERPRET") == "1"
assert interpreted or "triton" not in sys.modules, "import Triton only after tests/kernels is collected"
os.environ["TRITON_INTERPRET"] = "1"
