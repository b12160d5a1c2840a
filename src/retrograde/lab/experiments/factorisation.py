"""Accuracy, size and forward time of smaller networks made from a trained one, at equal multiply-adds."""

import copy
import io
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from retrograde import spectral
from retrograde.lab import models, timing
from retrograde.lab.data import Data, Split, batches, evaluation_batches, load, steps_in_epoch
from retrograde.lab.experiments.base import Context, Experiment, train_once
from retrograde.lab.measure import macs_of
from retrograde.lab.peers.pruning import prune

_NETWORKS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "cnn": ("cifar10", "vgg-small-bn", {"stages": ((32,), (64,), (128, 128)), "channels_last": True}),
    "mlp": ("fashion_mnist", "mlp", {}),
}
"""Data set, model and its options."""
_CALIBRATION = 2048
_ROUNDS = {1: 60, 128: 12}
"""Rounds of timing, by batch size."""


class Factorisation(Experiment):
    """A network is trained, made smaller, and fine-tuned.

    The trained network is kept beside the runs' folders, where all variants of a seed find it.

    Attributes:
        network: a VGG with BatchNorm on CIFAR-10, or an MLP on Fashion-MNIST.
        limit: rows of each split; None takes all.
        epochs: of training.
        rate: largest learning rate of training.
        method: ``original`` leaves the network as it is; ``spectral`` and ``weights`` factorise it by the spectrum of
            the outputs and by truncated SVD; ``schedule`` shrinks ranks during the first half of fine-tuning;
            ``pruning`` takes channels away.
        share: of the multiply-adds that may stay.
        all_layers: rank the channels to prune of all layers together.
        tune_epochs: of fine-tuning.
        tune_rate: its largest learning rate.
    """

    network: Literal["cnn", "mlp"] = "cnn"
    limit: int | None = 20000
    epochs: int = 6
    rate: float = 0.05
    method: Literal["original", "spectral", "weights", "schedule", "pruning"] = "spectral"
    share: float = 0.5
    all_layers: bool = True
    tune_epochs: int = 2
    tune_rate: float = 0.01

    def run(self, context: Context) -> dict[str, float]:
        """Accuracy with and without fine-tuning, share of multiply-adds, bytes, milliseconds and speed-ups."""
        loaded = load(_NETWORKS[self.network][0], data_dir=context.data_dir, seed=self.seed, limit=self.limit)
        split = loaded.validation if context.trial else loaded.test
        original = self._trained(loaded, context)
        x = loaded.train.inputs[:_CALIBRATION]
        torch.manual_seed(self.seed)
        small = self._smaller(original, x)
        untuned = _accuracy(small, split)
        small = self._tuned(small, loaded.train, context)
        found = {"accuracy": _accuracy(small, split), "accuracy_untuned": untuned}
        if context.trial:
            return found
        found["macs_share"] = macs_of(small, x[:1]) / macs_of(original, x[:1])
        found["model_bytes"] = float(_bytes(small))
        for size, rounds in _ROUNDS.items():
            batch = x[:size].contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x[:size]
            with torch.no_grad():
                runs = {"original": lambda: original(batch), "small": lambda: small(batch)}  # noqa: B023
                times = timing.interleave(runs, rounds, warmups=3)
            found[f"forward_seconds_{size}"] = times.median("small")
            found[f"forward_speedup_{size}"] = times.speedup("small", "original").ratio
        return found

    def _smaller(self, original: nn.Module, x: torch.Tensor) -> nn.Module:
        if self.method == "pruning":
            return prune(original, x[:1], self.share, all_layers=self.all_layers)
        if self.method in ("spectral", "weights"):
            return spectral.factorise(
                original,
                x.split(256),
                budget=self.share,
                spectrum="outputs" if self.method == "spectral" else "weights",
            )[0]
        return original

    def _tuned(self, model: nn.Module, split: Split, context: Context) -> nn.Module:
        """Fine-tuned, a copy where the model was not made smaller yet."""
        model = copy.deepcopy(model)
        optimizer = torch.optim.SGD(model.parameters(), self.tune_rate, 0.9, weight_decay=5e-4, nesterov=True)
        steps = self.tune_epochs * steps_in_epoch(split, 128)
        schedule = None
        if self.method == "schedule":
            schedule = spectral.BudgetSchedule(
                model, optimizer, budget=self.share, start=1, end=steps // 2, every=max(1, steps // 20)
            )
        self._train(model, optimizer, split, self.tune_epochs, context, (0.7, 1.0))
        return (schedule.fold()[0] if schedule else model).eval()

    def _trained(self, loaded: Data, context: Context) -> nn.Module:
        _, name, options = _NETWORKS[self.network]
        model = models.build(name, loaded, seed=self.seed, options=options)

        def train() -> None:
            optimizer = torch.optim.SGD(model.parameters(), self.rate, 0.9, weight_decay=5e-4, nesterov=True)
            self._train(model, optimizer, loaded.train, self.epochs, context, (0.0, 0.7))

        key = self.seed, self.network, self.limit, self.epochs, self.rate
        train_once(context, key, model, train)
        return model.eval()

    def _train(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        split: Split,
        epochs: int,
        context: Context,
        span: tuple[float, float],
    ) -> None:
        """Train by a rate that rises for a tenth of the steps and falls to zero; `span` is what is told as done."""
        model.train()
        each = steps_in_epoch(split, 128)
        total = epochs * each
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / (0.1 * total + 1), (total - step) / (0.9 * total + 1))
        )
        for epoch in range(epochs):
            images = batches(split, 128, seed=self.seed, epoch=epoch, augment=self.network == "cnn")
            for number, (x, y) in enumerate(images):
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                done = (epoch * each + number + 1) / total
                context.note(span[0] + (span[1] - span[0]) * done)


def _bytes(model: nn.Module) -> int:
    kept = io.BytesIO()
    torch.save(model.state_dict(), kept)
    return kept.tell()


@torch.no_grad()
def _accuracy(model: nn.Module, split: Split) -> float:
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in evaluation_batches(split, 500))
    return right / len(split)
