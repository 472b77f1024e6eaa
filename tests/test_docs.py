"""The pages say what is there: the API's lists what is public, and nothing else (``make docs`` renders it and fails where a
name is not there); commands have options that exist."""

import inspect
import re
import shlex
from pathlib import Path

import pytest

import tnt_fast
from tnt_fast import cli, dispatch, reference

ROOT = Path(__file__).resolve().parents[1]
LISTED = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text("utf-8"), re.M)


def test_the_api_page_lists_every_public_name_once():
    own = [name for name, x in inspect.getmembers(reference, callable) if getattr(x, "__module__", None) == reference.__name__]
    fused = [path.stem for path in (ROOT / "kernels").glob("*.py") if path.stem in dispatch.OPERATIONS]
    public = [f"tnt_fast.{name}" for name in tnt_fast.__all__]
    public += [f"tnt_fast.reference.{name}" for name in own if not name.startswith("_")]
    public += [f"tnt_fast.kernels.{name}.{name}" for name in fused]
    assert sorted(LISTED) == sorted(public)


def test_what_is_public_in_python_says_what_it_does():
    owners = [(tnt_fast, tnt_fast.__all__), (reference, dispatch.OPERATIONS), (tnt_fast.TNT, ["forward_features"])]
    assert [f"{owner.__name__}.{name}" for owner, names in owners for name in names if not getattr(owner, name).__doc__] == []


@pytest.mark.parametrize("page", ["README.md", "docs/using.md"])
def test_the_commands_of_a_page_have_these_options(page):
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / page).read_text("utf-8"), re.M | re.S)
    lines = [line.partition("|")[2] or line for block in blocks for line in block.splitlines() if "tnt-fast " in line]
    commands = [shlex.split(line, comments=True) for line in lines if not line.startswith("#")]
    assert len(commands) >= 5
    for name, *arguments in commands:
        assert name == "tnt-fast"
        assert cli._parsed(arguments)
