"""Training a network with orthogonal hidden weights: on the manifold, by a parametrization, by a penalty, or not."""

import time
from typing import Annotated, Literal, cast

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from retrograde.lab import data
from retrograde.lab.experiments.base import Context, Experiment
from retrograde.lab.models.mlp import MLP
from retrograde.maths import spectral
from retrograde.spectral.orthogonal import keep_orthogonal, nearest_orthonormal

How = Literal["none", "lie", "parametrization", "penalty", "projection"]


class OrthogonalWeights(Experiment):
    """A plain deep MLP, by Adam with a cosine schedule; all but the head are held orthogonal, as `how` says.

    - ``lie``: `retrograde.spectral.keep_orthogonal`;
    - ``parametrization``: `torch.nn.utils.parametrizations.orthogonal` with its own choice of map;
    - ``penalty``: plain training with `penalty` · Σ‖QᵀQ − I‖² in the loss;
    - ``projection``: the optimizer's step, then the polar factor by one Newton–Schulz step;
    - ``none``: plain training.

    All start from the same orthogonal weights.
    """

    how: How = "none"
    data: str = "fashion_mnist"
    limit: PositiveInt | None = None
    widths: tuple[int, ...] = (128, 128, 128, 128)
    epochs: PositiveInt = 5
    batch_size: PositiveInt = 256
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    penalty: Annotated[float, Field(ge=0)] = 1e-2

    def run(self, context: Context) -> dict[str, float]:
        """Accuracy, seconds of training, and how orthonormal the worst hidden weight is."""
        found = data.load(self.data, data_dir=context.data_dir, seed=self.seed, limit=self.limit)
        torch.manual_seed(self.seed)
        model = MLP(found.input_shape, found.classes, self.widths)
        hidden = [layer for layer in model.body if isinstance(layer, nn.Linear)]
        for layer in hidden:
            nn.init.orthogonal_(layer.weight)
            if self.how == "parametrization":
                parametrizations.orthogonal(layer)
        optimizer = torch.optim.Adam(model.parameters(), lr=self.learning_rate)
        if self.how == "lie":
            keep_orthogonal(model, optimizer, "body.*")
        steps = self.epochs * data.steps_in_epoch(found.train, self.batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        spent = 0.0
        for epoch in range(self.epochs):
            began = time.perf_counter()
            for x, y in data.batches(found.train, self.batch_size, seed=self.seed, epoch=epoch):
                loss = F.cross_entropy(model(x), y)
                if self.how == "penalty":
                    loss = loss + self.penalty * sum(_departure(layer.weight) for layer in hidden)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                if self.how == "projection":
                    _project(hidden)
            spent += time.perf_counter() - began
            context.note((epoch + 1) / self.epochs)
        split = found.validation if context.trial else found.test
        worst = max(spectral.orthonormality(_columns(layer.weight.detach())) for layer in hidden)
        return {
            "accuracy": _accuracy(model, split),
            "seconds": spent,
            "step_seconds": spent / steps,
            "steps": float(steps),
            "orthonormality": worst,
        }


def _columns(weight: Tensor) -> Tensor:
    return weight if weight.shape[0] >= weight.shape[1] else weight.mT


def _departure(weight: Tensor) -> Tensor:
    q = _columns(weight)
    return (q.mT @ q - torch.eye(q.shape[1])).square().sum()


@torch.no_grad()
def _project(layers: list[nn.Linear]) -> None:
    for layer in layers:
        q = _columns(layer.weight)
        # Newton–Schulz converges from singular values below √3; beyond, the polar factor itself.
        near = spectral.orthonormality(q) < 0.5
        q = spectral.polish(spectral.polish(q)) if near else nearest_orthonormal(q)
        layer.weight.copy_(q if layer.weight.shape[0] >= layer.weight.shape[1] else q.mT)


@torch.no_grad()
def _accuracy(model: nn.Module, split: data.Split) -> float:
    model.eval()
    right = sum(
        int((cast(Tensor, model(x)).argmax(1) == y).sum()) for x, y in data.evaluation_batches(split, 1000)
    )
    return right / len(split)
