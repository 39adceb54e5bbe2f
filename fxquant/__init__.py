"""A `torch.compile` backend that quantizes the model it compiles.

``torch.compile(model, backend="fxquant")`` needs no import of this package: torch finds the
backend by its entry point. The names below are for what goes beyond that.
"""

from fxquant._version import __version__
from fxquant.calibrate import calibrate
from fxquant.calibration import Calibration
from fxquant.checkpoint import load, save
from fxquant.config import Config
from fxquant.formats import Encoding, PackedWeight
from fxquant.quantize import quantize_, release_weights
from fxquant.report import Report, report
from fxquant.schemes import Recipe, schemes

__all__ = [
    "Calibration",
    "Config",
    "Encoding",
    "PackedWeight",
    "Recipe",
    "Report",
    "__version__",
    "calibrate",
    "load",
    "quantize_",
    "release_weights",
    "report",
    "save",
    "schemes",
]
