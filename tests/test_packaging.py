"""Installed, editable or bare: the package imports the same way, and its kernels only as tnt_fast.kernels."""

import email
import importlib.metadata
import runpy
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement

import tnt_fast

ROOT = Path(__file__).resolve().parents[1]


def run(code: str, cwd: Path, *paths: Path) -> subprocess.CompletedProcess:
    prelude = f"import sys; sys.path[:0] = {[str(p) for p in paths]!r}\n"
    return subprocess.run([sys.executable, "-c", prelude + code], cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> tuple[Path, set[str]]:
    """A copy of what git has, and the names of that; beside it lies what is left over in a folder that was worked in."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if tracked.returncode:
        pytest.skip("needs the git checkout, to build from its files alone")
    names = {name for name in tracked.stdout.decode().split("\0") if name and (ROOT / name).is_file()}
    leftovers = {"build/lib/tnt_fast/deleted.py", "tests/__pycache__/a.pyc", "runs/digits/last.pt", ".cache/docs/a.md"}
    source = tmp_path_factory.mktemp("source")
    for name in names | leftovers:
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes() if name in names else b"")
    return source, names


@pytest.fixture(scope="module")
def sdist(checkout) -> tarfile.TarFile:
    source, _ = checkout
    subprocess.run([sys.executable, "setup.py", "-q", "sdist"], cwd=source, capture_output=True, timeout=300, check=True)
    return tarfile.open(next((source / "dist").iterdir()))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> zipfile.ZipFile:
    """Built from the source distribution, as pip does where no wheel fits; with an older build still there."""
    out = tmp_path_factory.mktemp("wheel")
    sdist.extractall(out)
    source = next(out.iterdir())
    (source / "build" / "lib" / "tnt_fast").mkdir(parents=True)
    (source / "build" / "lib" / "tnt_fast" / "deleted.py").touch()
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), str(source)]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next(out.glob("tnt_fast-*.whl")))


def test_a_source_distribution_holds_the_repository_and_no_leftovers(checkout, sdist):
    files = {member.name.partition("/")[2] for member in sdist.getmembers() if member.isfile()}
    written = {name for name in files if name in ("PKG-INFO", "setup.cfg") or name.startswith("tnt_fast.egg-info/")}
    assert files - written == {name for name in checkout[1] if name != ".gitignore" and not name.startswith(".github/")}


def test_the_metadata_say_what_there_is(wheel):
    (name,) = [name for name in wheel.namelist() if name.endswith("METADATA")]
    metadata = email.message_from_bytes(wheel.read(name))
    assert "fused Triton kernels" in metadata["Summary"]
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert all(url.partition(", ")[2].startswith("https://") for url in metadata.get_all("Project-URL"))


def test_a_wheel_holds_the_kernels_inside_the_package(wheel):
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert top == {"tnt_fast", f"tnt_fast-{tnt_fast.__version__}.dist-info"}
    assert {"tnt_fast/kernels/__init__.py", "tnt_fast/page.html"} <= {*wheel.namelist()}
    assert "tnt_fast/py.typed" in wheel.namelist()  # type checkers read a package's annotations only beside this file
    modules = {f"tnt_fast/{p.name}" for p in (ROOT / "tnt_fast").glob("*.py")}
    kernels = {f"tnt_fast/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}
    assert {name for name in wheel.namelist() if name.endswith(".py")} == modules | kernels


def test_an_installed_wheel_runs_beside_another_package_called_kernels(wheel, tmp_path):
    site = tmp_path / "site"
    wheel.extractall(site)
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text("owner = 'somebody else'\n")
    done = run(
        "import kernels, tnt_fast, tnt_fast.kernels as ours\n"
        "print(kernels.owner, tnt_fast.__file__.endswith('site/tnt_fast/__init__.py'), ours.__file__.split('site')[-1])",
        tmp_path,
        site,
    )
    assert done.stdout.split() == ["somebody", "else", "True", "/tnt_fast/kernels/__init__.py"], done.stderr


def test_a_bare_checkout_runs(tmp_path):
    done = run("import tnt_fast, tnt_fast.kernels as k; print(k.__name__, k.__file__)", tmp_path, ROOT)
    assert done.stdout.split() == ["tnt_fast.kernels", str(ROOT / "kernels" / "__init__.py")], done.stderr


def test_the_kernels_folder_refuses_another_name(tmp_path):
    done = run("import kernels; print(hasattr(kernels, '__version__')); from kernels import inner", tmp_path, ROOT)
    assert (done.returncode, done.stdout) == (1, "False\n")
    assert "import it as 'tnt_fast.kernels'" in done.stderr
    assert "No module named 'kernels.inner'" in run("import kernels.inner", tmp_path, ROOT).stderr


def test_transformers_imports_from_a_checkout(tmp_path):
    """It asks for another package of the folder's name."""
    pytest.importorskip("transformers")
    done = run("import transformers.integrations.hub_kernels", tmp_path, ROOT)
    assert done.returncode == 0, done.stderr


def test_the_command_is_installed_where_the_package_is():
    try:
        entry_points = importlib.metadata.distribution("tnt_fast").entry_points
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("tnt_fast runs from a bare checkout here")
    assert [(e.name, e.value) for e in entry_points] == [("tnt-fast", "tnt_fast.cli:main")]


def test_info_prints_versions_paths_and_reasons():
    done = subprocess.run(
        [sys.executable, "-m", "tnt_fast.cli", "info", "--model", "tnt_fast_s_patch16_224"],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"tnt_fast     {tnt_fast.__version__}" in done.stdout
    assert "tnt_fast_s_patch16_224: 23.77 M parameters, 5.217 GMACs; path:" in done.stdout


def test_the_build_system_is_declared():
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    config = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert config["build-system"]["build-backend"] == "setuptools.build_meta"


def test_the_oldest_environment_is_the_oldest_that_setup_declares(monkeypatch):
    declared = {}
    monkeypatch.setattr(setuptools, "setup", declared.update)
    runpy.run_path(str(ROOT / "setup.py"))
    del declared["extras_require"]["xformers"]  # no environment has it: each of its wheels belongs to one torch
    del declared["extras_require"]["docs"]  # the documentation is built with one set of releases
    lines = sum(declared["extras_require"].values(), declared["install_requires"])
    bounds = {r.name: str(r.specifier) for r in map(Requirement, lines) if r.specifier}
    oldest = (ROOT / ".ci" / "oldest.txt").read_text("utf-8").splitlines()
    pins = dict(line.split("==") for line in oldest if "==" in line)
    assert {name: f">={pin}" for name, pin in pins.items()} == bounds
