"""What is exported computes what the model computes, in a process without tnt_fast; what cannot be is said."""

import contextlib
import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY, perturb, relative_error
from PIL import Image
from safetensors.torch import load_file

import tnt_fast
from tnt_fast import TNT, dispatch, export, export_model, optimize_for_inference
from tnt_fast.checkpoints import FORMAT, save_checkpoint
from tnt_fast.cli import main
from tnt_fast.data import evaluation_transform
from tnt_fast.variants import create_tnt, load_tnt

pytestmark = pytest.mark.filterwarnings("ignore:tnt_fast takes the reference path")
ROOT = Path(__file__).resolve().parents[1]
SIZES = {**TINY, "depth": 1}
CLASSES = ["ant", "bee", "cat", "dog", "eel"]
DATA_CONFIG = {
    "input_size": (3, 32, 32), "interpolation": "bilinear", "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), "crop_pct": 0.8,
    "crop_mode": "squash",
}  # fmt: skip
ABOUT = json.loads(json.dumps({**DATA_CONFIG, "classes": CLASSES}))  # with lists
PAGE = (ROOT / "docs" / "exporting.md").read_text("utf-8")


def made(**kwargs) -> TNT:
    """A tiny model whose weights are no zeros and ones, the same each time."""
    torch.manual_seed(0)
    return perturb(create_tnt("tnt_s_patch16_224", **{**SIZES, **kwargs}), 0.2).eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """As 'tnt-fast train' writes it."""
    path = tmp_path_factory.mktemp("run") / "best.pt"
    save_checkpoint(
        {
            "format": FORMAT, "model": "tnt_fast_s_patch16_224", "model_kwargs": SIZES, "state_dict": made().state_dict(),
            "classes": CLASSES, "data_config": DATA_CONFIG, "grid_size": (2, 2), "epoch": 3, "accuracy": 0.875,
        },
        path,
    )  # fmt: skip
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory, model) -> Path:
    """Ten images of those that the model is surest of, in the folders of the classes that it takes them for."""
    root, transform = tmp_path_factory.mktemp("data"), evaluation_transform(DATA_CONFIG)
    for name in CLASSES:
        (root / name).mkdir()
    drawn = np.random.default_rng(0).integers(0, 255, (50, 4, 4, 3)).astype(np.uint8).repeat(8, 1).repeat(8, 2)
    with torch.no_grad():
        top = model(torch.stack([transform(Image.fromarray(pixels)) for pixels in drawn])).topk(2)
    for i in (top.values[:, 0] - top.values[:, 1]).topk(10).indices.tolist():
        Image.fromarray(drawn[i]).save(root / CLASSES[top.indices[i, 0]] / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def model(checkpoint) -> TNT:
    return load_tnt(weights=checkpoint).model.eval()


def export_as_the_page(target: str, checkpoint: str, folder: Path, **given: str) -> tuple[Path, str]:
    """Run the page's command for a target with another checkpoint, into another folder; what it wrote, and what it said."""
    line = next(line for line in PAGE.splitlines() if line.startswith("tnt-fast export ") and f"--to {target} " in line)
    argv = shlex.split(line)[1:]
    given |= {"--checkpoint": checkpoint, "--out": str(folder / argv[argv.index("--out") + 1])}
    for option, value in given.items():
        argv[argv.index(option) + 1] = value
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(argv) == 0
    return Path(given["--out"]), printed.getvalue()


@pytest.fixture(scope="module")
def as_the_page(checkpoint, data, tmp_path_factory) -> dict[str, tuple[Path, str]]:
    """What the page's commands write and say, but for aoti."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("exported")
    targets = {"onnx": {}, "pt2": {}, "huggingface": {}, "int8": {"--data": str(data)}}
    return {target: export_as_the_page(target, checkpoint, folder, **given) for target, given in targets.items()}


@pytest.fixture
def exported(as_the_page) -> dict[str, Path]:
    return {target: path for target, (path, _) in as_the_page.items()}


@pytest.fixture
def said(as_the_page) -> dict[str, str]:
    return {target: text for target, (_, text) in as_the_page.items()}


def fresh(code: str, *arguments: object) -> str:
    """What a process prints that finds tnt_fast nowhere, and never has it."""
    before = "import sys; sys.path = [p for p in sys.path if p]; import torch; torch.set_num_threads(1); "
    run = subprocess.run(
        [sys.executable, "-c", f"{before}{code}; assert 'tnt_fast' not in sys.modules", *map(str, arguments)],
        capture_output=True, text=True, cwd="/", env={**os.environ, "PYTHONPATH": ""}, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stdout


def said_to_load(text: str) -> str:
    (line,) = [line.removeprefix("load: ") for line in text.splitlines() if line.startswith("load: ")]
    return line


def images(batch: int = 7) -> torch.Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def test_every_target_is_written_and_left_without_a_trace_of_the_way(exported):
    files = sorted(path.name for path in exported["onnx"].parent.iterdir())
    assert files == sorted(path.name for path in exported.values())
    assert sorted(path.name for path in exported["huggingface"].iterdir()) == list(export.FOLDER)
    for path in exported.values():
        for file in [path] if path.is_file() else path.iterdir():
            assert str(ROOT).encode() not in file.read_bytes()  # no folder of this machine


@pytest.mark.parametrize("batch", [1, 7])
def test_onnx_computes_the_model_for_any_batch(exported, model, batch):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(exported["onnx"], providers=["CPUExecutionProvider"])
    found = session.run(None, {"image": images(batch).numpy()})[0]
    assert relative_error(torch.from_numpy(found), model(images(batch)).detach()) <= 1e-5
    about = session.get_modelmeta().custom_metadata_map
    assert {name: json.loads(value) for name, value in about.items()} == ABOUT
    assert [(i.name, i.shape[1:]) for i in session.get_inputs()] == [("image", [3, 32, 32])]


def test_int8_is_near_and_smaller_and_says_what_it_is_of(exported, model):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(exported["int8"], providers=["CPUExecutionProvider"])
    found = session.run(None, {"image": images().numpy()})[0]
    error = relative_error(torch.from_numpy(found), model(images()).detach())
    assert 1e-5 < error < 0.1
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == CLASSES
    operations = {node.op_type for node in pytest.importorskip("onnx").load(exported["int8"]).graph.node}
    assert "MatMulInteger" in operations


def test_torch_export_and_the_folder_load_in_a_process_without_tnt_fast(exported, said, model, tmp_path):
    torch.save(images(), tmp_path / "images.pt")
    code = (
        "import json, timm; images = torch.load(sys.argv[1]); p = eval(sys.argv[3]); t = eval(sys.argv[4]); "
        "torch.save([p, t(images).detach()], sys.argv[2]); extra = {'about.json': ''}; "
        "torch.export.load(sys.argv[5], extra_files=extra); config = timm.data.resolve_model_data_config(t); "
        "print(json.dumps([json.loads(extra['about.json']), config, t.pretrained_cfg['label_names']]))"
    )
    files = (tmp_path / "images.pt", tmp_path / "out.pt")
    found = fresh(code, *files, said_to_load(said["pt2"]), said_to_load(said["huggingface"]), exported["pt2"])
    about, config, names = json.loads(found)
    assert about == ABOUT
    assert {**config, "classes": names} == ABOUT
    for outputs in torch.load(files[1]):
        assert relative_error(outputs, model(images()).detach()) <= 1e-5


@pytest.mark.slow
def test_an_aotinductor_package_runs_in_a_process_without_tnt_fast(checkpoint, model, tmp_path):
    from torch._inductor import config

    # /proc/cpuinfo's word is enough, each trial is a process more; headers are read once
    with config.patch({"cpp.vec_isa_ok": True, "aot_inductor.precompile_headers": False}):
        try:
            export.check("aoti", tmp_path / "a.pt2")
        except RuntimeError as error:
            pytest.skip(f"needs a C++ compiler: {error}")
        package, text = export_as_the_page("aoti", checkpoint, tmp_path)
    assert "built for cpu" in text
    torch.save(images(), tmp_path / "images.pt")
    code = (
        "import torch._inductor, json; seven = torch.load(sys.argv[1]); "
        "torch.save([eval(sys.argv[3]) for images in (seven, seven[:1])], sys.argv[2]); "
        "print(json.dumps(torch._inductor.aoti_load_package(sys.argv[4]).get_metadata()))"
    )
    about = json.loads(fresh(code, tmp_path / "images.pt", tmp_path / "out.pt", said_to_load(text), package))
    assert {name: json.loads(about[name]) for name in ABOUT} == ABOUT
    expected = model(images()).detach()
    for found in torch.load(tmp_path / "out.pt"):
        assert relative_error(found, expected[: len(found)]) <= 1e-5


def test_a_fused_program_holds_the_operations_and_says_what_it_needs(model, tmp_path):
    if dispatch.why_not_fused(made(backend="fused"), images()):
        pytest.skip("needs Triton")
    found = export_model(model, "pt2", tmp_path / "a.pt2", backend="fused")
    assert any("import tnt_fast before" in note for note in found.notes)
    program = torch.export.load(found.path)
    held = {str(node.target) for node in program.graph.nodes if "tnt_fast" in str(node.target)}
    assert held == {f"tnt_fast.{name}.default" for name in ("pixel_embed", "fold", "block")}
    assert relative_error(program.module()(images(3)), model(images(3)).detach()) <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize(("to", "ending"), [("onnx", ".onnx"), ("pt2", ".pt2"), ("huggingface", "")])
def test_a_model_on_a_gpu_is_exported_as_one_on_a_cpu(to, ending, tmp_path):
    model = made().cuda()
    found = export_model(model, to, tmp_path / f"a{ending}", tolerance=1e-3)  # products may be TF32's
    assert found.path.exists()
    assert model.cls_token.is_cuda


# ---- the folder ----


@pytest.mark.parametrize(
    ("kwargs", "architecture"),
    [
        (dict(legacy=True), "tnt_s_legacy_patch16_224"),
        (dict(img_size=(32, 48), qkv_bias=True, mlp_ratio=3.0, num_heads_inner=3, global_pool="avg"), "tnt_s_patch16_224"),
        (dict(first_stride=8, in_chans=1, num_classes=0), "tnt_s_patch16_224"),
        (dict(inner_blocks=(), inner_mlp_ratio=2.0), "tnt_fast_s_patch16_224"),
        (dict(se_ratio=0.3, use_patch_pos=False, patch_stride=8), "tnt_fast_s_patch16_224"),
    ],
    ids=str,
)
def test_a_folder_names_timms_architecture_where_timm_has_it(kwargs, architecture, tmp_path):
    model = made(**kwargs)
    found = export_model(model, "huggingface", tmp_path / "folder")
    config = json.loads((found.path / "config.json").read_text())
    assert config["architecture"] == architecture
    card = (found.path / "README.md").read_text()
    beyond = architecture.startswith("tnt_fast")
    assert any("import tnt_fast" in text for text in (card, *found.notes)) == beyond
    assert found.difference <= 1e-5
    again = load_tnt(weights=found.path, num_classes=model.num_classes).model.eval()
    image = torch.randn(2, model.in_chans, *model.pixel_embed.img_size)
    assert relative_error(again(image), model(image).detach()) <= 1e-6
    assert load_file(found.path / "model.safetensors").keys() == model.state_dict().keys()


def test_a_ti_is_timms_s_with_other_sizes(tmp_path):
    ti = create_tnt("tnt_ti_patch16_224", img_size=32, depth=1).eval()
    found = export_model(ti, "huggingface", tmp_path / "folder", data_config=None)
    config = json.loads((found.path / "config.json").read_text())
    assert config["architecture"] == "tnt_s_patch16_224"
    assert config["model_args"]["embed_dim"] == 192
    assert config["pretrained_cfg"]["mean"] == [0.5, 0.5, 0.5]


def test_a_card_says_how_good_the_checkpoint_is(exported, checkpoint, tmp_path, capsys):
    assert "87.50% top-1" in (exported["huggingface"] / "README.md").read_text()
    argv = ["export", "--checkpoint", checkpoint, "--to", "huggingface", "--out", str(tmp_path / "other")]
    assert main([*argv, "--model-kwargs", "img_size=48"]) == 0  # another model than the one that was measured
    assert "| accuracy | not known |" in (tmp_path / "other" / "README.md").read_text()


# ---- int8's accuracy ----


def test_the_command_says_what_int8_loses_on_labelled_images(exported, said):
    assert "top-1 of 10 images: 100.00% → 100.00%, the same answer for 100.00%" in said["int8"]


@pytest.fixture
def spoilt(monkeypatch):
    """int8 as a function of the logits."""

    def spoil(change):
        wrong = export.TARGETS["int8"]._replace(by_onnx=False, write=lambda s, path: (path.touch(), written(s))[1])
        written = lambda s: export._Written(lambda x: change(s.model(x)), [])  # noqa: E731
        monkeypatch.setitem(export.TARGETS, "int8", wrong)

    return spoil


def test_int8_that_loses_more_than_it_may_is_not_written(model, tmp_path, spoilt):
    answers = model(images(4)).argmax(-1)
    order = torch.argsort(model(images(4))[0])
    examples = [(images(4)[:3], answers[:3]), (images(4)[3:], answers[3:])]

    def swapped(logits):  # the first image of seven or four takes the second best
        logits = logits.clone()
        if len(logits) == 3:
            logits[0, order[-2]] = logits[0, order[-1]] + 1e-3
        return logits

    spoilt(swapped)
    said = "top-1 of 4 images: 100.00% → 75.00%, the same answer for 75.00%"
    with pytest.raises(ValueError, match=f"loses more than the 1 points of --most-lost, so it was not written: {said}"):
        export_model(model, "int8", tmp_path / "a.onnx", examples=examples)
    assert list(tmp_path.iterdir()) == []
    found = export_model(model, "int8", tmp_path / "a.onnx", examples=examples, most_lost=25)
    assert found.notes == [said]
    with pytest.raises(ValueError, match="no examples"):
        export_model(model, "int8", tmp_path / "b.onnx", examples=[])
    spoilt(lambda logits: logits * 1.01)
    with pytest.raises(ValueError, match=r"int8: its logits differ .* more than the 0.001"):
        export_model(model, "int8", tmp_path / "b.onnx", tolerance=1e-3)
    assert "not compared" in export_model(model, "int8", tmp_path / "a.onnx", overwrite=True).notes[-1]


def test_an_image_that_cannot_be_read_ends_the_comparison(checkpoint, tmp_path, spoilt, capsys):
    spoilt(lambda logits: logits)
    (tmp_path / "data" / "ant").mkdir(parents=True)
    (tmp_path / "data" / "ant" / "0.png").write_bytes(b"none")
    argv = ["export", "--checkpoint", checkpoint, "--to", "int8", "--out", str(tmp_path / "a.onnx")]
    assert main([*argv, "--data", str(tmp_path / "data")]) == 2
    assert "0.png" in capsys.readouterr().err
    assert not (tmp_path / "a.onnx").exists()


# ---- what cannot be ----


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--to", "onnxx", "--out", "a.onnx"], "'onnxx' is unknown; nearest: onnx; accepted: onnx, pt2, aoti, "),
        (["--to", "onnx", "--out", "a.pt2"], "must end in .onnx"),
        (["--to", "onnx", "--out", "no/a.onnx"], "there is no directory"),
        (["--to", "pt2", "--out", "file/a.pt2"], "there is no directory"),
        (["--to", "pt2", "--out", "there.pt2"], "is there already; choose another --out, or replace it with --overwrite"),
        (["--to", "huggingface", "--out", "file"], "is a file, and a Hugging Face folder a folder"),
        (["--to", "huggingface", "--out", "mine", "--overwrite"], "holds 'thesis.txt', which no export wrote"),
        (["--to", "onnx", "--out", "a.onnx", "--backend", "fused"], "onnx has no place for the fused operations"),
        (["--to", "pt2", "--out", "a.pt2", "--backend", "auto"], "accepted: reference, or with pt2 and aoti fused"),
        (["--to", "pt2", "--out", "a.pt2", "--model-kwargs", "img_size=50"], "50"),
        (["--to", "pt2", "--out", "a.pt2", "--data", "x"], "--data is for int8"),
        (["--to", "int8", "--out", "a.onnx", "--tolerance", "-1"], "--tolerance -1.0 must be 0 or more"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_is_said_in_a_line_before_anything_is_written(argv, message, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("there.pt2").touch()
    Path("mine").mkdir()
    Path("mine/thesis.txt").touch()
    assert main(["export", "--checkpoint", checkpoint, *argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert sorted(path.name for path in Path().rglob("*")) == ["file", "mine", "there.pt2", "thesis.txt"]


@pytest.mark.parametrize("target", ["onnx", "int8"])
@pytest.mark.parametrize("package", ["onnxruntime", "onnxscript"])
def test_a_package_that_is_missing_is_named_with_the_line_that_installs_it(package, target, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["export", "--checkpoint", "not-read.pt", "--to", target, "--out", str(tmp_path / "a.onnx")]) == 2
    line = capsys.readouterr().err.strip()
    assert line.endswith('pip install "tnt_fast[export]"')
    assert package in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_package_is_refused_where_there_is_no_gpu(checkpoint, tmp_path, capsys):
    argv = ["export", "--checkpoint", checkpoint, "--to", "aoti", "--out", str(tmp_path / "a.pt2"), "--device", "cuda"]
    assert main(argv) == 2
    assert "only on a machine with one" in capsys.readouterr().err


def test_without_a_compiler_that_is_said(tmp_path, monkeypatch):
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def missing():
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    with pytest.raises(RuntimeError, match=r"install g\+\+ or clang\+\+"):
        export.check("aoti", tmp_path / "a.pt2")


def test_models_that_are_no_plain_ones_are_refused_with_the_reason(tmp_path):
    def refused(kind, message, model, to="pt2"):
        with pytest.raises(kind, match=message):
            export_model(model, to, tmp_path / ("folder" if to == "huggingface" else "a.onnx" if to == "onnx" else "a.pt2"))

    refused(TypeError, r"OptimizedTNT; .* export the model that it was made of", optimize_for_inference(made()))
    refused(TypeError, r"OptimizedModule", torch.compile(made()))
    refused(ValueError, r"the model is in training mode; call model.eval", made().train())
    refused(ValueError, r"cast it with model.float", made().bfloat16(), "onnx")
    refused(ValueError, r"on the device 'meta'", made(device="meta"))
    hooked = made()
    hooked.blocks[0].mlp.register_forward_hook(lambda *_: None)
    refused(ValueError, r"blocks.0.mlp has hooks", hooked)
    changed = made()
    changed.blocks[0].mlp.act = torch.nn.ReLU().eval()
    refused(ValueError, r"this one was changed: blocks.0.mlp.act is a torch.nn.modules.activation.ReLU", changed, "huggingface")
    assert list(tmp_path.iterdir()) == []
    found = export_model(changed, "pt2", tmp_path / "a.pt2")  # a graph has whatever the model computes
    assert relative_error(torch.export.load(found.path).module()(images()), changed(images()).detach()) <= 1e-5


def test_what_differs_is_not_written_and_what_was_there_stays(model, tmp_path, monkeypatch):
    path = tmp_path / "a.pt2"
    path.write_bytes(b"before")
    wrong = export.TARGETS["pt2"]._replace(write=lambda subject, path: export._Written(lambda x: subject.model(x) * 1.001, []))
    monkeypatch.setitem(export.TARGETS, "pt2", wrong)
    with pytest.raises(ValueError, match="logits differ from the model's by 0.001 of the largest, more than the 1e-05"):
        export_model(model, "pt2", path, overwrite=True)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_exporting_leaves_the_model_as_it_is(model, tmp_path):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    backend, asked = model.backend, [p.requires_grad for p in model.parameters()]
    for _ in range(2):
        export_model(model, "huggingface", tmp_path / "folder", overwrite=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (model.backend, [p.requires_grad for p in model.parameters()]) == (backend, asked)
    assert "export_model" in tnt_fast.__all__
