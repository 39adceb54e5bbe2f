"""Products of rows that belong to one matrix of a batch each: `KernelSpec.grouped`, with torch."""

from __future__ import annotations

import torch
from torch import Tensor


def grouped_product(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Every row times its matrix.

    Every matrix is multiplied with all rows, so that no shape depends on data.

    Args:
        rows: ``[m, k]``, sorted by the matrix that they belong to.
        matrices: ``[batch, k, n]``, in the dtype of `rows`.
        ends: Integers ``[batch]``, not decreasing: the row after the last of each matrix.

    Returns:
        ``[m, n]``; 0 in rows that belong to none.
    """
    number = torch.arange(rows.shape[0], device=rows.device).unsqueeze(-1)
    belongs = (number >= ends).sum(-1, keepdim=True)
    out = rows.new_zeros((rows.shape[0], matrices.shape[-1]))
    for e in range(matrices.shape[0]):
        out = torch.where(belongs == e, rows @ matrices[e], out)
    return out
