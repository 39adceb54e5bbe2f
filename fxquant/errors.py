"""Every message a user can see, in one place.

Each function builds one exception whose text is a single sentence: what is wrong, where, and what
to do about it. Raise it at the place that noticed: ``raise errors.unknown_option(name, known)``.
"""

from __future__ import annotations

from collections.abc import Iterable


class FxquantError(Exception):
    """Base of everything fxquant raises on purpose."""


class OptionError(FxquantError, ValueError):
    """An option of `fxquant.Config` is unknown or has the wrong type or value."""


class EncodingError(FxquantError, ValueError):
    """An `Encoding` cannot exist, or does not fit the tensor it is asked to describe."""


class WeightError(FxquantError, ValueError):
    """A weight cannot be quantized."""


class CoverageError(FxquantError):
    """Products were left alone although `strict` or `min_coverage` forbids it."""


class DeviceError(FxquantError, RuntimeError):
    """Tensors of one product lie on different devices, or the device has no target."""


class FolderError(FxquantError, OSError):
    """The kernel cache or the dump folder cannot be written."""


class CheckpointError(FxquantError, ValueError):
    """A saved file is cut short, damaged, or belongs to another model."""


class KernelError(FxquantError, RuntimeError):
    """A kernel cannot be printed, built or launched."""


class CompilerError(KernelError):
    """A C++ kernel cannot be built or loaded here.

    Attributes:
        reason: The same as a clause, for tables.
    """

    reason = ""


class NotPrintedError(KernelError):
    """A target has no kernels for what a spec asks; another target may."""


class ScriptError(FxquantError):
    """A script that the command line was asked to run cannot be used."""


class MissingPackageError(FxquantError, ImportError):
    """A command needs packages that are not installed."""


class PassError(FxquantError, RuntimeError):
    """A pass left a graph behind that fails verification; always a defect of fxquant."""


def _listed(names: Iterable[object]) -> str:
    return ", ".join(str(name) for name in names)


# --- options ---------------------------------------------------------------------------------


def unknown_option(name: str, known: Iterable[str]) -> OptionError:
    """An option that `Config` does not have."""
    return OptionError(f"unknown fxquant option {name!r}: the options are {_listed(known)}.")


def ill_typed_option(name: str, value: object, expected: str) -> OptionError:
    """An option whose value has the wrong type."""
    return OptionError(
        f"fxquant option {name!r} must be {expected}, got {value!r} of type {type(value).__name__}."
    )


def bad_option_value(name: str, value: object, expected: str) -> OptionError:
    """An option whose value has the right type and cannot be used."""
    return OptionError(f"fxquant option {name!r} must be {expected}, got {value!r}.")


def unknown_scheme(name: str, known: Iterable[str]) -> OptionError:
    """A scheme that is not registered."""
    return OptionError(f"unknown quantization scheme {name!r}: the schemes are {_listed(known)}.")


# --- encodings and weights -------------------------------------------------------------------


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


# --- kernels ---------------------------------------------------------------------------------


def bad_spec(field: str, value: object, expected: str) -> KernelError:
    """A field of a `KernelSpec` that describes no kernel."""
    return KernelError(f"a kernel spec's {field} must be {expected}, got {value!r}.")


def bad_spec_text(reason: str) -> KernelError:
    """Text that is not the JSON of a `KernelSpec`."""
    return KernelError(
        f"this text is not a kernel spec ({reason}): pass what KernelSpec.to_json wrote."
    )


def no_pointwise_op(op: object, where: str, known: Iterable[str]) -> KernelError:
    """A pointwise op that an epilogue cannot hold or a target cannot spell."""
    return KernelError(
        f"the pointwise op {op} has no entry for {where}: keep it out of the epilogue, or add it "
        f"to fxquant.codegen.pointwise; there are {_listed(known)}."
    )


def not_printed(target: str, what: str) -> NotPrintedError:
    """A spec with something that a target prints no kernels for."""
    return NotPrintedError(
        f"target {target!r} prints no kernel for a spec with {what} in this version: use target "
        f"'torch', or leave that option out."
    )


def no_compiler(reason: str) -> CompilerError:
    """C++ kernels are asked for and cannot be built."""
    error = CompilerError(f"target 'cpp' cannot run: {reason}; use target 'torch'.")
    error.reason = reason
    return error


def compiler_failed(name: str, command: str, said: str, source: object) -> CompilerError:
    """The C++ compiler did not take a printed kernel."""
    error = CompilerError(
        f"the C++ compiler failed on the kernel {name!r}, saying {said!r}: read the source "
        f"{source} and run `{command}`, or set CXX to another compiler."
    )
    error.reason = f"the C++ compiler failed, saying {said!r}"
    return error


def unloadable_kernel(name: str, path: object, cause: object) -> CompilerError:
    """A built kernel that the system does not load."""
    error = CompilerError(
        f"the kernel {name!r} was built and cannot be loaded from {path} ({cause}): point "
        f"FXQUANT_CACHE_DIR at a folder from which programs may run."
    )
    error.reason = f"the built kernel cannot be loaded ({cause})"
    return error


def unknown_isa(variable: str, name: str, known: Iterable[str]) -> OptionError:
    """An environment variable that names no instruction set."""
    return OptionError(f"{variable} must be one of {_listed(known)}, got {name!r}.")


def unsupported_isa(variable: str, name: str, missing: Iterable[str]) -> OptionError:
    """An instruction set that the processor does not have."""
    return OptionError(
        f"{variable} is {name!r}, but this processor lacks {_listed(missing)}: unset it, or name "
        f"another."
    )


def kernel_operand(kernel: str, what: str, expected: object, got: object) -> KernelError:
    """A tensor that is not what a kernel was printed for."""
    return KernelError(
        f"{kernel}: {what} must be {expected}, got {got}: call the kernel with the operands that "
        f"its spec names."
    )


# --- folders, devices, kernels ---------------------------------------------------------------


def unwritable_folder(what: str, path: object, variable: str, cause: object) -> FolderError:
    """A folder of ours that cannot be written."""
    return FolderError(
        f"the {what} folder {path} cannot be written ({cause}): point {variable} at a folder that "
        f"can."
    )


def device_mismatch(what: str, device: object, weight_device: object) -> DeviceError:
    """An activation on another device than the packed weight."""
    return DeviceError(
        f"{what}: the activation is on {device} and the packed weight on {weight_device}; move "
        f"the model or the input so that both are on one device."
    )


def no_triton() -> KernelError:
    """Triton is asked for and not installed."""
    return KernelError(
        "target 'triton' needs the triton package, which is not installed: "
        "pip install 'fxquant[triton]', or use target 'torch'."
    )


# --- command line ----------------------------------------------------------------------------


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
        f"{command} needs {_listed(packages)}, which is not installed: "
        f"pip install 'fxquant[{extra}]'."
    )


def unwritable_file(path: object, cause: object) -> FolderError:
    """A file that was asked for and cannot be written."""
    return FolderError(f"{path} cannot be written ({cause}): name a file in another folder.")


# --- checkpoints -----------------------------------------------------------------------------


def unreadable_checkpoint(path: object, reason: object) -> CheckpointError:
    """A file that is not there, is cut short, or is no safetensors file."""
    return CheckpointError(
        f"cannot load {path}: it is missing, cut short or not a safetensors file ({reason}); "
        f"save the model again or copy the whole file."
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
    absent, extra = _some(missing), _some(unexpected)
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


# --- passes ----------------------------------------------------------------------------------


def products_left_alone(reasons: Iterable[str]) -> CoverageError:
    """`strict` is set and products were left alone for other reasons than a skip pattern."""
    found = list(reasons)
    return CoverageError(
        f"strict=True, but {len(found)} products against parameters stay unquantized: "
        f"{'; '.join(found)}; add what is meant to stay to `skip`, or drop `strict`."
    )


def coverage_too_low(share: float, wanted: float, reasons: Iterable[str]) -> CoverageError:
    """Fewer weight elements are quantized than `min_coverage` asks for."""
    return CoverageError(
        f"only {share:.1%} of the weights in products are quantized, min_coverage asks for "
        f"{wanted:.1%}: {'; '.join(reasons)}; add what is meant to stay to `skip`, or lower "
        f"`min_coverage`."
    )


def broken_graph(name: str, reason: str) -> PassError:
    """A pass left a graph behind that fails verification."""
    return PassError(
        f"the pass {name!r} left a broken graph: {reason}; this is a defect of fxquant, please "
        f"report it with the model's code."
    )


def _some(names: Iterable[str], limit: int = 3) -> str:
    found = [repr(name) for name in names]
    more = f" and {len(found) - limit} more" if len(found) > limit else ""
    return ", ".join(found[:limit]) + more
