"""Packaging of tnt_fast. The folder ``kernels/`` is installed and imported as ``tnt_fast.kernels``."""

import re
from pathlib import Path
from tempfile import TemporaryDirectory

from setuptools import setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "([^"]+)"', (ROOT / "tnt_fast" / "__init__.py").read_text("utf-8"), re.M).group(1)

PICTURES = ["matplotlib>=3.7"]
TRAIN = ["torchvision>=0.23", "scikit-learn>=1.3", "tqdm>=4.66.3", "pillow>=10", "pyyaml>=6.0.1", *PICTURES]
# torch.onnx's exporter, and what runs its files
EXPORT = ["onnx>=1.17", "onnxscript>=0.5", "onnxruntime>=1.20"]
# what examples/ and the pages of docs/ use beside the package: adapters, data in shards, a server
EXAMPLES = [
    "peft>=0.15",
    "datasets>=3",
    "webdataset>=0.2.100",
    "tensorboard>=2.15",
    "fastapi>=0.115",
    "uvicorn>=0.30",
    "httpx>=0.27",
]
# pytest-benchmark 5.1 needs pytest 8.1, whose 8.1.0 was withdrawn
BENCH = ["pytest>=8.1.1", "pytest-benchmark>=5.1", "tqdm>=4.66.3", *PICTURES]
# before 0.9 ruff formats otherwise, before 0.13 it asks for isinstance(x, A | B)
DEV = ["pytest-xdist>=3.5", "ruff>=0.13", "mypy>=1.15", "setuptools>=70", "wheel", *TRAIN, *BENCH, *EXPORT, *EXAMPLES]

# for make docs alone, at the versions of .ci/constraints.txt
DOCS = ["mkdocs>=1.6", "mkdocstrings[python]>=1.0"]

BUILD = TemporaryDirectory()  # else what a checkout's build/ still has of deleted files gets into the wheel

setup(
    name="tnt_fast",
    version=VERSION,
    description="Transformer in Transformer (TNT): a drop-in for timm's, with fused Triton kernels",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["transformer in transformer", "TNT", "vision transformer", "image classification", "timm", "Triton", "PyTorch"],
    project_urls={
        "Paper": "https://arxiv.org/abs/2103.00112",
        "timm": "https://github.com/huggingface/pytorch-image-models",
        "Authors' release": "https://github.com/huawei-noah/Efficient-AI-Backbones",
    },
    python_requires=">=3.10",
    packages=["tnt_fast", "tnt_fast.kernels"],
    package_dir={"tnt_fast.kernels": "kernels"},
    package_data={"tnt_fast": ["py.typed", "page.html", "plan.json", "presets/*.yaml"]},
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
        "export": EXPORT,
        "examples": EXAMPLES,
        "bench": BENCH,
        "dev": DEV,
        "docs": DOCS,
    },
    entry_points={"console_scripts": ["tnt-fast=tnt_fast.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    options={"build": {"build_base": BUILD.name}},
)
