"""``make quick``: the tests nearest to what was changed since the last commit, or to FILES="...", in at most 90 seconds.

Nearest are the tests of a changed file itself, then those of the files that import it. What is marked slow, and the kernels
as compiled (docs/proof.md), are left out; what the time does not reach shows as skipped. ``make test`` has all of it.
"""

import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from pathlib import PurePath

from tests.imports import ROOT, files, imports

SECONDS = 75  # to begin tests in; the last one comes on top

# A test is named after the file that it holds. Where one holds several files, or has another name:
HOLDS = {
    "test_model": ["tnt_fast/tnt.py"],
    "test_forward_attention": ["tnt_fast/tnt.py"],
    "test_gradients": ["tnt_fast/tnt.py", "kernels/pixel_embed.py"],
    "test_timm_parity": ["tnt_fast/tnt.py", "tnt_fast/variants.py"],
    "test_operation": ["tnt_fast/arguments.py"],
    "test_gelu": ["kernels/outer.py"],
    "test_outer": ["kernels/product.py"],
    "test_short_attention": ["kernels/attention.py"],
    "test_attention_backward": ["kernels/attention.py"],
    "test_kernels": ["kernels/*.py", "tests/conftest.py"],
    "test_backward": ["kernels/*.py"],
    "test_benchmarks": ["benchmarks/*.py", "tnt_fast/bench.py"],
    "test_cli": ["tnt_fast/__init__.py", "tnt_fast/__main__.py"],
    "test_fuzz": ["tests/fuzz_*.py"],
    "test_mutations": ["tests/mutants.py"],
    "test_ptx_machine": ["tests/ptx/*.py"],
    "test_simulate": ["benchmarks/machine_code.py", "benchmarks/simulation_checks.py"],
    "test_static_cost": ["benchmarks/launched.py"],
    "test_examples": ["examples/*.py"],
    "test_budget": ["benchmarks/graphs.py"],
}


def is_test(file: str) -> bool:
    return PurePath(file).match("tests/test_*.py")


def tests_of(file: str) -> list[str]:
    """The test files for a change to ``file``, a path from the root, nearest first."""
    if is_test(file):
        return [file]
    if file not in files():  # those that read it
        named = f'"{PurePath(file).name}"'
        return [test for test in files("tests") if is_test(test) and "." in named and named in (ROOT / test).read_text("utf-8")]
    found, level, seen = _own_tests(file), {file}, {file}
    while level:
        level = {importer for imported in level for importer in _importers()[imported]} - seen
        seen |= level
        found += [test for importer in sorted(level - set(files("benchmarks"))) for test in _own_tests(importer)]
        found += sorted(filter(is_test, level))
        if found:
            break
    return list(dict.fromkeys(found))


def _own_tests(file: str) -> list[str]:
    path = PurePath(file)
    names = [f"test_{path.stem}"] + [test for test, patterns in HOLDS.items() if any(path.match(p) for p in patterns)]
    return [f"tests/{name}.py" for name in names if (ROOT / "tests" / f"{name}.py").is_file()]


@cache
def _importers() -> dict[str, set[str]]:
    found = defaultdict(set)
    for file in files():
        for each in imports(file):
            found[each.target].add(file)
    return found


def changed() -> list[str]:
    """What differs from the last commit, and is still there."""
    commands = (["diff", "--name-only", "--relative", "HEAD"], ["ls-files", "--others", "--exclude-standard"])
    names = [subprocess.run(["git", *c], cwd=ROOT, capture_output=True, text=True, check=True).stdout for c in commands]
    return [name for name in "".join(names).splitlines() if (ROOT / name).is_file()]


def main(given: Iterable[str]) -> int:
    chosen: list[str] = []
    for file in given or changed():
        if not (ROOT / file).is_file():
            print(f"make quick: no file {file!r}; FILES are paths from the root of the repository")
            return 2
        tests = tests_of(file)
        print(f"{file}: {' '.join(tests) or 'no test reads it'}")
        chosen += tests
    if not chosen:
        print('make quick: nothing to test; it takes what git sees as changed, or FILES="..."')
        return 0
    print(f"without what is slow or compiled, and no more than {SECONDS} s; the rest: make test", flush=True)
    options = ["-q", "-n", "2", "-m", "not slow", "--paths", "interpreter,gpu", "--until", str(time.time() + SECONDS)]
    done = subprocess.run([sys.executable, "-m", "pytest", *options, *dict.fromkeys(chosen)], cwd=ROOT).returncode
    if done == 5:  # pytest found none
        print("make quick: all of these are slow or compiled; run make test")
        return 0
    return done


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
