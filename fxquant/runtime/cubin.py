"""Builds a printed Triton module's kernels for a GPU that is not there, and reads what came out.

Registers, spills, shared memory and the presence of instructions are properties of the machine
code, so they can be checked on any machine: ``ptxas`` and ``cuobjdump`` come with Triton, and for
AMD the assembler's own notes say the same.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from fxquant import errors
from fxquant.codegen.triton.gpu import FAMILIES

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
"""Names of the devices, and Triton's backend, architecture and warp size for each."""


@dataclass(frozen=True)
class Build:
    """One kernel with its constants, ready to be built.

    Attributes:
        name: The kernel's, with the number of rows it is picked for; a step's is the step's.
        kernel: The Triton function.
        constants: Values of its compile-time parameters.
        options: Warps and stages.
    """

    name: str
    kernel: Any
    constants: Mapping[str, int]
    options: Mapping[str, int]


@dataclass(frozen=True)
class Binary:
    """What the machine code of one kernel needs.

    Attributes:
        registers: Registers of one thread.
        spills: Bytes (NVIDIA) or registers (AMD) of one thread that went to memory.
        shared_bytes: Shared memory of one program, in bytes.
        listing: Its instructions with their modifiers, as they stand in the code.
        warps: Warps of one program.
        target: What it was built for, a name in `TARGETS`.
        in_flight: Products of Hopper's matrix unit that its waits leave under way, at most.
    """

    registers: int
    spills: int
    shared_bytes: int
    listing: Sequence[str]
    warps: int
    target: str
    in_flight: int

    def count(self, pattern: str) -> int:
        """Occurrences of instructions that match a regular expression in full, or up to a dot.

        So ``"HGMMA"`` counts all shapes of it.
        """
        return sum(1 for name in self.listing if re.fullmatch(rf"(?:{pattern})(?:\..*)?", name))

    @property
    def occupancy(self) -> float:
        """Warps that a processor can hold at once, over the most that it can of any program.

        From registers, shared memory and the number of programs alone.
        """
        limits = FAMILIES[self.target].processor
        programs = limits.resident(self.registers, self.shared_bytes, self.warps)
        return programs * self.warps / limits.warps


def builds(module: ModuleType) -> Iterator[Build]:
    """All kernels that a module printed by `fxquant.codegen.triton` can launch."""
    for rows, (kernel, constants, options) in getattr(module, "VARIANTS", {}).items():
        yield Build(f"{kernel.__name__}_{rows}", kernel, constants, options)
    for split, (kernel, constants, options) in getattr(module, "REDUCTIONS", {}).items():
        yield Build(f"{kernel.__name__}_{split}", kernel, constants, options)
    for step, (kernel, constants, options) in getattr(module, "STEPS", {}).items():
        name = kernel.__name__.rpartition("_")[0]
        yield Build(f"{name}_{step}", kernel, constants, options)


def compile_for(target: str, module: ModuleType, build: Build) -> Binary:
    """Builds one kernel.

    Args:
        target: A name in `TARGETS`.
        module: A module printed by `fxquant.codegen.triton`, imported without interpretation.
        build: One of its `builds`.

    Raises:
        KernelError: Triton is not installed.
    """
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
    except ImportError as error:
        raise errors.no_triton() from error

    names = build.kernel.arg_names
    types = {name: module.TYPES.get(name, "constexpr") for name in names}
    aligned = [i for i, name in enumerate(names) if _is_aligned(name, types[name])]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(build.kernel, types, dict(build.constants), attributes)
    found = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=dict(build.options))
    if "cubin" in found.asm:
        read = _read_cubin(found.asm["cubin"])
    else:
        read = _read_amdgcn(found.asm["amdgcn"])
    registers, spills, listing, in_flight = read
    return Binary(
        registers,
        spills,
        found.metadata.shared + _set_aside(found.asm.get("ptx", "")),
        listing,
        found.metadata.num_warps,
        target,
        in_flight,
    )


def _is_aligned(name: str, kind: str) -> bool:
    """Whether torch's allocator (pointers) or usual sizes (strides) make it divisible by 16."""
    return kind.startswith("*") or name.startswith("x_stride")


def _set_aside(ptx: str) -> int:
    """Bytes of shared memory that a kernel's assembly has for itself, beside Triton's."""
    return sum(map(int, re.findall(r"\.shared \.align \d+ \.b8 \w+\[(\d+)\]", ptx)))


def _read_cubin(cubin: bytes) -> tuple[int, int, Sequence[str], int]:
    """Registers, spilled bytes, instructions, and products that waits leave under way."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _cuobjdump("--dump-resource-usage", path)
        listing = _cuobjdump("-sass", path)
    registers = re.search(r"REG:(\d+)", usage)
    local = re.search(r"LOCAL:(\d+)", usage)
    stack = re.search(r"STACK:(\d+)", usage)
    lines = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", listing)
    spills = sum(int(found[1]) for found in (local, stack) if found)
    waits = re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x[0-9a-f]+)", listing)
    in_flight = max((int(count, 16) for count in waits), default=0)
    return int(registers[1]) if registers else 0, spills, lines, in_flight


def _cuobjdump(option: str, path: Path) -> str:
    from triton import knobs

    tool = knobs.nvidia.cuobjdump.path
    return subprocess.run(
        [tool, option, str(path)], capture_output=True, text=True, check=True
    ).stdout


def _read_amdgcn(text: str) -> tuple[int, int, Sequence[str], int]:
    notes = {key: int(value) for key, value in re.findall(r"\.(\w+_count):\s+(\d+)", text)}
    lines = re.findall(r"^\s+([vs]_\w+|ds_\w+|global_\w+|buffer_\w+)\b", text, re.MULTILINE)
    spills = notes.get("vgpr_spill_count", 0) + notes.get("sgpr_spill_count", 0)
    return notes.get("vgpr_count", 0), spills, lines, 0
