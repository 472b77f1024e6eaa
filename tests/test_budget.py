"""The budget of whole models: what is launched by the graphs themselves, rates by hand, sums, and what gets no time."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

import torch
from torch import nn

from benchmarks import budget, graphs, simulate, stack
from benchmarks.graphs import Call
from benchmarks.launched import Launched
from tnt_fast.kernels import attention
from tnt_fast.kernels.operation import Config, Launch

H200 = simulate.gpu("h200")
RESULTS = Path(budget.__file__).parent / "results"
ATTENTION = "_attention_fwd_kernel" if attention.STAYS else "_scaled_dot_product_cudnn_attention"


def call(name, *shapes, moved=0, by="pytorch", made=()):
    return Call(name, "", by, shapes, "bfloat16", moved, made)


def eager(name, depth, gpu=H200, batch=256):
    """The calls of an eager forward in bfloat16, and the names of our operations."""
    prepare = graphs._prepared(name, "inference", batch, depth)

    def run():
        function, given = prepare()
        return function(*given)

    return graphs.eager(gpu, run)


def names(calls):
    return [call.name for call in calls if call.by != "host"]


@pytest.fixture(scope="module")
def blocks():
    """What two blocks of TNT-S launch in a forward beyond one."""
    one, two = (eager("tnt_s", depth) for depth in (1, 2))
    return names(one), names(two)


def test_a_block_of_tnt_s_launches_what_its_operations_do(blocks):
    one, two = map(Counter, blocks)
    folded = ["mm", "_norm_add_kernel"]
    attended = ["linear", ATTENTION, "_sum_product_kernel"]
    mlp = ["_gelu_product_kernel", "addmm_"]
    assert two - one == Counter(["_inner_fwd_kernel", *folded, *attended, *mlp])
    assert not one - two


@pytest.mark.parametrize("name", ["tnt_s", "tnt_ti"])
def test_a_block_of_one_image_launches_seven_times(name):
    one, two = (Counter(names(eager(name, depth, batch=1))) for depth in (1, 2))
    ours = ["_inner_fwd_kernel", ATTENTION] + ["_product_kernel"] * 3  # of fold, of q, k and v, of fc1
    assert two - one == Counter([*ours, "addmm_", "addmm_"])
    assert not one - two


def test_launches_of_a_block_of_tnt_s_in_a_training_step():
    """Under autocast, forward and backward: of a third block."""

    def step(depth):
        prepare = graphs._prepared("tnt_s", "train", 256, depth)

        def run():
            function, given = prepare()
            (model,) = [x for cell in function.__closure__ if isinstance(x := cell.cell_contents, nn.Module)]
            graphs.gradients(function(*given), list(model.parameters()))

        return Counter(names(graphs.eager(H200, run)))

    found = step(3) - step(2)
    assert found["_attention_bwd_kernel"] == attention.STAYS, found
    assert found.total() <= (25 if attention.STAYS else 26), found
    assert found["_inner_totals_kernel"] == found["_norms_bwd_kernel"] == 1, found
    assert found["_gelu_product_kernel"] == found["_gelu_product_bwd_kernel"] == 1, found
    assert found["_norm_product_kernel"] == found["_sum_product_kernel"] == 1, found
    casts = {name: found[name] for name in ("_foreach_copy_", "_to_copy", "copy_", "to") if name in found}
    assert not casts  # of weights: on inner's way


def test_what_is_compiled_is_inductors_plan(blocks):
    calls = graphs.compiled(H200, graphs._prepared("tnt_s", "inference", 256, 1))
    ours = [c.name for c in calls if c.by == "ours"]
    assert ours == [name for name in blocks[0] if name.endswith("_kernel")]
    assert {c.name for c in calls if c.by == "inductor"}  # the last LayerNorm and what becomes of the class token
    assert [c.name for c in calls if c.by == "host"] == ["pixel_embed", "fold", "block"]


def test_gradients_are_those_of_pytorch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 1))
    x = torch.randn(3, 4, requires_grad=True)
    out = (model(x) + x.sum(1, keepdim=True)).square().sum()
    wanted = [x, *model.parameters()]
    for found, exact in zip(graphs.gradients(out, wanted), torch.autograd.grad(out, wanted), strict=True):
        assert torch.equal(found, exact)


def test_what_autograd_keeps_is_counted():
    with graphs.on(H200):
        model = nn.Sequential(nn.Linear(64, 32, device="cuda"), nn.GELU(), nn.Linear(32, 8, device="cuda"))
        x = torch.empty(100, 64, device="cuda")
        found = graphs.saved_bytes(lambda: model(x), list(model.parameters()))
    assert found == 100 * 4 * (64 + 32 + 32)  # the image, GELU's input and its result


def test_a_launch_is_a_row_and_an_expanded_tensor_has_its_bytes_once():
    def run():
        x = torch.empty(8, 16, device="cuda", dtype=torch.bfloat16)
        (x.expand(4, 8, 16) + x).reshape(4, -1).view(-1)

    (one,) = graphs.eager(H200, run)
    assert (one.name, one.shapes, one.bytes) == ("add", ((4, 8, 16), (8, 16)), 2 * (128 + 128 + 512))


def test_what_is_changed_in_place_is_read_and_written():
    def run():
        x, y = (torch.empty(8, 16, device="cuda") for _ in range(2))
        x.add_(y)
        x.view(-1).contiguous()

    (one,) = graphs.eager(H200, run)
    assert (one.name, one.bytes) == ("add_", 4 * 128 * 3)


def test_other_gpus_take_flash_attention():
    assert "_scaled_dot_product_flash_attention" in names(eager("tnt_s", 1, simulate.gpu("a100")))


@pytest.mark.parametrize(
    ("one", "us"),
    [
        (call("mm", (50432, 384), (384, 1152)), 5.2 + 2 * 50432 * 384 * 1152 / 640e6),
        (call("linear", (256, 197, 640), (1920, 640)), 5.2 + 2 * 50432 * 640 * 1920 / 700e6),
        (call("addmm_", (50432, 384), (50432, 1536), (1536, 384)), 5.2 + 2 * 50432 * 1536 * 384 / 680e6),
        (call("_addmm_activation", (1536,), (50432, 384), (384, 1536)), 5.2 + 2 * 50432 * 384 * 1536 / 462e6),
        (call("mm", (384, 50176), (50176, 384)), 5.2 + 2 * 50176 * 384**2 / 790e6),  # 9 tiles, each in 98 parts
        (call("mm", (256, 384), (384, 256)), 2.8 + 2 * 256 * 384 * 256 / (640e6 * 4 / 132)),  # four tiles for 132
        (call("mm", (128, 384), (384, 8)), 3.8),
        (call("mm", (50432, 24), (24, 48), moved=10**9), 5.2 + 1e9 / 4216e3),  # memory binds
        (call("_scaled_dot_product_cudnn_attention", *[(256, 6, 197, 64)] * 3), 4 * 256 * 6 * 197**2 * 64 / 170e6),
        (call("gelu_view", moved=310_000_000, by="inductor"), 310e6 / 4216e3 / 0.68),
        (call("clone", moved=310_000_000), 310e6 / 4216e3),
        (call("cat", moved=1000), 2.4),
        (call("sum", moved=1000), 9.1),
        (
            call("convolution", (256, 3, 224, 224), (384, 3, 16, 16), made=(256, 384, 14, 14)),
            5.2 + 2 * 50176 * 384 * 768 / 17.8e6,
        ),
    ],
)
def test_rates_by_hand(one, us):
    found = budget.looked_up(one, H200)
    assert found.us == pytest.approx(us, rel=1e-6)
    assert found.kind == "looked up"
    assert "results/2026-11-26" in found.source
    assert found.low < found.us < found.high


def test_rates_of_libraries_on_other_gpus_are_assumed():
    one = call("mm", (50432, 384), (384, 1152))
    a100 = budget.looked_up(one, simulate.gpu("a100"))
    assert a100.kind == "assumed"
    assert a100.us - 5.2 == pytest.approx((budget.looked_up(one, H200).us - 5.2) * 989 / 312, rel=0.01)


def listed(*calls):
    return [[*budget._fields(one), count, time] for one, count, time in calls]


def tiny(monkeypatch, **others):
    """A model of a few calls in the place of what is planned."""
    ours = Call("_inner_fwd_kernel", "inner", "ours", ((50176, 16, 24),), "bfloat16", 77_000_000)
    calls = listed(
        (ours, 12, ["simulated", "simulate.py", 90.0, 81.0, 126.0]),
        (call("mm", (50176, 384), (384, 384)), 13, None),
        (call("clone", moved=42_160_000, by="inductor"), 2, None),
    )
    found = {"calls": calls, "operations": {"inner": 12}, "launches_per_block": 2.0, **others}
    monkeypatch.setattr(budget, "plan", lambda *_: found)


@pytest.mark.parametrize("mode", budget.MODES)
def test_the_rows_add_up_to_the_ms(monkeypatch, mode):
    tiny(monkeypatch, saved_mb_per_image=1.0)
    found = budget.composed("tnt_s", mode, 256, H200)
    assert found["ms"] == pytest.approx(sum(row["launches"] * row["us"] for row in found["rows"]) / 1e3, abs=1e-3)
    assert found["low"] < found["ms"] < found["high"]
    assert found["img_per_s"] == pytest.approx(found["batch"] / found["ms"] * 1e3, rel=1e-3)
    assert {row["kind"] for row in found["rows"]} == {"simulated", "looked up", "assumed"}
    assert all(row["source"] for row in found["rows"])
    between = next(row for row in found["rows"] if row["name"] == "between launches")
    assert between["launches"] == found["launches"] == 27


def test_a_host_that_is_slower_than_the_gpu_is_a_row(monkeypatch):
    tiny(monkeypatch, operations={"inner_backward": 12}, saved_mb_per_image=1.0)
    found = budget.composed("tnt_s", "train", 256, H200)
    rows = {row["name"]: row for row in found["rows"]}
    gpu = sum(row["launches"] * row["us"] for name, row in rows.items() if name != "host, beyond the GPU")
    assert rows["host, beyond the GPU"]["us"] == pytest.approx(
        12 * budget.HOST["inner_backward"] + 13 * budget.HOST["pytorch"] + 2 * budget.HOST["inductor"] - gpu, abs=0.1
    )
    assert found["gpu_ms"] == pytest.approx(gpu / 1e3, abs=1e-3)
    for graph in ("latency_graph", "train_graph"):
        replayed = budget.composed("tnt_s", graph, 256, H200)
        assert not [row for row in replayed["rows"] if row["name"].startswith(("host", "start"))]
        assert replayed["gpu_ms"] == replayed["ms"]
    copied = 2 * 4 * 256 * 3 * 224**2 / H200.dram / 1e6  # ms
    started = rows["start of the call"]["us"] / 1e3
    assert replayed["ms"] == pytest.approx(found["gpu_ms"] - started + copied, abs=2e-3)


# ---- measured ----


@pytest.fixture
def result(tmp_path):
    """Writes a result file of a GPU run."""

    def write(device="NVIDIA H200", commit="a6e6710", torch_version=None, **us):
        about = {
            "inner/s/forward/bf16/256/fused": {},
            "library/fold/s/forward/bf16/256/linear": dict(m=50176, n=384, k=384, after="", provider="linear", dtype="bf16"),
            "tnt_s/inference/bf16/256/fused-compiled": {},
        }
        rows = [
            {"extra_info": {"id": id, **about[id]}, "stats": {"median": us.get(id.split("/")[0], 50.0) / 1e6}} for id in about
        ]
        machine = {"device": device, "commit": commit, "versions": {"torch": torch_version or budget.version("torch")}}
        path = tmp_path / "benchmarks.json"
        path.write_text(json.dumps({"machine_info": machine, "benchmarks": rows}))
        return path

    return write


def test_a_measured_row_says_how_wrong_the_budget_had_been(monkeypatch, result, capsys):
    tiny(monkeypatch)
    monkeypatch.setattr(budget, "changed", lambda sources: set())
    monkeypatch.setattr(budget, "sources_at", lambda *_: {})
    path = result(inner=105.0, library=31.0, tnt_s=2000.0)
    assert budget.main(["--only", "tnt_s/inference", "--measured", str(path), "--json", str(path.parent / "b.json")]) == 0
    found = json.loads((path.parent / "b.json").read_text())["tnt_s"]["inference"]
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["_inner_fwd_kernel"]["us"] == rows["_inner_fwd_kernel"]["low"] == 105.0
    assert rows["_inner_fwd_kernel"]["was"] == {"kind": "simulated", "us": 90.0, "error_percent": -14.3}
    assert rows["mm"]["kind"] == "measured"
    assert rows["clone"]["kind"] == "looked up"
    assert found["measured_ms"] == 2.0
    assert "-14.3%" in capsys.readouterr().out


def test_a_kernel_that_has_changed_since_keeps_its_row(monkeypatch, result, capsys):
    tiny(monkeypatch)
    monkeypatch.setattr(budget, "changed", lambda sources: {"_inner_fwd_kernel"})
    monkeypatch.setattr(budget, "sources_at", lambda *_: {})
    path = result()
    assert budget.main(["--only", "tnt_s/inference", "--measured", str(path)]) == 0
    told = capsys.readouterr().out
    assert "not taken: inner/s/forward/bf16/256/fused: _inner_fwd_kernel has changed since a6e6710" in told
    assert "not taken: tnt_s/inference/bf16/256/fused-compiled: _inner_fwd_kernel have changed since a6e6710" in told


KERNEL = """
SIZE = 3
CONFIGS = {"_a_kernel": 1, "_b_kernel": 2}

def helper(x):
    '''What it does.'''
    return x + 1

def _a_kernel(x):
    return helper(x)  # a comment

def _b_kernel(x):
    return x
"""


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("# a comment", "# another", set()),
        ("What it does.", "What else it does.", set()),
        ("x + 1", "x + 2", {"_a_kernel"}),
        ('"_b_kernel": 2', '"_b_kernel": 4', {"_b_kernel"}),
        ("SIZE = 3", "SIZE = 4", {"_a_kernel", "_b_kernel"}),
    ],
)
def test_a_kernel_has_changed_with_what_it_calls_and_its_table(monkeypatch, old, new, expected):
    monkeypatch.setattr(budget, "_functions_now", lambda: budget.functions({"k.py": KERNEL.replace(old, new)}))
    assert budget.changed({"k.py": KERNEL}) == expected


# ---- what gets no time ----


def error(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        budget.main(list(map(str, arguments)))
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()[-1]


def test_names_that_are_not_known(capsys, tmp_path):
    assert "unknown gpu 'v100': accepted are h200, h100, a100" in error(capsys, "--gpu", "v100")
    assert "unknown model 'tnt_x': accepted are tnt_s, tnt_b" in error(capsys, "--only", "tnt_x")
    assert "batch is 0; at least 1 is needed" in error(capsys, "--batch", 0)
    assert "the folder" in error(capsys, "--json", tmp_path / "no" / "b.json")
    assert "not two budgets" in error(capsys, "--compare", tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (dict(device="NVIDIA A100-SXM4-80GB"), "was measured on NVIDIA A100-SXM4-80GB, the budget is of h200: no row is taken"),
        (dict(commit="0" * 40), "which git does not know here: no row is taken"),
        (dict(commit="a6e6710-dirty"), "whose kernels are in no commit: no row is taken"),
        (dict(torch_version="1.0"), "has torch 1.0, here is"),
    ],
)
def test_files_of_another_machine_or_commit(capsys, result, given, told):
    assert told in error(capsys, "--only", "tnt_s/inference", "--measured", result(**given))


def test_a_file_that_is_no_result(capsys, tmp_path):
    path = tmp_path / "x.json"
    path.write_text("{}")
    assert "is no result of pytest benchmarks --benchmark-json" in error(capsys, "--measured", path)


def norm_launch(grid=50176):
    """Of a kernel that Triton would compile; those here are made for its interpreter."""
    kernel = SimpleNamespace(__name__="_norm_kernel", cache_key="a digest", arg_names=["x_ptr", "n_rows", "Z"])
    x = torch.empty(50176, 384, dtype=torch.bfloat16, device="meta")
    spec = Launch(kernel, {"Z": SimpleNamespace(BLOCK=1)}, Config(1, 1), 1)
    return Launched(spec, grid, (x, 50176), {"num_warps": 1, "num_stages": 1})


def test_an_instruction_that_is_not_known(monkeypatch, tmp_path):
    def unknown(*args, **kwargs):
        raise ValueError("the machine code has UTCHMMA, which no pipe of simulate.py takes: no time is told")

    monkeypatch.setattr(budget, "CACHE", tmp_path)
    monkeypatch.setattr(budget, "compile_launch", unknown)
    with pytest.raises(ValueError, match="_norm_kernel: the machine code has UTCHMMA"):
        budget.simulated(norm_launch(), H200, 50176)
    assert list(tmp_path.iterdir()) == []


def test_a_simulation_is_kept_by_the_kernels_digest(monkeypatch, tmp_path):
    one, other = norm_launch(), norm_launch(grid=99)
    told = SimpleNamespace(_asdict=lambda: dict(us=1.0, low=0.9, high=1.4, binds="dram"))
    asked = []
    monkeypatch.setattr(budget, "CACHE", tmp_path)
    monkeypatch.setattr(budget.simulate, "simulate", lambda *_, **__: asked.append(1) or told)
    compiled = SimpleNamespace(asm={"cubin": b""}, metadata=SimpleNamespace(shared=0))
    monkeypatch.setattr(budget, "compile_launch", lambda *_: compiled)
    monkeypatch.setattr(budget, "read_nvidia", lambda *_: {"registers": 32})
    monkeypatch.setattr(budget.machine_code, "disassembly", lambda *_: "")
    monkeypatch.setattr(budget.machine_code, "decode", lambda *_: [])
    monkeypatch.setattr(budget.machine_code, "parts", lambda *_, **__: None)
    times = [budget.simulated(each, H200, 50176) for each in (one, one, other)]
    assert len(asked) == 2
    assert {time.us for time in times} == {1.0}


def test_two_budgets_are_compared_by_rows(monkeypatch, tmp_path, capsys):
    tiny(monkeypatch)
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    budget.main(["--only", "tnt_s/inference", "--json", str(old)])
    monkeypatch.setitem(budget.RATES, "", {384: 320})
    budget.main(["--only", "tnt_s/inference", "--json", str(new)])
    capsys.readouterr()
    assert budget.main(["--compare", str(old), str(new)]) == 0
    lines = capsys.readouterr().out.splitlines()
    grown = 13 * 2 * 50176 * 384**2 / 640e6 / 1e3
    assert any(line.split() == [f"+{grown:.3f}", "ms", "pytorch:", "mm"] for line in lines)
    assert not any("clone" in line for line in lines)


# ---- the committed one, and its picture ----


@pytest.fixture(scope="module")
def committed():
    return json.loads((RESULTS / "budget.json").read_text("utf-8"))


def test_the_committed_budget_can_be_done_again_by_hand(committed):
    modes = [(name, mode, one) for name in committed if name != "about" for mode, one in committed[name].items()]
    assert {("tnt_s", "inference"), ("tnt_s", "train"), ("tnt_b", "inference"), ("deit_s", "train")} <= {m[:2] for m in modes}
    for name, mode, one in modes:
        for what, unit in (("ms", "us"), ("low", "low"), ("high", "high")):
            assert one[what] == pytest.approx(sum(row["launches"] * row[unit] for row in one["rows"]) / 1e3, abs=2e-3)
        assert {row["kind"] for row in one["rows"]} <= {"simulated", "looked up", "measured", "assumed"}
        assert all(row["source"] for row in one["rows"])
        if peer := budget.MODELS[name][2]:
            assert one["vs_deit_compiled"] == pytest.approx(committed[peer][mode]["ms"] / one["ms"], abs=1e-3)
        assert ("saved_mb_per_image" in one) == mode.startswith("train")


def test_parts_of_a_bar():
    names = ("_inner_bwd_mlp_kernel", "_norm_kernel", "native_layer_norm", "addmm_", "bmm", "nvjet_sm90_tst_192x192", "add")
    titles = list(stack.PARTS)
    last = titles[-1]
    found = [stack.part(name) for name in names]
    assert found == ["inner", "LayerNorm kernels of ours", last, "products", "products", "products", last]
    rows = [dict(name="add_mm", by="inductor", launches=2, us=500.0), dict(name="mm", by="pytorch", launches=1, us=3000.0)]
    assert stack.of_rows(rows) == {last: 1.0, "products": 3.0}


def test_a_profile_is_read():
    largest = """
tnt_s/train/bf16/256/fused-compiled GPU ms a call 3.500 kernels 9.0
  2000.0 us  24.0 x    81.5  nvjet_sm90_tst_192x192_64x3_1x2_h_bz_coopB_splitK_NTN
  1000.0 us  12.0 x   226.8  _inner_bwd_mlp_kernel

deit_s/train/bf16/256/timm-compiled GPU ms a call 1.000 kernels 2.0
  700.0 us  12.0 x   154.2  triton_poi_fused_gelu_gelu_backward_view_10
"""
    found = stack.of_profile(largest, "tnt_s/train/bf16/256/fused-compiled")
    assert found == {"products": 2.0, "inner": 1.0, "not listed": 0.5}
    table = (RESULTS / "2026-11-26-0640" / "kernels-inference.txt").read_text("utf-8")
    assert sum(stack.of_profile(table, "").values()) == pytest.approx(8.465, rel=0.002)  # as its last line has it
