"""Numbers, no graphs: codebooks, block scaling, bit packing, `Encoding`, `PackedWeight`."""

from fxquant.formats.decode import decode, decode_int8, int8_levels, levels
from fxquant.formats.encoding import Encoding
from fxquant.formats.packed import PackedWeight, anchor_of, pack
from fxquant.formats.quality import sqnr_db

__all__ = [
    "Encoding",
    "PackedWeight",
    "anchor_of",
    "decode",
    "decode_int8",
    "int8_levels",
    "levels",
    "pack",
    "sqnr_db",
]
