"""Prints the kernel that makes rows of an activation and takes them to int8: whole rows at once."""

from __future__ import annotations

from fxquant.codegen.epilogue import EpilogueNode
from fxquant.codegen.pointwise import bare
from fxquant.codegen.prologue import REDUCTIONS, Prologue, is_cast, is_reduction, references
from fxquant.codegen.quantize import QuantizeSpec
from fxquant.codegen.triton.kernels import JIT, print_combine
from fxquant.codegen.triton.launch import print_type_table
from fxquant.codegen.triton.ops import PRELUDE, TritonOps
from fxquant.codegen.triton.printer import Lines, wrap_items
from fxquant.codegen.triton.quantize import HELPERS
from fxquant.codegen.triton.steps import TYPES

_TILE = 2048
_NUMBERS_OF_A_WARP = 512

_LARGEST = '''
@triton.jit
def largest(x):
    """The largest number of every row; NaN if one is."""
    odd = tl.reduce((x != x).to(tl.int32), 1, most, keep_dims=True)
    return tl.where(odd != 0, float("nan"), tl.reduce(x, 1, most, keep_dims=True))
'''


def tile(k: int) -> tuple[int, int]:
    """Rows of one program, and a power of two that is no less than their inputs."""
    inputs = max(16, 1 << (k - 1).bit_length())
    return max(1, _TILE // inputs), inputs


def warps(k: int) -> int:
    """Warps of one program: about 16 numbers of a row for every thread, and more in long rows."""
    numbers = tile(k)[0] * tile(k)[1]
    return min(16, max(4, numbers // _NUMBERS_OF_A_WARP))


def print_rows(out: Lines, spec: QuantizeSpec, prologue: Prologue) -> None:
    """The helpers, the kernel, its constants and ``run``."""
    printer = _Printer(spec, prologue)
    kernel = Lines()
    with kernel.function(f"{spec.name}_rows", printer.parameters(), _DOC, JIT):
        printer.add_body(kernel)
    body = Lines()
    body.add("", *HELPERS.splitlines())
    for helper in sorted(printer.ops.prelude):
        body.add("", *PRELUDE[helper].splitlines())
    if any("largest(" in line for line in kernel.lines()):
        body.add("", *_LARGEST.splitlines())
    body.add(*kernel.lines())
    print_combine(out, body)
    out.add(*body.lines())
    print_type_table(out, printer.types(), ["rows", *printer.strides()])
    printer.add_steps(out)
    printer.add_run(out)


_DOC = "Rows of an activation as they are made, their scales and their integers."


class _Printer:
    def __init__(self, spec: QuantizeSpec, prologue: Prologue) -> None:
        self.spec, self.prologue = spec, prologue
        self.names, self.dims = prologue.names, prologue.dims
        operands = enumerate(prologue.operands)
        self.ops = TritonOps(f"value{i}" for i, operand in operands if operand.dtype == "bool")
        self.block_m, self.block_k = tile(spec.k)
        tests = {
            "m": "m < rows" if self.block_m > 1 else "",
            "k": f"k < {spec.k}" if self.block_k > spec.k else "",
        }
        self.tests = {**tests, "mk": "inside" if all(tests.values()) else "".join(tests.values())}

    # --- names ---

    def pointers(self) -> list[str]:
        limit = ["limit"] if self.spec.has_limit else []
        return [*self.operands(), *limit, *self.outputs()]

    def operands(self) -> list[str]:
        return [f"in{number}" for number in range(len(self.prologue.operands))]

    def outputs(self) -> list[str]:
        more = [f"more{number}" for number in range(len(self.prologue.more))]
        counter = ["counter"] if self.spec.has_limit else []
        return ["q", "amax", *more, *counter]

    def strides(self) -> list[str]:
        listed = zip(self.operands(), self.prologue.operands, strict=True)
        return [f"{name}_stride_m" for name, operand in listed if operand.dims == "mk"]

    def parameters(self) -> list[str]:
        sizes = ["BLOCK_M: tl.constexpr", "BLOCK_K: tl.constexpr"]
        return [*self.pointers(), "rows", *self.strides(), *sizes]

    def types(self) -> dict[str, str]:
        read = zip(self.operands(), self.prologue.operands, strict=True)
        found = {name: operand.dtype for name, operand in read}
        found |= {name: TYPES[name] for name in self.pointers() if name in TYPES}
        for number, result in enumerate(self.prologue.more):
            found[f"more{number}"] = result.dtype
        return {name: found[name] for name in self.pointers()}

    def mask(self, dims: str, other: str = "") -> str:
        """The argument that keeps to the rows and inputs there are, or nothing."""
        test = self.tests.get(dims)
        return f", mask={test}{other}" if test else ""

    # --- the kernel ---

    def add_body(self, out: Lines) -> None:
        out.add(
            "m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]",
            "k = tl.arange(0, BLOCK_K)[None, :]",
        )
        if self.tests["mk"] == "inside":
            out.add(f"inside = ({self.tests['m']}) & ({self.tests['k']})")
        for number, operand in enumerate(self.prologue.operands):
            where = {"mk": f" + m * in{number}_stride_m + k", "k": " + k", "m": " + m"}
            pointer = f"in{number}{where.get(operand.dims, '')}"
            kind = {"float32": "", "bool": ".to(tl.int1)"}.get(operand.dtype, ".to(tl.float32)")
            mask = self.mask(operand.dims, ", other=0")
            out.add(f"value{number} = tl.load({pointer}{mask}){kind}")
        names = dict(self.names)
        names |= {f"%in{number}": f"value{number}" for number in range(len(self.operands()))}
        for number, node in enumerate(self.prologue.nodes):
            self.add_node(out, f"%{number}", node, names)
        result = names[self.prologue.result]
        if not is_cast(self.prologue.nodes[-1], self.spec.x_dtype):
            result = self.ops.convert_element_type(result, self.spec.x_dtype)
        test = self.tests["k"]
        out.add(f"x = tl.where({test}, {result}, 0.0)" if test else f"x = {bare(result)}")
        for number, more in enumerate(self.prologue.more):
            text = f"{names[more.value]}.to(tl.{more.dtype})"
            out.add(f"tl.store(more{number} + m * {self.spec.k} + k, {text}{self.mask('mk')})")
        self.add_codes(out)

    def add_node(self, out: Lines, name: str, node: EpilogueNode, names: dict[str, str]) -> None:
        if not is_reduction(node):
            out.add(f"{names[name]} = {bare(self.ops.call(node, names, names[name]))}")
            return
        (value,) = references(node)
        kind, text = REDUCTIONS[node.op], names[value]
        if self.tests["k"]:
            least = 'float("-inf")' if kind == "amax" else "0.0"
            text = f"tl.where({self.tests['k']}, {text}, {least})"
        if kind == "amax":
            out.add(f"{names[name]} = largest({text})")
            return
        total = f"tl.reduce({text}, 1, add, keep_dims=True)"
        out.add(f"{names[name]} = {total}{f' / {self.spec.k}.0' if kind == 'mean' else ''}")

    def add_codes(self, out: Lines) -> None:
        out.add("bits = tl.reduce(bits_of(x), 1, most, keep_dims=True)")
        if self.spec.scope == "token":
            out.add("peak = at_least(number_of(bits))")
        if self.spec.has_limit:
            out.add("limited = at_least(tl.load(limit))")
        if self.spec.scope == "static":
            out.add("peak = tl.where(bits < 0x7F800000, limited, number_of(bits))")
        elif self.spec.clipped:
            out.add("peak = tl.where(peak > limited, limited, peak)")
        out.add(
            f"tl.store(amax + m, peak{self.mask('m')})",
            f"tl.store(q + m * {self.spec.k} + k, to_int8(x, peak){self.mask('mk')})",
        )
        if self.spec.has_limit:
            found = "tl.abs(x) > peak"
            if self.tests["m"]:
                found = f"({found}) & ({self.tests['m']})"
            with out.block("if counter is not None:"):
                out.add(
                    f"beyond = tl.reduce(({found}).to(tl.int64), None, add)",
                    'tl.atomic_add(counter, beyond, mask=beyond > 0, sem="relaxed")',
                )

    # --- launching ---

    def add_steps(self, out: Lines) -> None:
        out.add(
            "",
            "# Step -> the kernel that does it, its constants, launch options.",
            "STEPS = {",
            '    "rows": (',
            f"        {self.spec.name}_rows,",
            f'        {{"BLOCK_M": {self.block_m}, "BLOCK_K": {self.block_k}}},',
            f'        {{"num_warps": {warps(self.spec.k)}}},',
            "    ),",
            "}",
            "",
            "",
            "def as_rows(x):",
            '    """An activation as one matrix, its inputs side by side."""',
            f"    x = x.reshape(math.prod(x.shape[:-1]), {self.spec.k})",
            "    return x if x.stride(-1) == 1 else x.contiguous()",
        )

    def add_run(self, out: Lines) -> None:
        operands, prologue = self.operands(), self.prologue
        counter = ", counter=None" if self.spec.has_limit else ""
        first = [operand.dims for operand in prologue.operands].index("mk")
        more = [f"more{number}" for number in range(len(prologue.more))]
        out.add("", "")
        with out.block(f"def run(operands, extra{counter}):"):
            out.add('"""Codes, scales and further results: int8 [.., k], float32 [..], [.., k]."""')
            out.add(f"shape, device = operands[{first}].shape, operands[{first}].device")
            out.add(f"{', '.join(operands)}{',' * (len(operands) == 1)} = operands")
            for name, operand in zip(operands, prologue.operands, strict=True):
                rows = operand.dims == "mk"
                out.add(f"{name} = as_rows({name})" if rows else f"{name} = {name}.contiguous()")
            out.add("q = torch.empty(shape, dtype=torch.int8, device=device)")
            out.add("amax = torch.empty(shape[:-1], dtype=torch.float32, device=device)")
            for name, result in zip(more, prologue.more, strict=True):
                out.add(f"{name} = torch.empty(shape, dtype=torch.{result.dtype}, device=device)")
            if self.spec.has_limit:
                out.add("limit = extra[0].contiguous()")
            with out.block("if rows := amax.numel():"):
                out.add('kernel, tile, options = STEPS["rows"]')
                with out.block("with torch.cuda.device_of(q):"):
                    strides = [
                        f"{name.removesuffix('_stride_m')}.stride(0)" for name in self.strides()
                    ]
                    args = [*self.pointers(), "rows", *strides, "**tile", "**options"]
                    out.add('kernel[-(-rows // tile["BLOCK_M"]),](')
                    out.add(*wrap_items(args, 4, 88), ")")
            out.add(f"return [{', '.join(['q', 'amax', *more])}]")
