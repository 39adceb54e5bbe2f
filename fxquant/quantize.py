"""Packing ahead of a compile, in place, and freeing what a compile has packed on the fly."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fxquant import errors
from fxquant.config import Config
from fxquant.formats import PackedWeight
from fxquant.passes.bind import is_foreign
from fxquant.passes.context import LEFT, Refusal
from fxquant.passes.plan import Decision, Declined, check_coverage, decide
from fxquant.report import LEFT_ALONE, QUANTIZED, Report, Row, follow, remember, report
from fxquant.runtime.store import STORE


def quantize_(model: nn.Module, config: Config | Mapping[str, Any] | None = None) -> Report:
    """Packs the product weights of a model now, in place, parameter by parameter.

    Each original is freed as soon as its packed form is there, so the peak memory stays near the
    packed size plus one layer. The model keeps working in eager mode (by decoding); compile it
    with ``backend="fxquant"`` for speed. Packed parameters are frozen (``requires_grad=False``).

    With no graph to look at, this goes by module type: Linear, MultiheadAttention, 1x1
    convolutions and the Conv1D of transformers. A compile finds other products and packs them then.

    Args:
        model: Changed in place.
        config: A `Config`, a dict of its fields, or None for the defaults.

    Returns:
        What was packed and what was left alone.

    Raises:
        OptionError: An option is unknown or ill-typed.
        OptionError: A scheme moves scales into what makes an activation, which only a compile
            sees; nothing was changed.
        CoverageError: `strict` or `min_coverage` is not met; nothing was changed.
        WeightError: A weight holds NaN or Inf, is empty, or cannot be encoded; weights before it
            stay packed, the model stays usable.
    """
    config = Config.from_options(config)
    groups = _plan(model, config)
    rows: list[tuple[Row, Tensor | None]] = []
    while groups:
        # Nothing here may hold on to an original once it is packed.
        group = groups.pop(0)
        name = group[0][0].name
        rows += _pack_group(model, model.get_parameter(name), group)
    remember(rows, model.parameters())
    return report(model)


def _pack_group(
    model: nn.Module, old: nn.Parameter, group: Sequence[tuple[_Weight, Decision | Declined]]
) -> Iterator[tuple[Row, Tensor]]:
    """Packs one parameter for all modules that multiply by it, and yields their rows."""
    new: PackedWeight | None = None
    for weight, found in group:
        if isinstance(found, Declined):
            yield weight.row(status=LEFT_ALONE, reason=found.reason), old
            continue
        if new is None:
            new = _replace(model, old, STORE.pack(old, found.encoding, weight.name))
        row = weight.row(
            status=QUANTIZED,
            scheme=found.scheme,
            bits=new.bits_per_weight,
            error_db=STORE.error_db(new),
            kernel="none yet: packed ahead of a compile",
        )
        yield row, new


def release_weights(model: nn.Module) -> int:
    """Frees the originals of all weights that compiles of this model have packed.

    Their modules get the packed form in place of the original, so `state_dict` and eager calls
    keep working, and become frozen: call it when training is done, or after a training step has
    shown which weights are trained. The next call compiles once more (a parameter was replaced) and
    packs nothing. A weight that a graph also reads otherwise (a tied embedding) is kept, and so is
    one that was packed with scales of its activation (`smoothquant`: without them it is another)
    or of which columns stay in 16 bits (`llm_int8_static`: they come from the original).

    Args:
        model: A module, or what `torch.compile` made of it.

    Returns:
        Bytes of the originals that were freed.
    """
    freed = 0
    for old in list(model.parameters()):
        found = None if isinstance(old, PackedWeight) else STORE.packed_from(old)
        if found is not None and not STORE.is_kept(old):
            freed += old.nbytes
            _replace(model, old, found)
    return freed


@dataclass(frozen=True)
class _Weight:
    """A parameter that modules of a known type multiply by.

    Attributes:
        path: Of the module.
        name: Of the parameter, in the model.
        shape: Of the parameter.
        n_dims: Dimensions that make up the outputs.
        k_dims: Dimensions that make up the inputs.
    """

    path: str
    name: str
    shape: tuple[int, ...]
    n_dims: tuple[int, ...]
    k_dims: tuple[int, ...]

    def row(self, **fields: Any) -> Row:
        return Row(self.path, self.name, self.shape, **fields)


def _weights(model: nn.Module) -> Iterator[_Weight]:
    for path, module in model.named_modules():
        for name, n_dims, k_dims in _weights_of(module):
            full = f"{path}.{name}" if path else name
            yield _Weight(path, full, tuple(getattr(module, name).shape), n_dims, k_dims)


def _weights_of(module: nn.Module) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Names of the product weights a module holds, and their output and input dimensions."""
    if isinstance(module, nn.Linear):
        yield "weight", (0,), (1,)
    elif isinstance(module, nn.MultiheadAttention):
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            if getattr(module, name) is not None:
                yield name, (0,), (1,)
    elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        ones, zeros = (1,) * len(module.kernel_size), (0,) * len(module.kernel_size)
        is_plain = module.stride == ones and module.padding in ("same", "valid", zeros)
        if module.kernel_size == ones and is_plain and module.groups == 1:
            yield "weight", (0,), (1,)
    elif type(module).__module__ == "transformers.pytorch_utils" and hasattr(module, "nf"):
        yield "weight", (1,), (0,)


def _plan(model: nn.Module, config: Config) -> list[list[tuple[_Weight, Decision | Declined]]]:
    """What to do with each weight, those of one parameter together.

    Raises:
        OptionError: A scheme moves scales into what makes an activation.
        CoverageError: `strict` or `min_coverage` is not met.
    """
    known = {weight.name: weight for weight in _weights(model)}
    everything = dict(model.named_parameters(remove_duplicate=False))
    others = {id(value): name for name, value in everything.items() if name not in known}
    groups: dict[int, list[tuple[_Weight, Decision | Declined]]] = {}
    for weight in known.values():
        value = everything[weight.name]
        found: Decision | Declined
        if id(value) in others:
            found = Declined(f"the same parameter is also {others[id(value)]}")
        elif is_foreign(value):
            found = Declined(f"it is a {type(value).__name__}, which has its own products")
        elif not value.is_floating_point() or value.numel() == 0:
            found = Declined(f"it is {value.dtype} of shape {weight.shape}")
        else:
            patterns = (weight.path, weight.name)
            found = decide(config, value, patterns, weight.n_dims, weight.k_dims)
            if isinstance(found, Decision) and found.recipe.smoothing is not None:
                raise errors.smoothing_needs_a_graph(found.scheme, weight.name)
        groups.setdefault(id(value), []).append((weight, found))
    planned = [item for group in groups.values() for item in group]
    done = [math.prod(w.shape) for w, found in planned if isinstance(found, Decision)]
    lost = [
        Refusal(found.reason, "", w.path, "quantize_", w.shape, w.name)
        for w, found in planned
        if isinstance(found, Declined) and found.kind == LEFT
    ]
    check_coverage(config, done, lost)
    return list(groups.values())


def _replace(model: nn.Module, old: Tensor, packed: PackedWeight) -> PackedWeight:
    """Puts a packed weight where a parameter was, in every module that holds it."""
    new = nn.Parameter(packed, requires_grad=False)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is old:
                module._parameters[name] = new
    follow(old, new)
    assert isinstance(new, PackedWeight), "a parameter keeps the class of its tensor"
    return new
