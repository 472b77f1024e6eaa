"""The one choice between the paths. Stand-in kernels (the reference's own functions) show that the fused path hands over
every weight; the real kernels take their place without a change in the model."""

import contextlib
import copy
import gc
import os
import re
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from helpers import TINY, perturb, relative_error
from torch import nn

from tnt_fast import TNT, dispatch, kernels, reference, why_not_fused

ROOT = Path(__file__).resolve().parents[1]
REAL = dict(kernels.OPERATIONS)
CHANGING = {  # from call to call, in order
    "pixel_embed": ["image"],
    "inner": ["pixel", "attn_scale", "mlp_scale"],
    "fold": ["pixel", "patch"],
    "outer": ["patch", "pixel", "attn_scale", "mlp_scale"],
    "block": ["pixel", "patch", "inner_attn_scale", "inner_mlp_scale", "attn_scale", "mlp_scale"],
}


def tiny(**kwargs) -> TNT:
    return perturb(TNT(**{**TINY, **kwargs})).eval()


def remembered(model: TNT, image: torch.Tensor) -> TNT:
    """The model, fused, as it is when a few forwards have found it unchanged."""
    model.backend = "fused"
    for _ in range(3):
        found = dispatch.choose(model, image)
    assert isinstance(found, dispatch.Chosen)
    return model


@pytest.fixture
def stand_ins(monkeypatch):
    """Every operation has a "kernel"; the machine has nothing against it; calls are counted."""
    names = (*dispatch.OPERATIONS, "block")
    calls = dict.fromkeys(names, 0)

    class StandIn:
        def __init__(self, name):
            self.name = name
            self.wrong_types = self.wrong_values = self.gradients_unsupported = lambda *given: []

        def trusted(self, *args, **kwargs):
            calls[self.name] += 1
            return getattr(reference, self.name)(*args, **kwargs)

        def settled(self, given, looked_at):
            def run(*changing):
                return self.trusted(**dict(zip(CHANGING[self.name], changing, strict=False)), **given)

            run.given = given
            return run

    monkeypatch.setattr(kernels, "OPERATIONS", {name: StandIn(name) for name in names})
    monkeypatch.setattr(kernels, "on_cpu", lambda: False)
    monkeypatch.setattr(dispatch, "_machine_reasons", lambda image, backend: [])
    monkeypatch.setattr(dispatch, "_warned", set())
    return calls


@pytest.mark.parametrize(
    "options",
    [{}, {"legacy": True}, {"qkv_bias": True}, {"use_pixel_pos": False}, {"inner_blocks": (1,)}, {"se_ratio": 0.5}],
    ids=str,
)
def test_the_fused_path_hands_every_weight_to_the_kernels(stand_ins, options):
    model = tiny(**options).double()
    image = torch.randn(3, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    found = []
    for backend in ("reference", "fused"):
        model.backend = backend
        out = model(image)
        found.append([out, *torch.autograd.grad(out.square().sum(), [image, *model.parameters()])])
    for name, a, b in zip(("out", "image", *dict(model.named_parameters())), *found, strict=True):
        assert relative_error(b, a) <= 1e-13, name
    inner, outer = 1 if "inner_blocks" in options else 2, 0 if "se_ratio" in options else 2
    whole = inner if outer else 0
    apart = {"inner": inner - whole, "fold": 1 + inner - whole, "outer": outer - whole}
    assert stand_ins == {"pixel_embed": 1, **apart, "block": whole}
    with torch.no_grad():
        assert relative_error(model(image), found[0][0]) <= 1e-13
    assert (stand_ins["block"], stand_ins["outer"]) == (2 * whole, 2 * (outer - whole))


def test_fused_is_fused_in_intermediates_and_with_checkpointing(stand_ins):
    model = tiny(backend="fused").train()
    with torch.no_grad():
        model.forward_intermediates(torch.randn(2, 3, 32, 32))
    assert stand_ins == {"pixel_embed": 1, "inner": 0, "fold": 1, "outer": 0, "block": 2}
    model.set_grad_checkpointing()
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert stand_ins["block"] == 2 + 2 + 2  # once more, then again in the backward


def test_fused_does_not_touch_the_reference(stand_ins, monkeypatch):
    model, image = tiny(backend="fused"), torch.randn(2, 3, 32, 32)
    marks = {
        name: torch.zeros(8, 16, 12) if name != "fold" else torch.zeros(2, 5, 24) for name in ("pixel_embed", "inner", "fold")
    }
    for name, value in marks.items():
        kernels.OPERATIONS[name].__class__ = type("Constant", (), {"trusted": lambda *args, value=value, **kwargs: value})
    del kernels.OPERATIONS["outer"]

    def forbidden(*args, **kwargs):
        raise AssertionError("the reference was called")

    monkeypatch.setattr(reference, "cut_patches", forbidden)
    for block in model.blocks:
        monkeypatch.setattr(type(block), "inner", lambda self, pixel, fused: forbidden() if not fused else marks["inner"])
    assert model(image).shape == (2, 5)
    model.backend = "reference"
    with pytest.raises(AssertionError, match="the reference was called"):
        model(image)


def test_drop_path_draws_the_same_numbers_on_both_paths(stand_ins):
    model = tiny(drop_path_rate=0.5).train()
    image, outputs = torch.randn(4, 3, 32, 32), []
    for backend in ("reference", "fused", "fused"):
        model.backend = backend
        torch.manual_seed(7 if len(outputs) < 2 else 8)
        outputs.append(model(image))
    assert relative_error(outputs[1], outputs[0]) <= 1e-5
    assert not torch.equal(outputs[2], outputs[1])


class Replaced(nn.Linear):
    pass


def _norm(m):
    m.blocks[1].norm_in = nn.LayerNorm(12, elementwise_affine=False)


SPOILED = {
    "a Linear of another class": (lambda m: setattr(m.blocks[0].attn_in, "qk", Replaced(12, 24)), "blocks.0.attn_in.qk is a"),
    "another convolution": (
        lambda m: setattr(m.pixel_embed, "proj", nn.Sequential(m.pixel_embed.proj)),
        "pixel_embed.proj is a",
    ),
    "another norm": (lambda m: setattr(m, "norm1_proj", nn.RMSNorm(192)), "norm1_proj is a"),
    "a stem without its second norm": (lambda m: setattr(m, "norm2_proj", None), "norm2_proj is a builtins.NoneType"),
    "a norm without weights": (_norm, "blocks.1.norm_in lacks a weight of its normalized_shape (12,)"),
    "another activation": (lambda m: setattr(m.blocks[0].mlp_in, "act", nn.ReLU()), "blocks.0.mlp_in.act is a"),
    "another GELU": (lambda m: setattr(m.blocks[0].mlp_in, "act", nn.GELU("tanh")), "approximates GELU by tanh"),
    "a forward hook": (lambda m: m.blocks[0].attn_in.register_forward_hook(print), "blocks.0.attn_in has hooks"),
    "a pre-hook": (lambda m: m.proj.register_forward_pre_hook(print), "proj has hooks"),
    "a backward hook": (
        lambda m: m.blocks[1].proj.register_full_backward_hook(print),
        "blocks.1.proj has hooks",
    ),
    "a replaced forward": (lambda m: setattr(m.blocks[0].mlp_in, "forward", print), "blocks.0.mlp_in.forward was replaced"),
    "weight norm": (
        lambda m: nn.utils.parametrizations.weight_norm(m.blocks[0].mlp_in.fc1),
        "blocks.0.mlp_in.fc1 is a",
    ),
    "dropout": (lambda m: setattr(m.train().blocks[0].attn_in.attn_drop, "p", 0.1), "attn_in.attn_drop drops with p=0.1"),
    "mixed dtypes": (lambda m: m.blocks[0].mlp_in.half(), "the parameters have mixed dtypes (torch.float16, torch.float32)"),
    "another padding": (lambda m: setattr(m.pixel_embed.proj, "padding", (0, 0)), "pixel_embed.proj has other padding"),
    "another drop-path": (lambda m: setattr(m.blocks[1], "drop_path", nn.Dropout(0.0)), "blocks.1.drop_path is a"),
    "another eps": (
        lambda m: setattr(m.blocks[0].norm_in, "eps", 1e-6),
        "blocks.0.norm_in and .norm_mlp_in have eps 1e-06 and 1e-05",
    ),
    "an unknown recompute": (
        lambda m: setattr(m.blocks[1], "recompute", "avg"),
        "blocks.1.recompute='avg'; accepted: 'none', 'mlp', 'all' (model.set_recompute",
    ),
}


@pytest.mark.parametrize("what", SPOILED)
def test_what_is_done_to_a_submodule_is_a_reason(stand_ins, what):
    model, image = tiny(), torch.randn(1, 3, 32, 32)
    assert why_not_fused(remembered(model, image), image) == []
    spoil, message = SPOILED[what]
    spoil(model)
    reasons = why_not_fused(model, image)
    assert any(message in reason for reason in reasons), reasons
    model.backend = "fused"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        model(image)
    model.backend = "auto"
    with pytest.warns(UserWarning, match=re.escape(message)):
        assert dispatch.choose(model, image) is False


@pytest.mark.parametrize("options", [{"inner_blocks": ()}, {"se_ratio": 0.5}], ids=str)
def test_an_unknown_recompute_is_a_reason_of_any_block(stand_ins, options):
    model, image = tiny(**options), torch.randn(1, 3, 32, 32)
    model.blocks[0].recompute = None
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            (reason,) = why_not_fused(model, image)
            assert reason.startswith("blocks.0.recompute=None; accepted: 'none', 'mlp', 'all'")
            model.backend = "fused"
            with pytest.raises(RuntimeError, match=re.escape(reason)):
                model(image)
    model.set_recompute("none")
    assert why_not_fused(model, image) == []


@pytest.mark.parametrize("how", ["None", "a scalar"])
def test_a_weight_without_sizes_is_no_error_of_why_not_fused(stand_ins, how):
    model, image, found = tiny(depth=1), torch.randn(1, 3, 32, 32), {}
    for path, module in list(model.named_modules()):
        for key, weight in list(module._parameters.items()):
            if weight is not None:
                setattr(module, key, None if how == "None" else nn.Parameter(weight.detach().flatten()[0].clone()))
                found[f"{path}.{key}".lstrip(".")] = why_not_fused(model, image), why_not_fused(model)
                setattr(module, key, weight)
    for name in ("cls_token", "pixel_embed.proj.weight", "blocks.0.mlp_in.fc1.weight"):
        for reasons in found[name]:
            assert any(re.search(rf"(cls_token|weight) is {how}; the kernels", reason) for reason in reasons), (name, reasons)


def changed(name: str, value) -> list:
    """Other values of an attribute: of the same type, and those that its module accepts."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value + 1, value - 1, value * 2, value + 0.5, 0, None]
    if isinstance(value, str):
        return ["reflect", "replicate", "circular", "tanh", "none", "same", ""]
    if isinstance(value, tuple | list):
        return [tuple(x + d for x in value) for d in (-1, 1)] + [value[:-1], (*value, 1), value[0] if value else 1]
    return [None] if value is not None else [1]


def attributes(module: nn.Module, run) -> list[str]:
    """The attributes of a submodule that can matter: its own, and whatever its forward is seen to read."""
    cls, read = type(module), set()

    def seen(self, name):
        read.add(name)
        return super(cls, self).__getattribute__(name)

    module.__class__ = type(cls.__name__, (cls,), {"__getattribute__": seen})
    try:
        run()
    finally:
        module.__class__ = cls
    own = {name for name in vars(module) if not name.startswith("_") and name != "training"}
    return sorted(own | {name for name in read if name in vars(module) and not callable(getattr(module, name))})


@pytest.mark.parametrize("options", [{}, {"qkv_bias": True, "drop_path_rate": 0.3}], ids=["", "biases"])
def test_each_attribute_of_the_outer_submodules_changed_is_the_references_answer(stand_ins, options):
    model, image = tiny(depth=1, **options).train(), torch.randn(2, 3, 32, 32)

    @torch.no_grad()
    def answer(backend):
        model.backend = backend
        torch.manual_seed(3)
        try:
            return model(image)
        except Exception as error:
            return error

    fused = answers = 0
    for path, *_ in dispatch._OUTER:
        module = model.blocks[0].get_submodule(path)
        for name in attributes(module, lambda: answer("reference")):
            value = getattr(module, name)
            for other in changed(name, value):
                before = stand_ins["outer"] + stand_ins["block"]
                with torch.no_grad():
                    remembered(model, image)
                try:
                    setattr(module, name, other)
                    expected, found = answer("reference"), answer("fused")
                finally:
                    setattr(module, name, value)
                what = f"{path}.{name} = {other!r}: {found!r}, the reference: {expected!r}"
                if isinstance(expected, Exception):
                    assert isinstance(found, Exception), what
                else:
                    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True), what
                    answers, fused = answers + 1, fused + stand_ins["outer"] + stand_ins["block"] - before
    assert answers > fused > 20, (answers, fused)


OUTER = {
    "a Linear of another class": lambda b: setattr(b.attn_out, "qk", Replaced(24, 48)),
    "a Linear with an adapter": lambda b: setattr(b.mlp, "fc2", nn.Sequential(b.mlp.fc2, nn.Linear(24, 24))),
    "another norm": lambda b: setattr(b, "norm_out", nn.RMSNorm(24)),
    "a norm without weights": lambda b: setattr(b, "norm_mlp", nn.LayerNorm(24, elementwise_affine=False)),
    "another eps": lambda b: setattr(b.norm_out, "eps", 1e-2),
    "another activation": lambda b: setattr(b.mlp, "act", nn.ReLU()),
    "another GELU": lambda b: setattr(b.mlp, "act", nn.GELU("tanh")),
    "an attention of another class": lambda b: setattr(b, "attn_out", nn.Sequential(b.attn_out)),
    "an MLP of another class": lambda b: setattr(b, "mlp", nn.Sequential(b.mlp)),
    "a forward hook": lambda b: b.mlp.fc1.register_forward_hook(lambda module, given, out: 2 * out),
    "a pre-hook": lambda b: b.norm_mlp.register_forward_pre_hook(lambda module, given: (2 * given[0],)),
    "a hook on the attention": lambda b: b.attn_out.register_forward_hook(lambda module, given, out: -out),
    "a replaced forward": lambda b: setattr(b.mlp, "forward", torch.neg),
    "weight norm": lambda b: nn.utils.parametrizations.weight_norm(b.mlp.fc1),
    "a bias that is broadcast": lambda b: setattr(b.mlp.fc2, "bias", nn.Parameter(torch.randn(1))),
    "wider queries and keys": lambda b: setattr(b.attn_out.qk, "weight", nn.Parameter(0.2 * torch.randn(96, 24))),
    "biases of queries, keys and values that are broadcast": lambda b: [
        setattr(linear, "bias", nn.Parameter(torch.randn(1))) for linear in (b.attn_out.qk, b.attn_out.v)
    ],
    "a bias of queries and keys alone": lambda b: setattr(b.attn_out.qk, "bias", nn.Parameter(torch.randn(48))),
    "eager attention": lambda b: setattr(b.attn_out, "attn_backend", "eager"),
}


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "gradients"])
@pytest.mark.parametrize("what", OUTER)
def test_what_is_done_to_an_outer_submodule_is_done(stand_ins, what, gradients):
    model, image = tiny(), torch.randn(2, 3, 32, 32)
    with torch.set_grad_enabled(gradients):
        remembered(model, image)
    OUTER[what](model.blocks[0])
    assert why_not_fused(model) == []
    found = []
    for backend in ("reference", "fused"):
        model.backend = backend
        with torch.set_grad_enabled(gradients):
            found.append(model(image).detach())
    assert relative_error(found[1], found[0]) <= 1e-5
    # the other block is one operation
    assert stand_ins == {"pixel_embed": 1, "inner": 1, "fold": 2, "outer": 0, "block": 1}


@pytest.mark.parametrize("norm", ["norm_out", "norm_mlp"])
def test_an_outer_norm_of_another_width_is_the_references_error(norm):
    """Not what lies behind its weights, which the kernel would read."""
    pytest.importorskip("triton")
    if not (kernels.on_cpu() or torch.cuda.is_available()):
        pytest.skip("needs the kernels")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, image = tiny(backend="fused").to(device), torch.randn(2, 3, 32, 32, device=device)
    with torch.no_grad():
        model(image)  # so that the sizes are known
        setattr(model.blocks[1], norm, nn.LayerNorm(12).to(device))
        with pytest.raises(RuntimeError, match="normalized_shape"):
            model(image)


def test_a_weight_of_queries_and_keys_is_not_broadcast():
    """Into the one matrix that the operation makes of it and the values'."""
    pytest.importorskip("triton")
    if not (kernels.on_cpu() or torch.cuda.is_available()):
        pytest.skip("needs the kernels")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, image = tiny(depth=1).to(device), torch.randn(1, 3, 32, 32, device=device)
    model.blocks[0].attn_out.qk.weight = nn.Parameter(torch.randn(1, device=device))
    for model.backend in ("reference", "fused"):
        with pytest.raises((RuntimeError, ValueError)):
            model(image)


def test_a_block_is_one_operation_with_gradients_and_without(stand_ins):
    model, image = tiny(backend="fused"), torch.randn(2, 3, 32, 32)

    def calls(*contexts):
        """Folds beside the stem's, outer transformers, whole blocks."""
        before = dict(stand_ins)
        with contextlib.ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            model(image)
        folds, *others = [stand_ins[name] - before[name] for name in ("fold", "outer", "block")]
        return folds - 1, *others

    assert calls() == calls(torch.no_grad()) == calls(torch.inference_mode()) == (0, 0, 2)
    assert calls(torch.autocast("cpu", torch.bfloat16)) == (0, 0, 2)
    model.blocks[1].norm1_proj.eps = model.blocks[1].norm2_proj.eps = 1e-3  # the operation takes one
    assert calls() == calls(torch.no_grad()) == (1, 1, 1)
    model.requires_grad_(False)
    with torch.no_grad():
        model.blocks[0].mlp.to(torch.bfloat16)
        assert calls(torch.autocast("cpu", torch.bfloat16)) == (1, 1, 1)  # cast anyway
        assert calls(torch.autocast("cpu", torch.float16)) == (2, 1, 0)  # by its submodules, which take any
        with pytest.raises(RuntimeError, match="dtype"):
            model(image)


@pytest.mark.parametrize("options", [{}, {"legacy": True, "qkv_bias": True, "drop_path_rate": 0.3}], ids=["", "legacy"])
def test_each_attribute_of_each_submodule_changed_is_the_references_answer_or_a_reason(stand_ins, options, monkeypatch):
    for name, operation in kernels.OPERATIONS.items():
        if name != "outer":
            operation.wrong_types, operation.wrong_values = REAL[name].wrong_types, REAL[name].wrong_values
    monkeypatch.delitem(kernels.OPERATIONS, "outer")  # its submodules are called
    model, image = tiny(depth=1, **options).train(), torch.randn(2, 3, 32, 32)
    model.backend = "fused"

    def answer(backend):
        model.backend = backend
        torch.manual_seed(3)
        try:
            return model(image).detach()
        except Exception as error:
            return error

    passed_over = [path for path, *_ in dispatch._STEM] + [f"blocks.0.{path}" for path, *_ in dispatch._BLOCK]
    counts = {"answer": 0, "reason": 0}
    for path in [*passed_over, "pixel_embed"]:
        module = model.get_submodule(path) if "norm2_proj" not in path or not options else None
        if module is None:
            continue
        for name in attributes(module, lambda: answer("reference")):
            value = getattr(module, name)
            for other in changed(name, value):
                remembered(model, image)
                try:
                    setattr(module, name, other)
                    expected, reasons, found = answer("reference"), why_not_fused(model, image), answer("fused")
                finally:
                    setattr(module, name, value)
                what = f"{path}.{name} = {other!r}: {reasons}, {found!r}, the reference: {expected!r}"
                if reasons:
                    assert isinstance(found, RuntimeError), what
                    assert "backend='fused' cannot run" in str(found), what
                    counts["reason"] += 1
                elif isinstance(expected, Exception):
                    assert isinstance(found, Exception), what
                else:
                    assert torch.equal(found.isnan(), expected.isnan()), what
                    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True), what
                    counts["answer"] += 1
    assert counts["reason"] > 50, counts
    assert counts["answer"] > 30, counts


def _doubled(block, given):
    block.mlp_in.fc1.weight = nn.Parameter(2 * block.mlp_in.fc1.weight)


CHANGES = {
    "a parameter replaced": lambda b: setattr(b.attn_in.qk, "weight", nn.Parameter(torch.randn(24, 12))),
    "a module replaced": lambda b: setattr(b.mlp_in, "fc1", nn.Linear(12, 48)),
    "a dictionary of parameters replaced": lambda b: setattr(
        b.proj, "_parameters", {"weight": nn.Parameter(torch.randn(24, 192)), "bias": None}
    ),
    "weights moved": lambda b: setattr(b.mlp.fc1.weight, "data", 2 * b.mlp.fc1.weight.data),
    "weights loaded": lambda b: b.load_state_dict(tiny().blocks[0].state_dict()),
    "an update past the version": lambda b: b.attn_out.v.weight.data.mul_(2),
    "a hook on the block": lambda b: b.register_forward_pre_hook(_doubled),
    "a replaced inner": lambda b: setattr(b, "inner", lambda pixel, fused: 2 * pixel.sin()),
    "heads": lambda b: setattr(b.attn_in, "num_heads", 3),
    "both norms' eps": lambda b: [setattr(norm, "eps", 1e-2) for norm in (b.norm_in, b.norm_mlp_in)],
}


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "gradients"])
@pytest.mark.parametrize("what", CHANGES)
def test_a_change_between_forwards_is_in_the_next(stand_ins, what, gradients):
    torch.manual_seed(0)
    model, image, found = tiny(), torch.randn(2, 3, 32, 32, dtype=torch.float64), []
    block, first = model.double().blocks[1], None
    with torch.set_grad_enabled(gradients):
        before = remembered(model, image)(image)
        CHANGES[what](block)
        model.double()
        for backend in ("reference", "fused", "fused", "fused"):
            model.backend = backend
            if what == "a hook on the block":  # which doubles it in each forward
                first = block.mlp_in.fc1.weight if first is None else first
                block.mlp_in.fc1.weight = first
            found.append(model(image))
    assert relative_error(found[0], before) > 1e-7
    assert all(relative_error(x, found[0]) <= 1e-12 for x in found[1:])


def _by_hand(module):
    module._forward_hooks[0] = print


SEEN = {
    "mode": lambda b: b.attn_in.proj_drop.eval(),
    "probability": lambda b: setattr(b.mlp.drop1, "p", 0.5),
    "a forward on the instance": lambda b: setattr(b.mlp_in.act, "forward", torch.relu),
    "a class": lambda b: setattr(b.proj, "__class__", Replaced),
    "a child": lambda b: setattr(b.mlp_in, "act", nn.GELU()),
    "the same parameter elsewhere": lambda b: setattr(b.norm_in, "weight", nn.Parameter(b.norm_in.weight.data)),
    "a parameter's memory": lambda b: setattr(b.norm_in.weight, "data", b.norm_in.weight.data.clone()),
    "a parameter's strides": lambda b: setattr(b.attn_in.v.weight, "data", b.attn_in.v.weight.data.t()),
    "a parameter's dtype": lambda b: setattr(b.norm_in.weight, "data", b.norm_in.weight.data.view(torch.int32)),
    "a parameter's class": lambda b: setattr(b.norm_in.weight, "__class__", type("Other", (nn.Parameter,), {})),
    "a buffer": lambda b: setattr(b.norm_mlp_in, "weight", b.norm_mlp_in.weight.clone()),
    "a hook": lambda b: b.mlp.act.register_full_backward_hook(print),
    "a hook by hand": lambda b: _by_hand(b.mlp.drop2),
    "a dictionary of hooks": lambda b: setattr(b.attn_out.v, "_forward_pre_hooks", {0: print}),
}


@pytest.mark.parametrize("what", SEEN)
def test_a_look_sees_what_was_done(stand_ins, what):
    model, image = tiny(depth=1).train(), torch.randn(1, 3, 32, 32)
    block = model.blocks[0]
    weight = block.norm_mlp_in.weight.data
    del block.norm_mlp_in.weight
    block.norm_mlp_in.register_buffer("weight", weight)
    look = remembered(model, image)._look
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    model.requires_grad_(False)
    assert look.still(model)
    SEEN[what](block)
    assert not look.still(model)


def test_one_weight_of_another_shape_dtype_or_device_is_a_reason_between_forwards(stand_ins):
    for name in ("inner", "fold") if REAL else ():
        kernels.OPERATIONS[name].wrong_values = REAL[name].wrong_values
    changes = {
        "the parameters have mixed dtypes": lambda x: setattr(x, "data", x.data.half()),
        "fc1_weight is on 'meta'": lambda x: torch.utils.swap_tensors(x, nn.Parameter(x.to("meta"))),
        r"fc1_bias has shape \(48,\); expected \(40,\)": lambda x: setattr(x, "data", x.data[:40]),  # the same memory
    }
    for message, change in changes.items():
        model, image = tiny(), torch.randn(1, 3, 32, 32)
        with torch.no_grad():
            change(remembered(model, image).blocks[1].mlp_in.fc1.weight)
            with pytest.raises(RuntimeError, match=message if REAL or "mixed" in message else ""):
                model(image)


def test_what_was_found_belongs_to_one_model_and_keeps_nothing_alive(stand_ins, tmp_path, monkeypatch):
    image = torch.randn(1, 3, 32, 32)
    model = remembered(tiny(), image)
    torch.save(model, tmp_path / "model.pt")
    replica = copy.copy(model)  # as DataParallel makes them
    others = (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False), replica)
    looks = []
    real = dispatch._model_reasons
    monkeypatch.setattr(dispatch, "_model_reasons", lambda *given: looks.append(1) or real(*given))
    for number, other in enumerate(others):
        dispatch.choose(other, image)
        assert len(looks) == 1 + number  # looked through
    assert isinstance(dispatch.choose(model, image), dispatch.Chosen)  # and this one not again
    assert torch.jit.script(model) is not None
    gone = weakref.ref(model)
    model.loop = lambda owner=model: owner
    remembered(model, image)
    del model, other, others, replica
    gc.collect()
    assert gone() is None


def test_a_look_costs_no_second_one_and_each_size_and_mode_its_own(stand_ins, monkeypatch):
    looks = []
    real = dispatch._model_reasons
    monkeypatch.setattr(dispatch, "_model_reasons", lambda *given: looks.append(1) or real(*given))
    model = tiny(backend="fused")
    for batch in (1, 2):
        for context in (torch.no_grad(), torch.enable_grad(), torch.autocast("cpu", torch.bfloat16)):
            with context:
                for _ in range(4):
                    model(torch.randn(batch, 3, 32, 32))
    assert len(looks) == 6 + 1  # the first forward is not remembered
    model.train()
    for _ in range(3):
        model(torch.randn(1, 3, 32, 32))
    assert len(looks) == 6 + 1 + 1
    model.norm.register_forward_hook(lambda *given: None)  # where there are hooks, each time
    for _ in range(3):
        model(torch.randn(1, 3, 32, 32))
    assert len(looks) == 6 + 1 + 1 + 3


def test_a_block_compiled_by_itself_takes_what_its_modules_hold(stand_ins):
    model, image = tiny(backend="fused", depth=1), torch.randn(2, 3, 32, 32)
    torch._dynamo.reset()
    model.blocks[0].compile(backend="eager", fullgraph=True)
    with torch.no_grad():
        for scale in (1.0, 1.0, 1.0, 2.0):
            model.blocks[0].attn_in.proj.weight = nn.Parameter(scale * model.blocks[0].attn_in.proj.weight)
            found = model(image)
        model.backend = "reference"
        assert relative_error(model(image), found) <= 1e-5


@pytest.mark.parametrize("child", ["norm", "head", "head_drop", "pos_drop", "blocks.0", "pixel_embed"])
def test_modules_that_are_still_called_may_have_hooks(stand_ins, child):
    model, seen = tiny(backend="fused", drop_path_rate=0.1), []
    model.get_submodule(child).register_forward_hook(lambda *_: seen.append(child))
    model(torch.randn(1, 3, 32, 32))
    assert seen == [child]


def test_the_limits_of_a_kernel_are_reasons(stand_ins):
    kernels.OPERATIONS["inner"].wrong_values = lambda given, device, sizes: [f"S={sizes['S']} is above 8"]
    assert why_not_fused(tiny()) == ["inner: S=16 is above 8 (blocks.0)"]


def test_gradients_that_pytorch_computes_are_told_once(stand_ins):
    seen = []

    def limit(sizes, dtype, device):
        seen.append((sizes["S"], dtype, device))
        return ["S=16 is above 8"]

    kernels.OPERATIONS["inner"].gradients_unsupported = limit
    model, image = tiny(backend="fused"), torch.randn(1, 3, 32, 32)
    assert why_not_fused(model, image) == []
    assert why_not_fused(model, image, gradients=True) == ["inner: S=16 is above 8"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            model(image)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.warns(UserWarning, match="computes gradients with PyTorch: inner: S=16 is above 8"),
    ):
        model(image)
    assert seen[-1] == (16, torch.bfloat16, image.device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(image)


def test_an_image_of_another_dtype_is_a_reason_but_not_under_autocast(stand_ins):
    model, image = tiny(), torch.randn(1, 3, 32, 32, dtype=torch.bfloat16)
    assert why_not_fused(model, image) == ["the image is torch.bfloat16, the parameters are torch.float32; cast one of them"]
    with torch.autocast("cpu", torch.bfloat16):
        assert why_not_fused(model, image) == []


def test_a_machine_without_a_gpu_names_every_reason(monkeypatch):
    monkeypatch.setattr(kernels, "on_cpu", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    reasons = " ".join(why_not_fused(tiny(), torch.randn(1, 3, 32, 32)))
    assert "torch sees no GPU" in reasons
    assert "the image is on device 'cpu'" in reasons
    with pytest.raises(RuntimeError, match=r"(?s)backend='fused' cannot run:.*no GPU.*device 'cpu'.*backend='auto'"):
        tiny(backend="fused")(torch.randn(1, 3, 32, 32))


def test_a_gpu_that_is_too_old_is_a_reason(monkeypatch):
    operation = pytest.importorskip("tnt_fast.kernels.operation", reason="needs triton")
    monkeypatch.setattr(operation, "runner", operation.Gpu())
    monkeypatch.setattr(operation.Gpu, "nvidia", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "Tesla T4 has compute capability 7.5; the kernels need 8.0" in dispatch.unsupported_machine()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert dispatch.unsupported_machine() == []


def test_auto_warns_once_per_set_of_reasons(monkeypatch):
    monkeypatch.setattr(kernels, "on_cpu", lambda: False)
    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setattr(dispatch, "_machine_reasons", lambda image, backend: ["it rains"])
    model, image = tiny(), torch.randn(1, 3, 32, 32)
    with pytest.warns(UserWarning, match="takes the reference path: it rains"):
        first = model(image)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model(image), first)
        model.backend = "reference"
        monkeypatch.setattr(dispatch, "_machine_reasons", lambda image, backend: ["it pours"])
        assert torch.equal(model(image), first)
    model.backend = "auto"
    with pytest.warns(UserWarning, match="it pours"):
        model(image)


def test_the_interpreter_is_only_for_who_asks_for_it(monkeypatch):
    monkeypatch.setattr(kernels, "on_cpu", lambda: True)
    monkeypatch.setattr(dispatch, "_warned", set())
    with pytest.warns(UserWarning, match="Triton interprets the kernels here"):
        assert dispatch.choose(tiny(), torch.randn(1, 3, 32, 32)) is False
    assert dispatch.choose(tiny(backend="fused"), torch.randn(1, 3, 32, 32)) is True


def test_a_scripted_or_traced_model_never_claims_to_be_fused(stand_ins, monkeypatch):
    model, image = tiny(backend="fused"), torch.randn(1, 3, 32, 32)
    with pytest.raises(Exception, match="a scripted TNT runs the reference"):
        torch.jit.script(copy.deepcopy(model))(image)
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match=r"torch\.fx traces the model symbolically"):
        torch.fx.symbolic_trace(tiny(backend="fused"))


NO_TRITON = """
import importlib.abc, importlib.machinery, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'triton':
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
"""


def test_everything_but_the_kernels_works_without_triton():
    code = """
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.split('.')[0] == 'triton' else real(name, package)
import torch, tnt_fast
assert 'triton' not in sys.modules
model = tnt_fast.TNT(img_size=32, embed_dim=24, inner_dim=12, depth=1, num_heads_outer=2, num_classes=3, backend='reference')
assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)
assert any('Triton is not installed' in r for r in tnt_fast.why_not_fused(model))
print('ran')
"""
    done = subprocess.run([sys.executable, "-c", NO_TRITON + code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "ran", done.stderr


WITH_A_MODEL = """
import torch, tnt_fast
model = tnt_fast.TNT(img_size=32, embed_dim=24, inner_dim=12, depth=1, num_heads_outer=2, num_classes=3, backend='reference')
assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)
print(*tnt_fast.why_not_fused(model), sep='; ')
"""


@pytest.mark.parametrize("argv", [["-c", WITH_A_MODEL], ["-m", "tnt_fast", "info"]], ids=["package", "command"])
def test_a_triton_that_does_not_import_is_a_reason_and_breaks_nothing(argv, tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise OSError('libcuda.so.1: no such file')")  # torch takes ImportError
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, *argv], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert "Triton is installed and does not import (OSError: libcuda.so.1: no such file); install " in done.stdout, done.stderr


@pytest.mark.parametrize("error", ["ImportError('undefined symbol')", "AttributeError('x')", "RuntimeError('0 drivers')"])
def test_whatever_the_import_of_triton_raises_is_named(error, tmp_path, monkeypatch):
    (tmp_path / "triton.py").write_text(f"raise {error}")
    for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "triton", None)  # so that it is put back
    del sys.modules["triton"]
    kind, text = error.rstrip("')").split("('")
    assert f"does not import ({kind}: {text}); install" in kernels._without_triton()


@pytest.mark.parametrize("name", ["inner", "fold", "outer"])
@pytest.mark.parametrize("of", ["instance", "class"])
def test_a_replaced_step_of_a_block_is_called(stand_ins, name, of):
    model, image = tiny(), torch.randn(2, 3, 32, 32)
    right = getattr(type(model.blocks[0]), name)

    def twice(self, *given):
        return 2 * right(self, *given)

    if of == "instance":
        setattr(model.blocks[0], name, lambda *given: twice(model.blocks[0], *given))
    else:
        model.blocks[0].__class__ = type("Block", (type(model.blocks[0]),), {name: twice})
    found = []
    for backend in ("reference", "fused"):
        model.backend = backend
        with torch.no_grad():
            found.append(model(image))
    assert relative_error(found[1], found[0]) <= 1e-5


def test_a_stem_without_a_weight_is_a_reason():
    model = tiny()
    model.pixel_embed.proj.weight = None
    assert any("pixel_embed.proj.weight is None" in reason for reason in why_not_fused(model))
