"""The C++ target for CPUs: not there yet; CPUs run `fxquant.codegen.reference` through Inductor.

A target folder provides ``render(spec, header) -> str``, registered in
`fxquant.codegen.RENDERERS`: the complete source of the kernels of one spec, with a header
comment that says spec, module paths, scheme and shapes. Inside it are the skeletons that suit the
machine, a subclass of `fxquant.codegen.pointwise.Ops` that spells ATen's pointwise ops, and the
decoding of codes and scales from the index expressions of `fxquant.codegen.indexing`.
"""
