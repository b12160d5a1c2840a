"""One step of Decorrelate, written down: one of W and b' in ``y = W R (x − μ) + b'``, by autograd through these.

Precondition mode is the same with μ = 0, and R the root of what gradients are multiplied by.
"""

from typing import Any

import torch
from torch import Tensor, nn

from cases import program
from retrograde.testing import Case
from retrograde.testing.cases import loss_of, require_same

_RATE, _STEPS = 0.3, 4


class Coordinates:
    """Of one attached layer: W and b', leaves of a graph; A = W R and b = b' − A μ are the layer's parameters."""

    def __init__(self, layer: nn.Module) -> None:
        mine = program(layer)
        self.map, self.names = mine.map, mine.names
        (rule,) = mine.rules
        state = rule.state_dict()
        self.mean: Tensor | None = state.get("mean")
        if "matrix" in state:
            self.R = state["matrix"]
        else:
            basis, gain = state["basis"], state["gain"]
            turned = torch.eye(basis.shape[1]).to(basis) + basis @ torch.diag_embed(gain - 1) @ basis.mT
            self.R = state["scale"] * turned
        weight, bias = (layer._parameters.get(name) for name in self.names)
        self.shape = weight.shape
        A = self.map.matrix(weight.detach())
        self.W = (A @ torch.linalg.inv(self.R)).requires_grad_()
        self.shift = None if bias is None else (bias.detach() + self._moved(A)).requires_grad_()

    def _moved(self, A: Tensor) -> Tensor | float:
        """A μ at the outputs."""
        if self.mean is None:
            return 0.0
        return self.map.per_output((A @ self.mean.unsqueeze(-1)).squeeze(-1), self.shape)

    def parameters(self) -> dict[str, Tensor]:
        """A and b by the layer's names for them."""
        A = self.W @ self.R
        found = {self.names[0]: self.map.from_matrix(A, self.shape)}
        return found if self.shift is None else {**found, self.names[1]: self.shift - self._moved(A)}

    @torch.no_grad()
    def step(self) -> dict[str, Tensor]:
        """A and b after a step of gradient descent on W and b'."""
        for leaf in (self.W, self.shift):
            if leaf is not None:
                leaf.sub_(leaf.grad, alpha=_RATE)
        return self.parameters()


def check(case: Case) -> None:
    """An attached model's step is the plain model's step in these coordinates, and is not its own step."""
    model, session = case.attached(model=case.plain().double())
    optimizer = torch.optim.SGD(model.parameters(), _RATE)

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        loss_of(model(x)).backward()
        optimizer.step()

    for number in range(_STEPS):
        step(case.batch(100 + number).double())
    found = {name: Coordinates(m) for name, m in model.named_modules() if "_retrograde" in m.__dict__}
    plain, x = case.plain().double(), case.batch(7).double()
    plain.load_state_dict(model.state_dict())
    loss_of(torch.func.functional_call(plain, _named(found, "parameters"), (x,))).backward()
    expected = _named(found, "step")
    loss_of(plain(x)).backward()
    step(x)
    after = {name: value.detach() for name, value in model.named_parameters() if name in expected}
    require_same(after, expected, 1e-9, "Not a step of W in y = W R (x − μ) + b'.")
    for name, layer in found.items():
        weight = f"{name}.{layer.names[0]}"
        usual = _RATE * plain.get_parameter(weight).grad
        other = plain.get_parameter(weight).detach() - after[weight]
        apart = float((other - usual).norm() / usual.norm())
        assert apart > 1e-4, f"{weight}: a plain step but for {apart:.2g} of it"
    assert session.step == _STEPS + 1


def _named(found: dict[str, Coordinates], what: str) -> dict[str, Any]:
    return {
        f"{name}.{key}": value
        for name, layer in found.items()
        for key, value in getattr(layer, what)().items()
    }
