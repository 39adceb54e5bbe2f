"""Names of kernels after the model, and what stands on top of them."""

import pytest
import torch

from fxquant.codegen import Header, KernelSpec
from fxquant.codegen.header import layers
from fxquant.codegen.naming import name_for
from fxquant.codegen.triton.printer import statement
from fxquant.formats import Encoding
from fxquant.runtime import cache, launch
from tests.codegen import harness

ATTENTION = "encoder.layer.{}.attention.self.{}"


@pytest.mark.parametrize(
    ("modules", "spec_name", "weights", "name"),
    [
        (
            ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"],
            "nf4_linear_2816x1024_join_silu_mul",
            2,
            "mlp_gate_up_silu",
        ),
        (
            [f"encoder.layer.{i}.attention.output.dense" for i in range(3)],
            "nf4_linear_384x384_bias_add",
            1,
            "attention_output_dense_add",
        ),
        (
            [ATTENTION.format(i, name) for i in range(2) for name in ("query", "key", "value")],
            "w8a8_linear_384x384_bias_join",
            3,
            "attention_self_query_key_value",
        ),
        (["h.0.attn.c_attn"], "layer_norm_quantize_768_per_token", 1, None),
        (["a.q", "b.k", "c.v", "d.o", "e.x"], "nf4_linear_8x16_relu", 1, "nf4_linear_8x16_relu"),
        (["a.q", "b.k", "c.v"], "layer_norm_quantize_16", 1, "layer_norm_quantize_16"),
        (["0", "2"], "nf4_linear_8x16", 1, "nf4_linear_8x16"),
        ([], "nf4_linear_8x16", 1, "nf4_linear_8x16"),
        (["lambda"], "nf4_linear_8x16", 1, "kernel_lambda"),
        (["a b.ü-x"], "nf4_linear_8x16_mul", 1, "a_b_ü_x_mul"),
        (["x." + "long" * 40], "nf4_linear_8x16", 1, "x_" + ("long" * 40)[:58]),
    ],
)
def test_names(modules, spec_name, weights, name):
    found = name_for(modules, spec_name, weights=weights)
    assert found == (name or "layer_norm_quantize_attn_c_attn")
    assert found.isidentifier()
    assert found == name_for([*modules, *modules], spec_name, weights=weights)


def test_layers_are_counted_together():
    paths = [f"m.layers.{i}.mlp.up" for i in range(12)]
    assert layers([*paths, "x.1", "x.3", "x.7", "y"]) == [
        "m.layers.{0..11}.mlp.up",
        *("x.1", "x.3", "x.7", "y"),
    ]
    assert layers(paths[:2]) == paths[:2]


def spec_of(name="linear"):
    weight = harness.whole(Encoding(8, block=(1, -1)), 24, 32)
    return KernelSpec(weight, "float32", "float32", "float32", name=name)


@pytest.mark.parametrize("target", ["cpp", "triton", "torch"])
def test_a_header_says_whence_a_kernel_comes(target):
    header = Header(("layers.0.up_proj", "layers.1.up_proj"), "int8", ("model.py:7",))
    kernel = launch.make_kernel(spec_of(), target, header)
    assert kernel.name == "up"
    assert kernel.spec == spec_of(), "the name is that of the text alone"
    top = kernel.source[:1500]
    assert "layers.0.up_proj, layers.1.up_proj" in top
    assert "Source: model.py:7" in top
    assert "A call: 864 B, and for a row 224 B and 1.54 k operations" in top


@pytest.mark.parametrize("target", ["cpp", "triton"])
def test_where_a_kernel_is_used_does_not_matter_to_the_cache(target):
    one, other = (
        launch.make_kernel(spec_of(), target, Header((f"{path}.weird",), "int8", (f"{path}.py:1",)))
        for path in ("first", "second.1")
    )
    assert one.source != other.source
    shown = {kernel.name for kernel in (one, other)}
    texts = {cache.code_of(k.source).replace(k.name, "name") for k in (one, other)}
    assert (shown, len(texts)) == ({"first_weird", "weird"}, 1)
    assert len({cache.code_of(k.source) for k in (one, other)}) == (1 if target == "cpp" else 2)
    assert cache.code_of("// a\n// b\nint x; // c\n") == "int x; // c\n"
    assert cache.code_of("// only\n") == "// only\n"


def test_kernels_of_one_spec_are_one_whatever_they_are_called():
    text = spec_of("same").to_json()
    device = torch.device("cpu")
    launch.prepare(text, "cpp", Header(("a.up",)), device)
    first = launch.runner_of(text, "cpp", device)
    launch.prepare(text, "cpp", Header(("b.down",)), device)
    second = launch.runner_of(text, "cpp", device)
    assert first.__self__ is second.__self__


def test_long_statements_are_broken_between_words_only() -> None:
    assert statement("add_0", "acc + value0") == ["add_0 = acc + value0"]
    terms = " + ".join([f"tl.where(x > {number}e-05, -1.5e-07, x)" for number in range(9)])
    long = f"{terms} + f({'x' * 120})"
    first, *lines, last = statement("add_0", long)
    assert (first, last) == ("add_0 = (", ")")
    assert " ".join(line.strip() for line in lines) == long
