"""Weights kept orthogonal: the transform against its formula, and what an ordinary training loop does with them."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from retrograde.errors import AttachError, NoEffectError, PatternError, RetrogradeWarning
from retrograde.maths import spectral
from retrograde.spectral import keep_orthogonal
from retrograde.spectral.orthogonal import nearest_orthonormal, stiefel_step, tangent

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
}


def point(n: int, p: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.linalg.qr(torch.randn(n, p, dtype=torch.float64))[0].to(dtype)


def initialised(model: nn.Module) -> Any:
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.orthogonal_(layer.weight)
    return model


def network(width: int = 12) -> nn.Sequential:
    return initialised(plain(width))


def plain(width: int = 12) -> nn.Sequential:
    return nn.Sequential(nn.Linear(20, width), nn.ReLU(), nn.Linear(width, 30), nn.ReLU(), nn.Linear(30, 3))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, inputs: int = 20) -> list[float]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(64, inputs, generator=generator)
    y = (x @ torch.randn(inputs, 3, generator=generator)).argmax(1)
    losses: list[float] = []
    for _ in range(steps):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


# The transform.


@pytest.mark.parametrize(("n", "p"), [(9, 2), (9, 4), (9, 5), (6, 6), (4, 1), (1, 1)])
def test_step_is_the_formula(n: int, p: int) -> None:
    """Both ways to solve equation (3) are Cayley's transform of A from equation (2)."""
    q, z = point(n, p), 0.3 * torch.randn(n, p, dtype=torch.float64)
    eye = torch.eye(n, dtype=torch.float64)
    m = (eye - 0.5 * q @ q.T) @ z
    a = m @ q.T - q @ m.T
    expected = torch.linalg.inv(eye - a / 2) @ (eye + a / 2) @ q
    torch.testing.assert_close(stiefel_step(q, z), expected)
    torch.testing.assert_close(a @ q, tangent(q, z))


@pytest.mark.parametrize(("n", "p"), [(12, 3), (12, 8), (7, 7)])
def test_first_order(n: int, p: int) -> None:
    """The step departs from q + tangent(q, z) by O(z²), with the slope to show it."""
    q, z = point(n, p), torch.randn(n, p, dtype=torch.float64)
    errors = [torch.linalg.matrix_norm(stiefel_step(q, h * z) - q - tangent(q, h * z)) for h in (1e-2, 1e-3)]
    assert 1.9 < float(torch.log10(errors[0] / errors[1])) < 2.1


@pytest.mark.parametrize("length", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize(("n", "p"), [(64, 8), (64, 40), (48, 48)])
def test_steps_of_any_length_stay(n: int, p: int, length: float) -> None:
    q = point(n, p, torch.float32)
    assert spectral.orthonormality(stiefel_step(q, length * torch.randn(n, p))) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 8), (48, 48), (2, 12, 5)])
def test_long_steps_of_rank_one_stay(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """One example's gradient, however long: on the manifold, and where Cayley's transform ends."""
    generator = torch.Generator().manual_seed(0)
    exact = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64))[0]
    rounded = exact.to(dtype).float()
    z = torch.randn(*shape[:-1], 1, generator=generator) * torch.randn(shape[-1], generator=generator)
    z = z / torch.linalg.matrix_norm(z)[..., None, None]
    for length in (1.0, 10.0, 30.0, 100.0, 1e3, 1e4, 1e8, 1e16, 1e30):
        found = stiefel_step(rounded, length * z)
        assert spectral.orthonormality(found) <= (1e-6 if dtype == torch.float32 else 1e-3), length
        if dtype == torch.float32 and length <= 1e4:
            eye = torch.eye(shape[-2], dtype=torch.float64)
            m = length * (eye - 0.5 * exact @ exact.mT) @ z.double()
            a = m @ exact.mT - exact @ m.mT
            expected = torch.linalg.solve(eye - a / 2, (eye + a / 2) @ exact)
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-4)
    assert stiefel_step(rounded, torch.nan * z).isnan().all()


def test_training_goes_on_after_a_long_step() -> None:
    layer = initialised(nn.Linear(32, 16, bias=False))
    optimizer = torch.optim.SGD(layer.parameters(), 1.0)
    kept = keep_orthogonal(layer, optimizer)
    gradient = torch.outer(torch.randn(16), torch.randn(32))
    for length in (1e4, *[1e-2] * 50):
        layer.weight.grad = gradient * (length / gradient.norm())
        gradient = torch.randn(16, 32)
        optimizer.step()
        assert kept.orthonormality()["(root)"] <= 1e-6


def test_normal_steps_do_nothing() -> None:
    """Weight decay, Z ∝ Q, is normal to the manifold."""
    q = point(10, 4)
    torch.testing.assert_close(stiefel_step(q, -0.3 * q), q)
    assert tangent(q, q).abs().max() < 1e-14


def test_nearest() -> None:
    """The polar factor: the symmetric factor that is left is positive."""
    w = torch.randn(8, 3, dtype=torch.float64)
    q = nearest_orthonormal(w)
    assert spectral.orthonormality(q) < 1e-14
    left = q.T @ w
    torch.testing.assert_close(left, left.T)
    assert torch.linalg.eigvalsh(left).min() > 0
    assert nearest_orthonormal(q) is q


# Training.


@pytest.mark.parametrize(("optimizer", "shape"), [("sgd", (4, 12)), ("adam", (12, 4))])
def test_ten_thousand_steps(optimizer: str, shape: tuple[int, int]) -> None:
    """Orthonormal to 1e-6 in float32, wide and tall, at every reading, under gradients that keep turning the weight."""
    layer = initialised(nn.Linear(shape[1], shape[0], bias=False))
    made = OPTIMIZERS[optimizer](layer.parameters())
    kept = keep_orthogonal(layer, made)
    start, worst = layer.weight.detach().clone(), 0.0
    gradients = torch.randn(16, *shape)
    for step in range(10_000):
        layer.weight.grad = gradients[step % 16].clone()
        made.step()
        if step % 100 == 99:
            worst = max(worst, *kept.orthonormality().values())
    assert worst <= 1e-6
    assert torch.linalg.matrix_norm(layer.weight - start) > 0.5


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_learns(optimizer: str) -> None:
    model = network(12)
    made = OPTIMIZERS[optimizer](model.parameters())
    kept = keep_orthogonal(model, made)
    assert kept.layers == ("0", "2")
    losses = train(model, made, 200)
    assert losses[-1] < 0.5 * losses[0]
    assert max(kept.orthonormality().values()) <= 1e-6


def test_step_in_training_is_the_optimizers_turned() -> None:
    """Against the same optimizer by hand: SGD's first step is −ηG, its tangent part the first-order move."""
    model = network().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model[2].weight.data = nearest_orthonormal(model[2].weight.data)
    keep_orthogonal(model, optimizer, "2")
    before = model[2].weight.detach().clone()
    F.cross_entropy(model(torch.randn(16, 20, dtype=torch.float64)), torch.randint(3, (16,))).backward()
    grad = model[2].weight.grad.clone()
    optimizer.step()
    expected = stiefel_step(before, -0.05 * tangent(before, grad))
    torch.testing.assert_close(model[2].weight.detach(), expected)
    torch.testing.assert_close(model[2].weight.grad, tangent(before, grad))


def test_other_layers_train_as_before() -> None:
    model = network()
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    keep_orthogonal(model, optimizer, "0")
    with torch.no_grad():
        plain[0].weight.copy_(model[0].weight)
    train(model, optimizer, 1)
    train(plain, torch.optim.SGD(plain.parameters(), lr=0.1), 1)
    torch.testing.assert_close(model[2].weight, plain[2].weight)
    torch.testing.assert_close(model[0].bias, plain[0].bias)
    assert not torch.allclose(model[0].weight, plain[0].weight)


def test_param_groups_and_patterns() -> None:
    model = network()
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters(), "lr": 0.1}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    kept = keep_orthogonal(model, optimizer, lambda name, layer: isinstance(layer, nn.Linear))
    assert kept.layers == ("0", "2")
    assert kept.left_out == {"4": "its weight is not among the optimizer's parameters"}
    before = model[0].weight.detach().clone()
    train(model, optimizer, 3)
    torch.testing.assert_close(model[0].weight.detach(), before)
    assert max(kept.orthonormality().values()) <= 1e-6


def test_steps_that_the_scaler_skips() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kept = keep_orthogonal(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = model[0].weight.detach().clone()
    for bad in (True, False):
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(torch.randn(8, 20)), torch.randint(3, (8,)))).backward()
        if bad:
            model[2].weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(model[0].weight, before) is bad
    assert max(kept.orthonormality().values()) <= 1e-6


def test_closure() -> None:
    """The gradient is made inside the step; the step is turned all the same."""
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    kept = keep_orthogonal(model, optimizer)
    x, y = torch.randn(32, 20), torch.randint(3, (32,))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    before = model[0].weight.detach().clone()
    for _ in range(3):
        optimizer.step(closure)
    assert not torch.equal(model[0].weight, before)
    assert max(kept.orthonormality().values()) <= 1e-6


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions(groups: int) -> None:
    model = nn.Sequential(nn.Conv2d(2, 8, 3, groups=groups), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 3))
    initialised(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    kept = keep_orthogonal(model, optimizer, "0")
    x, y = torch.randn(1, 2, 8, 8), torch.tensor([1])
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    w = model[0].weight.detach().reshape(groups, 8 // groups, -1)
    eye = torch.eye(min(w.shape[1:])).expand(groups, -1, -1)
    gram = w @ w.mT if w.shape[1] <= w.shape[2] else w.mT @ w
    torch.testing.assert_close(gram, eye, atol=1e-6, rtol=0)
    assert kept.orthonormality()["0"] <= 1e-6


def test_bfloat16_and_autocast() -> None:
    model = network().bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    kept = keep_orthogonal(model, optimizer)
    for _ in range(50):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(8, 20).bfloat16()).float(), torch.randint(3, (8,))).backward()
        optimizer.step()
    assert max(kept.orthonormality().values()) <= 4 * torch.finfo(torch.bfloat16).eps
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    kept = keep_orthogonal(model, optimizer)
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            F.cross_entropy(model(torch.randn(8, 20)), torch.randint(3, (8,))).backward()
            optimizer.step()
    assert max(kept.orthonormality().values()) <= 1e-6


def test_shared_weight_is_turned_once() -> None:
    model = initialised(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 3)))
    model[2].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kept = keep_orthogonal(model, optimizer)
    assert kept.layers == ("0",)
    train(model, optimizer, 30, 6)
    assert kept.orthonormality()["0"] <= 1e-6


# torch's parametrization.


@pytest.mark.parametrize("kind", ["matrix_exp", "cayley", "householder"])
@pytest.mark.parametrize("width", [12, 30])
def test_parametrization_is_replaced(kind: str, width: int) -> None:
    """The function stays, the optimizer's parameter is the weight itself, and old moments are gone."""
    model = network(width)
    for at in (0, 2):
        parametrizations.orthogonal(model[at], orthogonal_map=kind)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    train(model, optimizer, 3)
    x = torch.randn(4, 20)
    before = model(x)
    kept = keep_orthogonal(model, optimizer)
    assert kept.replaced == ("0", "2")
    torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-5)
    assert set(model.state_dict()) == set(network().state_dict())
    assert model[0].weight not in optimizer.state
    assert model[4].weight in optimizer.state
    losses = train(model, optimizer, 100)
    assert losses[-1] < 0.7 * losses[0]
    assert max(kept.orthonormality().values()) <= 1e-6


def test_other_parametrizations_are_refused() -> None:
    model = network()
    parametrizations.spectral_norm(model[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(AttachError, match=r"'0' has a parametrization.*remove_parametrizations"):
        keep_orthogonal(model, optimizer)
    kept = keep_orthogonal(model, optimizer, "2")
    assert kept.layers == ("2",)
    kept.remove()


# State, ends and errors.


def test_resumed_run_is_the_uninterrupted_one() -> None:
    torch.manual_seed(3)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    keep_orthogonal(model, optimizer)
    train(model, optimizer, 10)
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, 10)
    other = network()
    resumed = torch.optim.Adam(other.parameters(), lr=1e-2)
    keep_orthogonal(other, resumed)
    other.load_state_dict(state[0])
    resumed.load_state_dict(state[1])
    train(other, resumed, 10)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_a_plain_checkpoint_loaded_later_is_made_orthonormal() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kept = keep_orthogonal(model, optimizer)
    model.load_state_dict({name: 7 * value for name, value in network().state_dict().items()})
    assert max(kept.orthonormality().values()) > 1
    with pytest.warns(
        RetrogradeWarning, match=r"0, 2 were written to since the last step.*up to 48 from orthonormal"
    ):
        train(model, optimizer, 1)
    assert max(kept.orthonormality().values()) <= 1e-6


def test_copies_and_pickles() -> None:
    """Nothing is left on the model; hooks stay with the optimizer that they were given."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kept = keep_orthogonal(model, optimizer)
    train(model, optimizer, 2)
    for twin in (copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))):
        assert twin.layers == ("0", "2")
        twin.remove()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(torch.ones(1, 20)), model(torch.ones(1, 20)))
    pickle.loads(pickle.dumps(optimizer))


def test_removed() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    kept = keep_orthogonal(model, optimizer)
    kept.remove()
    train(model, optimizer, 5)
    assert max(kept.orthonormality().values()) > 1e-3
    with pytest.warns(RetrogradeWarning, match="were replaced"):
        assert keep_orthogonal(model, optimizer).layers == ("0", "2")
    train(model, optimizer, 1)


def test_weights_that_are_replaced_at_once_are_said() -> None:
    """With how far they were; orthonormal ones, to the weight's own rounding, are taken in silence."""
    model = plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    far = spectral.orthonormality(model[2].weight.detach())
    with pytest.warns(
        RetrogradeWarning, match=rf"2 were up to {far:.2g} from orthonormal.*replaced.*orthogonal_"
    ):
        kept = keep_orthogonal(model, optimizer, "2")
    kept.remove()
    for dtype in (torch.float32, torch.bfloat16):
        model = network().to(dtype)
        keep_orthogonal(model, torch.optim.SGD(model.parameters(), lr=0.5)).remove()


@pytest.mark.parametrize("own", [False, True])
def test_steps_of_another_optimizer_are_said(own: bool) -> None:
    """Once, whether or not the given one ever steps again; and that it makes the weights orthonormal again."""
    model = network()
    optimizer, other = (torch.optim.SGD(model.parameters(), lr=0.5) for _ in range(2))
    kept = keep_orthogonal(model, optimizer)
    train(model, optimizer, 2)
    with pytest.warns(
        RetrogradeWarning,
        match=r"a step of SGD took .*0, 2 up to .* from orthonormal.*was given another SGD, and",
    ) as caught:
        train(model, other, 3)
    assert len(caught) == 1
    assert max(kept.orthonormality().values()) > 1e-3
    if own:
        with pytest.warns(
            RetrogradeWarning, match="an optimizer that is not the one keep_orthogonal was given"
        ):
            train(model, optimizer, 1)
        assert max(kept.orthonormality().values()) <= 1e-6
    else:
        kept.remove()
        train(model, other, 1)


def test_every_cause_of_replaced_weights_is_said() -> None:
    """Steps of another optimizer once, by name; weights that are written in between each time."""
    model = network()
    optimizer, other = torch.optim.Adam(model.parameters()), torch.optim.SGD(model.parameters(), lr=0.5)
    kept = keep_orthogonal(model, optimizer)

    def run() -> None:
        for scale in (None, None, 2, 3):
            train(model, other, 2)
            if scale:
                model.load_state_dict({name: scale * value for name, value in network().state_dict().items()})
            train(model, optimizer, 2)

    with pytest.warns(RetrogradeWarning) as caught:
        run()
    said = [str(warning.message) for warning in caught]
    assert "a step of SGD took" in said[0]
    assert "keep_orthogonal was given Adam, and turns" in said[0]
    assert "by steps of an optimizer that is not the one keep_orthogonal was given" in said[1]
    assert [("up to 3 from" in text, "up to 8 from" in text) for text in said[2:]] == [
        (True, False),
        (False, True),
    ]
    assert all("were written to since the last step" in text for text in said[2:])
    assert max(kept.orthonormality().values()) <= 1e-6


def test_optimizers_around_and_inside_are_no_others() -> None:
    """One that steps the given one within its own step, and one that the given one steps."""

    class Around(torch.optim.SGD):
        inner: torch.optim.Optimizer

        def step(self, closure: Any = None) -> None:
            self.inner.step()

    for outermost in (False, True):
        model = network()
        outer = Around(model.parameters(), lr=0.1)
        outer.inner = torch.optim.SGD(model.parameters(), lr=0.1)
        kept = keep_orthogonal(model, outer if outermost else outer.inner)
        train(model, outer, 3)
        assert max(kept.orthonormality().values()) <= 1e-6
        # Layers that are not kept are anybody's.
        train(model[4], torch.optim.SGD(model[4].parameters(), lr=0.1), 1, 30)


def test_an_optimizer_that_is_dropped_is_said() -> None:
    model = network()
    with pytest.warns(RetrogradeWarning, match="0, 2 was dropped before it made a step"):
        keep_orthogonal(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_in_one_line() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    kept = keep_orthogonal(model, optimizer)
    train(model, optimizer, 3)
    assert repr(kept) == "Orthogonal(0, 2; 3 steps)"
    kept.remove()
    assert repr(kept) == "Orthogonal(0, 2; 3 steps, removed)"


def test_refusals() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    kept = keep_orthogonal(model, optimizer, "0")
    with pytest.raises(AttachError, match=r"'0'.*already.*remove\(\)"):
        keep_orthogonal(model, optimizer)
    with pytest.raises(PatternError, match="matches no layer"):
        keep_orthogonal(model, optimizer, "encoder.*")
    frozen = network().requires_grad_(False)
    frozen[4].requires_grad_(True)
    with pytest.raises(NoEffectError, match="'0': its weight is frozen"):
        keep_orthogonal(frozen, torch.optim.SGD(frozen[4].parameters(), lr=0.1))
    with pytest.raises(NoEffectError, match="no linear layer"):
        keep_orthogonal(nn.ReLU(), optimizer)
    attention = nn.MultiheadAttention(4, 2)
    with pytest.raises(NoEffectError, match="three matrices"):
        keep_orthogonal(
            attention, torch.optim.SGD(attention.parameters(), lr=0.1), lambda name, _: name == "(root)"
        )
    recurrent = nn.Sequential(nn.LSTM(4, 4))
    with pytest.raises(NoEffectError, match="no linear layer"):
        keep_orthogonal(recurrent, torch.optim.SGD(recurrent.parameters(), lr=0.1))
    kept.remove()
