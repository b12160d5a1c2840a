import math

import pytest
import torch
from torch import nn

from retrograde.spectral.adaptation.features import channel_axis, rows_of
from retrograde.spectral.adaptation.tracking import Tracker, corrected, source_of
from retrograde.spectral.moments import Moments

D = 6


@pytest.fixture
def source():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(D, D, generator=generator).double()
    return torch.randn(4000, D, generator=generator).double() @ mixing + 2


def tracker_of(rows, rank=None):
    moments, others = Moments(), Moments()
    for part in rows[: len(rows) // 2].split(700):
        moments.add(part)
    others.add(rows[len(rows) // 2 :])
    return Tracker.of(moments.plus(others), rank, 1.0)


def shifted(rows, seed=1):
    mixing = torch.randn(D, D, generator=torch.Generator().manual_seed(seed)).double()
    return rows @ (torch.eye(D) + 0.4 * mixing) - 3


def applied(tracker, rows, correction, tau=0.0, drop=False):
    return corrected(rows, 1, tracker, tracker.map(correction, tau, drop))


def covariance(rows):
    return torch.cov(rows.T, correction=0)


def let_count(tracker, rows, share):
    """Let the rows count for `share` of the stream."""
    tracker.update(rows, math.inf if share == 1 else -math.log1p(-share))


def test_source_statistics_are_the_eigenpairs_of_the_covariance(source):
    tracker = tracker_of(source, rank=2)
    values, vectors = torch.linalg.eigh(covariance(source))
    torch.testing.assert_close(tracker.source_mean, source.mean(0))
    torch.testing.assert_close(tracker.source_values, values.flip(0)[:2])
    torch.testing.assert_close(tracker.source_basis.abs(), vectors.flip(1)[:, :2].abs())
    torch.testing.assert_close(tracker.source_rest, values[:4].mean())


def test_the_rank_follows_the_energy(source):
    moments = Moments()
    moments.add(source)
    values = torch.linalg.eigvalsh(covariance(source)).flip(0)
    expected = int((values.cumsum(0) / values.sum() < 0.8).sum()) + 1
    assert Tracker.of(moments, None, 0.8).source_values.shape == (expected,)
    assert 1 < expected < D


def test_the_stream_is_averaged_by_examples_whatever_its_batches(source):
    """n examples in one batch, or its halves after each other, keep the same share of what was before."""
    once, twice = tracker_of(source), tracker_of(source)
    rows = source[:1].expand(7, -1)
    once.update(rows, 0.7)
    twice.update(rows[:3], 0.3)
    twice.update(rows[3:], 0.4)
    torch.testing.assert_close(once.stream.mean, twice.stream.mean)
    torch.testing.assert_close(once.stream.covariance, twice.stream.covariance)
    tracker = tracker_of(source)
    # The mixture's own moments: rows of the old stream and of the new batch, in the proportion of their weights.
    batch = shifted(source[:1000])
    let_count(tracker, batch, 0.2)
    both = torch.cat([source, batch])
    mean = 0.8 * source.mean(0) + 0.2 * batch.mean(0)
    weights = torch.cat([torch.full((4000,), 0.8 / 4000), torch.full((1000,), 0.2 / 1000)]).double()
    centred = both - mean
    torch.testing.assert_close(tracker.stream.mean, mean)
    torch.testing.assert_close(tracker.stream.covariance, (centred * weights[:, None]).T @ centred)


def test_the_basis_turns_to_the_streams_leading_subspace(source):
    tracker, rows = tracker_of(source, rank=2), shifted(source)
    assert tracker.shift()[0].item() == pytest.approx(0, abs=1e-9)
    for _ in range(60):
        let_count(tracker, rows, 0.5)
    leading = torch.linalg.eigh(covariance(rows))[1][:, -2:]
    assert (leading.T @ tracker.stream.basis).square().sum().item() == pytest.approx(2, abs=1e-6)
    expected = 1 - (tracker.source_basis.T @ leading).square().sum().item() / 2
    assert tracker.shift()[0].item() == pytest.approx(expected, abs=1e-6)
    assert expected > 0.01


def test_displacement_and_spectrum_see_what_drift_does_not(source):
    moved, paler = tracker_of(source), tracker_of(source)
    let_count(moved, source + 1, 1.0)
    let_count(paler, (source - source.mean(0)) * 0.5 + source.mean(0), 1.0)
    assert moved.shift()[0].item() == pytest.approx(0, abs=1e-6)
    assert moved.shift()[1].item() > 0.01
    assert moved.shift()[2].item() == pytest.approx(0, abs=1e-4)
    assert paler.shift()[1].item() == pytest.approx(0, abs=1e-6)
    assert paler.shift()[2].item() == pytest.approx(math.log(4) ** 2, rel=1e-3)


@pytest.mark.parametrize("correction", ["transport", "colour"])
def test_matched_covariances(source, correction):
    tracker, rows = tracker_of(source), shifted(source)
    let_count(tracker, rows, 1.0)
    found = applied(tracker, rows, correction)
    torch.testing.assert_close(found.mean(0), source.mean(0))
    torch.testing.assert_close(covariance(found), covariance(source))


def test_transport_in_a_subspace_is_that_of_the_two_models(source):
    """Against C_s, C_t and T formed whole: the low-rank way loses nothing."""
    from retrograde.maths.spectral import optimal_transport, root

    tracker, rows = tracker_of(source, rank=2), shifted(source)
    for _ in range(3):
        let_count(tracker, rows, 0.7)
    eye = torch.eye(D).double()
    q, t = tracker.source_basis, tracker.stream.basis
    old = tracker.source_rest * eye + (q * (tracker.source_values - tracker.source_rest)) @ q.T
    inner = t.T @ tracker.stream.covariance @ t
    rest = (tracker.stream.covariance.trace() - inner.trace()) / (D - 2)
    new = rest * eye + t @ (inner - rest * torch.eye(2)) @ t.T
    ridge = 0.1 * tracker.source_values.mean()
    expected = optimal_transport(new + ridge * eye, root(old + ridge * eye, 0.5))
    gain, left, right = tracker.map("transport", 0.1, False)
    assert left.shape == (D, 4)
    torch.testing.assert_close(gain * eye + left @ right.T, expected)
    found = corrected(rows, 1, tracker, (gain, left, right))
    torch.testing.assert_close(found, tracker.source_mean + (rows - tracker.stream.mean) @ expected.T)


def test_the_other_corrections_are_their_equations(source):
    tracker, rows = tracker_of(source, rank=2), shifted(source)
    for _ in range(3):
        let_count(tracker, rows, 0.7)
    q, t, eye = tracker.source_basis, tracker.stream.basis, torch.eye(D).double()
    centred, mean = rows - tracker.stream.mean, tracker.source_mean
    along_q, along_t = ((b.T @ tracker.stream.covariance @ b).diagonal() for b in (q, t))
    tau = 0.3 * tracker.source_values.mean()
    u, _, v = torch.linalg.svd(q.T @ t)
    p_s, p_t = q @ q.T, t @ t.T
    rest = (tracker.source_rest / ((tracker.stream.covariance.trace() - along_q.sum()) / (D - 2))).sqrt()
    shrunk = t @ torch.diag(along_t / (along_t + tau)) @ t.T
    scaled = q @ torch.diag(((tracker.source_values + tau) / (along_q + tau)).sqrt()) @ q.T
    expected = {
        ("mean", False): eye,
        ("scale", False): scaled + rest * (eye - p_s),
        ("scale", True): scaled,
        ("align", False): q @ u @ v @ t.T + (eye - p_s) @ (eye - p_t),
        ("align", True): q @ u @ v @ t.T,
        ("shrink", False): shrunk + eye - p_t,
        ("shrink", True): shrunk,
    }
    for (correction, drop), matrix in expected.items():
        found = applied(tracker, rows, correction, 0.3, drop)
        torch.testing.assert_close(found, mean + centred @ matrix.T, rtol=1e-4, atol=1e-4, msg=correction)


@pytest.mark.parametrize("correction", ["transport", "colour", "mean", "scale", "align"])
def test_an_unmoved_stream_is_left_alone(source, correction):
    for rank in (2, D):
        tracker = tracker_of(source, rank)
        torch.testing.assert_close(applied(tracker, source, correction, 1e-3), source)


@pytest.mark.parametrize("rank", [1, 2])
def test_layouts(source, rank):
    """Channels of an image and the last axis of a sequence: the same map of every row."""
    tracker = tracker_of(source, rank)
    let_count(tracker, shifted(source), 0.5)
    affine = tracker.map("transport", 1e-3, False)
    images = torch.randn(2, D, 3, 5).double()
    rows = corrected(images.movedim(1, -1).reshape(-1, D), 1, tracker, affine)
    expected = rows.view(2, 3, 5, D).movedim(-1, 1)
    torch.testing.assert_close(corrected(images, 1, tracker, affine), expected)
    assert torch.equal(rows_of(images, 1, 100), images.movedim(1, -1).reshape(-1, D))
    assert rows_of(images, 1, 7).shape == (7, D)
    assert rows_of(source[0], 0, 7).shape == (1, D)
    torch.testing.assert_close(corrected(images[0], 0, tracker, affine), expected[0])
    lasting = images.to(memory_format=torch.channels_last)
    torch.testing.assert_close(corrected(lasting, 1, tracker, affine), expected)


def test_channel_axis():
    x = torch.zeros(2, 3, 4, 4)
    assert channel_axis(nn.Conv2d(3, 3, 1), x) == 1
    assert channel_axis(nn.Conv2d(3, 3, 1), x[0]) == 0
    assert channel_axis(nn.Conv1d(3, 3, 1), x[0]) == 1
    assert channel_axis(nn.BatchNorm2d(3), x) == 1
    assert channel_axis(nn.Linear(4, 4), x) == 3
    assert channel_axis(nn.LayerNorm(4), x) == 3


@pytest.mark.parametrize("correction", ["transport", "colour"])
def test_all_directions_of_a_few_in_float32(correction):
    """40 directions, 12 of which have any variance: finite, and the covariance of the source comes out."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(12, 40, generator=generator)
    rows, stream = (torch.randn(3000, 12, generator=generator) @ (mixing * size) for size in (1.0, 3.0))
    tracker = tracker_of(rows)
    assert tracker.source_values.shape == (40,)
    for _ in range(5):
        let_count(tracker, stream + 1, 0.9)
    found = applied(tracker, stream + 1, correction, 1e-3)
    torch.testing.assert_close(covariance(found), covariance(rows), rtol=0.02, atol=0.2)
    # The subspace is everything: it cannot turn.
    assert tracker.shift()[0] == 0


def test_dead_and_constant_features_stay_finite():
    constant = torch.ones(50, 4)
    tracker = tracker_of(constant)
    dead = torch.randn(200, 4) * torch.tensor([1.0, 0.0, 1.0, 0.0])
    for one, rows in ((tracker, constant), (tracker_of(dead), dead * 3), (tracker_of(dead), constant)):
        for _ in range(3):
            let_count(one, rows, 0.9)
        assert one.shift().isfinite().all()
        for correction in ("transport", "colour", "mean", "scale", "align", "shrink"):
            assert applied(one, rows, correction, 1e-3).isfinite().all(), correction
    torch.testing.assert_close(applied(tracker, constant, "transport"), constant)


def test_bad_rows_are_not_learnt_from(source):
    tracker = tracker_of(source)
    rows = source.clone()
    rows[3, 2] = math.nan
    let_count(tracker, rows, 0.5)
    assert torch.equal(tracker.stream.mean, tracker.source_mean)


def test_reset_and_what_is_of_the_source(source):
    tracker = tracker_of(source, 3)
    fresh = {k: v.clone() for k, v in tracker.state_dict().items()}
    let_count(tracker, shifted(source), 0.5)
    assert not torch.equal(tracker.stream.mean, fresh["stream.mean"])
    again = Tracker(source_of(tracker))
    tracker.reset()
    for one in (tracker, again):
        assert all(torch.equal(v, fresh[k]) for k, v in one.state_dict().items())
