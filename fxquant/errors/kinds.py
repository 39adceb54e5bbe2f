"""The exceptions."""

from __future__ import annotations


class FxquantError(Exception):
    """Base of everything fxquant raises on purpose."""


class OptionError(FxquantError, ValueError):
    """An option of `fxquant.Config` is unknown or has the wrong type or value."""


class EncodingError(FxquantError, ValueError):
    """An `Encoding` cannot exist, or does not fit the tensor it is asked to describe."""


class WeightError(FxquantError, ValueError):
    """A weight cannot be quantized."""


class CalibrationError(FxquantError, ValueError):
    """A calibration cannot be made, or is not of the model that asks for it."""


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


class WrongKernelError(KernelError):
    """A kernel gave a wrong result, and torch computes in its place.

    Attributes:
        reason: The same as a clause, for tables.
    """

    reason = ""


class ScriptError(FxquantError):
    """A script that the command line was asked to run cannot be used."""


class MissingPackageError(FxquantError, ImportError):
    """A command needs packages that are not installed."""


class PassError(FxquantError, RuntimeError):
    """A pass left a graph behind that fails verification; always a defect of fxquant."""
