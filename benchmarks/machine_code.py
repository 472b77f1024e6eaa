"""NVIDIA's machine code, decoded: instructions with what the assembler told the scheduler about each of them.

From Volta on an instruction takes 16 bytes, of which 21 bits are for the scheduler: how many clocks the warp waits before its
next instruction, which of six scoreboards are set until the result is there and until the operands are read, and on which of
them this instruction waits. (Jia et al., arXiv 1804.06826, section 2.1, found that out; nvdisasm prints the bits with -hex.)
"""

import re
import struct
import subprocess
import tempfile
from typing import NamedTuple

import triton

_INSTRUCTION = re.compile(
    r"\s+/\*(?P<at>[0-9a-f]{4,})\*/\s+(?P<guard>@!?U?P\S+\s+)?(?P<op>[A-Z][A-Z0-9_.x]*)(?P<rest>[^;]*);\s+/\*\s*0x[0-9a-f]+\s*\*/"
)
_SECOND_WORD = re.compile(r"\s+/\*\s*0x(?P<word>[0-9a-f]+)\s*\*/\s*$")
_LABEL = re.compile(r"(\.L\w+):")
_FUNCTION = re.compile(r"\.text\.(\S+):")
NOTHING = 7  # the scoreboard that is none


class Instruction(NamedTuple):
    """``stall``: clocks until the warp's next one; ``sets``, ``frees``: scoreboards that are set until the result is there and
    until the operands are read, or ``NOTHING``; ``waits``: on which, a bit each; ``target``: of a branch, an index."""

    op: str
    rest: str
    guard: str
    stall: int
    sets: int
    frees: int
    waits: int
    target: int | None = None

    @property
    def name(self) -> str:
        return self.op.split(".")[0]


def disassembly(cubin: bytes, function: str | None = None) -> str:
    """What nvdisasm, which comes with Triton, says of a cubin's code with its bits; of one function or of all.

    Without its analysis of registers, which takes it a third of its time and adds nothing to these lines.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-hex", "-c", "-ndf", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if function is None:
        return text
    begin = text.find(f".text.{function}:")
    if begin < 0:
        raise ValueError(f"no function {function!r} in this cubin; it has {', '.join(_FUNCTION.findall(text)) or 'none'}")
    end = text.find("\n.text.", begin)
    return text[begin : end if end >= 0 else None]


_REGISTERS, _FRAME = 0x2F, 0x11  # attributes of a function, as cuobjdump -elf names them: EIATTR_REGCOUNT, EIATTR_FRAME_SIZE


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread and bytes of its stack, of a cubin with one function: what cuobjdump -res-usage says."""
    at, size, count, names = *struct.unpack_from("<Q", cubin, 0x28), *struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, at + size * i) for i in range(count)]
    found = {_FRAME: 0}
    for name, *_, start, length in sections:
        name += sections[names][4]
        if cubin[name : cubin.index(b"\0", name)] == b".nv.info":
            i = start
            while i < start + length:
                kind, attribute, value = struct.unpack_from("<BBH", cubin, i)
                if attribute in (_REGISTERS, _FRAME):
                    found[attribute] = struct.unpack_from("<II", cubin, i + 4)[1]  # behind the function's number
                i += 4 + (value if kind == 4 else 0)
    return found[_REGISTERS], found[_FRAME]


def decode(text: str) -> list[Instruction]:
    """The instructions of a disassembly with its bits.

    Raises:
        ValueError: there are none, or one without its bits.
    """
    found: list[tuple[re.Match, int | None]] = []
    labels, addresses = {}, {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(found)
        elif instruction := _INSTRUCTION.match(line):
            addresses[int(instruction["at"], 16)] = len(found)
            found.append((instruction, None))
        elif found and found[-1][1] is None and (second := _SECOND_WORD.match(line)):
            found[-1] = (found[-1][0], int(second["word"], 16) >> 41)
    if not found or any(bits is None for _, bits in found):
        raise ValueError("no machine code with its bits: nvdisasm -hex -c writes it")
    code = []
    for instruction, bits in found:
        assert bits is not None
        op, rest = instruction["op"], instruction["rest"].strip()
        target = None
        if op.startswith(("BRA", "CALL", "BSSY")):
            if names := [name for name in re.findall(r"\.L\w+", rest) if name in labels]:
                target = labels[names[-1]]
            elif numbers := re.findall(r"0x([0-9a-f]+)", rest):
                target = addresses.get(int(numbers[-1], 16))
        waits = bits >> 11 & 63
        guard = (instruction["guard"] or "").strip()
        code.append(Instruction(op, rest, guard, bits & 15, bits >> 5 & 7, bits >> 8 & 7, waits, target))
    return code


class Parts(NamedTuple):
    """A kernel's instructions in the order of one warp that takes the likely way: before, within and behind its main loop.

    ``then``: of a kernel with several, one behind another, the next ones, and what stands behind each.
    """

    before: list[Instruction]
    loop: list[Instruction]
    behind: list[Instruction]
    other_loops: int
    then: tuple[tuple[list[Instruction], list[Instruction]], ...] = ()


def parts(code: list[Instruction], which: int = 0, loops: int = 1) -> Parts:
    """Where a kernel's main loop is, the longest (``which``: the next ones), and what stands around it, each taken once.

    ``loops``: how many main loops there are, the longest that do not overlap. A branch forward is not taken, but for one
    without a guard, or over a call or an end: those leave out what is rare. Loops besides the main ones are gone through once,
    and counted.
    """
    back = [(i.target, at) for at, i in enumerate(code) if i.op.startswith("BRA") and i.target is not None and i.target < at]
    back = sorted({at: (to, at) for to, at in back if at - to > 8}.values(), key=lambda loop: loop[0] - loop[1])
    end = max((at for at, i in enumerate(code) if i.name == "EXIT" and not i.guard), default=len(code) - 1)
    reached = [loop for loop in back if loop[1] <= end]
    main: list[tuple[int, int]] = []
    for loop in reached[which:]:
        if len(main) < loops and all(loop[1] < first or loop[0] > last for first, last in main):
            main.append(loop)

    def walk(begin: int, until: int) -> list[Instruction]:
        path, at = [], begin
        while at < until:
            i = code[at]
            over = code[at + 1 : i.target] if i.target is not None and i.target > at else []
            jumps = (
                i.op.startswith("BRA")
                and bool(over)
                and (not i.guard or any(j.name == "CALL" or (j.name == "EXIT" and not j.guard) for j in over))
            )
            if i.name in ("EXIT", "RET") and not i.guard:
                break
            path.append(i)
            at = i.target if jumps and i.target is not None and i.target <= until else at + 1
        return path

    if not main:
        return Parts([], walk(0, end + 1), [], len(reached))
    main.sort()
    ends = [*[first for first, _ in main[1:]], end + 1]
    each = [(walk(first, last + 1), walk(last + 1, until)) for (first, last), until in zip(main, ends, strict=True)]
    return Parts(walk(0, main[0][0]), *each[0], len(reached) - len(main), tuple(each[1:]))
