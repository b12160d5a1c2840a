"""Spectral transfer regularisation: the proximal step, what is measured of the source, and whom it restrains when."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import retrograde as rg
from cases import in_two_ranks
from retrograde.errors import (
    DataError,
    NoEffectError,
    OptionError,
    PatternError,
    RetrogradeWarning,
    StateError,
)
from retrograde.spectral import TransferPenalty
from retrograde.spectral.transfer.restrained import proximal


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def rows(count: int = 40, width: int = 6, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=g, dtype=torch.float64) * torch.arange(1.0, width + 1)


def source(seed: int = 1) -> list[Tensor]:
    return list(rows(seed=seed).split(10))


def sgd(model: nn.Module, rate: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), rate)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor | None = None) -> None:
    optimizer.zero_grad()
    model(rows(8, seed=9) if x is None else x).square().mean().backward()
    optimizer.step()


def joint(layer: Any) -> Tensor:
    return torch.cat((layer.weight.flatten(1), layer.bias[:, None]), 1).detach().clone()


def moment(x: Tensor) -> Tensor:
    """E[x̃x̃ᵀ]."""
    x = torch.cat((x, x.new_ones(len(x), 1)), 1)
    return x.T @ x / len(x)


# The mathematics.


@pytest.mark.parametrize("k", [0, 3, 7])
@pytest.mark.parametrize("sigma", [0.0, 0.3])
def test_proximal_step_is_the_dense_inverse(k: int, sigma: float) -> None:
    torch.manual_seed(0)
    delta = torch.randn(2, 5, 7, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(2, 7, k, dtype=torch.float64))[0]
    values = (1 + torch.rand(2, k, dtype=torch.float64)).sort(descending=True).values
    rest = torch.full((2,), sigma, dtype=torch.float64)
    h = torch.tensor([0.5, 0.5, 0.0, 2.0, 1e6, 0.5, 0.1], dtype=torch.float64)
    eye = torch.eye(7, dtype=torch.float64)
    c = basis @ torch.diag_embed(values) @ basis.mT + sigma * (eye - basis @ basis.mT)
    expected = delta @ torch.linalg.inv(eye + c @ torch.diag(h))
    torch.testing.assert_close(proximal(delta, basis, values, rest, h), expected)


def test_penalty_is_how_far_the_outputs_moved_on_the_source() -> None:
    model, x = net(), rows()
    penalty = TransferPenalty(model, [x], 3.0, rank=20, scale="none", skip_head=False)
    before = copy.deepcopy(model)
    optimizer = sgd(model, 0.5)
    step(model, optimizer)
    step(model, optimizer)
    inputs = {"0": x, "2": before[:2](x), "4": before[:4](x)}
    for name, value in penalty.by_layer().items():
        moved = model[int(name)](inputs[name]) - before[int(name)](inputs[name])
        assert value == pytest.approx(1.5 * float(moved.square().sum(1).mean()), rel=1e-9)
    assert penalty.penalty() == pytest.approx(sum(penalty.by_layer().values()))
    assert set(penalty.by_layer()) == {"0", "2", "4"}


CONVOLUTIONS = [
    nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
    nn.Conv1d(4, 6, 3, dilation=2, padding="same"),
    nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", bias=False),
]


@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=lambda layer: type(layer).__name__)
def test_penalty_of_a_convolution_is_the_mean_over_places(layer: nn.Module) -> None:
    layer = copy.deepcopy(layer).double()
    x = torch.randn(5, 4, *[9] * (layer.weight.dim() - 2), dtype=torch.float64)
    penalty = TransferPenalty(layer, [x], 2.0, rank=100, scale="none", skip_head=False, rows=10_000)
    before = copy.deepcopy(layer)
    step(layer, sgd(layer), x)
    moved = (layer(x) - before(x)).square().sum(1).mean()
    assert penalty.penalty() == pytest.approx(float(moved), rel=1e-9)
    assert penalty.penalty() > 0


def test_even_rest_keeps_the_trace_and_rank_0_is_l2_sp() -> None:
    model, x = net(), rows()
    whole = TransferPenalty(model, [x], 1.0, rank=2, scale="none", only="0")
    layer = whole._restrained[0]
    assert float(layer.values.sum() + layer.rest * 5) == pytest.approx(float(moment(x).trace()))
    whole.strength = 0.0
    isotropic = TransferPenalty(model, [x], 1.0, rank=0, only="0")
    before, plain = joint(model[0]), net()
    step(model, sgd(model))
    step(plain, sgd(plain))
    expected = before + (joint(plain[0]) - before) / 1.1
    torch.testing.assert_close(joint(model[0]), expected)
    assert isotropic.steps == whole.steps == 1


def test_energy_cuts_the_rank() -> None:
    penalty = TransferPenalty(net(), source(), rank=7, energy=0.6, only="0")
    layer = penalty._restrained[0]
    assert 1 <= layer.values.shape[-1] < 7
    penalty.steps = 1


@pytest.mark.parametrize("scale", ["mean", "top", "none"])
def test_scales_divide_by_what_they_say(scale: Any) -> None:
    model, x = net(), rows()
    c = moment(x)
    penalty = TransferPenalty(model, [x], rank=7, only="0", scale=scale)
    unit = {
        "mean": c.trace() / 7,
        "top": torch.linalg.eigvalsh(c)[-1],
        "none": torch.ones(()),
    }[scale]
    expected = torch.linalg.eigvalsh(c).flip(0) / unit.detach().double()
    torch.testing.assert_close(penalty._restrained[0].values[0], expected)
    penalty.steps = 1


# The step.


def test_step_is_the_optimizers_then_the_proximal_one_at_each_groups_rate() -> None:
    model, x = net(), rows()
    plain = copy.deepcopy(model)
    before, c = joint(model[0]), moment(x)

    def groups(m: nn.Sequential) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": [m[0].weight], "lr": 0.2}, {"params": [m[0].bias], "lr": 0.05}])

    penalty = TransferPenalty(model, [x], 4.0, rank=7, scale="none", only="0")
    step(model, groups(model))
    step(plain, groups(plain))
    h = 4.0 * torch.tensor([0.2] * 6 + [0.05], dtype=torch.float64)
    eye = torch.eye(7, dtype=torch.float64)
    expected = before + (joint(plain[0]) - before) @ torch.linalg.inv(eye + c @ torch.diag(h))
    torch.testing.assert_close(joint(model[0]), expected)
    torch.testing.assert_close(joint(model[2]), joint(plain[2]))
    assert penalty.steps == 1


def test_two_optimizers_each_take_their_part() -> None:
    model, x = net(), rows()
    penalty = TransferPenalty(model, [x], 4.0, rank=7, only="0")
    weights = torch.optim.SGD([model[0].weight], 0.1)
    biases = torch.optim.SGD([model[0].bias], 0.1)
    model(x).sum().backward()
    bias = model[0].bias.detach().clone()
    weights.step()
    assert torch.equal(model[0].bias, bias)
    weight = model[0].weight.detach().clone()
    biases.step()
    assert torch.equal(model[0].weight, weight)
    assert not torch.equal(model[0].bias, bias - 0.1 * model[0].bias.grad)
    assert penalty.steps == 2


def test_small_steps_follow_the_gradient_of_loss_and_penalty() -> None:
    model, x, rate = net(), rows(), 1e-4
    penalty = TransferPenalty(model, [x], 2.0, rank=7, scale="none", only="0")
    before, c = joint(model[0]), moment(x)
    with torch.no_grad():
        model[0].weight += 0.1
    here = joint(model[0])
    optimizer = sgd(model, rate)
    step(model, optimizer)
    gradient = torch.cat((model[0].weight.grad, model[0].bias.grad[:, None]), 1)
    expected = here - rate * (gradient + 2.0 * (here - before) @ c)
    torch.testing.assert_close(joint(model[0]), expected, rtol=0, atol=2e-5)
    assert float((joint(model[0]) - here + rate * gradient).abs().max()) > 1e-4
    assert penalty.steps == 1


def test_schedules_are_followed() -> None:
    model = net()
    penalty = TransferPenalty(model, source(), 1e6, only="0")
    optimizer = sgd(model, 0.0)
    with torch.no_grad():
        model[0].weight += 1.0
    moved = joint(model[0])
    step(model, optimizer)
    torch.testing.assert_close(joint(model[0]), moved)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    step(model, optimizer)
    assert float((joint(model[0]) - moved).abs().max()) > 0.5
    assert penalty.steps == 2


def test_enormous_strength_stays_at_the_source() -> None:
    model = net().float()
    before = joint(model[0])
    penalty = TransferPenalty(model, [x.float() for x in source()], 1e12, rank=4, skip_head=False)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    for _ in range(20):
        step(model, optimizer, rows(8).float())
    torch.testing.assert_close(joint(model[0]), before, rtol=0, atol=1e-3)
    assert penalty.steps == 20


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_grad_scaler_skips_pull_nothing(fused: bool) -> None:
    model = net().float()
    penalty = TransferPenalty(model, [x.float() for x in source()], 100.0, only="0")
    with torch.no_grad():
        model[0].weight += 1.0
    before = joint(model[0])
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, fused=fused, weight_decay=0.0)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(rows(8).float()).sum() * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(joint(model[0]), before)
    optimizer.zero_grad()
    scaler.scale(model(rows(8).float()).sum()).backward()
    scaler.step(optimizer)
    assert float((joint(model[0]) - before).abs().max()) > 0.5
    assert penalty.steps >= 1


class Outer(torch.optim.Optimizer):
    """Steps another optimizer twice inside its own step, over the same parameters."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure: Any = None) -> None:
        self.inner.step()
        self.inner.step()


def test_steps_inside_a_step_count_once() -> None:
    model = net()
    penalty = TransferPenalty(model, source(), only="0")
    step(model, Outer(sgd(model)))
    assert penalty.steps == 1


def test_source_function_is_kept_where_target_needs_other_directions() -> None:
    torch.manual_seed(0)
    x, target = torch.zeros(64, 8), torch.zeros(64, 8)
    x[:, :4], target[:, 4:] = torch.randn(64, 4), torch.randn(64, 4)
    target[:, :4] = 0.3 * torch.randn(64, 4)

    def tuned(strength: float) -> tuple[float, float]:
        torch.manual_seed(1)
        layer = nn.Linear(8, 2)
        kept, wanted = layer(x).detach(), target @ torch.randn(8, 2)
        penalty = TransferPenalty(layer, [x], strength, rank=5, rest="none", skip_head=False)
        optimizer = torch.optim.Adam(layer.parameters(), 0.05)
        for _ in range(300):
            optimizer.zero_grad()
            loss = F.mse_loss(layer(target), wanted)
            loss.backward()
            optimizer.step()
        penalty.remove()
        return float(loss), float(F.mse_loss(layer(x), kept))

    (free_loss, free_change), (loss, change) = tuned(0.0), tuned(100.0)
    assert free_loss < 1e-3
    assert loss < 0.3
    assert change < 1e-3 * free_change


# Who is restrained.


def test_new_head_is_free_and_the_old_one_is_left_out() -> None:
    model = net()
    penalty = TransferPenalty(model, source(), 1e9)
    assert penalty.layers == ("0", "2")
    assert "head" in penalty.left_out["4"]
    model[4] = nn.Linear(8, 2).double()
    before = joint(model[4])
    step(model, sgd(model))
    assert float((joint(model[4]) - before).abs().max()) > 1e-3
    assert penalty.steps == 1


def test_layers_of_saved_statistics_are_found_by_name_and_shape() -> None:
    state = TransferPenalty.statistics(net(), source(), rank=4)
    model = net()
    model[2] = nn.Linear(8, 4).double()
    model[4] = nn.Linear(4, 3).double()
    penalty = TransferPenalty(model, state, skip_head=False)
    assert penalty.layers == ("0",)
    assert "(4, 8), and was (8, 8)" in penalty.left_out["2"]
    step(model, sgd(model))
    with pytest.raises(NoEffectError, match="new layer"):
        TransferPenalty(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), state)


def test_patterns() -> None:
    model = net()
    with pytest.raises(PatternError, match="matches no layer"):
        TransferPenalty(model, source(), skip="nowhere")
    penalty = TransferPenalty(model, source(), skip=["2"], skip_head=False)
    assert penalty.layers == ("0", "4")
    assert penalty.left_out == {"2": "named in `skip`"}
    step(model, sgd(model))


def test_frozen_layers_stay_and_are_told_of() -> None:
    model = net()
    with torch.no_grad():
        model[0].weight.requires_grad_(False)
    penalty = TransferPenalty(model, source(), 10.0, only="0")
    before = joint(model[0])
    step(model, sgd(model))
    assert torch.equal(joint(model[0])[:, :-1], before[:, :-1])
    assert penalty.steps == 1
    with pytest.warns(RetrogradeWarning, match="frozen"):
        kept = TransferPenalty(model.requires_grad_(False), source())
    kept.steps = 1


def test_normalisations_are_pulled_to_their_source() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2))
    penalty = TransferPenalty(model, [torch.randn(16, 6)], 10.0)
    assert penalty.layers == ("0", "1")
    with torch.no_grad():
        model[1].weight += 1.0
    assert penalty.by_layer()["1"] == pytest.approx(0.5 * 10 * 8)
    optimizer = sgd(model, 0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(model[1].weight.detach(), torch.full((8,), 1.5))
    assert TransferPenalty.statistics(model, [torch.randn(4, 6)]).keys() >= {"1.weight", "1.bias", "0.basis"}


def test_attached_layers_are_restrained_and_computed_weights_are_left_out() -> None:
    model, plain = net(), net()
    session = rg.attach(model, rg.Exact(), decline=False)
    nn.utils.parametrizations.weight_norm(plain[2])
    penalties = [TransferPenalty(m, source(), 1e9) for m in (model, plain)]
    assert penalties[0].layers == ("0", "2")
    assert penalties[1].layers == ("0",)
    assert "computed anew" in penalties[1].left_out["2"]
    before = joint(model[0])
    for m in (model, plain):
        step(m, sgd(m))
        torch.testing.assert_close(joint(m[0]), before, rtol=0, atol=1e-5)
    session.detach()


def test_optimizer_without_a_learning_rate_is_refused() -> None:
    model = net()
    penalty = TransferPenalty(model, source())
    optimizer = sgd(model)
    del optimizer.param_groups[0]["lr"]
    with pytest.raises(OptionError, match="SGD has no learning rate"):
        penalty.after(optimizer)
    penalty.steps = 1


def test_attention_shared_layers_and_transposed_convolutions() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    penalty = TransferPenalty(encoder, [torch.randn(4, 5, 8)], skip_head=False)
    assert set(penalty.layers) == {
        "self_attn",
        "self_attn.out_proj",
        "linear1",
        "linear2",
        "norm1",
        "norm2",
    }
    step(encoder, sgd(encoder), torch.randn(4, 5, 8))
    assert penalty.penalty() > 0
    shared = nn.Linear(4, 4)
    twice = nn.Sequential(shared, nn.ReLU(), shared, nn.ConvTranspose1d(5, 3, 2, stride=2))
    second = TransferPenalty(twice, [torch.randn(2, 5, 4)], skip_head=False)
    assert second.layers == ("0", "3")
    step(twice, sgd(twice), torch.randn(2, 5, 4))
    assert all(value > 0 for value in second.by_layer().values())


def test_bfloat16_and_autocast() -> None:
    model = net().bfloat16()
    penalty = TransferPenalty(model, [x.bfloat16() for x in source()], 1e4)
    before = joint(model[0])
    step(model, sgd(model), rows(8).bfloat16())
    assert model[0].weight.dtype == torch.bfloat16
    assert float((joint(model[0]) - before).abs().max()) < 0.01
    model = net().float()
    other = TransferPenalty(model, [x.float() for x in source()])
    with torch.autocast("cpu", torch.bfloat16):
        step(model, sgd(model), rows(8).float())
    assert penalty.steps == other.steps == 1


# The source.


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = net()

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.body(x) * scale


def test_batches_of_every_kind_give_the_same_statistics() -> None:
    model, x = Named(), rows()
    expected = TransferPenalty.statistics(model, [x], rank=3)
    kinds: list[Any] = [(x, torch.zeros(40)), [x], {"x": x, "labels": torch.zeros(40)}]
    for batch in kinds:
        found = TransferPenalty.statistics(model, [batch], rank=3)
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    found = TransferPenalty.statistics(model, [(1.0, x)], rank=3, forward=lambda b: model(b[1], scale=b[0]))
    assert torch.equal(found["body.0.basis"], expected["body.0.basis"])


def test_statistics_leave_the_model_as_it_was() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 2)).double()
    model[1].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()
    TransferPenalty.statistics(model, source())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [m.training for m in model] == [True, False, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), random)


def test_one_row_and_wide_layers() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(1200, 3)
    x = torch.randn(1, 1200)
    state = TransferPenalty.statistics(layer, [x], rank=2)
    row = torch.cat((x[0], torch.ones(1)))
    assert float((state[".basis"][0, :, 0] @ row) ** 2 / row.square().sum()) == pytest.approx(1, rel=1e-4)
    assert float(state[".values"][0, 0]) == pytest.approx(float(row.square().sum()), rel=1e-4)


def test_refused_sources() -> None:
    model = net()
    with pytest.raises(DataError, match="no batch"):
        TransferPenalty(model, [])
    with pytest.raises(DataError, match=r"layer '0'.*not finite"):
        TransferPenalty(model, [rows() / 0])
    with pytest.raises(OptionError, match=r"given int64 tensor of shape .*A batch must be.*give `forward`"):
        TransferPenalty(model, [(torch.arange(4), rows())])
    with pytest.raises(OptionError, match="'input' is missing"):
        TransferPenalty(model, [{"picture": rows()}])
    with pytest.raises(OptionError, match="no statistics"):
        TransferPenalty(model, model.state_dict())
    with pytest.raises(NoEffectError, match="no linear-like"):
        TransferPenalty(nn.ReLU(), [rows()])
    wrong: dict[str, list[Any]] = {
        "strength": [-1.0, "x", None],
        "rank": [-1, 2.5, None],
        "energy": [0.0, "x"],
        "rest": ["odd"],
        "scale": ["x"],
        "rows": [0, 1.5],
        "batches": [1.5, "2"],
    }
    for option, values in wrong.items():
        for value in values:
            with pytest.raises(OptionError, match=f"{option}={value!r} must be"):
                TransferPenalty(model, source(), **{option: value})
    with pytest.raises(OptionError, match=r"rank=1\.5 must be"):
        TransferPenalty.statistics(model, source(), rank=1.5)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="restrains nothing"):
        TransferPenalty(model, source(), rank=0, rest="none")


# State and life.


def test_saved_statistics_stand_for_the_loader(tmp_path: Any) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    file = tmp_path / "source.safetensors"
    safetensors.save_file(TransferPenalty.statistics(net(), source(), rank=8), file)
    models = net(), net()
    sources: list[Any] = [source(), safetensors.load_file(file)]
    for model, given in zip(models, sources, strict=True):
        penalty = TransferPenalty(model, given, 5.0, rank=4)
        optimizer = sgd(model)
        step(model, optimizer)
        step(model, optimizer)
        assert penalty.steps == 2
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict())


def test_resumed_run_equals_the_uninterrupted_one(tmp_path: Any) -> None:
    model = net()
    penalty = TransferPenalty(model, source(), 5.0, rank=4)
    optimizer = sgd(model)
    step(model, optimizer)
    torch.save({"model": model.state_dict(), "penalty": penalty.state_dict()}, tmp_path / "state.pt")
    step(model, optimizer)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again = net()
    again.load_state_dict(state["model"])
    resumed = TransferPenalty(again, state["penalty"]["statistics"], rank=4)
    resumed.load_state_dict(state["penalty"])
    assert resumed.strength == 5.0
    step(again, sgd(again))
    assert resumed.steps == 2
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    with pytest.raises(StateError, match="does not fit"):
        resumed.load_state_dict({"statistics": {}, "strength": 1.0, "steps": 0})


def test_state_of_another_model_is_refused_and_changes_nothing() -> None:
    model = net()
    penalty = TransferPenalty(model, source(), 2.0)
    other = nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    another = TransferPenalty(other, [rows(width=9)], 5.0)
    state = another.state_dict()
    with pytest.raises(StateError, match=r"layer '0': its weight is \(8, 6\), and was \(8, 9\)"):
        penalty.load_state_dict(state)
    for wrong in ({**penalty.state_dict(), "strength": -1.0}, {**penalty.state_dict(), "statistics": None}):
        with pytest.raises(StateError, match="does not fit"):
            penalty.load_state_dict(wrong)
    grouped = nn.Conv2d(4, 4, (1, 2), groups=2)
    conv = TransferPenalty(grouped, [torch.randn(2, 4, 5, 5)], skip_head=False)
    narrow = nn.Conv2d(2, 4, (1, 2))
    plain = TransferPenalty(narrow, [torch.randn(2, 2, 5, 5)], skip_head=False)
    with pytest.raises(StateError, match="it has 2 groups, and had 1"):
        conv.load_state_dict(plain.state_dict())
    assert penalty.strength == 2.0
    step(model, sgd(model))
    assert penalty.steps == 1
    another.steps = conv.steps = plain.steps = 1


def test_precision_of_the_model_is_followed() -> None:
    """Statistics of float32 for a model of float64, and a model whose precision changes when the penalty is there."""
    found: list[Tensor] = []
    for when in ("statistics", "later", "back"):
        model = net().float()
        state = TransferPenalty.statistics(model, [x.float() for x in source()], rank=4)
        if when == "statistics":
            model.double()
        penalty = TransferPenalty(model, state, 5.0)
        model.double()
        step(model, sgd(model))
        if when == "back":
            model.float()
            step(model, sgd(model), rows(8, seed=9).float())
        assert penalty.penalty() > 0
        found.append(joint(model[0]))
        assert penalty.steps == 1 + (when == "back")
    assert torch.equal(found[0], found[1])
    assert found[2].dtype == torch.float32


def test_copies() -> None:
    model = net()
    penalty = TransferPenalty(model, source(), 1e9)
    alone = copy.deepcopy(model)
    before = joint(alone[0])
    step(alone, sgd(alone))
    assert float((joint(alone[0]) - before).abs().max()) > 1e-3
    assert penalty.steps == 0
    pair, copied = copy.deepcopy((model, penalty))
    step(pair, sgd(pair))
    torch.testing.assert_close(joint(pair[0]), before, rtol=0, atol=1e-5)
    assert (copied.steps, penalty.steps) == (1, 0)
    step(model, sgd(model))


def test_removed_penalty_does_nothing_more() -> None:
    model, plain = net(), net()
    penalty = TransferPenalty(model, source(), 1e9)
    step(model, sgd(model))
    penalty.remove()
    model.load_state_dict(plain.state_dict())
    step(model, sgd(model))
    step(plain, sgd(plain))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
    assert penalty.steps == 1


def test_no_silent_no_effect() -> None:
    penalty = TransferPenalty(net(), source())
    with pytest.warns(RetrogradeWarning, match="removed before any optimizer step"):
        penalty.remove()
    penalty = TransferPenalty(net(), source())
    with pytest.warns(RetrogradeWarning, match="dropped before any optimizer step"):
        del penalty


def test_weight_of_another_shape_is_refused() -> None:
    model = net()
    penalty = TransferPenalty(model, source(), only="2")
    model[2].weight = nn.Parameter(torch.zeros(8, 9).double())
    optimizer = sgd(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.raises(StateError, match="layer '2' has become"):
        optimizer.step()
    penalty.steps = 1


# In a group of ranks.


def ranked(rank: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    whole, sharded, part = net(), net(), [source()[2 * rank], source()[2 * rank + 1]]
    penalties = [TransferPenalty(model, part, 5.0, rank=4) for model in (whole, sharded)]
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    for model in (whole, sharded):
        optimizer = sgd(model)
        step(model, optimizer)
        step(model, optimizer)
    weights = {"whole": whole[0].weight.detach(), "sharded": sharded[0].weight.full_tensor().detach()}
    torch.save({**weights, "steps": [p.steps for p in penalties]}, f"{folder}/rank{rank}.pt")


def test_ranks_share_statistics_and_shards_are_pulled_as_wholes(tmp_path: Path, monkeypatch: Any) -> None:
    in_two_ranks(ranked, tmp_path, monkeypatch)
    model = net()
    penalty = TransferPenalty(model, source(), 5.0, rank=4)
    optimizer = sgd(model)
    step(model, optimizer)
    step(model, optimizer)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        torch.testing.assert_close(found["whole"], model[0].weight.detach())
        torch.testing.assert_close(found["sharded"], model[0].weight.detach())
        assert found["steps"] == [2, 2]
    assert penalty.steps == 2
