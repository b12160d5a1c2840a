"""Ranks that shrink during training: the schedule, what is projected, what folding gives, and resuming."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import retrograde as rg
from retrograde.errors import NoEffectError, OptionError, RetrogradeWarning, StateError

Optimizer = torch.optim.Optimizer


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 20), nn.Tanh(), nn.Linear(20, 4))


def conv_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3),
        nn.Flatten(),
        nn.Linear(12 * 4, 4),
    )


def adam(model: nn.Module) -> Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01)


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def schedule_of(model: nn.Module, optimizer: Optimizer, **options: Any) -> rg.spectral.BudgetSchedule:
    chosen: dict[str, Any] = {"budget": 0.5, "start": 2, "end": 12, "every": 3, "window": 2}
    return rg.spectral.BudgetSchedule(model, optimizer, **(chosen | options))


def train(
    model: nn.Module, optimizer: Optimizer, steps: int, shape: tuple[int, ...] = (16,), first: int = 0
) -> float:
    loss = torch.zeros(())
    for step in range(first, first + steps):
        x = torch.randn(64, *shape, generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(model(x), x.flatten(1)[:, :4].argmax(1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(loss)


def rank_of(weight: Tensor) -> int:
    s = torch.linalg.svdvals(weight.detach().flatten(1).double())
    return int((s > 1e-5 * s[0]).sum())


def test_the_budget_falls_as_a_cube():
    model = net()
    schedule = schedule_of(model, sgd(model), budget=0.2, start=10, end=30)
    assert [schedule.share(t) for t in (0, 9, 10, 20, 30, 99)] == pytest.approx(
        [1, 1, 1, 0.2 + 0.8 / 8, 0.2, 0.2]
    )


def test_in_one_line():
    model = net()
    optimizer = sgd(model)
    schedule = schedule_of(model, optimizer)
    train(model, optimizer, 12)
    assert repr(schedule) == (
        "BudgetSchedule(Sequential: budget=0.5, steps 2 to 12 every 3; "
        f"step 12, {len(schedule.ranks)} of 3 layers below full rank)"
    )
    assert schedule.ranks


@pytest.mark.parametrize("make", [sgd, adam])
def test_the_folded_model_computes_what_was_trained(make: Any):
    model = net()
    optimizer = make(model)
    schedule = schedule_of(model, optimizer)
    train(model, optimizer, 30)
    small, report = schedule.fold()
    x = torch.randn(50, 16)
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)
    before, after = report.macs
    assert before == 16 * 24 + 24 * 20 + 20 * 4
    assert 0.4 * before < after <= 0.5 * before
    assert report.ranks == schedule.ranks
    assert {type(m).__module__.split(".")[0] for m in small.modules()} == {"torch"}
    assert isinstance(model[0], nn.Linear)


def test_weight_and_momentum_stay_in_the_subspace_after_the_end():
    for make, key in ((sgd, "momentum_buffer"), (adam, "")):
        model = net()
        optimizer = make(model)
        schedule = schedule_of(model, optimizer)
        for step in range(12, 20):
            train(model, optimizer, 1 if step > 12 else 12, first=step)
            assert schedule.ranks
            for name, rank in schedule.ranks.items():
                weight = model.get_submodule(name).weight
                assert rank_of(weight) <= rank
                if key:
                    assert rank_of(optimizer.state[weight][key]) <= rank


def test_adam_makes_no_huge_step_where_units_are_silent():
    """Entries without squares get no momentum from a projection, which would be divided by nothing."""
    model = net()
    with torch.no_grad():
        model[0].bias[:12] = -50.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = schedule_of(model, optimizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, optimizer, 30)
    assert schedule.ranks
    for name, p in model.named_parameters():
        assert float((p.detach() - before[name]).abs().max()) < 2.0, name
    assert (optimizer.state[model[0].weight]["exp_avg_sq"][:12] == 0).all()


def test_between_projections_the_weight_is_free():
    model = net()
    optimizer = sgd(model)
    schedule = schedule_of(model, optimizer, start=2, end=100, every=4, budget=0.2)
    train(model, optimizer, 18)
    cut = dict(schedule.ranks)
    assert cut
    train(model, optimizer, 1, first=18)
    name, rank = next(iter(cut.items()))
    assert rank_of(model.get_submodule(name).weight) > rank


def test_the_mean_is_kept_in_the_bias():
    model = nn.Sequential(nn.Linear(16, 16))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x = torch.randn(400, 16) @ torch.diag(0.5 ** torch.arange(16.0)) + 2
    before = model(x).mean(0)
    schedule = schedule_of(model, optimizer, start=1, end=1, window=1, budget=0.5)
    model(x).sum().backward()
    optimizer.step()
    assert schedule.ranks
    torch.testing.assert_close(model(x).mean(0), before, rtol=1e-4, atol=1e-4)


def test_convolutions_and_norms():
    model = conv_net()
    optimizer = sgd(model)
    schedule = schedule_of(model, optimizer)
    train(model, optimizer, 25, (2, 4, 4))
    small, report = schedule.fold()
    assert "3" in report.ranks
    model.eval(), small.eval()
    x = torch.randn(9, 2, 4, 4)
    torch.testing.assert_close(small(x), model(x), rtol=1e-3, atol=1e-4)


def test_gradient_accumulation_and_one_row():
    model = net()
    optimizer = sgd(model)
    schedule = schedule_of(model, optimizer)
    for step in range(14):
        for _ in range(3):
            nn.functional.mse_loss(model(torch.randn(1, 16)), torch.zeros(1, 4)).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert all(p.isfinite().all() for p in model.parameters()), step
    assert schedule.fold()[1].macs[1] <= 0.5 * schedule.fold()[1].macs[0]


def test_evaluation_brings_no_rows():
    models: list[nn.Module] = []
    for evaluate in (False, True):
        model = net()
        optimizer = sgd(model)
        schedule_of(model, optimizer)
        for step in range(14):
            train(model, optimizer, 1, first=step)
            if evaluate:
                model.eval()
                model(100 * torch.randn(64, 16))
                model.train()
        models.append(model)
    for one, other in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(one, other)


def test_copies_and_pickles_hear_nothing():
    model = net()
    optimizer = sgd(model)
    schedule = schedule_of(model, optimizer, start=1, end=3, every=1)
    twin = copy.deepcopy(model)
    kept = io.BytesIO()
    torch.save(model, kept)
    kept.seek(0)
    loaded = torch.load(kept, weights_only=False)
    for other in (twin, loaded):
        other(torch.randn(64, 16))
    with pytest.raises(NoEffectError, match="no forward pass in training mode"):
        optimizer.step()
    assert schedule.step == 1


def test_resuming_goes_on_as_if_nothing_had_been():
    schedule: Any = None
    runs: list[nn.Module] = []
    # In the window of a projection, before any; in that of another, between the two steps; and after the last.
    for stop in (None, 1, 7, 15):
        model = net()
        optimizer = adam(model)
        schedule = schedule_of(model, optimizer)
        if stop is not None:
            train(model, optimizer, stop)
            state = [copy.deepcopy(each.state_dict()) for each in (model, optimizer, schedule)]
            model = net()
            optimizer = adam(model)
            schedule = schedule_of(model, optimizer)
            for each, saved in zip((model, optimizer, schedule), state, strict=True):
                each.load_state_dict(saved)
        train(model, optimizer, 20 - (stop or 0), first=stop or 0)
        runs.append(schedule.fold()[0])
    for other in runs[1:]:
        for one, two in zip(runs[0].parameters(), other.parameters(), strict=True):
            assert torch.equal(one, two)
    stranger = nn.Sequential(nn.Tanh(), nn.Linear(9, 9))
    strange = schedule_of(stranger, sgd(stranger))
    with pytest.raises(StateError, match="layers that the model does not have"):
        strange.load_state_dict(schedule.state_dict())
    wider = nn.Sequential(nn.Linear(16, 25), nn.Tanh(), nn.Linear(25, 20), nn.Tanh(), nn.Linear(20, 4))
    with pytest.raises(StateError, match="'0' with 24 outputs, and the model's has 25"):
        schedule_of(wider, sgd(wider)).load_state_dict(schedule.state_dict())
    model = net()
    with pytest.raises(
        StateError, match=r"other layers than this one shrinks: \['0', '2', '4'\], and here \['0', '4'\]"
    ):
        schedule_of(model, sgd(model), skip="2").load_state_dict(schedule.state_dict())
    model = net()
    with pytest.raises(StateError, match="lacks what this one needs: KeyError: 'window'"):
        schedule_of(model, sgd(model)).load_state_dict({"step": 1, "ranks": {}, "macs": {}, "spectra": {}})


def test_a_state_in_the_window_is_a_copy():
    """What is gathered later does not reach it, and loading it leaves it as it was."""
    model = net()
    optimizer = sgd(model)
    schedule = schedule_of(model, optimizer)
    train(model, optimizer, 1)
    state = schedule.state_dict()
    before = copy.deepcopy(state["window"]["moments"]["0"])
    schedule.load_state_dict(state)
    train(model, optimizer, 1, first=1)
    assert state["window"]["examples"] == before["count"] == 64
    for one, other in zip(before["sums"], state["window"]["moments"]["0"]["sums"], strict=True):
        assert torch.equal(one, other)


class Checkpointed(nn.Module):
    """Its middle runs again in the backward pass, and each layer may be called by keyword."""

    def __init__(self, reentrant: bool | None, keyword: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(16, 40), nn.Linear(40, 4)
        self.middle = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 40))
        self._reentrant, self._keyword = reentrant, keyword

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(input=x) if self._keyword else self.first(x))
        again = self._reentrant
        h = self.middle(h) if again is None else checkpoint(self.middle, h, use_reentrant=again)
        return self.last(torch.relu(h))


@pytest.mark.parametrize("options", [(False,), (True,), (None, True)])
def test_passes_that_checkpointing_repeats_are_counted_once_and_calls_by_keyword_too(options: Any):
    runs: list[tuple[nn.Module, Any]] = []
    for chosen in ((None,), options):
        model = Checkpointed(*chosen)
        optimizer = sgd(model)
        schedule = schedule_of(model, optimizer)
        train(model, optimizer, 13)
        runs.append(schedule.fold())
    (plain, expected), (small, report) = runs
    assert report.macs[0] == 16 * 40 + 2 * 40 * 40 + 40 * 4
    assert report.macs[1] <= 0.5 * report.macs[0]
    assert report.macs == expected.macs
    for one, two in zip(plain.parameters(), small.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_skipped_step_does_not_count():
    model = net()
    optimizer = sgd(model)
    schedule = schedule_of(model, optimizer)
    scaler = torch.amp.GradScaler("cpu")
    for bad in (False, True, False):
        loss = model(torch.randn(8, 16)).sum() * (float("inf") if bad else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert schedule.step == 2


def test_frozen_layers_are_left():
    model = net()
    model[2].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    schedule = schedule_of(model, optimizer, budget=0.8)
    before = model[2].weight.clone()
    train(model, optimizer, 15)
    assert "2" not in schedule.ranks
    assert torch.equal(model[2].weight, before)
    row = next(row for row in schedule.fold()[1].rows if row.name == "2")
    assert row.why == "frozen"


def test_frozen_layers_in_evaluation_mode_are_counted() -> None:
    """A backbone that is frozen and kept in eval() costs what it costs: the budget is a share of all."""
    macs: list[float] = []
    for evaluating in (False, True):
        model = net()
        model[0].requires_grad_(False).train(not evaluating)
        schedule = schedule_of(model, sgd(model))
        train(model, schedule._optimizer, 12)
        macs.append(schedule.fold()[1].macs[0])
    assert macs == [16 * 24 + 24 * 20 + 20 * 4] * 2


def test_a_layer_that_is_silent_is_said():
    model = nn.ModuleDict({"used": nn.Linear(16, 16), "other": nn.Linear(16, 16)})
    optimizer = sgd(model)
    schedule_of(model, optimizer, start=1, end=2, every=1)
    model["used"](torch.randn(64, 16)).sum().backward()
    with pytest.warns(RetrogradeWarning, match="no forward pass went through \\['other'\\]"):
        optimizer.step()


def test_a_silent_layers_mean_is_not_added_twice_and_folding_says_what_was_silent():
    model = nn.ModuleDict({"used": nn.Linear(16, 16), "late": nn.Linear(16, 16), "never": nn.Linear(16, 16)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    schedule = schedule_of(model, optimizer, start=1, end=3, every=1, window=1, budget=0.6)
    x = torch.randn(64, 16) + 3
    for _ in range(2):
        (model["used"](x) + model["late"](x)).sum().backward()
        with pytest.warns(RetrogradeWarning, match="'never'"):
            optimizer.step()
    assert "late" in schedule.ranks
    before = model["late"].bias.clone()
    model["used"](x).sum().backward()
    with pytest.warns(RetrogradeWarning, match="'late', 'never'"):
        optimizer.step()
    assert torch.equal(model["late"].bias, before)
    report = schedule.fold()[1]
    assert next(row for row in report.rows if row.name == "never").why.startswith("no forward pass")


def test_a_budget_that_cannot_be_reached_is_an_error():
    model = net()
    optimizer = sgd(model)
    schedule_of(model, optimizer, budget=0.01, start=1)
    with pytest.raises(OptionError, match="cannot be reached"):
        train(model, optimizer, 1)


def test_errors():
    model = net()
    optimizer = sgd(model)
    wrong: dict[str, list[Any]] = {
        "budget": [1.0, 0.0, "0.5", None],
        "start": [0, "1", 1.5, True],
        "end": [1, float("inf")],
        "every": [0, 1.5],
        "window": [0, None],
    }
    for option, values in wrong.items():
        for value in values:
            with pytest.raises(OptionError, match=f"{option}={value!r} must be"):
                schedule_of(model, optimizer, **{option: value})
    with pytest.raises(NoEffectError, match="trains no layer"):
        schedule_of(model, sgd(net()))
    schedule = schedule_of(model, optimizer)
    train(model, optimizer, 3)
    with pytest.raises(NoEffectError, match="reached at optimizer step 12, and 3 have been made"):
        schedule.fold()
    schedule.stop()
    train(model, optimizer, 3)
    assert schedule.step == 3
