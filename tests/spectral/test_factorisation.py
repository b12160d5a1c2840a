"""Factorised layers: the mathematics of their ranks, what they compute, what is left, and what is refused."""

import copy
import importlib
import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import retrograde as rg
from retrograde.errors import (
    AttachError,
    NoEffectError,
    OptionError,
    PatternError,
    RetrogradeWarning,
    StateError,
)
from retrograde.spectral.factorisation import timing
from retrograde.spectral.factorisation.moments import largest_rank, spectrum_of_outputs
from retrograde.spectral.factorisation.parts import Part
from retrograde.spectral.factorisation.ranks import Curve, allocate
from retrograde.spectral.moments import Moments

DOUBLE = torch.float64


def low_rank_inputs(rows: int, width: int, seed: int = 0) -> Tensor:
    """Rows whose deviations fall off from direction to direction, around a mean that is far from 0."""
    generator = torch.Generator().manual_seed(seed)
    turned = torch.randn(width, width, generator=generator, dtype=DOUBLE)
    scales = 0.7 ** torch.arange(width, dtype=DOUBLE)
    return torch.randn(rows, width, generator=generator, dtype=DOUBLE) * scales @ turned + 3


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, 2, 1, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24 * 16, 32),
        nn.ReLU(),
        nn.Linear(32, 5),
    ).to(dtype)


def images(rows: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def error(layer: nn.Module, pair: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((layer(x) - pair(x)).square().sum(1).mean())


class TestTheMathematics:
    @pytest.mark.parametrize("centred", [True, False])
    @pytest.mark.parametrize(("inputs", "outputs"), [(30, 12), (12, 30)])
    def test_the_error_is_the_sum_of_the_eigenvalues_cut(self, inputs: int, outputs: int, centred: bool):
        layer, x, moments = nn.Linear(inputs, outputs, dtype=DOUBLE), low_rank_inputs(500, inputs), Moments()
        moments.add(x if inputs < outputs else layer(x))
        spectrum = spectrum_of_outputs(layer, moments, centred)
        for rank in (1, 3, 6):
            pair = Part("", layer, spectrum, 1.0).pair(rank)
            cut = float(spectrum.eigenvalues[rank:].sum())
            assert error(layer, pair, x) == pytest.approx(cut, rel=1e-6, abs=1e-12)

    def test_no_other_map_of_that_rank_comes_nearer(self):
        layer, x, moments = nn.Linear(10, 8, dtype=DOUBLE), low_rank_inputs(400, 10), Moments()
        moments.add(layer(x))
        pair = Part("", layer, spectrum_of_outputs(layer, moments, True), 1.0).pair(2)
        best = error(layer, pair, x)
        # Eckart and Young: the outputs' own centred truncation is a bound for maps of any kind.
        y = layer(x).detach()
        roots = torch.linalg.svdvals(y - y.mean(0))
        assert best == pytest.approx(float(roots[2:].square().sum()) / len(x), rel=1e-6)

    def test_centring_pays_where_the_mean_is_large(self):
        layer, x = nn.Linear(20, 20, dtype=DOUBLE), low_rank_inputs(400, 20)
        found = [
            error(layer, rg.spectral.factorise(layer, x, budget=0.2, centred=centred)[0], x)
            for centred in (True, False)
        ]
        assert found[0] < 0.9 * found[1]

    def test_weights_give_truncated_svd(self):
        layer = nn.Linear(24, 20, bias=False, dtype=DOUBLE)
        pair, report = rg.spectral.factorise(layer, low_rank_inputs(50, 24), budget=0.5, spectrum="weights")
        rank = report.ranks[""]
        u, s, v = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
        expected = u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank]
        torch.testing.assert_close(pair[1].weight @ pair[0].weight, expected)

    @pytest.mark.parametrize(
        "conv",
        [
            nn.Conv1d(6, 20, 5, 2, 3, 2),
            nn.Conv2d(6, 20, 3, padding="same", padding_mode="circular"),
            nn.Conv2d(6, 20, (3, 1), (1, 2), (1, 0), padding_mode="reflect"),
            nn.Conv3d(4, 16, 2, padding_mode="replicate", padding=1),
        ],
        ids=["1d", "same-circular", "reflect", "3d"],
    )
    def test_a_convolution_of_low_rank_is_reproduced(self, conv: Any):
        rank, dims = 3, conv.weight.dim() - 2
        with torch.no_grad():
            flat = conv.weight.flatten(1)
            u, s, v = torch.linalg.svd(flat, full_matrices=False)
            conv.weight.copy_((u[:, :rank] * s[:rank] @ v[:rank]).view_as(conv.weight))
        x = torch.randn(12, conv.in_channels, *(9, 8, 7)[:dims])
        small, report = rg.spectral.factorise(conv, x, energy=1 - 1e-6)
        assert report.ranks == {"": rank}
        assert small[1].kernel_size == (1,) * dims
        torch.testing.assert_close(small(x), conv(x), rtol=1e-3, atol=1e-4)
        unbatched = x[0]
        torch.testing.assert_close(small(unbatched), conv(unbatched), rtol=1e-3, atol=1e-4)


class TestRanks:
    def test_against_trying_everything(self):
        generator = torch.Generator().manual_seed(3)
        for _ in range(20):
            curves: dict[str, Curve] = {}
            for name in "abc":
                values = torch.rand(5, generator=generator).sort(descending=True).values + 0.01
                shares = (values.cumsum(0) / (values.sum() * 1.05)).tolist()
                unit = float(torch.rand((), generator=generator)) + 0.5
                curves[name] = Curve(unit * 6, unit, shares)
            points = [curve.points for curve in curves.values()]
            budget = 0.5 * sum(curve.whole for curve in curves.values())
            best = min(
                sum(p[1] for p in chosen)
                for chosen in itertools.product(*points)
                if sum(p[0] for p in chosen) <= budget
            )
            found = allocate(curves, budget)
            mine = [next(p for p in curve.points if p[2] == found[name]) for name, curve in curves.items()]
            assert sum(p[0] for p in mine) <= budget
            # Optimal but for the last segment's overshoot.
            assert sum(p[1] for p in mine) <= best + 0.25

    def test_nothing_is_cut_within_a_large_budget(self):
        assert allocate({"a": Curve(10, 1, [0.5, 0.9])}, 10) == {"a": None}

    def test_the_smallest_where_the_budget_is_too_small(self):
        assert allocate({"a": Curve(10, 1, [0.5, 0.9]), "b": Curve(5, 1, [])}, 1) == {"a": 1, "b": None}

    @pytest.mark.parametrize(("inputs", "outputs"), [(8, 8), (9, 18), (1, 5), (64, 10), (2, 2)])
    def test_the_largest_rank_that_saves(self, inputs: int, outputs: int):
        saving = [r for r in range(1, 99) if r * (inputs + outputs) < inputs * outputs]
        assert largest_rank(nn.Linear(inputs, outputs)) == max(saving, default=0)


class TestFactorise:
    def test_a_budget_is_kept_and_used(self):
        model = net()
        small, report = rg.spectral.factorise(model, images(256), budget=0.5)
        before, after = report.macs
        assert 0.47 * before < after <= 0.5 * before
        assert report.budget == pytest.approx(0.5 * before)
        # The counts are those of torch's own counter.
        from torch.utils.flop_counter import FlopCounterMode

        for one, count in ((model, before), (small, after)):
            with FlopCounterMode(display=False) as counter:
                one(images(2))
            assert counter.get_total_flops() / 4 == pytest.approx(count)
        assert report.parameters == tuple(sum(p.numel() for p in m.parameters()) for m in (model, small))

    def test_a_number_of_multiply_adds_is_a_budget_too(self):
        share = rg.spectral.factorise(net(), images(256), budget=0.5)[1]
        number = rg.spectral.factorise(net(), images(256), budget=0.5 * share.macs[0])[1]
        assert number.ranks == share.ranks

    def test_energy_gives_the_smallest_ranks_that_keep_it(self):
        x = low_rank_inputs(600, 40).float()
        model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 30))
        report = rg.spectral.factorise(model, x, energy=0.9)[1]
        row = report.rows[0]
        assert row.rank is not None
        assert row.energy is not None
        assert row.energy >= 0.9
        y = model[0](x).double()
        values = torch.linalg.eigvalsh(torch.cov(y.mT)).flip(0)
        shares = values.cumsum(0) / values.sum()
        assert row.rank == int((shares < 0.9).sum()) + 1

    def test_only_torchs_own_layers_come_out(self, tmp_path: Path):
        small, _ = rg.spectral.factorise(net(), images(256), budget=0.5)
        assert {type(m).__module__.split(".")[0] for m in small.modules()} == {"torch"}
        assert "retrograde" not in str(pickle.dumps(small))
        again = rg.spectral.load_factors(net(), small.state_dict())
        small.eval(), again.eval()
        torch.testing.assert_close(again(images()), small(images()), rtol=0, atol=0)
        assert "2.1.bias" in small.state_dict()  # of a convolution without one

    def test_factors_that_do_not_fit(self):
        """Other inputs, other outputs, a rank that does not match, and keys that are missing."""
        small, _ = rg.spectral.factorise(nn.Sequential(nn.Linear(32, 32)), torch.randn(200, 32), budget=0.5)
        state = small.state_dict()
        for inputs, outputs in ((31, 32), (32, 33)):
            with pytest.raises(
                StateError, match=rf"'0' is {outputs}×{inputs}, and its factors.*of another width"
            ):
                rg.spectral.load_factors(nn.Sequential(nn.Linear(inputs, outputs)), state)
        with pytest.raises(StateError, match="of another width"):
            rg.spectral.load_factors(
                nn.Sequential(nn.Linear(32, 32)), state | {"0.0.weight": state["0.0.weight"][1:]}
            )
        with pytest.raises(StateError, match=r"does not fit Sequential.*0\.bias"):
            rg.spectral.load_factors(nn.Sequential(nn.Linear(32, 32)), {})

    def test_the_model_itself_is_left_alone(self):
        model = net().train()
        model[3].eval()
        before = copy.deepcopy(model.state_dict())
        state = torch.get_rng_state()
        small, _ = rg.spectral.factorise(model, images(256), budget=0.4)
        assert torch.equal(torch.get_rng_state(), state)
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key])
        assert model.training
        assert not model[3].training
        assert small.training
        assert all(part.training for part in small[2])
        assert not small[3].training
        assert not any(m._forward_hooks for m in (*model.modules(), *small.modules()))

    def test_in_place(self):
        model = net()
        small, report = rg.spectral.factorise(model, images(256), budget=0.5, inplace=True)
        assert small is model
        assert isinstance(model[2], nn.Sequential)
        other = rg.spectral.factorise(net(), images(256), budget=0.5)[0]
        torch.testing.assert_close(model.eval()(images()), other.eval()(images()))
        assert report.ranks

    def test_what_comes_out_can_be_trained(self):
        small, _ = rg.spectral.factorise(net(), images(256), budget=0.5)
        optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
        x, y = images(), torch.arange(64) % 5
        losses: list[float] = []
        for _ in range(10):
            loss = nn.functional.cross_entropy(small(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
        assert losses[-1] < 0.9 * losses[0]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_dtypes(self, dtype: torch.dtype):
        model = net(dtype)
        small, report = rg.spectral.factorise(model, images(256).to(dtype), budget=0.6)
        assert {p.dtype for p in small.parameters()} == {dtype}
        expected = rg.spectral.factorise(net(), images(256), budget=0.6)[1]
        for name, rank in expected.ranks.items():
            assert abs(report.ranks[name] - rank) <= 1

    def test_under_autocast_statistics_stay_exact(self):
        x = low_rank_inputs(500, 30).float()
        layer = nn.Linear(30, 20)
        with torch.autocast("cpu", torch.bfloat16):
            energy = rg.spectral.factorise(layer, x, budget=0.5)[1].rows[0].energy
        assert energy == pytest.approx(
            rg.spectral.factorise(layer, x, budget=0.5)[1].rows[0].energy, abs=1e-3
        )

    def test_channels_last_stays(self):
        model = net().to(memory_format=torch.channels_last)
        small = rg.spectral.factorise(model, images(256), budget=0.5)[0]
        assert small[2][0].weight.is_contiguous(memory_format=torch.channels_last)

    def test_batches_of_every_kind(self):
        x = images(256)
        expected = rg.spectral.factorise(net(), x, budget=0.5)[1]
        kinds: dict[str, Any] = {
            "tensors": x.split(64),
            "pairs": [(part, torch.zeros(64)) for part in x.split(64)],
            "dicts": [{"input": part} for part in x.split(64)],
            "generator": (part for part in x.split(64)),
        }
        for name, data in kinds.items():
            report = rg.spectral.factorise(net(), data, budget=0.5)[1]
            assert report.ranks == expected.ranks, name
        odd = [{"picture": part} for part in x.split(64)]
        report = rg.spectral.factorise(net(), odd, budget=0.5, call=lambda m, b: m(b["picture"]))[1]
        assert report.ranks == expected.ranks

    def test_patterns(self):
        report = rg.spectral.factorise(net(), images(256), budget=0.9, only=["2", "6"], skip="2")[1]
        assert set(report.ranks) == {"6"}
        with pytest.raises(PatternError):
            rg.spectral.factorise(net(), images(256), budget=0.9, only="none.*")

    def test_one_row_does_not_break_it(self):
        with pytest.warns(RetrogradeWarning, match=r"layer '' saw|saw 1 rows"):
            small, _ = rg.spectral.factorise(nn.Linear(12, 12), torch.ones(1, 12), budget=0.5)
        assert small(torch.ones(1, 12)).isfinite().all()

    def test_a_constant_output_costs_one_rank(self):
        layer = nn.Linear(12, 12)
        small, report = rg.spectral.factorise(layer, torch.ones(50, 12), energy=0.99)
        assert report.ranks == {"": 1}
        torch.testing.assert_close(small(torch.ones(3, 12)), layer(torch.ones(3, 12)))


class TestTheReport:
    def test_it_prints_each_layer_and_the_whole(self):
        report = rg.spectral.factorise(net(), images(256), budget=0.5)[1]
        text = str(report)
        for row in report.rows:
            assert row.shape in text
        assert "Multiply-adds are counted, not timed" in text
        assert report.to_dict()["ranks"] == report.ranks

    def test_energy_that_does_not_save_is_said(self):
        x = torch.randn(400, 16)
        with pytest.warns(RetrogradeWarning, match=r"needs rank 1\d, and ranks to 7 save"):
            small, report = rg.spectral.factorise(nn.Sequential(nn.Linear(16, 16)), x, energy=0.999)
        assert not report.ranks
        assert isinstance(small[0], nn.Linear)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 16)
        self.body = nn.Linear(16, 16)
        self.head = nn.Linear(16, 30, bias=False)
        self.head.weight = self.embedding.weight
        self.unused = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(x)))


class TestLayersThatAreLeft:
    def test_with_their_reasons(self):
        hooked, replaced = nn.Linear(16, 16), nn.Linear(16, 16)
        hooked.register_forward_hook(lambda *_: None)
        replaced.forward = replaced.forward  # type: ignore[method-assign]
        model = nn.Sequential(
            nn.Unflatten(1, (16, 1)),
            nn.Conv1d(16, 16, 1, groups=2),
            nn.ConvTranspose1d(16, 16, 1),
            nn.Flatten(),
            parametrizations.weight_norm(nn.Linear(16, 16)),
            hooked,
            replaced,
            nn.Linear(16, 16),
        )
        report = rg.spectral.factorise(model, torch.randn(100, 16), budget=0.9)[1]
        why = {row.name: row.why for row in report.rows}
        assert set(report.ranks) == {"7"}
        assert why["1"].startswith("grouped convolution")
        assert why["2"].startswith("transposed")
        assert "ParametrizedLinear" in why["4"]
        assert "hooks" in why["5"]
        assert "replaced" in why["6"]

    def test_tied_and_uncalled_ones(self):
        tokens = torch.randint(30, (64, 9))
        report = rg.spectral.factorise(Tied(), tokens, budget=0.9)[1]
        why = {row.name: row.why for row in report.rows}
        assert why["head"] == "it shares a parameter with 'embedding'"
        assert why["unused"] == "never called on the data"
        assert set(report.ranks) == {"body"}

    def test_weights_that_a_module_reads_itself(self):
        model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.Linear(16, 16))
        small, report = rg.spectral.factorise(model, torch.randn(40, 5, 16), budget=0.95)
        assert set(report.ranks) == {"1"}
        with torch.no_grad():
            assert small.eval()(torch.randn(2, 5, 16)).shape == (2, 5, 16)

    def test_a_reader_that_is_not_known_is_found_out(self):
        class Reader(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(16, 16)

            def forward(self, x: Tensor) -> Tensor:
                return self.fc(x) + self.fc.weight.sum()

        model = Reader()
        with pytest.raises(OptionError, match=r"fails on the first batch.*leave it with `skip`"):
            rg.spectral.factorise(model, torch.randn(50, 16), budget=0.5)
        with pytest.raises(OptionError, match="fails on the first batch"):
            rg.spectral.factorise(model, torch.randn(50, 16), budget=0.5, inplace=True)
        assert isinstance(model.fc, nn.Linear)

    def test_a_layer_used_twice_is_replaced_in_both_places(self):
        shared = nn.Linear(16, 16)
        model = nn.Sequential(shared, nn.Tanh(), shared)
        small, report = rg.spectral.factorise(model, torch.randn(100, 16), budget=0.5)
        assert small[0] is small[2]
        assert isinstance(small[0], nn.Sequential)
        assert report.macs[0] == 2 * 16 * 16

    def test_a_layer_that_is_called_by_keyword_counts(self):
        class Called(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(0)
                self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)

            def forward(self, x: Tensor) -> Tensor:
                return self.two(self.one(input=x))

        model, x = Called(), torch.randn(100, 16)
        report = rg.spectral.factorise(model, x, budget=0.5)[1]
        assert report.macs[0] == 2 * 16 * 16
        assert report.ranks == {
            name.replace("0", "one").replace("1", "two"): rank
            for name, rank in rg.spectral.factorise(nn.Sequential(model.one, model.two), x, budget=0.5)[
                1
            ].ranks.items()
        }

    def test_frozen_layers_stay_frozen(self):
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        model[0].requires_grad_(False)
        small, _ = rg.spectral.factorise(model, torch.randn(100, 16), budget=0.5)
        assert not any(p.requires_grad for p in small[0].parameters())
        assert all(p.requires_grad for p in small[1].parameters())


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "give one of them"),
            ({"energy": 0.9, "budget": 0.5}, "give one of them"),
            ({"energy": 0.0}, "energy=0.0"),
            ({"energy": float("nan")}, "energy=nan"),
            ({"energy": "a"}, "energy='a'"),
            ({"budget": -1}, "budget=-1"),
            ({"budget": "0.3"}, "budget='0.3'"),
            ({"budget": 1e9}, "must be less than the model's"),
            ({"budget": 0.001}, "cannot be reached"),
            ({"budget": 0.5, "spectrum": "inputs"}, "spectrum='inputs'"),
        ],
    )
    def test_options(self, options: dict[str, Any], message: str):
        with pytest.raises(OptionError, match=message):
            rg.spectral.factorise(net(), images(), **options)

    def test_data(self):
        with pytest.raises(OptionError, match="holds no rows"):
            rg.spectral.factorise(net(), [], budget=0.5)
        with pytest.raises(OptionError, match="is not a batch"):
            rg.spectral.factorise(net(), ["a picture"], budget=0.5)
        with pytest.raises(OptionError, match=r"'input' is missing.*for any other give `call`"):
            rg.spectral.factorise(net(), [{"picture": images()}], budget=0.5)
        with pytest.raises(OptionError, match=r"given int64 tensor of shape .*A batch must be"):
            rg.spectral.factorise(net(), [(torch.arange(4), images())], budget=0.5)
        with pytest.raises(OptionError, match="'0' gives outputs on the data that are not finite"):
            rg.spectral.factorise(net(), images() * float("inf"), budget=0.5)

    def test_models(self):
        with pytest.raises(NoEffectError, match="no linear or convolutional layer"):
            rg.spectral.factorise(nn.ReLU(), images(), budget=0.5)
        with pytest.raises(NoEffectError, match="none of the 1"):
            rg.spectral.factorise(nn.Conv2d(3, 3, 3, groups=3), images(), budget=0.5)
        attached = net()
        session = rg.attach(attached, rg.Dither(), decline=False)
        with pytest.raises(AttachError, match="is attached to a session"):
            rg.spectral.factorise(attached, images(256), budget=0.5, inplace=True)
        # A copy of an attached model is plain.
        assert rg.spectral.factorise(attached, images(256), budget=0.5)[1].ranks
        session.detach()
        with pytest.raises(AttachError, match="compiled already"):
            rg.spectral.factorise(torch.compile(net()), images(), budget=0.5)
        with pytest.raises(OptionError, match="inplace=True"):
            rg.spectral.factorise(nn.Linear(16, 16), torch.randn(64, 16), budget=0.5, inplace=True)


class TestOnlyWhatIsFaster:
    def test_a_rank_that_measured_faster_is_found(self, monkeypatch: pytest.MonkeyPatch):
        ranks: list[int] = []

        def alternate(runs: Any) -> list[float]:
            return [1.0, 0.5 if ranks[-1] <= 20 else 1.5]

        def make(rank: int) -> nn.Module:
            ranks.append(rank)
            return nn.Identity()

        monkeypatch.setattr(timing, "alternate", alternate)
        found = timing.fastest_rank(nn.Identity(), make, 50, torch.ones(1))
        assert found <= 20
        assert found == ranks[-1]
        assert ranks == sorted(ranks, reverse=True)

    def test_layers_that_are_not_faster_stay(self, monkeypatch: pytest.MonkeyPatch):
        factorisation = importlib.import_module("retrograde.spectral.factorisation.factorise")

        monkeypatch.setattr(timing, "alternate", lambda runs: [1.0, 1.0])
        monkeypatch.setattr(factorisation, "alternate", lambda runs: [1.0, 1.0])
        with pytest.warns(RetrogradeWarning, match="no rank tried was faster here"):
            _, report = rg.spectral.factorise(net(), images(256), budget=0.5, faster=True)
        assert not report.ranks
        assert "no layer could be made smaller and faster" in str(report)

    def test_a_rank_that_is_slower_after_all_is_given_up_and_others_shrink_more(
        self, monkeypatch: pytest.MonkeyPatch
    ):
        factorisation = importlib.import_module("retrograde.spectral.factorisation.factorise")

        monkeypatch.setattr(timing, "alternate", lambda runs: [1.0, 0.5])
        calls = itertools.count()
        monkeypatch.setattr(factorisation, "alternate", lambda runs: [1.0, 2.0 if next(calls) == 0 else 0.5])
        _, report = rg.spectral.factorise(net(), images(256), budget=0.6, faster=images(8))
        given_up = [row for row in report.rows if "measured ×2.00 of its time" in row.why]
        assert len(given_up) == 1
        assert report.macs[1] <= 0.6 * report.macs[0]
        assert all(row.seconds == (1.0, 0.5) for row in report.rows if row.rank)
        assert report.seconds == (1.0, 0.5)
        assert "0.5" in str(report)

    def test_measured_for_real(self):
        model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))
        report = rg.spectral.factorise(model, torch.randn(600, 512), budget=0.2, faster=True)[1]
        assert report.seconds is not None
        assert all(row.seconds[1] < row.seconds[0] for row in report.rows if row.seconds)
