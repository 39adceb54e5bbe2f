"""Derived error bounds, shared by the tests."""

from __future__ import annotations

import torch
from torch import Tensor


def product_bound(
    x: Tensor,
    w: Tensor,
    out_dtype: torch.dtype,
    extra: Tensor | None = None,
    *,
    scaled_apart: bool = False,
) -> Tensor:
    """How far two float32-accumulated products of the same 16- or 32-bit operands may differ.

    Any order of summation of k products in float32 errs by at most ``gamma_k * sum |x||w|`` with
    ``gamma_k = k u / (1 - k u)`` and ``u = 2**-24`` (Higham, Accuracy and Stability, 3.1); products
    of 16-bit operands are exact in float32. Two such sums differ by twice that, and each result is
    rounded once (and once more where an epilogue adds `extra`).

    Args:
        x: ``[.., k]``, already rounded to the compute dtype.
        w: ``[n, k]``, likewise.
        out_dtype: Dtype of the results.
        extra: What was added, broadcastable to ``[.., n]``.
        scaled_apart: A kernel rounds levels to the dtype of `w` and scales their sums in float32,
            where `w` is ``level * scale`` rounded once: each is within half a unit in the last
            place of the exact weight, so they are apart by one at most.
    """
    unit = 2.0**-24
    k = x.shape[-1]
    magnitude = x.double().abs() @ w.double().abs().transpose(-1, -2)
    apart = torch.finfo(w.dtype).eps * magnitude if scaled_apart else 0.0
    if extra is not None:
        magnitude = magnitude + extra.double().abs()
    gamma = (k + 2) * unit / (1 - (k + 2) * unit)
    rounding = torch.finfo(out_dtype).eps
    tiny = torch.finfo(out_dtype).smallest_normal * rounding
    rounded = 2 * rounding * magnitude.clamp_max(_reach(x, w, extra) + apart)
    return 2 * gamma * magnitude + rounded + apart + tiny


def _reach(x: Tensor, w: Tensor, extra: Tensor | None) -> Tensor:
    exact = x.double() @ w.double().transpose(-1, -2)
    if extra is not None:
        exact = exact + extra.double()
    return exact.abs() * 1.01 + torch.finfo(torch.float32).tiny


def assert_close_within(actual: Tensor, expected: Tensor, bound: Tensor) -> None:
    """Every element within its own bound; NaN where NaN is expected."""
    assert actual.shape == expected.shape
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    error = (actual.double() - expected.double()).abs()
    worst = torch.where(nan, torch.zeros_like(error), error - bound)
    assert bool((worst <= 0).all()), f"exceeds its bound by {worst.max().item():.3e}"
