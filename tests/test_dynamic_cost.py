"""What is executed for a patch, where it is known beforehand."""

import pytest

pytest.importorskip("triton")

from benchmarks import dynamic_cost, launched


@pytest.fixture(scope="module")
def launches():
    with pytest.MonkeyPatch.context() as patch:  # whole programs all the same
        patch.setattr(dynamic_cost, "IMAGE", 64)
        patch.setattr(dynamic_cost, "PATCHES", 16)
        return dynamic_cost.costs("inner", "s", "bf16", "sm_90")


@pytest.fixture
def inner(launches):
    """Without the last launch, which makes the weights' gradients of sums: it has nothing to do with patches."""
    *found, last = launches
    assert (last["function"], last["instructions"], last["bytes"]) == ("_inner_totals_kernel", 0, 0)
    return found


def test_the_pixels_are_read_once_and_written_once(inner):
    pixel = 16 * 24 * 2  # bytes
    assert [row["bytes"] for row in inner] == [2 * pixel, 6 * pixel]
    assert [row["sectors"] for row in inner] == [row["bytes"] / 32 for row in inner]  # whole ones


def test_the_products_of_a_patch_are_executed(inner):
    instructions = [row["instructions_by_kind"] for row in inner]
    S, C, heads, D = 16, 32, 2, 16  # padded: two pairs of heads
    linear = heads * (4 * C * D) + 2 * C * 4 * 24  # q, k, v, proj; fc1, fc2
    centring = 2 * C * C  # x·(C·I − 11ᵀ), and x itself
    attention = heads * 3 * 2 * S * D  # q·k, P·v, and P's sums: two heads' keys below one another
    assert instructions[0]["matrix"] == S * (linear + centring + attention) / (16 * 8 * 16)
    assert all(count["sync"] > 0 and count["special"] > 0 for count in instructions)


def test_no_access_to_shared_memory_waits_for_another_bank(inner):
    assert all(row["conflicts"] == 0 < row["wavefronts"] for row in inner)


def test_each_is_a_launch_that_is_shipped(launches):
    shipped = [
        (launch.kernel.__name__, launch.constants)
        for variant, dtype, launch in launched.launches("inner")
        if (variant, dtype) == ("s", "bf16")
    ]
    assert [row["function"] for row in launches] == [name for name, _ in shipped]
    assert [row["constants"] for row in launches] == [constants for _, constants in shipped]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "matrix"), ("ex2.approx.ftz.f32", "special"),
        ("shfl.sync.bfly.b32", "shuffle"), ("ld.shared.v4.b32", "shared"),
        ("ldmatrix.sync.aligned.m8n8.x4.shared.b16", "shared"),
        ("cp.async.cg.shared.global", "global"), ("st.global.v4.b32", "global"), ("bar.sync", "sync"),
        ("cp.async.wait_group", "sync"), ("cvt.rn.bf16x2.f32", "convert"), ("fma.rn.f32x2", "float"), ("mul.f16x2", "float"),
        ("mov.b32", "move"), ("add.s32", "other"), ("ld.param.b64", "other"), ("setp.lt.s32", "other"), ("bra.uni", "other"),
    ],
)  # fmt: skip
def test_kinds(text, kind):
    assert dynamic_cost.kind(tuple(text.split("."))) == kind


def test_accesses_are_listed_by_line(capsys):
    assert dynamic_cost.main(["--kernel", "pixel_embed", "--variant", "ti"]) == 0
    text = capsys.readouterr().out
    assert "_pixel_embed_image_bwd_kernel: accesses that could be cheaper" in text
    head = next(line for line in text.splitlines() if line.split()[:2] == ["line", "access"])
    assert head.split()[2:] == ["instructions", "warps", "turns", "least", "sectors", "filled"]
    rows = [line.split() for line in text.splitlines() if ".global." in line]
    assert rows
    assert all(int(sectors) > int(filled) for *_, sectors, filled in rows)
    with pytest.raises(SystemExit):
        dynamic_cost.main(["--variant", "xl"])
    assert "invalid choice: 'xl'" in capsys.readouterr().err
