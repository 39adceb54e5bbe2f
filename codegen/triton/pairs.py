"""Prints products of 4-bit codes with one to four rows: levels are looked up two at a time.

`words` takes five instructions a weight, and waits for copies, products and barriers in every step.
Few rows need no matrix unit: here a thread reads 16 bytes of a row of the weight, looks each of
them up in a table of 256 pairs of float32 levels, and multiplies. That is a shift, an insertion
and a look-up for two weights, and for each a multiply-add a row: counted in machine code for sm_90,
the loop has 3.5 to 3.9 instructions a weight for one row, 5 for two and 8 for four.

The table lies in shared memory 16 times, side by side: each of the 16 threads that a load of 64
bits serves at a time has a copy in banks of its own, whatever it looks up. That is 32 KB, which
assembly sets aside and fills, for Triton has no name for it. Look-ups take a value that is made
behind the barrier, so none of them goes before it.

A tile is as long as the warps of a program are side by side. All of its outputs are the same
thread's, which takes the activation apart once for them. Scales are multiplied with the sums of 32
inputs. The next step's codes and codes of scales are asked for before this one's work: a barrier
keeps them there, for the assembler puts loads as late as it can. What a scale's code stands for is
read when it is needed, or every step would wait for one load after another.
"""

from __future__ import annotations

import torch

from fxquant.codegen.indexing import WeightIndex
from fxquant.codegen.spec import KernelSpec
from fxquant.codegen.triton import decode
from fxquant.codegen.triton.kernels import (
    COMBINE,
    JIT,
    marks,
    print_start,
    print_store,
    round_x,
    with_constants,
)
from fxquant.codegen.triton.plan import Plan
from fxquant.codegen.triton.printer import Lines, call, wrap_items
from fxquant.codegen.triton.tiles import CODES_PER_WORD, PAIR_INPUTS
from fxquant.codegen.triton.words import (
    LEVEL_PAIRS,
    WordDecode,
    book_of,
    product_parameters,
    word_index,
)

_FUNCTIONS = '''
@triton.jit
def pair_table(level_pairs):
    """Where in shared memory the levels of 256 pairs of codes are, 16 times side by side."""
    table = tl.inline_asm_elementwise(
        "{ .shared .align 16 .b8 pairs[32768]; mov.u32 $0, pairs; }",
        "=r",
        [],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
    byte, two = tl.arange(0, 256)[:, None], tl.arange(0, 8)[None, :]
    pair = tl.load(level_pairs.to(tl.pointer_type(tl.int64)) + tl.broadcast_to(byte, (256, 8)))
    tl.inline_asm_elementwise(
        "st.shared.v2.b64 [$1], {$2, $2}; mov.u32 $0, 0;",
        "=r,r,l",
        [table + byte * 128 + two * 16, pair],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
    tl.debug_barrier()
    # What is read takes this value, so it is read behind the barrier.
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [table], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def levels_of(word, copy, table):
    """The levels of a word's codes, from a copy of the table."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 a, b, c, d;
        shl.b32 a, $8, 7;
        shr.u32 b, $8, 1;
        shr.u32 c, $8, 9;
        shr.u32 d, $8, 17;
        lop3.b32 a, a, 0x7f80, $9, 0xea;
        lop3.b32 b, b, 0x7f80, $9, 0xea;
        lop3.b32 c, c, 0x7f80, $9, 0xea;
        lop3.b32 d, d, 0x7f80, $9, 0xea;
        add.u32 a, a, $10;
        add.u32 b, b, $10;
        add.u32 c, c, $10;
        add.u32 d, d, $10;
        ld.shared.v2.f32 {$0, $1}, [a];
        ld.shared.v2.f32 {$2, $3}, [b];
        ld.shared.v2.f32 {$4, $5}, [c];
        ld.shared.v2.f32 {$6, $7}, [d];
        }
        """,
        "=f,=f,=f,=f,=f,=f,=f,=f,r,r,r",
        [word, copy, table],
        dtype=(tl.float32,) * 8,
        is_pure=True,
        pack=1,
    )


@triton.jit
def inputs_of(x, BLOCK_M: tl.constexpr, THREADS: tl.constexpr):
    """Eight inputs of each row and thread, one by one."""
    even, odd = tl.split(x.to(tl.float32).reshape(BLOCK_M, 1, THREADS, 2, 2, 2))
    x04, x26 = tl.split(even)
    x15, x37 = tl.split(odd)
    x0, x4 = tl.split(x04)
    x1, x5 = tl.split(x15)
    x2, x6 = tl.split(x26)
    x3, x7 = tl.split(x37)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def words_of(word, BLOCK_N: tl.constexpr, THREADS: tl.constexpr):
    """Four words of each output and thread, one by one."""
    even, odd = tl.split(word.reshape(1, BLOCK_N, THREADS, 2, 2))
    word0, word2 = tl.split(even)
    word1, word3 = tl.split(odd)
    return word0, word1, word2, word3


@triton.jit
def add_products(sums, word, x, copy, table):
    """Adds the products of a word's eight weights."""
    w0, w1, w2, w3, w4, w5, w6, w7 = levels_of(word, copy, table)
    x0, x1, x2, x3, x4, x5, x6, x7 = x
    sums += w0 * x0
    sums += w1 * x1
    sums += w2 * x2
    sums += w3 * x3
    sums += w4 * x4
    sums += w5 * x5
    sums += w6 * x6
    return sums + w7 * x7
'''

_WORDS = PAIR_INPUTS // CODES_PER_WORD


def print_constants(out: Lines, spec: KernelSpec) -> None:
    """The pairs of levels, for a table on the device."""
    dtype = getattr(torch, spec.compute_dtype)
    book = torch.tensor(book_of(spec.weight.encoding), dtype=dtype).tolist()
    out.add("", f"# Levels in {spec.compute_dtype}; for every byte those of its two codes.")
    out.add("LEVELS = (", *wrap_items(map(decode.number, book), 4), ")")
    out.add(f"{LEVEL_PAIRS.upper()} = [")
    out.add("    x for first in LEVELS for second in LEVELS for x in (first, second)", "]")


def _of(number: str) -> str:
    """The first input of a thread, by its number among those of several rows."""
    return f"{number} % THREADS * {PAIR_INPUTS}"


class PairDecode(WordDecode):
    """Scales in two steps, where they are encoded: ``scale_code_of``, and ``scale_from`` that."""

    def print(self) -> None:
        """The functions, unless ``scale_of`` does all at once."""
        if self.plan.form.scaling != "tile" or self.encoding.scale is None:
            return
        doc = "The codes of scales of outputs n at inputs k0 .."
        with self.out.function("scale_code_of", self._place(["scales"]), doc):
            mask, *_ = self._print_block()
            self.out.add(f"return tl.load(scales + block{mask}).to(tl.int32)")
        doc = "The scales of outputs n at inputs k0 .., from their codes."
        with self.out.function("scale_from", ["scale_code", *self._scale_arguments()[1:]], doc):
            nested, mask = self._print_place(self.index.nested)
            decode.print_encoded_scale(self.out, self.encoding, nested, mask)
            self.out.add("return scale")

    def call_ahead(self, mark: str) -> str:
        """What is read ahead: scales, or their codes."""
        if self.encoding.scale is None:
            return self.call_scale(mark, "run_n", "at")
        return call("scale_code_of", [f"scales{mark}", "run_n", "at"])

    def call_late(self, mark: str) -> str:
        """The scales, from codes that were read ahead."""
        places = {"n": "run_n", "k0": "at"}
        taken = (places.get(name, name) for name in self._scale_arguments(mark)[1:])
        return call("scale_from", [f"scale{mark}", *taken])


def print_gemv(out: Lines, spec: KernelSpec, index: WeightIndex, plan: Plan) -> None:
    """The kernel ``gemv``; ``scale_of`` comes with `words`."""
    tiles = PairDecode(out, spec.weight, index, plan, spec.compute_dtype)
    is_scaled, k = plan.form.scaling == "tile", spec.weight.k
    is_whole = all(k % tile.k == 0 for tile in plan.tiles if tile.kernel == "gemv")
    out.add("", *COMBINE["add"].splitlines(), "", *_FUNCTIONS.splitlines())
    tiles.print()
    doc = (
        "Few rows: a thread multiplies 32 inputs of all outputs at a time, acc is [rows, outputs]."
    )
    taken = with_constants(product_parameters(spec, plan))
    with out.function(f"{spec.name}_gemv", taken, doc, JIT):
        print_start(out, spec)
        first_n = "n0.to(tl.int64)" if decode.is_wide(spec.weight) else "n0"
        out.add(
            f"end = tl.minimum(first_k + SHARE, {k})",
            f"n = {first_n} + tl.arange(0, BLOCK_N)",
            f"THREADS: tl.constexpr = BLOCK_K // {PAIR_INPUTS}",
            "thread = tl.arange(0, THREADS)",
            "copy = (thread % 16 * 8)[None, None, :]",
            "# In one piece, so that neighbours of a row go to neighbouring threads.",
            f"j = tl.arange(0, {_WORDS} * THREADS)[None, :]",
            "row = tl.arange(0, BLOCK_M * THREADS)[:, None]",
            f"x_m, x_k = tl.program_id(0).to(tl.int64) * BLOCK_M + row // THREADS, {_of('row')}",
            "inputs = x + x_m * x_stride_m + (x_k + tl.arange(0, 8)[None, :])",
            *(
                f"sums{mark} = tl.full((BLOCK_M, BLOCK_N, THREADS), 0.0, tl.float32)"
                for mark in marks(spec)
            ),
        )
        if is_scaled:
            out.add(
                "run = tl.arange(0, BLOCK_N * THREADS)",
                f"run_n, run_k = {first_n} + run // THREADS, {_of('run')}",
            )
        _print_loads(spec, tiles, "first_k", "")
        out.add(f"table = pair_table({LEVEL_PAIRS})")
        with out.block("for k0 in range(first_k, end, BLOCK_K):"):
            out.add("# load", "next_k0 = k0 + BLOCK_K")
            _print_loads(spec, tiles, "next_k0", "next_")
            out.add("tl.debug_barrier()", "wanted = (x_m < rows) & (k0 + x_k < end)")
            for word in range(_WORDS):
                where = f"inputs + (k0 + {8 * word})" if word else "inputs + k0"
                loaded = f"tl.load({where}, mask=wanted, other=0.0){round_x(spec)}"
                out.add(f"x{word} = inputs_of({loaded}, BLOCK_M, THREADS)")
            for mark in marks(spec):
                _print_products(tiles, mark, is_whole=is_whole)
        out.add(*(f"acc{mark} = tl.reduce(sums{mark}, 2, add)" for mark in marks(spec)))
        out.add("m, n = m[:, None], n[None, :]")
        if not is_scaled:
            out.add("# scale")
            out.add(*(f"acc{mark} *= {tiles.call_scale(mark)}" for mark in marks(spec)))
        out.add("# epilogue")
        print_store(out, spec, plan)


def _print_loads(spec: KernelSpec, tiles: PairDecode, start: str, prefix: str) -> None:
    """Codes, and where they change inside of a row scales, at the inputs from `start` on."""
    out = tiles.out
    # Of a thread, so that Triton sees that all or none of its 16 bytes are loaded.
    tests = [f"({start} + j // {_WORDS} * {PAIR_INPUTS} < end)"]
    if not tiles.plan.whole_n:
        tests.append(f"(n < {spec.weight.n})[:, None]")
    where = word_index(tiles.index, "n[:, None]", f"({start} // {CODES_PER_WORD} + j)")
    for mark in marks(spec):
        out.add(
            f"{prefix}word{mark} = tl.load(",
            f"    codes{mark}.to(tl.pointer_type(tl.int32)) + ({where}),",
            f"    mask={' & '.join(tests)},",
            "    other=0,",
            ")",
        )
    if tiles.plan.form.scaling == "tile":
        # Beyond the end some scale is read, and multiplied with nothing.
        out.add(f"at = tl.minimum({start} + run_k, {spec.weight.k - PAIR_INPUTS})")
        out.add(*(f"{prefix}scale{mark} = {tiles.call_ahead(mark)}" for mark in marks(spec)))


def _print_products(tiles: PairDecode, mark: str, *, is_whole: bool) -> None:
    """One step's products with one weight."""
    out, is_scaled = tiles.out, tiles.plan.form.scaling == "tile"
    out.add("# decode and multiply")
    names = [f"part{number}" for number in range(_WORDS)]
    out.add(f"{', '.join(names)} = words_of(word{mark}, BLOCK_N, THREADS)")
    target = "products" if is_scaled else f"sums{mark}"
    if is_scaled:
        out.add("products = tl.full((BLOCK_M, BLOCK_N, THREADS), 0.0, tl.float32)")
    for number, name in enumerate(names):
        out.add(f"{target} = add_products({target}, {name}, x{number}, copy, table)")
    if is_scaled:
        if tiles.encoding.scale is not None:
            out.add(f"at = tl.minimum(k0 + run_k, {tiles.weight.k - PAIR_INPUTS})")
            out.add(f"scale{mark} = {tiles.call_late(mark)}")
        out.add(f"scaled = products * scale{mark}.reshape(1, BLOCK_N, THREADS)")
        inside = f"(k0 + thread * {PAIR_INPUTS} < end)[None, None, :]"
        added = "scaled" if is_whole else f"tl.where({inside}, scaled, 0.0)"
        out.add(f"sums{mark} += {added}", f"scale{mark} = next_scale{mark}")
    out.add(f"word{mark} = next_word{mark}")
