"""A few hundred cases of the fuzzer, and whether it would find what is wrong. ``make fuzz N=10000`` runs more of them."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import fuzz
import fuzz_cases
import fuzz_rule
from fuzz import examine, kind_of, replay
from fuzz_cases import draw
from fuzz_rule import Wrong, compare, kernels, reference
from helpers import perturb

SEED, CASES, CHUNK = 1, 200, 10


@pytest.mark.parametrize("first", range(0, CASES, CHUNK))
def test_the_fused_paths_are_right(first):
    wrong = []
    for i in range(first, first + CHUNK):
        kind = kind_of(SEED, i)
        verdict, what = examine(SEED, kind, i)
        assert verdict in fuzz.VERDICTS
        if verdict == "wrong":
            wrong.append(f"{replay(SEED, kind, i)}\n{what}")
    assert not wrong, "\n\n".join(wrong)


# ---- of the fuzzer itself ----


def find(operation: str, fits=lambda call: True) -> int:
    """The first ordinary case of an operation that ``fits``."""
    for i in range(500):
        call = draw(SEED, operation, i)
        x = next(iter(call.tensors.values()))
        ordinary = not call.about and not call.restrictions and x.numel() and x.dtype == torch.float32
        given = [x for x in call.tensors.values() if isinstance(x, torch.Tensor)]
        plain = all(x.is_contiguous() for x in given)  # as the reference's gradients are then
        if ordinary and plain and fits(call):
            return i
    raise AssertionError("no such case")


def instead(monkeypatch, operation: str, function) -> None:
    """Calls of the operation are calls of the function; it keeps its limits."""
    monkeypatch.setattr(
        type(kernels.OPERATIONS[operation]), "__call__", lambda self, *args, **kwargs: function(*args, **kwargs)
    )


def replace(monkeypatch, operation: str, change) -> None:
    """The operation is the reference, whose arguments and result ``change`` sees: right, until that does something."""
    function = getattr(reference, operation)

    def changed(*args, **kwargs):
        return change(function(*args, **kwargs), kwargs)

    instead(monkeypatch, operation, changed)


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_seed_kind_and_index_determine_a_case(kind):
    first, again, other = (draw(SEED, kind, i) for i in (3, 3, 4))
    assert first.describe() == again.describe() != other.describe()
    for (name, a, _), (_, b, _) in zip(first.guard.inputs, again.guard.inputs, strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), name
    if kind in ("model", "surgery"):
        for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("operation", kernels.OPERATIONS)
def test_the_reference_in_the_place_of_a_kernel_is_right(monkeypatch, operation):
    replace(monkeypatch, operation, lambda out, given: out)
    index = find(operation, lambda call: 1 not in next(iter(call.tensors.values())).shape)  # strides of a 1 may be any
    assert examine(SEED, operation, index) == ("right", "")


@pytest.mark.parametrize("half", [True, False], ids=["half", "float32"])
def test_pytorchs_fused_attention_is_among_its_own_where_outer_takes_it(monkeypatch, half):
    takes = find(
        "outer", lambda call: "qk_weight" in call.wanted and "pixel" not in call.tensors and call.activation.shape[1] > 1
    )
    call, calls, right = draw(SEED, "outer", takes), [], fuzz_rule.attention.attend
    if half:
        call.tensors = {name: x.half() if isinstance(x, torch.Tensor) else x for name, x in call.tensors.items()}
    monkeypatch.setattr(fuzz_rule.attention, "attend", lambda *heads: calls.append(1) or right(*heads))
    exact = call.compute(reference.outer, torch.float64)
    with fuzz_rule.fused_attention():
        for name, x in call.compute(reference.outer, torch.float64).items():
            torch.testing.assert_close(x, exact[name], rtol=1e-9, atol=1e-11)
    assert len(calls) == 1
    call.own()
    assert len(calls) == 1 + (half and fuzz_rule.DEVICE == "cuda")


class OffByALittle(torch.autograd.Function):
    """A weight whose first gradient is wrong by a ten-thousandth of the largest."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        gradient.view(-1)[0] += 1e-4 * gradient.abs().max()
        return gradient


def _one_element(out, given):
    off = torch.zeros_like(out)
    off.view(-1)[-1] = 1e-4 * out.detach().abs().max()
    return out + off


def _nan(out, given):
    off = torch.zeros_like(out)
    off.view(-1)[0] = float("nan")
    return out + off


def _key_error(out, given):
    raise KeyError(7)


def _nameless(out, given):
    raise RuntimeError("sizes do not match")


def _refusal(out, given):
    raise ValueError("inner: pixel is not to my liking")


def _input(out, given):
    given["pixel"].data.view(-1)[:1] += 1
    return out


def _band(out, given):
    x = given["pixel"].detach()
    x.as_strided((1,), (1,), x.storage_offset() - 1).zero_()
    return out


def _outside(out, given):
    x = torch.empty_like(given["pixel"].detach(), memory_format=torch.contiguous_format)
    x.as_strided((1,), (1,), x.storage_offset() + x.numel()).zero_()
    return out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_one_element, "output: error"), (_nan, "1 of .* values are not finite"), (_key_error, "KeyError: 7"),
        (_nameless, "refuses what the reference computes"), (_refusal, "refuses what the reference computes"),
        (_input, "pixel, or the memory around it"), (_band, "pixel, or the memory around it"),
        (_outside, "written outside of an allocated tensor"), (lambda out, given: out.double(), "output is torch.float64"),
        (lambda out, given: out.unsqueeze(0), "output has shape"),
    ],
    ids=["value", "nan", "bare", "nameless", "refusal", "input", "band", "outside", "dtype", "shape"],
)  # fmt: skip
def test_a_wrong_kernel_is_found(monkeypatch, change, message):
    index = find("inner", lambda call: min(call.tensors["pixel"].shape) > 2)
    replace(monkeypatch, "inner", change)
    found, what = examine(SEED, "inner", index)
    assert found == "wrong"
    assert re.search(message, what), what


@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
def test_a_kernel_that_writes_outside_of_its_output_is_found(monkeypatch, before):
    norm, launch = kernels.norm, kernels.norm.launch
    index = find("fold", lambda call: not call.wanted and min(call.tensors["pixel"].shape) > 0)

    def spills(spec, grid, *given):
        launch(spec, grid, *given)
        if spec.kernel is norm._norm_add_kernel:
            out = given[norm._norm_add_kernel.arg_names.index("y_ptr")]
            out.as_strided((1,), (1,), out.storage_offset() + (-1 if before else out.numel())).zero_()

    assert examine(SEED, "fold", index) == ("right", "")
    monkeypatch.setattr(norm, "launch", spills)
    found, what = examine(SEED, "fold", index)
    assert found == "wrong"
    assert what.startswith("written outside of an allocated tensor")


@pytest.mark.parametrize("weight", ["norm1_weight", "qk_weight", "fc2_bias"])
def test_a_wrong_gradient_of_one_weight_is_found(monkeypatch, weight):
    index = find("inner", lambda call: {"pixel", weight} <= set(call.wanted) and min(call.tensors["pixel"].shape) > 2)
    function = reference.inner

    def off(weights, **given):
        return function(weights=weights._replace(**{weight: OffByALittle.apply(getattr(weights, weight))}), **given)

    instead(monkeypatch, "inner", off)
    found, what = examine(SEED, "inner", index)
    assert found == "wrong"
    assert what.startswith(f"gradient of {weight}: error")


def test_an_answer_where_the_reference_raises_is_wrong_and_a_named_error_is_not(monkeypatch):
    index = find("inner")

    def refuses(*args, **kwargs):
        raise ValueError("no")

    monkeypatch.setattr(reference, "inner", refuses)
    instead(monkeypatch, "inner", lambda **given: given["pixel"].clone())
    found, what = examine(SEED, "inner", index)
    assert found == "wrong"
    assert what.startswith("answers where the reference raises ValueError: no")

    def names(**given):
        raise ValueError("inner: pixel is not to my liking")

    instead(monkeypatch, "inner", names)
    assert examine(SEED, "inner", index) == ("reference raises too", "")


def test_what_the_rule_lets_pass_and_what_not():
    nan, exact = float("nan"), torch.tensor([1.0, -2.0, 4.0], dtype=torch.float64)
    half = torch.float16
    off = exact + torch.tensor([0, 3.9 * 2**-10 * 4, 0], dtype=torch.float64)
    compare("x", off, [exact], exact, half)
    with pytest.raises(Wrong, match="1.0 × the rule"):
        compare("x", exact + 1.03 * (off - exact), [exact], exact, half)
    compare("x", exact + 1.5 * (off - exact), [exact + 0.3 * (off - exact)], exact, half)
    bad = torch.tensor([1.0, nan, 4.0], dtype=torch.float64)
    with pytest.raises(Wrong, match="1 of 3 values are not finite"):
        compare("x", bad, [exact], exact, half)
    with pytest.raises(Wrong, match="finite in places where the reference is not"):
        compare("x", exact, [bad], bad, half)
    compare("x", bad, [bad], bad, half)
    compare("x", bad, [bad], exact, half)  # PyTorch has none there either
    large = torch.tensor([1.0, 65500.0], dtype=torch.float64)
    compare("x", torch.tensor([1.0, float("inf")]), [large], large, half)


@pytest.mark.parametrize("what", ["an answer of its own", "an exception", "a reason that is none", "a reason not foretold"])
def test_wrong_dispatch_is_found(monkeypatch, what):
    index = next(
        i for i in range(100) if examine(SEED, "surgery", i)[0] == "right" and draw(SEED, "surgery", i).options["depth"]
    )
    function = fuzz_cases.call_model

    def call_model(model, backend, *args):
        if backend == "reference":
            return function(model, backend, *args)
        if what == "an exception":
            raise AttributeError("bias")
        if what == "a reason not foretold":
            raise RuntimeError("backend='fused' cannot run:\n")
        return {name: 1.01 * x if what == "an answer of its own" else x for name, x in function(model, backend, *args).items()}

    monkeypatch.setattr(fuzz_cases, "call_model", call_model)
    monkeypatch.setattr(fuzz_cases, "why_not_fused", lambda *args: ["a reason"] if what == "a reason that is none" else [])
    found, told = examine(SEED, "surgery", index)
    assert found == "wrong"
    expected = {
        "an answer of its own": "output: off by", "an exception": "AttributeError inside of the fused path: bias",
        "a reason that is none": "runs although why_not_fused says", "a reason not foretold": "why_not_fused has no reason",
    }  # fmt: skip
    assert told.startswith(expected[what])


def surgery(monkeypatch, change) -> str:
    """The verdict on a model of two tokens that drops paths."""

    def drawn(dice, *given):
        model = fuzz_cases.TNT(8, 8, 3, 0, embed_dim=24, inner_dim=6, depth=1, num_heads_inner=1, num_heads_outer=3)
        model.blocks[0].drop_path = fuzz_cases.timm.layers.DropPath(0.5)
        return perturb(model, 0.1).to(fuzz_rule.DEVICE), {}, (4, 3, 8, 8)

    monkeypatch.setattr(fuzz_cases, "draw_tnt", drawn)
    monkeypatch.setattr(fuzz_cases.Surgery, "ACTIONS", (lambda dice, model: change(model) or "changed",))
    case = fuzz_cases.Surgery(fuzz_cases.Dice(SEED, "surgery", 0))
    case.model.train()
    case.gradients = True
    return case.judge()


def test_what_a_lazy_module_draws_is_no_difference(monkeypatch):
    assert surgery(monkeypatch, lambda m: setattr(m.blocks[0].attn_out, "v", torch.nn.LazyLinear(24))) == "right"


def test_gradients_through_saturated_attention_are_held_to_pytorchs_own_error(monkeypatch):
    def saturated(model):
        qk = model.blocks[0].attn_out.qk
        qk.weight.data.mul_(100)
        qk.register_forward_hook(lambda module, given, out: None)  # so that it is called

    assert surgery(monkeypatch, saturated) == "right"


def dies(seed, kind, index):
    """In the place of ``examine`` in a worker."""
    if index == 1:
        os._exit(7)
    if index == 2:
        time.sleep(60)
    return "right", ""


def test_a_process_that_dies_and_one_that_does_not_end_are_named_by_their_cases():
    cases = [("fold", i) for i in range(5)]
    found = {index: (verdict, what) for _, index, verdict, what in fuzz.run(SEED, cases, 1, limit=3, work=dies)}
    assert found == {
        0: ("right", ""), 1: ("wrong", "its process ended with exit code 7"), 2: ("wrong", "not done after 3 s"),
        3: ("right", ""), 4: ("right", ""),
    }  # fmt: skip


def test_the_command_line_counts_writes_and_replays(tmp_path, capsys):
    file = tmp_path / "new" / "fuzz.json"
    command = [sys.executable, "-m", "tests.fuzz", "--seed", str(SEED), "--only", "fold"]
    command += ["--count", "6", "--json", str(file)]
    done = subprocess.run(command, cwd=Path(__file__).resolve().parents[1], capture_output=True, text=True)
    result = json.loads(file.read_text("utf-8"))
    assert list(file.parent.iterdir()) == [file]
    assert (result["seed"], result["count"], result["asked"], list(result["counts"])) == (SEED, 6, 6, ["fold"])
    assert sum(result["counts"]["fold"].values()) == 6
    assert set(result["versions"]) == {"torch", "triton", "timm", "numpy", "python"}
    assert done.returncode == int(bool(result["wrong"])), done.stderr
    assert fuzz.main(["--seed", str(SEED), "--case", "fold:3"]) == int(examine(SEED, "fold", 3)[0] == "wrong")
    assert capsys.readouterr().out.partition(":")[0] == examine(SEED, "fold", 3)[0]
    with pytest.raises(SystemExit):
        fuzz.main(["--case", "nosuch:3"])
    assert "pixel_embed, inner, fold, outer, block, model, surgery" in capsys.readouterr().err


def test_stopped_it_says_what_it_found_so_far(monkeypatch, tmp_path, capsys):
    def stopped(seed, cases, processes):
        yield from [(kind, i, "right", "") for kind, i in cases[:3]]
        raise KeyboardInterrupt

    monkeypatch.setattr(fuzz, "run", stopped)
    assert fuzz.main(["--count", "100000", "--json", str(tmp_path / "fuzz.json")]) == 130
    assert "3 of 100000 cases, 0 wrong" in capsys.readouterr().out
    result = json.loads((tmp_path / "fuzz.json").read_text("utf-8"))
    assert (result["count"], result["asked"]) == (3, 100000)


def test_the_wrong_cases_of_a_result_can_be_judged_again(monkeypatch, tmp_path):
    file, verdicts = tmp_path / "fuzz.json", {1: "wrong", 2: "wrong"}
    monkeypatch.setattr(fuzz, "run", lambda seed, cases, processes: ((k, i, verdicts.get(i, "right"), "x") for k, i in cases))
    assert fuzz.main(["--only", "fold", "--count", "5", "--json", str(file)]) == 1
    verdicts[1] = "right"
    assert fuzz.main(["--again", str(file)]) == 1
    result = json.loads(file.read_text("utf-8"))
    assert (result["count"], result["asked"], result["counts"]["fold"]["right"], result["counts"]["fold"]["wrong"]) == (
        5,
        5,
        4,
        1,
    )
    assert [w["case"] for w in result["wrong"]] == ["fold:2"]
    assert result["judged_again"] == ["fold:1", "fold:2"]
