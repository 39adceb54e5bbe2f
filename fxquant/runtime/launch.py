"""Which kernel runs for a spec on a device."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fxquant import errors
from fxquant.codegen import RENDERERS, Header, Spec, cpp, reference, triton
from fxquant.codegen.cpp import layout
from fxquant.codegen.cpp.plan import Plan
from fxquant.codegen.cpp.restore import can_restore, restore
from fxquant.codegen.naming import name_for
from fxquant.codegen.quantize import QuantizeSpec
from fxquant.codegen.spec import KernelSpec
from fxquant.codegen.work import work_of
from fxquant.formats.codes import stored
from fxquant.runtime import counters, quantizers, tiles, timing, toolchain, tuning, verify
from fxquant.runtime.cpp import CppKernel
from fxquant.runtime.cpp_quantize import CppQuantizer
from fxquant.runtime.cpp_rows import CppRows
from fxquant.runtime.device import gpu
from fxquant.runtime.toolchain import Toolchain
from fxquant.runtime.triton import load_module

LOG = logging.getLogger("fxquant.launch")
SUFFIXES = {"triton": ".py", "cpp": ".cpp", "torch": ".py"}
"""How files with the kernels of each target end."""

Runner = Callable[..., Any]
"""What computes a spec. Of a product: takes the activation, the stored tensors and the further
operands, and gives the result. Of rows to quantize: takes the activation and the further operands,
and gives codes and amax."""


@dataclass(frozen=True)
class Kernel:
    """A kernel's text and what it is for.

    Attributes:
        target: What it is printed for: ``"triton"``, ``"cpp"`` or ``"torch"``.
        name: What it does, as an identifier.
        source: The text: a Python module, or a C++17 file.
        spec: What it computes.
        note: Why it did not run here, or ``""``.
        modules: Paths of the modules whose work it does, as far as they are known.
    """

    target: str
    name: str
    source: str
    spec: Spec
    note: str = ""
    modules: tuple[str, ...] = ()


@functools.lru_cache(maxsize=4096)
def parse_spec(text: str) -> KernelSpec:
    """The product behind an op's argument."""
    return KernelSpec.from_json(text)


@functools.lru_cache(maxsize=1024)
def parse_quantize(text: str) -> QuantizeSpec:
    """The rows to quantize behind an op's argument."""
    return QuantizeSpec.from_json(text)


def parse(text: str) -> Spec:
    """A spec of either kind."""
    return parse_quantize(text) if '"kind":"quantize"' in text else parse_spec(text)


def has_triton() -> bool:
    """Whether the triton package is there."""
    return importlib.util.find_spec("triton") is not None


def runs_triton(device: torch.device) -> bool:
    """Whether a Triton kernel can run on tensors of this device.

    On a CPU it can when it is interpreted (``TRITON_INTERPRET=1``).
    """
    # This is on the path of a call: looking for a package that is not there comes last.
    able = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return able and has_triton()


def obstacle(target: str, device: torch.device) -> str:
    """Why a target cannot run on tensors of a device, in a clause, or ``""``."""
    if target == "triton" and not runs_triton(device):
        if device.type == "cuda":
            return "the triton package is not installed: pip install 'fxquant[triton]'"
        return f"Triton kernels need a GPU and these tensors are on {device.type}"
    if target == "cpp":
        if device.type != "cpu":
            return f"C++ kernels need a CPU and these tensors are on {device.type}"
        return toolchain.obstacle()
    return ""


def usual_target(device: torch.device) -> str:
    """What ``"auto"`` means for tensors of a device."""
    return {"cuda": "triton", "cpu": "cpp"}.get(device.type, "torch")


def make_kernel(spec: Spec, target: str, header: Header, note: str = "") -> Kernel:
    """Prints the kernel of a spec for a target.

    Raises:
        KernelError: The target prints no kernel for the spec.
    """
    name = name_for(header.modules, spec.name, weights=getattr(spec, "weights", 1))
    shown, header = replace(spec, name=name), replace(header, work=work_of(spec).describe())
    if target == "cpp":
        chain = toolchain.toolchain()
        isa = chain.isa if chain is not None else toolchain.host_isa()
        source, comment = cpp.render(shown, header, isa), "//"
    elif target == "triton":
        source, comment = triton.render(shown, header, gpu()), "#"
    else:
        source, comment = RENDERERS[target](shown, header), "#"
    if note:
        source = f"{comment} Not run: {note}\n{source}"
    return Kernel(target, name, source, spec, note, header.modules)


_headers: dict[str, Header] = {}
_runners: dict[tuple[str, str, bool], Runner] = {}
"""By spec, target, and whether the tensors are on the CPU."""


def run(
    x: Tensor, weight: Sequence[Tensor], extra: Sequence[Tensor], spec: str, target: str = "auto"
) -> Tensor:
    """Computes a spec (as JSON).

    Args:
        x: The activation.
        weight: The stored tensors.
        extra: The epilogue's operands, then those of static outliers.
        spec: What to compute.
        target: ``"triton"``, ``"cpp"`` or ``"torch"``; ``"auto"`` is the device's usual one, and
            ``"torch"`` where that cannot run.

    Raises:
        DeviceError: The operands lie on different devices.
        KernelError: The target cannot compute the spec, or an operand does not fit it.
    """
    codes, on_cpu = weight[0], x.is_cpu
    if not (on_cpu and codes.is_cpu) and x.device != codes.device:
        raise errors.device_mismatch(parse_spec(spec).name, x.device, codes.device)
    runner = _runners.get((spec, target, on_cpu))
    if runner is None:
        is_usual, device = target == "auto", x.device
        runner = _usual_runner(spec, device) if is_usual else runner_of(spec, target, device)
    return runner(x, weight, extra)


def run_several(
    x: Tensor, weight: Sequence[Tensor], extra: Sequence[Tensor], spec: str, target: str = "auto"
) -> list[Tensor]:
    """`run` for a spec with further results: all of them, the main one first."""
    return list(run(x, weight, extra, spec, target))


def run_quantize(
    x: Tensor, extra: Sequence[Tensor], spec: str, target: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Quantizes an activation with the kernel of a target.

    Args:
        x: ``[.., k]``, in the spec's `x_dtype`.
        extra: The limit, where the spec has one.
        spec: A `QuantizeSpec` as JSON.
        target: ``"auto"``: the device's own target, ``"torch"`` where that cannot run.

    Returns:
        int8 codes ``[.., k]``, contiguous, and float32 amax ``[..]``.

    Raises:
        KernelError: The target cannot compute the spec, or an operand does not fit it.
    """
    runner = _runners.get((spec, target, x.is_cpu))
    if runner is None:
        device = x.device
        is_usual = target == "auto"
        runner = _usual_runner(spec, device) if is_usual else runner_of(spec, target, device)
    codes, amax = runner(x, extra)
    return codes, amax


def run_rows(
    operands: Sequence[Tensor], limit: Sequence[Tensor], spec: str, target: str = "auto"
) -> list[Tensor]:
    """Makes an activation and quantizes it, in one kernel of a target.

    Args:
        operands: Those of the spec's prologue.
        limit: The limit, where the spec has one.
        spec: A `QuantizeSpec` with a prologue, as JSON.
        target: As for `run_quantize`.

    Returns:
        As `fxquant.codegen.quantize.run_rows`, contiguous.

    Raises:
        KernelError: The target cannot compute the spec, or an operand does not fit it.
    """
    first = operands[0]
    runner = _runners.get((spec, target, first.is_cpu))
    if runner is None:
        device = first.device
        is_usual = target == "auto"
        runner = _usual_runner(spec, device) if is_usual else runner_of(spec, target, device)
    return runner(operands, limit)


def prepare(spec: str, target: str, header: Header, device: torch.device) -> None:
    """Builds a spec's kernel ahead of its first call.

    Args:
        spec: As JSON.
        target: ``"triton"``, ``"cpp"`` or ``"torch"``.
        header: Whom the kernel serves, for its source; the first call for a spec counts.
        device: Where it will run. The tables of Triton kernels have to lie there before a CUDA
            graph is captured.

    Raises:
        KernelError: It cannot be printed, built or loaded.
        FolderError: The kernel cache cannot be written.
    """
    _headers.setdefault(spec, header)
    runner_of(spec, target, device)
    if target == "triton":
        tables = getattr(_triton_module(spec), "prepare", None)
        if tables is not None:
            tables(device)


def tune(spec: str, target: str, device: torch.device) -> None:
    """Tunes a kernel that was built, unless that was done.

    Args:
        spec: As JSON.
        target: ``"triton"`` or ``"cpp"``; kernels of others have no variants.
        device: Where it runs.
    """
    parsed = parse(spec)
    if target == "triton" and isinstance(parsed, KernelSpec):
        tiles.tune(_triton_module(spec), parsed, gpu(), device)
    if target != "cpp":
        return
    chain = toolchain.toolchain()
    found = _build_once(spec, chain) if chain is not None else None
    if chain is not None and isinstance(found, CppKernel):
        tuning.tune(chain, found)


def each_tile(spec: str, rows: int, call: Callable[[], object]) -> None:
    """Calls something with every tile that tuning would try for some rows, to have them built.

    Args:
        spec: A product, as JSON, whose Triton kernel was prepared.
        rows: Of the activation.
        call: Runs it.
    """
    tiles.each(_triton_module(spec), parse_spec(spec), gpu(), rows, call)


def remark(spec: str, target: str) -> str:
    """What else there is to say of a kernel that runs, in a clause, or ``""``.

    Args:
        spec: As JSON.
        target: Whose kernel was prepared.
    """
    if target != "triton" or not isinstance(parse(spec), KernelSpec):
        return ""
    return tiles.remark(_triton_module(spec))


def _usual_runner(spec: str, device: torch.device) -> Runner:
    target = usual_target(device)
    if obstacle(target, device):
        return runner_of(spec, "torch", device)
    try:
        found = runner_of(spec, target, device)
    except errors.KernelError as error:
        if target != "cpp" and not isinstance(error, errors.NotPrintedError):
            raise
        found = runner_of(spec, "torch", device)
    _runners[spec, "auto", device.type == "cpu"] = found
    return found


def runner_of(spec: str, target: str, device: torch.device) -> Runner:
    """What computes a spec from now on: the toolchain may be another than at the last compile.

    Raises:
        KernelError: The target cannot compute the spec.
        FolderError: The kernel cache cannot be written.
    """
    found: Runner
    if target.endswith(timing.TIMED):
        plain = target.removesuffix(timing.TIMED)
        found, rows = runner_of(spec, plain, device), functools.partial(verify.rows_of, parse(spec))
        found = timing.timed((spec, plain.removesuffix(verify.VERIFIED)), found, rows)
    elif target.endswith(verify.VERIFIED):
        plain = target.removesuffix(verify.VERIFIED)
        found = runner_of(spec, plain, device)
        kernel = functools.partial(make_kernel, parse(spec), plain, _headers.get(spec, Header()))
        found = verify.checked((spec, plain), found, _torch_runner(parse(spec)), kernel)
    elif target == "torch" or verify.set_aside_because(spec, target):
        found = _torch_runner(parse(spec))
    else:
        found = _triton_runner(spec) if target == "triton" else cpp_kernel(spec).run
    _runners[spec, target, device.type == "cpu"] = found
    return found


def kernel_of(spec: str, target: str, like: Tensor) -> object:
    """The kernel whose method ran a spec on tensors like one, or None."""
    return getattr(_runners.get((spec, target, like.is_cpu)), "__self__", None)


def _torch_runner(spec: Spec) -> Runner:
    if isinstance(spec, KernelSpec):
        return lambda x, weight, extra: reference.run(spec, x, stored(weight), extra)
    return quantizers.torch_runner(spec)


def _triton_runner(spec: str) -> Runner:
    parsed, run_ = parse(spec), _triton_module(spec).run
    if isinstance(parsed, QuantizeSpec):
        return quantizers.triton_runner(parsed, _triton_module(spec))
    if parsed.outliers is None or parsed.outliers.threshold is None:
        return run_
    if parsed.weights == 1:
        return lambda x, weight, extra: run_(x, weight, extra, counter=counters.of(weight[0], 2))
    parts = len(parsed.weight.encoding.parts)

    def counted(x: Tensor, weight: Sequence[Tensor], extra: Sequence[Tensor]) -> Any:
        each = [counters.of(codes, 2) for codes in weight[::parts]]
        return run_(x, weight, extra, counters=each)

    return counted


@functools.lru_cache(maxsize=4096)
def _triton_module(spec: str) -> ModuleType:
    parsed = parse(spec)
    kernel = make_kernel(parsed, "triton", _headers.get(spec, Header()))
    module = load_module(kernel.name, kernel.source)
    if isinstance(parsed, KernelSpec):
        tiles.use(module, parsed, gpu())
    return module


def cpp_kernel(spec: str) -> CppKernel | CppQuantizer | CppRows:
    """The C++ kernel of a spec, built at most once.

    Raises:
        KernelError: It cannot be printed, built or loaded.
    """
    chain = toolchain.toolchain()
    if chain is None:
        raise errors.no_compiler(toolchain.obstacle())
    found = _build_once(spec, chain)
    if isinstance(found, errors.KernelError):
        raise found
    return found


@functools.lru_cache(maxsize=4096)
def _build_once(
    spec: str, chain: Toolchain
) -> CppKernel | CppQuantizer | CppRows | errors.KernelError:
    """A kernel, or why there is none: the compiler is not asked again at every call."""
    parsed = parse(spec)
    try:
        printed = make_kernel(parsed, "cpp", _headers.get(spec, Header()))
        library = toolchain.build(chain, printed.name, printed.source)
        if isinstance(parsed, QuantizeSpec):
            made = CppQuantizer if parsed.prologue is None else CppRows
            return made(library, parsed, openmp=chain.openmp)
        few_rows = tuning.few_rows(chain, parsed, library)
        plan = Plan(parsed, chain.isa)
        kernel = CppKernel(
            library,
            parsed,
            openmp=chain.openmp,
            few_rows=few_rows,
            form=layout.form(plan),
            restore=functools.partial(restore, plan) if can_restore(plan) else None,
        )
    except errors.KernelError as error:
        LOG.warning("target 'torch' runs instead of 'cpp': %s", error)
        return error
    return kernel
