"""Numbers, no graphs: codebooks, block scaling, bit packing, `Encoding`, `PackedWeight`."""
