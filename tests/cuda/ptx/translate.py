"""Translate nvcc's PTX to C++ for the emulator: each entry becomes a function that runs one thread.

    python tests/cuda/ptx/translate.py token_stats.ptx cuda/token_stats.cu > token_stats.ptx.cpp

A register becomes a variable that holds its bits, and an instruction becomes one line of C++. `machine.h` defines the
functions that these lines call. An instruction or operand that is not known here is an error.
"""

import re
import subprocess
import sys

# The instructions that compute registers from registers, without their type: the operands' types ("t" is the
# instruction's own), and C++ of the operands a, b, c, d.
ARITHMETIC = """
abs              t     std::abs(a)
add              tt    a + b
add.rn           tt    a + b
and              tt    a & b
bfi              ttuu  insert_bits(a, b, c, d)
bfind.shiftamt   t     a ? std::countl_zero(a) : ~0u
brev             t     reversed(a)
clz              t     std::countl_zero(a)
cvta             t     a
cvta.to.global   t     a
cvta.to.shared   t     a - shared
cvta.shared      t     a + shared
cvta.local       t     a
div              tt    a / b
div.rn           tt    a / b
ex2.approx.ftz   t     exp2_approximately(a)
fma.rn           ttt   std::fma(a, b, c)
mad.lo           ttt   a * b + c
max              tt    extreme<true, false>(a, b)
max.NaN          tt    extreme<true, true>(a, b)
min              tt    extreme<false, false>(a, b)
min.NaN          tt    extreme<false, true>(a, b)
mov              t     a
mul.hi           tt    high_product(a, b)
mul.lo           tt    a * b
mul.rn           tt    a * b
mul.wide         tt    T(a) * T(b)
neg              t     -a
not              t     complement(a)
or               tt    a | b
popc             t     std::popcount(a)
prmt             ttu   permuted_bytes(a, b, c)
rcp.approx.ftz   t     reciprocal_approximately(a)
rcp.rn           t     1 / a
rem              tt    a % b
selp             ttp   c ? a : b
shf.l.wrap       ttu   T((uint64_t{b} << 32 | a) << (c & 31) >> 32)
shf.r.wrap       ttu   T((uint64_t{b} << 32 | a) >> (c & 31))
shl              tu    shifted_left(a, b)
shr              tu    shifted_right(a, b)
sqrt.rn          t     std::sqrt(a)
sub              tt    a - b
sub.rn           tt    a - b
xor              tt    a ^ b
shfl.sync.bfly   tuuu  __shfl_xor_sync(d, a, int(b), int(c) + 1)
shfl.sync.idx    tuuu  __shfl_sync(d, a, int(b), int(c) + 1)
vote.sync.all    pu    __ballot_sync(b, !a) == 0
vote.sync.any    pu    __any_sync(b, a)
vote.sync.ballot pu    __ballot_sync(b, a)
redux.sync.add   tu    __reduce_add_sync(b, a)
redux.sync.max   tu    __reduce_max_sync(b, a)
redux.sync.min   tu    __reduce_min_sync(b, a)
bar.red.or       up    emulator::block_barrier("bar.red", b, kBarrier) > 0
bar.red.popc     up    emulator::block_barrier("bar.red", b, kBarrier)
"""
CONVERSIONS = {"": "T(a)", "rn": "T(a)", "rzi": "to_integer<T>(a)",
               "rpi": "std::ceil(a)", "rmi": "std::floor(a)", "rni": "std::nearbyint(a)"}  # fmt: skip
COMPARISONS = {"eq": "a == b", "ne": "a < b || a > b", "lt": "a < b", "le": "a <= b", "gt": "a > b", "ge": "a >= b",
               "lo": "a < b", "ls": "a <= b", "hi": "a > b", "hs": "a >= b", "equ": "!(a < b || a > b)",
               "neu": "a != b", "ltu": "!(a >= b)", "leu": "!(a > b)", "gtu": "!(a <= b)", "geu": "!(a < b)",
               "nan": "a != a || b != b", "num": "a == a && b == b"}  # fmt: skip
ATOMICS = {"add": "old + b", "and": "old & b", "exch": "b", "max": "std::max(old, b)", "min": "std::min(old, b)",
           "or": "old | b", "xor": "old ^ b", "cas": "old == b ? c : old"}  # fmt: skip
BARE = {"ret": "return;", "exit": "return;", "bar.sync 0": "emulator::block_barrier(\"bar.sync\", false, kBarrier);",
        "barrier.sync 0": "emulator::block_barrier(\"bar.sync\", false, kBarrier);"} | dict.fromkeys(
       ("membar.gl", "membar.cta", "membar.sys", "fence.sc.gpu", "fence.acq_rel.gpu", "fence.sc.cta"),
       "__threadfence();")  # fmt: skip
INTEGERS = {"b": "uint{}_t", "u": "uint{}_t", "s": "int{}_t"}
SPECIAL_TYPES = {"f32": "float", "f64": "double", "pred": "bool", "f16": "pruneopd::Half", "bf16": "pruneopd::BFloat16",
                 "f16x2": "Pair<pruneopd::Half>", "bf16x2": "Pair<pruneopd::BFloat16>"}  # fmt: skip
SPECIAL_REGISTERS = {"%tid.x": "threadIdx.x", "%ctaid.x": "blockIdx.x", "%ntid.x": "blockDim.x",
                     "%nctaid.x": "gridDim.x", "%laneid": "lane()"}  # fmt: skip

RULES = {op: (types, code) for op, types, code in (line.split(None, 2) for line in ARITHMETIC.strip().split("\n"))}


def cpp_type(ptx):
    return SPECIAL_TYPES.get(ptx) or INTEGERS[ptx[0]].format(int(ptx[1:]))


def split(operands):
    """Return what commas separate outside of braces and brackets."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", operands)]


class Entry:
    """A kernel: its registers, and its basic blocks with how many instructions each has, all and in float64."""

    FLOAT64 = re.compile(r"(?:@\S+ )?(?!mov|selp|ld|st)\S*\.f64")

    def __init__(self, body):
        self.types = {}  # of registers, by the name without its number
        self.blocks, self.is_in_block = [], False
        self.lines = []
        # A label, a brace of a scope, or what ends at a semicolon; braces within that are lists.
        for label, brace, text in re.findall(r"\s*(?:(\$?\w+):(?!:)|([{}])|([^;]+);)", body):
            text = " ".join(text.split())
            if label:
                self.is_in_block = False
                text = f"{label.replace('$', '')}:;"
            elif text:
                try:
                    text = self._declaration(text, body) if text.startswith(".") else self._counted(text)
                except (AttributeError, KeyError, ValueError) as error:
                    raise ValueError(f"cannot translate `{text}`: {error!r}") from error
            self.lines.append(brace or text)

    def _declaration(self, text, body):
        """Return the variables of a directive: registers, or a thread's local memory."""
        if text.startswith(".pragma"):
            return ""
        if local := re.fullmatch(r"\.local \.align (\d+) \.b8 (\w+)\[(\d+)\]", text):
            return f"alignas({local[1]}) unsigned char {local[2]}[{local[3]}];"
        ptx_type, names = re.fullmatch(r"\.reg \.(\w+) (.*)", text).groups()
        if numbered := re.fullmatch(r"%(\w+)<\d+>", names):
            self.types[numbered[1]] = ptx_type
            used = sorted({*re.findall(rf"%({numbered[1]}\d+)\b", body)})
        else:
            used = [name.lstrip("%") for name in split(names)]
            self.types |= dict.fromkeys(used, ptx_type)
        return f"[[maybe_unused]] {cpp_type(ptx_type)} {', '.join(used)};" if used else ""

    def _counted(self, text):
        """Return C++ of an instruction, after the counting of the block that it begins."""
        before = "" if self.is_in_block else f"++count[{len(self.blocks)}]; "
        if not self.is_in_block:
            self.blocks.append([0, 0])
        self.blocks[-1][0] += 1
        self.blocks[-1][1] += bool(self.FLOAT64.match(text))
        self.is_in_block = not re.search(r"\b(bra|ret|exit)\b", text)
        return before + self._instruction(text)

    def _type(self, register):
        return self.types.get(register) or self.types[register.rstrip("0123456789")]

    def _read(self, operand, ptx_type):
        """Return C++ for an operand that an instruction of that type reads."""
        wanted = cpp_type(ptx_type)
        if operand.startswith("!"):
            return f"!{self._read(operand[1:].strip(), ptx_type)}"
        if hexadecimal := re.fullmatch(r"0[fFdD]([0-9a-fA-F]+)", operand):
            return f"as<{wanted}>({'uint32_t' if len(hexadecimal[1]) == 8 else 'uint64_t'}{{0x{hexadecimal[1]}}})"
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", operand):
            return f"{wanted}({int(operand, 0) % 2**64}u)"
        if parameter := re.fullmatch(r"\w+_param_(\d+)", operand):
            return f"reinterpret_cast<uint64_t>(parameters[{parameter[1]}])"
        if operand.endswith("13shared_memoryE"):
            return "0u"  # in the shared memory's own addresses
        if operand.startswith("__local_depot"):
            return f"reinterpret_cast<uint64_t>({operand})"
        if operand in SPECIAL_REGISTERS:
            return SPECIAL_REGISTERS[operand]
        name = operand.lstrip("%")
        have = cpp_type(self._type(name))
        if have == wanted:
            return name
        return f"{wanted}({name})" if "int" in have and "int" in wanted else f"as<{wanted}>({name})"

    def _write(self, register, expression, ptx_type):
        """Return C++ that puts a value of that type into a register."""
        if register == "_":
            return f"(void)({expression});"
        name = register.lstrip("%")
        have, given = cpp_type(self._type(name)), cpp_type(ptx_type)
        plain = have == given or ("int" in have and "int" in given)
        return f"{name} = {expression};" if plain else f"{name} = as<{have}>({given}({expression}));"

    def _computed(self, result, ptx_type, operands, types, code):
        """Return C++ of a register that becomes an expression of operands."""
        names = {name: self._read(*pair) for name, *pair in zip("abcd", operands, types, strict=False)}
        if len(operands) != len(types):
            raise ValueError(f"{len(types)} operands expected")
        names["T"] = cpp_type(ptx_type)
        expression = re.sub(r"\b[abcdT]\b", lambda found: names[found[0]], code)
        register, _, exists = result.partition("|")  # of a shuffle: whether the other lane exists
        written = self._write(register, expression, ptx_type)
        return f"{written} {self._write(exists, 'true', 'pred')}" if exists else written

    def _address(self, operand, modifiers, count=1):
        base, offset = re.fullmatch(r"\[\s*([^\s+]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand).groups()
        where = f"{self._read(base, 'u64')}, {offset or 0}"
        return f"address<{cpp_type(modifiers[-1])}, {count}>({'shared + ' if 'shared' in modifiers else ''}{where})"

    def _access(self, kind, modifiers, operands):
        """Return C++ of a load or a store."""
        ptx_type = modifiers[-1]
        registers, memory = operands if kind == "ld" else operands[::-1]
        registers = split(registers.strip("{} "))
        at = self._address(memory, modifiers, len(registers))
        if kind == "ld":
            each = (self._write(name, f"at[{n}]", ptx_type) for n, name in enumerate(registers))
        else:
            each = (f"at[{n}] = {self._read(name, ptx_type)};" for n, name in enumerate(registers))
        return f"{{ const auto at = {at}; {' '.join(each)} }}"

    def _atomic(self, kind, modifiers, operands):
        result = operands[0] if kind == "atom" else "_"
        memory, *values = operands[kind == "atom" :]
        ptx_type = modifiers[-1]
        new = ATOMICS[modifiers[-2]]
        for name, operand in zip("bc", values, strict=False):
            new = re.sub(rf"\b{name}\b", self._read(operand, ptx_type), new)
        return (
            f"{{ const auto at = {self._address(memory, modifiers)}; const {cpp_type(ptx_type)} old = at[0]; "
            f"at[0] = {new}; emulator::note_atomic(at); {self._write(result, 'old', ptx_type)} }}"
        )

    def _unpacked(self, ptx_type, registers, word):
        names = split(registers.strip("{}"))
        bits = int(ptx_type[1:]) // len(names)
        parts = (self._write(name, f"uint{bits}_t(word >> {bits * n})", f"b{bits}") for n, name in enumerate(names))
        return f"{{ const auto word = {self._read(word, ptx_type)}; {' '.join(parts)} }}"

    def _packed(self, ptx_type, word, registers):
        names = split(registers.strip("{}"))
        bits = int(ptx_type[1:]) // len(names)
        parts = (f"uint64_t({self._read(name, f'b{bits}')}) << {bits * n}" for n, name in enumerate(names))
        return self._write(word, " | ".join(parts), ptx_type)

    def _instruction(self, text):
        if predicated := re.fullmatch(r"@(!?%\w+) (.*)", text):
            return f"if ({self._read(predicated[1], 'pred')}) {{ {self._instruction(predicated[2])} }}"
        if text in BARE:
            return BARE[text]
        opcode, _, rest = text.partition(" ")
        operands = split(rest)
        kind, *modifiers = opcode.split(".")
        if kind == "bra":
            return f"goto {operands[0].replace('$', '')};"
        if kind in ("ld", "st"):
            return self._access(kind, modifiers, operands)
        if kind in ("atom", "red"):
            return self._atomic(kind, modifiers, operands)
        ptx_type = modifiers.pop()
        if kind == "mov" and "{" in rest:  # words to halves, or halves to words
            return (self._unpacked if operands[0].startswith("{") else self._packed)(ptx_type, *operands)
        if kind == "cvt":
            to = modifiers.pop()
            code = "T::of(a, b)" if to.endswith("x2") else CONVERSIONS[".".join(modifiers)]
            code = "converted<T>(a)" if {"f16", "bf16"} & {to, ptx_type} else code
            return self._computed(operands[0], to, operands[1:], [ptx_type] * (len(operands) - 1), code)
        if kind == "setp":
            code = COMPARISONS["neu" if modifiers == ["ne"] and ptx_type[0] != "f" else ".".join(modifiers)]
            return self._computed(operands[0], "pred", operands[1:], [ptx_type] * 2, code)
        types, code = RULES[".".join([kind, *modifiers])]
        types = [{"t": ptx_type, "u": "u32", "p": "pred"}[letter] for letter in types]
        if modifiers == ["wide"]:
            ptx_type = f"{ptx_type[0]}{2 * int(ptx_type[1:])}"
        return self._computed(operands[0], ptx_type, operands[1:], types, code)


def function(number, name, body):
    """Return C++ of an entry, and what pairs it with the kernel that the host launches."""
    entry = Entry(body)
    kernel = subprocess.run(["c++filt", "-p", name], capture_output=True, text=True, check=True).stdout.strip()
    kernel = kernel.replace("(anonymous namespace)::", "")
    sizes = ", ".join(f"{{{total}, {float64}}}" for total, float64 in entry.blocks)
    return "\n".join(
        [
            f"constexpr emulator::Issued sizes{number}[] = {{{sizes}}};",
            f"emulator::Counter counter{number}(sizes{number});",
            f"void run{number}([[maybe_unused]] void* const* parameters) {{",
            f"uint32_t* const count = counter{number}.of_thread();",
            *entry.lines,
            "}",
            f"const emulator::Compiled entry{number}(reinterpret_cast<const void*>(&{kernel}), run{number});",
        ]
    )


def main(ptx, source):
    with open(ptx) as file:
        text = re.sub(r"//[^\n]*", "", file.read())
    entries = re.findall(r"\.entry\s+(\w+)\s*\([^)]*\)[^{]*^\{(.*?)^\}", text, re.S | re.M)
    print(f'#include "{source}"\n\n#include "ptx/machine.h"\n\nnamespace {{\nusing namespace ptx;')
    for number, entry in enumerate(entries):
        print(function(number, *entry))
    print("}  // namespace")


if __name__ == "__main__":
    main(*sys.argv[1:])
