"""Permission to use the tile unit: asked for once, and a refusal is one line of the log."""

from __future__ import annotations

import ctypes
import errno
import logging
from types import SimpleNamespace

import pytest

from fxquant.runtime import tile_unit


@pytest.mark.parametrize("granted", [True, False])
def test_the_system_is_asked_once(
    granted: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []

    def syscall(*arguments: int) -> int:
        asked.append(arguments)
        ctypes.set_errno(0 if granted else errno.EPERM)
        return 0 if granted else -1

    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace(syscall=syscall))
    refusal = tile_unit.refusal.__wrapped__
    monkeypatch.setattr(tile_unit, "refusal", tile_unit.functools.lru_cache(refusal))
    with caplog.at_level(logging.WARNING, "fxquant.toolchain"):
        said = [tile_unit.refusal() for _ in range(2)]
    # arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    assert asked == [(158, 0x1023, 18)]
    assert said[0] == said[1]
    if granted:
        assert said[0] == ""
        assert not caplog.records
    else:
        assert "does not permit this process to use the tile unit (Operation not" in said[0]
        assert [record.message for record in caplog.records] == [
            f"{said[0]}: kernels do without it"
        ]
