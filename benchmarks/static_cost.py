"""What the compiled kernels cost, read from their machine code; needs no GPU.

    python -m benchmarks.static_cost [--kernel inner] [--variant s] [--dtype bf16] [--target sm_90] [--dynamic] [--time h200]
        [--json FILE] [--sass DIR]
    python -m benchmarks.static_cost --compare OLD NEW

Everything that the operations launch for the named variants (``launched.launches``) is compiled ahead of time for every
target. One row each: registers, spills and shared memory, how much of it is resident on one SM, and the
instructions that one patch costs in the main loop.

What the numbers mean, and what they do not:

- Counted is one turn of the main loop, over ``patches``; what stands outside, once a program, is not. Where the loop walks over
  parts of patches instead (``turns`` above 1), a program does its ``patches`` in so many turns: then those count, and all that
  stands outside the loop once. A kernel without a loop, or whose loop was unrolled, is counted whole.
- Instructions are static: code behind a branch counts once, taken or not, for every warp. So does every other loop (the row
  then shows "+" behind the sum; ``other_loops`` in JSON), and a loop that ptxas unrolled counts as one turn although it is
  several.
- The time is a bound: 12 calls at batch 256 with 196 patches an image, if every issue slot of an H200 (132 SMs, 4 slots a
  clock each, 1.98 GHz boost) issued an instruction of the loop. 45 to 70% of that rate is realistic; memory, tensor cores
  and latency may bind first.
- Compiled is what is launched at batch 256 (launched.py), by Triton's own launcher: pointers and integers that are divisible by
  16, and integers equal to 1, make other code than those that are not.
- ``--dynamic`` runs the PTX, too (sm_90's, or of the targets asked for), and shows beside what was counted what is executed
  for a patch and how memory is accessed (dynamic_cost.py): instructions, turns of shared memory and those of them that bank
  conflicts cost, sectors of global memory against those that the bytes asked for would fill.
- ``--time GPU`` simulates the machine code of that GPU's target (simulate.py): microseconds of a launch at batch 256 with a
  band, what binds, and what the warps wait for. What is not modelled, and how wrong it is, is said below the table.
- sm_86 and sm_89 are assembled from the PTX of sm_80, which is theirs but for the name of the target.
- What was read is kept, by the digests of a kernel's source, of all that it is compiled for and of the code that reads it: only
  what changed is compiled again.
- "risky" is an asynchronous matrix instruction of sm_90 (wgmma) with its left operand in registers: ptxas before 13.3 reuses
  such registers too early (triton issues 9433 and 11781), so its results need a test on the card.
"""

import argparse
import ast
import gc
import hashlib
import inspect
import json
import math
import multiprocessing
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import networkx
import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend

from benchmarks import dynamic_cost, machine_code, simulate
from benchmarks.dynamic_cost import aligned
from benchmarks.launched import BATCH, VARIANTS, Launched, launched, launches
from benchmarks.measure import DTYPES
from tnt_fast import kernels as shipped
from tnt_fast.kernels.operation import Operation
from tnt_fast.writing import write

CACHE = Path(__file__).parents[1] / ".cache" / "static_cost"
PATCHES = 256 * 196 * 12
SLOTS_PER_US = 132 * 4 * 1980
TIMED_TARGET = "sm_90"


class NotLaunched(LookupError):
    """An operation has another launch on GPUs of a target."""


class Target(NamedTuple):
    """What a compiler has to know of a GPU, and the limits of one of its SMs (AMD: compute units).

    ``registers``: of 32 bits, per SM; a warp takes them in pieces of ``register_unit``. ``shared``: bytes per SM; a program
    takes them in pieces of ``shared_unit``, and ``shared_reserved`` more go to the system. ``tensor_columns``: of tensor
    memory; a kernel that asks for more of them than there are compiles to a trap.
    """

    backend: str
    arch: int | str
    warp_size: int
    warps: int
    programs: int
    registers: int
    register_unit: int
    shared: int
    shared_unit: int
    shared_reserved: int
    multiprocessors: int
    tensor_columns: int = 0


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 64, 32, 65536, 256, 164 << 10, 128, 1024, 108),
    "sm_86": Target("cuda", 86, 32, 48, 16, 65536, 256, 100 << 10, 128, 1024, 84),
    "sm_89": Target("cuda", 89, 32, 48, 24, 65536, 256, 100 << 10, 128, 1024, 128),
    "sm_90": Target("cuda", 90, 32, 64, 32, 65536, 256, 228 << 10, 128, 1024, 132),
    "sm_100": Target("cuda", 100, 32, 64, 32, 65536, 256, 228 << 10, 128, 1024, 148, tensor_columns=512),
    "sm_120": Target("cuda", 120, 32, 48, 24, 65536, 256, 100 << 10, 128, 1024, 170),
    "gfx942": Target("hip", "gfx942", 64, 32, 16, 131072, 512, 64 << 10, 512, 0, 304),
}

SAME_PTX = {"sm_86": "sm_80", "sm_89": "sm_80"}  # but for the name of the target; a test compares them

# Kind of an instruction: the first pattern that matches its whole name (NVIDIA: up to the first dot); else "other".
KINDS = {
    "cuda": {
        "matrix": r"\w*MMA",
        "special": r"MUFU",
        "shuffle": r"SHFL",
        "shared": r"U?LDSM?|STSM?|ATOMS|LDTM|STTM|UTCCP",
        "spill": r"LDL|STL",
        "sync": r"BAR|WARPSYNC|SYNCS|DEPBAR|LDGDEPBAR|FENCE|WARPGROUP|BSYNC|BSSY|MEMBAR|ERRBAR|UTCBAR|ARRIVES|CCTL",
        "global": r"LDG|STG|LDGSTS|UTMALDG|UTMASTG|UBLKCP|ATOMG?|REDG?|LD|ST",
        "convert": r"F2\w+|I2F\w*|FRND|PRMT",
        "float": r"[FHD](FMA|MUL|ADD|MNMX|SEL|SETP|SET|CHK|SWZADD)\d?",
    },
    "hip": {
        "matrix": r"v_s?mfmac?_.*",
        "special": r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_.*",
        "shuffle": r"ds_b?permute_.*|ds_swizzle_.*|v_permlane.*|.*_dpp",
        "shared": r"ds_.*",
        "spill": r"scratch_.*",
        "sync": r"s_barrier|s_waitcnt|s_nop",
        "global": r"(global|buffer|flat)_.*",
        "convert": r"v_cvt_.*|v_perm_b32.*|v_pack_.*",
        "float": r"v_.*_b?f(16|32|64)(_.*)?",
    },
}
KIND_NAMES = (*KINDS["cuda"], "other")

SASS = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?P<guard>@\S+\s+)?(?P<op>[A-Z][A-Z0-9_.]*)(?P<rest>[^;]*);")
AMDGCN = re.compile(r"\t(?P<guard>@)?(?P<op>[a-z]\w*)(?P<rest>[^;]*)")
LABEL = re.compile(r"(\.L\w+):")
RISKY = re.compile(r"wgmma\.mma_async[^{;]*\{[^}]*\},\s*\{")


def occupancy(target: str, num_warps: int, registers: int, shared_bytes: int, tensor_columns: int = 0) -> tuple[int, int]:
    """Programs and warps that fit on one SM together; (0, 0) if not even one program fits."""
    limits = TARGETS[target]
    per_warp = math.ceil(max(registers, 1) * limits.warp_size / limits.register_unit) * limits.register_unit
    shared = math.ceil(shared_bytes / limits.shared_unit) * limits.shared_unit + limits.shared_reserved
    programs = min(
        limits.programs,
        limits.warps // num_warps,
        limits.registers // 4 // per_warp * 4 // num_warps,  # a warp's registers lie in one of the four partitions
        limits.shared // shared if shared else limits.programs,
        limits.tensor_columns // tensor_columns if tensor_columns else limits.programs,
    )
    return programs, programs * num_warps


class Code(NamedTuple):
    """Names of a kernel's instructions, counted: those of its main loop and the rest; and how many more loops either has."""

    loop: Counter
    rest: Counter
    loops_in_loop: int
    loops_in_rest: int


def read_code(disassembly: str, backend: str, main: int = 1) -> Code:
    """Count a kernel's instructions; without a loop, all of them are taken for the main loop.

    The main loop is the largest set of instructions that all reach one another. Unlike "all between the longest backward branch
    and its target", that holds for a loop that is entered in its middle (AMD), and is not misled by the blocks that compilers
    put behind the end of the code and that jump back (NVIDIA: retries of a wait). ``main``: how many main loops there are, one
    behind another, which are counted as one.
    """
    pattern = SASS if backend == "cuda" else AMDGCN
    code, at = [], {}
    for line in disassembly.splitlines():
        if label := LABEL.match(line):
            at[label[1]] = len(code)
        elif instruction := pattern.match(line):
            code.append(instruction)
    branches, begins = {}, {0, *at.values()}  # of an instruction that ends a block: where it goes
    for i, instruction in enumerate(code):
        op, rest = instruction["op"], instruction["rest"].strip()
        # BRA.DIV leaves only with a diverged warp, which programs on tiles do not have
        to = [at[name] for name in re.findall(r"\.L\w+", rest) if name in at] if op != "BRA.DIV" else []
        leaves = re.match(r"EXIT|RET|BRX|s_endpgm|s_setpc|s_branch", op) or (op.startswith("BRA") and rest.startswith("`"))
        if to or leaves:
            branches[i] = to + [i + 1] * (not leaves or bool(instruction["guard"]))
            begins.add(i + 1)
    starts = sorted(begin for begin in begins if begin < len(code))
    ends = dict(zip(starts, [*starts[1:], len(code)], strict=True))  # a block, by its first instruction
    graph = networkx.DiGraph()
    graph.add_nodes_from(ends)
    for block, end in ends.items():
        graph.add_edges_from((block, to) for to in branches.get(end - 1, [end]) if to in ends)

    def size(blocks):
        return sum(ends[block] - block for block in blocks)

    def loops(blocks):
        parts = networkx.strongly_connected_components(graph.subgraph(blocks))
        again = [part for part in parts if len(part) > 1 or any(graph.has_edge(block, block) for block in part)]
        return [part for part in again if size(part) > 1]

    def real(parts):
        return sum(size(part) > 8 for part in parts)  # shorter ones only wait for a barrier

    def count(blocks):
        return Counter(code[i]["op"] for block in blocks for i in range(block, ends[block]))

    reachable = {0} | networkx.descendants(graph, 0)  # not the padding, and not the endless loop behind the code
    outer = sorted(loops(reachable), key=size)
    if not outer:
        return Code(count(reachable), Counter(), 0, 0)
    bodies, within = outer[-main:], 0
    for body in bodies:
        entries = {block for block in body if not block or any(before not in body for before in graph.predecessors(block))}
        within += real(loops(body - entries))
    whole = set().union(*bodies)
    return Code(count(whole), count(reachable - whole), within, real(outer[:-main]))


class _Device:
    """What Triton's launcher asks of a driver, for a GPU that is described and not there."""

    def __init__(self, target: Target):
        self.target = GPUTarget(target.backend, target.arch, target.warp_size)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def _launches(kernel: str) -> list[tuple[str, str, Launched]]:
    """(variant, dtype, launch) of an operation, or of what stands in its place."""
    operation = shipped.OPERATIONS[kernel]
    return launches(kernel) if isinstance(operation, Operation) else operation.launches


@lru_cache
def _recorded(kernel: str, variant: str, dtype: str, target: str) -> list[Launched]:
    """What an operation launches on a GPU of that target, at batch 256."""
    limits = TARGETS[target]
    capability = divmod(limits.arch, 10) if isinstance(limits.arch, int) else None
    return launched(kernel, variant, DTYPES[dtype], limits.multiprocessors, capability)


def _as_launched(kernel: str, variant: str, dtype: str, launch: Launched, target: str) -> Launched:
    """A launch as it is started, at batch 256, on a GPU of that target.

    Raises:
        NotLaunched: the operation does not launch it there.
    """
    if not isinstance(shipped.OPERATIONS[kernel], Operation):  # a launch alone
        return launch
    for found in _recorded(kernel, variant, dtype, target):
        if found.code == launch.code:
            return found
    raise NotLaunched(f"{kernel} does not launch {launch.kernel.__name__} with {launch.constants} at batch {BATCH}")


def compile_launch(found: Launched, target: Target) -> Any:
    """Triton's compiled kernel, through its launcher, which specialises: what is divisible by 16 or equal to 1 is known."""
    constants = found.constants
    if target.backend == "hip":  # the fast forms are PTX
        constants = {name: replace(Z, FAST=False) if hasattr(Z, "FAST") else Z for name, Z in constants.items()}
    triton.runtime.driver.set_active(_Device(target))
    found.kernel.device_caches.clear()  # of the memory only, and for another target; files stay
    return found.kernel.run(*found.arguments, grid=(1,), warmup=True, **constants, **found.options)


def assemble(ptx: str, found: Launched, target: Target) -> bytes:
    """The cubin of another target's PTX, as Triton has it made."""
    backend = make_backend(GPUTarget(target.backend, target.arch, target.warp_size))
    renamed = re.sub(r"(?m)^\.target sm_\w+", f".target sm_{target.arch}", ptx)
    return backend.make_cubin(renamed, {}, backend.parse_options(dict(found.options)), target.arch)


def read_nvidia(compiled: Any, arch: int) -> dict[str, Any]:
    """What the cubin and the PTX say."""
    tools = triton.knobs.nvidia
    registers, stack = machine_code.usage(compiled.asm["cubin"])
    ptxas = getattr(tools, "ptxas_blackwell", tools.ptxas) if arch >= 100 else tools.ptxas
    return {
        "registers": registers,
        "stack_bytes": stack,
        "risky": bool(RISKY.search(compiled.asm["ptx"])),
        "compiler": f"triton {triton.__version__}, ptxas {ptxas.version}",
    }


def _read_amd(text: str) -> dict[str, Any]:
    """What an assembly's metadata says; ``registers`` are the vector registers, accumulators among them."""
    keys = {
        "registers": "vgpr_count",
        "accumulator_registers": "agpr_count",
        "scalar_registers": "sgpr_count",
        "spilled_registers": "vgpr_spill_count",
        "stack_bytes": "private_segment_fixed_size",
    }
    found = {key: int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for key, name in keys.items()}
    return found | {"risky": False, "compiler": f"triton {triton.__version__}"}


def _time(found: Launched, launch: Any, text: str, resident: int, gpu: simulate.Gpu, conflicts: float) -> dict[str, Any]:
    """What a launch's simulation says, or why there is none; ``text``: its disassembly."""
    tiles = math.ceil(PATCHES / 12 / launch.patches)
    try:
        code = machine_code.parts(machine_code.decode(text), loops=launch.loops)
        time = simulate.simulate(
            code,
            gpu,
            warps=launch.config.warps,
            resident=resident,
            grid=found.grid,
            bytes=found.bytes,
            tiles=tiles,
            loops=launch.turns if launch.turns > 1 else 0,
            conflicts=conflicts,
            l1=launch.l1,
        )
    except ValueError as error:
        return {"gpu": gpu.name, "error": str(error)}
    return {"gpu": gpu.name, "error": None, "other_loops": code.other_loops} | time._asdict()


def _is_for(launch: Any, target: str) -> bool:
    """Whether a launch may be started on GPUs of that target at all."""
    limits, capability = TARGETS[target], launch.config.capability
    return capability is None or (isinstance(limits.arch, int) and divmod(limits.arch, 10) == capability)


def _row(
    kernel: str, number: int, target: str, sass: Path | None, gpu: simulate.Gpu | None, counted: bool, conflicts: float = 1.0
) -> dict[str, Any]:
    """``cost`` of one launch, the ``number``-th of its module. Runs in a worker."""
    variant, dtype, shown = _launches(kernel)[number]
    where = sass / f"{kernel}-{variant}-{dtype}-{shown.kernel.__name__}-{number}-{target}" if sass else None
    return cost(kernel, variant, dtype, shown, target, where, gpu, counted, conflicts)


def cost(
    kernel: str,
    variant: str,
    dtype: str,
    shown: Launched,
    target: str,
    sass: Path | None = None,
    gpu: simulate.Gpu | None = None,
    counted: bool = True,
    conflicts: float = 1.0,
) -> dict[str, Any]:
    """Compile a launch of an operation for a target and read its cost, unless that is known. ``sass``: a file, less its ending,
    that gets the disassembly. ``conflicts``: turns of shared memory over the least, which a simulation takes."""
    limits = TARGETS[target]
    started, launch = _as_launched(kernel, variant, dtype, shown, target), shown.spec
    known = _known(started, gpu, target, launch.config, launch.patches, launch.turns, launch.loops, counted, conflicts)
    if sass is None and known.exists():
        return json.loads(known.read_text())
    compiled = compile_launch(started, TARGETS[SAME_PTX.get(target, target)])
    if target in SAME_PTX:
        compiled.asm["cubin"] = assemble(compiled.asm["ptx"], started, limits)
    if limits.backend == "cuda":
        text = machine_code.disassembly(compiled.asm["cubin"]) if counted or gpu is not None or sass is not None else ""
        found = read_nvidia(compiled, limits.arch)
    else:
        text = compiled.asm["amdgcn"]
        found = _read_amd(text)
    if sass is not None:
        sass.with_name(f"{sass.name}.{'sass' if limits.backend == 'cuda' else 'amdgcn'}").write_text(text)

    shared, columns = compiled.metadata.shared, getattr(compiled.metadata, "tmem_size", 0)
    programs, warps = occupancy(target, launch.config.warps, found["registers"], shared, columns)
    found |= {
        "shared_bytes": shared,
        "tensor_columns": columns,
        "occupancy_programs": programs,
        "occupancy_warps": warps,
    }
    if counted:
        found |= _counts(launch, target, text)
    if gpu is not None:
        found["simulated"] = _time(started, launch, text, programs, gpu, conflicts)
    write_json(known, found)
    return found


def _counts(launch: Any, target: str, text: str) -> dict[str, Any]:
    """Instructions of a patch, of a launch's machine code."""
    backend = TARGETS[target].backend
    counted = read_code(text, backend, launch.loops)
    whole = launch.turns > 1  # else the main loop goes over patches, and the rest is shared by all its turns
    turns = launch.turns if counted.rest else 1  # without a loop there are none: the compiler has unrolled it
    ops = Counter({op: n * turns for op, n in counted.loop.items()}) + (counted.rest if whole else Counter())
    kinds = dict.fromkeys(KIND_NAMES, 0)
    for op, count in ops.items():
        name = op.split(".")[0]
        kinds[next((kind for kind, form in KINDS[backend].items() if re.fullmatch(form, name)), "other")] += count
    each = launch.config.warps / launch.patches
    per_patch = sum(kinds.values()) * each
    return {
        "warp_instructions_per_patch": round(per_patch, 1),
        "instructions_by_kind": {kind: round(count * each, 1) for kind, count in kinds.items()},
        "matrix_instructions": kinds["matrix"],
        "other_loops": counted.loops_in_loop + (counted.loops_in_rest if whole else 0),
        "us_12_layers_batch_256": round(PATCHES * per_patch / SLOTS_PER_US, 1) if target == TIMED_TARGET else None,
    }


def digest(*modules: Any) -> str:
    """Of the code of modules, without docstrings and lines of comments: as long as it stays, what it made is good."""
    found = hashlib.sha256()
    for module in modules:
        lines = inspect.getsource(module).splitlines()
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
                told = node.body[0]
                lines[told.lineno - 1 : told.end_lineno] = [""] * (told.end_lineno - told.lineno + 1)
        found.update("\n".join(line for line in lines if line.strip() and not line.lstrip().startswith("#")).encode())
    return found.hexdigest()[:16]


@cache
def readers(timed: bool) -> str:
    """A digest of what reads machine code, and of what simulates it."""
    return digest(sys.modules[cost.__module__], machine_code, *([simulate] if timed else []))


def _known(found: Launched, gpu: simulate.Gpu | None, *about: Any) -> Path:
    """Where what was read of a launch is kept, by the digests of the kernel's source with all that it calls, of what it is
    compiled for, and of what reads it. Launches that differ in sizes alone are one, unless a time is told of them."""

    def described(x: Any) -> Any:
        if isinstance(x, tuple):
            return [described(each) for each in x]
        if type(x) is int:  # as the launcher tells them apart
            return "1" if x == 1 else f"{'16 ' * (x % 16 == 0)}i{32 if x.bit_length() < 32 else 64}"
        return str(x.dtype) if isinstance(x, torch.Tensor) else repr(x)

    read = (readers(gpu is not None), triton.__version__, str(triton.knobs.nvidia.ptxas), found.kernel.cache_key, about)
    launch = (described(found.arguments), sorted(found.constants.items()), sorted(found.options.items()))
    time = (gpu, found.grid, found.bytes) if gpu is not None else ()
    CACHE.mkdir(parents=True, exist_ok=True)
    return CACHE / f"{hashlib.sha256(repr((read, launch, time)).encode()).hexdigest()}.json"


def _dynamic(kernel: str, variant: str, dtype: str, target: str) -> list[dict[str, Any]]:
    """What an operation's launches execute. Runs in a worker."""
    torch.set_num_threads(1)  # a forked process has none of the parent's threads
    return dynamic_cost.costs(kernel, variant, dtype, target)


def _counted(executed: list[dict[str, Any]], launch: Any) -> dict[str, Any] | None:
    """What was counted of a launch, less its names."""
    same = (x for x in executed if (x["function"], x["constants"]) == (launch.kernel.__name__, launch.constants))
    return next(({name: n for name, n in x.items() if name not in ("function", "constants")} for x in same), None)


def _conflicts(counts: "Future[list[dict[str, Any]]]", launch: Any) -> float:
    """Turns of shared memory over those without conflicts, of a launch, when they are counted."""
    found = None if counts.exception() else _counted(counts.result(), launch)
    return found["wavefronts"] / (found["wavefronts"] - found["conflicts"]) if found and found["conflicts"] else 1.0


def _chosen(what: str, asked: Iterable[str] | None, accepted: Iterable[str]) -> list[str]:
    accepted = list(accepted)
    if unknown := [name for name in asked or () if name not in accepted]:
        raise ValueError(f"unknown {what} {', '.join(map(repr, unknown))}: accepted are {', '.join(accepted) or 'none'}")
    return [name for name in accepted if asked is None or name in asked]


def rows(
    kernels: Iterable[str] | None = None,
    variants: Iterable[str] | None = None,
    dtypes: Iterable[str] | None = None,
    targets: Iterable[str] | None = None,
    jobs: int | None = None,
    sass: Path | None = None,
    dynamic: bool = False,
    time: str | None = None,
    counted: bool = True,
) -> list[dict[str, Any]]:
    """One row for each shipped launch and target among those asked for (None: all) that it is launched on, in that order.

    What does not compile has a row, too, with ``error`` instead of numbers. ``sass``: a folder that gets the disassembly.
    ``dynamic``: NVIDIA's rows of the targets that are asked for by name, or sm_90's, have what is executed as well, under that
    name. ``time``: a GPU of simulate.py's; rows of its target have ``simulated``, with the conflicts that ``dynamic`` counts.
    Without ``counted`` a row has no instructions: to disassemble takes as long as to assemble.
    """
    gpu = None if time is None else simulate.gpu(time)
    kernels = _chosen("kernel", kernels, shipped.OPERATIONS)
    variants = _chosen("variant", variants, VARIANTS)
    dtypes = _chosen("dtype", dtypes, DTYPES)
    executes = {TIMED_TARGET} if targets is None else {t for t in targets if t in TARGETS and TARGETS[t].backend == "cuda"}
    targets = _chosen("target", targets, TARGETS)
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs is {jobs}; at least 1 is needed")
    if triton.knobs.runtime.interpret:
        raise ValueError("kernels made for Triton's interpreter cannot be compiled: unset TRITON_INTERPRET")
    if sass is not None:
        sass.mkdir(parents=True, exist_ok=True)

    every = [
        (kernel, number, variant, dtype, shown.spec, target)
        for kernel in kernels
        for number, (variant, dtype, shown) in enumerate(_launches(kernel))
        for target in targets
        if variant in variants and dtype in dtypes and _is_for(shown.spec, target)
    ]
    found, executed = {}, {}
    # fork: the workers know what OPERATIONS holds here, and a launch itself cannot be sent to them
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(jobs or os.cpu_count(), fork, initializer=gc.freeze) as pool:  # what is there is no garbage
        for operation in dict.fromkeys((kernel, variant, dtype, target) for kernel, _, variant, dtype, _, target in every):
            if dynamic and operation[-1] in executes:
                executed[operation] = pool.submit(_dynamic, *operation)
        for kernel, number, variant, dtype, launch, target in every:
            row = dict(kernel=kernel, function=launch.kernel.__name__, variant=variant, dtype=dtype, target=target)
            row |= dict(num_warps=launch.config.warps, num_stages=launch.config.stages)
            row |= dict(patches=launch.patches, turns=launch.turns)
            timed = gpu if gpu is not None and gpu.target == target else None
            counts = executed.get((kernel, variant, dtype, target))
            conflicts = _conflicts(counts, launch) if timed is not None and counts is not None else 1.0
            found[pool.submit(_row, kernel, number, target, sass, timed, counted, conflicts)] = row
        futures = {*found, *executed.values()}
        for future in tqdm(as_completed(futures), total=len(futures), desc="compile", file=sys.stderr, disable=not found):
            if future in found and not isinstance(error := future.exception(), NotLaunched):
                found[future] |= {"error": f"{type(error).__name__}: {error}"} if error else {"error": None} | future.result()
    for (kernel, _, variant, dtype, launch, target), row in zip(every, found.values(), strict=True):
        counts = executed.get((kernel, variant, dtype, target))
        if counts is not None and row.get("error", "") is None:
            if error := counts.exception():
                row["error"] = f"{type(error).__name__}: {error}"
            else:
                row["dynamic"] = _counted(counts.result(), launch)
    return [row for row in found.values() if "error" in row]


def _told(simulated: dict[str, Any] | None) -> list[str]:
    """A simulation's cells: "+" behind a time is a loop that was taken as one turn."""
    if simulated is None or simulated["error"]:
        return ["-", "-", "-", "none" if simulated else "-", simulated["error"] if simulated else "-"]
    waits = ", ".join(f"{name} {share:.0%}" for name, share in list(simulated["waits"].items())[:3])
    more = "+" if simulated["other_loops"] else ""
    return [f"{simulated['us']}{more}", str(simulated["low"]), str(simulated["high"]), simulated["binds"], waits]


def _table(good: list[dict[str, Any]]) -> str:
    """Plain text, one line a row, columns aligned."""
    head = ["kernel", "function", "variant", "dtype", "target", "warps", "patches", "registers", "stack", "shared"]
    head += ["programs/SM", "warps/SM", "instructions/patch", *KIND_NAMES, "matrix/warp", "risky", "us"]
    dynamic = any(row.get("dynamic") for row in good)
    timed = any(row.get("simulated") for row in good)
    head += ["simulated us", "low", "high", "binds", "waits"] if timed else []
    head += ["executed/patch", "shared turns", "conflicts", "sectors", "filled"] if dynamic else []
    lines = [head]
    for row in good:
        registers = str(row["registers"])
        if "scalar_registers" in row:
            accumulators = row["accumulator_registers"]
            registers = f"{row['registers'] - accumulators}v+{accumulators}a+{row['scalar_registers']}s"
        cells = [row[key] for key in ("kernel", "function", "variant", "dtype", "target", "num_warps")]
        cells += [
            f"{row['patches']:.4g}",
            registers,
            *(row[key] for key in ("stack_bytes", "shared_bytes", "occupancy_programs", "occupancy_warps")),
        ]
        cells += [f"{row['warp_instructions_per_patch']:.0f}{'+' if row['other_loops'] else ''}"]
        cells += [f"{row['instructions_by_kind'][kind]:.0f}" for kind in KIND_NAMES]
        us = row["us_12_layers_batch_256"]
        cells += [row["matrix_instructions"], "RISKY" if row["risky"] else "no", "-" if us is None else f"{us:.0f}"]
        if timed:
            cells += _told(row.get("simulated"))
        if dynamic:
            seen = row.get("dynamic")
            cells += (
                [f"{seen[key]:.0f}" for key in ("instructions", "wavefronts", "conflicts", "sectors")] if seen else ["-"] * 4
            )
            cells += [f"{seen['bytes'] / 32:.0f}" if seen else "-"]
        lines.append([str(cell) for cell in cells])
    return aligned(lines, 5)  # the first columns are words


def comparison(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> str:
    """What changed from one result to another, a line a launch; how many did not."""

    def numbered(table: list[dict[str, Any]]) -> dict[tuple, dict[str, Any]]:
        seen, rows_ = Counter(), {}
        for row in table:
            name = tuple(row[key] for key in ("kernel", "function", "variant", "dtype", "target"))
            rows_[(*name, seen[name])] = row
            seen[name] += 1
        return rows_

    before, after = numbered(old), numbered(new)
    keys = {"instructions": "warp_instructions_per_patch"}
    keys |= {"registers": "registers", "stack": "stack_bytes", "shared": "shared_bytes", "programs/SM": "occupancy_programs"}
    lines, same = [["kernel", "function", "variant", "dtype", "target", "change", *keys]], 0
    for name in dict.fromkeys((*before, *after)):
        (a, b), cells = (before.get(name), after.get(name)), [*name[:-1]]
        if a is None or b is None or (a["error"] is None) != (b["error"] is None):
            lines.append(
                [*cells, "new" if a is None else "gone" if b is None else "does not compile" if b["error"] else "compiles"]
            )
            continue
        if a["error"] or all(a[key] == b[key] for key in keys.values()):
            same += 1
            continue
        per_patch = [row["warp_instructions_per_patch"] for row in (a, b)]
        cells.append(f"{100 * (per_patch[1] / per_patch[0] - 1):+.1f}%")
        cells += [f"{a[key]:g}" if a[key] == b[key] else f"{a[key]:g} → {b[key]:g}" for key in keys.values()]
        lines.append(cells)
    lines = [line + [""] * (len(lines[0]) - len(line)) for line in lines]
    return "\n".join([*([aligned(lines, len(lines[0]))] if len(lines) > 1 else []), f"{same} launches did not change"])


def write_json(path: Path, table: Any) -> None:
    """A reader never sees half a file."""
    write(path, (json.dumps(table, indent=1) + "\n").encode())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static_cost", description=__doc__.split("\n")[0])
    for name, accepted in (("kernel", shipped.OPERATIONS), ("variant", VARIANTS), ("dtype", DTYPES), ("target", TARGETS)):
        listed = ", ".join(accepted) or "this version has none"
        parser.add_argument(f"--{name}", action="append", help=f"only this one; repeatable ({listed})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as a JSON list")
    parser.add_argument("--sass", type=Path, metavar="DIR", help="write the disassembly of each row")
    counted = "run the PTX, too, and count what it executes: sm_90's, or that of each --target"
    parser.add_argument("--dynamic", action="store_true", help=counted)
    listed = ", ".join(simulate.GPUS)
    parser.add_argument(
        "--time", metavar="GPU", help=f"simulate its target's machine code: microseconds of a launch ({listed})"
    )
    parser.add_argument("--jobs", type=int, help="compilations at a time (default: one a core)")
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="only say what changed between two results"
    )
    options = parser.parse_args(arguments)
    if options.compare:
        try:
            print(comparison(*(json.loads(path.read_text()) for path in options.compare)))
        except (OSError, ValueError, LookupError, TypeError) as error:
            parser.error(f"--compare {' '.join(map(str, options.compare))}: not two results of --json ({error!r})")
        return 0
    if options.json and not options.json.absolute().parent.is_dir():
        parser.error(f"--json {options.json}: the folder {options.json.parent} does not exist; make it first")
    try:
        table = rows(
            options.kernel,
            options.variant,
            options.dtype,
            options.target,
            options.jobs,
            options.sass,
            options.dynamic,
            options.time,
        )
    except ValueError as error:
        parser.error(str(error))

    if not shipped.OPERATIONS:
        print("This version of tnt_fast has no kernels.")
    elif not table:
        print("No kernel ships a configuration of that kind.")
    good = [row for row in table if row["error"] is None]
    if good:
        print(_table(good))
        compilers = {name for row in good for name in row["compiler"].split(", ")}
        print(
            f"\n{', '.join(sorted(compilers, reverse=True))}. Instructions per patch: of all warps of a program, over the "
            'patches it does meanwhile; "+": and more, a loop was counted as one turn.\n'
            "us: 12 calls at batch 256 (196 patches an image) on an H200 that issues in every slot: 132 SMs, 4 a clock, "
            "1.98 GHz boost. 45 to 70% of that rate is realistic."
        )
        if options.time:
            gpu = simulate.gpu(options.time)
            print(
                f"simulated us: of a launch at batch 256 on {gpu.name} ({gpu.multiprocessors} multiprocessors, {gpu.ghz} GHz "
                f"under load, {gpu.dram:.0f} GB/s; {gpu.source}), and the band that all checks lie in "
                '(results/simulation.json); "+": a loop besides the main one was taken as one turn.\n'
                f"Not modelled: {simulate.NOT_MODELLED}. Accesses to global memory are taken as side by side, shared memory as "
                f"{'with the conflicts that are counted' if options.dynamic else 'without conflicts (--dynamic counts them)'}."
            )
    failures = {}
    for row in table:
        where = f"{row['variant']} {row['dtype']} {row['target']}"
        if row["error"] is not None:
            failures.setdefault((row["kernel"], row["function"], row["error"]), []).append(where)
        elif row["occupancy_programs"] == 0:
            print(
                f"{row['kernel']} {row['function']} compiles, but no program of it fits on an SM ({where}, {row['num_warps']} "
                f"warps, {row['patches']:.4g} patches): {row['registers']} registers, {row['shared_bytes']} shared bytes, "
                f"{row['tensor_columns']} tensor memory columns",
                file=sys.stderr,
            )
    for (kernel, function, error), places in failures.items():
        print(f"{kernel} {function} does not compile ({', '.join(places)}): {error}", file=sys.stderr)
    if options.json:
        write_json(options.json, table)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
