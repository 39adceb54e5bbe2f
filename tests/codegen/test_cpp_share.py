"""Threads that share work: every item once, own parts first, then what others have left."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest

from fxquant.codegen.cpp import support
from fxquant.codegen.cpp.isa import PORTABLE
from fxquant.runtime import toolchain

pytestmark = pytest.mark.skipif(toolchain.compiler() is None, reason="there is no C++ compiler")
# Threads are played one after the other: at a chosen item one stops, and the others come first.
PLAY = """
extern "C" void play(int64_t threads, int64_t count, int64_t works, int64_t stops_at,
                     int64_t* takers) {
  Turn turns[8] = {};
  Share* shares[8];
  for (int64_t i = 0; i < threads; ++i) shares[i] = new Share(i, threads, turns);
  for (int64_t work = 0; work < works; ++work, takers += count) {
    const auto take = [&](int64_t thread, int64_t item) {
      takers[item] = takers[item] < 0 ? thread : 100;
    };
    const auto others = [&] {
      for (int64_t i = 1; i < threads; ++i)
        shares[i]->each(count, [&](int64_t item) { take(i, item); });
    };
    shares[0]->each(count, [&](int64_t item) {
      take(0, item);
      if (item == stops_at) others();
    });
    others();
    for (int64_t i = 0; i < threads; ++i) shares[i]->go_on();
  }
  for (int64_t i = 0; i < threads; ++i) delete shares[i];
}
"""
Play = Callable[[int, int, int, int], list[list[int]]]


@pytest.fixture(scope="module")
def play() -> Play:
    compiler = toolchain.compiler()
    assert compiler is not None
    text = "\n".join([support.text(), support.text(PORTABLE), PLAY])
    chain = toolchain.Toolchain(compiler, PORTABLE, openmp=False)
    function = ctypes.CDLL(str(toolchain.build(chain, "share", text))).play
    function.argtypes = [*[ctypes.c_int64] * 4, ctypes.c_void_p]

    def run(threads: int, count: int, works: int, stops_at: int) -> list[list[int]]:
        takers = (ctypes.c_int64 * (works * count))(*[-1] * (works * count))
        function(threads, count, works, stops_at, takers)
        return [list(takers[start : start + count]) for start in range(0, works * count, count)]

    return run


@pytest.mark.parametrize("count", [1, 2, 7, 16])
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_who_comes_alone_takes_every_item_once(play: Play, threads: int, count: int) -> None:
    """In each of several works: what was counted of one is not left to the one after the next."""
    assert play(threads, count, 5, -1) == [[0] * count] * 5


def test_who_is_late_finds_what_others_left(play: Play) -> None:
    """The first of two threads stops at its second item: the other does its part, then the rest."""
    assert play(2, 8, 3, 1) == [[0, 0, 1, 1, 1, 1, 1, 1]] * 3
    # One that stops in the part of another leaves the rest of all parts.
    assert play(3, 9, 3, 4) == [[0, 0, 0, 0, 0, 1, 1, 1, 1]] * 3


def test_own_parts_come_first(play: Play) -> None:
    """The first of three threads stops at once; the second does its part, then the two others."""
    (takers,) = play(3, 9, 1, 0)
    assert takers == [0, 1, 1, 1, 1, 1, 1, 1, 1]
    (takers,) = play(3, 9, 1, 2)
    assert takers == [0, 0, 0, 1, 1, 1, 1, 1, 1]
