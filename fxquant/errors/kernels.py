"""Kernels: what cannot be printed, built, loaded or called."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fxquant.errors.kinds import (
    CompilerError,
    DeviceError,
    FolderError,
    KernelError,
    NotPrintedError,
    OptionError,
    WrongKernelError,
)
from fxquant.errors.words import listed, some


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
        f"to fxquant.codegen.pointwise; there are {listed(known)}."
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
    return OptionError(f"{variable} must be one of {listed(known)}, got {name!r}.")


def refused_isa(variable: str, name: str, reason: str) -> OptionError:
    """A variable names an instruction set that this process may not use."""
    return OptionError(f"{variable} is {name!r}, but {reason}: unset it, or name another.")


def unsupported_isa(variable: str, name: str, missing: Iterable[str]) -> OptionError:
    """An instruction set that the processor does not have."""
    return OptionError(
        f"{variable} is {name!r}, but this processor lacks {listed(missing)}: unset it, or name "
        f"another."
    )


def kernel_operand(kernel: str, what: str, expected: object, got: object) -> KernelError:
    """A tensor that is not what a kernel was printed for."""
    return KernelError(
        f"{kernel}: {what} must be {expected}, got {got}: call the kernel with the operands that "
        f"its spec names."
    )


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


def wrong_kernel(
    kernel: tuple[str, str, Sequence[str]], off: tuple[float, float], repro: object
) -> WrongKernelError:
    """A kernel whose result is not what its spec says.

    Args:
        kernel: The target, the kernel's name and the modules that it serves.
        off: The largest error, and how large it may be there.
        repro: The file that reproduces it.
    """
    target, name, modules = kernel
    whom = f" of {some(modules)}" if modules else ""
    error = WrongKernelError(
        f"the {target} kernel {name}{whom} is off by {off[0]:.3g} where {off[1]:.3g} is allowed, "
        f"so torch computes it from now on: report it with {repro}, which shows the error."
    )
    error.reason = f"the {target} kernel was off by {off[0]:.3g} where {off[1]:.3g} is allowed"
    return error


def no_triton() -> KernelError:
    """Triton is asked for and not installed."""
    return KernelError(
        "target 'triton' needs the triton package, which is not installed: "
        "pip install 'fxquant[triton]', or use target 'torch'."
    )


def no_gradient_of_codes() -> KernelError:
    """A backward pass through an activation that was quantized apart from its products."""
    return KernelError(
        "an activation with a scale per tensor, a static or a clipped one has no gradient: train "
        "with a scheme whose scale is per token, such as 'w8a8', or call the model under "
        "torch.no_grad()."
    )
