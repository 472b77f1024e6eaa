"""Attention of short rows, by one launch."""

import pytest
import torch
from cases import normal, outer_tensors
from helpers import call, paths

pytest.importorskip("triton")

from benchmarks.launched import Recorder
from tnt_fast import attention as pytorchs
from tnt_fast import kernels
from tnt_fast.kernels import attention
from tnt_fast.kernels.attention import HEAD
from tnt_fast.kernels.operation import launch

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(not attention.STAYS, reason="this version of Triton takes things out of loops"),
]
everywhere, wide = pytest.mark.everywhere, pytest.mark.wide
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def reference(qkv: torch.Tensor, B: int, T: int, H: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Products and a softmax, in the dtype of ``qkv``, and log Σ exp of the scores."""
    q, k, v = qkv.view(B, T, 3, H, HEAD).permute(2, 0, 3, 1, 4)
    scores = (q @ k.mT) * HEAD**-0.5
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(B * T, H * HEAD), scores.logsumexp(-1)


def attended(path, qkv: torch.Tensor, B: int, T: int, H: int, dtype: torch.dtype) -> torch.Tensor:
    """By the rule of the house; with logsumexp and without it the same bits."""
    given = qkv.to(path.device, dtype)
    found = attention.prepared(B, T, H, dtype, True)(given)
    same, exact = reference(given, B, T, H), reference(qkv, B, T, H)
    for name, *each in zip(("output", "logsumexp"), found, same, exact, strict=True):
        path.rule(name, *each, dtype)
    again, none = attention.prepared(B, T, H, dtype, False)(given)
    assert none is None
    assert torch.equal(again, found[0])
    return again


@pytest.fixture(autouse=True)
def known(request):
    if "path" in request.fixturenames and request.getfixturevalue("path").name == "sm_100":
        pytest.skip("its matrix instructions, which the machine does not know, are not launched: attention.CAPABILITY")


@pytest.fixture(params=[0, 10**6], ids=["heads", "queries"])
def alone(request, monkeypatch):
    """Programs of a head, or of a few of its queries."""
    monkeypatch.setattr(attention, "ALONE", request.param)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("B", "T", "H"),
    [
        pytest.param(1, 197, 2, marks=everywhere),
        (2, 5, 3),  # a tail alone
        (1, 65, 2),
        (1, 208, 1),  # no padding
        pytest.param(1, 1, 1, marks=wide),
        pytest.param(2, 64, 1, marks=wide),
        pytest.param(1, 96, 2, marks=wide),  # a tail of 32
        pytest.param(2, 112, 1, marks=wide),  # three tiles of keys, no tail
        pytest.param(1, 145, 1, marks=wide),
    ],
)
@paths("float16", "bfloat16 float16")
def test_attention(B, T, H, path, dtype):
    attended(path, normal(B * T, 3 * H * HEAD, scale=1.5), B, T, H, dtype)


@pytest.mark.usefixtures("alone")
@paths("float16", "bfloat16 float16")
def test_scores_that_are_large_and_values_that_are_not_there(path, dtype):
    """Of scores around 1,000 one key has all; NaN of an image, or of a head, stay in it."""
    B, T, H = 2, 21, 2
    qkv = normal(B, T, 3, H, HEAD)
    qkv[:, :, 0] = 16 * qkv[:, :, 1].flip(1)
    clean = attended(path, qkv.view(B * T, -1), B, T, H, dtype)
    qkv[1, 3, 1, 0, 5] = float("nan")
    bad = qkv.view(B * T, -1).to(path.device, dtype)
    out = attention.prepared(B, T, H, dtype, False)(bad)[0].view(B, T, H, HEAD)
    assert out[1, :, 0].isnan().all()
    out[1, :, 0] = clean.view(B, T, H, HEAD)[1, :, 0]
    assert torch.equal(out.view(B * T, -1), clean)


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ({}, True),
        (dict(T=193), True),
        (dict(T=208), True),
        (dict(T=192), False),
        (dict(T=209), False),
        (dict(D=32), False),
        (dict(dtype=torch.float32), False),
        (dict(B=127), False),  # too many queries to be alone, too few heads to fill the GPU
        (dict(B=128), True),
        (dict(B=1), True),
        (dict(B=2), False),
        (dict(capability=(8, 0)), False),
        (dict(capability=(10, 0)), False),
        (dict(capability=None), False),  # AMD
    ],
)
def test_where_it_is_taken(given, taken):
    """Where it was simulated to be faster than what was measured of PyTorch's."""
    given = dict(B=256, T=197, H=6, D=64, dtype=torch.bfloat16, capability=(9, 0)) | given
    with Recorder(132, given.pop("capability")).running():
        assert attention.attends(**given, device=torch.device("cpu")) == taken


@pytest.mark.parametrize("gradients", [False, True], ids=["", "gradients"])
def test_outer_launches_it(gradients, monkeypatch):
    """In the place of PyTorch's."""
    for name in ("attend_joined", "attend_recorded"):
        monkeypatch.setattr(pytorchs, name, lambda *given: pytest.fail("by PyTorch"))
    tensors = {k: v if v is None else v.half().to(DEVICE) for k, v in outer_tensors(1, 197, HEAD, 32).items()}
    tensors["patch"].requires_grad_(gradients)
    launched = []
    monkeypatch.setattr(attention, "launch", lambda spec, *given: launched.append(spec.kernel) or launch(spec, *given))
    with Recorder(132, (9, 0)).running():
        call(kernels.OPERATIONS["outer"], **tensors, num_heads=1)
    assert launched == [attention._attention_fwd_kernel]
