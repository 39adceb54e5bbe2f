"""Random graphs: products in any spelling, and what stands around them in models."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.property.test_random_models import Step, product

SPELLINGS = ("linear", "matmul", "transposed", "einsum", "addmm", "conv", "batched")
SIZES = (1, 17, 32, 48, 64, 96)
UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "exp": lambda x: torch.exp(-x.abs()),
    "abs": torch.abs,
    "neg": torch.neg,
    "sqrt": lambda x: torch.sqrt(x.abs() + 0.5),
    "rsqrt": lambda x: torch.rsqrt(x * x + 1),
    "square": lambda x: torch.square(torch.tanh(x)),
    "power": lambda x: (x * 0.5).clamp(-2, 2) ** 3,
    "sin": torch.sin,
    "cos": torch.cos,
    "erf": torch.erf,
    "log": lambda x: torch.log(x.abs() + 1),
    "leaky": lambda x: F.leaky_relu(x, 0.1),
    "clamp": lambda x: x.clamp(-0.7, 0.9),
    "scaled": lambda x: x * 0.25 - 1,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "softplus": F.softplus,
    "mish": F.mish,
    "elu": F.elu,
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "logsigmoid": F.logsigmoid,
    "softshrink": lambda x: F.softshrink(x, 0.3),
    "selu": F.selu,
    "sinh": lambda x: torch.sinh(torch.tanh(x)),
    "cosh": lambda x: torch.cosh(torch.tanh(x)),
    "tan": lambda x: torch.tan(torch.tanh(x)),
    "atan": torch.atan,
    "asin": lambda x: torch.asin(torch.tanh(x) * 0.9),
    "acos": lambda x: torch.acos(torch.tanh(x) * 0.9),
    "asinh": torch.asinh,
    "acosh": lambda x: torch.acosh(x.abs() + 1.1),
    "atanh": lambda x: torch.atanh(torch.tanh(x) * 0.9),
    "erfc": torch.erfc,
    "expm1": lambda x: torch.expm1(-x.abs()),
    "log10": lambda x: torch.log10(x.abs() + 1),
    "masked": lambda x: x.masked_fill((x > 0) & ~(x > 1) | (x < -1), -0.25),
    "finite": lambda x: torch.where(torch.isfinite(x), x, 0.0),
    "mean of flags": lambda x: x * ((x > 0).float() + (x > 0.5)),
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": lambda x, y: x * torch.tanh(y),
    "div": lambda x, y: x / (1 + y.abs()),
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "where": lambda x, y: torch.where(x > y, x, y * 0.5),
    "alpha": lambda x, y: torch.add(x, y, alpha=0.3),
    "lerp": lambda x, y: torch.lerp(x, y, 0.25),
    "addcmul": lambda x, y: torch.addcmul(x, torch.tanh(y), torch.sigmoid(x), value=0.3),
    "addcdiv": lambda x, y: torch.addcdiv(x, y, 1 + y.abs(), value=-0.5),
    "hypot": torch.hypot,
    "atan2": lambda x, y: torch.atan2(x, y.abs() + 0.5),
    "logaddexp": torch.logaddexp,
    "xor": lambda x, y: torch.where((x > 0) ^ (y > 0), x, y),
}
NORMS = ("layer", "rms", "written", "softmax")
IN_PLACE = ("add", "mul", "relu", "index", "copy")
VIEWS = ("half", "swap", "unflatten", "strided", "expand")


@dataclass(frozen=True)
class Op:
    """One step of a graph; numbers are taken modulo what there is.

    Attributes:
        kind: ``"product"``, ``"gate"``, ``"qkv"``, ``"unary"``, ``"binary"``, ``"norm"``,
            ``"in place"``, ``"state"``, ``"view"`` or ``"cast"``.
        source: The value that it takes.
        other: A second value, or how an operand is broadcast.
        how: Which of the kind.
        size: Outputs of products.
        bias: Whether products add one.
    """

    kind: str
    source: int
    other: int
    how: int
    size: int
    bias: bool


KINDS = (
    ("product", 5),
    ("unary", 4),
    ("binary", 4),
    ("gate", 2),
    ("qkv", 2),
    ("norm", 2),
    ("in place", 2),
    ("state", 1),
    ("view", 2),
    ("cast", 1),
)


@dataclass(frozen=True)
class Plan:
    """A graph and how it is compiled.

    Attributes:
        seed: Of weights and inputs.
        width: Of the input.
        batched: Whether the input has three dimensions.
        ops: The steps.
        dtype: Of parameters and input.
        scheme: A quantization scheme.
        rows: The inputs' numbers of rows; several compile with dynamic shapes.
    """

    seed: int
    width: int
    batched: bool
    ops: tuple[Op, ...]
    dtype: str
    scheme: str
    rows: tuple[int, ...]


def draw(seed: int, dtypes: Sequence[str] = ("float32", "bfloat16")) -> Plan:
    """The plan of a seed."""
    rng = random.Random(seed)
    kinds, shares = zip(*KINDS, strict=True)

    def op(kind: str) -> Op:
        # Values that were made last are taken more often: chains grow long.
        back = min(int(rng.expovariate(0.9)), 7)
        return Op(
            kind,
            -1 - back,
            rng.randrange(64),
            rng.randrange(64),
            rng.choice(SIZES),
            rng.random() < 0.6,
        )

    count = rng.randint(3, 10)
    drawn = [op("product"), *(op(rng.choices(kinds, shares)[0]) for _ in range(count))]
    if rng.random() < 0.4:
        drawn.insert(0, op("norm"))
    rows = tuple(rng.sample((1, 2, 3, 5, 8, 16, 33, 70), 3 if rng.random() < 0.35 else 1))
    return Plan(
        seed,
        rng.choice(SIZES[1:]),
        rng.random() < 0.4,
        tuple(drawn),
        rng.choice(list(dtypes)),
        rng.choice(("nf4", "nf4", "int8", "fp4", "w8a8", "w8a8", "llm_int8", "zeroquant")),
        rows,
    )


class RandomGraph(nn.Module):
    """A plan as a module: every value that nothing read is a result, and some of the others."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        torch.manual_seed(plan.seed)
        self.plan, widths = plan, [plan.width]
        self.dtype = getattr(torch, plan.dtype)
        for number, op in enumerate(plan.ops):
            widths.append(self._build(number, op, widths[op.source % len(widths)]))
        self.widths = widths
        self.to(self.dtype).eval().requires_grad_(requires_grad=False)

    def _build(self, number: int, op: Op, width: int) -> int:
        """Makes the parameters of a step; gives the width of its value."""

        def add(name: str, *shape: int, scale: float = 1.0) -> None:
            self.register_parameter(f"{name}{number}", nn.Parameter(torch.randn(shape) * scale))

        spelling, size = SPELLINGS[op.how % len(SPELLINGS)], op.size
        if op.kind == "product":
            turned = spelling in ("matmul", "addmm")
            shape = {"conv": (size, width, 1), "batched": (2, width, size)}.get(
                spelling, (width, size) if turned else (size, width)
            )
            add("w", *shape, scale=width**-0.5)
            add("b", size)
            return size
        if op.kind in ("gate", "qkv"):
            for name in "uvw" if op.kind == "qkv" else "uv":
                add(name, size, width, scale=width**-0.5)
                add(f"b{name}", size)
            return size
        if op.kind in ("binary", "norm", "in place"):
            add("p", width)
        if op.kind == "state":
            self.register_buffer(f"s{number}", torch.randn(width))
        halved = op.kind == "view" and VIEWS[op.how % len(VIEWS)] in ("half", "strided")
        return width // 2 if halved and width > 1 else width

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values, read = [x], set()
        for number, op in enumerate(self.plan.ops):
            source = op.source % len(values)
            read.add(source)
            alike = [i for i, v in enumerate(values) if v.shape == values[source].shape]
            other = alike[op.other % len(alike)]
            if op.kind == "binary" and op.how % 3:
                read.add(other)
            values.append(self._value(number, op, values[source], values[other]))
        last = len(values) - 1
        picked = [i for i in range(1, last) if i not in read or (self.plan.seed + i) % 5 == 0]
        return tuple(values[i] for i in [*picked, last])

    def _value(self, number: int, op: Op, x: Tensor, other: Tensor) -> Tensor:
        if op.kind in ("product", "gate", "qkv"):
            return self._products(number, op, x)
        if op.kind == "unary":
            return list(UNARY.values())[op.how % len(UNARY)](x)
        if op.kind == "binary":
            operand = (self._own("p", number), other, other)[op.how % 3]
            return list(BINARY.values())[op.other % len(BINARY)](x, operand)
        if op.kind == "norm":
            return normed(NORMS[op.how % len(NORMS)], x, self._own("p", number))
        if op.kind == "in place":
            return in_place(IN_PLACE[op.how % len(IN_PLACE)], x, self._own("p", number))
        if op.kind == "state":
            state = self._own("s", number)
            y = x + state
            state.mul_(0.5).add_(1)
            return y * torch.tanh(state)
        if op.kind == "cast":
            return (x.float() * 1.5).to((torch.float16, torch.float32)[op.how % 2]).to(x.dtype)
        return viewed(VIEWS[op.how % len(VIEWS)], x)

    def _own(self, name: str, number: int) -> Tensor:
        return getattr(self, f"{name}{number}")  # type: ignore[no-any-return]

    def _products(self, number: int, op: Op, x: Tensor) -> Tensor:
        if op.kind == "product":
            bias = self._own("b", number) if op.bias else None
            return self._product(op, x, self._own("w", number), bias)
        sums = [
            F.linear(x, self._own(n, number), self._own(f"b{n}", number) if op.bias else None)
            for n in ("uv" if op.kind == "gate" else "uvw")
        ]
        if op.kind == "gate":
            return (F.silu, F.gelu, torch.sigmoid, torch.relu)[op.how % 4](sums[0]) * sums[1]
        return torch.sigmoid(sums[0]) * sums[1] + sums[2]

    @staticmethod
    def _product(op: Op, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        spelling = SPELLINGS[op.how % len(SPELLINGS)]
        step = Step(spelling, op.size, b is not None, "none")
        if x.ndim == 2 or (spelling in ("linear", "matmul") and op.other % 2):
            return product(step, x, w, b)
        return product(step, x.reshape(-1, x.shape[-1]), w, b).reshape(*x.shape[:-1], op.size)


def normed(kind: str, x: Tensor, weight: Tensor) -> Tensor:
    """Norms over the last dimension, kept off division by nearly nothing."""
    if kind == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, weight, 0.5)
    if kind == "rms":
        return F.rms_norm(x, x.shape[-1:], weight, 0.5)
    if kind == "softmax":
        return F.softmax(x, -1)
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.5))


def in_place(kind: str, x: Tensor, p: Tensor) -> Tensor:
    """Writes to a value that is read before and after."""
    before = x * 0.5
    y = x * 1.0
    if kind == "add":
        y.add_(p)
    elif kind == "mul":
        y.mul_(torch.tanh(p)).add_(before)
    elif kind == "relu":
        y.relu_()
    elif kind == "index":
        y[..., :1] = before[..., :1]
    else:
        y.copy_(before + p)
    return y + before


def viewed(kind: str, x: Tensor) -> Tensor:
    """The same elements, or some of them, at other places."""
    width = x.shape[-1]
    if kind == "half":
        return x[..., : max(1, width // 2)]
    if kind == "strided":
        return x[..., : 2 * max(1, width // 2) : 2] if width > 1 else x
    if kind == "swap" and width > 1:
        first, second = x.split([width // 2, width - width // 2], -1)
        return torch.cat([second, first], -1)
    if kind == "unflatten" and width % 2 == 0:
        return x.unflatten(-1, (2, width // 2)).transpose(-1, -2).flatten(-2)
    return x.reshape(-1, width).view(x.shape)


def given(plan: Plan, rows: int) -> Tensor:
    """An input with so many rows; of three dimensions, two of so many."""
    generator = torch.Generator().manual_seed(plan.seed + rows)
    shape = (2, rows, plan.width) if plan.batched else (rows, plan.width)
    x = torch.randn(shape, generator=generator)
    x[..., plan.seed % plan.width] *= 8  # an outlier
    return x.to(getattr(torch, plan.dtype))
