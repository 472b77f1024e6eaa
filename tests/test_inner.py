"""inner against the reference in float64 (``cases.check``)."""

import re
from contextlib import nullcontext

import pytest
import torch
from cases import check, inner_tensors, one_by_one, spiked
from fuzz_rule import DRAWS, off_by_rounding
from helpers import call, paths, results

pytest.importorskip("triton")

from tnt_fast import kernels, reference
from tnt_fast.kernels.inner import Sizes, _specialise

pytestmark = pytest.mark.usefixtures("poisoned_memory")
everywhere, wide = pytest.mark.everywhere, pytest.mark.wide


@paths()
@pytest.mark.parametrize("bias", [False, pytest.param(True, marks=wide)], ids=["", "qkv-bias"])
@pytest.mark.parametrize(
    ("P", "S", "C", "H", "M"),
    [
        pytest.param(11, 16, 24, 4, 96, marks=everywhere),
        (5, 16, 40, 4, 160), (9, 16, 12, 2, 48), (3, 64, 6, 2, 24), (7, 4, 96, 4, 384), (5, 16, 32, 1, 64), (3, 9, 24, 4, 96),
        *(pytest.param(*sizes, marks=wide) for sizes in ((6, 16, 24, 8, 48), (2, 16, 64, 4, 128), (1, 4, 24, 3, 96))),
    ],
    ids=lambda v: str(v),
)  # fmt: skip
def test_inner(P, S, C, H, M, bias, path, dtype):
    check(path, "inner", inner_tensors(P, S, C, M, bias), dict(num_heads=H), dtype)


@paths()
@pytest.mark.parametrize(
    ("P", "S", "C", "H", "fc1"), [(5, 16, 24, 4, 0.6), (5, 16, 40, 4, 2), (9, 16, 12, 2, 0.6), (4, 9, 24, 4, 2)], ids=str
)
def test_inner_where_each_hidden_channel_decides(P, S, C, H, fc1, path, dtype):
    check(path, "inner", one_by_one(inner_tensors(P, S, C, 4 * C), fc1), dict(num_heads=H, eps=1e-6), dtype)


@pytest.mark.parametrize(("mean", "scale"), [(1.0, 1.0), (0.0, 1e-3)], ids=["mean", "spread"])
@paths()
def test_inner_of_large_means_and_small_spread(mean, scale, path, dtype):
    mean *= 100 if dtype == torch.float32 else 10
    check(path, "inner", inner_tensors(6, 16, 24, 96, mean=mean, scale=scale), dict(num_heads=4), dtype, gradients=False)


@paths()
def test_inner_of_outliers(path, dtype):
    tensors = inner_tensors(6, 16, 24, 96)
    tensors["pixel"][::2, 3, 5] = 300.0
    tensors["pixel"][1::2, 7] *= 50
    check(path, "inner", tensors, dict(num_heads=4), dtype, gradients=False)


@everywhere
@paths(interpreter="", compiled="float32")
def test_weights_gradients_are_sums_of_many_turns(path, dtype):
    """A sum that goes on from turn to turn may be rounded at every turn, not at every row: which the compiler made of it."""
    check(path, "inner", inner_tensors(40, 16, 12, 48), dict(num_heads=2), dtype)


@paths()
@pytest.mark.parametrize(
    "which",
    [("attn_scale", "mlp_scale"), pytest.param(("attn_scale",), marks=wide), pytest.param(("mlp_scale",), marks=wide)],
    ids="+".join,
)
def test_inner_with_drop_path(which, path, dtype):
    tensors = inner_tensors(5, 16, 24, 96)
    scales = dict(attn_scale=torch.tensor([0, 2, 1, 0, 1.25]), mlp_scale=torch.tensor([2, 0, 1, 0, 1.25]))
    check(path, "inner", tensors, dict(num_heads=4, **{name: scales[name] for name in which}), dtype)


@paths("", "bfloat16")
def test_inner_of_many_channels_with_drop_path_and_no_biases(path, dtype):
    """The gradients of 32 channels and more come in one launch more, which has the attention's result alone."""
    scales = dict(attn_scale=torch.tensor([0, 2, 1, 0, 1.25]), mlp_scale=torch.tensor([2, 0, 1, 0, 1.25]))
    absent = dict.fromkeys(("norm1_bias", "proj_bias", "norm2_bias", "fc1_bias", "fc2_bias"))
    check(path, "inner", inner_tensors(5, 16, 40, 96) | absent, dict(num_heads=4, **scales), dtype)


@paths()
def test_dropped_branches_leave_the_input_and_its_gradient_as_they_are(path, dtype):
    given = {k: None if v is None else v.to(path.device, dtype) for k, v in inner_tensors(3, 16, 24, 96).items()}
    given["pixel"].requires_grad_()
    scale = torch.tensor([1.0, 0.0, 2.0], device=path.device, dtype=dtype)
    out = call(kernels.OPERATIONS["inner"], **given, num_heads=4, attn_scale=scale, mlp_scale=scale)
    upstream = torch.randn_like(out)
    (gradient,) = torch.autograd.grad(out, given["pixel"], upstream)
    assert torch.equal(out[1], given["pixel"][1])
    assert torch.equal(gradient[1], upstream[1])
    assert not torch.equal(out[0], given["pixel"][0])


BIASES = ("norm1_bias", "proj_bias", "norm2_bias", "fc1_bias", "fc2_bias")


@pytest.mark.parametrize("absent", [*(pytest.param(name, marks=wide) for name in BIASES), "all"])
@paths("float32", "bfloat16 float32")
def test_inner_without_biases(absent, path, dtype):
    tensors = inner_tensors(5, 16, 24, 96) | dict.fromkeys(BIASES if absent == "all" else (absent,))
    check(path, "inner", tensors, dict(num_heads=4), dtype)


@paths()
@pytest.mark.parametrize(
    ("S", "C", "H", "scale"), [pytest.param(3, 63, 3, 45, marks=wide), (3, 24, 1, 20), (2, 12, 2, 30)], ids=str
)
def test_gradients_of_saturated_attention(S, C, H, scale, path, dtype):
    """Where P is 1, what is taken off dP is dP itself. Few keys, or ties between two of them decide instead.

    Scores of thousands are off by several where q and k are rounded to bfloat16, and the gradient is e to their differences.
    So PyTorch's own error, from one seed to the next between 1e-34 and 1e3, is taken from several draws of such rounding.
    """
    tensors = inner_tensors(7, S, C, 4 * C)
    tensors["qk_weight"] *= scale / 1.5
    check(path, "inner", tensors, dict(num_heads=H), dtype, draws=DRAWS)


@everywhere
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=wide) for seed in range(2, 6))])
@pytest.mark.parametrize(("S", "C", "H", "scale"), [(3, 24, 1, 20), (2, 12, 2, 30)], ids=str)
@paths("float32", "float32")
def test_gradients_of_saturated_attention_have_all_of_their_digits(S, C, H, scale, seed, path, dtype):
    """Against no one's own error but that of exact results of weights off by rounding: a score is worth no more.

    PyTorch's gradients of q and k are all wrong from a P on that is 1 up to rounding, of which ``ExactSoftmax`` says why. Ours
    are not: the second mean in ``_inner_bwd_attention_kernel`` sees to that. A P below float32's normal values, 2^-126, may be
    0; a gradient is one times weights, keys and 1/σ of less than 2^30 in all, and below 2^-96 not looked at.
    """
    torch.manual_seed(seed)
    tensors = {k: v if v is None else v.to(dtype) for k, v in inner_tensors(7, S, C, 4 * C).items()}
    tensors["qk_weight"] *= scale / 1.5
    found = results(kernels.OPERATIONS["inner"], tensors, dict(num_heads=H), dtype, dtype, path.device)

    def exactly(draw: int) -> dict:
        off = {k: v if v is None or k == "pixel" or not draw else off_by_rounding(v, dtype, draw) for k, v in tensors.items()}
        return results(reference.inner, off, dict(num_heads=H), dtype, torch.float64)

    exact, own = exactly(0), [exactly(draw) for draw in DRAWS]
    for name, right in exact.items():
        same = max([x[name] for x in own], key=lambda x: (x - right).abs().max().item())
        seen = right.abs() >= 2**-96
        path.rule(name, *(torch.where(seen, x.cpu(), 0.0) for x in (found[name], same, right)), dtype)


@everywhere
@paths("", "tf32")
@pytest.mark.parametrize(
    ("S", "C", "H", "scale"),
    [pytest.param(3, 63, 3, 45, marks=wide), (3, 24, 1, 20), pytest.param(2, 12, 2, 30, marks=wide)],
    ids=str,
)
def test_gradients_of_saturated_attention_in_tf32_where_pytorch_takes_none(S, C, H, scale, path, dtype, monkeypatch):
    """As cuBLAS does in small products. The weights are off by TF32's rounding nevertheless."""
    monkeypatch.setattr(path, "as_reference", nullcontext)
    tensors = inner_tensors(7, S, C, 4 * C)
    tensors["qk_weight"] *= scale / 1.5
    check(path, "inner", tensors, dict(num_heads=H), dtype, draws=DRAWS)


@paths()
@pytest.mark.parametrize(("P", "S"), [(5, 9), (7, 16), pytest.param(3, 4, marks=wide), (1, 1)], ids=str)
def test_inner_without_an_eps(P, S, path, dtype):
    check(path, "inner", inner_tensors(P, S, 24, 96), dict(num_heads=4, eps=0.0), dtype)


@paths("float16", "bfloat16")
@pytest.mark.parametrize("scales", [False, pytest.param(True, marks=wide)], ids=["", "drop-path"])
@pytest.mark.parametrize(
    ("name", "factor", "gradients"),
    [
        ("fc2_weight", 1.0, True), ("fc2_weight", 2e4, False), ("fc2_weight", 1e-7, False),
        pytest.param("fc1_weight", 3e3, True, marks=wide), pytest.param("norm2_weight", 3e3, True, marks=wide),
        ("fc1_bias", 6e4, True),
    ],
    ids=str,
)  # fmt: skip
def test_gelu_in_pairs_takes_weights_of_any_size(name, factor, gradients, scales, path, dtype, monkeypatch):
    """Against the same without pairs, under autocast. The interpreter has float16 for bfloat16: then the results have to stay
    in range, the weights need not. Compiled, pairs are bfloat16's alone, whose gradients the pairs' instructions give."""
    inner, derive, set_ = kernels.OPERATIONS["inner"], Sizes.__post_init__, object.__setattr__
    tensors = {k: v if v is None else v.to(dtype).float() for k, v in inner_tensors(5, 16, 24, 96).items()}
    tensors[name] = tensors[name] * factor
    small = 1e-5 if name == "fc2_weight" and factor > 1 else 1.0  # hidden values of 1e-5, or the result overflows
    tensors |= {k: tensors[k] * small for k in ("norm2_weight", "norm2_bias", "fc1_bias")}
    if factor < 1:
        tensors |= {k: tensors[k] * 1e-4 for k in ("pixel", "proj_weight", "proj_bias", "fc2_bias")}
    others = dict(num_heads=4, eps=1e-12)
    if scales:
        others |= dict.fromkeys(("attn_scale", "mlp_scale"), torch.tensor([0, 2, 1, 0, 1.25]))
    found = []
    for function, device, kind in (
        (inner, path.device, torch.float32), (inner, path.device, torch.float32), (reference.inner, "cpu", torch.float64),
    ):  # fmt: skip
        _specialise.forget()
        monkeypatch.setattr(Sizes, "__post_init__", lambda Z, pairs=not found: (derive(Z), set_(Z, "PAIRS", pairs)))
        given = {k: v if v is None else v.to(device, kind).requires_grad_() for k, v in tensors.items()}
        fixed = {k: v.to(device, kind) if isinstance(v, torch.Tensor) else v for k, v in others.items()}
        with torch.autocast(device, dtype, enabled=function is inner):  # float32 weights, products in half precision
            out = call(function, **given, **fixed).to(kind)
        wanted = [v for v in given.values() if v is not None] if gradients else []
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out)
        found.append([out.detach().cpu(), *(g.cpu() for g in (torch.autograd.grad(out, wanted, upstream) if wanted else ()))])
    for paired, plain, exact in zip(*found, strict=True):
        assert paired.isfinite().all()
        own = (plain.double() - exact).abs().max()  # without pairs: not finite where fc2's weights are not
        rounding = 4 * torch.finfo(dtype).eps * exact.abs().max()
        assert (paired.double() - exact).abs().max() <= (2 * own + rounding if own.isfinite() else 2 * rounding)


@pytest.mark.parametrize(
    ("factors", "others"),
    [
        pytest.param({"fc2_weight": 1e6}, {}, marks=wide), ({"fc2_weight": 1e30}, {}),
        pytest.param({"fc1_weight": 1e5}, {}, marks=wide), pytest.param({"fc1_bias": 1e6}, {}, marks=wide),
        ({"fc1_bias": 1e30}, {}), ({"norm2_weight": 1e7}, {}), ({"pixel": 1e18}, {}),
        (dict.fromkeys(("pixel", "fc2_weight", "fc2_bias", "proj_weight", "proj_bias"), 1e-8), {"eps": 1e-20}),
    ],
    ids=["fc2", "fc2-1e30", "fc1", "fc1-bias", "fc1-bias-1e30", "norm2", "pixel", "small"],
)  # fmt: skip
@paths("", "bfloat16")
def test_bfloat16_takes_tensors_of_any_size(factors, others, path, dtype):
    tensors = inner_tensors(5, 16, 24, 96)
    tensors |= {name: tensors[name] * factor for name, factor in factors.items()}
    check(path, "inner", tensors, dict(num_heads=4, **others), dtype)


@pytest.mark.parametrize(
    ("C", "M", "name", "factor"),
    [
        (24, 96, "fc1_weight", 1e6), (24, 96, "norm2_bias", 1e6), (24, 97, "fc2_weight", 1e6), (12, 48, "fc1_weight", 1e6),
        (40, 160, "fc1_weight", 1e6),
    ],
    ids=str,
)  # fmt: skip
@paths("", "bfloat16")
def test_bfloat16_takes_one_large_weight_a_channel(C, M, name, factor, path, dtype):
    tensors = inner_tensors(5, 16, C, M)
    if name == "fc2_weight":  # all that does not fit into float16 is the last hidden channel's, alone in its slice
        tensors[name][:, -1] *= factor
    elif name == "norm2_bias":
        tensors[name][5] = factor
    else:
        tensors = spiked(tensors, factor)
    check(path, "inner", tensors, dict(num_heads=2 if C == 12 else 4), dtype)  # of the sizes of test_inner


@paths("", "bfloat16 float16")
@pytest.mark.parametrize(("S", "C"), [(4, 96), (9, 24), (16, 12)], ids=str)
def test_saturated_attention(S, C, path, dtype):
    """Scores so far apart that a maximum over some of them only makes powers that are not finite."""
    tensors = inner_tensors(5, S, C, 4 * C)
    tensors["qk_weight"] *= 6
    check(path, "inner", tensors, dict(num_heads=4 if C > 12 else 2), dtype, gradients=False)


@paths("", "", "bfloat16 float16 float32")
@pytest.mark.parametrize(("C", "H"), [(12, 2), (24, 4), (40, 4)], ids=["ti", "s", "b"])
def test_inner_at_full_size_over_many_seeds(C, H, path, dtype):
    for seed in range(20):
        torch.manual_seed(seed)
        check(path, "inner", inner_tensors(1571, 16, C, 4 * C), dict(num_heads=H), dtype, gradients=False)


def test_a_barrier_lies_between_the_halves_of_the_backward():
    """What the second half loads of dx, other threads of the first have stored; no machine here sees that race.

    Without the sums of the weights' gradients, whose barriers lie there, too.
    """
    from ptx.executor import Executor, running

    class Compiling(Executor):
        def launch(self, spec, grid, arguments, options):
            found[spec.kernel.__name__] = self.compile(spec.kernel, arguments, spec.constants, options)

    found: dict = {}
    given = {name: None if x is None else x.bfloat16() for name, x in inner_tensors(5, 16, 24, 96).items()}
    pixel = given.pop("pixel").requires_grad_()
    with running(Compiling("sm_90")):
        y = kernels.OPERATIONS["inner"](pixel, reference.TransformerWeights(**given), num_heads=4)
        torch.autograd.grad(y.sum(), pixel)
    compiled = found["_inner_bwd_kernel"]
    derived, seen = {f"[_inner_bwd_kernel_param_{compiled.parameters.index(2)}]"}, ""
    for line in compiled.ptx.splitlines():
        operands = re.findall(r"%\w+|\[\w+\]", line)
        of_dx = derived & set(operands)
        if "bar.sync" in line:
            seen += "|"
        elif of_dx and re.search(r"(ld|st)\.global|cp\.async", line):
            seen += "s" if "st.global" in line else "l"
        elif of_dx and operands:
            derived.add(next(x for x in operands if x.startswith("%")))
    assert re.fullmatch(r"[|]*s[s|]*[|]+l[l|]*s[s|]*", seen), seen
