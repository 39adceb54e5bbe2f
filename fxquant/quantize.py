"""Packing ahead of a compile, in place, and freeing what a compile has packed on the fly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fxquant.config import Config
from fxquant.formats import PackedWeight
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
        CoverageError: `strict` or `min_coverage` is not met; nothing was changed.
        WeightError: A weight holds NaN or Inf, is empty, or cannot be encoded; weights before it
            stay packed, the model stays usable.
    """
    config = config if isinstance(config, Config) else Config.from_options(config)
    planned = _plan(model, config)
    rows: list[tuple[Row, Tensor | None]] = []
    replaced: dict[int, PackedWeight] = {}
    for weight, found in planned:
        old = weight.parameter
        if isinstance(found, Declined):
            rows.append((weight.row(status=LEFT_ALONE, reason=found.reason), old))
            continue
        if id(old) not in replaced:
            replaced[id(old)] = _replace(model, old, STORE.pack(old, found.encoding, weight.name))
        new = replaced[id(old)]
        row = weight.row(
            status=QUANTIZED,
            scheme=found.scheme,
            bits=new.bits_per_weight,
            error_db=STORE.error_db(new),
            kernel="none yet: packed ahead of a compile",
        )
        rows.append((row, new))
    remember(rows, model.parameters())
    return report(model)


def release_weights(model: nn.Module) -> int:
    """Frees the originals of all weights that compiles of this model have packed.

    Their modules get the packed form in place of the original, so `state_dict` and eager calls
    keep working. The next call compiles once more (a parameter was replaced) and packs nothing. A
    weight that a graph also reads otherwise (a tied embedding) is kept.

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
        parameter: The tensor.
        n_dims: Dimensions that make up the outputs.
        k_dims: Dimensions that make up the inputs.
    """

    path: str
    name: str
    parameter: nn.Parameter
    n_dims: tuple[int, ...] = (0,)
    k_dims: tuple[int, ...] = (1,)

    def row(self, **fields: Any) -> Row:
        return Row(self.path, self.name, tuple(self.parameter.shape), **fields)


def _weights(model: nn.Module) -> Iterator[_Weight]:
    for path, module in model.named_modules():
        for name, n_dims, k_dims in _weights_of(module):
            full = f"{path}.{name}" if path else name
            yield _Weight(path, full, getattr(module, name), n_dims, k_dims)


def _weights_of(module: nn.Module) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Names of the product weights a module holds, and their output and input dimensions."""
    if isinstance(module, nn.Linear):
        yield "weight", (0,), (1,)
    elif isinstance(module, nn.MultiheadAttention):
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            if getattr(module, name) is not None:
                yield name, (0,), (1,)
    elif isinstance(module, (nn.Conv1d, nn.Conv2d)):
        ones = (1,) * len(module.kernel_size)
        if module.kernel_size == ones and module.stride == ones and module.groups == 1:
            yield "weight", (0,), (1,)
    elif type(module).__module__ == "transformers.pytorch_utils" and hasattr(module, "nf"):
        yield "weight", (1,), (0,)


def _plan(model: nn.Module, config: Config) -> list[tuple[_Weight, Decision | Declined]]:
    """What to do with each weight; checks coverage before anything is changed."""
    known = list(_weights(model))
    names = {weight.name for weight in known}
    others = {
        id(parameter): name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name not in names
    }
    planned: list[tuple[_Weight, Decision | Declined]] = []
    for weight in known:
        value = weight.parameter
        found: Decision | Declined
        if id(value) in others:
            found = Declined(f"the same parameter is also {others[id(value)]}")
        elif not value.is_floating_point() or value.numel() == 0:
            found = Declined(f"it is {value.dtype} of shape {tuple(value.shape)}")
        else:
            patterns = (weight.path, weight.name)
            found = decide(config, value, patterns, weight.n_dims, weight.k_dims)
        planned.append((weight, found))
    done = [w.parameter.numel() for w, found in planned if isinstance(found, Decision)]
    lost = [
        Refusal(found.reason, "", w.path, "quantize_", tuple(w.parameter.shape), w.name)
        for w, found in planned
        if isinstance(found, Declined) and found.kind == LEFT
    ]
    check_coverage(config, done, lost)
    return planned


def _replace(model: nn.Module, old: Tensor, packed: PackedWeight) -> PackedWeight:
    """Puts a packed weight where a parameter was, in every module that holds it."""
    new = nn.Parameter(packed, requires_grad=False)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is old:
                module._parameters[name] = new
    STORE.adopt(packed, new)
    follow(old, new)
    assert isinstance(new, PackedWeight), "a parameter keeps the class of its tensor"
    return new
