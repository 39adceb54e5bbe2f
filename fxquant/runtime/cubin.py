"""Builds a printed Triton module's kernels for a GPU that is not there, and reads what came out.

Registers, spills, shared memory and the presence of instructions are properties of the machine
code, so they can be checked on any machine: ``ptxas`` and ``cuobjdump`` come with Triton, and for
AMD the assembler's own notes say the same.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from fxquant import errors

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
        name: The kernel's, with the number of rows it is picked for.
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
        instructions: How often each instruction occurs, without its modifiers.
    """

    registers: int
    spills: int
    shared_bytes: int
    instructions: Mapping[str, int]

    def count(self, pattern: str) -> int:
        """Occurrences of the instructions that match a regular expression in full."""
        found = (n for name, n in self.instructions.items() if re.fullmatch(pattern, name))
        return sum(found)


def builds(module: ModuleType) -> Iterator[Build]:
    """All kernels that a module printed by `fxquant.codegen.triton` can launch."""
    for rows, (kernel, constants, options) in getattr(module, "VARIANTS", {}).items():
        yield Build(f"{kernel.__name__}_{rows}", kernel, constants, options)
    for split, (kernel, constants, options) in getattr(module, "REDUCTIONS", {}).items():
        yield Build(f"{kernel.__name__}_{split}", kernel, constants, options)
    for kernel, constants, options in getattr(module, "STEPS", {}).values():
        yield Build(kernel.__name__, kernel, constants, options)


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
        return _read_cubin(found.asm["cubin"], found.metadata.shared)
    return _read_amdgcn(found.asm["amdgcn"], found.metadata.shared)


def _is_aligned(name: str, kind: str) -> bool:
    """Whether torch's allocator (pointers) or usual sizes (strides) make it divisible by 16."""
    return kind.startswith("*") or name.startswith("x_stride")


def _read_cubin(cubin: bytes, shared: int) -> Binary:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _cuobjdump("--dump-resource-usage", path)
        listing = _cuobjdump("-sass", path)
    registers = re.search(r"REG:(\d+)", usage)
    local = re.search(r"LOCAL:(\d+)", usage)
    stack = re.search(r"STACK:(\d+)", usage)
    lines = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", listing)
    spills = sum(int(found[1]) for found in (local, stack) if found)
    return Binary(int(registers[1]) if registers else 0, spills, shared, Counter(lines))


def _cuobjdump(option: str, path: Path) -> str:
    from triton import knobs

    tool = knobs.nvidia.cuobjdump.path
    return subprocess.run(
        [tool, option, str(path)], capture_output=True, text=True, check=True
    ).stdout


def _read_amdgcn(text: str, shared: int) -> Binary:
    notes = {key: int(value) for key, value in re.findall(r"\.(\w+_count):\s+(\d+)", text)}
    instructions = Counter(
        re.findall(r"^\s+([vs]_\w+|ds_\w+|global_\w+|buffer_\w+)\b", text, re.MULTILINE)
    )
    spills = notes.get("vgpr_spill_count", 0) + notes.get("sgpr_spill_count", 0)
    return Binary(notes.get("vgpr_count", 0), spills, shared, instructions)
