"""What a run would need: the plan is held to what autograd, the optimizer and DDP really keep, and to committed times."""

import json
import time
from dataclasses import replace
from functools import cache

import pytest
import torch
from helpers import write_images
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tnt_fast import TNT, kernels, plan, recipe
from tnt_fast.cli import main
from tnt_fast.distributed import Ranks
from tnt_fast.recipe import Config
from tnt_fast.variants import create_tnt

TINY = dict(img_size=32, embed_dim=48, inner_dim=12, depth=3, num_heads_outer=3, num_heads_inner=2)
WIDE = dict(depth=2)  # of TNT-S's width
SMALL = ["--model", "tnt_ti_patch16_224", "--model-kwargs", *(f"{name}={value}" for name, value in TINY.items())]


def config(**settings) -> Config:
    return Config(**{"data": "", "model": "tnt_ti_patch16_224", "model_kwargs": TINY, "batch_size": 8, **settings})


@cache
def paper(size: str) -> plan.Shape:
    return plan.shape(config(model=f"tnt_{size}_patch16_224", model_kwargs={}, amp="bfloat16", drop_path=0.0), 1000)


@cache
def kept_of(size: str, fused: bool) -> plan.Kept:
    return plan.kept(paper(size).model, torch.bfloat16, fused)


def really_kept(model: TNT, images: torch.Tensor, dtype: torch.dtype) -> int:
    """Bytes besides the parameters, each memory once, of a forward that is run."""
    found = {}

    def pack(x):
        storage = x.untyped_storage()
        found[storage._cdata] = (storage.nbytes(), x)  # held, so that no address is used twice
        return x

    own = {p.untyped_storage()._cdata for p in model.parameters()}
    autocast = torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), autocast:
        model(images)
    return sum(size for key, (size, _) in found.items() if key not in own)


@pytest.fixture
def fake_gpu(monkeypatch):
    """A function: what autograd keeps of three images on a GPU, whose autocast casts others than the CPU's; without values."""
    if torch.__version__ < "2.11":
        pytest.skip("older versions ask CUDA about fake tensors")
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)

    def run(model: TNT, dtype: torch.dtype) -> int:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
            return really_kept(model.to_empty(device="cuda"), torch.empty(3, 3, *model.pixel_embed.img_size), dtype)

    return run


# ---- memory ----


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("tnt_ti_patch16_224", TINY),
        ("tnt_ti_patch16_224", TINY | dict(drop_path_rate=0.3, se_ratio=4.0, inner_blocks=(0, 2))),
        ("tnt_s_legacy_patch16_224", TINY | dict(use_patch_embed=True, pos_drop_rate=0.1)),
        ("tnt_s_patch16_224", WIDE),
    ],
)
def test_the_activations_of_the_reference(name, sizes):
    """Run on the CPU with its values, against what is counted without any."""
    model = create_tnt(name, backend="reference", **sizes).train()
    images = torch.randn(3, 3, *model.pixel_embed.img_size)
    fixed, image = plan.kept(create_tnt(name, device="meta", **sizes).train(), torch.float32).total()
    assert fixed + 3 * image == pytest.approx(really_kept(model, images, torch.float32), rel=0.05)


@pytest.mark.parametrize("sizes", [TINY, TINY | dict(drop_path_rate=0.3, se_ratio=4.0, global_pool="avg")], ids=["", "more"])
def test_the_activations_under_autocast(sizes, fake_gpu):
    found = plan.kept(create_tnt("tnt_ti_patch16_224", device="meta", **sizes).train(), torch.float16).total()
    model = create_tnt("tnt_ti_patch16_224", backend="reference", device="meta", **sizes).train()
    assert fake_gpu(model, torch.float16) == found.fixed + 3 * found.image


def test_frozen_blocks_keep_nothing():
    free, frozen = (plan.shape(config(freeze_blocks=n), 10) for n in (0, 2))
    assert frozen.gradients < free.gradients
    assert frozen.optimizer < free.optimizer
    assert frozen.weights == free.weights
    for fused in (False, True):
        found = plan.kept(frozen.model, torch.bfloat16, fused)
        assert (found.stem.image, found.blocks[0].image) == (0, 0)
        assert found.blocks[2].image > 0


@pytest.mark.parametrize("recompute", ["none", "mlp", "all"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_the_activations_of_the_fused_operations(recompute, dtype, fake_gpu):
    """Byte for byte."""
    if not kernels.HAS_TRITON:
        pytest.skip("what the kernels keep is asked of them, which needs Triton")
    sizes = TINY | dict(drop_path_rate=0.2, recompute=recompute, inner_blocks=(0, 2))
    counted = plan.kept(create_tnt("tnt_ti_patch16_224", device="meta", **sizes).train(), dtype, True).total()
    model = create_tnt("tnt_ti_patch16_224", backend="fused", device="meta", **sizes).train()
    assert fake_gpu(model, dtype) == counted.fixed + 3 * counted.image


@pytest.mark.parametrize(("recompute", "mb"), [("none", 20.8), ("mlp", 13.6), ("all", 6.3)])
def test_tnt_s_keeps_what_is_known_of_it(recompute, mb):
    model = create_tnt("tnt_s_patch16_224", device="meta", recompute=recompute).train()
    assert plan.kept(model, torch.bfloat16, fused=True).total().image / 1e6 == pytest.approx(mb, rel=0.02)


@pytest.mark.parametrize("opt", ["adamw", "sgd", "lamb"])
def test_weights_gradients_and_moments_are_exact(opt):
    settings = config(opt=opt, lr=1e-3, ema=0.99)
    model = recipe.build_model(replace(settings, backend="reference"), 7).model
    optimizer = recipe.build_optimizer(settings, model)
    model(torch.randn(1, 3, 32, 32)).sum().backward()
    optimizer.step()
    state = [x for each in optimizer.state.values() for x in each.values() if isinstance(x, torch.Tensor) and x.ndim > 0]
    found = plan.shape(settings, 7)
    assert found.weights == sum(p.nbytes for p in model.parameters())
    assert found.gradients == sum(p.grad.nbytes for p in model.parameters())
    assert found.optimizer == sum(x.nbytes for x in state) > 0
    keeps = plan.kept(found.model, torch.float32)
    parts = plan.memory(found, keeps, plan.Way(""), 5, 1, 24)
    assert parts["EMA"] == parts["weights"] == found.weights + sum(x.nbytes for x in model.buffers())
    assert parts["activations"] == 5 * keeps.total().image
    shared = plan.memory(found, keeps, plan.Way("", fsdp=True), 5, 4, 24)
    assert shared["optimizer"] == found.optimizer // 4
    assert shared["activations"] == parts["activations"]


def test_gradients_are_the_buckets_of_ddp(tmp_path):
    """As a run has it: what is reduced among the ranks lies nowhere a second time."""
    settings = config()
    model = recipe.build_model(replace(settings, backend="reference"), 7).model
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = Ranks(size=2).parallel(model)
        assert isinstance(parallel, nn.parallel.DistributedDataParallel)
        parallel(torch.randn(2, 3, 32, 32)).sum().backward()
        storages = {p.grad.untyped_storage()._cdata: p.grad.untyped_storage().nbytes() for p in model.parameters()}
    finally:
        torch.distributed.destroy_process_group()
    assert len(storages) < len([*model.parameters()])
    assert sum(storages.values()) == plan.shape(settings, 7).gradients


def test_checkpointing_keeps_the_inputs_of_blocks_and_all_of_one():
    found = plan.kept(create_tnt("tnt_ti_patch16_224", device="meta", **TINY).train(), torch.float32)
    pixel, patch = 4 * 16 * 12 * 4, 5 * 48 * 4
    assert [part.image for part in found.inputs] == [pixel + patch] * 3
    assert found.total(True).image == found.stem.image + 3 * (pixel + patch) + found.blocks[1].image + found.head.image
    assert found.total(True).image < found.total().image


@pytest.mark.parametrize("way", [plan.Way(""), plan.Way("", fsdp=True), plan.Way("", checkpointing=True)])
def test_the_largest_batch_fits_and_no_larger_one(way):
    about = plan.shape(config(), 10)
    keeps = plan.kept(about.model, torch.float32)
    most = plan.largest_batch(about, keeps, way, 4, 2.0)
    assert most % 2 == 0  # mixup takes pairs
    assert sum(plan.memory(about, keeps, way, most, 4, 2.0).values()) <= 2 * 2**30
    assert sum(plan.memory(about, keeps, way, most + 2, 4, 2.0).values()) > 2 * 2**30
    assert plan.largest_batch(about, keeps, way, 4, 0.5) == 0


def committed(model: str) -> dict:
    """The rows of a training step that were measured on an H200."""
    found = {}
    for file in sorted(plan.TIMES.parents[1].glob("benchmarks/results/*/benchmarks.json")):
        result = json.loads(file.read_text("utf-8"))
        rows = [row["extra_info"] for row in result["benchmarks"] if result["machine_info"]["device"] == "NVIDIA H200"]
        found |= {row["id"]: row for row in rows if row.get("id", "").startswith(f"{model}/train/bf16/256")}
    return found


@pytest.mark.parametrize("size", ["s", "b"])
def test_the_peak_that_a_gpu_measured(size):
    """Of timm's TNT, which the reference is bit for bit; without CUDA's own memory, which PyTorch does not see."""
    parts = plan.memory(paper(size), kept_of(size, False), plan.Way(""), 256, 1, 141)
    counted = (sum(parts.values()) - parts["CUDA, allocator"]) / 2**20
    assert counted == pytest.approx(committed(f"tnt_{size}")[f"tnt_{size}/train/bf16/256/timm-eager"]["peak_mib"], rel=0.05)


# ---- time ----


def test_the_known_times_are_those_of_the_committed_results():
    generator = pytest.importorskip("benchmarks.plan")
    assert plan.TIMES.read_text("utf-8") == generator.text(), "run: python -m benchmarks.plan"


def test_gpus_are_those_of_the_benchmarks():
    simulate, budget = pytest.importorskip("benchmarks.simulate"), pytest.importorskip("benchmarks.budget")
    for name, peak in budget.PEAKS.items():
        assert plan.GPUS[name].half == peak
    for name, there in simulate.GPUS.items():  # 88% of a peak are taken as reached there
        assert there.dram == pytest.approx(0.88 * plan.GPUS[name].bandwidth, rel=0.01)


@pytest.mark.parametrize("fused", [False, True])
def test_a_model_scaled_from_another_is_within_the_band(fused):
    """TNT-B from TNT-S, on the GPU that measured both, and back."""
    known = plan.times()
    rows = {row["model"]: row for row in known["rows"] if not row["compiled"] and row["path"] == ("reference", "fused")[fused]}
    for name, other in (("tnt_s", "tnt_b"), ("tnt_b", "tnt_s")):
        about, kept = paper(name[-1]), kept_of(name[-1], fused).total().image
        one = plan.step(about, kept, plan.Way(""), 256, plan.GPUS["h200"], fused, known | {"rows": [rows[other]]})
        assert one.low < rows[name]["ms"] / 1e3 < one.high
        assert f"scaled from {other}" in one.source
        own = plan.step(about, kept, plan.Way(""), 256, plan.GPUS["h200"], fused, known | {"rows": [rows[name]]})
        assert own.nominal == pytest.approx(rows[name]["ms"] / 1e3, rel=0.01)
        assert "scaled" not in own.source


def test_time_goes_with_products_bandwidth_and_the_host():
    about = replace(paper("s"), config=replace(paper("s").config, compile=True))
    kept, h200 = kept_of("s", True).total().image, plan.GPUS["h200"]

    def seconds(images, on, **way):
        return plan.step(about, kept, plan.Way("", **way), images, on, True).nominal

    many = seconds(4096, h200)
    assert seconds(8192, h200) == pytest.approx(2 * many)
    assert seconds(4096, h200._replace(half=h200.half / 2, bandwidth=h200.bandwidth / 2)) == pytest.approx(2 * many)
    assert many < seconds(4096, h200._replace(bandwidth=h200.bandwidth / 2)) < 2 * many
    assert seconds(4096, h200, checkpointing=True) == pytest.approx(4 / 3 * many)
    assert many < seconds(4096, h200, recompute="mlp") < seconds(4096, h200, recompute="all")
    if any(row["host_ms"] for row in plan.times()["rows"]):
        assert seconds(2, h200) == seconds(4, h200)


# ---- the command ----


@pytest.mark.parametrize(
    ("gpu", "count", "taken"), [("v100", 8, "reference"), ("h100", 8, "fused"), ("rtx4090", 1, "fused")], ids=str
)
def test_the_papers_recipe(gpu, count, taken, capsys):
    began = time.process_time()
    asked = ["plan", "--preset", "paper", "--gpu", gpu, "--count", str(count), "--amp", "bfloat16", "--compile", "--price", "2"]
    assert main([*asked, "--json"]) == 0
    assert time.process_time() - began < 5
    found = json.loads(capsys.readouterr().out)
    text = "\n".join(plan.table(found))
    assert found["path"] == taken
    assert found["images_a_step"] == 1024
    assert found["steps"] == 300 * (1_281_167 // 1024)
    if gpu == "v100":
        assert "compute capability 7.0; the kernels need 8.0" in text
        assert found["dtype"] == "float16"
    own, *others = found["ways"].values()
    assert others
    for row in (own, *others):
        assert row["batch"] * row["accumulate"] * count == 1024
        assert row["batch"] <= row["largest_batch"]
        assert row["total"] == sum(row["memory"].values()) <= found["gpu"]["memory"] * 2**30
        low, nominal, high = row["hours"]
        assert 0 < low < nominal < high
        assert nominal == pytest.approx(row["step_ms"][1] / 3.6e6 * found["steps"])
        assert row["cost"] == pytest.approx([2 * count * hours for hours in row["hours"]])
        for part in row["memory"]:
            assert found["sources"][part] in ("counted", "assumed")
            assert f"\n{part} " in text
    assert f"{own['hours'][1]:,.1f}" in text
    assert "assumed: " in text
    generator = pytest.importorskip("benchmarks.plan")
    assert f"\n{generator.line(found)}\n" in generator.PAGE.read_text("utf-8"), "run: python -m benchmarks.plan"


def test_a_batch_that_does_not_fit_is_divided(capsys):
    settings = config(batch_size=4096, amp="float16")
    ways = plan.plan(settings, plan.gpu(None, memory=1.2, tflops=100, bandwidth=500), 1, 10**6, 10)["ways"]
    own, less = ways["as it is"], ways["recompute all"]
    assert own["accumulate"] > less["accumulate"] >= 1
    assert own["batch"] * own["accumulate"] == 4096
    assert main(["plan", "--memory", "1", "--tflops", "100", "--bandwidth", "500", *SMALL]) == 0
    text = capsys.readouterr().out
    assert "none fits" in text
    assert "–" in text


def test_a_data_set_is_counted(tmp_path, capsys):
    data = write_images(tmp_path / "data")
    assert main(["plan", str(data), "--gpu", "a100", "--batch-size", "4", "--epochs", "2", *SMALL, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["images"], found["steps"]) == (12, 6)
    assert found["parameters"] == sum(p.numel() for p in recipe.build_model(config(), 2).model.parameters())


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ([], "--memory, --tflops, --bandwidth missing"),
        (["--gpu", "h1000"], "nearest: h100"),
        (["--gpu", "h100", "--memory", "-1"], "--memory -1 must be"),
        (["--tflops", "100"], "--memory, --bandwidth missing"),
        (["--gpu", "h100", "--count", "0"], "--count 0 must be"),
        (["--gpu", "h100", "--count", "7", "--global-batch", "128"], "must be a multiple of 14 (2 images × 7 ranks)"),
        (["--gpu", "h100", "--images", "100", "--batch-size", "128"], "more than the 100 to train on"),
        (["--gpu", "h100", "--price", "nan"], "--price nan must be"),
        (["--gpu", "v100", "--backend", "fused", *SMALL], "cannot run on V100"),
        (["--gpu", "h100", "--model", "hf-hub:a/b"], "hf-hub:a/b"),
        (["--gpu", "h100", "--model-kwargs", "depth=0"], "depth"),
        (["nowhere/", "--gpu", "h100"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(asked, said, capsys):
    assert main(["plan", *asked]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1


# ---- in a run ----


def test_a_run_says_where_its_batch_does_not_fit(tmp_path, monkeypatch):
    pytest.importorskip("torchvision")
    from tnt_fast import train

    data = write_images(tmp_path / "data")
    settings = config(data=str(data), batch_size=4, epochs=1, workers=0, device="cpu")
    lines: list[str] = []
    run = train.Run(settings, tmp_path / "run", log=lines.append, progress=False)
    monkeypatch.setattr(plan, "memory_here", lambda device: 24.0)
    run._warn_of_memory()
    assert lines == []
    monkeypatch.setattr(plan, "memory_here", lambda device: plan.CONTEXT + 0.002)
    run.train()
    assert "batches of 4 need" in lines[0]
    assert "take --grad-checkpointing" in lines[0]
    assert [line.startswith("epoch") for line in lines[:2]] == [False, True]
    many = replace(run.config, batch_size=10**6)
    assert "--batch-size " in plan.too_large(many, run.model, 2, 1, False, 24.0)
    assert plan.too_large(replace(many, model="hf-hub:a/b"), run.model, 2, 1, False, 24.0) == ""  # a run goes on without a plan
