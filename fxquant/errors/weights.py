"""Encodings and weights."""

from __future__ import annotations

from collections.abc import Iterable

from fxquant.errors.kinds import EncodingError, WeightError


def bad_encoding(field: str, value: object, expected: str) -> EncodingError:
    """A field of an `Encoding` that no tensor can be encoded with."""
    return EncodingError(f"an encoding's {field} must be {expected}, got {value!r}.")


def bad_block_size(value: object) -> EncodingError:
    """A block size that is not a whole power of two from 16 to 4096, or -1."""
    return EncodingError(
        f"block size must be a power of two from 16 to 4096 (or -1 for a whole dimension), "
        f"got {value!r}."
    )


def bad_recipe(field: str, value: object, expected: str) -> EncodingError:
    """A field of a `Recipe` that no product can be quantized with."""
    return EncodingError(f"a recipe's {field} must be {expected}, got {value!r}.")


def weight_dtype(dtype: object, where: str) -> WeightError:
    """A weight that is not a real floating-point tensor."""
    return WeightError(
        f"cannot quantize {where}: its dtype is {dtype}, and only float16, bfloat16, float32 and "
        f"float64 weights can be encoded; add it to `skip`."
    )


def weight_not_finite(where: str, count: int) -> WeightError:
    """A weight that holds NaN or Inf."""
    return WeightError(
        f"cannot quantize {where}: it holds {count} NaN or Inf values; repair the checkpoint, or "
        f"add the module to `skip`."
    )


def weight_on_meta(where: str) -> WeightError:
    """A weight that has a shape and no values."""
    return WeightError(
        f"cannot quantize {where}: it is on the meta device and holds no values; load the "
        f"checkpoint first."
    )


def weight_empty(where: str, shape: Iterable[int]) -> WeightError:
    """A weight with no elements."""
    return WeightError(
        f"cannot quantize {where}: it is empty (shape {tuple(shape)}); add the module to `skip`."
    )
