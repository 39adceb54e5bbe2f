"""Runs the PTX instructions of printed assembly on NumPy arrays, in Triton's interpreter too."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter


def run(assembly: str, results: int, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The 16-bit results of instructions over 32-bit registers, element by element."""
    places = {f"${results + number}": value for number, value in enumerate(inputs)}
    registers = {name: value.astype(np.uint32) for name, value in places.items()}
    found: dict[str, np.ndarray] = {}

    def value(text: str) -> np.ndarray:
        return registers[text] if text in registers else np.uint32(int(text, 0))

    for statement in re.sub(r"\.reg[^;]*;", "", assembly).strip("{} \n").split(";"):
        words = re.findall(r"[\w.$]+", statement)
        if not words:
            continue
        op, target, *sources = words
        if op == "mov.b32":
            (source,) = sources[1:]
            found[target] = (value(source) & 0xFFFF).astype(np.uint16)
            found[sources[0]] = (value(source) >> np.uint32(16)).astype(np.uint16)
        else:
            registers[target] = _OPS[op](*map(value, sources))
    return [found[f"${number}"] for number in range(results)]


def _prmt(low: np.ndarray, high: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Each of four nibbles of the selector picks one of eight bytes."""
    both = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
    out = np.zeros(np.broadcast_shapes(both.shape, selector.shape), np.uint32)
    for place in range(4):
        nibble = selector >> np.uint32(4 * place) & np.uint32(15)
        assert (nibble < 8).all(), "the upper bit would repeat the byte's sign"
        byte = both >> nibble.astype(np.uint64) * np.uint64(8) & np.uint64(255)
        out |= byte.astype(np.uint32) << np.uint32(8 * place)
    return out


def _lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Each bit of the table says what comes of one combination of bits of a, b and c."""
    out = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), np.uint32)
    for number in range(8):
        chosen = [x if number >> place & 1 else ~x for place, x in ((2, a), (1, b), (0, c))]
        if int(table) >> number & 1:
            out |= chosen[0] & chosen[1] & chosen[2]
    return out


_OPS = {
    "and.b32": np.bitwise_and,
    "lop3.b32": _lop3,
    "shr.u32": np.right_shift,
    "prmt.b32": _prmt,
}


class _Call:
    """What an inline assembly gives in the interpreter."""

    def __init__(self, results: list[interpreter.TensorHandle]) -> None:
        self.results = results

    def get_result(self, number: int) -> interpreter.TensorHandle:
        return self.results[number]


def interpret_assembly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets Triton's interpreter run inline assembly that gives float16 numbers, one at a time."""

    def create(self, assembly, constraints, args, *form):
        types, is_pure, pack = form
        assert pack == 1
        assert is_pure
        assert constraints == ",".join(["=h"] * len(types) + ["r"] * len(args))
        found = run(assembly, len(types), [arg.data.view(np.uint32) for arg in args])
        return _Call([interpreter.TensorHandle(out.view(np.float16), tl.float16) for out in found])

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", create)
