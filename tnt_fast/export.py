"""A trained model for elsewhere: ``tnt-fast export``, as ONNX, torch.export, AOTInductor, a Hugging Face folder, or int8.

Each target is a function that writes to a free path, and gives back how what it wrote computes. That is run and compared with
the model before it takes its place. What is written computes with the reference, so that it loads where there is no tnt_fast.
With the fused operations inside, a file has calls of them by name: PyTorch finds them where tnt_fast was imported, and packs
them into no file (pytorch issue 145394).
"""

import copy
import inspect
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import safetensors.torch
import timm
import torch
from timm.data import resolve_data_config
from torch import Tensor

from tnt_fast import dispatch
from tnt_fast.terminal import nearest
from tnt_fast.tnt import TNT
from tnt_fast.writing import replacing_by_path

BATCHES = (1, 7)  # in which what was written is run
TOLERANCE = 1e-5  # of the largest logit
TOLERANCE_INT8 = 0.25
MOST_LOST = 1.0  # points of top-1, by int8
MOST_FUSED = 1024  # images of a batch: the operations count pixels in 32 bits, whatever the size of an image
MOST_ONNX = 2**31 - 2**20  # bytes of a file in protobuf's format, less the graph
FOLDER = ("README.md", "config.json", "model.safetensors")


class Exported(NamedTuple):
    """What ``export_model`` wrote.

    Attributes:
        path: the file or folder. size: in bytes. difference: from the model's logits at most, over the largest of them.
        notes: sentences for who loads it. load: the line of Python that loads it.
    """

    path: Path
    size: int
    difference: float
    notes: list[str]
    load: str


class _Subject(NamedTuple):
    model: TNT  # a copy, on the path that is written
    images: Tensor  # as many as the largest batch
    about: dict[str, Any]  # classes and what images are like, for JSON
    accuracy: float | None


class _Written(NamedTuple):
    run: Callable[[Tensor], Tensor]
    notes: list[str]


def export_model(
    model: TNT, to: str, out: str | os.PathLike, *, classes: Sequence[str] = (), data_config: Mapping[str, Any] | None = None,
    accuracy: float | None = None, backend: str = "reference", overwrite: bool = False, tolerance: float | None = None,
    examples: Iterable[tuple[Tensor, Tensor]] | None = None, most_lost: float = MOST_LOST,
) -> Exported:  # fmt: skip
    """Write a model for use without tnt_fast, run what was written, and compare it with the model.

    A file takes any number of images at once, of the model's size. The model stays as it is.

    Args:
        model: in evaluation mode. to: "onnx"; "pt2" (torch.export); "aoti" (AOTInductor, for the device of the model and a
            processor like this one); "huggingface" (a folder that ``timm.create_model`` loads); "int8" (ONNX, the weights of
            products in 8 bits).
        out: the file or folder. overwrite: replace what an export wrote there before.
        classes: their names. data_config: as timm's ``resolve_data_config`` gives it; None: the model's own. accuracy: from 0
            to 1, for the model card.
        backend: "reference", or of pt2 and aoti "fused": they load after ``import tnt_fast``.
        tolerance: the largest difference of logits that is accepted, over the largest logit; None: 1e-5, of int8 0.25.
        examples: batches of images and of their classes' indices, as a DataLoader gives them. int8 is compared by its top-1
            on them, too. most_lost: points of it that int8 may lose.

    Raises:
        TypeError: not a ``TNT``. ValueError: an unknown target, a model that cannot be written, or outputs that differ by more.
        ImportError: a package is missing. RuntimeError: no compiler, or ``backend="fused"`` cannot run.
        OSError: ``out`` cannot be written, or is there already.
    """
    path, target = check(to, out, overwrite=overwrite, backend=backend), TARGETS[to]
    _check_model(model, to)
    subject = _subject(model, classes, data_config, accuracy, backend, "cpu" if target.on_cpu else model.cls_token.device)
    eps = torch.finfo(subject.images.dtype).eps
    usual = TOLERANCE_INT8 if to == "int8" else max(TOLERANCE, 16 * eps)
    accepted = usual if tolerance is None else tolerance
    with torch.no_grad(), replacing_by_path(path) as new:
        with _quiet():
            run, notes = target.write(subject, new)
            difference = max(_difference(run, subject.model, subject.images[:size]) for size in BATCHES)
        if not difference <= accepted:  # nor where it is not a number
            raise ValueError(
                f"{to}: its logits differ from the model's by {difference:.2g} of the largest, more than the {accepted:g} that "
                f"is accepted, so {str(out)!r} was not written; --tolerance accepts more"
            )
        if to == "int8":
            notes = [*notes, _compare_accuracy(run, subject.model, examples, most_lost)]
        files = [new] if target.ending else sorted(new.iterdir())
        size = sum(file.stat().st_size for file in files)
    if backend == "fused":
        notes = [*notes, "it calls tnt_fast's operations by name: import tnt_fast before loading it, in Python"]
    return Exported(path, size, difference, notes, target.load.format(path=os.fspath(out)))


# ---- before anything is computed ----


def check(to: str, out: str | os.PathLike, *, overwrite: bool = False, backend: str = "reference", device: str = "cpu") -> Path:
    """Where a target is to be written, after everything was looked at that is known without the model.

    Raises:
        as ``export_model``.
    """
    if to not in TARGETS:
        raise ValueError(f"the target {str(to)!r:.100} is unknown{nearest(to, TARGETS)}; accepted: {', '.join(TARGETS)}")
    if backend not in ("reference", "fused"):
        raise ValueError(f"backend={backend!r} is not accepted; accepted: reference, or with pt2 and aoti fused")
    if backend == "fused" and to not in ("pt2", "aoti"):
        raise ValueError(f"{to} has no place for the fused operations; accepted: backend reference, or fused with pt2, aoti")
    target, path = TARGETS[to], Path(os.path.abspath(out))
    _check_place(target, path, repr(os.fspath(out)), overwrite)
    if target.by_onnx:
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise ImportError(f'{to} needs more packages ({error}): pip install "tnt_fast[export]"') from error
    if to == "aoti":
        if device != "cpu" and not torch.cuda.is_available():
            raise ValueError(
                f"--device {device}: AOTInductor builds for a GPU only on a machine with one, whose driver it asks what to "
                "compile for; torch sees none here. Export there, or with --device cpu for a CPU"
            )
        _check_compiler()
    return path


def _check_place(target: "_Target", path: Path, shown: str, overwrite: bool) -> None:
    if target.ending and path.suffix != target.ending:
        raise ValueError(f"--out {shown} must end in {target.ending}, as {target.what} does")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--out {shown}: there is no directory {str(path.parent)!r}; make it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"--out {shown}: {str(path.parent)!r} cannot be written to; choose another, or change its mode")
    if not path.exists():
        return
    if bool(target.ending) == path.is_dir():
        found, wanted = ("folder", "file") if path.is_dir() else ("file", "folder")
        raise FileExistsError(f"--out {shown} is a {found}, and {target.what} a {wanted}; choose another --out")
    inside = sorted(file.name for file in path.iterdir()) if path.is_dir() else [path.name]
    if inside and not overwrite:
        raise FileExistsError(f"--out {shown} is there already; choose another --out, or replace it with --overwrite")
    if path.is_dir() and (others := [name for name in inside if name not in FOLDER]):
        raise FileExistsError(f"--out {shown} holds {others[0]!r}, which no export wrote; choose another --out")


def _check_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise RuntimeError(
            "aoti compiles C++, and there is no compiler: install g++ or clang++, or name one in the variable CXX"
        ) from error


def _check_model(model: Any, to: str) -> None:
    if type(model) is not TNT:
        kind = f"{type(model).__module__}.{type(model).__qualname__}"
        raise TypeError(
            f"what is exported is a tnt_fast.TNT, got a {kind}; a copy of optimize_for_inference or torch.compile is laid out "
            "for this machine, so export the model that it was made of; timm's TNT becomes one by tnt_fast.from_timm"
        )
    if training := [name or "the model" for name, module in model.named_modules() if module.training]:
        raise ValueError(f"{training[0]} is in training mode; call model.eval() first")
    if hooked := [name or "the model" for name, module in model.named_modules() if dispatch.is_hooked(module)]:
        raise ValueError(f"{hooked[0]} has hooks, which are Python and stay behind; remove them first")
    dtype = model.cls_token.dtype
    if to in ("onnx", "int8") and dtype != torch.float32:
        raise ValueError(f"{to} is written from float32, the model is {dtype}; cast it with model.float()")
    if model.cls_token.is_meta:
        raise ValueError("the model is on the device 'meta', without numbers; load its weights first")
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if to in ("onnx", "int8") and size > MOST_ONNX:
        raise ValueError(f"the weights take {size / 2**30:.1f} GiB, and a file of {to} holds 2 GiB; take pt2 or aoti")
    if to == "huggingface" and (changes := dispatch.changes(model)):
        raise ValueError(
            f"a folder has weights alone, from which a plain TNT is built, and this one was changed: {'; '.join(changes)}"
        )


def _subject(
    model: TNT, classes: Sequence[str], data_config: Mapping[str, Any] | None, accuracy: float | None, backend: str,
    device: torch.device | str,
) -> _Subject:  # fmt: skip
    if classes and len(classes) != model.num_classes:
        raise ValueError(f"{len(classes)} class names, but the model has {model.num_classes} classes")
    given = resolve_data_config({}, model=model) if data_config is None else data_config
    names = ["interpolation", "crop_pct", "crop_mode"]
    names += [name for name in ("mean", "std") if len(given.get(name) or ()) in (1, model.in_chans)]  # else of other images
    about = {name: given[name] for name in names if given.get(name) is not None}
    shape = (model.in_chans, *model.pixel_embed.img_size)
    about |= {"input_size": list(shape), **({"classes": list(classes)} if classes else {})}
    subject = copy.deepcopy(model).requires_grad_(False).to(device)
    subject.set_grad_checkpointing(False)
    subject.set_attn_backend("auto")  # xformers' operations are in no other process
    subject.backend = backend
    dispatch.settle(subject)  # "fused" fails here
    images = torch.randn(max(BATCHES), *shape, generator=torch.Generator().manual_seed(0))
    return _Subject(subject, images.to(subject.cls_token), about, accuracy)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters say of their own insides, of devices that are not there, of names that they will drop."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# ---- the comparison ----


def _difference(run: Callable[[Tensor], Tensor], model: TNT, images: Tensor) -> float:
    expected = model(images)
    if (found := run(images)).shape != expected.shape:
        raise ValueError(f"its outputs are {tuple(found.shape)} for {len(images)} images, the model's {tuple(expected.shape)}")
    error = (found.double() - expected.double()).abs().max() / expected.double().abs().max()
    return float(error)


def _compare_accuracy(
    run: Callable[[Tensor], Tensor], model: TNT, examples: Iterable[tuple[Tensor, Tensor]] | None, most_lost: float
) -> str:
    """A sentence about the top-1 of both; without examples that it was not compared."""
    if examples is None:
        return "its accuracy was not compared: name labelled images with --data"
    count, right, same = 0, [0, 0], 0
    for images, truth in examples:
        answers = [compute(images.to(model.cls_token)).argmax(-1) for compute in (model, run)]
        count += len(truth)
        right = [hits + int((answer == truth).sum()) for hits, answer in zip(right, answers, strict=True)]
        same += int((answers[0] == answers[1]).sum())
    if not count:
        raise ValueError("there are no examples to compare the accuracy on")
    before, after = (100 * hits / count for hits in right)
    said = f"top-1 of {count:,} images: {before:.2f}% → {after:.2f}%, the same answer for {same / count:.2%}"
    if before - after > most_lost:
        raise ValueError(f"int8 loses more than the {most_lost:g} points of --most-lost, so it was not written: {said}")
    return said


# ---- torch.export, AOTInductor ----


def _program(subject: _Subject) -> torch.export.ExportedProgram:
    most = MOST_FUSED if subject.model.backend == "fused" else None
    batch = torch.export.Dim("batch", min=1, max=most)
    program = torch.export.export(subject.model, (subject.images[:2],), dynamic_shapes=({0: batch},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # folders of this machine
    return program


def _write_pt2(subject: _Subject, path: Path) -> _Written:
    torch.export.save(_program(subject), path, extra_files={"about.json": json.dumps(subject.about)})
    return _Written(torch.export.load(path).module(), ["classes and normalisation: its extra file about.json"])


def _write_aoti(subject: _Subject, path: Path) -> _Written:
    import torch._inductor

    configs = {"aot_inductor.metadata": _as_strings(subject.about)}
    try:
        torch._inductor.aoti_compile_and_package(_program(subject), package_path=str(path), inductor_configs=configs)
    except Exception as error:  # of Inductor, the compiler or the linker
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RuntimeError(
            f"AOTInductor could not build the package: {reason:.500}; it needs a C++ compiler and Python's headers (on Debian "
            "g++ and python3-dev)"
        ) from error
    package = torch._inductor.aoti_load_package(str(path))
    where = package.get_metadata()
    isa = where.get("AOTI_CPU_ISA") or where.get("AOTI_COMPUTE_CAPABILITY") or "this machine"
    notes = [f"built for {subject.images.device.type}, {isa}, and torch {torch.__version__}"]
    return _Written(cast(Any, package), [*notes, "classes and normalisation: its get_metadata()"])


def _as_strings(about: Mapping[str, Any]) -> dict[str, str]:
    return {name: json.dumps(value) for name, value in about.items()}


# ---- ONNX ----


def _write_onnx(subject: _Subject, path: Path) -> _Written:
    written: Any = torch.onnx.export(
        _program(subject), dynamo=True, input_names=["image"], output_names=["logits"], verbose=False
    )  # fmt: skip
    opset = _save_onnx(written.model_proto, subject, path)
    return _Written(_session(path), [f"opset {opset}; classes and normalisation: its metadata"])


def _write_int8(subject: _Subject, path: Path) -> _Written:
    """The products with weights in 8 bits, by channel, activations as each batch has them: no calibration is needed.

    The stem's convolution and the attention stay as they are. ``reduce_range``: 7 bits, for processors whose 8-bit products
    saturate (before AVX512-VNNI).
    """
    import onnx
    from onnxruntime import quantization

    plain, prepared = path.with_name("plain.onnx"), path.with_name("prepared.onnx")
    _write_onnx(subject, plain)
    quantization.shape_inference.quant_pre_process(plain, prepared, skip_symbolic_shape=True)
    quantization.quantize_dynamic(
        prepared, path, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True, reduce_range=True,
        weight_type=quantization.QuantType.QInt8,
    )  # fmt: skip
    opset = _save_onnx(onnx.load(path), subject, path)
    times = plain.stat().st_size / path.stat().st_size
    notes = [f"opset {opset}; classes and normalisation: its metadata", f"{times:.1f} times smaller than in float32"]
    return _Written(_session(path), notes)


def _save_onnx(proto: Any, subject: _Subject, path: Path) -> int:
    """Write the file with what is known about its classes and images; returns its opset."""
    import onnx

    for part in (proto.graph, *proto.graph.node):
        del part.metadata_props[:]  # the exporter's notes
    del proto.graph.value_info[:]  # shapes that every reader infers, and that do not survive a weight's transposition
    onnx.helper.set_model_props(proto, _as_strings(subject.about))
    onnx.save(proto, path)
    return next(opset.version for opset in proto.opset_import if opset.domain in ("", "ai.onnx"))


def _session(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"image": images.numpy()})[0])


# ---- Hugging Face's folder ----


def _write_huggingface(subject: _Subject, path: Path) -> _Written:
    model, about = subject.model, subject.about
    architecture, arguments, beyond = _in_timm(model)
    normal = {name: value for name, value in about.items() if name != "classes"}
    config = {
        "architecture": architecture,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "global_pool": model.global_pool,
        "model_args": arguments,
        **({"label_names": about["classes"]} if "classes" in about else {}),
        "pretrained_cfg": {
            **normal, "num_classes": model.num_classes, "fixed_input_size": True, "pool_size": None, "custom_load": False,
            "first_conv": "pixel_embed.proj", "classifier": "head", "license": "apache-2.0",
        },
    }  # fmt: skip
    path.mkdir()
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    safetensors.torch.save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    (path / "README.md").write_text(_card(subject, architecture, beyond), "utf-8")
    weights: dict[str, Any] = {"pretrained": True} if _READS_FOLDERS else {"checkpoint_path": str(path / "model.safetensors")}
    loaded = timm.create_model(f"local-dir:{path}", **weights).to(model.cls_token).eval()
    note = f"it is timm's {architecture}"
    if beyond:
        note = f"timm cannot build {', '.join(beyond)}: it loads after import tnt_fast, as {architecture}"
    return _Written(loaded, [note])


def _in_timm(model: TNT) -> tuple[str, dict[str, Any], list[str]]:
    """The name of an architecture, its arguments, and which of them timm does not have.

    The name is timm's own if there are none: of TNT-Ti, which timm lacks, that of TNT-S with other sizes.
    """
    ours = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    legacy = model.pixel_embed.legacy
    fallback = "tnt_fast_s_legacy_patch16_224" if legacy else "tnt_fast_s_patch16_224"
    ours = ours if ours in timm.list_models("tnt_fast_*") and ("legacy" in ours) == legacy else fallback
    arguments = _arguments(model)
    extra = [p.name for p in inspect.signature(TNT).parameters.values() if p.kind is p.KEYWORD_ONLY]
    own = {name: inspect.signature(TNT).parameters[name].default for name in extra}
    beyond = [f"{name}={arguments[name]!r}" for name in extra if name in arguments and arguments[name] != own[name]]
    if not beyond and ours.replace("tnt_fast_", "tnt_") not in timm.list_models("tnt_*"):
        ours = fallback
    left_out = ["num_classes", *([] if beyond else extra)]  # which has a place of its own in the folder
    arguments = {name: value for name, value in arguments.items() if name not in left_out}
    return (ours if beyond else ours.replace("tnt_fast_", "tnt_")), arguments, beyond


def _arguments(model: TNT) -> dict[str, Any]:
    """The arguments of ``TNT`` that shape its weights and outputs, as a model has them."""
    embed, blocks = model.pixel_embed, cast(Sequence[Any], model.blocks)
    inner = next((block for block in blocks if block.has_inner), None)
    inner_at, first = [i for i, block in enumerate(blocks) if block.has_inner], blocks[0]
    return {
        "img_size": embed.img_size,
        "patch_size": embed.patch_size,
        "in_chans": model.in_chans,
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "embed_dim": model.embed_dim,
        "inner_dim": embed.in_dim,
        "depth": len(blocks),
        "num_heads_inner": inner.attn_in.num_heads if inner else 1,
        "num_heads_outer": first.attn_out.num_heads,
        "mlp_ratio": _ratio(first.mlp.fc1.out_features, model.embed_dim),
        "qkv_bias": first.attn_out.qk.bias is not None,
        "first_stride": embed.stride,
        "legacy": embed.legacy,
        "inner_blocks": None if len(inner_at) == len(blocks) else inner_at,
        "inner_mlp_ratio": _ratio(inner.mlp_in.fc1.out_features, embed.in_dim) if inner else 4.0,
        "patch_stride": None if embed.patch_stride == embed.patch_size else embed.patch_stride,
        "use_pixel_pos": model.pixel_pos is not None,
        "use_patch_pos": model.patch_pos is not None,
        "use_patch_embed": model.patch_embed is not None,
        "se_ratio": _ratio(first.se_layer.fc[1].out_features, model.embed_dim) if first.has_se else 0.0,
    }


def _ratio(hidden: int, width: int) -> float:
    """Of which ``int(width * ratio)`` is hidden, whatever the division rounds away."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def _card(subject: _Subject, architecture: str, beyond: list[str]) -> str:
    """The folder's README.md, with the header that Hugging Face reads."""
    model, about = subject.model, subject.about
    channels, height, width = about["input_size"]
    numbers = {name: ", ".join(f"{x:g}" for x in about[name]) for name in ("mean", "std") if name in about}
    crop = f", crop {about['crop_pct']:g}" if "crop_pct" in about else ""
    accuracy = "not known" if subject.accuracy is None else f"{subject.accuracy:.2%} top-1 of the images that training held out"
    imports = "import tnt_fast  # registers the architecture with timm\n" if beyond else ""
    needs = f" timm alone cannot build {', '.join(beyond)}: install tnt_fast, too." if beyond else ""
    return f"""---
tags: [image-classification, timm, tnt]
library_name: {"tnt_fast" if beyond else "timm"}
pipeline_tag: image-classification
license: apache-2.0
---
# {architecture}, {model.num_classes:,} classes

A Transformer in Transformer (TNT), exported by tnt_fast.{needs}

| | |
| --- | --- |
| parameters | {sum(p.numel() for p in model.parameters()):,} |
| image | {channels} × {height} × {width}, {about.get("interpolation", "bicubic")}{crop} |
| mean; deviation | {numbers.get("mean", "not known")}; {numbers.get("std", "not known")} |
| classes | {model.num_classes:,}{", named in config.json (`label_names`)" if "classes" in about else ""} |
| accuracy | {accuracy} |

```python
import timm
{imports}
model = timm.create_model("local-dir:THIS_FOLDER", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
logits = model(transform(image).unsqueeze(0))  # image: of PIL, RGB
```

The architecture and its code are licensed under Apache-2.0 (timm, tnt_fast). Data and weights that this model began with may
ask for more: change `license` above if they do.

```bibtex
@inproceedings{{han2021transformer,
  title={{Transformer in Transformer}},
  author={{Han, Kai and Xiao, An and Wu, Enhua and Guo, Jianyuan and Xu, Chunjing and Wang, Yunhe}},
  booktitle={{Advances in Neural Information Processing Systems}}, year={{2021}}
}}
```
"""


# ---- all of them ----


class _Target(NamedTuple):
    what: str
    ending: str  # of a file; none: a folder
    by_onnx: bool
    on_cpu: bool  # whatever the model is on: it has no device, or is run there to compare it
    write: Callable[[_Subject, Path], _Written]
    load: str


_READS_FOLDERS = tuple(map(int, timm.__version__.split(".")[:3])) >= (1, 0, 26)  # before, with safetensors inside it fails
_WEIGHTS = "pretrained=True" if _READS_FOLDERS else "checkpoint_path='{path}/model.safetensors'"
_FOLDER = f"timm.create_model('local-dir:{{path}}', {_WEIGHTS}).eval()"
_SESSION = "onnxruntime.InferenceSession({path!r}).run(None, {{'image': images}})"
TARGETS = {
    "onnx": _Target("ONNX", ".onnx", True, True, _write_onnx, _SESSION),
    "pt2": _Target("torch.export", ".pt2", False, False, _write_pt2, "torch.export.load({path!r}).module()(images)"),
    "aoti": _Target(
        "an AOTInductor package", ".pt2", False, False, _write_aoti, "torch._inductor.aoti_load_package({path!r})(images)"
    ),
    "huggingface": _Target("a Hugging Face folder", "", False, True, _write_huggingface, _FOLDER),
    "int8": _Target("ONNX in 8 bits", ".onnx", True, True, _write_int8, _SESSION),
}
