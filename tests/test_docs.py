"""The page of the API lists what is public, and nothing else; ``make docs`` renders it and fails where a name is not there."""

import inspect
import re
from pathlib import Path

import tnt_fast
from tnt_fast import dispatch, reference

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
