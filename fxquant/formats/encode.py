"""From numbers to codes and scales, in chunks that fit a core's cache."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxquant import errors
from fxquant.formats import native
from fxquant.formats.bits import pack_codes, packed_size
from fxquant.formats.blocks import BlockGrid, block_grid, run_length
from fxquant.formats.clipping import block_limits, clip_peaks, row_limits
from fxquant.formats.encoding import Encoding
from fxquant.formats.quantizers import quantizer

CHUNK = 1 << 17
"""Elements encoded at a time: 512 KiB of float32, which a core's second-level cache holds."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def encode(tensor: Tensor, encoding: Encoding, name: str = "weight") -> list[Tensor]:
    """Encodes a tensor.

    Every value is taken to float32 first. What happens at the edges:

    * A block of zeros decodes to zeros. Its scale is 0.
    * NaN and Inf are refused, as is a float64 value that is Inf in float32.
    * A codebook block whose absmax is under 1e-38 is divided by 1e-38 instead, as in bitsandbytes:
      its codes are the levels nearest to ``x / 1e-38``, and its scale is still its absmax, so that
      it decodes to magnitudes no larger than its absmax. The cut-short last block of a flat
      codebook encoding then has scale 1e-38, also as in bitsandbytes. (An 8-bit codebook that is
      looked up on a grid has neither rule.)
    * A uniform block whose scale is under the smallest denormal has scale 0 and decodes to zeros.

    Args:
        tensor: One dimension or more; float16, bfloat16, float32 or float64.
        encoding: How to store it.
        name: What to call the tensor in an error.

    Returns:
        The parts, in the order of ``encoding.parts``.

    Raises:
        WeightError: The tensor is empty, not real floating point, or holds NaN or Inf.
        EncodingError: The encoding does not fit the tensor.
    """
    tensor = tensor.detach()
    if tensor.dtype not in FLOATS:
        raise errors.weight_dtype(tensor.dtype, name)
    if tensor.numel() == 0:
        raise errors.weight_empty(name, tensor.shape)
    if tensor.is_meta:
        raise errors.weight_on_meta(name)
    if encoding.offset:
        raise errors.bad_encoding("offset", True, "False for a weight, whose mean is not stored")
    work = _Work(tensor, encoding)
    work.run()
    if not math.isfinite(work.peaks.amax()):
        bad = sum(int((~torch.isfinite(c.float())).sum()) for c in work.flat.split(CHUNK))
        raise errors.weight_not_finite(name, bad)
    scales, zeros = work.quantizer.parts(work.peaks)
    parts = [work.packed, *encode_scales(scales, encoding)]
    if encoding.bits == 8 and encoding.is_uniform and not encoding.zero_point:
        parts[0] = parts[0].view(torch.int8)
    return parts if zeros is None else [*parts, zeros]


def encode_scales(scales: Tensor, encoding: Encoding) -> list[Tensor]:
    """Scales as they are stored: themselves, or codes, nested scales and the offset.

    Double quantization, QLoRA (arXiv:2305.14314), section 3: the mean is taken off, and what is
    left is encoded in 8 bits a block.

    Args:
        scales: float32, flat.
        encoding: Of the tensor that the scales belong to.
    """
    inner = encoding.scale
    if inner is None:
        return [scales.contiguous()]
    offset = scales.mean()
    work = _Work(scales - offset if inner.offset else scales, inner)
    work.run()
    parts = [work.packed, work.peaks[0]]
    return [*parts, offset] if inner.offset else parts


class _Work:
    """One tensor on its way through an encoding.

    Attributes:
        flat: The values, flat and contiguous.
        quantizer: The block arithmetic.
        clip: The quantile of the magnitudes that scales come from; None for the largest.
        peaks: ``[rows, blocks]``, float32: what the quantizer needs to know of each block.
        packed: The codes, packed into bytes.
    """

    def __init__(self, tensor: Tensor, encoding: Encoding) -> None:
        self.encoding = encoding
        self.flat = tensor.contiguous().view(-1)
        self.grid = block_grid(encoding, tuple(tensor.shape))
        self.quantizer = quantizer(encoding)
        self.clip = encoding.clip if encoding.clip != 1.0 else None
        rows, device = self.quantizer.peak_rows, tensor.device
        self.peaks = torch.full((rows, self.grid.count), -math.inf, device=device)
        size = packed_size(self.flat.numel(), encoding.bits)
        self._buffer = torch.empty(0, device=device)
        self.packed = torch.empty(size, dtype=torch.uint8, device=device)

    def run(self) -> None:
        """Fills `peaks` and `packed`."""
        width = run_length(self.grid)
        if width is not None and native.encode(self._runs(width)):
            return
        if width is None or (width % 8 and width > CHUNK // 8 and self.grid.count > 1):
            self._by_rows()
        else:
            self._by_blocks(width)

    def _runs(self, width: int) -> native.Runs:
        """The blocks as runs of the flattened tensor; one shorter than the encoding's is a rest."""
        blocks, rest = divmod(self.flat.numel(), width)
        if self.encoding.is_flat and self.encoding.block[0] > self.flat.numel():
            blocks, rest = 0, self.flat.numel()
        return native.Runs(self.encoding, self.flat, blocks, width, rest, self.packed, self.peaks)

    def _by_blocks(self, width: int) -> None:
        """Blocks that are runs of the flattened tensor, one after the other."""
        runs = self._runs(width)
        blocks, rest = runs.blocks, runs.rest
        if width > CHUNK:
            for block in range(blocks):
                self._long_block(block, block * width, width)
        else:
            # Whole bytes only: an odd width takes blocks by eight (or is the one block there is).
            step = max(1, CHUNK // width if width % 8 == 0 else CHUNK // width // 8 * 8)
            for first in range(0, blocks, step):
                last = min(first + step, blocks)
                x = self._load(first * width, last * width).view(-1, width)
                peaks = self.quantizer.peaks(x)
                if self.clip is not None:
                    peaks = clip_peaks(peaks, row_limits(x, self.clip))
                self.peaks[:, first:last] = peaks
                self._store(first * width, self.quantizer.codes(x, self.peaks[:, first:last, None]))
        if rest:
            start = blocks * width
            self._long_block(blocks, start, rest, cut_short=self.encoding.is_flat)

    def _long_block(self, block: int, start: int, length: int, *, cut_short: bool = False) -> None:
        """One block, looked at piecemeal: first for its peaks, then for its codes."""
        end = start + length
        pieces = [(first, min(first + CHUNK, end)) for first in range(start, end, CHUNK)]
        peaks = self.peaks[:, block : block + 1]
        for piece in pieces:
            peaks.copy_(torch.maximum(peaks, self.quantizer.peaks(self._load(*piece)[None])))
        if self.clip is not None:
            whole = BlockGrid((length,), (length,), (1,))
            limit = block_limits(self.flat[start:end], whole, self.clip, CHUNK)
            peaks.copy_(clip_peaks(peaks, limit))
        if cut_short:
            peaks.clamp_(min=self.quantizer.cut_short_floor)
        for piece in pieces:
            x = self._load(*piece)[None]
            codes = self.quantizer.codes(x, peaks[..., None], cut_short=cut_short)
            self._store(piece[0], codes)

    def _by_rows(self) -> None:
        """Blocks of any shape: rows of the last dimension, eight or more at a time."""
        columns = self.grid.shape[-1]
        extent, groups = self.grid.extents[-1], self.grid.grid[-1]
        owners = _owners(self.grid, self.flat.device)
        per_row = self.peaks.view(len(self.peaks), -1, groups)
        step = max(8, CHUNK // columns // 8 * 8)
        padding = groups * extent - columns
        for first in range(0, len(owners), step):
            owner = owners[first : first + step]
            x = self._load(first * columns, (first + len(owner)) * columns).view(-1, columns)
            x = torch.nn.functional.pad(x, (0, padding)).view(-1, groups, extent)
            peaks = self.quantizer.peaks(x)
            index = owner[None, :, None].expand_as(peaks)
            per_row.scatter_reduce_(1, index, peaks, "amax")
        if self.clip is not None:
            limits = block_limits(self.flat.view(self.grid.shape), self.grid, self.clip, CHUNK)
            self.peaks.copy_(clip_peaks(self.peaks, limits))
        for first in range(0, len(owners), step):
            owner = owners[first : first + step]
            x = self._load(first * columns, (first + len(owner)) * columns).view(-1, columns)
            peaks = per_row[:, owner].repeat_interleave(extent, -1)[..., :columns]
            self._store(first * columns, self.quantizer.codes(x, peaks))

    def _load(self, first: int, last: int) -> Tensor:
        """Elements first to last in float32, in memory that may be overwritten."""
        if self._buffer.numel() < last - first:
            self._buffer = torch.empty(last - first, device=self.flat.device)
        return self._buffer[: last - first].copy_(self.flat[first:last])

    def _store(self, start: int, codes: Tensor) -> None:
        bits = self.encoding.bits
        begin = start * bits // 8
        out = self.packed[begin : begin + packed_size(codes.numel(), bits)]
        pack_codes(codes, bits, out, self.quantizer.fill)


def _owners(grid: BlockGrid, device: torch.device) -> Tensor:
    """For each row of the last dimension, the row of the block grid that it belongs to."""
    owners = torch.zeros((), dtype=torch.int64, device=device)
    for size, extent, count in zip(grid.shape[:-1], grid.extents, grid.grid, strict=False):
        block = torch.arange(size, device=device) // extent
        owners = owners[..., None] * count + block
    return owners.reshape(-1)
