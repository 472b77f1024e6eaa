"""Packaging of tnt_fast. The folder ``kernels/`` is installed and imported as ``tnt_fast.kernels``."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "([^"]+)"', (ROOT / "tnt_fast" / "__init__.py").read_text("utf-8"), re.M).group(1)

PICTURES = ["matplotlib>=3.7"]
TRAIN = ["torchvision>=0.23", "scikit-learn>=1.3", "tqdm>=4.60", "pillow>=10", *PICTURES]
# pytest-benchmark 5.1 needs pytest 8.1, whose 8.1.0 was withdrawn
BENCH = ["pytest>=8.1.1", "pytest-benchmark>=5.1", "tqdm>=4.60", *PICTURES]
# before 0.9 ruff formats otherwise, before 0.13 it asks for isinstance(x, A | B)
DEV = ["pytest-xdist>=3.5", "ruff>=0.13", "mypy>=1.15", "setuptools>=70", "wheel", *TRAIN, *BENCH]

# for make docs alone, at the versions of .ci/constraints.txt
DOCS = ["mkdocs>=1.6", "mkdocstrings[python]>=1.0"]

setup(
    name="tnt_fast",
    version=VERSION,
    description="Transformer in Transformer (TNT): a drop-in for timm's, on the way to fused Triton kernels",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=["tnt_fast", "tnt_fast.kernels"],
    package_dir={"tnt_fast.kernels": "kernels"},
    package_data={"tnt_fast": ["py.typed"]},
    install_requires=[
        "torch>=2.8",
        'triton>=3.4; platform_system == "Linux"',
        "timm>=1.0.24",
        "safetensors>=0.4",
        "huggingface_hub>=0.25",
    ],
    extras_require={
        "xformers": ['xformers>=0.0.29; platform_system == "Linux"'],
        "train": TRAIN,
        "pictures": PICTURES,
        "bench": BENCH,
        "dev": DEV,
        "docs": DOCS,
    },
    entry_points={"console_scripts": ["tnt-fast=tnt_fast.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
