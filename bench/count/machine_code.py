"""What the compiler made of the kernels: their machine code, and the issue slots a row pass takes per element pair.

Where a kernel reads one row, a "pair" is one element of it.

python -m bench sass pruneopd_kernels/_cuda.so                       every kernel with a row loop
python -m bench sass FILE... --arch sm_90 --kernel token_stats       some of them; FILE may be a cubin of Triton's

The row loop is the innermost one with 16-byte loads of global memory and `MUFU.EX2`. What is counted is one trip on the
shortest path with both that leads through no other loop: what is done when nothing rare happens.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

# The pipe that executes an instruction, by the start of its name; the first that fits. What is not listed is integer.
PIPES = {
    "mufu": ("MUFU", "F2F.", "F2I", "I2F", "FRND", "POPC", "FLO", "BREV"),  # 16 lanes a cycle and multiprocessor
    "control": ("BRA", "BSSY", "BSYNC", "BREAK", "EXIT", "CALL", "RET", "BAR", "WARPSYNC", "NOP", "YIELD"),
    "memory": ("LD", "ST", "RED", "ATOM", "MEMBAR", "CCTL", "ERRBAR", "SYNCS", "UBLKCP", "FENCE", "DEPBAR", "SHFL"),
    "fp64": ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX"),
    "fma": ("FFMA", "FMUL", "FADD", "HFMA2", "HMUL2", "HADD2", "IMAD"),
    "uniform": ("U", "R2UR", "S2UR", "CS2R", "S2R", "VOTEU"),
}


# How a kernel's name begins: the rows that it loads, and of how many it takes exponentials. Of the others it is both.
ROWS = {"row_stats": (1, 1), "logprobs_backward": (1, 1), "reverse_kl_backward": (2, 1)}


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str  # such as "@!P0", or empty
    opcode: str
    operands: str

    @property
    def pipe(self) -> str:
        return next((pipe for pipe, starts in PIPES.items() if self.opcode.startswith(starts)), "integer")

    @property
    def target(self) -> int | None:
        """Where a branch goes, if it does not fall through."""
        found = re.search(r"\b0x([0-9a-f]+)$", self.operands) if self.opcode.startswith("BRA") else None
        return int(found[1], 16) if found else None

    @property
    def ends_a_path(self) -> bool:
        conditional = self.predicate or "," in self.operands  # as in BRA.U !UP0, 0x350
        return not conditional and self.opcode.split(".")[0] in ("BRA", "EXIT", "RET", "BRX", "JMP")

    @property
    def bits_loaded(self) -> int:
        """Of global memory, by each thread."""
        return self._bits("LDG.")

    @property
    def bits_stored(self) -> int:
        """The same."""
        return self._bits("STG.")

    def _bits(self, opcode: str) -> int:
        if not self.opcode.startswith(opcode):
            return 0
        widths = [int(part) for part in self.opcode.split(".") if part in ("64", "128", "256")]
        return max(widths, default=32)


@dataclass(frozen=True)
class Kernel:
    name: str
    arch: str
    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    instructions: tuple[Instruction, ...]

    @property
    def short_name(self) -> str:
        """Without the types of the parameters; a kernel over positions is named after what it computes.

        `positions_kernel<float, RowStats<(Stats)2, true> >` is `row_stats_2_true_kernel<float>`; zeros are left out.
        """
        name = re.sub(r"^void |\(anonymous namespace\)::|pruneopd::|cuda::", "", self.name)
        name = name.replace("(Stats)", "").split("(")[0]
        if found := re.fullmatch(r"positions_kernel<(\w+), (\w+?)(?:<(.*)>)? ?>", name):
            stem = re.sub(r"\B([A-Z])", r"_\1", found[2]).lower()
            options = [option for option in (found[3] or "").split(", ") if option not in ("", "0", "false")]
            return f"{'_'.join([stem, *options])}_kernel<{found[1]}>"
        return name

    def uses(self, *opcodes: str) -> list[Instruction]:
        return [found for found in self.instructions if found.opcode.startswith(opcodes)]


@dataclass(frozen=True)
class RowLoop:
    """One trip through a row loop."""

    instructions: tuple[Instruction, ...]
    rows: int = 2
    exponentials_per_pair: int = 2

    @property
    def loaded_bytes(self) -> int:
        """By one thread, of all rows."""
        return sum(found.bits_loaded for found in self.instructions) // 8

    @property
    def exponentials(self) -> int:
        return sum(found.opcode == "MUFU.EX2" for found in self.instructions)

    @property
    def element_bytes(self) -> int:
        """2 or 4: of each pair the exponentials are taken once."""
        return 2 if self.loaded_bytes / self.exponentials * self.exponentials_per_pair / self.rows < 3 else 4

    @property
    def pairs(self) -> float:
        """Elements of one row: a pair is one of each."""
        return self.loaded_bytes / self.element_bytes / self.rows

    def per_pair(self) -> dict[str, float]:
        """Instructions by pipe, each an issue slot, for one element of each row."""
        counts = Counter(found.pipe for found in self.instructions)
        return {pipe: count / self.pairs for pipe, count in counts.most_common()}

    @property
    def slots_per_pair(self) -> float:
        return len(self.instructions) / self.pairs


@functools.cache
def tool(name: str) -> str:
    """The path of cuobjdump or nvdisasm: of the CUDA toolkit, or as the triton package brings them along."""
    beside = shutil.which("nvcc")
    places = [Path(beside).resolve().parent] if beside else []
    triton = find_spec("triton")
    places += (
        [Path(folder) / "backends/nvidia/bin" for folder in (triton.submodule_search_locations or [])] if triton else []
    )
    found = shutil.which(name) or next((str(place / name) for place in places if (place / name).exists()), None)
    if found is None:
        raise FileNotFoundError(f"{name} is neither on the PATH nor in a triton package: pip install triton")
    return found


def kernels(file: Path) -> list[Kernel]:
    """Every kernel in a library, an object file or a cubin, for every architecture that it holds machine code of."""
    resources = dict(_resources(_listing("-res-usage", file)))
    return [
        Kernel(_demangled(symbol), arch, *(resources.get((arch, symbol)) or resources["", symbol]), tuple(instructions))
        for arch, symbol, instructions in _functions(_listing("-sass", file))
    ]


def row_loop(kernel: Kernel) -> RowLoop | None:
    """The loop over a row's tiles, if the kernel has one; of several the one with the most loads."""
    loops = _loops(kernel)
    working = [loop for loop in loops if loop.works]
    innermost = [loop for loop in working if not any(other.blocks.keys() < loop.blocks.keys() for other in working)]
    rows = next((rows for start, rows in ROWS.items() if kernel.short_name.startswith(start)), (2, 2))
    paths = [RowLoop(path, *rows) for loop in innermost if (path := _hot_path(loop, loops))]
    return max(paths, key=lambda path: (path.loaded_bytes, -len(path.instructions)), default=None)


# --- reading what cuobjdump prints --------------------------------------------------------------------------------

INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z]\S*)\s*(.*?)\s*;\s*/\*")
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


def _listing(option: str, file: Path) -> list[str]:
    done = subprocess.run([tool("cuobjdump"), option, str(file)], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def _resources(lines: list[str]) -> Iterator[tuple[tuple[str, str], tuple[int, int, int, int]]]:
    arch = symbol = ""  # of a cubin, which is of one architecture, it is not said
    for line in lines:
        if line.startswith("arch = "):
            arch = line.removeprefix("arch = ")
        elif line.startswith(" Function "):
            symbol = line.removeprefix(" Function ").rstrip(":")
        elif found := RESOURCES.search(line):
            registers, stack, shared, local = map(int, found.groups())
            yield (arch, symbol), (registers, stack, local, shared)


def _functions(lines: list[str]) -> Iterator[tuple[str, str, list[Instruction]]]:
    arch = symbol = ""
    instructions: list[Instruction] = []
    for line in [*lines, "\t\tFunction : "]:
        if found := INSTRUCTION.match(line):
            address, predicate, opcode, operands = found.groups(default="")
            instructions.append(Instruction(int(address, 16), predicate, opcode, operands))
        elif line.startswith("\t\tFunction : "):
            if instructions:
                yield arch, symbol, instructions
            symbol, instructions = line.removeprefix("\t\tFunction : "), []
        elif line.startswith("\tcode for "):
            if instructions:
                yield arch, symbol, instructions
                instructions = []
            arch = line.removeprefix("\tcode for ").rstrip("af")


@functools.cache
def _demangled(symbol: str) -> str:
    if shutil.which("c++filt") is None:
        return symbol
    return subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout.strip()


# --- loops --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loop:
    """A natural loop: `header` is its only entrance. A block is named by its first address."""

    header: int
    blocks: dict[int, tuple[Instruction, ...]]
    forward: dict[int, list[int]]  # the blocks that may follow, jumps back to where one came from left out
    latches: set[int]  # the blocks that jump back to the header

    @property
    def works(self) -> bool:
        inside = [found for block in self.blocks.values() for found in block]
        return any(found.bits_loaded >= 128 for found in inside) and any(found.opcode == "MUFU.EX2" for found in inside)


def _loops(kernel: Kernel) -> list[Loop]:
    blocks, followers = _blocks(kernel.instructions)
    entry = min(blocks)
    reached = _reached(entry, followers)
    without = {header: _reached(entry, followers, header) for header in blocks}

    def dominates(header: int, one: int) -> bool:
        """Return whether every path from the entry to `one` passes the header."""
        return one == header or (one in reached and one not in without[header])

    before: dict[int, set[int]] = {one: {start for start in blocks if one in followers[start]} for one in blocks}
    forward = {one: [other for other in followers[one] if not dominates(other, one)] for one in blocks}
    loops = []
    for header in blocks:
        latches = {one for one in before[header] if dominates(header, one)}
        if latches:
            inside = {header} | set().union(*(_reached(latch, before, header) for latch in latches))
            loops.append(Loop(header, {start: blocks[start] for start in sorted(inside)}, forward, latches))
    return loops


def _reached(start: int, followers: Mapping[int, Iterable[int]], avoiding: int = -1) -> set[int]:
    """Return the blocks that can be reached from one without entering another."""
    reached: set[int] = set()
    open_ends = [start]
    while open_ends:
        one = open_ends.pop()
        if one not in reached and one != avoiding:
            reached.add(one)
            open_ends += followers[one]
    return reached


def _blocks(
    instructions: Sequence[Instruction],
) -> tuple[dict[int, tuple[Instruction, ...]], dict[int, list[int]]]:
    """Runs of instructions without a jump in or out, and for each the runs that may follow."""
    addresses = [found.address for found in instructions]
    index = {address: i for i, address in enumerate(addresses)}
    starts = {addresses[0]}
    for found, following in zip(instructions, addresses[1:], strict=False):
        if found.target is not None or found.ends_a_path:
            starts |= {following} if found.target is None else {following, found.target}
    starts &= set(addresses)
    blocks, followers = {}, {}
    for start, end in itertools.pairwise([*sorted(starts), -1]):
        blocks[start] = tuple(instructions[index[start] : index.get(end)])
        last = blocks[start][-1]
        falls_through = [] if last.ends_a_path or end not in starts else [end]
        followers[start] = falls_through + ([last.target] if last.target in starts else [])
    return blocks, followers


def _hot_path(loop: Loop, loops: Sequence[Loop]) -> tuple[Instruction, ...]:
    """The shortest way from the header to a jump back on which there is a 16-byte load and an exponential.

    It leads through none of the loops inside.
    """
    inside = set[int]().union(*(other.blocks for other in loops if other.blocks.keys() < loop.blocks.keys()))
    ahead = {start: [one for one in loop.forward[start] if one in loop.blocks.keys() - inside] for start in loop.blocks}

    @functools.cache
    def ways(start: int) -> dict[tuple[bool, bool], tuple[Instruction, ...]]:
        """(loads, exponentiates) -> the shortest such way from this block on."""
        block = loop.blocks[start]
        loads = any(found.bits_loaded >= 128 for found in block)
        exponentiates = any(found.opcode == "MUFU.EX2" for found in block)
        rest = [way for follower in ahead[start] for way in ways(follower).items()]
        rest += [((False, False), ())] if start in loop.latches else []
        found: dict[tuple[bool, bool], tuple[Instruction, ...]] = {}
        for (later_loads, later_exponentiates), way in sorted(rest, key=lambda one: len(one[1])):
            found.setdefault((loads or later_loads, exponentiates or later_exponentiates), (*block, *way))
        return found

    return ways(loop.header).get((True, True), ())


# --- the command line ---------------------------------------------------------------------------------------------


def report(kernel: Kernel) -> str | None:
    """A line for people; None for a kernel without a row loop."""
    loop = row_loop(kernel)
    if loop is None:
        return None
    pipes = ", ".join(f"{pipe} {count:.2f}" for pipe, count in loop.per_pair().items())
    return (
        f"{kernel.arch:8} {kernel.short_name}: {loop.slots_per_pair:.2f} issue slots per pair of "
        f"{loop.element_bytes}-byte elements ({pipes}); {loop.loaded_bytes // 16} x 16 bytes a trip, "
        f"{kernel.registers} registers, {kernel.stack_bytes} bytes of stack"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench sass", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", nargs="+", type=Path)
    parser.add_argument("--arch", help="such as sm_90; all by default")
    parser.add_argument("--kernel", default="", help="only kernels with this in their name")
    options = parser.parse_args(arguments)
    found = [kernel for file in options.file for kernel in kernels(file)]
    chosen = [one for one in found if options.kernel in one.name and options.arch in (None, one.arch)]
    for kernel in chosen:
        if line := report(kernel):
            print(line)
    return 0 if chosen else 1
