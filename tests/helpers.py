"""What several test files share."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import nn

TESTS = Path(__file__).parent

TINY = dict(img_size=32, embed_dim=24, inner_dim=12, depth=2, num_heads_inner=2, num_heads_outer=3, num_classes=5)
"""A TNT of 4 patches with 16 pixels each."""


def perturb(model: nn.Module, scale: float = 0.05) -> nn.Module:
    """Move every parameter off its initial value, so that zeros and ones hide nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += scale * torch.randn(p.shape, generator=generator).to(p)
    return model


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected magnitude."""
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def run_once(tmp_path_factory: pytest.TempPathFactory, name: str, script: str, *arguments: str) -> tuple[Path, dict[str, Any]]:
    """Run a script in a new folder, once for all workers of pytest-xdist: (the folder, how the script ended).

    Jit functions need a source file, and must not be made for Triton's interpreter.
    """
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / name
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            (folder / "script.py").write_text(script)
            command = [sys.executable, "script.py", *arguments]
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
            ending = {"status": done.returncode, "out": done.stdout, "err": done.stderr}
            (folder / "ending.json").write_text(json.dumps(ending))
    return folder, json.loads((folder / "ending.json").read_text())
