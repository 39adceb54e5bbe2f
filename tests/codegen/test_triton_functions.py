"""Printed functions: interpreted on edges and against intervals, and built for GPUs."""

import importlib.util
import itertools

import numpy as np
import pytest
import torch

from fxquant.codegen import intervals
from fxquant.codegen.epilogue import Epilogue, EpilogueNode, EpilogueOperand
from fxquant.codegen.intervals import Interval
from fxquant.codegen.pointwise import FUNCTIONS
from fxquant.codegen.spec import KernelSpec
from fxquant.codegen.triton.functions import PRELUDE
from fxquant.formats import Encoding
from tests.codegen import harness

INF, NAN = float("inf"), float("nan")
EDGES = (0.0, -0.0, 1.0, -1.0, 0.5, -3.0, 1e-40, 1e-6, 88.8, -100.0, 1e20, -3e38, INF, -INF, NAN)
N = 16


def spec_of(name):
    """The function of the operands, and nothing of the product."""
    operands = tuple(EpilogueOperand("mn", "float32") for _ in range(2))
    overload = "Tensor_Tensor" if name == "pow" else "default"
    overload = "Tensor" if name in ("copysign", "fmod") else overload
    references = [f"%{number + 1}" for number in range(2)]
    nodes = [EpilogueNode("aten.mul.Tensor", ("%acc", 0.0))]
    nodes += [EpilogueNode("aten.add.Tensor", ("%0", f"%in{number}")) for number in range(2)]
    nodes.append(EpilogueNode(f"aten.{name}.{overload}", tuple(references[: FUNCTIONS[name]])))
    if name == "signbit":
        nodes.append(EpilogueNode("aten._to_copy.default", ("%3",), (("dtype", "float32"),)))
    weight = harness.whole(Encoding(8, block=(1, -1)), N, 16)
    epilogue = Epilogue(operands, tuple(nodes))
    return KernelSpec(weight, "float32", "float32", "float32", epilogue, name)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_edges_and_errors(name, tmp_path):
    spec = spec_of(name)
    pairs = torch.tensor(list(itertools.product(EDGES, EDGES)))
    drawn = torch.randn(799, 2, generator=torch.Generator().manual_seed(0)) * 4
    pairs = torch.cat([pairs, drawn])
    # Zero plus an operand has lost the sign of a zero.
    x, y = ((0.0 + part).reshape(-1, N).contiguous() for part in pairs.unbind(1))
    tensors = harness.stored(spec.weight.encoding, spec.weight.shape)
    module = harness.load(spec, tmp_path, interpreted=True)
    with np.errstate(all="ignore"):
        got = module.run(torch.ones(len(x), 16), tensors, [x, y])
    node = spec.epilogue.nodes[3]
    op = getattr(torch, name)
    want = op(*(x.double(), y.double())[: FUNCTIONS[name]]).float()
    special = ~want.isfinite() | ~got.isfinite()
    assert torch.equal(got[special].nan_to_num(7.0), want[special].nan_to_num(7.0))
    points = {"%1": Interval(x.double(), x.double()), "%2": Interval(y.double(), y.double())}
    found = intervals.call(node, points)
    if name != "signbit":
        assert not found.excess(got)[~special].any()
        assert found.excess(got + 9 + 2 * got.abs())[~special].any()


def test_functions_stand_for_gpus(tmp_path):
    triton = pytest.importorskip("triton")
    backends = pytest.importorskip("triton.backends.compiler")
    twos = {"copysign", "hypot", "angle", "power"}
    calls = "".join(
        f"    total += {name}({'x, y' if name in twos else 'x'}).to(tl.float32)\n"
        for name in PRELUDE
    )
    text = (
        f"import triton\nimport triton.language as tl\n{''.join(PRELUDE.values())}\n\n"
        "@triton.jit\ndef kernel(p, q, out):\n    i = tl.arange(0, 128)\n"
        f"    x, y = tl.load(p + i), tl.load(q + i)\n    total = x % y\n{calls}"
        "    tl.store(out + i, total)\n"
    )
    (tmp_path / "functions.py").write_text(text)
    place = importlib.util.spec_from_file_location("functions", tmp_path / "functions.py")
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    if not isinstance(module.kernel, triton.JITFunction):
        pytest.skip("Triton interprets here")
    types = dict.fromkeys(("p", "q", "out"), "*fp32")
    for target in (("cuda", 90, 32), ("hip", "gfx942", 64)):
        source = triton.compiler.ASTSource(module.kernel, signature=types)
        built = triton.compile(source, target=backends.GPUTarget(*target))
        assert {"cubin", "hsaco"} & built.asm.keys()
