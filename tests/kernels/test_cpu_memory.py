"""Memory that calls share one after the other, and never at a time."""

import gc
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from retrograde import host
from retrograde.kernels import cpu_memory

SIZE = 1 << 20


def test_memory_is_lent_again_once_no_view_of_it_is_left() -> None:
    first = cpu_memory.lent((SIZE,), np.float32)
    address = first.ctypes.data
    view = torch.from_numpy(first)[5:9]
    del first
    gc.collect()
    assert cpu_memory.lent((SIZE,), np.float32).ctypes.data != address
    view.fill_(3)
    assert view.tolist() == [3, 3, 3, 3]
    del view
    gc.collect()
    # Somewhat smaller, and of another type.
    again = cpu_memory.lent((SIZE - 1000,), np.int32)
    others = [cpu_memory.lent((SIZE,), np.float32) for _ in range(2)]
    assert address in [one.ctypes.data for one in (again, *others)]
    assert len({one.ctypes.data for one in (again, *others)}) == 3


def test_lent_memory_has_the_shape_and_type_that_were_asked_for() -> None:
    for shape in ((), (0, 3), (7,), (300, 1000), (2, 300, 500)):
        found = cpu_memory.lent(shape, np.int16)
        assert (found.shape, found.dtype) == (shape, np.int16)
        found[...] = 5
        assert (found == 5).all()


def test_little_is_kept() -> None:
    held = [cpu_memory.lent((SIZE,), np.int8) for _ in range(20)]
    held.clear()
    gc.collect()
    kept = cpu_memory._returned[SIZE]
    assert 1 <= len(kept) <= 4


def test_nothing_is_said_at_the_end_of_a_process_that_still_holds_some() -> None:
    code = "from retrograde.kernels import cpu_memory as m; import sys; sys.held = m.lent((1 << 20,), 'f4')"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stderr == ""


def test_a_users_choice_of_how_glibc_keeps_memory_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    host.keep_freed_memory.cache_clear()
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")
    assert not host.keep_freed_memory()
    host.keep_freed_memory.cache_clear()
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_")
    if not any(name in os.environ for name in host._KEPT_BY_USER) and "glibc" in os.confstr(
        "CS_GNU_LIBC_VERSION"
    ):
        assert host.keep_freed_memory()
