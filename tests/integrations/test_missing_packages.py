"""Nothing is imported before it is asked for, and what is missing is named with the extra that brings it."""

import subprocess
import sys

import pytest

PACKAGES = {"transformers": ("transformers",), "lightning": ("lightning", "pytorch_lightning")}


def run(program: str) -> str:
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_not_imported_before() -> None:
    loaded = run(
        "import sys, retrograde, retrograde.integrations\n"
        "print(sorted({'transformers', 'lightning', 'pytorch_lightning', 'accelerate'} & sys.modules.keys()))"
    )
    assert loaded.strip() == "[]"


@pytest.mark.parametrize("extra", PACKAGES)
def test_missing(extra: str) -> None:
    """As it is where the package is not installed: an error of ours, and an `ImportError`."""
    said = run(
        "import sys\n"
        f"for name in {PACKAGES[extra]}: sys.modules[name] = None\n"
        "from retrograde.errors import RetrogradeError\n"
        "try:\n"
        f"    import retrograde.integrations.{extra}\n"
        "except ImportError as error:\n"
        "    assert isinstance(error, RetrogradeError)\n"
        "    print(error)\n"
    )
    assert f"pip install 'retrograde[{extra}]'" in said


def test_one_of_lightnings_packages_suffices() -> None:
    pytest.importorskip("pytorch_lightning", reason="pytorch_lightning is not installed")
    found = run(
        "import sys\n"
        "sys.modules['lightning'] = None\n"
        "from retrograde.integrations.lightning import RetrogradeCallback\n"
        "import pytorch_lightning\n"
        "print(issubclass(RetrogradeCallback, pytorch_lightning.Callback))"
    )
    assert found.strip() == "True"
