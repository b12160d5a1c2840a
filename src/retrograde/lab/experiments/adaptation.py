"""Test-time adaptation on corrupted images: a network trained on clean ones meets a stream that keeps changing.

The network of a seed is trained once and kept beside the run's folder, so that all variants adapt the same one. The
stream is one for all, and nothing tells a variant where one corruption ends and the next begins.
"""

import time
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retrograde.lab import data
from retrograde.lab.corruptions import SEVERITIES, corrupt
from retrograde.lab.experiments.base import Context, Experiment, train_once
from retrograde.lab.models import build
from retrograde.lab.peers.renormalise import Renormalised
from retrograde.lab.peers.tent import Tent
from retrograde.spectral import Adapted, adapt
from retrograde.spectral.adaptation.tracking import Correction

_CENTRE, _SCALE = 0.47, 0.25
"""About the mean and deviation of the pixels of CIFAR-10."""


class Adaptation(Experiment):
    """One way of adapting the network of a seed to corrupted images.

    Attributes:
        variant: ``"none"``; ``"norm"``, re-estimated batch normalisation; ``"tent"``; ``"spectral"``.
        norms: whether the network has batch normalisation.
        limit: training images.
        images: test or validation images under each corruption and severity.
        batch: images of a batch of the stream.
        severities: that the stream goes through.
        window: of ``"norm"``, where 0 takes each batch alone, and of ``"spectral"``.
        learning_rate: of ``"tent"``.
        correction: of ``"spectral"``, as `energy` and `tau` are.
    """

    variant: Literal["none", "norm", "tent", "spectral"] = "spectral"
    norms: bool = True
    limit: int = 20000
    epochs: int = 5
    images: int = 1000
    batch: int = 50
    severities: tuple[int, ...] = (1, 2, 3, 4, 5)
    window: float = 100.0
    learning_rate: float = 1e-3
    correction: Correction = "transport"
    energy: float = 0.99
    tau: float = 1e-3

    def run(self, context: Context) -> dict[str, float]:
        """Accuracy of the stream, and of clean images before it, which are the test split's unless in a trial."""
        torch.manual_seed(self.seed)
        loaded = data.load(
            "cifar10", data_dir=context.data_dir, seed=self.seed, limit=self.limit, standardise=False
        )
        model = self._trained(loaded, context)
        # Rows that the network was not trained on, other ones than those that a trial is decided by.
        source, held_out = loaded.validation.inputs[:2000], loaded.validation
        x, y = held_out.inputs[2000:], held_out.targets[2000:]
        if not context.trial:
            x, y = loaded.test.inputs, loaded.test.targets
        x, y = x[: self.images], y[: self.images]
        predict, wrapper = self._variant(model, _normal(source))
        clean, clean_drift, _ = self._streamed(predict, wrapper, x, y)
        stream = [(name, severity) for severity in self.severities for name in SEVERITIES]
        parts: list[tuple[float, float, float]] = []
        for name, severity in stream:
            images = corrupt(x, name, severity, seed=self.seed)
            parts.append(self._streamed(predict, wrapper, images, y))
            context.note(0.5 + 0.5 * len(parts) / len(stream))
        accuracy, drift, seconds = (sum(part) / len(stream) for part in zip(*parts, strict=True))
        found = {"accuracy": accuracy, "clean_accuracy": clean, "image_seconds": seconds / len(y)}
        return found if wrapper is None else found | {"clean_drift": clean_drift, "corrupted_drift": drift}

    def _streamed(
        self, predict: Callable[[Tensor], Tensor], wrapper: Adapted | None, x: Tensor, y: Tensor
    ) -> tuple[float, float, float]:
        """Accuracy, mean drift of layers and batches, and seconds, of predictions alone."""
        right, seconds, drifts = 0, 0.0, [0.0]
        for images, labels in zip(_normal(x).split(self.batch), y.split(self.batch), strict=True):
            start = time.perf_counter()
            predicted = predict(images).argmax(1)
            seconds += time.perf_counter() - start
            right += int((predicted == labels).sum())
            if wrapper is not None:
                drifts += wrapper.drift.values()
        return right / len(y), sum(drifts) / max(1, len(drifts) - 1), seconds

    def _variant(self, model: nn.Module, source: Tensor) -> tuple[Callable[[Tensor], Tensor], Adapted | None]:
        model.eval()
        if self.variant == "tent":
            return Tent(model, self.learning_rate), None
        wrapper = None
        if self.variant == "spectral":
            model = wrapper = adapt(
                model,
                source.split(self.batch),
                energy=self.energy,
                window=self.window,
                tau=self.tau,
                correction=self.correction,
            )
        if self.variant == "norm":
            return Renormalised(model, self.window), None
        return torch.no_grad()(model), wrapper

    def _trained(self, loaded: data.Data, context: Context) -> nn.Module:
        options = {"stages": ((32,), (64,), (128, 128))}
        model = build("vgg-small-bn" if self.norms else "vgg-small", loaded, seed=self.seed, options=options)
        steps = self.epochs * data.steps_in_epoch(loaded.train, 128)

        def train() -> None:
            optimizer = torch.optim.SGD(
                model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
            )
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1 if self.norms else 0.03, steps)
            for epoch in range(self.epochs):
                for x, y in data.batches(loaded.train, 128, seed=self.seed, epoch=epoch, augment=True):
                    optimizer.zero_grad()
                    F.cross_entropy(model(_normal(x)), y).backward()
                    nn.utils.clip_grad_norm_(model.parameters(), 2.0)
                    optimizer.step()
                    schedule.step()
                    context.note(0.5 * schedule.last_epoch / steps)

        train_once(context, (self.seed, self.norms, self.limit, self.epochs), model, train)
        return model


def _normal(x: Tensor) -> Tensor:
    return (x - _CENTRE) / _SCALE
