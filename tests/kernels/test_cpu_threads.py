"""Compiled kernels are kept where that is possible, and work where it is not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba.core import caching, config

from retrograde import host
from retrograde.errors import RetrogradeWarning
from retrograde.kernels import cpu_threads


def double(x: Any) -> Any:
    return 2 * x


def read_only(*_: object) -> None:
    raise OSError(30, "Read-only file system")


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """numba's own places cannot be written, as in a container with a read-only installation and no home."""
    monkeypatch.setenv("RETROGRADE_CACHE", str(tmp_path))
    for locator in (caching.InTreeCacheLocator, caching.UserWideCacheLocator):
        monkeypatch.setattr(locator, "ensure_cache_path", read_only)
    cpu_threads._tell_uncached.cache_clear()


def test_the_cache_folder_stands_in(tmp_path: Path) -> None:
    before = config.CACHE_DIR  # pyright: ignore[reportAttributeAccessIssue]
    made = cpu_threads.serial(double)
    assert made(2) == 4
    assert list((tmp_path / "numba").rglob("*.nbi"))
    again = cpu_threads.serial(double)
    assert again(2) == 4
    assert sum(again.stats.cache_hits.values()) == 1
    assert before == config.CACHE_DIR  # pyright: ignore[reportAttributeAccessIssue]


def test_without_any_place_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching.UserProvidedCacheLocator, "ensure_cache_path", read_only)
    with pytest.warns(RetrogradeWarning, match="compiled kernels cannot be stored.*RETROGRADE_CACHE"):
        made = cpu_threads.jit(double)
    assert np.array_equal(made(np.ones(3)), np.full(3, 2.0))
    assert cpu_threads.serial(double)(2) == 4


@pytest.mark.parametrize("content", [b"", b"half", b"\x80\x05K\x01."])
def test_damaged_files_are_compiled_anew(tmp_path: Path, content: bytes) -> None:
    cpu_threads.serial(double)(2)
    for file in (tmp_path / "numba").rglob("*.nb?"):
        file.write_bytes(content)
    assert cpu_threads.serial(double)(2) == 4


def test_a_full_disk_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching.IndexDataCacheFile, "save", read_only)
    assert cpu_threads.serial(double)(2) == 4


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RETROGRADE_CACHE")
    monkeypatch.setattr(
        Path, "expanduser", lambda self: (_ for _ in ()).throw(RuntimeError("no home directory"))
    )
    with pytest.raises(OSError, match="Not a directory"):
        host.cache_folder("numba").mkdir(parents=True)


def test_what_a_kernel_calls_counts_as_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """numba itself looks at a kernel's own file alone, and would run what was compiled from another file's past."""
    cpu_threads.serial(double)(2)
    monkeypatch.setattr(cpu_threads, "_sources", lambda: (("cpu_rows.py", 1, 2.0),))
    again = cpu_threads.serial(double)
    assert again(2) == 4
    assert not again.stats.cache_hits
