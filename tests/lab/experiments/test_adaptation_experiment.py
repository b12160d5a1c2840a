import pytest
import torch

from retrograde.errors import OptionError
from retrograde.lab import data
from retrograde.lab.experiments import adaptation
from retrograde.lab.experiments.base import Context

SMALL = {"limit": 256, "epochs": 1, "images": 80, "batch": 40, "severities": (5,)}


@pytest.fixture
def context(tmp_path, monkeypatch):
    """On images made up here: 2,300 to take validation from, 90 to test."""
    generator = torch.Generator().manual_seed(0)

    def split(count):
        labels = torch.arange(count) % 10
        return data.Split(torch.rand(count, 3, 8, 8, generator=generator), labels)

    made = data.Data(
        "made",
        "image",
        split(256),
        split(2100),
        split(90),
        10,
        (3, 8, 8),
        vocabulary=None,
        label_names=None,
    )
    monkeypatch.setattr(data, "load", lambda *args, **kwargs: made)
    folder = tmp_path / "run"
    folder.mkdir()
    return Context(folder)


@pytest.mark.parametrize("variant", ["none", "norm", "tent", "spectral"])
def test_each_variant_gives_its_figures_and_shares_the_network(context, variant):
    first = adaptation.Adaptation(variant=variant, **SMALL).run(context)
    (network,) = context.folder.parent.glob("network-*.pt")
    written = network.stat().st_mtime_ns
    again = adaptation.Adaptation(variant=variant, **SMALL).run(context)
    assert network.stat().st_mtime_ns == written
    for figures in (first, again):
        assert figures.pop("image_seconds") > 0
    assert first == again
    drifts = {"clean_drift", "corrupted_drift"} if variant == "spectral" else set()
    assert set(first) == {"accuracy", "clean_accuracy", *drifts}
    assert all(0 <= value <= 1 for value in first.values())


def test_a_trial_reads_validation_images_alone(context, monkeypatch):
    loaded = data.load("made")
    monkeypatch.setattr(type(loaded), "test", property(lambda self: pytest.fail("read")), raising=False)
    adaptation.Adaptation(variant="none", **SMALL).run(Context(context.folder, trial=True))


def test_without_norms_nothing_can_be_re_estimated(context):
    plain = adaptation.Adaptation(variant="spectral", norms=False, **SMALL).run(context)
    assert 0 <= plain["accuracy"] <= 1
    for variant in ("norm", "tent"):
        with pytest.raises(OptionError, match="no batch normalisation"):
            adaptation.Adaptation(variant=variant, norms=False, **SMALL).run(context)
