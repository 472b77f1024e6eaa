"""Training through the fused path: what is computed, what is saved, and what it works together with.

Each gradient by name is held against float64 in test_pixel_embed.py, test_fold.py and test_inner.py.
"""

import copy

import pytest
import torch
import torch.distributed as dist
from helpers import TINY, launchers, paths, perturb, relative_error
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

from tnt_fast import TNT, dispatch, kernels, why_not_fused

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tiny(backend: str = "fused", **kwargs) -> TNT:
    return perturb(TNT(**{**TINY, "backend": backend, **kwargs})).to(DEVICE)


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, device=DEVICE)


class Asked(TorchDispatchMode):
    """Records which gradients each fused backward is asked for, by name."""

    def __init__(self):
        super().__init__()
        self.needed = {"pixel_embed": [], "fold": [], "block": []}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for name in self.needed:
            if str(function) == f"tnt_fast.{name}_backward.default":
                names = [*kernels.OPERATIONS[name].kinds]
                self.needed[name].append({names[i] for i in args[1 + len(names)]})
        return function(*args, **(kwargs or {}))


def asked(model: TNT, image: torch.Tensor) -> dict[str, list[set[str]]]:
    with Asked() as mode:
        model(image).square().sum().backward()
    return mode.needed


def test_only_what_is_needed_is_asked_for():
    model = tiny()
    everything = asked(model, images().requires_grad_())
    assert everything["pixel_embed"] == [{"image", "weight", "bias", "pixel_pos"}]
    function = kernels.OPERATIONS["block"]
    absent = {"qk_bias", "v_bias", "inner_qk_bias", "inner_v_bias", "fold_proj_bias"}
    assert everything["block"] == [{*function.shapes} - {*function.factors} - absent] * 2
    assert len(everything["fold"]) == 1  # of the stem
    assert asked(model, images())["pixel_embed"] == [{"weight", "bias", "pixel_pos"}]  # not of the image
    model.requires_grad_(False)
    model.head.requires_grad_(True)  # a linear probe
    assert asked(model, images()) == {"pixel_embed": [], "fold": [], "block": []}
    model.blocks[1].attn_in.v.weight.requires_grad_(True)
    assert asked(model, images()) == {"pixel_embed": [], "fold": [], "block": [{"inner_v_weight"}]}


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        (dict(inner_dim=24), None),
        (dict(inner_dim=36), "inner: C=36 channels a pixel in torch.float32; the backward takes 1 to 31"),
        (dict(first_stride=2), "inner: S=64 pixels a patch; the backward takes 1 to 16"),
        (dict(inner_mlp_ratio=22.0), "inner: 264 hidden channels of the inner MLP; the backward takes 1 to 256"),
    ],
    ids=str,
)
def test_gradients_come_from_pytorch_where_that_is_said_and_only_there(sizes, reason, monkeypatch):
    calls, inner = [], kernels.OPERATIONS["inner"]
    monkeypatch.setattr(inner, "recomputed", lambda *given, right=inner.recomputed: calls.append(1) or right(*given))
    monkeypatch.setattr(dispatch, "_warned", set())
    model, image = tiny(**sizes), images(1)
    assert why_not_fused(model, image) == []
    assert why_not_fused(model, image, gradients=True) == [reason] * (reason is not None)
    if reason is None:
        model(image).sum().backward()
    else:
        with pytest.warns(UserWarning, match=reason):
            model(image).sum().backward()
    assert len(calls) == (0 if reason is None else len(model.blocks))


def test_gradients_by_pytorch_inside_of_a_dispatch_mode_are_a_clear_error():
    model = tiny(first_stride=2)
    with (
        FlopCounterMode(display=False),
        pytest.raises(RuntimeError, match=r"gradients of inner .* model\.backend = 'reference'"),
    ):
        model(images(1)).sum().backward()
    model.backend = "reference"
    with FlopCounterMode(display=False) as counter:
        model(images(1)).sum().backward()
    assert counter.get_total_flops() > 0


def test_without_gradients_nothing_is_saved():
    model, saved = tiny(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x), lambda x: x):
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                model(images())
    assert saved == []


def saved_bytes(model: nn.Module, image: torch.Tensor) -> float:
    """Bytes an image that autograd keeps for the backward: what more images add, which weights and their casts do not."""
    return (_saved_bytes(model, image.repeat(3, 1, 1, 1)) - _saved_bytes(model, image)) / 2


def _saved_bytes(model: nn.Module, image: torch.Tensor) -> int:
    kept = {}

    def pack(x):
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), x)  # held, so that no address is used twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast(DEVICE, torch.float16):
        model(image)
    return sum(size for size, _ in kept.values())


def test_the_bytes_of_a_train_step(monkeypatch):
    """TNT-S at 224 px in half-precision autocast, 12 layers from 1 and 2: what autograd keeps for one image."""
    for module in launchers():  # what is kept does not depend on the values
        monkeypatch.setattr(module, "launch", lambda *arguments: None)

    def at_depth_12(cls, prepare=lambda model: None, **options) -> float:
        found = []
        for depth in (1, 2):
            model = cls(embed_dim=384, inner_dim=24, depth=depth, num_heads_outer=6, num_classes=10, **options).to(DEVICE)
            prepare(model)
            found.append(saved_bytes(model, torch.randn(1, 3, 224, 224, device=DEVICE)))
        return found[0] + 11 * (found[1] - found[0])

    def without_outer(model):
        for block in model.blocks:
            block.outer = lambda patch, fused: patch

    assert at_depth_12(TNT, backend="fused") <= 0.4 * 111e6  # timm's eager AMP on a GPU keeps 111 MB
    assert 0 < at_depth_12(TNT, without_outer, backend="fused") <= 6e6


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@paths("float16", "bfloat16 float16")
def test_a_training_step(autocast, path, dtype):
    """Each gradient by the rule against float64."""
    model = perturb(TNT(**TINY)).to(torch.float32 if autocast else dtype)
    image, weight = torch.randn(2, 3, 32, 32).to(dtype), torch.randn(2, 5)
    found = []
    for backend, kind, device in (
        ("fused", dtype, path.device), ("reference", dtype, path.device), ("reference", torch.float64, "cpu"),
    ):  # fmt: skip
        ours = copy.deepcopy(model).to(device)
        ours.backend = backend
        if kind == torch.float64:
            ours.double()
        with torch.autocast(device, dtype, enabled=autocast and kind == dtype):
            out = ours(image.to(device, torch.float32 if autocast and kind == dtype else kind))
        gradients = torch.autograd.grad((out.to(kind).double() * weight.to(device)).sum(), list(ours.parameters()))
        found.append([out.detach(), *gradients])
    names = ["output", *(name for name, _ in model.named_parameters())]
    for name, fused, same, exact in zip(names, *found, strict=True):
        path.rule(name, fused, same, exact, dtype)


@paths("", "bfloat16 float16", "")
def test_a_compiled_model_launches_what_an_eager_one_does(path, dtype):
    model = tiny().to(dtype)
    image = torch.randn(2, 3, 32, 32).to(dtype)
    results, launched = [], []
    torch._dynamo.reset()
    for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        path.executor.launched.clear()
        out = call(image)
        results.append([out, *torch.autograd.grad(out.sum(), list(model.parameters()))])
        launched.append(sorted(path.executor.launched))
    assert launched[0] == launched[1] != []
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_inductor_knows_the_operations_before_it_meets_them():
    """Else it writes down what the arguments of the last in a backward were made of: of twelve blocks, for many minutes."""
    from torch._inductor.lowering import lowerings

    known = {getattr(torch.ops.tnt_fast, name).default for name in ("block_recorded", "block_backward", "pixel_embed_backward")}
    for operation in known:
        lowerings.pop(operation, None)
    torch._dynamo.reset()
    torch.compile(tiny(), fullgraph=True, backend="aot_eager")(images()).sum().backward()
    assert known <= {*lowerings}


@pytest.mark.slow
def test_two_backwards_give_the_same_bits():
    model, image = tiny(), images(3).requires_grad_()
    found = [torch.autograd.grad(model(image).square().sum(), [image, *model.parameters()]) for _ in range(2)]
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_gradients_that_are_expanded_or_strided():
    fused, plain = tiny(), None
    plain = copy.deepcopy(fused)
    plain.backend = "reference"
    image = images()
    for upstream in (
        torch.ones((), device=DEVICE).expand(2, 5, 24),  # what sum() sends
        torch.randn(2, 24, 5, device=DEVICE).transpose(1, 2),
        torch.randn(2, 5, 48, device=DEVICE)[..., ::2],
    ):
        found = []
        for model in (fused, plain):
            tokens = model._stem(
                model.pixel_embed(image, model.pixel_pos, fused=model.backend == "fused"), model.backend == "fused"
            )
            found.append(
                torch.autograd.grad(tokens, [model.cls_token, model.patch_pos, model.pixel_pos, model.proj.weight], upstream)
            )
        for a, b in zip(*found, strict=True):
            assert relative_error(a, b) <= 1e-5


def test_accumulation_adds_up():
    model, (first, second) = tiny(), images(2).split(1)
    model(first).sum().backward()
    model(second).sum().backward()
    twice = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    (model(first).sum() + model(second).sum()).backward()
    for p, expected in zip(model.parameters(), twice, strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    import timm

    model, image = tiny(), images()
    expected = torch.autograd.grad(model(image).square().sum(), list(model.parameters()))
    timm.layers.set_reentrant_ckpt(use_reentrant)
    try:
        model.set_grad_checkpointing()
        model(image).square().sum().backward()
    finally:
        timm.layers.set_reentrant_ckpt(False)
    for p, e in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, e, rtol=1e-5, atol=1e-6)


def test_an_overflow_reaches_the_grad_scaler_as_infinity():
    model = tiny()
    with torch.autocast(DEVICE, torch.float16):
        loss = model(images()).float().square().sum()
    (loss * 1e9).backward()
    gradient = model.blocks[0].attn_in.qk.weight.grad
    assert not gradient.isfinite().all()


def test_a_second_backward_through_freed_buffers_and_a_double_backward_are_errors():
    model, image = tiny(), images().requires_grad_()
    loss = model(image).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    (gradient,) = torch.autograd.grad(model(image).square().sum(), image, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated, which the kernels do not do.*'reference'"):
        gradient.square().sum().backward()


def test_torch_func_takes_the_reference():
    model = tiny()
    parameters, image = dict(model.named_parameters()), images()

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (image,)).square().sum()

    with pytest.raises(RuntimeError, match=r"a torch\.func transform is active.*'reference'"):
        torch.func.grad(loss)({k: v.detach() for k, v in parameters.items()})
    loss(parameters).backward()  # functional_call alone is fine
    model.backend = "reference"
    found = torch.func.grad(loss)({k: v.detach() for k, v in parameters.items()})
    for name, p in parameters.items():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-5)


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group(
        "nccl" if DEVICE == "cuda" else "gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("options", [{"static_graph": True}, {"find_unused_parameters": True}], ids=str)
def test_distributed_data_parallel(process_group, options):
    model, image = tiny(), images()
    model(image).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    parallel = nn.parallel.DistributedDataParallel(model, **options)
    parallel(image).square().sum().backward()
    for p, e in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, e)


def test_fully_sharded_data_parallel(process_group):
    from torch.distributed.fsdp import fully_shard

    model, image = tiny(), images()
    model(image).square().sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    mesh = dist.init_device_mesh(DEVICE, (1,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model(image).square().sum().backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad.full_tensor(), expected[n])


def test_training_fused_converges_as_the_reference_does():
    start, data, target = tiny(drop_path_rate=0.2).train(), torch.randn(3, 8, 3, 32, 32), torch.randint(5, (3, 8))
    losses = []
    for backend in ("reference", "fused"):
        model = copy.deepcopy(start)
        model.backend = backend
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        torch.manual_seed(4)
        losses.append([])
        for image, label in zip(data.to(DEVICE), target.to(DEVICE), strict=True):
            loss = nn.functional.cross_entropy(model(image), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)


@pytest.mark.gpu
def test_a_full_run_on_the_digits_ends_as_accurate(tmp_path):
    recipe, train = pytest.importorskip("tnt_fast.recipe"), pytest.importorskip("tnt_fast.train")
    accuracy = []
    for backend in ("reference", "fused"):
        config, _ = recipe.resolved({"data": recipe.DIGITS, "backend": backend, "device": "cuda", "amp": "bfloat16"})
        accuracy.append(
            train.Run(config, tmp_path / backend, log=lambda line: None, progress=False).train()[-1]["val_accuracy"]
        )
    assert abs(accuracy[1] - accuracy[0]) <= 0.0056  # half a point; one of the 360 images is 0.28
