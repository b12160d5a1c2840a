import copy
import io
import pickle
import threading

import pytest
import torch
from torch import nn

from retrograde import spectral
from retrograde.errors import (
    AttachError,
    NoEffectError,
    OptionError,
    PatternError,
    RetrogradeWarning,
    StateError,
)
from retrograde.spectral.adaptation.gate import bound


class Net(nn.Module):
    """Convolution, norm, a shared linear layer, head."""

    def __init__(self, norm=True):
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3)
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.fc = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        h = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.head(self.fc(self.fc(h).relu()))


def images(count=20, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    # Correlated pixels, as those of images are.
    coarse = torch.randn(count * size, 2, 4, 4, generator=generator)
    return list(nn.functional.interpolate(coarse, (8, 8), mode="bilinear").split(size))


def paler(x):
    return 0.3 * x + 1.5


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = Net()
    for x in images():
        net(x)
    return net.eval()


@pytest.fixture
def adapted(model):
    return spectral.adapt(model, images(60))


def distance(a, b):
    return (a - b).square().mean().sqrt().item()


def test_a_clean_stream_leaves_the_gate_closed_and_the_model_bit_for_bit(model, adapted):
    with torch.no_grad():
        for x in images(40, seed=1):
            assert torch.equal(adapted(x), model(x))
    assert not adapted.active
    assert list(adapted.drift) == ["conv", "fc"]


@pytest.mark.parametrize("batches", [10, 14, 20])
@pytest.mark.parametrize("seed", range(4))
def test_few_source_batches_do_not_open_it_on_clean_data(batches, seed):
    """A long stream of it, at every step; and what is clearly shifted opens it all the same."""
    torch.manual_seed(seed)
    model = Net()
    for x in images(seed=10 + seed):
        model(x)
    adapted = spectral.adapt(model.eval(), images(batches, seed=20 + seed))
    with torch.no_grad():
        for x in images(200, seed=30 + seed):
            adapted(x)
            assert not adapted.active
        for x in images(20, seed=40 + seed):
            adapted(paler(x))
    assert adapted.active


@pytest.mark.parametrize("batches", [10, 100])
@pytest.mark.parametrize("seed", range(3))
def test_a_window_as_long_as_the_source_stays_closed_on_clean_data(batches, seed):
    """The stream that limits are taken from must have forgotten how it began; and the gate closes again."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 3)).eval()
    adapted = spectral.adapt(model, [torch.randn(16, 20) for _ in range(batches)], window=1000)
    with torch.no_grad():
        for _ in range(300):
            adapted(torch.randn(16, 20))
            assert not adapted.active
        for _ in range(100):
            adapted(3 * torch.randn(16, 20) + 2)
        assert adapted.active
        for _ in range(400):
            adapted(torch.randn(16, 20))
        assert not adapted.active


def test_uncertainty_of_a_variance():
    """Against quantiles of chi-square, 3.325, 10.12 and 77.05, of 9, 19 and 99 degrees of freedom."""
    for freedom, quantile in ((9, 3.325), (19, 10.117), (99, 77.046)):
        assert bound(freedom) == pytest.approx(freedom / quantile, rel=4e-3)


def test_readings_are_the_sources_own(model):
    """Twice of many batches; of few ones a fixed number, more often of less than three windows.

    The model and torch's random numbers stay as they were.
    """

    class Counting(list):
        read = 0

        def __iter__(self):
            self.read += 1
            return super().__iter__()

    for count, read in ((100, 2), (50, 6), (10, 20)):
        source, state = Counting(images(count)), torch.get_rng_state()
        spectral.adapt(model, source)
        assert source.read == read
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("correction", ["transport", "colour", "scale"])
@pytest.mark.parametrize("at", ["output", "input"])
def test_a_shifted_stream_opens_it_and_is_brought_back(model, correction, at):
    adapted = spectral.adapt(model, images(60), correction=correction, at=at, window=64)
    with torch.no_grad():
        for x in images(20, seed=1):
            adapted(paler(x))
        assert adapted.active
        found = [(adapted(paler(x)), model(paler(x)), model(x)) for x in images(5, seed=2)]
    after = sum(distance(a, c) for a, _, c in found)
    before = sum(distance(b, c) for _, b, c in found)
    assert after < (0.5 if at == "output" else 0.7) * before


def test_the_gate_closes_again_where_the_stream_is_clean(model, adapted):
    with torch.no_grad():
        for x in images(10, seed=1):
            adapted(paler(x))
        assert adapted.active
        for x in images(60, seed=3):
            adapted(x)
        assert not adapted.active
        assert adapted.limits[0] > adapted.limits[1] > 0


@pytest.mark.parametrize("far", [3.0, 300.0])
def test_it_closes_as_soon_after_a_far_off_stream_as_after_a_near_one(far):
    """What the stream's own averages forget slowly does not hold it open: after three windows they begin afresh."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 3)).eval()
    source = [torch.randn(16, 20) for _ in range(100)]
    adapted = spectral.adapt(model, source, window=100)
    with torch.no_grad():
        for _ in range(20):
            adapted(far * torch.randn(16, 20) + far)
            assert adapted.active
        count = 0
        while adapted.active and count < 40:
            adapted(torch.randn(16, 20))
            count += 1
        assert 18 < count < 24  # of 16 rows: three windows, and at most a few batches before the trial begins
        for _ in range(50):
            x = torch.randn(16, 20)
            assert torch.equal(adapted(x), model(x))


def test_a_batch_of_one_and_one_image_alone(model, adapted):
    with torch.no_grad():
        for x in images(20, size=4, seed=1):
            for one in x.split(1):
                assert adapted(paler(one)).shape == (1, 3)
    assert adapted.active
    adapted.gate = "open"
    conv = spectral.adapt(nn.Sequential(nn.Conv2d(2, 3, 3)).eval(), images(), layers="0")
    assert conv(images()[0][0]).shape == (3, 6, 6)


def test_all_directions_of_layers_with_fewer_features_of_their_own():
    """``energy=1``, and 20 inputs before 96 outputs: every direction counts, and what is corrected is finite."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 3)).eval()
    source = [torch.randn(32, 20) for _ in range(40)]
    adapted = spectral.adapt(model, source, energy=1)
    assert [shift.rank for shift in adapted.report()] == [96, 96]
    with torch.no_grad():
        for x in source:
            assert torch.equal(adapted(x), model(x))
        for x in source:
            found = adapted(3 * x + 1)
    assert adapted.active
    assert adapted.drift == {"0": 0.0, "2": 0.0}
    assert distance(found, model(x)) < 0.5 * distance(model(3 * x + 1), model(x))


def test_gates_by_hand(model, adapted):
    x = paler(images(1, seed=1)[0])
    adapted.gate = "closed"
    for _ in range(5):
        assert torch.equal(adapted(x), model(x))
    assert max(shift.level for shift in adapted.report()) > float(adapted.limits[0])
    adapted.gate = "open"
    assert not torch.equal(adapted(x), model(x))
    adapted.reset()
    assert all(shift.displacement == pytest.approx(0, abs=1e-9) for shift in adapted.report())
    assert all(1 <= shift.rank < 6 for shift in adapted.report())


def test_the_model_is_as_it_was(model):
    before, keys = copy.deepcopy(model.state_dict()), set(model.__dict__)
    adapted = spectral.adapt(model, images())
    adapted(paler(images(1)[0]))
    assert adapted.unwrap() is model
    assert set(model.__dict__) == keys
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_training_mode_is_the_models_own(model, adapted):
    adapted.train()
    adapted.gate = "open"
    x = paler(images(1)[0])
    torch.testing.assert_close(adapted(x), copy.deepcopy(model).train()(x))
    assert all(shift.displacement == pytest.approx(0, abs=1e-9) for shift in adapted.report())
    model.train()
    assert spectral.adapt(model, images()).training
    assert model.training


def test_state_is_saved_with_the_model(model, adapted):
    with torch.no_grad():
        for x in images(5, seed=1):
            adapted(paler(x))
    x = paler(images(1, seed=2)[0])
    file = io.BytesIO()
    torch.save(adapted.state_dict(), file)
    file.seek(0)
    other = spectral.adapt(Net().eval(), images(30, seed=5), rank=2)
    other.load_state_dict(torch.load(file, weights_only=True))
    copies = [other, copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))]
    with torch.no_grad():
        expected = adapted(x)
        for one in copies:
            assert one.active
            assert torch.equal(one(x), expected)


def test_ready_statistics(model, adapted):
    file = io.BytesIO()
    torch.save(adapted.statistics(), file)
    file.seek(0)
    again = spectral.adapt(model, torch.load(file, weights_only=True))
    x = paler(images(1, seed=1)[0])
    with torch.no_grad():
        torch.testing.assert_close(again(x), adapted(x))
    assert again.drift == pytest.approx(adapted.drift, abs=1e-5)
    assert list(spectral.adapt(model, adapted.statistics(), layers="fc").drift) == ["fc"]
    with pytest.raises(StateError, match="no layer conv"):
        spectral.adapt(nn.Sequential(nn.Linear(2, 2)), adapted.statistics())
    with pytest.raises(StateError, match="not what"):
        spectral.adapt(model, {"conv": {}})
    cut = {
        name: dict(own, source_basis=own["source_basis"][:3]) for name, own in adapted.statistics().items()
    }
    with pytest.raises(StateError, match="not what"):
        spectral.adapt(model, cut)


def test_a_loaded_state_goes_on_bit_for_bit(model, adapted):
    """One made from the same statistics, over the stream's next batches, in wide layers too."""
    torch.manual_seed(1)
    wide = nn.Sequential(nn.Linear(20, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 3)).eval()
    first = spectral.adapt(wide, [torch.randn(32, 20) for _ in range(20)])
    stream = [torch.randn(32, 20) * 2 + 1 for _ in range(12)]
    with torch.no_grad():
        for x in stream[:6]:
            first(x)
        second = spectral.adapt(wide, first.statistics())
        second.load_state_dict(first.state_dict())
        assert first.active
        for x in stream[6:]:
            assert torch.equal(second(x), first(x))


def test_ready_statistics_bring_the_options_that_they_were_made_with(model):
    """What contradicts them is refused, since the gate's limits hold for that alone; what they settle is kept."""
    made = spectral.adapt(model, images(), at="input", window=50, rows=4096, rank=2, quantile=0.95)
    file = io.BytesIO()
    torch.save(made.statistics(), file)
    file.seek(0)
    ready = torch.load(file, weights_only=True)
    same = {"at": "input", "window": 50, "rows": 4096}
    again = spectral.adapt(model, ready, **same)
    assert [shift.rank for shift in again.report()] == [2, 2]
    again = spectral.adapt(model, again.statistics(), **same, rank=2, quantile=0.95, energy=0.99)
    assert torch.equal(again.limits, made.limits)
    for wrong, says in (
        ({"at": "output"}, "at='output' contradicts .* made with at='input'"),
        ({"window": 100}, "window=100 contradicts .* made with window=50"),
        ({"rows": 8192}, "rows=8192 contradicts .* made with rows=4096"),
    ):
        with pytest.raises(StateError, match=f"adapt: {says}"):
            spectral.adapt(model, ready, **(same | wrong))
    for wrong, says in (
        ({"rank": 1}, "rank=1 has no effect .* made with rank=2"),
        ({"energy": 0.5}, r"energy=0\.5 has no effect .* made with energy=0\.99"),
        ({"quantile": 0.9}, r"quantile=0\.9 has no effect .* made with quantile=0\.95"),
    ):
        with pytest.raises(OptionError, match=f"adapt: {says}"):
            spectral.adapt(model, ready, **same, **wrong)
    old = {name: {k: v for k, v in own.items() if k != "window"} for name, own in ready.items()}
    with pytest.raises(StateError, match=r"do not say which at, window, .* of an earlier version"):
        spectral.adapt(model, old, **same)


def test_a_state_brings_the_gate_and_refuses_another_correction(model):
    """Else it would not go on as it was."""
    made = spectral.adapt(model, images(), correction="mean", tau=0.01)
    made.gate = "open"
    again = spectral.adapt(model, images(), correction="mean", tau=0.01)
    again.load_state_dict(made.state_dict())
    assert again.gate == "open"
    x = images(1, seed=4)[0]
    with torch.no_grad():
        assert torch.equal(again(x), made(x))
    for options, says in (
        ({"correction": "colour", "tau": 0.01}, "correction='colour' contradicts .* correction='mean'"),
        ({"correction": "mean"}, r"tau=0\.001 contradicts .* tau=0\.01"),
        ({"correction": "mean", "tau": 0.01, "rest": "drop"}, "rest='drop' contradicts .* rest='keep'"),
    ):
        with pytest.raises(StateError, match=f"adapt: {says}"):
            spectral.adapt(model, images(), **options).load_state_dict(made.state_dict())


def test_a_state_of_an_earlier_version_is_taken(model, adapted):
    state = adapted.state_dict()
    state["_extra_state"] = state["_extra_state"][:6]
    spectral.adapt(model, images()).load_state_dict(state)


def test_threads_take_turns_and_the_model_itself_is_plain(model, adapted):
    """Two streams' calls overlap as far as they can: each batch counts once, and the model's own call sees nothing."""
    x, y = images(2, seed=5)
    adapted.gate = "open"
    inside, go_on = threading.Event(), threading.Event()

    def wait(module, args):
        if threading.current_thread().name == "slow":
            inside.set()
            assert go_on.wait(60)

    found = {}

    def call(name, module, x):
        with torch.no_grad():
            found[name] = module(x)

    handle = model.fc.register_forward_pre_hook(wait)
    slow = threading.Thread(target=call, args=("slow", adapted, x), name="slow")
    slow.start()
    assert inside.wait(60)
    other = threading.Thread(target=call, args=("other", adapted, y))
    other.start()
    call("plain", model, x)
    assert other.is_alive()
    go_on.set()
    slow.join()
    other.join()
    handle.remove()
    with torch.no_grad():
        assert torch.equal(found["plain"], model(x))
    assert not torch.equal(found["slow"], found["plain"])
    assert float(adapted.trackers[0].stream.age) == pytest.approx(2 * 16 / 100)


def test_a_source_that_is_not_finite(model):
    source = images()
    source[7][0, 0, 0, 0] = torch.nan
    with pytest.raises(OptionError, match=r"batch 7 of the source .* 'conv' that are not finite"):
        spectral.adapt(model, source)


def test_a_state_of_another_window_is_refused_before_it_is_loaded(model, adapted):
    other = spectral.adapt(model, images(60), window=20)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(StateError, match="window=20 contradicts a state made with window=100"):
        other.load_state_dict(adapted.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


@pytest.mark.parametrize("at", ["output", "input"])
def test_ready_statistics_of_other_widths(model, at):
    """Known from the layer at once, else at the first call; `state_dict` is refused by torch, and leaves it usable."""
    ready = spectral.adapt(model, images(), at=at).statistics()
    wider = Net()
    wider.conv, wider.norm, wider.fc = nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), nn.Linear(7, 6)
    with pytest.raises(StateError, match=rf"'(conv|fc)' has 7 features at its {at}, and they are of 6"):
        spectral.adapt(wider.eval(), ready, at=at)

    class Own(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(width, 128))

        def forward(self, x):
            return x.flatten(1) @ self.weight.T

    def own(width):
        return nn.Sequential(Own(width), nn.Identity()).eval()

    made = spectral.adapt(own(5), images(), layers="0")
    other = spectral.adapt(own(4), made.statistics(), layers="0")
    with pytest.raises(StateError, match="'0' has 4 features in this call, and its statistics are of 5"):
        other(images(1)[0])
    narrow = spectral.adapt(own(4), images(), layers="0")
    with pytest.raises(RuntimeError, match="size mismatch"):
        narrow.load_state_dict(made.state_dict())
    assert narrow(images(1)[0]).shape == (16, 4)


def test_batches_that_the_model_does_not_take(model):
    """Labels first, other keys, nothing of tensors: what came, and what a batch must be."""
    says = "A batch must be a tensor, a tuple or list that begins with the model's input"
    labels = [(torch.zeros(16, dtype=torch.long), x) for x in images()]
    with pytest.raises(
        OptionError, match=rf"Net fails on a batch.*given int64 tensor of shape \(16,\).*{says}"
    ):
        spectral.adapt(model, labels)
    pictures = [{"picture": x, "label": torch.zeros(16)} for x in images()]
    with pytest.raises(OptionError, match=rf"brings 'picture', 'label'.*takes 'x': 'x' is missing.*{says}"):
        spectral.adapt(model, pictures)
    with pytest.raises(OptionError, match=rf"a str is not a batch \(tuple\).*{says}"):
        spectral.adapt(model, [("a", x) for x in images()])
    beside = [{"x": x, "labels": torch.zeros(16)} for x in images()]
    assert spectral.adapt(model, beside).drift == spectral.adapt(model, images()).drift
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("mode", ["bfloat16", "autocast"])
def test_half_precision(model, mode):
    x = [paler(x) for x in images(8, seed=1)]
    adapted = spectral.adapt(model, images(60))
    reference = copy.deepcopy(adapted)
    if mode == "bfloat16":
        adapted = adapted.bfloat16()
        x = [one.bfloat16() for one in x]
    assert {b.dtype for b in adapted.trackers.buffers()} == {adapted.limits.dtype} == {torch.float32}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        for one in x:
            found = adapted(one)
    assert found.dtype == torch.bfloat16
    assert adapted.active
    with torch.no_grad():
        for one in x:
            expected = reference(one.float())
    assert distance(found.float(), expected) < 0.1 * expected.std().item() + 0.02


def test_double_precision_and_a_frozen_model(model):
    model = model.double().requires_grad_(False)
    adapted = spectral.adapt(model, [x.double() for x in images()])
    assert adapted(images(1)[0].double()).dtype == torch.float64
    assert {b.dtype for b in adapted.trackers.buffers()} == {torch.float64}


def test_inference_mode_leaves_ordinary_tensors(model, adapted):
    with torch.inference_mode():
        adapted(paler(images(1, seed=1)[0]))
    assert not any(b.is_inference() for b in adapted.buffers())
    adapted.gate = "open"
    x = images(1, seed=2)[0].requires_grad_()
    adapted(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("correction", ["transport", "mean"])
def test_what_is_made_in_inference_mode_is_ordinary_too(model, correction):
    """It corrects there, is copied and loaded there, and can be trained through and loaded outside."""
    outside = spectral.adapt(model, images(), correction=correction)
    with torch.inference_mode():
        made = spectral.adapt(model, images(), correction=correction)
        for x in images(20, seed=1):
            found, expected = made(paler(x)), outside(paler(x))
            assert torch.equal(found, expected)
        copied = copy.deepcopy(made)
        loaded = spectral.adapt(model, images(), correction=correction, rank=1)
        loaded.load_state_dict(made.state_dict())
        assert made.active
        assert torch.equal(copied(paler(x)), made(paler(x)))
        made.reset()
        assert not made.active
    for one in (made, copied, loaded):
        assert not any(buffer.is_inference() for buffer in one.buffers())
        one.load_state_dict(outside.state_dict())
        one.gate = "open"
        x = images(1, seed=2)[0].requires_grad_()
        one(x).sum().backward()
        assert x.grad is not None


def test_layers_without_norms_and_by_name():
    torch.manual_seed(0)
    plain = Net(norm=False).eval()
    assert list(spectral.adapt(plain, images()).drift) == ["conv", "fc"]
    assert list(spectral.adapt(plain, images(), at="input").drift) == ["fc", "head"]
    assert list(spectral.adapt(plain, images(), layers=["f*"]).drift) == ["fc"]
    named = spectral.adapt(
        Net().eval(), images(), layers=lambda name, layer: isinstance(layer, nn.BatchNorm2d)
    )
    assert list(named.drift) == ["norm"]


def test_a_transformer():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.Sequential(nn.Linear(8, 16), encoder, nn.Linear(16, 3)).eval()
    batches = [torch.randn(8, 5, 8) for _ in range(20)]
    adapted = spectral.adapt(model, batches)
    assert list(adapted.drift) == ["0", "1.linear1", "1.linear2"]
    with torch.no_grad():
        for x in batches:
            found = adapted(3 * x + 1)
    assert adapted.active
    assert distance(found, model(x)) < distance(model(3 * x + 1), model(x))


def test_sources_of_all_kinds(model):
    pairs = [(x, torch.zeros(len(x))) for x in images()]
    mappings = [{"x": x} for x in images()]
    expected = spectral.adapt(model, images()).state_dict()
    for source in (pairs, mappings, torch.utils.data.DataLoader(images(), batch_size=None)):
        found = spectral.adapt(model, source).state_dict()
        assert all(torch.equal(v, expected[k]) for k, v in found.items())


def test_refusals(model):
    batches = images()
    for wrong, says in (
        ({"correction": "rotate"}, "correction='rotate'"),
        ({"at": "weight"}, "at='weight'"),
        ({"rest": "lose"}, "rest='lose'"),
        ({"tau": -1.0}, "tau=-1.0"),
        ({"window": 0}, "window=0"),
        ({"rows": 1}, "rows=1"),
        ({"quantile": 0.4}, "quantile=0.4"),
        ({"rank": 0}, "rank=0"),
        ({"energy": 1.5}, "energy=1.5"),
        ({"rank": 2.5}, "rank=2.5"),
        ({"rank": "x"}, "rank='x'"),
        ({"rank": True}, "rank=True"),
        ({"window": "x"}, "window='x'"),
        ({"rows": 2.5}, "rows=2.5"),
        ({"energy": None}, "energy=None"),
        ({"tau": None}, "tau=None"),
        ({"tau": float("nan")}, "tau=nan"),
        ({"quantile": None}, "quantile=None"),
        ({"at": ["output"]}, r"at=\['output'\]"),
    ):
        with pytest.raises(OptionError, match=rf"^adapt: {says} must be"):
            spectral.adapt(model, batches, **wrong)
    with pytest.raises(OptionError, match="gave no batches"):
        spectral.adapt(model, iter(batches))
    with pytest.raises(OptionError, match="has 3 batches"):
        spectral.adapt(model, batches[:3])
    with pytest.raises(PatternError, match="nothing_like_it"):
        spectral.adapt(model, batches, layers="nothing_like_it")
    with pytest.raises(NoEffectError, match="no layer to adapt"):
        spectral.adapt(nn.Sequential(nn.Flatten(), nn.Linear(128, 2)), batches)
    idle = Net()
    idle.unused = nn.Linear(2, 2)
    assert "unused" not in spectral.adapt(idle, batches).drift
    with pytest.raises(NoEffectError, match="unused"):
        spectral.adapt(idle, batches, layers=["unused", "fc"])


def test_what_hooks_cannot_reach(model, adapted):
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), None

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair = Pair(128, 4)

        def forward(self, x):
            return self.pair(x.flatten(1))[0]

    with pytest.raises(AttachError, match="'pair' cannot be adapted: its features are a tuple"):
        spectral.adapt(Outer(), images(), layers="pair")
    with pytest.raises(AttachError, match="compiled already"):
        spectral.adapt(torch.compile(model, backend="eager"), images())
    adapted.model.forward = lambda x: x
    with pytest.raises(NoEffectError, match="none of the layers"):
        adapted(images(1)[0])


def test_a_stream_in_training_mode_is_said(adapted):
    """Nothing is tracked there; under grad it is somebody's training, and nobody's stream."""
    adapted.train()
    with torch.no_grad(), pytest.warns(RetrogradeWarning, match="training mode"):
        adapted(images(1)[0])
    adapted(images(1)[0])


def test_in_one_line(model, adapted):
    assert repr(adapted) == (
        "Adapted(Net: 2 layers, at='output', correction='transport', window=100, gate='auto', watching)"
    )
    adapted.gate = "open"
    assert repr(adapted).endswith("gate='open', correcting)")


def test_a_wrong_gate_is_refused(adapted):
    with pytest.raises(OptionError, match="gate='opened' must be one of 'auto', 'open', 'closed'"):
        adapted.gate = "opened"
