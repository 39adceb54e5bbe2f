"""From a `KernelSpec` to source text.

Knows nothing of models, graphs or autograd. `spec` says what a kernel computes, `reference`
defines it by executing it with torch, `indexing` and `pointwise` hold what the targets share, and
every target is one folder with a ``render(spec, header) -> str``.
"""
