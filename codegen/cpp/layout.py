"""The repacked weight: what it holds, where, and the function that makes it."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import NamedTuple

from fxquant.codegen.cpp.decode import float_table, table
from fxquant.codegen.cpp.plan import TILE, Plan
from fxquant.formats import levels
from fxquant.formats.blocks import block_grid


class Segment(NamedTuple):
    """An array in a repacked weight.

    Attributes:
        name: What it holds.
        ctype: Of its elements.
        sizes: Constants of the printed file whose product is how many they are.
        elements: That product.
    """

    name: str
    ctype: str
    sizes: tuple[str, ...]
    elements: int


def segments(plan: Plan) -> list[Segment]:
    """The arrays of a repacked weight, in order."""
    outliers, encoding = plan.spec.outliers, plan.encoding
    counted = outliers is not None and outliers.threshold is not None
    tiles = ("EXPERTS" if plan.spec.grouped else "E", "N_TILES")
    # Calls, and the outliers found in all of them.
    out: list[tuple[str, str, tuple[str, ...]]] = []
    if counted:
        out.append(("counts", "int64_t", ("2",)))
    out.append(("codes", "uint32_t", (*tiles, "GROUPS", "TILE")))
    scales: tuple[str, ...] = (*tiles, "BLOCKS", "TILE") if plan.is_regular else ("SCALES",)
    if plan.keeps_scale_codes:
        assert encoding.scale is not None
        out += [
            ("scale_codes", "uint8_t", scales),
            ("changes", "uint64_t", (*tiles, "BLOCKS")),
            ("first_nested", "float", (*tiles, "TILE")),
            ("nested", "float", ("NESTED",)),
        ]
        out += [("offset", "float", ())] if encoding.scale.offset else []
    else:
        out.append(("scales", "float", scales))
    out += [("zeros", "float", scales)] if encoding.zero_point else []
    values = _sizes(plan)
    return [Segment(*one, math.prod(values[size] for size in one[2])) for one in out]


def _sizes(plan: Plan) -> dict[str, int]:
    """The constants that counts are made of."""
    experts = plan.spec.weight.sizes[0]
    return {
        "2": 2,
        "E": experts,
        "EXPERTS": experts,
        "N_TILES": plan.n_tiles,
        "GROUPS": plan.k_padded // plan.per_dword,
        "BLOCKS": plan.blocks,
        "TILE": TILE,
        "SCALES": scales_count(plan),
        "NESTED": nested_count(plan),
    }


def scales_count(plan: Plan) -> int:
    """How many scales the weight has."""
    return block_grid(plan.encoding, plan.spec.weight.shape).count


def nested_count(plan: Plan) -> int:
    """How many scales the scales have."""
    inner = plan.encoding.scale
    return 0 if inner is None else block_grid(inner, (scales_count(plan),)).count


def form(plan: Plan) -> Hashable:
    """What the repacked weight depends on: kernels of one form read each other's."""
    outliers, isa = plan.spec.outliers, plan.isa.vectors
    # Outliers are counted in it, those of one threshold.
    counted = outliers.threshold if outliers is not None else None
    return (plan.spec.weight, plan.path, plan.is_int8, isa, counted)


_BYTES = {"uint8_t": 1, "uint32_t": 4, "float": 4, "uint64_t": 8, "int64_t": 8}


def _size(one: Segment) -> int:
    """Bytes of an array, up to the next one's start."""
    return math.ceil(one.elements * _BYTES[one.ctype] / 64) * 64


def prepared_bytes(plan: Plan) -> int:
    """Bytes of the repacked weight."""
    return sum(map(_size, segments(plan)))


def segment_of_codes(plan: Plan) -> tuple[int, int]:
    """Where the codes start in the repacked weight, in bytes, and how many dwords they are."""
    start = 0
    for one in segments(plan):
        if one.name == "codes":
            return start, one.elements
        start += _size(one)
    raise AssertionError("every repacked weight has codes")


def weight(plan: Plan) -> str:
    """The text of ``struct Weight``: where each array of the repacked weight starts."""
    starts, members, start = [], [], "0"
    for name, ctype, sizes, _ in segments(plan):
        place = f"{name.upper()}_AT"
        factors = [str(_BYTES[ctype]), *sizes] if _BYTES[ctype] > 1 or not sizes else sizes
        starts.append(f"constexpr int64_t {place} = {start};")
        start = f"{place} + whole_lines({' * '.join(factors)})"
        members.append(f"  {ctype}* {name}() const {{ return at<{ctype}>({place}); }}")
    text = _WEIGHT.replace("@STARTS@", "\n".join(starts)).replace("@END@", start)
    return text.replace("@MEMBERS@", "\n".join(members))


def prepare(plan: Plan) -> str:
    """The text of ``fxquant_prepare``."""
    text = _PREPARE
    for name, value in {
        "@STORED@": _stored_code(plan),
        "@LUT@": _lookup_table(plan),
        "@SCALE@": _stored_scale(plan),
        "@SCALES@": _fill_scales(plan),
        "@COUNTS@": _NO_COUNTS if segments(plan)[0].name == "counts" else "",
    }.items():
        text = text.replace(name, value)
    return plan.placed(text)


def _lookup_table(plan: Plan) -> str:
    """What replaces the codes of an 8-bit weight that is multiplied as it is stored."""
    if plan.path != "int8" or plan.encoding.bits != 8:
        return ""
    values = [str(value + plan.byte_bias) for value in plan.integers]
    return table("uint8_t", "STORED_AS", values) + "\n"


def _stored_code(plan: Plan) -> str:
    bits = plan.encoding.bits
    if bits == 8:
        code = "codes[element]"
        return f"STORED_AS[{code}]" if plan.path == "int8" else code
    per_byte = 8 // bits
    place = f"{8 - bits} - {bits} * (element % {per_byte})"
    return f"codes[element / {per_byte}] >> ({place}) & {2**bits - 1}"


def _stored_scale(plan: Plan) -> str:
    """A function that decodes one scale of the stored form, where floats are kept."""
    if plan.keeps_scale_codes:
        return ""
    inner = plan.encoding.scale
    if inner is None:
        body = "static_cast<const float*>(parts[1])[block]"
        return _STORED_SCALE.replace("@TABLE@", "").replace("@BODY@", f"return {body};")
    book = levels(inner)
    assert book is not None, "scales are encoded by a codebook"
    where = "0" if inner.block[0] == -1 else f"block / {inner.block[0]}"
    add = " + *static_cast<const float*>(parts[3])" if inner.offset else ""
    body = (
        "const uint8_t code = static_cast<const uint8_t*>(parts[1])[block];\n"
        f"  const float nested = static_cast<const float*>(parts[2])[{where}];\n"
        f"  return SCALE_LEVELS[code] * nested{add};"
    )
    text = _STORED_SCALE.replace("@TABLE@", float_table("SCALE_LEVELS", book) + "\n")
    return text.replace("@BODY@", body)


def _fill_scales(plan: Plan) -> str:
    encoding = plan.encoding
    zeros = f"static_cast<const uint8_t*>(parts[{len(encoding.parts) - 1}])"
    if not plan.is_regular:
        lines = ["  for (int64_t block = 0; block < SCALES; ++block) {"]
        lines.append("  w.scales()[block] = stored_scale(parts, block);")
        if encoding.zero_point:
            lines.append(f"  w.zeros()[block] = {zeros}[block];")
        return "\n  ".join([*lines, "}"])
    if not plan.keeps_scale_codes:
        put = ["w.scales()[at + row] = inside ? stored_scale(parts, block) : 0.0f;"]
    else:
        # The vector lookup leaves its results in this order; without one it is the plain one.
        row = "row"
        if plan.isa.looks_up_bytes:
            row = "(row / 4 % 4 * 16 + row / 16 * 4 + row % 4)"
        put = [
            f"w.scale_codes()[at + {row}] =",
            "    inside ? static_cast<const uint8_t*>(parts[1])[block] : 0;",
        ]
    if encoding.zero_point:
        put.append(f"w.zeros()[at + row] = inside ? {zeros}[block] : 0.0f;")
    text = _FILL.replace("@PUT@", "\n          ".join(put))
    return text + (_nested(plan) if plan.keeps_scale_codes else "")


def _nested(plan: Plan) -> str:
    inner = plan.encoding.scale
    assert inner is not None
    text = _NESTED
    if inner.offset:
        text += "\n  w.offset()[0] = *static_cast<const float*>(parts[3]);"
    return text


_WEIGHT = """\
// Where the arrays of a repacked weight start, in bytes: each in a cache line of its own.
constexpr int64_t whole_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }
@STARTS@
constexpr int64_t PREPARED_BYTES = @END@;

struct Weight {
  unsigned char* base;

  template <typename T> T* at(int64_t start) const { return reinterpret_cast<T*>(base + start); }
@MEMBERS@
};
"""

_STORED_SCALE = """\
@TABLE@float stored_scale(const void* const* parts, int64_t block) {
  @BODY@
}
"""

_FILL = """\
#pragma omp parallel for num_threads(threads)
  for (int64_t tile = 0; tile < @ALL_TILES@; ++tile) {
    const int64_t e = tile / N_TILES, n0 = tile % N_TILES * TILE;
    for (int64_t k = 0; k < BLOCKS; ++k) {  // counts blocks
      const int64_t at = (tile * BLOCKS + k) * TILE;
      for (int64_t row = 0; row < TILE; ++row) {
        const int64_t n = n0 + row;
        const bool inside = n < N && k * BLOCK < K;
        const int64_t block = inside ? scale_of(e, n, k) : 0;
        @PUT@
      }
    }
  }"""

_NESTED = """
  std::memcpy(w.nested(), parts[2], NESTED * sizeof(float));
  for (int64_t tile = 0; tile < @ALL_TILES@; ++tile) {
    const int64_t e = tile / N_TILES, n0 = tile % N_TILES * TILE;
    for (int64_t row = 0; row < TILE; ++row) {
      const int64_t n = std::min(n0 + row, N - 1);
      w.first_nested()[tile * TILE + row] = w.nested()[nested_of(e, n, 0)];
    }
    for (int64_t k = 0; k < BLOCKS; ++k) {  // counts blocks
      uint64_t changes = 0;
      for (int64_t row = 0; k && k * BLOCK < K && row < TILE && n0 + row < N; ++row) {
        const int64_t n = n0 + row;
        const bool moved = nested_of(e, n, k) != nested_of(e, n, k - 1);
        changes |= uint64_t(moved) << row;
      }
      w.changes()[tile * BLOCKS + k] = changes;
    }
  }"""

_NO_COUNTS = "  w.counts()[0] = w.counts()[1] = 0;\n"

_PREPARE = """\
@LUT@@SCALE@
extern "C" int64_t fxquant_prepared_bytes(void) { return PREPARED_BYTES; }

// Repacks a stored weight: tiles of 64 outputs, groups of PER_DWORD inputs.
extern "C" void fxquant_prepare(const void* const* parts, void* prepared, int threads) {
  const Weight w{static_cast<unsigned char*>(prepared)};
  const uint8_t* codes = static_cast<const uint8_t*>(parts[0]);
#pragma omp parallel for num_threads(threads)
  for (int64_t tile = 0; tile < @ALL_TILES@; ++tile) {
    const int64_t e = tile / N_TILES, n0 = tile % N_TILES * TILE;
    for (int64_t group = 0; group < GROUPS; ++group) {
      for (int64_t row = 0; row < TILE; ++row) {
        uint32_t word = 0;
        for (int place = 0; place < PER_DWORD; ++place) {
          const int64_t n = n0 + row, k = group * PER_DWORD + PLACES[place];
          if (n >= N || k >= K) continue;
          const int64_t element = element_of(e, n, k);
          word |= uint32_t(@STORED@) << (BITS * place);
        }
        w.codes()[(tile * GROUPS + group) * TILE + row] = word;
      }
    }
  }
@COUNTS@@SCALES@
}
"""
