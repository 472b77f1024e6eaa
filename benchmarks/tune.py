"""Sweep the launch tables of the kernels: by time on a GPU, elsewhere by simulating their machine code (simulate.py).

    python -m benchmarks.tune [--gpu h200] [--kernel inner] [--variant s] [--dtype bf16] [--processes 2] [--json FILE] [--write]

Each entry of a table starts from what is shipped. Its neighbours, in which one number is a step larger or smaller, or rows and
warps are both, are tried side by side; the best of them is the next to start from, until none is better by more than 3%, below
which neither a simulation nor a clock tells two apart. What does not compile, does not fit, or has the asynchronous product
with its left operand in registers (static_cost.py, "risky") is out. So is, before it wins, what breaks the rule of
CONTRIBUTING.md: its results and gradients are held to float64, on the GPU or in Triton's interpreter.

Everything tried is kept in benchmarks/results/tune-GPU.json, with GPU, date, commit and how it was told: interrupted, the sweep
goes on from there. An entry whose kernel has changed since begins anew. What won is printed beside what is shipped; ``--write``
puts it into kernels/. A simulation ranks what it models: measure on the GPU before it is shipped.
"""

import argparse
import ast
import datetime
import hashlib
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from benchmarks import measure, simulate, static_cost
from benchmarks.dynamic_cost import aligned
from benchmarks.launched import BATCH, IMAGE, Launched, arguments, by_patch, launched, recorded
from tnt_fast import kernels as shipped
from tnt_fast import reference
from tnt_fast.kernels import norm
from tnt_fast.kernels.operation import Config
from tnt_fast.writing import replacing

ROOT = Path(__file__).parents[1]
GAIN = 0.03
CHOICES: dict[str, tuple[Any, ...]] = {
    "rows": (16, 32, 64, 128),
    "warps": (1, 2, 4, 8),
    "per_sm": (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16),
    "chunk": (16, 32, 64),
    "stages": (1, 2, 3),
    "mma_arch": (None, "sm80"),
    "registers": (None,),
    "capability": (None,),
    "VALUES": (512, 1024, 2048, 4096, 8192),
    "EACH": (4, 8, 16, 32, 64),
    "PER_SM": (2, 4, 8, 16),
    "STAGES": (1, 2, 3, 4),
}
TOGETHER = (("rows", "warps"),)
Fields = dict[str, Any]


class Entry(NamedTuple):
    """An entry of a launch table: ``key`` of ``function`` in CONFIGS of ``module``, or without them the constants of norm.py;
    and whose launches show it: of these operations, of one variant and dtype."""

    module: Any
    function: str | None
    key: Any
    variant: str
    dtype: str
    operations: tuple[str, ...]

    @property
    def name(self) -> str:
        file = self.module.__name__.rpartition(".")[2]
        return f"{file}/{self.function}/{self.key}" if self.function else file

    def shows(self, found: Launched) -> bool:
        """Whether it is a launch of the entry's kernels."""
        function = found.kernel.fn
        return function.__name__ == self.function if self.function else function.__module__ == self.module.__name__

    @property
    def launches(self) -> list[tuple[str, Launched]]:
        """(operation, launch) as the table is now, on an H200."""
        dtype = measure.DTYPES[self.dtype]
        every = [(name, each) for name in self.operations for each in launched(name, self.variant, dtype, 132, (9, 0))]
        return [(name, by_patch(each)) for name, each in every if self.shows(each)]

    @property
    def fields(self) -> Fields:
        if self.function is None:
            return {name: getattr(self.module, name) for name in self.key}
        return self.module.CONFIGS[self.function][self.key]._asdict()

    def _put(self, fields: Fields) -> None:
        if self.function is None:
            vars(self.module).update(fields)
            self.module.specialise.forget()
        else:
            self.module.CONFIGS[self.function][self.key] = Config(**fields)
            self.module._specialise.forget()
        static_cost._recorded.cache_clear()

    @contextmanager
    def holding(self, fields: Fields) -> Iterator[None]:
        """Inside, the table has these numbers."""
        before = self.fields
        self._put(fields)
        try:
            yield
        finally:
            self._put(before)


class _Asked(dict):
    """A table that tells which key was asked for last."""

    last: Any = None

    def __getitem__(self, key: Any) -> Any:
        self.last = key
        return super().__getitem__(key)


def entries(operations: Iterable[str], dtypes: Iterable[str]) -> list[Entry]:
    """Those that a named variant shows, each by TNT-S or else by the first one; then norm's constants, by TNT-S."""
    found: dict[str, Entry] = {}
    of_norm, variants = [], sorted(static_cost.VARIANTS, key=lambda variant: variant != "s")
    for name in operations:
        module = sys.modules[type(shipped.OPERATIONS[name]).__module__]
        before = getattr(module, "CONFIGS", None)
        if before is None:
            of_norm.append(name)
            continue
        try:
            for variant, dtype in itertools.product(variants, dtypes):
                module.CONFIGS = {function: _Asked(table) for function, table in before.items()}
                module._specialise.forget()
                launched(name, variant, measure.DTYPES[dtype], 132, (9, 0))
                for function, table in module.CONFIGS.items():
                    entry = Entry(module, function, table.last, variant, dtype, (name,))
                    if table.last is not None:
                        found.setdefault(entry.name, entry)
        finally:
            module.CONFIGS = before
            module._specialise.forget()
    if of_norm:
        found[norm.__name__] = Entry(norm, None, ("VALUES", "EACH", "PER_SM", "STAGES"), "s", "bf16", tuple(of_norm))
    return list(found.values())


def neighbours(fields: Fields) -> list[Fields]:
    """One step from here: of one number, or of those that go together; numbers that are 0 are not the kernel's."""
    moves: list[tuple[str, ...]] = [(name,) for name in fields if fields[name] != 0]
    moves += [names for names in TOGETHER if all(fields.get(name) for name in names)]
    found = []
    for names, step in itertools.product(moves, (-1, 1)):
        new = dict(fields)
        for name in names:
            choices = CHOICES[name]
            at = choices.index(fields[name]) + step if fields[name] in choices else -1
            if not 0 <= at < len(choices):
                break
            new[name] = choices[at]
        else:
            found.append(new)
    return found


# ---- what a configuration takes ----


def simulated(entry: Entry, fields: Fields, gpu: str) -> dict[str, Any]:
    """Microseconds of the entry's launches, or "error"."""
    torch.set_num_threads(1)  # a forked process has none of the parent's threads
    machine, rows = simulate.gpu(gpu), []
    with entry.holding(fields):
        for name, found in entry.launches:
            try:
                rows.append(
                    static_cost.cost(name, entry.variant, entry.dtype, found, machine.target, gpu=machine, counted=False)
                )
            except Exception as error:  # whatever a compiler raises
                return {"error": f"{type(error).__name__}: {(str(error).splitlines() or ['?'])[0][:200]}"}
    if any(row["risky"] for row in rows):
        return {"error": "an asynchronous product has its left operand in registers"}
    if wrong := [row["simulated"]["error"] for row in rows if row["simulated"]["error"]]:
        return {"error": wrong[0]}
    us = round(sum(row["simulated"]["us"] for row in rows), 1)
    return {"us": us, "binds": rows[0]["simulated"]["binds"]} | {
        name: max(row[name] for row in rows) for name in ("registers", "stack_bytes")
    }


def timed(entry: Entry, every: list[Fields]) -> list[dict[str, Any]]:
    """The same on this machine's GPU: medians of launches that take turns."""
    about, dtype = torch.cuda.get_device_properties(0), measure.DTYPES[entry.dtype]
    functions: dict[str, Callable[[int], Any]] = {}
    failed: dict[str, Exception] = {}
    for i, fields in enumerate(every):
        with entry.holding(fields):
            found: list[Launched] = []
            for name in entry.operations:
                given = arguments(name, entry.variant, dtype, BATCH, IMAGE, "cuda")
                every_launch = recorded(name, given, about.multi_processor_count, (about.major, about.minor))
                found += [each for each in every_launch if entry.shows(each)]

        def run(_: int, found=found) -> None:
            for each in found:
                each.kernel[(each.grid,)](*each.arguments, **each.constants, **each.options)

        functions[str(i)] = run
    times = measure.interleaved(functions, failed=failed, ahead=True)
    return [
        {"error": str(failed[i]).strip().splitlines()[-1][:200]}
        if i in failed
        else {"us": round(measure.percentile(times[i], 50) * 1e6, 2)}
        for i in functions
    ]


def broken(entry: Entry, fields: Fields) -> float:
    """The largest error over what the rule allows, of results and gradients: above 1 the configuration is wrong.

    On a GPU, or in Triton's interpreter: in float16 there, whose products of bfloat16 are wrong.
    """
    kind = torch.float32 if entry.dtype == "fp32" else measure.DTYPES[entry.dtype] if measure.GPU else torch.float16
    worst = 0.0
    with entry.holding(fields):
        for name in entry.operations:
            torch.manual_seed(0)
            given = arguments(name, entry.variant, kind, 3, 48, measure.DEVICE)  # 27 patches: the last tile is not full
            given = {k: x.detach() + 0.05 * torch.randn_like(x) if isinstance(x, Tensor) else x for k, x in given.items()}
            function = getattr(reference, name)
            exact = _results(function, {k: x.double() if isinstance(x, Tensor) else x for k, x in given.items()})
            found, own = _results(shipped.OPERATIONS[name], given), _results(function, given)
            for each in exact:
                error, allowed, *_ = measure.by_rule(found[each], exact[each], own[each])
                worst = max(worst, error / allowed if error <= float("inf") else float("inf"))
    return worst


def _results(function: Any, given: dict[str, Any]) -> dict[str, Tensor]:
    leaves = {name: x.detach().requires_grad_() for name, x in given.items() if isinstance(x, Tensor)}
    out, generator = function(**reference.in_records(given | leaves)), torch.Generator().manual_seed(0)
    several = out if isinstance(out, tuple) else (out,)
    upstream = [torch.randn(x.shape, generator=generator).to(x) for x in several]
    gradients = torch.autograd.grad(several, list(leaves.values()), upstream, allow_unused=True)
    found = {name: x for name, x in zip(leaves, gradients, strict=True) if x is not None}
    return {f"result {i}": x.detach() for i, x in enumerate(several)} | found


def checked(entry: Entry, fields: Fields) -> float:
    """``broken``, without a GPU in a process of its own: kernels made for the interpreter cannot be compiled."""
    if measure.GPU:
        return broken(entry, fields)
    command = [sys.executable, "-m", "benchmarks.tune", "--check", json.dumps([entry.name, entry.dtype, fields])]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return float(done.stdout) if done.returncode == 0 else float("inf")


# ---- the sweep ----


def source(entry: Entry, by_time: bool) -> str:
    """A digest of all that an entry's times depend on besides its numbers."""
    about = [
        triton.__version__,
        *(found.kernel.cache_key for _, found in entry.launches),
        *([] if by_time else [static_cost.readers(True)]),
    ]
    return hashlib.sha256(repr(about).encode()).hexdigest()[:16]


def key(fields: Fields) -> str:
    return json.dumps(fields, sort_keys=True)


def sweep(
    every: list[Entry],
    try_them: Callable[[list[tuple[Entry, Fields]]], Iterable[tuple[int, dict[str, Any]]]],
    known: dict[str, Any],
    of: Callable[[Entry], str],
    keep: Callable[[], None],
) -> None:
    """Fill ``known``: by entry what is shipped, chosen and tried; ``keep`` is called whenever there is more.

    Args:
        try_them: of pairs, as they are done: their place, and "us" or "error".
    """
    for entry in every:
        if known.get(entry.name, {}).get("of") != of(entry):
            known[entry.name] = {"of": of(entry), "tried": {}}
        known[entry.name]["shipped"] = known[entry.name]["chosen"] = entry.fields
    active = list(every)
    while active:
        work = [
            (entry, fields)
            for entry in active
            for fields in (known[entry.name]["chosen"], *neighbours(known[entry.name]["chosen"]))
            if key(fields) not in known[entry.name]["tried"]
        ]
        for i, found in try_them(work):
            entry, fields = work[i]
            known[entry.name]["tried"][key(fields)] = found
            keep()
        active = [entry for entry in active if _moved(entry, known[entry.name], keep)]


def _moved(entry: Entry, about: dict[str, Any], keep: Callable[[], None]) -> bool:
    """Choose the best neighbour that is right, if one is better; whether one was."""
    tried, start = about["tried"], about["chosen"]
    now = tried[key(start)].get("us", float("inf"))
    for fields in sorted(neighbours(start), key=lambda each: tried[key(each)].get("us", float("inf"))):
        found = tried[key(fields)]
        if found.get("us", float("inf")) >= now * (1 - GAIN):
            return False
        if "of_allowed" not in found:
            found["of_allowed"] = round(checked(entry, fields), 3)
            if not found["of_allowed"] <= 1:
                found["error"] = f"breaks the rule: {found['of_allowed']} of the allowed error"
            keep()
        if "error" not in found:
            about["chosen"] = fields
            keep()
            return True
    return False


def written(text: str, entry: Entry, fields: Fields) -> str:
    """A kernel file with these numbers in the place of an entry's.

    Raises:
        ValueError: the entry is not written out there: it is another one's, or made by a function.
    """
    for node in ast.walk(ast.parse(text)):
        if entry.function is None:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == f"({', '.join(entry.key)})":
                return _replaced(text, node.value, ", ".join(repr(fields[name]) for name in entry.key))
            continue
        tables: list[ast.AST] = []  # in CONFIGS itself, or given to it later
        if isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            tables = [table for name, table in pairs if name is not None and ast.unparse(name) == repr(entry.function)]
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == f"CONFIGS[{entry.function!r}]":
            tables = [each for each in ast.walk(node.value) if isinstance(each, ast.Dict)]
        for table in tables:
            for each, value in zip(table.keys, table.values, strict=True) if isinstance(table, ast.Dict) else ():
                if each is not None and ast.unparse(each) == repr(entry.key):
                    return _replaced(text, value, _call(fields))
    raise ValueError(f"{entry.name} is not written out in its file: put {_call(fields)} there by hand")


def _call(fields: Fields) -> str:
    """As the tables have it: rows, then what is not by itself there."""
    defaults = Config._field_defaults
    more = [
        f"{name}={value!r}" for name, value in fields.items() if name != "rows" and value != defaults.get(name, value is None)
    ]
    return f"Config({', '.join([repr(fields.get('rows')), *more])})".replace("'", '"')


def _replaced(text: str, node: ast.expr, new: str) -> str:
    lines = text.splitlines(keepends=True)
    start, end = node.lineno - 1, node.end_lineno or node.lineno
    first, last = lines[start].encode()[: node.col_offset].decode(), lines[end - 1].encode()[node.end_col_offset :].decode()
    return "".join([*lines[:start], first + new + last, *lines[end:]])


def differences(known: dict[str, Any]) -> str:
    """What won beside what is shipped, an entry a line."""
    lines = [["entry", "tried", "shipped us", "chosen us", "change", "numbers that change"]]
    for name, about in known.items():
        us = [about["tried"].get(key(about[which]), {}).get("us") for which in ("shipped", "chosen")]
        changed = {k: v for k, v in about["chosen"].items() if v != about["shipped"][k]}
        told = ", ".join(f"{k} {about['shipped'][k]} → {v}" for k, v in changed.items()) or "none"
        change = f"{100 * (us[1] / us[0] - 1):+.0f}%" if None not in us else ""
        lines.append([name, str(len(about["tried"])), *("-" if x is None else str(x) for x in us), change, told])
    return aligned(lines, 1)


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.split("\n")[0])
    text = f"without a GPU: the one to simulate ({', '.join(simulate.GPUS)}); with one it is that one, and time tells"
    parser.add_argument("--gpu", default="h200", help=text)
    parser.add_argument(
        "--kernel", action="append", help=f"only this operation's; repeatable ({', '.join(shipped.OPERATIONS)})"
    )
    parser.add_argument(
        "--variant", action="append", help=f"only what it shows; repeatable ({', '.join(static_cost.VARIANTS)})"
    )
    parser.add_argument("--dtype", action="append", choices=("bf16", "fp32"), help="of the entries (default bf16, all of half)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="at once, without a GPU (default: one a core)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: benchmarks/results/tune-GPU.json")
    parser.add_argument("--write", action="store_true", help="put what won into kernels/")
    parser.add_argument("--check", help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    if options.check:
        name, dtype, fields = json.loads(options.check)
        entry = next(entry for entry in entries(shipped.OPERATIONS, [dtype]) if entry.name == name)
        print(broken(entry, fields))
        return 0
    try:
        chosen = static_cost._chosen("kernel", options.kernel, shipped.OPERATIONS)
        variants = static_cost._chosen("variant", options.variant, static_cost.VARIANTS)
        if options.processes < 1:
            raise ValueError(f"--processes {options.processes}: at least 1 is needed")
        gpu = measure.device_name() if measure.GPU else simulate.gpu(options.gpu).name
    except ValueError as error:
        parser.error(str(error))
    if triton.knobs.runtime.interpret:
        parser.error("kernels made for Triton's interpreter cannot be compiled: unset TRITON_INTERPRET")
    how = "timed" if measure.GPU else "simulated"
    slug = gpu.lower().replace(" ", "-")
    path = options.json or ROOT / "benchmarks" / "results" / f"tune-{slug}.json"
    if not path.absolute().parent.is_dir():
        parser.error(f"--json {path}: the folder {path.parent} does not exist; make it first")
    kept: dict[str, Any] = {"gpu": gpu, "how": how, "entries": {}}
    if path.exists():
        try:
            kept = json.loads(path.read_text("utf-8"))
            if (kept["gpu"], kept["how"]) != (gpu, how):
                raise ValueError(f"it is of {kept['gpu']}, {kept['how']}; this is {gpu}, {how}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(f"--json {path} is no result to go on from ({error}); move it away")

    def keep() -> None:
        kept.update(date=datetime.date.today().isoformat(), commit=measure._commit(), triton=triton.__version__)
        static_cost.write_json(path, kept)

    every = [entry for entry in entries(chosen, options.dtype or ["bf16"]) if entry.variant in variants]
    try:
        if measure.GPU:
            sweep(every, _by_time, kept["entries"], lambda entry: source(entry, True), keep)
        else:
            fork = multiprocessing.get_context("fork")
            with ProcessPoolExecutor(options.processes, fork) as pool:

                def try_them(work: list[tuple[Entry, Fields]]) -> Iterator[tuple[int, dict[str, Any]]]:
                    futures = {pool.submit(_by_number, e.name, e.dtype, fields, gpu): i for i, (e, fields) in enumerate(work)}
                    for done in as_completed(futures):
                        yield futures[done], done.result()
                        print(f"{work[futures[done]][0].name} {key(work[futures[done]][1])}: {done.result()}", file=sys.stderr)

                sweep(every, try_them, kept["entries"], lambda entry: source(entry, False), keep)
    except KeyboardInterrupt:
        print(f"benchmarks.tune: interrupted; {path} has what was tried, the same command goes on", file=sys.stderr)
        return 130
    found = {entry.name: kept["entries"][entry.name] for entry in every}
    print(f"{gpu}, {how}, microseconds at batch 256; {path}\n{differences(found)}")
    for entry in every if options.write else ():
        about = found[entry.name]
        if about["chosen"] != about["shipped"]:
            file = Path(entry.module.__file__)
            try:
                text = written(file.read_text("utf-8"), entry, about["chosen"])
            except ValueError as error:
                print(f"benchmarks.tune: {error}", file=sys.stderr)
                continue
            with replacing(file) as new:
                new.write(text.encode())
            print(f"{file.name}: {entry.name} is {about['chosen']} now; say beside it where that comes from: {path.name}")
    return 0


def _by_time(work: list[tuple[Entry, Fields]]) -> Iterator[tuple[int, dict[str, Any]]]:
    for _, group in itertools.groupby(range(len(work)), key=lambda i: work[i][0].name):
        numbers = list(group)
        yield from zip(numbers, timed(work[numbers[0]][0], [work[i][1] for i in numbers]), strict=True)


def _by_number(name: str, dtype: str, fields: Fields, gpu: str) -> dict[str, Any]:
    """``simulated``, of an entry by its name: itself it cannot be sent to a worker."""
    return simulated(_entry(name, dtype), fields, gpu)


@cache
def _entry(name: str, dtype: str) -> Entry:
    return next(entry for entry in entries(shipped.OPERATIONS, ["bf16", "fp32"]) if (entry.name, entry.dtype) == (name, dtype))


if __name__ == "__main__":
    sys.exit(main())
