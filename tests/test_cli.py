"""The command itself: what it prints of strangers' names, its help, its errors; that --help does not wait for torch."""

import ast
import dataclasses
import importlib.util
import json
import os
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from test_terminal import HOSTILE

import tnt_fast
from tnt_fast import cli, recipe, terminal
from tnt_fast.cli import main

ROOT = Path(__file__).resolve().parents[1]


def refused(argv: list[str], capsys) -> str:
    """The one line on stderr of a command line that argparse refuses."""
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return only_line(printed.err)


def only_line(text: str) -> str:
    (line,) = text.split("\n")[:-1]
    assert line.isprintable()
    assert len(line) <= terminal.LIMIT
    return line


# ---- names of strangers ----


@pytest.fixture
def rows(monkeypatch):
    """What ``classify`` finds: an image and a broken one for each hostile name, which is also that of a class."""
    pytest.importorskip("torchvision")
    from tnt_fast import classify, images

    found = []
    for name in HOSTILE.values():
        found.append({"file": f"{name}.png", "predictions": [{"class": name, "probability": 0.75}], "truth": name})
        found.append({"file": f"{name}.jpg", "error": f"cannot read the image {name}"})

    classifier = MagicMock(why_not_fused=["because of \x1b[2J"], return_value=found)
    monkeypatch.setattr(classify, "Classifier", lambda *args, **kwargs: classifier)
    monkeypatch.setattr(images, "named_images", lambda paths: ([row["file"] for row in found], {}))
    return found


def test_each_result_is_one_line_whatever_files_and_classes_are_called(rows, capsys):
    assert main(["classify", "x"]) == 1
    out, err = capsys.readouterr()
    lines = out.split("\n")[:-1]
    assert len(lines) == len(HOSTILE)
    assert all(line.isprintable() and line.split("  ")[1].startswith("75.00% ") for line in lines)
    errors = [line for line in err.split("\n") if "cannot read the image" in line]
    assert len(errors) == len(HOSTILE)
    assert all(line.isprintable() for line in err.split("\n"))


def test_json_has_the_names_exactly(rows, capsys):
    assert main(["classify", "x", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == rows


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_an_error_is_one_line_whatever_it_names(name, tmp_path, capsys):
    argvs = [
        ["info", "--model", name],
        ["bench", "--size", name],
        ["bench", "--device", name],
        ["classify", str(tmp_path / f"{name}.png"), "--model", "tnt_s_patch16_224"],
        ["train", str(tmp_path / name), "--out", str(tmp_path / "run")],
    ]
    for argv in argvs:
        assert main(argv) == 2, argv
        printed = capsys.readouterr()
        assert printed.out == ""
        assert only_line(printed.err).startswith("tnt-fast: "), argv


def test_a_key_of_a_checkpoint_is_shown_and_not_obeyed(tmp_path, capsys):
    torch.save({"state_dict": {f"{name}.weight": torch.zeros(1) for name in HOSTILE.values()}}, tmp_path / "a.pt")
    (tmp_path / "a.png").write_bytes(b"")
    assert (
        main(["classify", str(tmp_path / "a.png"), "--checkpoint", str(tmp_path / "a.pt"), "--model", "tnt_s_patch16_224"]) == 2
    )
    only_line(capsys.readouterr().err)


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_what_argparse_says_is_one_line_too(name, capsys):
    for argv in (["info", name], ["info", f"--{name}"], [name], ["bench", "--batch-size", name], ["completion", name]):
        assert refused(argv, capsys).startswith("tnt-fast")


def test_a_traceback_is_shown_line_by_line(monkeypatch, capsys):
    def raises(models):
        raise KeyError("\x1b[2J") if models == ["a"] else ValueError("\x1b[2J\rtwo\nlines")

    monkeypatch.setattr(cli, "describe", raises)
    assert main(["info", "--model", "a"]) == 3  # a defect
    assert capsys.readouterr().err.split("\n")[-2:] == [r"KeyError: '\x1b[2J'", ""]
    assert main(["info"]) == 2
    assert capsys.readouterr().err == "tnt-fast: ValueError: \\x1b[2J\\rtwo lines\n"
    assert main(["info", "--traceback"]) == 2
    lines = capsys.readouterr().err.split("\n")
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-3:] == [r"ValueError: \x1b[2J\rtwo", "lines", ""]
    assert all(line.isprintable() for line in lines)


def test_nothing_of_the_package_prints_past_the_terminal():
    found = []
    for path in (ROOT / "tnt_fast").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            text = ast.unparse(node) if isinstance(node, (ast.Name, ast.Attribute)) else ""
            if text == "print" or text.endswith(("stdout.write", "stderr.write")):
                found.append(path.name)
    assert set(found) == {"terminal.py"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_an_error():
    with open("/dev/full", "w") as full:
        argv = [sys.executable, "-m", "tnt_fast", "completion", "bash"]
        done = subprocess.run(argv, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert only_line(done.stderr) == "tnt-fast: OSError: [Errno 28] No space left on device"
    assert done.returncode == 2


# ---- help, errors of the command line ----


def test_the_nearest_name_is_given(capsys):
    assert "nearest: --epochs, " in refused(["train", "digits", "--out", "x", "--epoks", "3"], capsys)
    assert "unknown argument '--top-k=3'; nearest: --topk" in refused(["classify", "a.png", "--top-k=3"], capsys)
    assert refused(["info", "more"], capsys) == "tnt-fast info: unknown argument 'more'; see tnt-fast info --help"
    assert main(["info", "--model", "tnt_s_patch16_224"]) == 2
    assert "nearest: tnt_fast_s_patch16_224, " in capsys.readouterr().err
    assert main(["bench", "--dtype", "floa16"]) == 2
    assert "nearest: float16, bfloat16" in capsys.readouterr().err


def test_help_has_each_setting_of_a_run_in_its_group(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    paragraphs = capsys.readouterr().out.split("\n\n")
    for field in dataclasses.fields(recipe.Config):
        (group,) = [text for text in paragraphs if text.startswith(field.metadata["group"] + ":\n")]
        option = "DATA" if field.name == "data" else "--" + field.name.replace("_", "-")
        assert re.search(rf"\n  {option}[\s,]", group)


def test_each_command_has_a_description_and_an_example(capsys):
    for name in (None, *cli._parser()[1]):
        with pytest.raises(SystemExit):
            main([name, "--help"] if name else ["--help"])
        text = capsys.readouterr().out
        assert f"  tnt-fast {name or 'train'} " in text or f"(tnt-fast {name} " in text
        assert text.split("\n\n")[1][-1] == "."


def test_every_option_given_as_an_example_is_there(capsys):
    for name, parser in cli._parser()[1].items():
        for line in (parser.epilog or "").split("\n"):
            if "  tnt-fast " in line:
                argv = shlex.split(line.rpartition("tnt-fast ")[2], comments=True)
                assert cli._parsed(argv).parser.prog == f"tnt-fast {name}"


def test_bash_completes_commands_options_and_files(tmp_path):
    (tmp_path / "photo.png").touch()
    done = subprocess.run([sys.executable, "-m", "tnt_fast", "completion", "bash"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    def completed(*words: str) -> list[str]:
        ask = f'COMP_WORDS=(tnt-fast "$@"); COMP_CWORD={len(words)}; _tnt_fast; printf "%s\\n" "${{COMPREPLY[@]}}"'
        script = f"{done.stdout}\n{ask}"
        return subprocess.run(["bash", "-c", script, "bash", *words], capture_output=True, text=True).stdout.split()

    assert set(completed("")) == {*cli._parser()[1], "--help", "--version"}
    assert completed("tr") == ["train"]
    assert completed("train", "--batch") == ["--batch-size"]
    assert completed("classify", "--top") == ["--topk"]
    assert completed("classify", "pho") == []  # which bash takes for files, by -o default
    assert "complete -o default " in done.stdout


# ---- started as a command ----


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory) -> dict[str, str]:
    """The environment of a process in which nothing heavy can be imported."""
    folder = tmp_path_factory.mktemp("without")
    for name in ("torch", "timm", "numpy", "triton", "torchvision"):
        (folder / f"{name}.py").write_text("raise RuntimeError('imported')")
    script = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom tnt_fast.cli import main\nsys.exit(main())\n"
    (folder / "tnt-fast").write_text(script)  # as pip writes it
    return os.environ | {"PYTHONPATH": str(folder)}


STARTS = {"installed": ["tnt-fast"], "module": ["-m", "tnt_fast"], "file": ["-m", "tnt_fast.cli"]}


@pytest.mark.parametrize("argv", [["--version"], ["--help"], ["train", "--help"]], ids=" ".join)
@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_help_comes_within_a_second_and_without_torch(start, argv, without_torch):
    start = [str(Path(without_torch["PYTHONPATH"]) / word) if word == "tnt-fast" else word for word in start]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *start, *argv], cwd=ROOT, env=without_torch, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"tnt_fast {tnt_fast.__version__}" if argv == ["--version"] else "usage: tnt-fast")
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1  # of the processor: others may be at work


def loaded_as(argv: list[str], orig_argv: list[str], monkeypatch):
    """The package's own file, run anew as if Python had been started so."""
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", orig_argv)
    spec = importlib.util.spec_from_file_location("tnt_fast_again", tnt_fast.__file__, submodule_search_locations=[])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("argv", "orig_argv", "waits"),
    [
        (["/usr/bin/tnt-fast"], ["python", "/usr/bin/tnt-fast", "info"], True),
        (["-m"], ["python", "-m", "tnt_fast", "info"], True),
        (["-m"], ["python", "-m", "tnt_fast.cli", "info"], True),
        (["-m"], ["python", "-m", "theirs", "tnt_fast"], False),
        (["-c"], ["python", "-c", "import tnt_fast"], False),
        ([""], ["python"], False),
        ([], ["python"], False),
        (["tnt-fast.py"], ["python", "tnt-fast.py"], False),  # somebody's own
        (["/usr/bin/pytest"], ["python", "/usr/bin/pytest", "tnt_fast"], False),
    ],
)
def test_the_package_waits_with_its_names_only_where_it_is_the_command(argv, orig_argv, waits, monkeypatch):
    module = loaded_as(argv, orig_argv, monkeypatch)
    assert ("TNT" in vars(module)) != waits
    assert all(getattr(module, name) is getattr(tnt_fast, name) for name in tnt_fast.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'TNTT'"):
        _ = module.TNTT
