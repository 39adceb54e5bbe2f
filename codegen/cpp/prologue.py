"""Prologues in C++: loops over the inputs of a row, split where a reduction has to be done first.

What a later loop needs of an earlier one waits in a buffer of floats, one row long; a value may
take the place of one that nothing needs any more. Compilers make vectors of the loops themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

from fxquant.codegen.cpp.halves import SHORT
from fxquant.codegen.cpp.ops import CppOps
from fxquant.codegen.epilogue import EpilogueNode
from fxquant.codegen.pointwise import bare
from fxquant.codegen.prologue import (
    REDUCTIONS,
    Prologue,
    PrologueOperand,
    is_cast,
    is_reduction,
    references,
)

STORED = {"float32": "float", "float16": "uint16_t", "bfloat16": "uint16_t", "bool": "uint8_t"}


@dataclass(frozen=True)
class Loops:
    """Which loop computes what.

    Attributes:
        prologue: What is computed.
        ready: The first loop in which a value can be used, by its reference.
        at: The loop that computes a value of all inputs, or that a reduction sums in.
        buffers: Which buffer keeps a value for later loops.
    """

    prologue: Prologue
    ready: dict[str, int]
    at: dict[str, int]
    buffers: dict[str, int]

    @property
    def count(self) -> int:
        """How many loops there are."""
        return 1 + max(self.at.values())

    @property
    def n_buffers(self) -> int:
        """How many rows of floats wait between loops."""
        return 1 + max(self.buffers.values(), default=-1)

    @classmethod
    def of(cls, prologue: Prologue) -> Loops:
        """As few loops as the reductions allow, every value as late as its users allow."""
        ready = {f"%in{number}": 0 for number in range(len(prologue.operands))}
        for number, node in enumerate(prologue.nodes):
            first = max((ready[value] for value in references(node)), default=0)
            ready[f"%{number}"] = first + is_reduction(node)
        dims = prologue.dims
        users = _users(prologue)
        at: dict[str, int] = {}
        for number, node in reversed(list(enumerate(prologue.nodes))):
            name = f"%{number}"
            if is_reduction(node):
                at[name] = ready[name] - 1
            elif "k" in dims[name]:
                read = [at[user] for user in users[name] if user in at]
                at[name] = ready[name] if name == prologue.result or not read else min(read)
        return cls(prologue, ready, at, _buffers(prologue, at, users))


def _users(prologue: Prologue) -> dict[str, list[str]]:
    users: dict[str, list[str]] = {f"%{number}": [] for number in range(len(prologue.nodes))}
    for number, node in enumerate(prologue.nodes):
        for value in references(node):
            users.setdefault(value, []).append(f"%{number}")
    return users


def _buffers(prologue: Prologue, at: dict[str, int], users: dict[str, list[str]]) -> dict[str, int]:
    """Buffers of values that later loops read; the result waits in one to be rounded."""
    last = {name: max([at[u] for u in users[name] if u in at], default=0) for name in at}
    last[prologue.result] = 1 + max(at.values())
    free_from: list[int] = []  # the loop in which a buffer may get another value
    found: dict[str, int] = {}
    for name in sorted(at, key=lambda name: (at[name], int(name[1:]))):
        node = prologue.nodes[int(name[1:])]
        if is_reduction(node) or last[name] <= at[name]:
            continue
        place = next((i for i, loop in enumerate(free_from) if loop <= at[name]), len(free_from))
        free_from[place:] = [last[name], *free_from[place + 1 :]]
        found[name] = place
    return found


@dataclass(frozen=True)
class Text:
    """A printed prologue.

    Attributes:
        body: Of a function with ``call``, ``row`` and buffers ``row0``, ``row1`` .. of K floats.
        result: The buffer that the result is left in, as ``"row0"``.
        buffers: All of them.
        prelude: Helpers of `fxquant.codegen.cpp.math` that it calls.
    """

    body: str
    result: str
    buffers: tuple[str, ...]
    prelude: set[str]


def prologue_text(prologue: Prologue, x_dtype: str) -> Text:
    """Prints a prologue.

    Args:
        prologue: What is computed.
        x_dtype: What its result is rounded to.

    Raises:
        KernelError: An op that C++ has no spelling for.
    """
    printer = _Printer(prologue, x_dtype)
    lines = printer.lines()
    buffers = tuple(f"row{number}" for number in range(printer.loops.n_buffers))
    result = buffers[printer.loops.buffers[prologue.result]]
    body = "\n".join(line if line.startswith("#") else f"  {line}" for line in lines)
    return Text(body, result, buffers, printer.ops.prelude)


class _Printer:
    def __init__(self, prologue: Prologue, x_dtype: str) -> None:
        self.prologue, self.x_dtype = prologue, x_dtype
        self.loops, self.dims, self.names = Loops.of(prologue), prologue.dims, prologue.names
        flags = [i for i, operand in enumerate(prologue.operands) if operand.dtype == "bool"]
        self.ops = CppOps([f"in{number}" for number in flags])

    def lines(self) -> list[str]:
        lines = []
        for number, operand in enumerate(self.prologue.operands):
            lines += self._pointer(number, operand)
        for number, result in enumerate(self.prologue.more):
            kind = STORED[result.dtype]
            lines.append(
                f"{kind}* more{number} = static_cast<{kind}*>(call.more[{number}]) + row * K;"
            )
        for number in range(self.loops.count):
            lines += [*self._of_rows(number), *self._loop(number)]
        return lines

    def _pointer(self, number: int, operand: PrologueOperand) -> list[str]:
        kind, name = STORED[operand.dtype], f"in{number}"
        start = {"mk": f" + row * call.steps[{number}]", "m": " + row"}.get(operand.dims, "")
        text = f"static_cast<const {kind}*>(call.operands[{number}]){start}"
        if "k" in operand.dims:
            return [f"const {kind}* p{number} = {text};"]
        value = "bool" if operand.dtype == "bool" else "float"
        return [f"const {value} {name} = {self._loaded(operand, f'*({text})')};"]

    def _loaded(self, operand: PrologueOperand, text: str) -> str:
        if operand.dtype == "bool":
            return f"{text} != 0"
        return self._from(operand.dtype, text)

    def _from(self, dtype: str, text: str) -> str:
        return text if dtype == "float32" else self._helper(f"from_{SHORT[dtype]}", text)

    def _to(self, dtype: str, text: str) -> str:
        return text if dtype == "float32" else self._helper(f"to_{SHORT[dtype]}", text)

    def _helper(self, name: str, text: str) -> str:
        self.ops.prelude.add(name)
        return f"{name}({text})"

    def _of_rows(self, loop: int) -> list[str]:
        """What there is one of in a row, and can be computed before a loop."""
        lines = []
        for number, node in enumerate(self.prologue.nodes):
            name = f"%{number}"
            if is_reduction(node):
                if self.loops.ready[name] == loop:
                    lines.append(f"const float {self.names[name]} = {self._reduced(number, node)};")
            elif "k" not in self.dims[name] and self.loops.ready[name] == loop:
                lines.append(self._statement(number, node))
        return lines

    def _reduced(self, number: int, node: EpilogueNode) -> str:
        if REDUCTIONS[node.op] == "amax":
            return f"odd_{number} ? NAN : most_{number}"
        return f"total_{number} / float(K)" if REDUCTIONS[node.op] == "mean" else f"total_{number}"

    def _statement(self, number: int, node: EpilogueNode) -> str:
        name = self.names[f"%{number}"]
        text = self.ops.call(node, self.names, name)
        kind = "bool" if name in self.ops.booleans else "float"
        return f"const {kind} {name} = {bare(text)};"

    def _loop(self, loop: int) -> list[str]:
        wanted = [name for name in self.loops.at if self.loops.at[name] == loop]
        body: list[str] = []
        sums: list[str] = []
        known: set[str] = set()
        before: list[str] = []
        for name in sorted(wanted, key=lambda name: int(name[1:])):
            number = int(name[1:])
            node = self.prologue.nodes[number]
            for value in references(node):
                body += self._fetched(value, known)
            if is_reduction(node):
                self._accumulate(number, node, before, sums, body)
            else:
                body += [self._statement(number, node), *self._kept(name)]
                known.add(name)
        pragma = " ".join(["#pragma omp simd", *sums])
        head = "for (int64_t k = 0; k < K; ++k) {"
        return [*before, pragma, head, *(f"  {line}" for line in body), "}"]

    def _fetched(self, value: str, known: set[str]) -> list[str]:
        """Loads a value that the body of a loop does not have yet."""
        if value in known or "k" not in self.dims[value]:
            return []
        known.add(value)
        name = self.names[value]
        if value.startswith("%in"):
            operand = self.prologue.operands[int(value[3:])]
            kind = "bool" if operand.dtype == "bool" else "float"
            return [f"const {kind} {name} = {self._loaded(operand, f'p{value[3:]}[k]')};"]
        buffer = f"row{self.loops.buffers[value]}[k]"
        if name in self.ops.booleans:
            return [f"const bool {name} = {buffer} != 0.0f;"]
        return [f"const float {name} = {buffer};"]

    def _kept(self, value: str) -> list[str]:
        """Stores a value where later loops or others read it."""
        name, lines = self.names[value], []
        if value == self.prologue.result:
            kept = name
            node = self.prologue.nodes[-1]
            if self.x_dtype != "float32" and not is_cast(node, self.x_dtype):
                kept = self._from(self.x_dtype, self._to(self.x_dtype, name))
            lines.append(f"row{self.loops.buffers[value]}[k] = {kept};")
        elif value in self.loops.buffers:
            kept = f"{name} ? 1.0f : 0.0f" if name in self.ops.booleans else name
            lines.append(f"row{self.loops.buffers[value]}[k] = {kept};")
        for number, result in enumerate(self.prologue.more):
            if result.value == value:
                lines.append(f"more{number}[k] = {self._rounded(value, result.dtype)};")
        return lines

    def _rounded(self, value: str, dtype: str) -> str:
        node = self.prologue.nodes[int(value[1:])]
        if is_cast(node, dtype):
            (value,) = references(node)
        return self._to(dtype, self.names[value])

    def _accumulate(
        self, number: int, node: EpilogueNode, before: list[str], sums: list[str], body: list[str]
    ) -> None:
        name = self.names[references(node)[0]]
        if REDUCTIONS[node.op] != "amax":
            before.append(f"float total_{number} = 0.0f;")
            sums.append(f"reduction(+ : total_{number})")
            body.append(f"total_{number} += {name};")
            return
        before += [f"float most_{number} = -INFINITY;", f"int32_t odd_{number} = 0;"]
        sums += [f"reduction(max : most_{number})", f"reduction(| : odd_{number})"]
        body += [
            f"most_{number} = {name} > most_{number} ? {name} : most_{number};",
            f"odd_{number} |= {name} != {name};",
        ]
