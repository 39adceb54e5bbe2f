"""What is fused, in words: Inductor's ops spell activations out."""

from __future__ import annotations

from collections.abc import Iterable

_ARITHMETIC = ("add", "sub", "mul", "div", "neg", "pow", "rsub")
_CASTS = ("_to_copy", "convert_element_type")


def words(ops: Iterable[tuple[str, int]]) -> list[str]:
    """Names of what pointwise ops do, each once.

    Args:
        ops: ATen's names in their order, each with how many tensors the op takes: with a number
            in place of one, arithmetic says nothing.
    """
    found: list[str] = []
    for op, tensors in ops:
        name = op
        if name in _CASTS or (name in _ARITHMETIC and tensors < 2):
            continue
        if name == "div" and found[-1:] == ["exp"]:
            found.pop()
            name = "silu"
        elif name == "mul" and found[-1:] == ["erf"]:
            found.pop()
            name = "gelu"
        elif name == "mul" and found[-2:] == ["add", "tanh"]:
            # By tanh of a sum with a cube, which may be a product of two.
            del found[-3 if found[-3:-2] == ["mul"] else -2 :]
            name = "gelu"
        found.append(name)
    return list(dict.fromkeys(found))
