"""The parts of the benchmarks that need no GPU: their arguments and their guard."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import kernels as timed
from tnt_fast import kernels, reference

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("operation", ["pixel_embed", "inner", "fold"])
def test_a_right_kernel_passes_the_guard_and_a_wrong_one_does_not(operation):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    given, others = timed.arguments("s", operation, 1, torch.float16, device)
    out = getattr(kernels.OPERATIONS[operation], operation)(*given, **others)
    assert out.shape == getattr(reference, operation)(*given, **others).shape
    error, bound = timed.error_and_bound(operation, given, others, out)
    assert error <= bound
    error, bound = timed.error_and_bound(operation, given, others, -out)
    assert error > bound


def test_bytes_are_activations_read_and_written_once():
    pixel, patch = torch.zeros(196, 16, 24, dtype=torch.float16), torch.zeros(1, 197, 384, dtype=torch.float16)
    assert timed.bytes_moved("inner", (pixel, torch.zeros(5)), pixel) == 2 * 196 * 16 * 24 * 2
    assert timed.bytes_moved("fold", (pixel, patch, torch.zeros(5)), patch) == (196 * 16 * 24 + 2 * 197 * 384) * 2


def test_without_a_gpu_nothing_is_timed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["kernels"])
    with pytest.raises(SystemExit, match="torch sees no GPU"):
        timed.main()


def test_the_suites_run():
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "--benchmark-disable", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "3 passed" in done.stdout
