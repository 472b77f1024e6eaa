"""Microseconds of a kernel from its machine code, without a GPU: the programs of one multiprocessor run, warp by warp.

A scheduler (there are four) issues an instruction a clock, of a warp whose stall count has passed and whose scoreboards are
clear (machine_code.py), to a pipe that takes it: each pipe needs so many clocks for a warp's instruction. Matrix and arithmetic
instructions have their latency in the stall counts. What goes to shared memory, shuffles, special functions and global memory
waits in one queue of its scheduler, in order; shared memory and shuffles are one unit of the whole multiprocessor. Hopper's
asynchronous products take the matrix unit and shared memory one behind another, while their warp goes on to where it waits for
a group of them. Global memory is a bandwidth and a latency: of DRAM, by the L2 cache, for the bytes of the arguments, each
once; the rest is in the L1 cache, and of asynchronous copies in L2. A program that ends makes room for the next; of a kernel
that stays, programs have as many turns as there are tiles for them.

Not modelled (``NOT_MODELLED``), and assumed: accesses to global memory are side by side, branches go the way that
``machine_code.parts`` says, loops besides the main one turn once; shared memory has the conflicts that are passed in. How wrong
all that is: results/simulation.json (simulation_checks.py), from which the band comes. No value was sought to fit a time, and
where each comes from stands beside it; but three were chosen among what is published after a first comparison with the known
times: the clock under load, the one queue, and that what is read again is in L1. The clock matters most: at the 1.98 GHz that
nvidia-smi showed in our runs all times of an H200 were 10% less.
"""

import heapq
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from benchmarks.machine_code import NOTHING, Instruction, Parts

NOT_MODELLED = (
    "instruction caches, conflicts between registers' banks, which of several warps is preferred, what caches evict, DRAM's "
    "latency under load, translation of addresses, power"
)
BAND = (0.9, 1.4)  # measured over simulated: every row of results/simulation.json lies within


@dataclass(frozen=True)
class Gpu:
    """``ghz``: under load. ``dram``, ``l2``: GB/s that are reached. ``matrix``: clocks of a scheduler for an m16n8k16 product
    of half precision with float32 sums; ``alu``: for an integer instruction, a comparison or a conversion."""

    name: str
    target: str
    multiprocessors: int
    ghz: float
    dram: float
    l2: float
    matrix: float
    source: str
    alu: int = 2


# Of the peak of DRAM 88% are taken as reached: the H200's own copy, 4216 of 4800 GB/s (results/2026-11-26-0725, roofs). Clocks
# under load: where nvidia-smi says 1980 MHz, Nsight Compute counted 1780 to 1790 on our H200 while products run, of inner's
# kernels, and 1960 while LayerNorms do (results/2026-11-26-1900/ncu.txt); consumer GPUs at their boost.
# Products: 2048 multiply-adds by the peaks' rates; of Hopper's mma.sync reaches 63% (taken over from the first simulation here;
# ptxas puts two of them 6 clocks apart, which is 67%).
HOPPER = "peaks by NVIDIA's H100 and H200 data sheets; L2: assumed"
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h200", "sm_90", 132, 1.78, 4216, 5600, 6.35, HOPPER),
        Gpu("h100", "sm_90", 132, 1.78, 2950, 5600, 6.35, HOPPER),
        Gpu("a100", "sm_80", 108, 1.41, 1794, 4000, 8, "peaks by NVIDIA's A100 data sheet (80 GB, SXM); L2: assumed"),
        Gpu("rtx4090", "sm_89", 128, 2.52, 887, 4000, 32, "peaks by NVIDIA's Ada whitepaper; L2: assumed"),
        Gpu("rtx5090", "sm_120", 170, 2.41, 1577, 4500, 32, "peaks by NVIDIA's RTX Blackwell whitepaper; L2: assumed", alu=1),
    )
}

# Clocks after an instruction's turn until its result is there: pointer chases on an H100 at 1980 MHz (a public "CUDA
# Performance Study — NVIDIA H100 SXM5", section 3a), taken for all GPUs. Special functions, shuffles and barriers: assumed.
SHARED, L1, L2, DRAM = 29, 40, 260, 570
SPECIAL, SHUFFLE, BARRIER, CONSTANT, UNIFORM = 14, 23, 16, 30, 12
PRODUCT = 64  # from an asynchronous product's end until a warp that waits for it goes on: assumed
QUEUE = 8  # instructions that wait for memory or special functions, a scheduler: assumed
START_US, NEXT_PROGRAM = 1.5, 300  # of a launch; clocks from a program's end to the next one's begin: assumed

# Which pipe an instruction goes to, and how many clocks of it a warp takes (None: it depends). The rates are those of the CUDA
# C++ Programming Guide ("throughput of native arithmetic instructions") and the distances at which ptxas puts two of a kind.
# That shuffles take turns of shared memory: quack, AI/gpu_pipe_microbench_notes.md. That special functions share the queue with
# memory: Nsight Compute's documentation ("stall MIO throttle").
PIPES = {
    "matrix": (r"HMMA", None),
    "special": (r"MUFU|F2F|I2F|F2I|FRND|POPC|FLO|BREV", 8),
    "shared": (r"LDSM?|STSM?|LDL|STL|ATOMS", None),
    "shuffle": (r"SHFL", 1),
    "global": (r"LDG|STG|LDGSTS|REDG?|ATOMG", None),
    "float": (r"F(FMA|MUL|ADD)(32I)?", 1),
    "wide": (r"H(FMA2|ADD2|MUL2)(_32I)?|IMAD|IDP", 2),  # both halves of the float pipe
    "alu": (
        r"IADD3|LOP3?|FMNMX|PRMT|SEL|[IF]SETP|SHF|MOV|F2FP|FSEL|LEA|PLOP3|HMNMX2|VIMNMX3?|VIADD(MNMX)?|SGXT|IABS|P2R|R2P|I2FP|HSETP2"
        r"|HSET2|FSET|FCHK|CS2R|IMNMX|BMSK|SHL|SHR|IADD|VOTE|FSWZADD",
        None,
    ),
    "constant": (r"LDC|ULDC|LDCU|S2R", 2),
    "product": (r"HGMMA", 0),
    "none": (
        r"BAR|BRA|EXIT|NOP|BSSY|BSYNC|WARPSYNC|DEPBAR|LDGDEPBAR|CALL|RET|BREAK|YIELD|BMOV|MEMBAR|ERRBAR|CCTL|JMP|WARPGROUP|FENCE",
        0,
    ),
    "uniform": (r"U(MOV|IADD3|IMAD|LEA|SHF|ISETP|SEL|LOP3|SGXT|PLOP3|PRMT|FLO|POPC|BREV|BMSK|P2UR)|R2UR|S2UR|REDUX|VOTEU", 2),
}
NAMES = tuple(PIPES)
_MATRIX, _SPECIAL, _SHARED, _SHUFFLE, _GLOBAL, _FLOAT, _WIDE, _ALU, _CONSTANT, _PRODUCT, _NONE, _UNIFORM = range(len(NAMES))


def gpu(name: str) -> Gpu:
    """
    Raises:
        ValueError: it is not in the table.
    """
    if name not in GPUS:
        raise ValueError(f"unknown gpu {name!r}: accepted are {', '.join(GPUS)}")
    return GPUS[name]


class _Step(NamedTuple):
    """An instruction as it is run. ``kind``: what else happens; ``number``: of groups, of copies or products, that may be left.

    ``clocks`` of an asynchronous product are shared memory's, ``number`` the matrix unit's.
    """

    pipe: int
    clocks: float
    stall: int
    sets: int
    frees: int
    waits: tuple[int, ...]
    bytes: int
    kind: str
    number: int


@lru_cache(None)
def _pipe(name: str) -> int:
    for pipe, (form, _) in enumerate(PIPES.values()):
        if re.fullmatch(form, name):
            return pipe
    raise ValueError(f"the machine code has {name}, which no pipe of simulate.py takes: no time is told")


def _bytes(op: str) -> int:
    """Of a thread's access."""
    found = re.search(r"\.(128|64|U16|S16|U8|S8)\b", op)
    return {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}[found[1]] if found else 4


def _step(i: Instruction, gpu: Gpu, conflicts: float) -> _Step:
    name, pipe = i.name, _pipe(i.name)
    clocks = {"matrix": gpu.matrix, "alu": gpu.alu}.get(NAMES[pipe], PIPES[NAMES[pipe]][1] or 1.0)
    size, kind, number = 0, "", 0
    if pipe == _MATRIX:
        clocks *= {"16816": 1.0, "1688": 0.5, "1684": 0.5}.get(i.op.split(".")[1], 1.0) * (2.0 if "TF32" in i.op else 1.0)
    elif pipe == _SHARED:
        matrices = re.search(r"\.([124])$", i.op) if name in ("LDSM", "STSM") else None
        clocks = int(matrices[1]) if matrices else max(1, _bytes(i.op) // 4)
        clocks *= 1.0 if name in ("LDL", "STL") else conflicts
        kind = "store" if name.startswith("ST") else ""
    elif pipe == _GLOBAL:
        size = 32 * _bytes(i.op)
        clocks = max(1, size // 128)
        kind = "copy" if name == "LDGSTS" else "" if name in ("LDG", "ATOMG") else "store"
    elif pipe == _PRODUCT:  # 64 by k, which a warp group's four warps share, and k by n of 16 bits, or what takes as long
        number = int(re.match(r"HGMMA\.64x(\d+)x", i.op)[1]) // 2
        clocks = number / 8 + (0 if re.match(r"R\d+, R\d+", i.rest) else 4)  # the left operand may lie in registers
        kind = "last" if i.rest.endswith("gsb0") else ""
    elif name == "BAR":
        kind = "barrier"
    elif name == "LDGDEPBAR":
        kind = "group"
    elif name == "DEPBAR" and (left := re.match(r"SB\d, 0x([0-9a-f]+)", i.rest)):
        kind, number = "groups", int(left[1], 16)
    elif i.op.startswith("WARPGROUP.DEPBAR"):
        kind, number = "products", int(i.rest.split(", ")[1], 16)
    waits = tuple(board for board in range(6) if i.waits >> board & 1)
    return _Step(pipe, float(clocks), max(1, i.stall), i.sets, i.frees, waits, size, kind, number)


class _Warp:
    """``due``: when its next instruction can be issued, ``why`` not before: the pipe that it waits for, or None."""

    __slots__ = ("boards", "copied", "due", "groups", "pc", "program", "ready", "source", "step", "stopped", "trace", "why")

    def __init__(self, trace: Sequence[_Step], program: int, ready: float):
        self.trace, self.program, self.ready, self.pc = trace, program, ready, 0
        self.boards, self.source = [0.0] * 6, [_NONE] * 6
        self.groups: dict[str, list[float]] = {"groups": [], "products": []}  # when each ends, by what waits for them
        self.copied, self.stopped = 0.0, False
        self.arm()

    def arm(self) -> None:
        step = self.step = self.trace[self.pc]
        due, why = self.ready, None
        for board in step.waits:
            if self.boards[board] > due:
                due, why = self.boards[board], self.source[board]
        groups = self.groups.get(step.kind, ())
        if len(groups) > step.number and (last := groups[-1 - step.number]) > due:
            due, why = last, _GLOBAL if step.kind == "groups" else _MATRIX
        self.due, self.why = due, why


class Run(NamedTuple):
    """``busy``: clocks of each pipe (of four, those that a scheduler has), ``waits``: of all warps, by what they waited for."""

    clocks: float
    instructions: int
    busy: Counter
    waits: Counter


def run(gpu: Gpu, traces: Sequence[Sequence[_Step]], warps: int, resident: int, cold: float, l1: bool = True) -> Run:
    """Programs with these traces on one multiprocessor, ``resident`` at a time; ``cold``: the part of the bytes that is DRAM's;
    ``l1``: whether loads find the rest in the L1 cache, or in L2.

    Raises:
        ValueError: the warps of a program wait for one another for ever.
    """
    dram, l2 = (rate / gpu.multiprocessors / gpu.ghz for rate in (gpu.dram, gpu.l2))  # bytes a clock
    schedulers: list[list[_Warp]] = [[] for _ in range(4)]
    free = [[0.0] * len(NAMES) for _ in range(4)]
    queues = [[-math.inf] * QUEUE for _ in range(4)]  # when the last instructions left it
    shared_free = dram_free = l2_free = owed = end = 0.0
    to_come = list(range(len(traces)))[::-1]
    members: dict[int, list[tuple[_Warp, int]]] = {}
    arrived, alive = Counter[int](), Counter[int]()
    busy, waits, instructions = Counter[str](), Counter[str](), 0
    now, last = [0.0] * 4, [None] * 4

    def begin(at: float) -> None:
        program = to_come.pop()
        members[program], alive[program] = [], warps
        for _ in range(warps):
            s = min(range(4), key=lambda s: len(schedulers[s]))
            schedulers[s].append(_Warp(traces[program], program, at))
            members[program].append((schedulers[s][-1], s))

    def best(s: int) -> tuple[float, _Warp | None]:
        """When a scheduler can issue next, and of which warp."""
        found, at, pipes, leaves = None, math.inf, free[s], queues[s][0]
        for warp in schedulers[s]:
            if not warp.stopped:
                pipe = warp.step.pipe
                t = max(warp.due, now[s], leaves if _SPECIAL <= pipe <= _GLOBAL else pipes[pipe])
                if t < at or (t == at and warp is last[s]):
                    found, at = warp, t
        return at, found

    for i in range(min(resident, len(traces))):
        begin(100.0 * i)
    heap = [(best(s)[0], s) for s in range(4)]
    heapq.heapify(heap)
    while heap:
        planned, s = heapq.heappop(heap)
        t, warp = best(s)
        if warp is None:
            continue  # comes back with the next warp
        if t > planned and heap and t > heap[0][0]:
            heapq.heappush(heap, (t, s))
            continue
        t = float(math.ceil(t - 1e-9))
        pipe, clocks, stall, sets, frees, _, size, kind, number = warp.step
        if warp.why is not None:
            waits[NAMES[warp.why]] += warp.due - warp.ready
        waits["turn"] += t - warp.due
        waits["fixed"] += stall - 1
        done, read = t + stall, t + 6
        if _SPECIAL <= pipe <= _GLOBAL:
            queue = queues[s]
            start = max(t + 2, queue[-1] + 1, free[s][pipe] if pipe == _SPECIAL else shared_free)
            queue.append(start)
            del queue[0]
            read = start + 8
            if pipe == _SPECIAL:
                free[s][pipe] = start + clocks
                busy["special"] += clocks
                done, read = start + clocks + SPECIAL, start + 4
            else:
                shared_free = start + clocks
                busy["shared"] += clocks
                if pipe == _GLOBAL:
                    owed += size * cold
                    done = shared_free + L1
                    if kind == "copy" or not (l1 or kind) or owed >= 0.999 * size:  # copies pass the L1 cache by
                        l2_free = max(l2_free, shared_free) + size / l2
                        busy["l2"] += size / l2
                        done = l2_free + L2
                    if owed >= 0.999 * size:
                        owed -= size
                        dram_free = max(dram_free, shared_free) + size / dram
                        busy["dram"] += size / dram
                        done = max(done, dram_free + DRAM)
                else:
                    done = shared_free + (SHUFFLE if pipe == _SHUFFLE else SHARED) - 3
                if kind:  # a store, or a copy to shared memory: its operands are read
                    warp.copied = max(warp.copied, done) if kind == "copy" else warp.copied
                    done = read = shared_free + 8
        elif pipe == _PRODUCT:
            shared_free = max(shared_free, t) + clocks
            free[s][_MATRIX] = done = max(max(free[s][_MATRIX], t) + number, shared_free)
            busy["shared"] += clocks
            busy["matrix"] += number
            if kind == "last":
                warp.groups["products"].append(done + PRODUCT)
        elif pipe == _CONSTANT:
            free[s][pipe], done = t + clocks, t + CONSTANT
        elif pipe == _NONE:
            if kind == "group":
                warp.groups["groups"].append(done := max(warp.copied, t + 2))
        else:
            shares = (_FLOAT, _WIDE) if pipe in (_FLOAT, _WIDE) else (pipe,)
            for each in shares:  # a pipe that came free within this clock has not waited for it
                free[s][each] = (free[s][each] if t - free[s][each] < 1 else t) + clocks
            busy[NAMES[shares[0]]] += clocks
            done = t + UNIFORM if pipe == _UNIFORM else done
        for board, clear in ((sets, done), (frees, read)):
            if board != NOTHING and clear > warp.boards[board]:
                warp.boards[board], warp.source[board] = clear, pipe
        instructions += 1
        now[s], last[s] = t + 1, warp
        warp.ready = t + stall
        warp.pc += 1
        changed = {s}
        if warp.pc == len(warp.trace):
            schedulers[s].remove(warp)
            alive[warp.program] -= 1
            if not alive[warp.program]:
                end = max(end, t)
                if to_come:
                    begin(t + NEXT_PROGRAM)
                    changed = {0, 1, 2, 3}
        elif kind == "barrier":
            warp.stopped = True
            arrived[warp.program] += 1
            if arrived[warp.program] % warps == 0:
                for other, at in members[warp.program]:
                    waits["barrier"] += t - other.ready + BARRIER
                    other.stopped, other.ready = False, max(other.ready, t + BARRIER)
                    other.arm()
                    changed.add(at)
        else:
            warp.arm()
        heap = [(at, x) for at, x in heap if x not in changed] + [(best(x)[0], x) for x in changed]
        heapq.heapify(heap)
    if any(schedulers):
        raise ValueError(
            "the warps of a program wait for one another for ever: the way through its branches is not the common one"
        )
    return Run(end, instructions, busy, waits)


class Time(NamedTuple):
    """``busy``: what part of the clocks each pipe works; ``binds``: the busiest, or "latency" where none is at 80%; ``waits``:
    of the warps' time, what part each wait has ("turn": for a pipe or for other warps; "fixed": stall counts)."""

    us: float
    low: float
    high: float
    binds: str
    busy: dict[str, float]
    waits: dict[str, float]


def simulate(
    code: Parts,
    gpu: Gpu,
    *,
    warps: int,
    resident: int,
    grid: int,
    bytes: float,
    tiles: int = 0,
    loops: int = 0,
    conflicts: float = 1.0,
    l1: bool = True,
) -> Time:
    """The time of a launch.

    Args:
        warps: of a program. resident: programs that a multiprocessor holds. bytes: of DRAM, read and written. tiles: turns of
            a main loop in all programs together; or ``loops``: of each. conflicts: turns of shared memory over the least. l1:
            whether what loads read again is in the L1 cache; False for matrices that do not fit, of which all comes from L2.

    Raises:
        ValueError: an instruction that is not in the table, or programs that do not fit.
    """
    if resident < 1:
        raise ValueError("no program fits on a multiprocessor: no time is told")
    given = [code.before, code.loop, code.behind, *[part for each in code.then for part in each]]
    steps = [[_step(i, gpu, conflicts) for i in part] for part in given]  # straight code and loops by turns
    once_each, looped = ([x for part in steps[i::2] for x in part] for i in (0, 1))
    on_one = range(0, grid, gpu.multiprocessors)  # the programs of the first one
    turns = [loops or max(1, math.ceil((tiles - i) / grid)) for i in on_one]
    asked = warps * (grid * sum(x.bytes for x in once_each) + (grid * loops or max(tiles, grid)) * sum(x.bytes for x in looped))
    cold = min(1.0, bytes / asked) if asked else 0.0
    least = min(turns)

    def once(programs: int, short: int) -> Run:
        traces = [
            [x for i, part in enumerate(steps) for x in part * (n - least + short if i % 2 else 1)] for n in turns[:programs]
        ]
        return run(gpu, traces, warps, resident, cold, l1)

    stays = least > 4
    if stays:  # two lengths of the loop; the rest in proportion
        few, many = once(len(turns), 1), once(len(turns), 3)
        clocks = many.clocks + (many.clocks - few.clocks) / 2 * (least - 3)
    elif len(turns) > 4 * resident:  # two numbers of programs
        few, many = (once(n * resident, least) for n in (2, 4))
        clocks = many.clocks + (many.clocks - few.clocks) * (len(turns) / resident - 4) / 2
    else:
        many = once(len(turns), least)
        clocks = many.clocks
    us = clocks / gpu.ghz / 1e3 + START_US
    busy = {name: n / many.clocks / (1 if name in ("shared", "l2", "dram") else 4) for name, n in many.busy.items()}
    busiest = max(busy, key=busy.__getitem__, default="latency")
    total = sum(many.waits.values()) + many.instructions
    waits = {name: round(n / total, 3) for name, n in many.waits.most_common()}
    return Time(
        round(us, 1),
        round(BAND[0] * us, 1),
        round(BAND[1] * us, 1),
        busiest if busy.get(busiest, 0) >= 0.8 else "latency",
        {name: round(n, 2) for name, n in sorted(busy.items(), key=lambda each: -each[1])},
        waits,
    )
