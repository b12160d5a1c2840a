"""The library alone: what importing it brings, what it does without numba, and what it says of missing extras."""

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import retrograde as rg
from retrograde import extras
from retrograde.errors import MissingPackageError, RetrogradeWarning
from retrograde.kernels import compiled, linear
from retrograde.testing import METHODS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HEAVY = {*extras.LAB, "llvmlite", "numba", "optuna", "pandas", "tensorboard", "torchao", "triton"}
MODULES = {"pillow": "PIL", "scikit-learn": "sklearn"}
"""Names of distributions that are not those of their modules."""


def python(*arguments: str) -> str:
    """What a process of its own prints."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w-]", requirement)[0] for requirement in requirements}


# What is imported.


def test_importing_brings_nothing_heavy() -> None:
    """Beyond torch; FLOP formulas are there all the same when a counter is made after attaching."""
    code = """
import json, sys, torch
before = set(sys.modules)
import retrograde as rg, retrograde.testing
brought = sorted({name.partition(".")[0] for name in set(sys.modules) - before})
counters = "torch.utils.flop_counter" in sys.modules
model = torch.nn.Linear(4, 4)
rg.attach(model, rg.Dither())
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    model(torch.randn(2, 4)).sum().backward()
print(json.dumps([brought, counters, counter.get_total_flops()]))
"""
    brought, counters, flops = json.loads(python("-c", code))
    assert "retrograde" in brought
    assert not HEAVY & set(brought)
    assert not counters
    assert flops == 2 * (2 * 2 * 4 * 4), "forward pass and weight gradient"


def test_the_library_depends_on_three_packages() -> None:
    assert names(PROJECT["dependencies"]) == {"torch", "numpy", "numba"}


def test_the_extra_is_what_its_modules_are_checked_by() -> None:
    found = {
        MODULES.get(name, name.replace("-", "_")) for name in names(PROJECT["optional-dependencies"]["lab"])
    }
    assert found == set(extras.LAB)


# Without numba.


@pytest.fixture(scope="module")
def bare() -> dict[str, Any]:
    """What comes of training without numba and without any extra."""
    return json.loads(python(str(ROOT / "tests" / "bare_training.py"), "--without", *sorted(HEAVY)))


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    return json.loads(python(str(ROOT / "tests" / "bare_training.py")))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_on_the_reference(
    method: str, bare: dict[str, Any], whole: dict[str, Any]
) -> None:
    found = bare["methods"][method]
    assert found["losses"] == pytest.approx(whole["methods"][method]["losses"], rel=1e-5)
    assert found["losses"][-1] < found["losses"][0]
    assert found["kernels"] == found["plan"] == ["reference"]
    assert whole["methods"][method]["plan"] == ["auto"]
    assert found["plain"] == (method != "perforate"), "a layer with dendrites stays one"
    assert found["fold differs by"] < 1e-5
    assert bool(found["keys"]) == (method == "perforate"), "dendrites alone add keys"
    assert found["printed"][:3] == ["layer", "type", "shape"]


@pytest.mark.parametrize("forward", ["exact", "int8"])
def test_large_products_run_on_the_reference(forward: str, bare: dict[str, Any]) -> None:
    """No calibration is made; the gradient is right on average."""
    found = bare["large"][forward]
    assert found["kernels"] == ["kernel_reference"]
    assert found["off"] < found["one off"] / 3


def test_what_is_lost_is_said_once(bare: dict[str, Any], whole: dict[str, Any]) -> None:
    """And at the line that attaches."""
    told, others = (
        [text for text in found["warnings"] if text.startswith("RetrogradeWarning")]
        for found in (bare, whole)
    )
    assert len(told) == 1
    assert "no zeros are skipped" in told[0]
    assert "pip install numba" in told[0]
    assert told[0].endswith("[bare_training.py]")
    assert others == []


@pytest.fixture
def no_numba(monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    """What is known of numba is forgotten before and after: it is missing in between."""
    kept = (compiled.installed, compiled.usable, compiled._warn)
    monkeypatch.setitem(sys.modules, "numba", None)
    for function in kept:
        function.cache_clear()
    yield
    monkeypatch.undo()
    for function in kept:
        function.cache_clear()


@pytest.mark.usefixtures("no_numba")
def test_a_registered_kernel_without_numba_has_no_effect_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_registered", {})
    with pytest.warns(RetrogradeWarning, match=r"'mine' takes no product here.*pip install numba"):
        linear.register_kernel("mine", lambda levels, dense: levels.float() @ dense)


@pytest.mark.usefixtures("no_numba")
def test_what_means_nothing_without_numba_is_refused() -> None:
    with (
        pytest.warns(RetrogradeWarning, match="numba is not installed"),
        pytest.raises(MissingPackageError, match=r"benchmark.*pip install numba"),
    ):
        compiled.require("the benchmark of kernels")


def test_a_broken_numba_is_one_that_is_missing(monkeypatch: pytest.MonkeyPatch, no_numba: None) -> None:
    """It is installed, and made for another numpy."""
    monkeypatch.setattr(compiled, "is_installed", lambda module: True)
    with pytest.warns(RetrogradeWarning, match=r"numba cannot be imported \(ModuleNotFoundError: .*no zeros"):
        assert not compiled.usable()


def session() -> rg.Session:
    return rg.attach(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), rg.Dither(), seed=3)


def test_a_session_that_goes_on_with_numba_says_so() -> None:
    state = {**session().state_dict(), "compiled": False, "calibration": None}
    with pytest.warns(RetrogradeWarning, match=r"saved without numba and goes on with it.*Resume it without"):
        session().load_state_dict(state)


@pytest.mark.usefixtures("no_numba")
def test_a_session_that_goes_on_without_numba_says_so() -> None:
    """A calibration of kernels that are not there is left alone, in a state of an earlier version too."""
    with pytest.warns(RetrogradeWarning, match="numba is not installed"):
        resumed = session()
    state = {**resumed.state_dict(), "calibration": {"for": [1], "weights": {}}}
    del state["compiled"]
    with pytest.warns(RetrogradeWarning, match=r"saved with numba and goes on without it"):
        resumed.load_state_dict(state)


# Without the extra.


def test_a_missing_extra_is_named() -> None:
    """Whichever part is imported first."""
    code = """
import importlib, json, sys
sys.modules.update(pydantic=None, plotly=None)
found = {}
for part in ("lab", "lab.trainer", "report", "report.page", "cli", "cli.main"):
    try:
        importlib.import_module(f"retrograde.{part}")
    except Exception as error:
        found[part] = type(error).__name__, str(error)
print(json.dumps(found))
"""
    found = json.loads(python("-c", code))
    assert set(found) == {"lab", "lab.trainer", "report", "report.page", "cli", "cli.main"}
    for name, message in found.values():
        assert name == MissingPackageError.__name__
        assert "needs plotly, pydantic, which" in message
        assert message.endswith("pip install 'retrograde[lab]'.")


def test_the_command_names_the_extra() -> None:
    """In a message, not in a traceback, and with the exit code of a bad input; as JSON where that is asked for."""
    code = """
import sys
sys.modules["tyro"] = None
from retrograde.__main__ import main
for sys.argv[1:] in (["doctor"], ["doctor", "--json"]):
    assert main() == 3
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert re.fullmatch(r"MissingPackageError: .*tyro.* pip install 'retrograde\[lab\]'\.", line)
    assert json.loads(done.stdout)["error"]["type"] == "MissingPackageError"
