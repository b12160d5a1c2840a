import os
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Keep what tests decode out of the user's cache, and the user's data folder out of the tests."""
    monkeypatch.setenv("RETROGRADE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("RETROGRADE_DATA", raising=False)


_NAMED = os.environ.get("RETROGRADE_DATA")


@pytest.fixture
def data_dir() -> Path:
    """The folder of real data sets; the test is skipped where it is absent."""
    folder = Path(_NAMED) if _NAMED else Path(__file__).parents[3] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real data sets are not here: set RETROGRADE_DATA")
    return folder
