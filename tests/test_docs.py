"""The pages say what is there: the API's lists what is public, and nothing else (``make docs`` renders it and fails where a
name is not there); every command and every line of Python on a page runs."""

import csv
import importlib
import inspect
import io
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from multiprocessing import set_forkserver_preload
from multiprocessing.forkserver import ensure_running
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch

import tnt_fast
from tnt_fast import cli, dispatch, export, reference

ROOT = Path(__file__).resolve().parents[1]
LISTED = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text("utf-8"), re.M)


def test_the_api_page_lists_every_public_name_once():
    own = [name for name, x in inspect.getmembers(reference, callable) if getattr(x, "__module__", None) == reference.__name__]
    fused = [path.stem for path in (ROOT / "kernels").glob("*.py") if path.stem in (*dispatch.OPERATIONS, "block")]
    public = [f"tnt_fast.{name}" for name in tnt_fast.__all__]
    public += [f"tnt_fast.reference.{name}" for name in own if not name.startswith("_")]
    public += [f"tnt_fast.kernels.{name}.{name}" for name in fused]
    assert sorted(LISTED) == sorted(public)


def test_what_is_public_in_python_says_what_it_does():
    owners = [(tnt_fast, tnt_fast.__all__), (reference, [*dispatch.OPERATIONS, "block"]), (tnt_fast.TNT, ["forward_features"])]
    assert [f"{owner.__name__}.{name}" for owner, names in owners for name in names if not getattr(owner, name).__doc__] == []


def test_the_page_on_the_command_names_every_command():
    beginning = (ROOT / "docs" / "using.md").read_text("utf-8").partition("\n## ")[0]
    assert [name for name in cli._parser()[1] if not re.search(rf"`{name}`|tnt-fast {name} ", beginning)] == []


def test_every_page_is_in_the_navigation():
    pages = [f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")]
    listed = re.findall(r"^  - .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.M)
    assert sorted(page for page in listed if page.startswith("docs/")) == sorted(pages)
    assert [page for page in listed if not (ROOT / page).is_file()] == []


def test_the_sizes_on_the_kernels_page_are_the_kernels_own():
    pytest.importorskip("triton")
    from tnt_fast.kernels import OPERATIONS, operation

    text = (ROOT / "docs" / "kernels.md").read_text("utf-8")
    for name, kernel in OPERATIONS.items():
        (row,) = re.findall(rf"^\| `{name}` \| (.*≤.*) \|$", text, re.M)
        told = {size.replace("·", "*"): int(most.replace(",", "")) for size, most in re.findall(r"(\S+) ≤ ([\d,]+)", row)}
        assert told == {size: most for size, most in kernel.limits.items() if most != operation.MOST_ROWS}
    assert operation.MOST_ROWS == 2**30
    assert "C ≤ 63 (31 in float32), S ≤ 16 and M ≤ 256" in text
    sizes, device = dict(S=16, C=24, M=96, H=4), torch.device("cpu")
    for size, most, dtype in (("C", 63, torch.bfloat16), ("C", 31, torch.float32), ("S", 16, None), ("M", 256, None)):
        dtype = dtype or torch.bfloat16
        limited = [OPERATIONS["inner"].gradients_unsupported(sizes | {size: x}, dtype, device) for x in (most, most + 1)]
        assert [any("the backward takes" in reason for reason in reasons) for reasons in limited] == [False, True]


# ---- every command runs, in small ----

PAGES = [
    page
    for page in ("README.md", "examples/README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
    if re.search(r"^```(sh|python)$", (ROOT / page).read_text("utf-8"), re.M)
]

SLOW = ("docs/scaling.md", "docs/exporting.md")

# What a command is given besides what its page says; of an option given twice the last counts.
CUT = {
    "train": "--epochs 1 --workers 0 --threads 1 --device cpu",
    **dict.fromkeys(
        ("train --preset", "train --config"),
        "--epochs 1 --batch-size 2 --global-batch 2 --model-kwargs img_size=64 --workers 0 --threads 1 --device cpu",
    ),
    "train --freeze-blocks": "--freeze-blocks 1 --epochs 1 --workers 0 --threads 1 --device cpu",
    "train --resume": "--epochs 2 --workers 0 --threads 1 --device cpu",
    "ablate": "--grid positions=none --seeds 1 --epochs 1 --processes 1 --workers 0 --threads 1 --device cpu",
    "classify": "--device cpu",
    "validate": "--device cpu",
    "visualize": "--blocks 1 2 --device cpu",
    "bench": "--device cpu --seconds 0.1 --batch-size 1",
    "examples/detection.py": "--epochs 1 --images 8 --channels 32 --size 64 96 --device cpu",
    "examples/segmentation.py": "--epochs 1 --images 8 --channels 32 --size 64 96 --device cpu",
    "examples/knn.py": "--k 1 --device cpu",
    "examples/lora.py": "--epochs 1 --workers 0 --device cpu",
    "examples/server.py": "--device cpu",
}

# Every named variant is this one, and hosted weights are random ones of it.
SMALL = dict(img_size=64, depth=2, embed_dim=24, inner_dim=6, num_heads_inner=2, num_heads_outer=3)

# Not run: lines with this in them, and why. Options of tnt-fast are checked nevertheless.
NOT_RUN = {
    r"export .*--to (aoti|int8) --out": "tests/test_export.py runs the line, and what it takes is enough once",
    r"export .*--device cuda": "a GPU is needed",
    r"^torchrun --nnodes": "machines that find each other are needed",
    r"^make ": "a target, which has to be there; CI calls them",
    r"^pip install ": "its extras have to be there; no test installs anything",
}

# What the Python of a page begins with.
NAMES = {"images": np.random.default_rng(0).standard_normal((3, 3, 64, 64), np.float32)}

# Pages whose Python says what the named variants' own sizes are, or is run elsewhere.
OWN_SIZES = ("docs/seeing.md",)
RUN_ELSEWHERE = {"docs/gradients.md": "tests/test_gradients.py, which has what its recipes start from"}


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of a page's blocks of commands and of Python, in order."""
    return re.findall(r"^```(sh|python)\n(.*?)^```", (ROOT / page).read_text("utf-8"), re.M | re.S)


def commands(text: str) -> list[str]:
    """The lines of a block, whole where they are continued, without comments."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def words(line: str) -> list[list[str]]:
    """A line as the shell takes it: the words of each command of a pipe, without comments and redirection."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|<>&;")
    lexer.whitespace_split = True
    found: list[list[str]] = [[]]
    tokens = iter(lexer)
    for token in tokens:
        if token == "|":
            found.append([])
        elif token == ">":
            next(tokens)
        else:
            assert not set(token) & set("<&;") or " " in token, f"the shell's {token!r} is not understood here: {line}"
            found[-1].append(token)
    return found


def picture(path: Path, seed: int, color: int) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 100, (40, 48, 3))
    pixels[..., color] += 150
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def photos(folder: Path) -> list[tuple[str, str]]:
    """What the pages name besides what their commands write; (file, label) of photos/."""
    datasets = pytest.importorskip("datasets")
    from test_examples import write_voc

    write_voc(folder / "data")
    named = []
    for color, label in enumerate(("cat", "dog")):
        for i in range(6):
            picture(folder / "photos" / label / f"{i}.jpg", 10 * color + i, color)
            named.append((f"photos/{label}/{i}.jpg", label))
        picture(folder / f"{label}.jpg", 30 + color, color)
        picture(folder / "new" / f"{label}.png", 40 + color, color)
        picture(folder / "more" / label / "1.jpg", 50 + color, color)
        synset = ("n01440764", "n01443537")[color]
        picture(folder / "imagenet" / "val" / synset / "1.jpg", 60 + color, color)
        picture(folder / "imagenet" / "train" / synset / "1.jpg", 65 + color, color)
        picture(folder / "ILSVRC" / "Data" / "CLS-LOC" / "val" / f"ILSVRC2012_val_0000000{color + 1}.JPEG", 70 + color, color)
    picture(folder / "photo.jpg", 80, 0)
    (folder / "shards").mkdir()
    (folder / "tables").mkdir()
    for part, source in (("train", "photos"), ("val", "more")):
        with tarfile.open(folder / "shards" / f"{part}-0000.tar", "w") as shard:
            shard.add(folder / source, "")
    pictures = [{"bytes": (folder / file).read_bytes(), "path": file} for file, _ in named]
    table = datasets.Dataset.from_dict({"image": pictures, "label": [label for _, label in named]})
    table.cast_column("image", datasets.Image()).to_parquet(str(folder / "tables" / "all.parquet"))
    for page in PAGES:  # files that a page shows begin with their names
        for name, text in re.findall(r"^```yaml\n# (\S+)\n(.*?)^```", (ROOT / page).read_text("utf-8"), re.M | re.S):
            (folder / name).write_text(text)
    with open(folder / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([("file", "label"), *named])
    (folder / "LOC_val_solution.csv").write_text(
        "ImageId,PredictionString\nILSVRC2012_val_00000001,n01440764 1 1 9 9\nILSVRC2012_val_00000002,n01443537 1 1 9 9\n"
    )
    return named


def stand_in(patch: pytest.MonkeyPatch) -> None:
    """Small models in place of the named ones, random weights in place of hosted ones, fewer digits; what takes long of a page
    of ``visualize`` is left to tests/test_page.py: pictures beside it, and t-SNE, for which PCA stands in."""
    import timm.models._builder
    from sklearn import datasets, manifold
    from sklearn.decomposition import PCA

    from tnt_fast import page, variants

    create, load_digits, load_pretrained = variants._create, datasets.load_digits, timm.models._builder.load_pretrained

    def small(variant, pretrained, defaults, kwargs):
        return create(variant, False, {**defaults, **SMALL}, kwargs)

    def hosted(name):
        model = None if name.startswith(variants.HUB) else variants.variant(name)
        weights = variants.create_tnt(model or "tnt_fast_s_patch16_224").state_dict()
        return {"state_dict": weights} | ({} if model else {"arch": "tnt_fast_s_patch16_224"}), model, "a stand-in for the hub"

    def from_folders(model, pretrained_cfg=None, **kwargs):
        if pretrained_cfg.get("file"):
            load_pretrained(model, pretrained_cfg=pretrained_cfg, **kwargs)

    def few_digits(**kwargs):
        digits = load_digits(**kwargs)
        for name in ("images", "data", "target"):
            digits[name] = digits[name][:100]
        return digits

    patch.setattr(variants, "_create", small)
    patch.setattr(variants, "_from_hub", hosted)
    patch.setattr(datasets, "load_digits", few_digits)
    patch.setattr(timm.models._builder, "load_pretrained", from_folders)
    patch.setattr(page, "_write_pictures", lambda *args: [])
    patch.setattr(manifold, "TSNE", lambda **kwargs: PCA(2))


def stand_in_for_good() -> None:
    """In the process of a rank."""
    stand_in(pytest.MonkeyPatch())


@pytest.fixture(scope="module")
def stand_ins():
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory, stand_ins) -> Path:
    """A folder with everything that the pages name, also of each other's runs."""
    import timm
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("world")
    photos(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for data, run in (("photos/ --val-fraction 0.2", "mine"), ("digits", "digits")):
            assert cli.main(f"train {data} --out runs/{run} {CUT['train']}".split()) == 0
    digits = folder / "runs" / "digits" / "data" / "val"
    for name in ("3/0045.png", "8/0028.png"):  # of all digits these are held out
        digits.joinpath(name).write_bytes(next(digits.glob("?/*.png")).read_bytes())
    shutil.copytree(folder / "runs" / "digits", folder / "runs" / "digits-vit")
    save_file(timm.create_model("tnt_fast_s_patch16_224").state_dict(), folder / "tnt_s.safetensors")
    torch.save(timm.create_model("deit_small_patch16_224").state_dict(), folder / "deit_s.pth")
    return folder


class Shell:
    """Runs a page's lines in this process."""

    def __init__(self, page: str, monkeypatch):
        self.page, self.monkeypatch, self.server = page, monkeypatch, None

    def __call__(self, line: str) -> None:
        """Raises: AssertionError: it cannot be run here, or does not end well."""
        *sources, argv = words(line)
        self.monkeypatch.undo()
        while re.fullmatch(r"[A-Z_]+=\S*", argv[0]):
            self.monkeypatch.setenv(*argv.pop(0).split("=", 1))
        if why := next((why for pattern, why in NOT_RUN.items() if re.search(pattern, line)), None):
            return self.checked(argv, why)
        for source in sources:
            assert source[0] in ("find", "ls", "cat"), f"what pipes into a command is not known here: {line}"
        if sources:
            made = subprocess.run(line.rpartition("|")[0], shell=True, capture_output=True, check=True).stdout
            self.monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(made)))
        try:
            status = self.run(argv)
        except SystemExit as error:
            status = error.code
        assert status == 0, f"status {status} of this line of {self.page}: {line}"

    def run(self, argv: list[str]) -> int:
        """Its status."""
        if argv[0] == "torchrun":
            size, argv = launched(argv)
            return self.together(cut(argv), size)
        if argv[:2] == ["python", "-m"] and argv[2] in ("tnt_fast", "tnt_fast.cli"):
            argv = ["tnt-fast", *argv[3:]]
        if argv[0] == "tnt-fast":
            return cli.main(cut(argv[1:]))
        if argv[0] == "python" and argv[1] == "examples/server.py":
            return self.serve([*argv[2:], *CUT[argv[1]].split()])
        if argv[0] == "python" and argv[1].startswith("examples/"):
            module = importlib.import_module(Path(argv[1]).stem)
            return module.main([*argv[2:], *CUT[argv[1]].split()])
        if argv[0] == "curl":
            return self.ask(argv[1:])
        raise AssertionError(f"no way to run this line of {self.page} is known: {argv}")

    def together(self, argv: list[str], size: int) -> int:
        """As torchrun would, on two ranks where the page says more."""
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(ROOT)  # where what the ranks are forked from finds the package
            set_forkserver_preload(ranks.PRELOADED)
            ensure_running()
        act = ("calls", __name__, "stand_in_for_good")
        ended = ranks.launch(Path("printed"), argv, min(size, 2), acts={0: act, 1: act})
        for text in (*ended.out, *ended.err):
            print(text)
        return next((code or 1 for code in ended.codes if code != 0), 0)

    def checked(self, argv: list[str], why: str) -> None:
        """As far as can be seen without running it."""
        if argv[0] == "make":
            makefile = (ROOT / "Makefile").read_text("utf-8")
            names = [word for word in argv[1:] if "=" not in word]
            assert all(re.search(rf"^\.PHONY:.* {name}( |$)", makefile, re.M) for name in names), argv
        elif argv[:2] == ["pip", "install"]:
            extras = re.findall(r"tnt_fast\[(.*?)\]|\.\[(.*?)\]", " ".join(argv))
            setup = (ROOT / "setup").with_suffix(".py").read_text("utf-8")
            names = [name for pair in extras for part in pair if part for name in part.split(",")]
            assert all(f'"{name}": ' in setup for name in names), argv
        else:
            assert argv[0] in ("tnt-fast", "torchrun"), (argv, why)
            assert cli._parsed(argv[1:] if argv[0] == "tnt-fast" else launched(argv)[1]), argv

    def serve(self, argv: list[str]) -> int:
        """Start the server of examples/, which later lines ask, without a network."""
        from fastapi.testclient import TestClient

        server = importlib.import_module("server")
        self.server = TestClient(server.application(server.options().parse_args(argv)))
        return 0

    def ask(self, argv: list[str]) -> int:
        body = next((Path(file[1:]).read_bytes() for flag, file in zip(argv, argv[1:]) if flag == "--data-binary"), None)  # noqa: B905
        assert self.server, "nothing was started that could be asked"
        with self.server as client:
            return 0 if client.request("GET" if body is None else "POST", f"http://{argv[-1]}", content=body).is_success else 1


def launched(argv: list[str]) -> tuple[int, list[str]]:
    """Of a line of torchrun: the number of ranks, and the arguments of tnt-fast."""
    from torch.distributed.run import get_args_parser

    launch = get_args_parser().parse_args(argv[1:])
    assert launch.module, f"torchrun without -m: {argv}"
    assert launch.training_script in ("tnt_fast", "tnt_fast.cli"), argv
    machines, local = launch.nnodes.split(":")[-1], launch.nproc_per_node  # "1:4", "gpu"
    return int(machines) * (int(local) if local.isdigit() else 2), launch.training_script_args


def cut(argv: list[str]) -> list[str]:
    """The arguments of tnt-fast, cut down. A page's run begins anew where another page's lies."""
    args = cli._parsed(argv)
    resumed = getattr(args, "resume", False)
    if argv[0] in ("train", "ablate") and not resumed and args.out.exists():
        shutil.rmtree(args.out)
    special = next(
        (f"{argv[0]} {option}" for option in ("--resume", "--preset", "--config", "--freeze-blocks") if option in argv), argv[0]
    )
    return [*argv, *CUT.get(special, CUT.get(argv[0], "")).split()]


@pytest.mark.filterwarnings("ignore:tnt_fast takes the reference path", "ignore::DeprecationWarning:triton")
@pytest.mark.parametrize("page", [pytest.param(page, marks=[pytest.mark.slow] if page in SLOW else []) for page in PAGES])
def test_what_a_page_says_runs(page, world, tmp_path, monkeypatch):
    pytest.importorskip("fastapi")
    if page == "docs/exporting.md" and not export._READS_FOLDERS:
        pytest.skip("timm before 1.0.26 reads no folder with safetensors inside")
    folder = shutil.copytree(world, tmp_path / "world")
    with pytest.MonkeyPatch.context() as of_line, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shell, names = Shell(page, of_line), {"__name__": "page", **NAMES}
        for language, text in blocks(page):
            if language == "sh":
                for line in commands(text):
                    shell(line)
            elif page not in RUN_ELSEWHERE:
                if page in OWN_SIZES:
                    patch.setattr(sys.modules[__name__], "SMALL", {})
                exec(compile(text, page, "exec"), names)


def test_no_command_stands_in_a_block_that_is_not_run():
    begin = ("tnt-fast ", "torchrun ", "python ", "make ", "pip ", "curl ")
    for page in ("README.md", "CONTRIBUTING.md", *PAGES):
        others = [
            block for block in ("\n" + (ROOT / page).read_text("utf-8")).split("\n```")[1::2] if not block.startswith("sh\n")
        ]
        assert [line for block in others for line in block.splitlines() if line.startswith(begin)] == [], page


def test_every_exception_is_met_on_a_page():
    lines = [line for page in PAGES for language, text in blocks(page) if language == "sh" for line in commands(text)]
    assert [pattern for pattern in NOT_RUN if not any(re.search(pattern, line) for line in lines)] == []
    assert [page for page in (*OWN_SIZES, *RUN_ELSEWHERE) if page not in PAGES] == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("rm -rf photos", "no way to run"),
        ("tnt-fast check photos/ && tnt-fast info", "not understood"),
        ("curl -d x | tnt-fast classify -", "what pipes into"),
        ("make nothing-of-that-name", "nothing-of-that-name"),
        ('pip install "tnt_fast[nothing]"', "nothing"),
        ("torchrun train.py", "without -m"),
        ("torchrun --nproc-per-nodes 2 -m tnt_fast train photos/ --out runs/mine", "status 2"),
        ("tnt-fast check nowhere/", "status 2"),
    ],
)
def test_a_line_that_does_not_run_is_noticed(line, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.MonkeyPatch.context() as of_line, pytest.raises(AssertionError, match=message):
        Shell("a page", of_line)(line)


def test_an_option_that_a_command_has_not_is_noticed(capsys):
    with pytest.MonkeyPatch.context() as of_line, pytest.raises(AssertionError, match="status 2"):
        Shell("a page", of_line)("tnt-fast train photos/ --epoch-count 3 --out runs/mine")
    assert "--epoch-count" in capsys.readouterr().err
