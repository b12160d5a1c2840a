"""Following a turning subspace, and training with orthogonal weights: small runs of the experiments."""

from pathlib import Path

import pytest
import torch

from retrograde.lab.experiments.base import Context
from retrograde.lab.experiments.orthogonal import OrthogonalWeights
from retrograde.lab.experiments.tracking import Tracking, wen_yin
from retrograde.maths import spectral

SMALL = {"dimension": 24, "rank": 3, "rows": 16, "steps": 60, "long": 200}
SPEEDS = {"still": 0.0, "slow": 0.003, "middle": 0.01, "fast": 0.03}


def test_both_forms_of_the_transform_agree() -> None:
    q = torch.linalg.qr(torch.randn(20, 4, dtype=torch.float64))[0]
    m = torch.randn(20, 4, dtype=torch.float64)
    torch.testing.assert_close(wen_yin(q, m), spectral.cayley_step(q, m, 1.0))


def test_updates(tmp_path: Path) -> None:
    """A short step averages noise away where nothing turns; both forms of Cayley's transform track alike."""
    found = {
        update: Tracking(update=update, tau=0.1, **SMALL).run(Context(tmp_path))
        for update in ("qr", "oja", "lie", "wen-yin")
    }
    assert found["lie"]["tracking_error_still"] < 0.5 * found["qr"]["tracking_error_still"]
    assert found["lie"]["captured"] == pytest.approx(found["wen-yin"]["captured"], abs=1e-3)
    assert found["lie"]["captured"] == pytest.approx(found["oja"]["captured"], abs=0.05)
    assert all(figures["orthonormality"] <= 1e-6 for figures in found.values())
    assert found["qr"]["update_flops"] < found["lie"]["update_flops"] < found["wen-yin"]["update_flops"]


def test_faster_is_harder_and_a_window_helps(tmp_path: Path) -> None:
    slow = Tracking(update="lie", tau=0.03, **SMALL).run(Context(tmp_path))
    assert slow["tracking_error_fast"] > 2 * slow["tracking_error_still"]
    one, many = (Tracking(window=window, **SMALL).run(Context(tmp_path)) for window in (1, 8))
    assert many["tracking_error_still"] < one["tracking_error_still"]


def test_trials_have_streams_of_their_own(tmp_path: Path) -> None:
    settings = Tracking(**SMALL)
    trial = settings.run(Context(tmp_path, trial=True))
    assert trial["accuracy"] != settings.run(Context(tmp_path))["accuracy"]
    assert trial == settings.run(Context(tmp_path, trial=True))


@pytest.mark.parametrize("how", ["none", "lie", "parametrization", "penalty", "projection"])
def test_orthogonal_weights(how: str, tmp_path: Path) -> None:
    settings = OrthogonalWeights(
        how=how, data="digits", widths=(24, 24), epochs=4, batch_size=32, learning_rate=5e-3
    )
    found = settings.run(Context(tmp_path))
    assert found["accuracy"] > 0.5
    assert (found["orthonormality"] < 1e-5) == (how in ("lie", "parametrization", "projection"))
