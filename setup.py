"""Packaging of dwc: what it is called, what it needs, which command it installs."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
test = [
    "hypothesis", "monai", "niimath", "playwright", "pytest", "pytest-benchmark", "pytest-xdist", "setuptools>=77",
    "einops", "torchvision",  # networks that are converted
    "fire", "onnxruntime", "pytorch-ignite",  # run what `dwc export` writes
]  # fmt: skip
lint = ["mypy", "ruff", "types-PyYAML", "types-tqdm"]
study = ["jinja2>=3.1", "matplotlib", "tensorboard"]  # reports and pictures, TensorBoard files of trainings
export = ["onnx>=1.17", "onnxscript>=0.5"]  # ONNX models
docs = ["latex2mathml", "mkdocs-material>=9.6,<10", "mkdocstrings[python]"]  # the documentation site
signing = ["cryptography>=42"]
federated = ["nvflare>=2.9,<2.10", *signing]
triton = ["triton>=3.3; platform_system == 'Linux'"]

setup(
    name="dwc",
    version=re.search(r'__version__ = "(.+)"', (here / "dwc_kernels/__init__.py").read_text()).group(1),
    description="Distributed weight consolidation: train Bayesian 3D networks apart, consolidate them once",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.10,<3.14",
    packages=find_packages(include=["dwc", "dwc.*", "dwc_kernels", "dwc_kernels.*"]),
    package_data={
        "dwc": ["py.typed"],
        "dwc_kernels": ["py.typed"],
        "dwc_kernels.kernels": ["measured/*.json"],
        "dwc.data": ["*.tsv"],
        "dwc.simulation": ["*.tsv"],
        "dwc.study": ["presets/*.yaml"],
        "dwc.report": ["templates/*", "vendor/*"],
    },
    install_requires=[
        "torch>=2.13",
        "numpy",
        "scipy",
        "nibabel>=5",
        "safetensors>=0.4",
        "pandas>=2.2",
        "pydantic>=2.10",
        "tqdm",
        "pyyaml",
        "jsonargparse[signatures]>=4.49",
    ],
    extras_require={
        "study": study,
        "federated": federated,
        "signing": signing,
        "export": export,
        "docs": docs,
        "triton": triton,
        "dev": [*study, *federated, *export, *docs, *triton, *test, *lint],
    },
    entry_points={"console_scripts": ["dwc = dwc.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
