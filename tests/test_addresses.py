"""No address of a kernel overflows: intervals.py proves it for what is shipped, and is itself put to the test."""

import json
import math
import mmap
import operator
import random

import pytest
import torch
from helpers import TINY, launchers, run_once

pytest.importorskip("triton")

import intervals
from intervals import RULES, Interval, Typed

from benchmarks.launched import launches, launches_of_one
from tnt_fast import TNT, kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

SCRIPT = """
import gc
import json
from itertools import product
from pathlib import Path

import torch
import triton
import triton.language as tl

from benchmarks.launched import recorded
from intervals import Interval, Typed, compiled, integers, proofs, prove, typed
from tnt_fast.kernels.operation import Config


@triton.jit
def channels(x_ptr, stride, HOW: tl.constexpr):
    c = tl.program_id(0) % 4
    if HOW == "narrow":
        at = c * stride
    elif HOW == "late":
        at = (c * stride).to(tl.int64)
    elif HOW == "chosen":
        at = tl.where(c < 3, c * stride, 0)
    elif HOW == "wide":
        at = c.to(tl.int64) * stride
    tl.store(x_ptr + at, 0.0)


@triton.jit
def blocks(x_ptr, n, BLOCK: tl.constexpr, HOW: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wide = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if HOW == "narrow":
        tl.store(x_ptr + at, 0.0, mask=wide < n)
    elif HOW == "mask":
        tl.store(x_ptr + wide, 0.0, mask=at < n)
    elif HOW == "wide":
        tl.store(x_ptr + wide, 0.0, mask=wide < n)


@triton.jit
def loop(x_ptr, n, BLOCK: tl.constexpr, HOW: tl.constexpr):
    for turn in range(tl.program_id(0), (n + BLOCK - 1) // BLOCK if HOW == "bounded" else n, tl.num_programs(0)):
        tl.store(x_ptr + turn * BLOCK + tl.arange(0, BLOCK), 0.0)


@triton.jit
def beyond(x_ptr, i_ptr, n, HOW: tl.constexpr):
    if HOW == "looked up":
        tl.store(x_ptr + tl.load(i_ptr), 0.0)
    elif HOW == "carried":
        for _ in range(n):
            tl.store(x_ptr, 0.0)
            x_ptr += n
    elif HOW == "atomic":
        tl.atomic_add(x_ptr + n, 1.0)
    elif HOW == "branch":
        at = n
        if n > 3:
            tl.store(x_ptr, 1.0)
            at = n - 3
        tl.store(x_ptr + at, 0.0)


def found(kernel, how, kind, **ranges):
    known = {"x_ptr": "*fp32", "i_ptr": "*i32", "n": "i32", "stride": "i32"}
    types = {name: known[name] for name in kernel.arg_names if name in known}
    constants = {"HOW": how} | ({"BLOCK": 64} if "BLOCK" in kernel.arg_names else {})
    launch = Typed(kernel, constants, Config(64, 4), types)
    ranges = {"program_id": Interval(0, 2**30 - 1), "num_programs": Interval(1, 2**30)} | ranges
    try:
        return [str(f) for f in compiled(launch, dict.fromkeys(integers(launch), kind)).findings([ranges])]
    except ValueError as error:
        return f"error: {error}"


toys = {}
for kind, most in (("i32", 2**31 - 1), ("i64", 2**44)):
    for how in ("narrow", "late", "chosen", "wide"):
        toys[f"channels {how} {kind}"] = found(channels, how, kind, stride=Interval(0, most))
    for how in ("narrow", "mask", "wide"):
        toys[f"blocks {how} {kind}"] = found(blocks, how, kind, n=Interval(1, 2**30))
    for how in ("bounded", "unbounded"):
        toys[f"loop {how} {kind}"] = found(loop, how, kind, n=Interval(1, 2**30))
    toys[f"loop endless {kind}"] = found(loop, "bounded", kind, n=Interval(1, 2**31 - 1))
    for how in ("looked up", "carried", "atomic", "branch"):
        toys[f"beyond {how} {kind}"] = found(beyond, how, kind, n=Interval(0, 2**20))


def widest():
    # launches at the ends of what unsupported() accepts, and such as the named variants have none of
    def tensors(**shapes):
        return {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in shapes.items()}

    def weights(C, M):
        shapes = dict(norm1_weight=C, norm1_bias=C, qk_weight=(2 * C, C), qk_bias=2 * C, v_weight=(C, C), v_bias=C)
        shapes |= dict(proj_weight=(C, C), proj_bias=C, norm2_weight=C, norm2_bias=C)
        return shapes | dict(fc1_weight=(M, C), fc1_bias=M, fc2_weight=(C, M), fc2_bias=C)

    def folded(S, C, E, prefix=""):
        shapes = dict(norm1_weight=S * C, norm1_bias=S * C, proj_weight=(E, S * C), proj_bias=E, norm2_weight=E, norm2_bias=E)
        return {prefix + name: shape for name, shape in shapes.items()}

    for channels, C, legacy, step in ((8, 128, True, 1), (1, 24, False, 4), (8, 128, False, 16)):
        others = dict(bias=None, pixel_pos=None, patch_size=(16, 16), stride=step, patch_stride=(step, step), legacy=legacy)
        yield "pixel_embed", tensors(image=(2, channels, 48, 48), weight=(C, channels, 7, 7)) | others
    for S, C, H, M in ((64, 96, 3, 384), (49, 24, 4, 96), (9, 62, 2, 248)):
        yield "inner", tensors(pixel=(100, S, C), **weights(C, M)) | dict(num_heads=H)
    for S, C, H, M in ((16, 62, 2, 248), (9, 31, 1, 124)):  # whose LayerNorm of fold is inner's
        given = tensors(pixel=(490, S, C), patch=(10, 50, 1024), **weights(1024, 4096), **folded(S, C, 1024, "fold_"))
        of_inner = {f"inner_{name}": shape for name, shape in weights(C, M).items()}
        yield "block", given | tensors(**of_inner) | dict(num_heads=1, inner_heads=H)
    for S, C, E in ((1, 1, 1), (128, 128, 1024)):
        yield "fold", tensors(pixel=(98, S, C), patch=(2, 50, E), **folded(S, C, E))
        given = tensors(pixel=(98, S, C), patch=(2, 50, E), **weights(E, 4 * E), **folded(S, C, E, "fold_"))
        yield "outer", given | dict(num_heads=1)
    yield "outer", tensors(patch=(2, 50, 16384), **weights(16384, 16)) | dict(num_heads=64)


gc.freeze()  # what is there is no garbage
results = []
for operation, given in widest():
    for launch, far in product(map(typed, recorded(operation, given)), ("i32", "i64")):
        accesses, found = prove(operation, launch, {n: far if "stride" in n else "i32" for n in integers(launch)})
        results.append((f"{operation} {launch.kernel.__name__} {launch.constants}", accesses, found))
Path("results.json").write_text(json.dumps({"toys": toys, "shipped": list(proofs()), "widest": results}))
"""


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    folder, ending = run_once(tmp_path_factory, "addresses", SCRIPT)
    assert ending["status"] == 0, ending["err"]
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("operation", kernels.OPERATIONS)
class TestShipped:
    @staticmethod
    def _check(results, operation):
        launches = [(name, accesses, found) for name, accesses, found in results if name.split()[0] == operation]
        assert launches
        assert all(accesses >= 2 for _, accesses, _ in launches)
        overflows = [f"{name}, {text}" for name, _, found in launches for text in found]
        assert not overflows, "\n".join(overflows)
        return launches

    def test_no_address_overflows(self, results, operation):
        shipped = launches(operation) + launches_of_one(operation)
        assert len(self._check(results["shipped"], operation)) == len(shipped)

    def test_none_does_at_the_widest(self, results, operation):
        self._check(results["widest"], operation)


@pytest.mark.parametrize(
    ("toy", "found"),
    [
        ("channels narrow i32", "arith.muli gives 0 to 6442450941 in 32 bits"),
        ("channels late i32", "arith.muli gives 0 to 6442450941 in 32 bits"),
        ("channels chosen i32", "arith.muli gives 0 to 6442450941 in 32 bits"),
        ("channels wide i32", None),
        ("channels narrow i64", None),
        ("channels wide i64", None),
        ("blocks narrow i32", "arith.muli gives 0 to 68719476672 in 32 bits"),
        ("blocks narrow i64", "arith.muli gives 0 to 68719476672 in 32 bits"),
        ("blocks mask i32", "arith.muli gives 0 to 68719476672 in 32 bits"),
        ("blocks wide i32", None),
        ("blocks wide i64", None),
        ("loop bounded i32", None),
        ("loop unbounded i32", "arith.muli gives 0 to 68719476672 in 32 bits"),
        ("loop endless i32", "arith.addi gives 64 to 2147483710 in 32 bits"),  # n + BLOCK - 1
        ("loop bounded i64", None),
    ],
)
def test_planted_overflows_are_found(results, toy, found):
    texts = results["toys"][toy]
    if found is None:
        assert texts == []
    else:
        assert [text.split(": ")[1] for text in texts if "script.py:" in text][:1] == [found]


@pytest.mark.parametrize(
    ("toy", "error"),
    [
        ("beyond looked up", "no rule for tt.load, of which an address is made"),
        ("beyond carried", "no rule for addresses in scf.for"),
        ("beyond atomic", "no rule for addresses in tt.atomic_rmw"),
        ("beyond branch", "it comes out of a loop or a branch|no rule for scf.if"),
    ],
)
def test_what_has_no_rule_is_an_error(results, toy, error):
    text = results["toys"][f"{toy} i32"]
    assert isinstance(text, str), text
    assert any(part in text for part in error.split("|")), text


EXACT = {
    "arith.addi": operator.add,
    "arith.subi": operator.sub,
    "arith.muli": operator.mul,
    "arith.divsi": lambda x, y: math.trunc(x / y),
    "arith.minsi": min,
    "arith.maxsi": max,
    "tt.addptr": operator.add,
}
ENCLOSED = {
    "arith.remsi": lambda x, y: int(math.fmod(x, y)),
    "arith.andi": operator.and_,
    "arith.ori": operator.or_,
    "arith.xori": operator.xor,
    "arith.cmpi": operator.lt,
}


def _random_interval(low=-12):
    return Interval(*sorted(random.randint(low, 12) for _ in range(2)))


@pytest.mark.parametrize("name", [*EXACT, *ENCLOSED])
def test_rules_hold_every_value(name):
    random.seed(0)
    operation = (EXACT | ENCLOSED)[name]
    for _ in range(500):
        a, b = (_random_interval(0 if name in ("arith.andi", "arith.ori", "arith.xori") else -12) for _ in range(2))
        divisors = [y for y in range(b.low, b.high + 1) if y or name not in ("arith.divsi", "arith.remsi")]
        values = [operation(x, y) for x in range(a.low, a.high + 1) for y in divisors]
        if not values:
            continue
        ruled = RULES[name](a, b)
        assert ruled.low <= min(values) <= max(values) <= ruled.high, (a, b)
        if name in EXACT:
            assert ruled == (min(values), max(values)), (a, b)


def test_other_rules():
    random.seed(0)
    for _ in range(500):
        a, b = _random_interval(), _random_interval()
        assert RULES["arith.select"](Interval(0, 1), a, b) == (min(a.low, b.low), max(a.high, b.high))
        unsigned = [x % 2**32 for x in range(a.low, a.high + 1)]
        extended = RULES["arith.extui"](a)
        assert extended.low <= min(unsigned) <= max(unsigned) <= extended.high
        step = Interval(*sorted(random.randint(1, 5) for _ in range(2)))
        turns = [i for x in range(a.low, a.high + 1) for s in range(step.low, step.high + 1) for i in range(x, b.high, s)]
        ruled = intervals._induction(a, b, step)
        assert all(ruled.low <= i <= ruled.high for i in turns)
    assert RULES["arith.remsi"](Interval(0, 100), Interval(1, 16)) == (0, 15)
    assert RULES["arith.remsi"](Interval(3, 7), Interval(8, 16)) == (3, 7)
    assert set(RULES) - set(EXACT) - set(ENCLOSED) == {
        "arith.select", "arith.extui", "arith.extsi", "arith.trunci",
        "tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans",
    }  # fmt: skip


IR = """
#loc = loc("folder/kernel.py":7:0)
#loc1 = loc(unknown)
module {
  tt.func public @kernel(%arg0: !tt.ptr<f32> {tt.divisibility = 16 : i32} loc("x_ptr"(#loc)), %arg1: i32 loc(unknown)) {
    %c2_i32 = arith.constant 2 : i32 loc(#loc1)
    %c9_i32 = arith.constant 9 : i32 loc(#loc1)
    scf.for %arg2 = %c2_i32 to %arg1 step %c9_i32  : i32 {
      %1 = arith.muli %arg2, %c9_i32 : i32 loc(#loc4)
      %2 = tt.addptr %arg0, %1 : !tt.ptr<f32>, i32 loc(#loc1)
      tt.store %2, %cst : !tt.ptr<f32> loc(#loc1)
    } loc(#loc3)
    %1 = OPERATION loc(#loc3)
    %2 = tt.addptr %arg0, %1 : !tt.ptr<f32>, i32 loc(#loc1)
    tt.store %2, %cst : !tt.ptr<f32> loc(#loc1)
    tt.return loc(#loc1)
  } loc(#loc)
} loc(#loc)
#loc2 = loc("folder/kernel.py":8:10)
#loc3 = loc("turn"(#loc2))
#loc4 = loc(callsite(#loc5 at #loc2))
#loc5 = loc("folder/helper.py":3:10)
"""


def test_regions_use_names_again():
    kernel = intervals.Kernel(IR.replace("OPERATION", "arith.addi %c2_i32, %c9_i32 : i32"), ["x_ptr", "n"])
    assert kernel.findings([{"n": Interval(0, 2**31 // 9)}]) == []
    (found,) = kernel.findings([{"n": Interval(0, 2**31 // 9 + 2)}])
    assert str(found) == "helper.py:3: arith.muli gives 18 to 2147483655 in 32 bits"
    found, _ = kernel.findings([{"n": Interval(0, 2**31 - 1)}])  # the loop's variable itself, one turn past its end
    assert str(found) == "kernel.py:8: scf.for gives 11 to 2147483655 in 32 bits"


@pytest.mark.parametrize(
    ("operation", "error"),
    [
        ("arith.shrui %arg1, %c2_i32 : i32", "no rule for arith.shrui"),
        ("arith.extsi %b : i1 to i32", "no rule for arith.extsi of booleans"),
        ("arith.addi %arg1, %arg2 : i32", "no rule for %arg2: it comes out of a loop"),
        ("arith.constant 2.0 : f32", "a constant that is no integer"),
    ],
)
def test_what_is_not_understood_is_an_error(operation, error):
    with pytest.raises(ValueError, match=error):
        intervals.Kernel(IR.replace("OPERATION", operation), ["x_ptr", "n"])


def _launched(monkeypatch, run):
    """(operation, launch, grid, integers by name) of what ``run`` launches."""
    seen, running = [], []

    def launch(spec, grid, *arguments):
        given = intervals.named(dict(zip(spec.kernel.arg_names, arguments, strict=False)))
        seen.append((running[-1], spec, grid, {n: x for n, x in given.items() if isinstance(x, int)}))
        kernels.operation.launch(spec, grid, *arguments)

    for module in launchers():
        monkeypatch.setattr(module, "launch", launch)
    for name, operation in kernels.OPERATIONS.items():

        def told(function, name=name):
            def called(*given, **more):
                running.append(name)
                found = function(*given, **more)
                running.pop()
                return found

            return called

        monkeypatch.setattr(operation, "_plans", {})
        for way in ("prepared", "graded"):
            find = getattr(operation, way)
            monkeypatch.setattr(operation, way, lambda *given, _find=find, _told=told: _told(_find(*given)))
    run()
    return seen


@pytest.mark.parametrize(("batch", "legacy"), [(1, True), (2, False)])
def test_launchers_pass_what_the_proof_assumes(monkeypatch, batch, legacy):
    """Their integers lie in one piece of the ranges, all together, and so does the grid."""
    model = TNT(**TINY, legacy=legacy, backend="fused").to(DEVICE)
    image = torch.randn(batch, 3, 32, 32, device=DEVICE).to(memory_format=torch.channels_last).requires_grad_()

    def run():
        model(image).sum().backward()
        with torch.no_grad():
            model(image)

    assert (intervals.ROWS, intervals.RESIDENT) == (kernels.operation.MOST_ROWS, kernels.operation.MOST_PROGRAMS)
    seen = _launched(monkeypatch, run)
    assert {spec.kernel.__name__ for _, spec, _, _ in seen} >= {"_pixel_embed_fwd_kernel", "_norm_bwd_kernel"}
    assert {operation for operation, *_ in seen} == set(kernels.OPERATIONS) - {"outer"}  # a part of block
    for operation, spec, grid, passed in seen:
        spec = Typed(spec.kernel, spec.constants, spec.config, dict.fromkeys(passed, "i32"))
        pieces = list(intervals.ranges(operation, spec, dict.fromkeys(passed, "i64")))
        passed = passed | {"num_programs": grid, "program_id": grid - 1}
        assert any(all(low <= passed[name] <= high for name, (low, high) in piece.items()) for piece in pieces), (
            spec.kernel.__name__,
            passed,
        )


def _storage(size):
    """float16 values, of which only those take memory that are touched; on a GPU all do."""
    if DEVICE == "cpu":
        return torch.frombuffer(mmap.mmap(-1, 2 * size), dtype=torch.float16)
    if torch.cuda.mem_get_info()[0] < 4 * size:
        pytest.skip(f"needs {4 * size >> 30} GiB of free GPU memory")
    return torch.empty(size, dtype=torch.float16, device=DEVICE)


def test_channels_may_lie_far_apart():
    """An image whose third channel is 2^31 values and more behind the first: the same bits as those of its copy."""
    apart = 1_100_000_000
    # so far into the storage that an address that wraps round is in it, too: a wrong result, no crash
    image = _storage(2**32 + 1024).as_strided((1, 3, 16, 16), (768, apart, 16, 1), 2**32 - 2 * apart)
    image.copy_(torch.randn(image.shape))
    weight = torch.randn(12, 3, 7, 7).to(image).requires_grad_()
    results = []
    for given in (image, image.contiguous()):
        out = kernels.OPERATIONS["pixel_embed"](given, weight, None, None, (16, 16), 4, (16, 16))
        results.append((out, *torch.autograd.grad(out.float().square().sum(), weight)))
    for far, near in zip(*results, strict=True):
        assert far.isfinite().all()
        assert torch.equal(far, near)
