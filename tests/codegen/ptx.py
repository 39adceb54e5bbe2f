"""Runs the PTX instructions of printed assembly on NumPy arrays, in Triton's interpreter too."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter


class Shared:
    """Shared memory of one program: the only array that is set aside, which begins as NaN."""

    BASE = 1024
    UNWRITTEN = 0x7FC0BAD0

    def set_aside(self, size: int) -> None:
        self.words = np.full(size // 4, self.UNWRITTEN, np.uint32)

    def place(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """The first word of each, which has to be aligned."""
        assert (addresses % size == 0).all()
        return (addresses.astype(np.int64) - self.BASE) // 4

    def store(self, addresses: np.ndarray, pairs: Sequence[np.ndarray]) -> None:
        first = self.place(addresses, 8 * len(pairs))
        for number, value in enumerate(pairs):
            self.words[first + 2 * number] = value & np.uint64(2**32 - 1)
            self.words[first + 2 * number + 1] = value >> np.uint64(32)

    def load(self, addresses: np.ndarray, count: int) -> list[np.ndarray]:
        first = self.place(addresses, 4 * count)
        values = [self.words[first + number] for number in range(count)]
        assert all((value != self.UNWRITTEN).all() for value in values), "read before written"
        return values


def run(
    assembly: str, results: int, inputs: Sequence[np.ndarray], shared: Shared | None = None
) -> list[np.ndarray]:
    """The results of instructions over 32-bit registers, of 16 or 32 bits, element by element.

    Registers that are stored to shared memory may have 64 bits.
    """
    registers = {f"${results + number}": value for number, value in enumerate(inputs)}
    found: dict[str, np.ndarray] = {}
    shape = np.broadcast_shapes((1,), *(value.shape for value in inputs))

    def value(text: str) -> np.ndarray:
        return registers[text] if text in registers else np.uint32(int(text, 0))

    for statement in re.sub(r"\.reg[^;]*;", "", assembly).strip("{} \n").split(";"):
        words = re.findall(r"[\w.$]+", statement)
        if not words:
            continue
        op, target, *sources = words
        if op == ".shared":
            assert shared is not None
            shared.set_aside(int(sources[-1]))
            registers[sources[-2]] = np.array([shared.BASE], np.uint32)
        elif op.startswith("st.shared"):
            assert shared is not None
            shared.store(value(target), [value(source) for source in sources])
        elif op.startswith("ld.shared"):
            assert shared is not None
            names = [target, *sources[:-1]]
            read = shared.load(value(sources[-1]), len(names))
            registers |= zip(names, read, strict=True)
        elif op == "mov.b32" and len(sources) > 1:
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
    "mov.u32": lambda value: value,
    "add.u32": np.add,
    "shl.b32": np.left_shift,
    "and.b32": np.bitwise_and,
    "lop3.b32": _lop3,
    "shr.u32": np.right_shift,
    "prmt.b32": _prmt,
}


_REGISTERS = {"r": np.uint32, "l": np.uint64}
_KINDS = {
    "=h": (np.float16, tl.float16),
    "=r": (np.int32, tl.int32),
    "=f": (np.float32, tl.float32),
}


class _Call:
    """What an inline assembly gives in the interpreter."""

    def __init__(self, results: list[interpreter.TensorHandle]) -> None:
        self.results = results

    def get_result(self, number: int) -> interpreter.TensorHandle:
        return self.results[number]


def _handle(values: np.ndarray, dtype: type, kind: tl.dtype) -> interpreter.TensorHandle:
    return interpreter.TensorHandle(np.ascontiguousarray(values).view(dtype), kind)


def interpret_assembly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets Triton's interpreter run inline assembly that gives numbers of `_KINDS`.

    One at a time, or four: those of each argument side by side in as many registers as they fill.
    """
    shared = Shared()

    def create(self, assembly, constraints, args, *form):
        types, is_pure, pack = form
        assert is_pure == ("=h" in constraints or "f" in constraints or pack > 1)
        if constraints == "=f,0":
            assert assembly.startswith("//")
            return _Call([interpreter.TensorHandle(args[0].data, tl.float32)])
        if pack == 1:
            kinds = constraints.split(",")
            outputs, taken = kinds[: len(types)], kinds[len(types) :]
            given = [arg.data.view(_REGISTERS[kind]) for arg, kind in zip(args, taken, strict=True)]
            found = run(assembly, len(types), given, shared)
            results = zip((_KINDS[output] for output in outputs), found, strict=True)
            return _Call([_handle(out, *kind) for kind, out in results])
        given = [register for arg in args for register in registers(arg.data, pack)]
        count = len(types) * pack // 2
        assert constraints == ",".join(["=r"] * count + ["r"] * len(given))
        words = np.stack(run(assembly, count, given), -1).astype(np.uint32)
        shape = (len(given[0]), len(types), pack // 2)
        halves = words.reshape(shape).view(np.uint16)
        found = [halves[:, number].reshape(args[0].data.shape) for number in range(len(types))]
        return _Call([_handle(out, *_KINDS["=h"]) for out in found])

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", create)


def registers(values: np.ndarray, pack: int) -> list[np.ndarray]:
    """Of every `pack` neighbours the 32-bit words that they fill."""
    together = np.ascontiguousarray(values).reshape(-1, pack).view(np.uint32)
    return [together[:, number] for number in range(together.shape[1])]
