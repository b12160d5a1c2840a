"""The scripts of ``repro/public_scripts.py`` with every method, a few steps each and all of its phases within them."""

import functools
import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest

import retrograde as rg
from retrograde.engine.slots import Method

FILE = Path(__file__).parents[1] / "repro" / "public_scripts.py"
STEPS = 16
METHODS: dict[str, Method] = {
    "exact": rg.Exact(),
    "dither": rg.Dither(),
    "deepfocus": rg.DeepFocus(warmup=4),
    "decorrelate": rg.Decorrelate(rank=8, every=4),
    # One script makes a step more when it resumes, which moves a norm's running statistics.
    "perforate": rg.Perforate(where="*", period=5, max_dendrites=2, norm=None),
    "spectral": rg.Spectral(warmup=4, every=4),
}


def _scripts() -> ModuleType:
    spec = importlib.util.spec_from_file_location(FILE.stem, FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[FILE.stem] = module
    # As when it is run: what the scripts share lies beside them.
    sys.path.insert(0, str(FILE.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FILE.parent))
    return module


scripts = _scripts()


@functools.cache
def plain(script: str) -> float:
    """The loss without a method, which is another one where the method has begun to act."""
    (loss,) = scripts.train(script, None, STEPS, seed=0).losses
    return loss


# The frameworks warn of their own choices; ours stay errors.
@pytest.mark.filterwarnings("ignore", "error::retrograde.errors.RetrogradeWarning")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("script", scripts.SCRIPTS)
def test_trains_reloads_and_folds(script: str, method: str) -> None:
    if package := scripts.missing(script):
        pytest.skip(f"{package} is not installed")
    run = scripts.train(script, METHODS[method], STEPS, seed=0)
    (loss,) = run.losses
    assert math.isfinite(loss)
    if method == "exact":
        assert loss == pytest.approx(plain(script), rel=1e-4)
    else:
        assert loss != plain(script)
    assert run.finite
    assert run.checkpoint == 0
    assert run.folded <= scripts.TOLERANCE


def test_every_method_is_run() -> None:
    assert set(scripts.METHODS) == set(METHODS)
