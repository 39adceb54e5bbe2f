"""Scripts, packages, folders and saved files."""

from __future__ import annotations

from collections.abc import Iterable

from fxquant.errors.kinds import CheckpointError, FolderError, MissingPackageError, ScriptError
from fxquant.errors.words import listed, some


def no_script(path: object) -> ScriptError:
    """A script that is not there."""
    return ScriptError(f"there is no Python file {path}: name the script that uses your model.")


def script_failed(path: object, reason: str, where: str) -> ScriptError:
    """A script that stopped with an exception or an exit code."""
    at = f" at {where}" if where else ""
    reason = reason.rstrip(".")
    return ScriptError(f"the script {path} stopped{at} ({reason}): make it run by itself first.")


def nothing_compiled(path: object) -> ScriptError:
    """A script in which fxquant compiled no product."""
    return ScriptError(
        f"fxquant compiled nothing in {path}: the script has to call a model that went through "
        f"torch.compile(model, backend='fxquant')."
    )


def nothing_quantized(path: object) -> ScriptError:
    """A script whose models were compiled with every product left alone."""
    return ScriptError(
        f"fxquant left every product in {path} alone: run `fxquant report {path}` to see why."
    )


def missing_packages(command: str, packages: Iterable[str], extra: str) -> MissingPackageError:
    """Optional packages that a command cannot do without."""
    return MissingPackageError(
        f"{command} needs {listed(packages)}, which is not installed: "
        f"pip install 'fxquant[{extra}]'."
    )


def unwritable_file(path: object, cause: object) -> FolderError:
    """A file that was asked for and cannot be written."""
    return FolderError(f"{path} cannot be written ({cause}): name a file in another folder.")


def unreadable_checkpoint(path: object, reason: object) -> CheckpointError:
    """A file that is not there, is cut short, or is no safetensors file."""
    return CheckpointError(
        f"cannot load {path}: it is missing, cut short or not a safetensors file ({reason}); "
        f"save it again or copy the whole file."
    )


def damaged_entry(path: object, name: str, reason: object) -> CheckpointError:
    """A stored weight whose parts do not fit together."""
    return CheckpointError(
        f"cannot load {path}: its entry for {name!r} is damaged ({reason}); save the model again."
    )


def checkpoint_keys(
    path: object, missing: Iterable[str], unexpected: Iterable[str]
) -> CheckpointError:
    """A file whose names are not those of the model."""
    absent, extra = some(missing), some(unexpected)
    what = [f"it lacks {absent}"] if absent else []
    what += [f"it has {extra}, which the model does not"] if extra else []
    return CheckpointError(
        f"cannot load {path}: {' and '.join(what)}; load it into the model that it was saved from."
    )


def checkpoint_shape(
    path: object, name: str, stored: Iterable[int], expected: Iterable[int]
) -> CheckpointError:
    """A stored tensor of another shape than the model's."""
    return CheckpointError(
        f"cannot load {path}: {name!r} has shape {tuple(stored)} there and {tuple(expected)} in "
        f"the model; load it into the model that it was saved from."
    )


def not_a_tensor(name: str, value: object) -> CheckpointError:
    """An entry of a state dict that safetensors cannot hold."""
    return CheckpointError(
        f"cannot save {name!r}: it is a {type(value).__name__}, and a safetensors file holds "
        f"tensors only; remove it from the model's state_dict."
    )


def not_bitsandbytes(name: str, encoding: object) -> CheckpointError:
    """An encoding that bitsandbytes has no keys for."""
    return CheckpointError(
        f"cannot save {name!r} for bitsandbytes: its encoding is {encoding}, and only nf4 and fp4 "
        f"in flat blocks with float32 or dynamic8 scales can be stored; save without `layout`."
    )
