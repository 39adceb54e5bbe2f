"""Printed C++ holds no definition that it does not use."""

from __future__ import annotations

import re

import pytest

from fxquant.codegen import Header, cpp
from fxquant.codegen.cpp.isa import ISAS
from fxquant.codegen.cpp.unused import without_unused
from tests.codegen.cpp_specs import SPECS

FILE = """\
#include <cmath>

namespace {

// Only by what is not used itself.
constexpr int ONE = 1;
constexpr int TABLE[2] = {1, 2};  // INSIDE
constexpr int INSIDE = 3;

// Two lines
// of words.
INLINE int twice(int x) {
  return ONE * x;
}
INLINE int twice(float x) { return twice(int(x)); }
template <int COUNT> struct Kept {
  int first[COUNT];
};

using word = int;
word used(Kept<1> x) {
  return TABLE[x.first[0]];
}

}  // namespace

extern "C" int entry() { return used({}); }
"""
SMALL = """\
#include <cmath>

namespace {

constexpr int TABLE[2] = {1, 2};  // INSIDE

template <int COUNT> struct Kept {
  int first[COUNT];
};

using word = int;
word used(Kept<1> x) {
  return TABLE[x.first[0]];
}

}  // namespace

extern "C" int entry() { return used({}); }
"""


def test_definitions_go_with_their_comments_and_with_what_only_they_use() -> None:
    assert without_unused(FILE) == SMALL
    assert without_unused(SMALL) == SMALL


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", SPECS)
def test_every_constant_and_type_of_a_kernel_is_used(name: str, isa: str) -> None:
    text = re.sub("//.*", "", cpp.render(SPECS[name], Header(), ISAS[isa]))
    defined = re.findall(r"^(?:constexpr \w+|using|typedef \w+) (\w+)", text, re.MULTILINE)
    assert len(defined) > 20
    assert not [word for word in defined if len(re.findall(rf"\b{word}\b", text)) < 2]
