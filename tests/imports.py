"""The import statements of this repository, read from the source: nothing is imported, lazy imports count like any other."""

import ast
from pathlib import Path, PurePath
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("tnt_fast", "kernels", "benchmarks", "examples", "tests", "tests/ptx")


class Import(NamedTuple):
    """A statement in ``file``; ``target`` is a file of this repository, or the name of somebody else's package."""

    file: str
    line: int
    target: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: imports {self.target}"


def files(*folders: str) -> list[str]:
    """The Python files of these folders, or of all, as paths from the root."""
    return sorted(f"{folder}/{path.name}" for folder in folders or FOLDERS for path in (ROOT / folder).glob("*.py"))


def file_of(module: str) -> str | None:
    """The file of a module of ours, by its dotted name; tests and examples import each other by their bare names."""
    path = module.replace(".", "/")
    if path == "kernels" or path.startswith("kernels/"):
        return None  # that name belongs to another project's package
    if path.startswith("tnt_fast/kernels"):
        path = path.removeprefix("tnt_fast/")
    candidates = (f"{path}.py", f"{path}/__init__.py", f"tests/{path}.py", f"tests/{path}/__init__.py", f"examples/{path}.py")
    return next((candidate for candidate in candidates if (ROOT / candidate).is_file()), None)


def imports(file: str, source: str | None = None) -> list[Import]:
    """Every import statement of a file, wherever it stands.

    ``import_module("literal")`` is one, too, and ``import_module(f"{__name__}.{name}")`` is one of each file beside it.
    """
    package = ("tnt_fast." if file.startswith("kernels/") else "") + file.rpartition("/")[0].replace("/", ".")
    found = []
    for node in ast.walk(ast.parse((ROOT / file).read_text("utf-8") if source is None else source)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: 1 - node.level or None] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # a name may be a module of the package, or something inside it
            modules = [f"{base}.{alias.name}" if file_of(f"{base}.{alias.name}") else base for alias in node.names]
        elif isinstance(node, ast.Call) and _name(node.func) in ("import_module", "__import__"):
            modules = _imported_by_call(node, file, package)
        else:
            continue
        found += [Import(file, node.lineno, file_of(module) or module.partition(".")[0]) for module in modules]
    return sorted(set(found))


def _imported_by_call(call: ast.Call, file: str, package: str) -> list[str]:
    wanted = ast.unparse(call.args[0]) if call.args else ""
    if call.args and isinstance(call.args[0], ast.Constant):
        return [str(call.args[0].value)]
    if wanted.startswith(("f'{__name__}.", 'f"{__name__}.')) and file.endswith("/__init__.py"):
        beside = [other for other in files(file.rpartition("/")[0]) if other != file]
        return [f"{package}.{PurePath(other).stem}" for other in beside]
    return ["a module whose name is computed"]


def _name(function: ast.expr) -> str | None:
    return getattr(function, "attr", getattr(function, "id", None))
