"""Saving and loading quantized models: safetensors, no pickle.

A packed parameter ``w`` is stored as its parts, ``w.codes``, ``w.scales`` and so on; the file's
metadata holds each one's encoding, shape and dtype, and which names share one tensor. In the
``"bitsandbytes"`` layout its 4-bit keys are written instead, and `load` reads them wherever it
finds them.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxquant import errors, tensorfile
from fxquant.formats import Encoding, PackedWeight
from fxquant.formats import bitsandbytes as bnb
from fxquant.formats.check import misfit

LAYOUTS = ("fxquant", "bitsandbytes")
PACKED, TIED = "fxquant.packed", "fxquant.tied"


def save(model: nn.Module, path: str | os.PathLike[str], *, layout: str = "fxquant") -> None:
    """Writes a model's parameters and persistent buffers.

    The file appears whole or not at all: it is written beside its place and renamed. Tied weights
    are stored once.

    Args:
        model: Dense or quantized, compiled or not.
        path: Of the file to write.
        layout: ``"fxquant"``, or ``"bitsandbytes"`` for files that it can read.

    Raises:
        CheckpointError: The state dict holds something else than tensors, or an encoding has no
            place in the layout.
        OptionError: The layout is unknown.
        FolderError: The file cannot be written.
    """
    if layout not in LAYOUTS:
        raise errors.bad_option_value("layout", layout, f"one of {', '.join(LAYOUTS)}")
    tensors: dict[str, Tensor] = {}
    packed: dict[str, Any] = {}
    tied: dict[str, str] = {}
    first_name: dict[Any, str] = {}
    for name, value in _plain(model).state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise errors.not_a_tensor(name, value)
        original = first_name.setdefault(_identity(value), name)
        if original != name:
            tied[name] = original
        elif not isinstance(value, PackedWeight):
            tensors[name] = _own(value)
        elif layout == "bitsandbytes":
            if not bnb.can_store(value.encoding):
                raise errors.not_bitsandbytes(name, value.encoding)
            for suffix, part in bnb.to_tensors(value).items():
                tensors[f"{name}.{suffix}" if suffix else name] = _own(part)
        else:
            packed[name] = {
                "encoding": value.encoding.to_json(),
                "shape": list(value.shape),
                "dtype": str(value.dtype).removeprefix("torch."),
            }
            for part_name, part in zip(value.encoding.parts, value.tensors(), strict=True):
                tensors[f"{name}.{part_name}"] = _own(part)
    metadata = {"format": "pt", PACKED: json.dumps(packed), TIED: json.dumps(tied)}
    tensorfile.write(Path(path), tensors, metadata)


def load(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Reads a file into a model, replacing parameters by packed ones where the file has them.

    Tensors take the model's device and floating-point dtype (the file's, where the model is on the
    meta device). Everything is read and checked first: after an error the model is as it was.

    Args:
        model: As it was before quantization, or quantized; compiled or not.
        path: Of a file that `save` wrote, or one with bitsandbytes' 4-bit keys.

    Raises:
        CheckpointError: The file is missing, cut short or damaged, or its names or shapes are not
            the model's.
    """
    model = _plain(model)
    stored, tied = _read(Path(path))
    mine = {
        name: value
        for name, value in model.state_dict(keep_vars=True).items()
        if isinstance(value, Tensor)
    }
    source = _sources(Path(path), mine, stored, tied)
    assignments: list[Callable[[], None]] = []
    ready: dict[tuple[str, Any], Tensor] = {}
    for name, entry in source.items():
        old, new = mine[name], stored[entry]
        if old.shape != new.shape:
            raise errors.checkpoint_shape(path, name, new.shape, old.shape)
        assignments.append(_assignment(model, name, old, new, (entry, ready)))
    for assign in assignments:
        assign()


def _plain(model: nn.Module) -> nn.Module:
    """The model inside a compiled one."""
    return getattr(model, "_orig_mod", model)


def _identity(value: Tensor) -> Any:
    """Equal for the names of one tensor."""
    if isinstance(value, PackedWeight):
        return id(value.codes), value.encoding, value.shape, value.dtype
    if value.device.type == "meta" or value.numel() == 0:
        return id(value)
    return value.data_ptr(), value.device, value.shape, value.stride(), value.dtype


def _own(value: Tensor) -> Tensor:
    """The values on the CPU, in memory that is shared with no other entry."""
    value = value.detach().cpu().contiguous()
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, packed ones put together, and its tied names."""
    tensors, metadata = tensorfile.read(path)
    try:
        packed, tied = (dict(json.loads(metadata.get(key, "{}"))) for key in (PACKED, TIED))
    except (ValueError, TypeError) as cause:
        raise errors.unreadable_checkpoint(path, cause) from cause
    for name, described in packed.items():
        put_together = functools.partial(_from_parts, tensors, name, described)
        tensors[name] = _checked(path, name, put_together)
    for key in [key for key in tensors if bnb.STATE in key]:
        name = key[: key.index(bnb.STATE) - 1]
        put_together = functools.partial(_from_bitsandbytes, tensors, name)
        tensors[name] = _checked(path, name, put_together)
    return tensors, tied


def _checked(path: Path, name: str, put_together: Callable[[], PackedWeight]) -> PackedWeight:
    try:
        weight = put_together()
        problem = misfit(weight.tensors(), weight.encoding, weight.shape)
    except KeyError as cause:
        raise errors.damaged_entry(path, name, f"{cause} is missing") from cause
    except (ValueError, TypeError, AttributeError, RuntimeError) as cause:
        raise errors.damaged_entry(path, name, cause) from cause
    if problem is not None:
        raise errors.damaged_entry(path, name, problem)
    return weight


def _from_parts(tensors: dict[str, Tensor], name: str, described: Any) -> PackedWeight:
    encoding = Encoding.from_json(described["encoding"])
    parts = [tensors.pop(f"{name}.{part}") for part in encoding.parts]
    return PackedWeight(parts, encoding, described["shape"], getattr(torch, described["dtype"]))


def _from_bitsandbytes(tensors: dict[str, Tensor], name: str) -> PackedWeight:
    suffixes = [*bnb.PLAIN_KEYS, *(f"{bnb.STATE}{kind}" for kind in bnb.TYPES)]
    found = {s: tensors.pop(f"{name}.{s}") for s in suffixes if f"{name}.{s}" in tensors}
    return bnb.from_tensors({"": tensors.pop(name), **found})


def _sources(
    path: Path, mine: dict[str, Tensor], stored: dict[str, Tensor], tied: dict[str, str]
) -> dict[str, str]:
    """For each of the model's names, the entry of the file that it takes."""
    source = {name: tied.get(name, name) for name in mine if tied.get(name, name) in stored}
    by_tensor = {_identity(mine[name]): entry for name, entry in source.items()}
    for name, value in mine.items():
        if name not in source and _identity(value) in by_tensor:
            source[name] = by_tensor[_identity(value)]
    missing = [name for name in mine if name not in source]
    unexpected = [name for name in (*stored, *tied) if name not in mine]
    if missing or unexpected:
        raise errors.checkpoint_keys(path, missing, unexpected)
    return source


def _assignment(
    model: nn.Module,
    name: str,
    old: Tensor,
    new: Tensor,
    shared: tuple[str, dict[tuple[str, Any], Tensor]],
) -> Callable[[], None]:
    """What puts one tensor in its place; all that can fail has been done when this returns."""
    entry, ready = shared
    on_meta = old.device.type == "meta"
    if type(old.detach()) is type(new) is Tensor and not on_meta:
        return lambda: _copy(old, new)
    key = (entry, (old.device, old.dtype))
    if key not in ready:
        is_parameter = isinstance(old, nn.Parameter)
        keeps_gradient = old.requires_grad and not isinstance(new, PackedWeight)
        if not on_meta:
            new = new.to(old.device, old.dtype if new.is_floating_point() else new.dtype)
        ready[key] = nn.Parameter(new, requires_grad=keeps_gradient) if is_parameter else new
    prefix, _, last = name.rpartition(".")
    owner = model.get_submodule(prefix)
    table: dict[str, Any] = owner._parameters if last in owner._parameters else owner._buffers
    return lambda: table.__setitem__(last, ready[key])


def _copy(old: Tensor, new: Tensor) -> None:
    with torch.no_grad():
        old.copy_(new)
