"""What compiled graphs need when they run: operators, packed weights, kernels, caches."""

from fxquant.formats import native
from fxquant.runtime import packing

native.set_encoder(packing.encode)
