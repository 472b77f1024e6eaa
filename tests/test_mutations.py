"""Whether the machine would notice a broken kernel that Triton's interpreter cannot see. ``mutations`` breaks many more."""

import json
import random

import pytest
import torch

pytest.importorskip("triton")

import mutants
import mutations
from mutants import IN_HALF, PTX_KINDS, apply, draw_ptx, told
from mutations import Judge, Launches, judge_ptx
from ptx.flow import depends_on_data, normal
from ptx.machine import Fault, Kernel

wide = pytest.mark.wide
KINDS = {kind.name: kind for kind in (*PTX_KINDS, IN_HALF)}


@pytest.fixture(scope="module")
def judge():
    cases = (
        "inner Ti, bfloat16",
        "inner Ti, one by one, bfloat16",
        "fold stem, large mean, bfloat16",
        "fold stem, bfloat16",
        "fold stem, float32",
        "fold legacy, bfloat16",
        "embed S, bfloat16",
    )
    return Judge("sm_90", set(cases))


def break_(judge: Judge, name: str, kind: str, operation: str, seed: int, precision: str = "bfloat16"):
    """A mutant of the middle one of a kernel's instructions that begin with ``operation``."""
    digest = next(
        d for d, k in judge.kernels.items() if k.name == name and judge.cases[judge.users[d][0]].precision == precision
    )
    p = judge.program(digest)
    places = [i for i, ins in enumerate(p.instructions) if KINDS[kind].fits(ins) and ".".join(ins.parts).startswith(operation)]
    at = places[len(places) // 2]
    changes = KINDS[kind].change(p, at, random.Random(seed))
    return mutants.Mutant(0, kind, name, p.instructions[at].where, told(p, changes), digest, apply(p, changes))


@pytest.mark.parametrize(
    ("name", "kind", "operation"),
    [
        ("_inner_fwd_kernel", "barrier dropped", "bar.sync"),
        ("_inner_fwd_kernel", "operands swapped", "mma.sync"),
        pytest.param("_inner_fwd_kernel", "stage shifted", "ldmatrix", marks=wide),
        ("_inner_bwd_kernel", "barrier dropped", "bar.sync"),
        pytest.param("_inner_bwd_kernel", "store skipped", "st.shared", marks=wide),
        pytest.param("_inner_bwd_kernel", "operands swapped", "mma.sync", marks=wide),
        pytest.param("_norm_kernel", "constant changed", "shfl", marks=wide),
        ("_norm_kernel", "operands swapped", "cvt.rn.bf16x2"),
        ("_norm_add_kernel", "mask weakened", "ld.global"),
        pytest.param("_norm_add_kernel", "store skipped", "st.global", marks=wide),
        ("_norm_bwd_kernel", "wait weakened", "cp.async.wait_group"),
        pytest.param("_norm_bwd_kernel", "stage shifted", "st.shared", marks=wide),
        ("_pixel_embed_fwd_kernel", "barrier dropped", "bar.sync"),
        pytest.param("_pixel_embed_fwd_kernel", "mask weakened", "ld.global", marks=wide),
        ("_pixel_embed_weight_bwd_kernel", "stage shifted", "ldmatrix"),
        ("_pixel_embed_image_bwd_kernel", "barrier dropped", "bar.sync"),
    ],
)
def test_what_the_interpreter_cannot_see_is_noticed(name, kind, operation, judge):
    mutant = break_(judge, name, kind, operation, seed=2)
    verdict, why = judge_ptx(judge, mutant)
    assert verdict == "noticed", f"{mutant.where}: {mutant.text}: {verdict} {why}"


def test_rounding_at_a_wrong_place_is_noticed_in_float32(judge):
    mutant = break_(judge, "_norm_kernel", "rounding changed", "fma", seed=0, precision="float32")
    assert judge_ptx(judge, mutant)[0] == "noticed", mutant.text


def test_the_unchanged_kernels_are_right_and_the_same(judge):
    everything = list(range(len(judge.cases)))
    assert judge.verdict(everything, Launches("sm_90")) is None
    assert judge.changes_nothing(everything, Launches("sm_90"))
    for digest, kernel in judge.kernels.items():
        assert normal(kernel) == normal(Kernel(kernel.code, kernel.shared, kernel.name)), digest


@pytest.mark.parametrize("kind", PTX_KINDS, ids=lambda kind: kind.name)
def test_a_kind_changes_the_program_and_the_seed_says_how(kind, judge):
    if kind.name == "address narrowed":
        with pytest.raises(LookupError, match=rf"no mutant in \d+ draws of {kind.name}"):
            draw_ptx(judge, 0, 0, [kind])  # no case here has far addresses
        return
    first, again, other = (draw_ptx(judge, 0, index, [kind]) for index in (0, 0, 1))
    texts = [[[ins.text for ins in block] for block in m.code.code.blocks] for m in (first, again, other)]
    original = [[ins.text for ins in block] for block in judge.kernels[first.digest].code.blocks]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0] != original
    assert first[:6] == again[:6] != other[:6]
    assert "  ->  " in first.text


PTX = """
.version 8.7
.target sm_90a
.address_size 64
.visible .entry kernel(
    .param .u64 .ptr .global .align 1 out,
    .param .u32 n
)
.reqntid 32
{
    .reg .pred %p<9>;
    .reg .b32 %r<99>;
    .reg .b64 %rd<9>;
    ld.param.b64 %rd1, [out];
    ld.param.b32 %r1, [n];
    mov.u32 %r2, %tid.x;
    mul.wide.u32 %rd2, %r2, 4;
    add.s64 %rd3, %rd1, %rd2;
    setp.lt.u32 %p1, %r2, 32;
    setp.lt.u32 %p2, %r2, %r1;
    add.s32 %r3, %r1, %r2;
    @%p2 st.global.b32 [ %rd3 + 0 ], %r3;
    ret;
}
"""


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("add.s32 %r3, %r1, %r2;", "add.s32 %r3, %r2, %r1;", True),
        ("add.s32 %r3, %r1, %r2;", "sub.s32 %r3, %r1, %r2;", False),
        ("setp.lt.u32 %p1, %r2, 32;", "setp.le.u32 %p1, %r2, 32;", True),  # nobody reads it
        ("setp.lt.u32 %p2, %r2, %r1;", "setp.le.u32 %p2, %r2, %r1;", False),
        ("@%p2 st", "@%p1 st", False),
        ("@%p2 st", "st", False),
        ("mul.wide.u32 %rd2, %r2, 4;", "shl.b32 %r4, %r2, 2; cvt.u64.u32 %rd2, %r4;", True),
        ("mul.wide.u32 %rd2, %r2, 4;", "mul.wide.u32 %rd2, %r2, 8;", False),
        ("@%p2 st.global.b32 [ %rd3 + 0 ], %r3;", "", False),
        ("[ %rd3 + 0 ]", "[ %rd3 + 4 ]", False),
    ],
)
def test_programs_that_do_the_same_have_one_normal_form(old, new, same):
    assert old in PTX
    assert (normal(Kernel(PTX, 0)) == normal(Kernel(PTX.replace(old, new), 0))) == same


COPY = """
    shl.b32 %r4, %r2, 2;
    cp.async.ca.shared.global [ %r4 + 0 ], [ %rd3 + 0 ], 4;
    cp.async.commit_group;
    cp.async.wait_group 0;
    ld.shared.b32 %r5, [ %r4 + 0 ];
    add.s32 %r3, %r5, 1;
"""


@pytest.mark.parametrize("operation", ["cp.async.commit_group", "cp.async.wait_group"])
def test_a_weakened_wait_is_a_fault(operation):
    """Of a kernel that copies ahead, of which none is shipped now."""
    p, x = mutants.Program(Kernel(PTX.replace("add.s32 %r3, %r1, %r2;", COPY), 128)), torch.arange(32, dtype=torch.int32)
    p.kernel.run(1, [x, 32])
    assert torch.equal(x, torch.arange(1, 33, dtype=torch.int32))
    at = next(i for i, ins in enumerate(p.instructions) if ".".join(ins.parts) == operation)
    kind, texts = KINDS["wait weakened"], set()
    assert kind.fits(p.instructions[at])
    for seed in range(20):
        changes = kind.change(p, at, random.Random(seed))
        texts.add(told(p, changes))
        with pytest.raises(Fault, match="has not delivered"):
            apply(p, changes).run(1, [x, 32])
    assert len(texts) > 1


def test_a_known_predicate_is_no_predicate():
    always = PTX.replace("@%p2 st", "@%p1 st")
    assert normal(Kernel(always, 0)) == normal(Kernel(always.replace("@%p1 st", "st"), 0))


def test_what_depends_on_data_is_found():
    assert depends_on_data(Kernel(PTX, 64)) is None
    loaded = PTX.replace("add.s32 %r3", "ld.global.b32 %r5, [ %rd3 + 0 ]; ld.shared.b32 %r6, [ %r5 + 0 ]; add.s32 %r3")
    assert depends_on_data(Kernel(loaded, 64)).text == "ld.shared.b32 %r6, [ %r5 + 0 ]"


@pytest.mark.parametrize(
    ("name", "text", "old", "new"),
    [
        ("_inner_fwd_kernel", "fma.rn.f16x2 t@", "q@", "c1@"),  # GELU's polynomial in one pair
        ("_norm_kernel", "fma.rn.f32", "0f3D2AAAAB", "0f3DAAAAAB"),  # the variance of one row
    ],
)
def test_one_value_of_a_tile_is_noticed(name, text, old, new, judge):
    halves = [d for d, k in judge.kernels.items() if k.name == name and judge.cases[judge.users[d][0]].precision == "bfloat16"]
    places = [(d, i, x) for d in halves for i, x in enumerate(judge.program(d).instructions)]
    digest, at, ins = next((d, i, x) for d, i, x in places if x.text.startswith(text) and old in x.text)
    p, operands = judge.program(digest), [x if i == 0 else x.replace(old, new) for i, x in enumerate(ins.operands)]
    changes = {at: [mutants.changed(ins, operands=operands)]}
    mutant = mutants.Mutant(0, "", name, ins.where, told(p, changes), digest, apply(p, changes))
    assert judge_ptx(judge, mutant)[0] == "noticed", mutant.text


@pytest.mark.parametrize(
    ("made", "old", "new", "same"),
    [
        ("shr.s32 %r3, %r1, 31;", "31", "32", True),  # sign bits, either way
        ("shr.s32 %r3, %r1, 31;", "31", "30", False),
        ("ld.global.b32 %r7, [ %rd3 + 0 ]; shr.u32 %r3, %r7, 31;", "31", "32", False),
        ("rem.s32 %r4, %r2, %r1; shr.s32 %r5, %r4, 31; shr.u32 %r6, %r5, 30; add.s32 %r3, %r4, %r6;", "30", "29", True),
        ("sub.s32 %r4, %r2, %r1; shr.s32 %r5, %r4, 31; shr.u32 %r6, %r5, 30; add.s32 %r3, %r4, %r6;", "30", "29", False),
        ("rem.s32 %r4, %r2, %r1; setp.lt.s32 %p3, %r4, 32; selp.b32 %r3, %r4, %r1, %p3;", "setp.lt", "setp.le", True),
        ("rem.s32 %r4, %r2, %r1; setp.lt.s32 %p3, %r4, 31; selp.b32 %r3, %r4, %r1, %p3;", "setp.lt", "setp.le", False),
    ],
)
def test_what_sizes_never_change_is_the_same(made, old, new, same):
    texts = [PTX.replace("add.s32 %r3, %r1, %r2;", x) for x in (made, made.replace(old, new))]
    assert texts[0] != texts[1]
    assert (normal(Kernel(texts[0], 0)) == normal(Kernel(texts[1], 0))) == same


@pytest.mark.parametrize(("stored", "same"), [("%r2", True), ("%r5", False)])
def test_what_a_mask_leaves_out_reaches_the_result_or_not(stored, same):
    code = f"mov.b32 %r5, 7; @%p2 ld.global.b32 %r5, [ %rd3 + 0 ]; add.s32 %r3, %r1, {stored};"
    p = mutants.Program(Kernel(PTX.replace("add.s32 %r3, %r1, %r2;", code).replace("@%p2 st", "st"), 0))
    at = next(i for i, ins in enumerate(p.instructions) if ins.text.startswith("setp.lt.u32 %p2"))
    original, *others = mutants._beyond_masks(p, {at: [mutants.changed(p.instructions[at], ("setp", "le", "u32"))]})
    unchanged, x = torch.zeros(32, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    p.kernel.run(1, [unchanged, 20])
    with pytest.raises(Fault):
        original.run(1, [x.clone(), 20])
    assert len(others) == 3
    for other in others:
        found = x.clone()
        other.run(1, [found, 20])
        assert torch.equal(found, unchanged) == same


DIVISION = """
    cvt.s64.s32 %rd4, %r1;
    cvt.u64.u32 %rd5, %r2;
    or.b64 %rd6, %rd4, %rd5;
    and.b64 %rd6, %rd6, -4294967296;
    setp.ne.b64 %p3, %rd6, 0;
    @%p3 bra $WIDE;
    bra.uni $NARROW;
$WIDE:
    div.s64 %rd7, %rd5, %rd4;
    bra.uni $END;
$NARROW:
    div.u32 %r4, %r2, %r1;
    cvt.u64.u32 %rd7, %r4;
$END:
    cvt.u32.u64 %r3, %rd7;
"""


def test_a_division_that_is_never_run_is_one_in_64_bits():
    code = DIVISION.replace("and.b64 %rd6, %rd6", "and.b64 %rd8, %rd6").replace("%p3, %rd6", "%p3, %rd8")
    p = mutants.Program(Kernel(PTX.replace("add.s32 %r3, %r1, %r2;", code), 0))
    reasons = {}
    for at, ins in enumerate(p.instructions):
        if ins.parts[0] == "div":
            swapped = mutants.changed(ins, operands=(ins.operands[0], *reversed(ins.operands[1:])))
            reasons[ins.type] = mutants.why_the_same(p, {at: [swapped]})
    assert reasons["s64"].startswith("never run")
    assert reasons["u32"] is None


ZERO = """
    mov.b32 %r10, 0;
    ld.global.f32 %r11, [ %rd3 + 0 ];
    mul.f32 %r12, %r11, 0f00000000;
    cvt.rn.bf16x2.f32 %r13, %r12, %r12;
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r20, %r21, %r22, %r23 }, { %r13, %r13, %r10, %r10 }, { %r11, %r2 },
        { %r11, %r11, %r11, %r11 };
    @%p2 st.global.b32 [ %rd3 + 0 ], %r20;
"""


def test_what_zeros_multiply_does_not_matter():
    text = PTX.replace("    @%p2 st.global.b32 [ %rd3 + 0 ], %r3;", ZERO)
    assert normal(Kernel(text, 0)) == normal(Kernel(text.replace("{ %r11, %r2 }", "{ %r2, %r11 }"), 0))
    for old, new in (("{ %r13, %r13, %r10", "{ %r13, %r11, %r10"), ("0f00000000", "0f3F800000")):
        other = text.replace(old, new)
        assert normal(Kernel(other, 0)) != normal(Kernel(other.replace("{ %r11, %r2 }", "{ %r2, %r11 }"), 0))


PADDING = """
    ld.global.f32 %r11, [ %rd3 + 0 ];
    mul.f32 %r12, %r11, 0f00000000;
    fma.rn.f32 %r13, %r11, %r12, %r12;
    @%p2 st.global.b32 [ %rd3 + 0 ], %r13;
"""


@pytest.mark.parametrize(("old", "new", "same"), [("", "", True), ("%r11, %r12, %r12;", "%r11, %r11, %r12;", False)])
def test_what_is_written_as_before_with_any_values(old, new, same):
    text = PADDING.replace(old, new) if old else PADDING
    p = mutants.Program(Kernel(PTX.replace("    @%p2 st.global.b32 [ %rd3 + 0 ], %r3;", text), 0))
    at = next(i for i, ins in enumerate(p.instructions) if ins.parts[0] == "fma")
    kind = KINDS["rounding changed"]
    probe = mutants._probe(p, kind.change(p, at, random.Random(1)), kind)
    executor, x = Launches("sm_90"), torch.ones(32)
    if same:
        executor._vary(probe, 1, [x, 32], [x])
        assert executor.finite == mutations.VARIED
        assert torch.equal(x, torch.ones(32))
    else:
        with pytest.raises(Fault):
            executor._vary(probe, 1, [x, 32], [x])
    mask = next(i for i, ins in enumerate(p.instructions) if ins.text.startswith("setp.lt.u32 %p2"))
    assert mutants._probe(p, KINDS["mask weakened"].change(p, mask, random.Random(1)), KINDS["mask weakened"]) is None


@pytest.mark.parametrize(
    ("cast", "bits", "verdict"), [("int32", True, "equivalent"), ("int32", False, "missed"), ("f", True, "missed")]
)
def test_an_integer_that_fits_either_way_is_the_same(cast, bits, verdict, judge, monkeypatch):
    edits = [e for e in mutants.Source("pixel_embed.py").edits if e.kind == "cast dropped"]
    text = (mutants.TREE / "kernels" / "pixel_embed.py").read_bytes()
    edit = next(e for e in edits if text[e.start : e.end].endswith(b".to(tl.int32)") == (cast == "int32"))
    monkeypatch.setattr(mutations, "_run", lambda *_: mutations.Run(None, same_code=False, same_bits=bits))
    monkeypatch.setattr(mutations, "_tests", lambda *_: None)  # among them the intervals
    mutant = mutants.Mutant(0, "source: cast dropped", edit.function, "", "", None, edit)
    assert mutations.judge_source(judge, mutant)[0] == verdict


def test_an_equivalent_has_its_reason(judge):
    mutant = break_(judge, "_inner_fwd_kernel", "operands swapped", "mma.sync", seed=0)
    unchanged = mutant._replace(code=judge.kernels[mutant.digest])
    assert judge_ptx(judge, unchanged) == ("equivalent", "the same values are stored by the same instructions")


def test_mutants_of_the_source(tmp_path):
    kinds = {edit.kind for name in mutants.READ for edit in mutants.Source(name).edits}
    assert len(kinds) == 14
    mutant = mutants.draw_source(0, 1)
    assert mutant == mutants.draw_source(0, 1) != mutants.draw_source(0, 2)
    tree = mutants.mutated_tree(mutant.code, tmp_path)
    was, now = ((root / "kernels" / mutant.code.file).read_bytes() for root in (mutants.TREE, tree))
    assert was != now
    assert was[: mutant.code.start] == now[: mutant.code.start]
    assert now.endswith(was[mutant.code.end :])
    compile(now, mutant.code.file, "exec")


def test_a_broken_source_is_noticed(judge):
    edit = next(
        e for e in mutants.Source("norm.py").edits if e.function == "_norm_bwd_kernel" and e.kind == "accumulation dropped"
    )
    mutant = mutants.Mutant(0, f"source: {edit.kind}", edit.function, f"norm.py:{edit.line}", "", None, edit)
    verdict, why = mutations.judge_source(judge, mutant)
    assert verdict == "noticed"
    assert "rule in fold" in why


@wide
def test_a_broken_source_is_noticed_by_other_tests():
    """GELU's polynomial, by a judge whose case does not reach it."""
    edit = next(e for e in mutants.Source("tile.py").edits if e.function == "gelu" and e.kind == "operands swapped")
    mutant = mutants.Mutant(0, f"source: {edit.kind}", edit.function, "", "", None, edit)
    why = "tests in tests/test_approximations.py::test_the_polynomial_of_gelu_is_within_its_stated_error"
    assert mutations.judge_source(Judge("sm_90", {"inner wide, bfloat16"}), mutant) == ("noticed", why)


@wide
def test_what_lies_beyond_a_mask_may_reach_nothing(monkeypatch):
    """The scale of a patch that is not there, of which the gradient is 0."""
    edits = mutants.Source("tile.py").edits
    edit = next(e for e in edits if e.function == "scaled" and e.kind == "other changed")
    mutant = mutants.Mutant(0, f"source: {edit.kind}", edit.function, "", "", None, edit)
    monkeypatch.setattr(mutations, "_tests", lambda *_: None)
    verdict, why = mutations.judge_source(Judge("sm_90", {"inner S9, drop path, bfloat16"}), mutant)
    assert (verdict, why.split(":")[0]) == ("equivalent", "what lies beyond the mask reaches no result")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--count", "0"], "'0' is no positive integer"),
        (["--processes", "x"], "'x' is no positive integer"),
        (["--targets", "sm_90,sm_70"], "sm_70: unknown; accepted: sm_80, "),
        (["--json", "nowhere/mutations.json"], "no folder nowhere"),
    ],
)
def test_bad_arguments_are_named(arguments, error, capsys):
    with pytest.raises(SystemExit):
        mutations.main(arguments)
    assert error in capsys.readouterr().err


def _row(index, verdict):
    return dict(index=index, target="sm_90", kind="store skipped", kernel="k", where="k.py:1", text="a  ->  nothing",
                verdict=verdict, why=f"fault in {index}", cases=[])  # fmt: skip


@pytest.mark.parametrize(
    ("verdicts", "status"), [(("noticed",) * 19 + ("missed",), 0), (("noticed", "missed"), 1), (("noticed", "error"), 1)]
)
def test_it_fails_where_too_few_are_noticed(verdicts, status, monkeypatch):
    monkeypatch.setattr(mutations, "run", lambda *_: [_row(i, v) for i, v in enumerate(verdicts)])
    assert mutations.main(["--count", "9"]) == status


def test_a_mutant_counts_once(monkeypatch):
    """Drawn again, another one is drawn for it."""

    class Pool:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def imap(self, _, work):
            return [_row(i, "noticed") | {"text": str(i // 2)} for _, _, i in work]

    monkeypatch.setattr(mutations.multiprocessing, "get_context", lambda _: type("Context", (), {"Pool": Pool}))
    assert [row["index"] for row in mutations.run(0, 5, ["sm_90"], 1)] == [0, 2, 4, 6, 8]


def test_the_report(tmp_path, monkeypatch, capsys):
    """Stopped by Ctrl-C, it says what was found until then."""

    def stopped(*_):
        yield from (_row(i, v) for i, v in enumerate(("noticed", "noticed", "missed", "equivalent")))
        raise KeyboardInterrupt

    monkeypatch.setattr(mutations, "run", stopped)
    file = tmp_path / "found.json"
    assert mutations.main(["--count", "9", "--json", str(file)]) == 130
    found = json.loads(file.read_text())
    assert (found["count"], found["asked"], found["noticed"], found["equivalent"], found["missed"]) == (4, 9, 2, 1, 1)
    assert found["share_noticed"] == 0.6667
    assert found["noticed_by"] == {"fault": 2}
    assert [row["index"] for row in found["missed_mutants"]] == [2]
    assert found["equivalent_mutants"][0]["why"] == "fault in 3"
    assert "66.7%" in capsys.readouterr().out
