"""Codes to the operands of products: what a dword holds, looked up in registers.

`value` gives the float32 level of one place in every dword; `operand` what `dot` multiplies, its
levels rounded as the product takes them. Tables are loaded from ``LEVELS`` and ``OPERAND_LEVELS``,
or byte by byte from ``BYTE0`` to ``BYTE3``.
"""

from __future__ import annotations

import struct
import textwrap
from collections.abc import Sequence

from fxquant.codegen.cpp.ops import constant
from fxquant.codegen.cpp.plan import Plan
from fxquant.codegen.pointwise import bare


def decode(plan: Plan) -> str:
    """The text of ``struct Decoder``, and of its tables."""
    if plan.joins_bytes:
        return "\n".join([*_byte_tables(plan), *_struct(plan)])
    parts = [float_table("LEVELS", _widened(list(plan.factors)))]
    if plan.path == "bf16" and plan.encoding.bits < 8:
        words = _widened([_bfloat16(level) for level in plan.levels], 32)
        parts.append(table("uint16_t", "OPERAND_LEVELS", [f"0x{word:04x}" for word in words]))
    for number, part in enumerate(plan.level_thirds if plan.has_thirds else ()):
        words = _widened([_bfloat16(level) for level in part], 32)
        parts.append(table("uint16_t", f"PART{number}", [f"0x{word:04x}" for word in words]))
    if plan.path == "int8" and plan.encoding.bits < 8:
        values = _widened([integer + plan.byte_bias for integer in plan.integers], 64)
        parts.append(table("uint8_t", "OPERAND_LEVELS", [str(value) for value in values]))
    if plan.path == "int8" or (plan.encoding.is_uniform and plan.encoding.bits == 8):
        parts = parts[1:]
    return "\n".join([*parts, *_struct(plan)])


def _widened(values: list | tuple, entries: int = 16) -> list:
    """A table repeated until it fills the permute's register: no index needs masking."""
    return list(values) * max(1, entries // len(values))


def table(ctype: str, name: str, values: list[str]) -> str:
    """A table of constants."""
    lines, line = [], "   "
    for value in values:
        if len(line) + len(value) + 2 > 100:
            lines.append(line)
            line = "   "
        line += f" {value},"
    head = f"alignas(64) constexpr {ctype} {name}[{len(values)}] = {{"
    return "\n".join([head, *lines, line, "};"])


def float_table(name: str, values: Sequence[float]) -> str:
    """A table of float32 constants."""
    return table("float", name, [bare(constant(value)) for value in values])


def _bits(value: float) -> int:
    """The bits of a float32."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    return int(bits)


def _bfloat16(value: float) -> int:
    """The bits of a number rounded to bfloat16, ties to even."""
    bits = _bits(value)
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def _byte_tables(plan: Plan) -> list[str]:
    """Floats byte by byte, the lowest first: four of them, or those of bfloat16."""
    half = plan.has_half_factors
    words = _widened([_bfloat16(f) << 16 if half else _bits(f) for f in plan.factors])
    named = f"Levels: {', '.join(f'{factor:.6g}' for factor in plan.factors)}."
    lines = [f"// {line}" for line in textwrap.wrap(named, 97)]
    for byte in _looked_up(plan):
        values = [f"0x{word >> 8 * byte & 255:02x}" for word in words]
        lines.append(table("uint8_t", f"BYTE{byte}", values))
    return lines


def _looked_up(plan: Plan) -> tuple[int, ...]:
    """Which bytes of a float are looked up."""
    return (2, 3) if plan.has_half_factors else (0, 1, 2, 3)


def _struct(plan: Plan) -> list[str]:
    lines = ["struct Decoder {"]
    lines += [f"  {line}" for line in _value(plan)]
    lines += [f"  {line}" for line in _operand(plan)]
    lines += [f"  {line}" for line in _thirds(plan)]
    return [*lines, "};", ""]


def _value(plan: Plan) -> list[str]:
    """``value(codes, place)``: float32 levels of a place."""
    bits, isa = plan.encoding.bits, plan.isa.vectors
    if plan.path == "int8":
        return []
    head = f"INLINE vf value(vi codes, int place) const {{  // {bits}-bit place to float32"
    if bits == 8 and plan.encoding.is_uniform:
        taken = "plain_byte" if plan.encoding.zero_point else "sign_byte"
        return [head, f"  return to_float({taken}(codes, 8 * place));", "}"]
    if bits == 8:
        return [head, f"  {_GATHER[isa]}", "}"]
    if plan.joins_bytes:
        return _value_of_bytes(plan)
    return [*_LOOKUP[isa](bits)[0], head, *_LOOKUP[isa](bits)[1], "}"]


_GATHER = {
    "avx512": "return _mm512_i32gather_ps(plain_byte(codes, 8 * place), LEVELS, 4);",
    "avx2": "return _mm256_i32gather_ps(LEVELS, plain_byte(codes, 8 * place), 4);",
    "portable": (
        "vf out;\n"
        "    for (int i = 0; i < LANES; ++i) out[i] = LEVELS[codes[i] >> (8 * place) & 255u];\n"
        "    return out;"
    ),
}


def _lookup_avx512(bits: int) -> tuple[list[str], list[str]]:
    return (
        ["vf levels = load(LEVELS);"],
        [f"  return _mm512_permutexvar_ps(shift_right(codes, {bits} * place), levels);"],
    )


def _value_of_bytes(plan: Plan) -> list[str]:
    """``value(codes, input)``: a level put together of its bytes.

    Written for one input of a group; what several share the compiler makes once.
    """
    bits, looked_up = plan.encoding.bits, _looked_up(plan)
    tables = ", ".join(f"byte{byte} = both_lanes(BYTE{byte})" for byte in looked_up)
    found = [f"  const vi b{b} = _mm256_shuffle_epi8(byte{b}, index);" for b in looked_up]
    half, shift = len(looked_up) == 2, f"{bits} * (input / 4)"
    return [
        f"vi {tables};",
        f"vi order = both_lanes({'PAIRS' if half else 'TRANSPOSED'});",
        "// One look-up of a byte serves 32 codes: those of four inputs.",
        "INLINE vf value(vi codes, int input) const {  // of a group, to float32",
        f"  const vi code = shift_right(_mm256_shuffle_epi8(codes, order), {shift});",
        "  const vi index = _mm256_and_si256(code, _mm256_set1_epi8(15));",
        *found,
        *(_OF_TWO_BYTES if half else _OF_FOUR_BYTES),
        "}",
    ]


_OF_TWO_BYTES = (
    "  const bool first = input % 4 < 2;",
    "  const vi pair = first ? _mm256_unpacklo_epi8(b2, b3) : _mm256_unpackhi_epi8(b2, b3);",
    "  const vi upper = _mm256_set1_epi32(int(0xffff0000u));",
    "  const vi level = input % 2 ? _mm256_and_si256(pair, upper) : _mm256_slli_epi32(pair, 16);",
    "  return _mm256_castsi256_ps(level);",
)
_OF_FOUR_BYTES = (
    "  const bool first = input % 4 < 2;",
    "  const vi low = first ? _mm256_unpacklo_epi8(b0, b1) : _mm256_unpackhi_epi8(b0, b1);",
    "  const vi high = first ? _mm256_unpacklo_epi8(b2, b3) : _mm256_unpackhi_epi8(b2, b3);",
    "  return _mm256_castsi256_ps(input % 2 ? _mm256_unpackhi_epi16(low, high)",
    "                                       : _mm256_unpacklo_epi16(low, high));",
)


def _lookup_portable(bits: int) -> tuple[list[str], list[str]]:
    mask = 2**bits - 1
    return (
        [],
        [
            "  vf out;",
            "  for (int i = 0; i < LANES; ++i)",
            f"    out[i] = LEVELS[codes[i] >> ({bits} * place) & {mask}u];",
            "  return out;",
        ],
    )


_LOOKUP = {"avx512": _lookup_avx512, "portable": _lookup_portable}


def _operand(plan: Plan) -> list[str]:
    """``operand(codes, step)``: what one instruction multiplies."""
    bits = plan.encoding.bits
    if plan.path == "f32":
        head = "INLINE vf operand(vi codes, int step) const {"
        return [head, "  return value(codes, step);", "}"]
    head = "INLINE vi operand(vi codes, int step) const {"
    if plan.path == "int8":
        return _bytes(plan, head)
    if bits == 8:
        whole = plan.encoding.is_uniform
        return [head, *(_PAIR_OF_WHOLE if whole else _PAIR_OF_FLOATS), "}"]
    taken = f"shift_right(codes, {bits} * step)"
    return [
        "vi operands = load(reinterpret_cast<const uint32_t*>(OPERAND_LEVELS));",
        head + "  // both halves at once",
        f"  return _mm512_permutexvar_epi16({taken}, operands);",
        "}",
    ]


def _thirds(plan: Plan) -> list[str]:
    """``part0(codes, step)`` ..: the parts of levels that stand half a dword apart."""
    lines = []
    for number in range(len(plan.level_thirds) if plan.has_thirds else 0):
        lines += [
            f"vi words{number} = load(reinterpret_cast<const uint32_t*>(PART{number}));",
            f"INLINE vi part{number}(vi codes, int step) const {{  // both halves at once",
            f"  const vi index = shift_right(codes, {plan.encoding.bits} * step);",
            f"  return _mm512_permutexvar_epi16(index, words{number});",
            "}",
        ]
    return lines


_PAIR_OF_FLOATS = ("  return pair(value(codes, step), value(codes, step + 2));",)
_PAIR_OF_WHOLE = (
    # Whole numbers up to 256 are bfloat16 when cut off.
    "  const vi low = _mm512_castps_si512(value(codes, step));",
    "  const vi high = _mm512_castps_si512(value(codes, step + 2));",
    "  const vi upper = _mm512_set1_epi32(int(0xffff0000u));",
    "  return _mm512_ternarylogic_epi32(upper, high, shift_right(low, 16), 0xea);  // a & b | c",
)


def _bytes(plan: Plan, head: str) -> list[str]:
    bits, isa = plan.encoding.bits, plan.isa.vectors
    if bits == 8:
        return [head, "  return codes;", "}"]
    mask = 2**bits - 1
    if isa == "portable":
        return [
            head,
            "  vi out;",
            "  for (int i = 0; i < LANES; ++i) {",
            "    uint8_t bytes[4];",
            f"    const uint32_t index = codes[i] >> ({bits} * step);",
            "    for (int byte = 0; byte < 4; ++byte)",
            f"      bytes[byte] = OPERAND_LEVELS[index >> (8 * byte) & {mask}u];",
            "    uint32_t word;",
            "    std::memcpy(&word, bytes, 4);",
            "    out[i] = word;",
            "  }",
            "  return out;",
            "}",
        ]
    load = "vi operands = load(reinterpret_cast<const uint32_t*>(OPERAND_LEVELS));"
    taken = f"shift_right(codes, {bits} * step)"
    if plan.isa.looks_up_bytes:
        found = f"_mm512_permutexvar_epi8({taken}, operands)"
    else:
        kind, whole = ("_mm512", "si512") if isa == "avx512" else ("_mm256", "si256")
        low = f"{kind}_and_{whole}({taken}, {kind}_set1_epi8({mask}))"
        found = f"{kind}_shuffle_epi8(\n        operands, {low})"
    return [load, head + "  // four bytes at once", f"  return {found};", "}"]
