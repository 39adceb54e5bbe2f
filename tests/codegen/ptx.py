"""Runs the PTX instructions of printed assembly on NumPy arrays, in Triton's interpreter too."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter


def run(assembly: str, results: int, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The results of instructions over 32-bit registers, of 16 or 32 bits, element by element."""
    places = {f"${results + number}": value for number, value in enumerate(inputs)}
    registers = {name: value.astype(np.uint32) for name, value in places.items()}
    found: dict[str, np.ndarray] = {}
    shape = np.broadcast_shapes(*(value.shape for value in inputs))

    def value(text: str) -> np.ndarray:
        return registers[text] if text in registers else np.uint32(int(text, 0))

    for statement in re.sub(r"\.reg[^;]*;", "", assembly).strip("{} \n").split(";"):
        words = re.findall(r"[\w.$]+", statement)
        if not words:
            continue
        op, target, *sources = words
        if op == "mov.b32" and len(sources) > 1:
            (source,) = sources[1:]
            found[target] = (value(source) & 0xFFFF).astype(np.uint16)
            found[sources[0]] = (value(source) >> np.uint32(16)).astype(np.uint16)
        else:
            registers[target] = _OPS[op](*map(value, sources))
    names = [f"${number}" for number in range(results)]
    values = [found.get(name, registers.get(name)) for name in names]
    return [np.broadcast_to(value, shape) for value in values if value is not None]


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


def _halves(kind: str) -> Callable[..., np.ndarray]:
    """Products and sums of pairs of 16-bit floats, rounded once."""

    def apart(bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        lower, upper = bits & np.uint32(0xFFFF), bits >> np.uint32(16)
        if kind == "f16x2":
            return tuple(half.astype(np.uint16).view(np.float16) for half in (lower, upper))
        return tuple((half << np.uint32(16)).view(np.float32) for half in (lower, upper))

    def together(values: list[np.ndarray]) -> np.ndarray:
        dtype = torch.float16 if kind == "f16x2" else torch.bfloat16
        halves = [torch.from_numpy(value).to(dtype).view(torch.int16).numpy() for value in values]
        lower, upper = (half.view(np.uint16).astype(np.uint32) for half in halves)
        return lower | upper << np.uint32(16)

    def call(*operands: np.ndarray) -> np.ndarray:
        shape = np.broadcast_shapes(*(operand.shape for operand in operands))
        pairs = zip(*(apart(np.broadcast_to(o, shape).copy()) for o in operands), strict=True)
        wide = [[value.astype(np.float64) for value in pair] for pair in pairs]
        return together([a * b + (c[0] if c else 0.0) for a, b, *c in wide])

    return call


_OPS = {
    **{f"{op}.rn.{kind}": _halves(kind) for op in ("mul", "fma") for kind in ("f16x2", "bf16x2")},
    "mov.b32": lambda value: value,
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
    """Lets Triton's interpreter run inline assembly that gives float16 numbers.

    One at a time, or four: those of each argument side by side in as many registers as they fill.
    """

    def create(self, assembly, constraints, args, *form):
        types, is_pure, pack = form
        assert is_pure
        if constraints == "=f,0":
            assert assembly.startswith("//")
            return _Call([interpreter.TensorHandle(args[0].data, tl.float32)])
        if pack == 1:
            assert constraints == ",".join(["=h"] * len(types) + ["r"] * len(args))
            given = [arg.data.view(np.uint32) for arg in args]
            found = run(assembly, len(types), given)
        else:
            given = [register for arg in args for register in registers(arg.data, pack)]
            count = len(types) * pack // 2
            assert constraints == ",".join(["=r"] * count + ["r"] * len(given))
            words = np.stack(run(assembly, count, given), -1).astype(np.uint32)
            shape = (len(given[0]), len(types), pack // 2)
            halves = words.reshape(shape).view(np.uint16)
            found = [halves[:, number].reshape(args[0].data.shape) for number in range(len(types))]
        return _Call([interpreter.TensorHandle(out.view(np.float16), tl.float16) for out in found])

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", create)


def registers(values: np.ndarray, pack: int) -> list[np.ndarray]:
    """Of every `pack` neighbours the 32-bit words that they fill."""
    together = np.ascontiguousarray(values).reshape(-1, pack).view(np.uint32)
    return [together[:, number] for number in range(together.shape[1])]
