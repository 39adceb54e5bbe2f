"""Pointwise ops in C++: every text compiled in loops for each instruction set, against torch."""

import ctypes
import itertools
import os
import re
import subprocess

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxquant import errors
from fxquant.codegen import pointwise
from fxquant.codegen.cpp import math as helpers
from fxquant.codegen.cpp.isa import ISAS
from fxquant.codegen.cpp.ops import CppOps, constant, epilogue_lines
from fxquant.codegen.epilogue import Epilogue, EpilogueNode, EpilogueOperand
from fxquant.runtime import toolchain
from tests.codegen.cpp_harness import OF_OTHERS
from tests.codegen.test_pointwise import CASES as SHARED_CASES

A, B, FLAG = "%acc", "%in0", "%in1"
INF, NAN = float("inf"), float("nan")
GREATER = ("aten.gt.Scalar", (A, 0))

# name -> nodes that end in a float; operand 0 is a float, operand 1 a boolean.
CASES = {
    **SHARED_CASES,
    "to bfloat16": [("aten._to_copy.default", (A,), {"dtype": "bfloat16"})],
    "to bool": [
        ("aten._to_copy.default", (A,), {"dtype": "bool"}),
        ("aten.where.self", ("%0", A, B)),
    ],
    "flag to float": [
        ("aten._to_copy.default", (FLAG,), {"dtype": "float32"}),
        ("aten.add.Tensor", ("%0", A)),
    ],
    "flag times float": [("aten.mul.Tensor", (A, FLAG))],
    "quotient of flags": [
        GREATER,
        ("aten.add.Tensor", ("%0", 1)),
        ("aten.div.Tensor", (FLAG, "%1")),
        ("aten.add.Tensor", ("%2", A)),
    ],
    "sum of flags": [
        GREATER,
        ("aten.add.Tensor", ("%0", FLAG)),
        ("aten.mul.Tensor", ("%1", A)),
    ],
    "product of flags": [
        GREATER,
        ("aten.mul.Tensor", ("%0", FLAG)),
        ("aten.where.self", ("%1", A, B)),
    ],
    "choice of flags": [
        GREATER,
        ("aten.where.self", (FLAG, "%0", FLAG)),
        ("aten.logical_not.default", ("%1",)),
        ("aten.where.self", ("%2", A, B)),
    ],
    "logical ops of floats": [
        ("aten.logical_and.default", (A, B)),
        ("aten.logical_not.default", (A,)),
        ("aten.logical_or.default", ("%0", "%1")),
        ("aten.where.self", ("%2", B, A)),
    ],
    "equal": [("aten.eq.Tensor", (A, B)), ("aten.where.ScalarOther", ("%0", A, 7))],
    "clamp to infinity": [("aten.clamp.default", (A, 0.5, INF))],
    "maximum with NaN": [("aten.clamp_min.default", (A, NAN))],
    **{
        f"power {y}": [("aten.pow.Tensor_Scalar", (A, y))]
        for y in (-3, -2, -1, -0.5, 0, 0.5, 1, 2.5, 4)
    },
    "power of tensors, signed": [("aten.pow.Tensor_Tensor", (A, B))],
    "relu6": [("aten.hardtanh.default", (A, 0, 6))],
    "gelu in steps": [
        ("aten.mul.Tensor", (A, 0.5)),
        ("aten.mul.Tensor", (A, 0.7071067811865476)),
        ("aten.erf.default", ("%1",)),
        ("aten.add.Tensor", ("%2", 1)),
        ("aten.mul.Tensor", ("%0", "%3")),
    ],
}

# helper -> (float64 function, bound in units of the last place). The bounds are the largest errors
# over every 197th float with and without FMA, rounded up (erf 4.97 and 6.63, tanh 4.42 and 5.23).
FUNCTIONS = {
    "lane_exp": (torch.exp, 1.25),
    "lane_exp2": (torch.exp2, 1.25),
    "lane_log": (torch.log, 1.0),
    "lane_log2": (torch.log2, 2.0),
    "lane_erf": (torch.erf, 7.0),
    "lane_tanh": (torch.tanh, 6.0),
    "lane_sigmoid": (torch.sigmoid, 3.0),
    "lane_silu": (torch.nn.functional.silu, 3.0),
    "lane_expm1": (torch.expm1, 4.0),
    "lane_log1p": (torch.log1p, 4.0),
}
CONSTANTS = (0.0, -0.0, 0.1, -1.5, 1 / 3, 1e-45, 3.4028235e38, 1e39, 16777217.0, 1e-4, INF, -INF)
UNCHANGED = ("logical", "eq", "power 1")
"""Cases that give their argument; two of them choose by what is always true."""
SPECIAL = (0.0, -0.0, 1.0, -1.0, 2.0, -3.0, 0.5, -0.5, 1e-40, -1e-40, 100.0, -100.0, INF, -INF, NAN)


def written(nodes):
    operands = (EpilogueOperand("mn", "float32"), EpilogueOperand("n", "bool"))
    return Epilogue(
        operands,
        tuple(
            EpilogueNode(node[0], node[1], tuple((node[2] if len(node) > 2 else {}).items()))
            for node in nodes
        ),
    )


def by_hand(epilogue, acc, other, flag):
    """The nodes as calls of torch."""
    values = {A: acc, B: other, FLAG: flag}

    def value(item):
        if item in ("float16", "bfloat16", "float32", "bool"):
            return getattr(torch, item)
        return values.get(item, item) if isinstance(item, str) else item

    for number, node in enumerate(epilogue.nodes):
        _, name, overload = node.op.split(".")
        op = getattr(getattr(torch.ops.aten, name), overload)
        values[f"%{number}"] = op(*map(value, node.args), **{k: value(v) for k, v in node.kwargs})
    return values[epilogue.result].float()


def loop(name, params, body):
    return (
        f'extern "C" void {name}({params}, float* out, long n) {{\n'
        f"#pragma omp simd\n    for (long i = 0; i < n; ++i) {{\n        {body}\n    }}\n}}\n"
    )


def source():
    """All texts in one file: a loop a case, a loop a helper, conversions, constants."""
    parts = [f"#include <{name}>\n" for name in helpers.INCLUDES]
    parts += ["namespace {\n", helpers.prelude_text(helpers.PRELUDE), "}\n"]
    floats = "const float* x, const float* y, const uint8_t* flags"
    for number, nodes in enumerate(CASES.values()):
        lines, (result,), used = epilogue_lines(written(nodes), ["in0", "in1"])
        assert used <= helpers.PRELUDE.keys()
        head = "float acc = x[i], in0 = y[i]; bool in1 = flags[i] != 0; (void)in0, (void)in1;"
        unused = [f"(void){line.split()[2]};" for line in lines]
        body = [head, *lines, *unused, f"out[i] = {result};"]
        parts.append(loop(f"case_{number}", floats, "\n        ".join(body)))
    parts += [
        loop(f"run_{name}", "const float* x", f"out[i] = {name}(x[i]);")
        for name in (*FUNCTIONS, "lane_gelu")
    ]
    parts.append(
        loop("run_lane_power", "const float* x, const float* y", "out[i] = lane_power(x[i], y[i]);")
    )
    for short in ("bf16", "fp16"):
        parts.append(
            loop(f"run_from_{short}", "const uint16_t* x", f"out[i] = from_{short}(x[i]);")
        )
        narrow = loop(f"run_to_{short}", "const float* x", f"out[i] = to_{short}(x[i]);")
        parts.append(narrow.replace("float* out", "uint16_t* out"))
    values = ", ".join(constant(value) for value in CONSTANTS)
    parts.append(f'extern "C" const float constants[] = {{{values}}};\n')
    return "".join(parts)


def compiler():
    found = toolchain.compiler()
    if found is None:
        assert not os.environ.get("CI"), "CI must have a C++ compiler"
        pytest.skip("no C++ compiler on this machine")
    return found


class Built:
    """The file for one instruction set: assembly text and a loaded library."""

    def __init__(self, isa, folder):
        chain = toolchain.Toolchain(compiler(), isa, openmp=True)
        self.isa, self.is_gcc = isa, "Free Software Foundation" in chain.compiler.version
        text, assembly = folder / "all.cpp", folder / "all.s"
        text.write_text(source())
        flags = [*chain.flags, "-Wall", "-Wextra", "-Werror"]
        self.command(chain, [*flags, "-S", text, "-o", assembly])
        self.command(chain, ["-shared", "-fopenmp", assembly, "-o", folder / "all.so"])
        self.assembly = assembly.read_text()
        self.library = ctypes.CDLL(str(folder / "all.so"))

    @staticmethod
    def command(chain, args):
        done = subprocess.run(
            [chain.compiler.path, *map(str, args)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[:2000]

    def __call__(self, name, *tensors, dtype=torch.float32):
        tensors = [tensor.contiguous() for tensor in tensors]
        out = torch.empty(tensors[0].shape, dtype=dtype)
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (*tensors, out)]
        getattr(self.library, name)(*pointers, ctypes.c_long(out.numel()))
        return out

    def instructions(self, name):
        """The assembly of one function."""
        found = re.search(
            rf"^{name}:\n(.*?)^\s*\.size\s+{name},", self.assembly, re.MULTILINE | re.DOTALL
        )
        assert found
        return [line.split("#")[0].strip() for line in found[1].splitlines()]


@pytest.fixture(
    scope="module", params=[n for n in ISAS if not ISAS[n].has_tiles and n not in OF_OTHERS]
)
def built(request, tmp_path_factory):
    isa = ISAS[request.param]
    missing = set(isa.features) - toolchain.cpu_features()
    if missing:
        pytest.skip(f"this processor has no {', '.join(sorted(missing))}")
    return Built(isa, tmp_path_factory.mktemp(isa.name))


def all_floats(step):
    """Every step-th float of all bit patterns."""
    bits = np.arange(0, 2**32, step, dtype=np.int64).astype(np.uint32)
    return torch.from_numpy(bits.view(np.float32))


def ulp(value):
    """Units of the last place of float32, of float64 values."""
    _, exponent = torch.frexp(value)
    return torch.ldexp(torch.ones_like(value), exponent.clamp(min=-125) - 24)


@pytest.mark.parametrize("name", CASES)
def test_case(built, name):
    epilogue = written(CASES[name])
    special = torch.tensor(list(itertools.product(SPECIAL, SPECIAL, (0, 1))))
    drawn = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0)) * 2
    acc, other, flag = torch.cat((special, drawn)).unbind(1)
    flag = flag > 0
    want = by_hand(epilogue, acc, other, flag)
    got = built(f"case_{list(CASES).index(name)}", acc, other, flag)
    # Sums cancel: an absolute error of an ulp of the largest drawn values, 4 to 8, thrice.
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1.5e-6, equal_nan=True)
    changed = ~acc.isnan() & (got != acc)
    assert changed.any() == (name not in UNCHANGED)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_accuracy(built, name):
    function, bound = FUNCTIONS[name]
    x = torch.cat((all_floats(9973), torch.tensor(SPECIAL)))
    want, got = function(x.double()), built(f"run_{name}", x)
    rounded = want.float()
    # Quotients by 1 + e^-x end where e^-x overflows: subnormal results become 0.
    lost = 2.0**-126 * x.abs().clamp(1, 100) if name in ("lane_silu", "lane_sigmoid") else 0
    finite = rounded.isfinite() & got.isfinite()
    odd = ~finite & ~((got == rounded) | (got.isnan() & rounded.isnan()))
    assert set(x[odd].tolist()) <= ({-INF} if name == "lane_silu" else set()), x[odd]
    error = ((got.double() - want).abs() - lost)[finite]
    assert (error / ulp(want[finite])).max() <= bound
    assert (got[finite].double() != want[finite]).any()


@pytest.mark.parametrize("name", ["lane_erf", "lane_tanh"])
def test_saturation(built, name):
    x = torch.tensor([10.0, 1e20, INF, 3e38])
    assert built(f"run_{name}", torch.cat((x, -x))).tolist() == [1.0] * 4 + [-1.0] * 4
    assert built(f"run_{name}", all_floats(9973)).nan_to_num().abs().max() == 1


def test_gelu(built):
    """Relative to x, whose ulp is 1.2e-7 of it at most: what the erf of torch's form loses too."""
    x = all_floats(9973)
    x = x[x.isfinite()]
    want, got = torch.nn.functional.gelu(x.double()), built("run_lane_gelu", x)
    error = (got.double() - want).abs()
    assert (error <= 2.5e-7 * x.abs().double() + 2.0**-149).all()
    above = x > 0
    assert (error[above] / ulp(want[above])).max() <= 4
    assert built("run_lane_gelu", torch.tensor([-6.0, -1e30, INF])).tolist() == [0.0, 0.0, INF]


def test_power(built):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(200000, generator=generator).mul(8).sub(4).exp2()
    x = x * torch.where(torch.rand(200000, generator=generator) < 0.1, -1, 1)
    y = torch.randn(200000, generator=generator) * 20
    y = torch.where(x < 0, y.round(), y)
    want, got = torch.pow(x.double(), y.double()), built("run_lane_power", x, y)
    finite = want.float().isfinite()
    assert got[~finite].equal(want[~finite].float())
    # In double, rounded once: half an ulp, and the fits' 1e-10 of the exponent's 150.
    assert ((got.double() - want).abs() / ulp(want))[finite].max() <= 0.51


@pytest.mark.parametrize(("short", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_halves(built, short, dtype):
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    want = halves.view(dtype).float()
    got = built(f"run_from_{short}", halves)
    assert got.isnan().equal(want.isnan())
    assert got[~want.isnan()].view(torch.int32).equal(want[~want.isnan()].view(torch.int32))

    # Values, the middles between neighbours, what lies next to both, and every 9973rd float.
    bits = want[want.isfinite()].view(torch.int32)
    step = 2**15 if dtype is torch.bfloat16 else 2**12
    near = [bits + offset for offset in (0, 1, -1, step, step - 1, step + 1)]
    x = torch.cat([*(part.view(torch.float32) for part in near), all_floats(9973)])
    want, got = x.to(dtype), built(f"run_to_{short}", x, dtype=torch.int16).view(dtype)
    assert got.isnan().equal(x.isnan())
    assert got[~x.isnan()].view(torch.int16).equal(want[~x.isnan()].view(torch.int16))


def test_loops_are_vectors(built):
    if not built.is_gcc or not toolchain.cpu_features():
        pytest.skip("the assembly is read as GCC writes it for x86")
    register = {"avx512": "%zmm", "avx2": "%ymm", "portable": "%xmm"}[built.isa.name]
    names = [*FUNCTIONS, "lane_gelu", *helpers.halves.PRELUDE]
    names += [] if built.isa.name == "portable" else ["lane_power"]
    cases = [
        "gelu",
        "gelu tanh",
        "gelu in steps",
        "silu",
        "sigmoid",
        "tanh",
        "relu",
        "flag times float",
    ]
    cases += ["sum of flags", "logical ops of floats"]
    labels = [f"run_{name}" for name in names]
    labels += [f"case_{list(CASES).index(name)}" for name in cases]
    arithmetic = "mul|fm?add|add|sub|and|tern|min|cmp|sll"
    packed = re.compile(rf"(?!\S*s[sd]\s)v?p?({arithmetic})\S*\s.*{register}")
    for label in labels:
        lines = built.instructions(label)
        assert not [line for line in lines if line.startswith("call")], label
        assert [line for line in lines if packed.match(line)], label
    assert any("call" in line for line in built.instructions(f"case_{list(CASES).index('sin')}"))


def test_gelu_takes_thirty_instructions(built):
    if not built.is_gcc or built.isa.name != "avx512":
        pytest.skip("counted in GCC's assembly for AVX512")
    lines = [line for line in built.instructions("run_lane_gelu") if "%zmm" in line]
    assert len([line for line in lines if "broadcast" not in line]) <= 30


def test_constants(built):
    got = (ctypes.c_float * len(CONSTANTS)).in_dll(built.library, "constants")
    with np.errstate(over="ignore"):
        want = np.array(CONSTANTS).astype(np.float32)
    assert np.array(got, np.float32).view(np.int32).tolist() == want.view(np.int32).tolist()


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_constants_read_back(value):
    text = constant(value)
    assert text.value == value
    assert np.float32(text.strip("()").removesuffix("f")) == np.float32(value)
    assert text.startswith("(-") == (np.signbit(value).item())


def test_helpers_stand_alone(tmp_path):
    chain = toolchain.Toolchain(compiler(), ISAS["portable"], openmp=False)
    text = "".join(f"#include <{name}>\n" for name in helpers.INCLUDES)
    for name in helpers.PRELUDE:
        printed = helpers.prelude_text([name])
        assert printed.count(f" {name}(") >= 1
        text += f"namespace only_{name} {{\n{printed}}}\n"
    (tmp_path / "alone.cpp").write_text(text)
    Built.command(chain, ["-std=c++17", "-fsyntax-only", tmp_path / "alone.cpp"])
    assert helpers.prelude_text([]) == ""
    assert helpers.prelude_text(["lane_silu", "lane_silu", "madd"]).count(" madd(float a") == 1
    assert "lane_erf" not in helpers.prelude_text(["lane_silu"])


def test_every_op_is_spelled():
    tested = {node[0].split(".")[1] for nodes in CASES.values() for node in nodes}
    assert set(pointwise.OPS) - tested == {"convert_element_type"}
    convert = EpilogueNode("aten.convert_element_type.default", (A, "bfloat16"))
    assert CppOps().call(convert, {A: "acc"}) == "from_bf16(to_bf16(acc))"


def test_lines():
    nodes = [("aten.add.Tensor", (A, B), {"alpha": -2}), ("aten.gt.Scalar", ("%0", 0.1))]
    lines, (result,), used = epilogue_lines(written(nodes), ["bias", "mask"], "total")
    assert lines == [
        "const float add_0 = total + (bias * (-2.0f));",
        "const bool gt_1 = add_0 > 0.1f;",
    ]
    assert (result, used) == ("gt_1", set())
    assert epilogue_lines(Epilogue(), [], "total") == ([], ["total"], set())


def test_unknown_ops_are_errors():
    with pytest.raises(errors.KernelError, match=r"aten.cumsum.default has no entry for C\+\+"):
        epilogue_lines(written([("aten.cumsum.default", (A, 0))]), ["in0", "in1"])
