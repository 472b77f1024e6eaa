"""A machine for PTX: runs a compiled kernel on the CPU, and faults on what would be undefined on a GPU.

    Kernel(ptx, shared, name).run(grid, arguments)

Many programs (CTAs) run together: a register is one array over the threads of all of them. Threads that branch apart run one
way after the other, and meet again where the ways do (``_order``).

Faults, each with the instruction, the source line, the program and the thread:

- a global access outside of the tensors that were passed (a view's gaps are outside, too), or unaligned;
- a read of shared memory that nobody wrote, or that an asynchronous copy has not delivered;
- two threads at the same shared bytes, one of them writing, with no barrier between them (within a warp, bar.warp.sync);
- two programs at the same global bytes, one of them writing;
- a barrier, a shuffle or a matrix instruction that not all threads of a warp reach, or that a program reaches in parts;
- an asynchronous product of what was stored to shared memory with no fence since, or overwritten before it is waited for;
- a program that does not end.

Registers that nobody wrote hold NaN: compilers read such, and drop the value. So do those of an asynchronous product until it
is waited for. Approximate instructions err by the most that
PTX allows, in the direction of ``error``; sums of matrix instructions are exact and then truncated to float32, as tensor cores
do (Fasi et al. 2021; the ISA says no more than "at least single precision").

Not seen: what ptxas makes of the PTX, and time.
"""

import linecache
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import networkx
import numpy as np
import torch

from .language import UNSIGNED, Code, Instruction, Translator, Unknown, from_half, parse, ways

SPACE = 44  # a storage lies in a space of 1 << SPACE bytes, its number << SPACE,
MIDDLE = 1 << SPACE - 1  # and begins in the middle: an access before it is in the same space
TOGETHER = 4096  # threads that run together, unless one program has more
SHARED_TOGETHER = 8 << 20  # bytes of their shared memory
ENDLESS = 1 << 20  # blocks; a kernel that runs more does not end
POISON = {t: (np.array(np.nan, t) if t is np.float32 else np.invert(np.zeros((), t)) if t is not np.bool_ else np.False_)
          for t in (np.bool_, np.float32, *UNSIGNED.values())}  # fmt: skip


class Fault(Exception):
    """What would be undefined on a GPU."""


class Cost(NamedTuple):
    """What one instruction did in a run, over all warps.

    ``warps``: warps that executed it. ``wavefronts`` of shared memory: turns that its banks needed, ``least`` of them without
    conflicts. Global memory: ``sectors`` of 32 bytes that were touched, ``bytes`` that were asked for (each once a warp).
    """

    instruction: Instruction
    warps: int
    wavefronts: int = 0
    least: int = 0
    sectors: int = 0
    bytes: int = 0


def memory_of(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's storage, all of it, as bytes."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),))


class Storage:
    """A tensor's memory, the part of it that was passed, and which programs touched it."""

    def __init__(self, tensor: torch.Tensor, granule: int):
        storage = tensor.untyped_storage()
        self.bytes = memory_of(tensor).numpy()
        self.offset = storage.data_ptr() % 256  # alignment is as it really is
        self.granule = granule
        self.ranges: list[tuple[int, int]] = []
        self.allowed: np.ndarray | None = None  # by granule, for views with gaps
        count = -(-storage.nbytes() // granule)
        self.writer = np.zeros(count, np.int32)  # 1 + the program that wrote it; pages that nobody touches cost nothing
        self.reader = np.zeros(count, np.int32)  # 1 + the program that read it, −1: several
        self.words = {1 << k: self.bytes[: len(self.bytes) >> k << k].view(UNSIGNED[8 << k]) for k in range(4)}

    def allow(self, tensor: torch.Tensor) -> None:
        size, start = tensor.element_size(), tensor.storage_offset() * tensor.element_size()
        dense = sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1)
        length = 1
        for stride, count in dense:
            if stride not in (0, length):
                break
            length *= 1 if stride == 0 else count
        else:
            if tensor.numel():
                self.ranges.append((start, start + length * size))
            return
        if self.allowed is None:
            self.allowed = np.zeros(len(self.writer), bool)
        step = size // self.granule
        shape, strides = (*tensor.shape, step), (*(s * step for s in tensor.stride()), 1)
        np.lib.stride_tricks.as_strided(self.allowed[start // self.granule :], shape, strides)[...] = True

    def holds(self, offset: np.ndarray, size: int) -> np.ndarray:
        inside = np.zeros(offset.shape, bool)
        for low, high in self.ranges:
            inside |= (offset >= low) & (offset + size <= high)
        if self.allowed is not None and not inside.all():
            g = offset[:, None] // self.granule + np.arange(size // self.granule)
            ok = (g >= 0) & (g < len(self.allowed))
            inside |= (ok & self.allowed[np.where(ok, g, 0)]).all(1)
        return inside


class Memory:
    """The storages of a launch at addresses far apart."""

    def __init__(self, granule: int):
        self.storages: list[Storage] = []
        self.granule, self.known = granule, {}

    def address(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        if not storage.nbytes():
            return 0
        key = storage.data_ptr()
        if key not in self.known:
            self.storages.append(Storage(tensor, self.granule))
            self.known[key] = len(self.storages)
        number = self.known[key]
        self.storages[number - 1].allow(tensor)
        return (number << SPACE) + MIDDLE + self.storages[number - 1].offset + tensor.storage_offset() * tensor.element_size()


class State:
    """Programs that run together: registers, shared memory, and the checks on both memories."""

    def __init__(self, kernel: "Kernel", memory: Memory, parameters, programs: np.ndarray, grid: int, error: int, costs):
        self.kernel, self.memory, self.error, self.costs = kernel, memory, error, costs
        threads = kernel.code.threads
        self.programs, self.threads, self.lanes = programs, threads, len(programs) * threads
        self.lane = np.arange(self.lanes)
        self.place = self.lane // threads  # of a thread's program among those that run together
        self.program = programs[self.place].astype(np.int32)
        self.warp = self.lane // 32
        ones = np.ones(self.lanes, np.uint32)
        thread = (self.lane % threads).astype(np.uint32)
        self.special = {"%tid.x": thread, "%ctaid.x": self.program.view(np.uint32), "%laneid": thread % np.uint32(32)}
        self.special |= {"%ntid.x": ones * np.uint32(threads), "%nctaid.x": ones * np.uint32(grid)}
        for axis in "yz":
            self.special |= {
                f"%tid.{axis}": ones - 1,
                f"%ctaid.{axis}": ones - 1,
                f"%nctaid.{axis}": ones,
                f"%ntid.{axis}": ones,
            }
        self.parameters = {name: np.full(self.lanes, value) for name, value in parameters.items()}
        self._constants: dict[tuple, np.ndarray] = {}
        poison = {t: np.full(self.lanes, value, t) for t, value in POISON.items()}
        self.registers = [poison[t] for t in kernel.translator.storage]

        self.granule = kernel.shared_granule
        self.stride = -(-max(kernel.shared, 16) // 16) * 16
        size = self.stride * len(programs)
        shared = np.full(size, 0xFF, np.uint8)
        self.shared = {bits: shared.view(UNSIGNED[bits]) for bits in UNSIGNED}
        count = size // self.granule
        self.written = np.zeros(count, bool)
        self.pending = np.zeros(count, bool)
        self.writer = np.full(count, -1, np.int32)  # threads
        self.reader = np.full(count, -1, np.int32)
        self.several = np.zeros(count, np.int8)  # readers since the barrier: 1, several threads of a warp; 2, several warps
        self.wrote, self.wrote_warp = np.full(count, -1, np.int32), np.full(count, -1, np.int32)  # since which barrier
        self.read, self.read_warp = np.full(count, -1, np.int32), np.full(count, -1, np.int32)
        self.unfenced = np.zeros(count, bool)  # stored, and not to be seen by asynchronous products yet
        self.products: dict[int, np.ndarray] = {}  # results that are on their way, by register
        self.reading: list[tuple[np.ndarray, np.ndarray]] = []  # what is read for them: first threads, granules
        self.begun: set[int] = set()  # registers of products since the last commit
        self.product_groups: list[set[int]] = []
        self.epoch = np.zeros(len(programs), np.int32)  # barriers of a program, and of a warp
        self.warp_epoch = np.zeros(self.lanes // 32, np.int32)
        self.group: list[list] = [[] for _ in programs]  # copies since the last commit
        self.groups: list[list] = [[] for _ in programs]

    # helpers

    def full(self, value) -> np.ndarray:
        """A value of every thread as it is, one value for all of them."""
        if value.ndim:
            return value
        key = (value.dtype, value.tobytes())
        if key not in self._constants:
            self._constants[key] = np.full(self.lanes, value)
        return self._constants[key]

    def fault(self, number: int, what: str, lanes: np.ndarray | None = None) -> Fault:
        ins = self.kernel.instructions[number]
        who = ""
        if lanes is not None and len(lanes):
            who = f", program {self.program[lanes[0]]}, thread {lanes[0] % self.threads}"
        return Fault(f"{self.kernel.name}, {ins.where}{who}: {what}: `{ins.text}`")

    def _on(self, mask: np.ndarray | None) -> np.ndarray:
        return self.lane if mask is None else np.flatnonzero(mask)

    def _whole(self, mask: np.ndarray | None, each: int, number: int, what: str) -> np.ndarray | None:
        """Which warps (or programs) of ``each`` threads take part; a fault if one does in parts. None: all."""
        if mask is None or mask.all():
            return None
        parts = mask.reshape(-1, each)
        whole = parts.all(1)
        if (torn := parts.any(1) & ~whole).any():
            missing = np.flatnonzero(torn)[0] * each + np.flatnonzero(~parts[np.flatnonzero(torn)[0]])[:1]
            raise self.fault(number, f"not all threads of a {what} reach it", missing)
        return whole

    # barriers

    def barrier(self, mask, number):
        whole = self._whole(mask, self.threads, number, "program")
        if whole is None:
            self.epoch += 1
            self.warp_epoch += 1
        else:
            self.epoch += whole
            self.warp_epoch += np.repeat(whole, self.threads // 32)

    def warp_barrier(self, mask, number):
        whole = self._whole(mask, 32, number, "warp")
        self.warp_epoch += 1 if whole is None else whole

    # shared memory

    def _place(self, lanes, address, size, number) -> tuple[np.ndarray, np.ndarray]:
        """(first byte, granules) of each access, which is counted."""
        offset = address.astype(np.int64)
        wrong = (offset < 0) | (offset + size > self.kernel.shared)
        if wrong.any():
            raise self.fault(number, f"shared address {offset[wrong][0]} of {self.kernel.shared}", lanes[wrong])
        if (wrong := offset % size != 0).any():
            raise self.fault(number, f"shared address {offset[wrong][0]} is not aligned to {size}", lanes[wrong])
        if self.costs is not None:
            self._count_shared(lanes, address, size, number)
        at = self.place[lanes] * self.stride + offset
        return at, at[:, None] // self.granule + np.arange(size // self.granule)

    def _foreign(self, lane, other, epoch, warp_epoch):
        """Whether ``other`` threads' accesses at these epochs have no barrier before those of ``lane``."""
        near = other // 32 == lane // 32
        now, now_warp = self.epoch[lane // self.threads], self.warp_epoch[lane // 32]
        return (other != lane) & np.where(near, warp_epoch == now_warp, epoch == now)

    def _check_write(self, lanes, g, number, what) -> np.ndarray:
        """Faults; which granules another thread wrote since the barrier (the same value may be written again)."""
        lane = np.broadcast_to(lanes[:, None], g.shape)
        if (wrong := self.pending[g]).any():
            raise self.fault(number, f"{what} where an asynchronous copy writes", lanes[wrong.any(1)])
        recent = self.read[g] == self.epoch[lane // self.threads]
        reader, several = self.reader[g], self.several[g]
        near = (reader // 32 == lane // 32) & (several < 2)
        here = ((reader != lane) | (several == 1)) & (self.read_warp[g] == self.warp_epoch[lane // 32])
        wrong = recent & (reader >= 0) & np.where(near, here, True)
        if wrong.any():
            raise self.fault(number, f"{what} what another thread read since the last barrier", lanes[wrong.any(1)])
        return self.written[g] & self._foreign(lane, self.writer[g], self.wrote[g], self.wrote_warp[g])

    def _mark_written(self, lanes, g):
        self.written[g], self.writer[g] = True, lanes[:, None]
        self.wrote[g] = self.epoch[self.place[lanes]][:, None]
        self.wrote_warp[g] = self.warp_epoch[lanes // 32][:, None]

    def _shared_read(self, lanes, address, size, number) -> np.ndarray:
        """[len(lanes), words] of 32 bits, or of 16 where that is the size."""
        at, g = self._place(lanes, address, size, number)
        lane = np.broadcast_to(lanes[:, None], g.shape)
        if (wrong := self.pending[g]).any():
            raise self.fault(number, "reads what an asynchronous copy has not delivered", lanes[wrong.any(1)])
        if (wrong := ~self.written[g]).any():
            raise self.fault(number, "reads shared memory that nobody wrote", lanes[wrong.any(1)])
        if (wrong := self._foreign(lane, self.writer[g], self.wrote[g], self.wrote_warp[g])).any():
            raise self.fault(number, "reads what another thread wrote since the last barrier", lanes[wrong.any(1)])
        now, now_warp = self.epoch[lane // self.threads], self.warp_epoch[lane // 32]
        recent = self.read[g] == now
        reader = self.reader[g]
        same_warp = reader // 32 == lane // 32
        several = np.where(recent, self.several[g], 0)
        several = np.where(recent & ~same_warp, 2, several)
        fresh = same_warp & (self.read_warp[g] != now_warp) & (several < 2)
        several = np.where(recent & same_warp & ~fresh & (reader != lane) & (several < 2), 1, np.where(fresh, 0, several))
        self.several[g], self.reader[g], self.read[g], self.read_warp[g] = several, lane, now, now_warp
        again = self.reader[g]  # several threads of this very instruction
        if (clash := again != lane).any():
            here, other = g[clash], (again // 32 != lane // 32)[clash]
            self.several[here] = np.maximum(self.several[here], 1)
            self.several[here[other]] = 2
        unit = min(size, 4)
        return self.shared[8 * unit][at[:, None] // unit + np.arange(size // unit)]

    def _shared_write(self, lanes, address, words, number, what="overwrites"):
        unit = words.dtype.itemsize
        size = unit * words.shape[1]
        at, g = self._place(lanes, address, size, number)
        clash = self._check_write(lanes, g, number, what)
        where = at[:, None] // unit + np.arange(words.shape[1])
        memory = self.shared[8 * unit]
        if clash.any() and (wrong := clash.any(1) & (memory[where] != words).any(1)).any():
            raise self.fault(number, f"{what} what another thread wrote since the last barrier", lanes[wrong])
        memory[where] = words
        self.unfenced[g] = True
        if (wrong := memory[where] != words).any():
            raise self.fault(number, "threads write different values to one place", lanes[wrong.any(1)])
        self._mark_written(lanes, g)

    def load_shared(self, address, width, count, mask, number):
        lanes = self._on(mask)
        words = self._shared_read(lanes, address[lanes], width // 8 * count, number)
        return self._spread(lanes, words, width, count)

    def _spread(self, lanes, words, width, count):
        """Values as one array over all threads each; zero in those that did not read."""
        values = np.ascontiguousarray(words).view(UNSIGNED[width])
        if len(lanes) < self.lanes:
            all_ = np.zeros((self.lanes, count), UNSIGNED[width])
            all_[lanes] = values
            values = all_
        return [np.ascontiguousarray(values[:, i]) for i in range(count)]

    @staticmethod
    def _words(values, lanes):
        data = np.stack([np.ascontiguousarray(v[lanes]) for v in values], 1)
        unit = min(data.dtype.itemsize * data.shape[1], 4)
        return data.view(UNSIGNED[8 * unit])

    def store_shared(self, address, values, mask, number):
        lanes = self._on(mask)
        words = self._words([self._unsigned(v) for v in values], lanes)
        self._shared_write(lanes, address[lanes], words, number)

    @staticmethod
    def _unsigned(v):
        return v.view(UNSIGNED[8 * v.dtype.itemsize])

    def _rows(self, address, count, mask, number):
        """Threads whose addresses a matrix access takes, and those that take part (None: all)."""
        whole = self._whole(mask, 32, number, "warp")
        warps = np.arange(self.lanes // 32) if whole is None else np.flatnonzero(whole)
        lanes = (warps[:, None] * 32 + np.arange(8 * count)).reshape(-1)
        return warps, lanes

    def ldmatrix(self, address, count, trans, mask, number):
        warps, lanes = self._rows(address, count, mask, number)
        words = self._shared_read(lanes, address[lanes], 16, number)
        tiles = words.view(np.uint16).reshape(len(warps), count, 8, 8)
        if trans:
            tiles = tiles.transpose(0, 1, 3, 2)
        words = np.ascontiguousarray(tiles).view(np.uint32).reshape(len(warps), count, 32)
        out = np.zeros((count, self.lanes // 32, 32), np.uint32)
        out[:, warps] = words.transpose(1, 0, 2)
        return [tile.reshape(-1) for tile in out]

    def stmatrix(self, address, values, trans, mask, number):
        count = len(values)
        warps, lanes = self._rows(address, count, mask, number)
        words = np.stack([v.reshape(-1, 32)[warps] for v in values], 1)
        tiles = np.ascontiguousarray(words).view(np.uint16).reshape(-1, count, 8, 8)
        if trans:
            tiles = tiles.transpose(0, 1, 3, 2)
        self._shared_write(lanes, address[lanes], np.ascontiguousarray(tiles).reshape(-1, 8).view(np.uint32), number)

    # asynchronous copies

    def copy(self, target, source, size, read, mask, number):
        lanes = self._on(mask)
        if not len(lanes):
            return
        data = np.zeros((len(lanes), size), np.uint8)
        wanted = np.full(len(lanes), size) if read is None else read[lanes].astype(np.int64)
        for bytes_ in np.unique(wanted[wanted > 0]):
            some = wanted == bytes_
            words = self._global_read(lanes[some], source[lanes[some]], int(bytes_), number, align=size)
            data[some, :bytes_] = words.view(np.uint8)
        at, g = self._place(lanes, target[lanes], size, number)
        foreign = self._check_write(lanes, g, number, "copies over")
        if foreign.any():
            raise self.fault(number, "copies over what another thread wrote since the last barrier", lanes[foreign.any(1)])
        self.pending[g] = True
        for place in np.unique(self.place[lanes]):
            mine = self.place[lanes] == place
            self.group[place].append((lanes[mine], at[mine], data[mine].view(np.uint32), g[mine], number))

    def _programs(self, mask, number) -> np.ndarray:
        whole = self._whole(mask, self.threads, number, "program")
        return np.arange(len(self.programs)) if whole is None else np.flatnonzero(whole)

    def commit(self, mask, number):
        for place in self._programs(mask, number):
            self.groups[place].append(self.group[place])
            self.group[place] = []

    def wait(self, left, mask, number):
        for place in self._programs(mask, number):
            while len(self.groups[place]) > left:
                for lanes, at, words, g, _ in self.groups[place].pop(0):
                    self.pending[g] = self.unfenced[g] = False  # no fence behind copies: Triton, as CUTLASS, has none
                    self.shared[32][at[:, None] // 4 + np.arange(words.shape[1])] = words
                    self._mark_written(lanes, g)

    # global memory

    def _by_tensor(self, lanes, address, number) -> list[np.ndarray]:
        """Which of the threads access a tensor, for each that there is: of a program, all the same one."""
        index = address >> np.uint64(SPACE)
        if (index == index[0]).all():
            return [np.ones(len(lanes), bool)]
        of_program = np.zeros(len(self.programs), index.dtype)
        of_program[self.place[lanes]] = index
        if (wrong := of_program[self.place[lanes]] != index).any():
            raise self.fault(number, "one access to two tensors", lanes[wrong])
        return [index == each for each in np.unique(index)]

    def _find(self, lanes, address, size, number, align=None) -> tuple[Storage, np.ndarray]:
        first = int(address[0] >> np.uint64(SPACE))
        if not 0 < first <= len(self.memory.storages):
            raise self.fault(number, f"address {int(address[0]):#x} is in no tensor", lanes)
        storage = self.memory.storages[first - 1]
        raw = (address & np.uint64((1 << SPACE) - 1)).astype(np.int64) - MIDDLE
        if (wrong := raw % (align or size) != 0).any():
            raise self.fault(number, f"address is not aligned to {align or size}", lanes[wrong])
        offset = raw - storage.offset
        if (wrong := ~storage.holds(offset, size)).any():
            raise self.fault(number, f"byte {offset[wrong][0]} is outside of the tensors of that storage", lanes[wrong])
        return storage, offset

    def _global_read(self, lanes, address, size, number, align=None) -> np.ndarray:
        unit = min(size & -size, 4)
        found = np.zeros((len(lanes), size // unit), UNSIGNED[8 * unit])
        for some in self._by_tensor(lanes, address, number):
            found[some] = self._read_of_one(lanes[some], address[some], size, unit, number, align)
        if self.costs is not None:
            self._count_global(lanes, address, size, number)
        return found

    def _read_of_one(self, lanes, address, size, unit, number, align) -> np.ndarray:
        storage, offset = self._find(lanes, address, size, number, align)
        g = offset[:, None] // storage.granule + np.arange(-(-size // storage.granule))
        me = (self.program[lanes] + 1)[:, None]
        if (wrong := (storage.writer[g] > 0) & (storage.writer[g] != me)).any():
            raise self.fault(number, "reads what another program wrote", lanes[wrong.any(1)])
        reader = storage.reader[g]
        storage.reader[g] = np.where((reader == 0) | (reader == me), me, -1)
        storage.reader[g[storage.reader[g] != me]] = -1
        return storage.words[unit][offset[:, None] // unit + np.arange(size // unit)]

    def load_global(self, address, width, count, mask, number):
        lanes = self._on(mask)
        if not len(lanes):
            return [self.full(UNSIGNED[width](0))] * count
        return self._spread(lanes, self._global_read(lanes, address[lanes], width // 8 * count, number), width, count)

    def store_global(self, address, values, mask, number):
        lanes = self._on(mask)
        if not len(lanes):
            return
        words, address = self._words([self._unsigned(v) for v in values], lanes), address[lanes]
        for some in self._by_tensor(lanes, address, number):
            self._store_to_one(lanes[some], address[some], words[some], number)
        if self.costs is not None:
            self._count_global(lanes, address, words.dtype.itemsize * words.shape[1], number)

    def _store_to_one(self, lanes, address, words, number):
        unit = words.dtype.itemsize
        size = unit * words.shape[1]
        storage, offset = self._find(lanes, address, size, number)
        g = offset[:, None] // storage.granule + np.arange(size // storage.granule)
        me = (self.program[lanes] + 1)[:, None]
        if (wrong := (storage.writer[g] > 0) & (storage.writer[g] != me)).any():
            raise self.fault(number, "overwrites what another program wrote", lanes[wrong.any(1)])
        if (wrong := (storage.reader[g] != 0) & (storage.reader[g] != me)).any():
            raise self.fault(number, "overwrites what another program read", lanes[wrong.any(1)])
        storage.writer[g] = me
        if (wrong := storage.writer[g] != me).any():
            raise self.fault(number, "two programs write to one place", lanes[wrong.any(1)])
        where = offset[:, None] // unit + np.arange(words.shape[1])
        memory = storage.words[unit]
        memory[where] = words
        if (wrong := memory[where] != words).any():
            raise self.fault(number, "threads write different values to one place", lanes[wrong.any(1)])

    # between threads

    def shuffle(self, mode, value, by, clamp, mask, number):
        self._whole(mask, 32, number, "warp")
        lane = self.lane % 32
        by, clamp = by.astype(np.int64) & 31, clamp.astype(np.int64)
        keep, top = (clamp >> 8) & 31, clamp & 31
        low, high = lane & keep, (lane & keep) | (top & ~keep & 31)
        source = {"bfly": lane ^ by, "idx": low | (by & ~keep & 31), "down": lane + by, "up": lane - by}[mode]
        source = np.where(source >= high if mode == "up" else source <= high, source, lane)
        return value[self.lane - lane + source]

    def reduce(self, how, value, members, mask, number):
        self._whole(mask, 32, number, "warp")
        lanes = self._on(mask)
        if (wrong := members[lanes] != 0xFFFFFFFF).any():
            raise self.fault(number, "reduces over some threads of a warp", lanes[wrong])
        function = {"add": np.add, "min": np.minimum, "max": np.maximum}.get(how) or getattr(np, f"bitwise_{how}")
        return np.repeat(function.reduce(value.reshape(-1, 32), 1, dtype=value.dtype), 32)

    def mma(self, kind, a, b, c, mask, number):
        self._whole(mask, 32, number, "warp")
        warps = self.lanes // 32
        if kind == "tf32":  # one value a register, 4 columns of k each; the low 13 bits are not read

            def tile(r):
                return (r & np.uint32(0xFFFFE000)).view(np.float32).reshape(warps, 8, 4)

            wide = 4
        else:

            def tile(r):
                half = np.ascontiguousarray(r).view(np.uint16)
                if kind == "f16":
                    return half.view(np.float16).reshape(warps, 8, 8)
                return (half.astype(np.uint32) << np.uint32(16)).view(np.float32).reshape(warps, 8, 8)

            wide = 8
        left = np.empty((warps, 16, wide * len(b)))
        right = np.empty((warps, wide * len(b), 8))
        for i in range(len(b)):
            left[:, :8, wide * i : wide * (i + 1)] = tile(a[2 * i])
            left[:, 8:, wide * i : wide * (i + 1)] = tile(a[2 * i + 1])
            right[:, wide * i : wide * (i + 1)] = tile(b[i]).transpose(0, 2, 1)
        total = np.empty((warps, 16, 8))
        total[:, :8] = np.stack((c[0], c[1]), 1).reshape(warps, 8, 8)
        total[:, 8:] = np.stack((c[2], c[3]), 1).reshape(warps, 8, 8)
        total += left @ right
        near = total.astype(np.float32)
        outside = (np.abs(near) > np.abs(total)) & np.isfinite(total)
        near = np.where(outside, np.nextafter(near, np.float32(0)), near)
        low, high = near[:, :8].reshape(-1, 2), near[:, 8:].reshape(-1, 2)
        return [np.ascontiguousarray(x) for x in (low[:, 0], low[:, 1], high[:, 0], high[:, 1])]

    # asynchronous products

    def _all(self, mask, number) -> None:
        if mask is not None and not mask.all():
            raise self.fault(number, "not all threads reach it")

    def proxy_fence(self, mask, number):
        self._all(mask, number)
        self.unfenced[:] = False

    def _operand(self, descriptor, count, transposed, number) -> np.ndarray:
        """[warp groups, count, 16] bits of shared memory: of rows one behind the other, or, ``transposed``, of columns.

        The layouts are those of the PTX ISA, "Asynchronous warpgroup level matrix shared memory layout": pieces of 16 bytes, in
        rows of 16, 32, 64 or 128 bytes, whose pieces are exchanged by the number of the row.
        """
        words = descriptor.reshape(-1, 128)
        if (words != words[:, :1]).any() or (words[:, 0] >> np.uint64(49) & np.uint64(7)).any():
            raise self.fault(number, "another descriptor than one for all threads, of whole rows")
        start, leading, stride = (
            (words[:, 0] >> np.uint64(at) & np.uint64(0x3FFF)).astype(np.int64) << 4 for at in (0, 16, 32)
        )
        (mode,) = {int(x) for x in words[:, 0] >> np.uint64(62)}
        bits = {0: 0, 1: 3, 2: 2, 3: 1}[mode]
        row, k = np.arange(count)[:, None], np.arange(16)[None, :]
        start, leading, stride = (x[:, None, None] for x in (start, leading, stride))
        if not transposed:
            at = row % 8 * (16 << bits) + row // 8 * stride + k // 8 * (16 if bits else leading) + k % 8 * 2
        elif bits:
            piece = row // 8
            at = piece % (1 << bits) * 16 + (piece >> bits) * leading + k % 8 * (16 << bits) + k // 8 * stride + row % 8 * 2
        else:
            at = row // 8 * stride + k % 8 * 16 + k // 8 * leading + row % 8 * 2
        at = start + at
        at ^= (at >> 7 & (1 << bits) - 1) << 4
        if (at < 0).any() or (at + 2 > self.kernel.shared).any():
            raise self.fault(number, f"an operand at shared addresses up to {at.max()} of {self.kernel.shared}")
        lanes = np.arange(len(words)) * 128
        place = self.place[lanes]
        at = at + (place * self.stride)[:, None, None]
        g = (at // self.granule).reshape(len(words), -1)
        if self.pending[g].any() or not self.written[g].all():
            raise self.fault(number, "multiplies what nobody wrote, or a copy has not delivered", lanes)
        if self.unfenced[g].any() or (self.wrote[g] == self.epoch[place][:, None]).any():
            raise self.fault(number, "multiplies what was stored with no fence and barrier since", lanes)
        self.reading.append((lanes, g))
        self._mark_read(lanes, g)
        return self.shared[16][at // 2]

    def _mark_read(self, lanes, g):
        self.several[g], self.reader[g], self.read[g] = 2, lanes[:, None], self.epoch[self.place[lanes]][:, None]

    def wgmma(self, kind, results, left, right, has_sum, transposed, mask, number):
        self._all(mask, number)
        groups, columns = self.lanes // 128, 2 * len(results)
        a, b = (
            self._operand(x, count, way, number)
            for x, count, way in ((left, 64, transposed[0]), (right, columns, transposed[1]))
        )
        a, b = (from_half(np.ascontiguousarray(x), kind) for x in (a, b))
        before = np.stack([self.products.get(i, self.registers[i]).view(np.float32) for i in results], -1)
        # of a warp's 16 rows a thread has two, 8 apart, and of 8 columns two side by side
        shape = (groups, 4, 8, 4, columns // 8, 2, 2)  # group, warp, row, column; 8 columns, row, column
        order = (0, 1, 5, 2, 4, 3, 6)
        total = np.where(has_sum[:, None], before, np.float32(0)).reshape(shape).transpose(order).astype(np.float64)
        total = total.reshape(groups, 64, columns) + a @ b.transpose(0, 2, 1)
        near = total.astype(np.float32)
        outside = (np.abs(near) > np.abs(total)) & np.isfinite(total)
        near = np.where(outside, np.nextafter(near, np.float32(0)), near)
        near = near.reshape([shape[i] for i in order]).transpose(np.argsort(order)).reshape(self.lanes, len(results))
        for i, at in enumerate(results):
            have = self.registers[at].dtype
            self.products[at] = np.ascontiguousarray(near[:, i]).view(have)
            self.registers[at] = np.full(self.lanes, np.float32(np.nan)).view(have)
        self.begun |= {*results}

    def commit_products(self, mask, number):
        self._all(mask, number)
        self.product_groups.append(self.begun)
        self.begun = set()

    def wait_products(self, left, mask, number):
        self._all(mask, number)
        while len(self.product_groups) > left:
            done = self.product_groups.pop(0)
            for at in done - self.begun.union(*self.product_groups):
                self.registers[at] = self.products.pop(at)
        if not self.product_groups:
            for lanes, g in self.reading:  # until now
                self._mark_read(lanes, g)
            self.reading = []

    # counting

    def _count_shared(self, lanes, address, size, number):
        """Banks are 4 bytes wide, 32 of them; wider accesses go by halves or quarters of a warp."""
        per = {16: 8, 8: 16}.get(size, 32)
        phase = lanes // per
        words = (address.astype(np.int64) // 4)[:, None] + np.arange(max(1, size // 4))
        phases = np.broadcast_to(phase[:, None], words.shape).reshape(-1)
        different = np.unique(phases << 40 | words.reshape(-1))  # equal words are one access
        banks, counts = np.unique(different >> 40 << 8 | (different & 31), return_counts=True)
        worst = np.zeros(int(phase.max()) + 1 if len(phase) else 0, np.int64)
        np.maximum.at(worst, banks >> 8, counts)
        self.costs[number]["wavefronts"] += int(worst.sum())
        self.costs[number]["least"] += int((worst > 0).sum())

    def _count_global(self, lanes, address, size, number):
        warp = self.warp[lanes]
        first = address.astype(np.int64)
        sectors = np.unique((warp << 50) | (first >> 5))
        last = np.unique((warp << 50) | ((first + size - 1) >> 5))
        self.costs[number]["sectors"] += len(np.union1d(sectors, last))
        self.costs[number]["bytes"] += size * len(np.unique((warp << 50) | first))


def _order(graph: networkx.DiGraph, entry: int) -> list[int]:
    """Blocks so that one comes behind all that lead to it, and behind a whole loop that does; a loop's own likewise inside.

    Of threads that wait at several blocks the first in this order goes on: then all have met before any goes past.
    """
    graph = graph.copy()
    graph.remove_edges_from(list(graph.in_edges(entry)))
    loops = networkx.condensation(graph)
    order = []
    for number in networkx.lexicographical_topological_sort(loops, key=lambda n: min(loops.nodes[n]["members"])):
        members = loops.nodes[number]["members"]
        if len(members) == 1:
            order += members
        else:
            header = min(m for m in members if any(p not in members for p in graph.predecessors(m)))
            order += _order(graph.subgraph(members), header)
    return order


class Kernel:
    """A compiled kernel.

    Args:
        ptx: its text, as Triton's compiler gives it; or what ``parse`` made of one.
        shared: bytes of shared memory of a program.
        name: how faults call it.

    Raises:
        Unknown: an instruction, or a text, that the machine does not know; named.
    """

    def __init__(self, ptx: str | Code, shared: int, name: str = ""):
        try:
            self.code = ptx if isinstance(ptx, Code) else parse(ptx)
            self.name, self.shared = name or self.code.name, shared
            self.translator = Translator(self.code)
            self.instructions: list[Instruction] = []
            self.first: list[int] = []  # instruction of each block
            shared_sizes, global_sizes = [16], [4]
            for block in self.code.blocks:
                self.first.append(len(self.instructions))
                for ins in block:
                    self.instructions.append(ins)
                    if ins.parts[0] in ("ld", "st") and ins.parts[1] in ("shared", "global"):
                        count = next((int(m[1]) for m in ins.parts if m in ("v2", "v4")), 1)
                        size = int(ins.type[1:]) // 8 * count
                        (shared_sizes if ins.parts[1] == "shared" else global_sizes).append(size)
                    if ins.parts[0] == "cp" and len(ins.operands) > 2:
                        shared_sizes.append(int(ins.operands[2], 0))
            self.shared_granule, self.global_granule = min(shared_sizes), min(2, *global_sizes)
            self._sources = [self._source(i, masked=False) for i in range(len(self.code.blocks))]
        except Unknown as error:
            raise Unknown(f"{name or 'PTX'}: {error}") from None
        self._functions: dict[tuple[int, bool], object] = {}
        graph = ways(self.code)
        reached = {0, *networkx.descendants(graph, 0)}
        self._rank = {block: rank for rank, block in enumerate(_order(graph.subgraph(reached), 0))}

    def _source(self, index: int, masked: bool) -> str:
        lines = ["def block(P, R, M):"]
        for offset, ins in enumerate(self.code.blocks[index]):
            lines += [f"    {line}" for line in self.translator.statements(ins, self.first[index] + offset, masked)]
        return "\n".join([*lines, "    return None\n"])

    def _block(self, index: int, masked: bool):
        if (index, masked) not in self._functions:
            source = self._source(index, True) if masked else self._sources[index]
            name = f"<{self.name} {id(self)} block {index}{' masked' * masked}>"
            linecache.cache[name] = (len(source), None, source.splitlines(True), name)
            weakref.finalize(self, linecache.cache.pop, name, None)
            scope = self.translator.scope  # constants come in by translating
            exec(compile(source, name, "exec"), scope)
            self._functions[index, masked] = scope["block"]
        return self._functions[index, masked]

    def run(
        self,
        grid: int,
        arguments: Sequence[torch.Tensor | int | float],
        error: int = 0,
        programs: Iterable[int] | None = None,
        count: bool = False,
    ) -> list[Cost] | None:
        """Launch ``grid`` programs, or some of them, on tensors on the CPU; what they write is in the tensors.

        Args:
            arguments: one for each of the kernel's parameters; those that Triton adds itself may be left out.
            error: −1, 0 or 1 times the largest error that approximate instructions may have.
            count: return what each instruction cost.

        Raises:
            Fault: what would be undefined on a GPU.
        """
        if error not in (-1, 0, 1):
            raise ValueError(f"error={error!r}; accepted: -1, 0, 1")
        memory, parameters = Memory(self.global_granule), {}
        extra = len(self.code.parameters) - len(arguments)
        if not 0 <= extra <= 2:
            raise ValueError(f"{self.name} has {len(self.code.parameters)} parameters, given are {len(arguments)}")
        for (type_, name), value in zip(self.code.parameters, [*arguments, *[0] * extra], strict=True):
            width = int(type_[1:])
            if isinstance(value, torch.Tensor):
                value = memory.address(value)
            if type_[0] == "f":
                parameters[name] = np.array(value, np.float32).view(np.uint32)[()]
            else:
                parameters[name] = UNSIGNED[width](int(value) % (1 << width))
        chosen = np.arange(grid) if programs is None else np.array(sorted(programs))
        if len(chosen) and not 0 <= chosen[0] <= chosen[-1] < grid:
            raise ValueError(f"programs {chosen[0]} to {chosen[-1]} of a grid of {grid}")
        warps = np.zeros(len(self.code.blocks), np.int64)
        costs = [Counter() for _ in self.instructions] if count else None
        together = max(1, min(TOGETHER // self.code.threads, SHARED_TOGETHER // max(self.shared, 1)))
        with np.errstate(all="ignore"):
            for start in range(0, len(chosen), together):
                self._run(State(self, memory, parameters, chosen[start : start + together], grid, error, costs), warps)
        if not count:
            return None
        of = [i for i, block in enumerate(self.code.blocks) for _ in block]
        return [Cost(ins, int(warps[of[i]]), **costs[i]) for i, ins in enumerate(self.instructions)]

    def _run(self, state: State, warps: np.ndarray) -> None:
        waiting: dict[int, np.ndarray] = {0: np.ones(state.lanes, bool)}
        all_ = state.lanes
        for _ in range(ENDLESS):
            if not waiting:
                return
            index = min(waiting, key=self._rank.__getitem__)
            mask = waiting.pop(index)
            masked = int(mask.sum()) < all_
            warps[index] += int(mask.reshape(-1, 32).any(1).sum())
            there = self._block(index, masked)(state, state.registers, mask if masked else None)
            if there == "ret":
                continue
            if isinstance(there, tuple):
                target, taken = there
                ways = ((target, mask & taken), (index + 1, mask & ~taken))
            else:
                ways = ((index + 1 if there is None else there, mask),)
            for target, lanes in ways:
                if target < len(self.code.blocks) and lanes.any():
                    waiting[target] = waiting[target] | lanes if target in waiting else lanes
        raise Fault(f"{self.name}: a program does not end within {ENDLESS} blocks")
