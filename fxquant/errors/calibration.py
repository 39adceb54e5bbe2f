"""Calibration: batches, statistics, and what asks for them."""

from __future__ import annotations

from fxquant.errors.kinds import CalibrationError, CheckpointError


def no_batches() -> CalibrationError:
    """Nothing to calibrate with."""
    return CalibrationError(
        "cannot calibrate without batches: pass at least one; a generator that was read before "
        "has none left."
    )


def single_batch(kind: str) -> CalibrationError:
    """One batch where a collection of them is meant."""
    return CalibrationError(
        f"the batches to calibrate with are one {kind}: pass a list of batches, [batch]."
    )


def bad_batch(number: int, reason: object) -> CalibrationError:
    """A batch that the model cannot be called with."""
    return CalibrationError(
        f"cannot calibrate with batch {number}: {reason}; pass tensors, tuples of positional "
        f"arguments, dicts of keyword arguments, or functions of the model."
    )


def not_finite(name: str, number: int) -> CalibrationError:
    """A site whose activations held NaN or Inf."""
    return CalibrationError(
        f"the activations of {name!r} hold NaN or Inf in batch {number}: look for what makes them "
        f"there (masks of nothing but padding, float16 overflow), or leave the batch out."
    )


def no_statistics(name: str, known: int) -> CalibrationError:
    """A product that the calibration has not seen."""
    return CalibrationError(
        f"the calibration has no statistics for {name!r} (it has them for {known} weights): it is "
        f"of another model, or its batches never came there; run fxquant.calibrate(model, "
        f"batches) on this model, or add the module to `skip`."
    )


def wrong_channels(name: str, stored: int, wanted: int) -> CalibrationError:
    """Statistics of another width than the product's."""
    return CalibrationError(
        f"the calibration has {stored} channels for {name!r} and the model {wanted}: it is of "
        f"another model; run fxquant.calibrate(model, batches) on this one."
    )


def no_calibration_file(path: object) -> CheckpointError:
    """A safetensors file that holds something else."""
    return CheckpointError(
        f"cannot load {path}: it holds no calibration; name a file that Calibration.save wrote."
    )


def needs_calibration(scheme: str, name: str) -> CalibrationError:
    """A recipe that goes by statistics which are not there."""
    return CalibrationError(
        f"the scheme {scheme!r} needs statistics of the activation of {name!r}: pass "
        f"options={{'calibration': fxquant.calibrate(model, batches)}}, or 'calibration_steps': n "
        f"to calibrate in the first n calls."
    )
