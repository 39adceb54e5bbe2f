"""What GPUs can do, as far as the choice of tiles goes by it.

Of the families that kernels are made for; `fxquant.runtime.device` describes the GPU that is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Processor:
    """What one processor (NVIDIA's SM, AMD's CU) has for all its programs.

    From CUDA's programming guide, "technical specifications per compute capability", and AMD's
    CDNA 3 instruction set, chapter 3 (four SIMDs of 512 registers a lane and 8 waves).

    Attributes:
        warps: Most at once.
        programs: Most at once.
        registers: Of all lanes.
        register_step: Registers of a lane are given out in steps of so many.
        shared_bytes: Shared memory.
        shared_reserved: Of it, what every program loses to the system.
        program_bytes: Shared memory that one program can have.
        lanes: Of a warp.
        most_registers: Of a lane.
    """

    warps: int
    programs: int
    registers: int
    register_step: int
    shared_bytes: int
    shared_reserved: int
    program_bytes: int
    lanes: int = 32
    most_registers: int = 255

    def resident(self, registers: int, shared_bytes: int, warps: int) -> int:
        """How many programs it holds at once, by what one needs.

        From registers, shared memory and the numbers of programs and warps alone.

        Args:
            registers: Of a lane.
            shared_bytes: Of a program.
            warps: Of a program.
        """
        step, shared = self.register_step, shared_bytes + self.shared_reserved
        taken = max(step, -(-registers // step) * step)
        return min(
            self.programs,
            self.warps // warps,
            self.registers // taken // (warps * self.lanes),
            self.shared_bytes // max(1, shared),
        )


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    Rates are those of data sheets; what a kernel reaches is less, of all variants alike.

    Attributes:
        name: As its driver gives it.
        vendor: Whose assembly its kernels may hold: ``"nvidia"`` or ``"amd"``, ``""`` for neither.
        family: The architecture, a name in `FAMILIES`.
        processor: One of its processors.
        processors: How many there are.
        clock: Cycles a second.
        bandwidth: Bytes a second from memory.
        cache: Bytes a second from the L2 cache.
        cache_bytes: Its size.
        products: Multiply-adds a cycle of one processor's matrix unit, by dtype.
        latency: Seconds from a load to its data, from memory that is in use.
    """

    name: str
    vendor: str
    family: str
    processor: Processor
    processors: int
    clock: float
    bandwidth: float
    cache: float
    cache_bytes: int
    products: Mapping[str, int]
    latency: float = 1.1e-6

    def __hash__(self) -> int:
        return hash((self.name, self.vendor, self.family, self.processors))


def _products(floats: int, integers: int, single: int) -> dict[str, int]:
    """Multiply-adds a cycle; float32 products keep off the matrix unit."""
    return {"bfloat16": floats, "float16": floats, "int8": integers, "float32": single}


_AMPERE = Processor(64, 32, 65536, 8, 164 << 10, 1024, 163 << 10)
_HOPPER = Processor(64, 32, 65536, 8, 228 << 10, 1024, 227 << 10)
_CDNA3 = Processor(32, 32, 4 * 512 * 64, 8, 64 << 10, 0, 64 << 10, 64, 512)

FAMILIES = {
    "sm_80": Gpu(
        "NVIDIA A100", "nvidia", "sm_80", _AMPERE, 108, 1.41e9, 2.0e12, 4.5e12, 40 << 20,
        _products(1024, 2048, 64),
    ),
    "sm_90": Gpu(
        "NVIDIA H100", "nvidia", "sm_90", _HOPPER, 132, 1.755e9, 3.35e12, 11e12, 50 << 20,
        _products(2048, 4096, 128),
    ),
    "sm_100": Gpu(
        "NVIDIA B200", "nvidia", "sm_100", _HOPPER, 148, 1.85e9, 8.0e12, 10e12, 126 << 20,
        _products(4096, 4096, 128),
    ),
    "gfx942": Gpu(
        "AMD Instinct MI300X", "amd", "gfx942", _CDNA3, 304, 2.1e9, 5.3e12, 14e12, 256 << 20,
        _products(1024, 2048, 128),
    ),
}  # fmt: skip
"""One GPU of each architecture that kernels are built for, from NVIDIA's and AMD's white papers.

The H100's L2 rate is what our products of int8 codes took from it; those of the others are
measurements of others, for AMD of the Infinity Cache.
"""

ANY = Gpu(**{**vars(FAMILIES["sm_90"]), "name": "any", "vendor": ""})
"""Where there is no GPU: sizes of an H100, and nothing that only one vendor's assembler takes."""
