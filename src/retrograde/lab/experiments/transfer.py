"""A network trained on one set of images is fine-tuned on a few of another: what it gains, and what it forgets.

The source network is six convolutions with group normalisation, whose function does not depend on the batch: with
running averages these would be forgotten before the weights. It is trained once for each seed and kept beside the runs'
folders. A new head is trained with the features; the old head on the new features tells what is left of the source.
Rates and strengths are searched on the target's validation rows, never on the source.
"""

import copy
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retrograde.lab import data as lab_data
from retrograde.lab import measure
from retrograde.lab.data import Split
from retrograde.lab.experiments.base import Context, Experiment, train_once
from retrograde.lab.peers.adapters import AdaLora, Lora
from retrograde.lab.peers.base import trainable
from retrograde.lab.peers.transfer import batch_spectral_shrinkage, l2_sp
from retrograde.spectral import TransferPenalty

_BATCH, _WIDTH = 64, 128


class Transfer(Experiment):
    """Fine-tuning in one way.

    Attributes:
        source, target: data sets that the network comes from, and goes to.
        per_class: training rows of each class of the target; None: all.
        way: of fine-tuning; ``"head"`` trains the head alone.
        learning_rate: AdamW's peak; it falls to 0 as a cosine.
        strength: μ, L2-SP's α or BSS's η; elsewhere AdamW's weight decay.
        rank: of the adapters or of C₀.
        rest: see `retrograde.spectral.TransferPenalty`.
        steps: of fine-tuning.
        source_epochs: over the source.
        limit: rows of each split; None: all.
    """

    source: Literal["tiny-imagenet-50", "cifar10"] = "tiny-imagenet-50"
    target: Literal["cifar10", "pneumoniamnist"] = "cifar10"
    per_class: int | None = None
    way: Literal["fine-tune", "head", "l2-sp", "bss", "lora", "adalora", "spectral"] = "fine-tune"
    learning_rate: float = 1e-3
    strength: float = 1.0
    rank: int = 8
    rest: Literal["even", "none"] = "even"
    steps: int = 300
    source_epochs: int = 6
    limit: int | None = None

    def run(self, context: Context) -> dict[str, float]:
        """``accuracy``, ``auc`` of two classes, ``source_accuracy``, ``trainable``, ``seconds``."""
        source, target = (
            _images(lab_data.load(name, data_dir=context.data_dir, seed=self.seed, limit=self.limit))
            for name in (self.source, self.target)
        )
        before = self._source_network(source, context)
        torch.manual_seed(self.seed)
        features, head = copy.deepcopy(before["features"]), nn.Linear(_WIDTH, target.classes)
        started = time.perf_counter()
        features, trained = self._tune(
            features, head, _few(target.train, self.per_class), source.train, context
        )
        found = {"seconds": time.perf_counter() - started, "trainable": float(trained)}
        judged = target.validation if context.trial else target.test
        logits = _logits(features, head, judged)
        found["accuracy"] = _accuracy(logits, judged)
        if not context.trial:
            found["source_accuracy"] = _accuracy(_logits(features, before["head"], source.test), source.test)
        if target.classes == 2:
            found["auc"] = measure.auc_of(logits, judged.targets)
        return found

    def _tune(
        self, features: nn.Module, head: nn.Module, rows: Split, source: Split, context: Context
    ) -> tuple[nn.Module, int]:
        """The features after fine-tuning, the head in place, and how many parameters were trained."""
        penalty = peer = None
        if self.way == "spectral":
            batches = source.inputs[: 32 * _BATCH].split(_BATCH)
            options: dict[str, Any] = {"rank": self.rank, "rest": self.rest, "rows": 256, "skip_head": False}
            penalty = TransferPenalty(features, batches, self.strength, **options)
        elif self.way == "lora":
            peer = Lora(rank=self.rank, alpha=2.0 * self.rank)
        elif self.way == "adalora":
            features = _as_linear(features)
            early, late = self.steps // 10, self.steps // 4
            start = self.rank * 3 // 2
            peer = AdaLora(self.rank, start, 2.0 * start, warmup=early, final=late, total=self.steps)
        model = features if peer is None else peer.prepare(features)
        model.requires_grad_(False) if self.way == "head" else None
        pulled = self.way in ("spectral", "l2-sp", "bss")

        def base(parameters: Any) -> torch.optim.Optimizer:
            # A strength is the weight decay where there is no other regulariser.
            groups = [
                {"params": list(parameters), "weight_decay": 0.0 if pulled else self.strength},
                {"params": list(head.parameters()), "weight_decay": 1e-2},
            ]
            return torch.optim.AdamW(groups, self.learning_rate)

        made = None if peer is None else peer.make_optimizer(model, self.learning_rate, 0.0, base)
        optimizer = base(trainable(model)) if made is None else made
        if self.way == "l2-sp":
            l2_sp(optimizer, model.parameters(), self.strength)

        def loss(x: Tensor, y: Tensor) -> Tensor:
            z = model(x)
            found = F.cross_entropy(head(z), y)
            return found + self.strength * batch_spectral_shrinkage(z) if self.way == "bss" else found

        _train(loss, optimizer, rows, self.steps, self.seed, context, augment=self.target == "cifar10")
        if penalty is not None:
            penalty.remove()
        trained = sum(p.numel() for part in (model, head) for p in part.parameters() if p.requires_grad)
        return model if peer is None else peer.finish(model), trained

    def _source_network(self, source: lab_data.Data, context: Context) -> nn.ModuleDict:
        """Trained by whichever run of this seed comes first; the others wait for it."""
        torch.manual_seed(self.seed)
        model = _network(source.classes)

        def loss(x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(model["head"](model["features"](x)), y)

        def train() -> None:
            optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.02)
            steps = self.source_epochs * lab_data.steps_in_epoch(source.train, _BATCH)
            _train(loss, optimizer, source.train, steps, self.seed, context)

        train_once(context, (self.source, self.source_epochs, self.limit, self.seed), model, train)
        return model


class _Patches(nn.Module):
    """A convolution as a linear layer of its patches, which AdaLoRA of peft adapts; its 3×3 kernel keeps the size."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        inputs, outputs = convolution.in_channels * 9, convolution.out_channels
        self.linear = nn.Linear(inputs, outputs, bias=False)
        self.linear.weight = nn.Parameter(convolution.weight.detach().reshape(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        z = self.linear(F.unfold(x, 3, padding=1).mT)
        return z.mT.unflatten(2, x.shape[2:])


def _as_linear(features: nn.Module) -> nn.Module:
    return nn.Sequential(*[_Patches(m) if isinstance(m, nn.Conv2d) else m for m in features.children()])


def _network(classes: int) -> nn.ModuleDict:
    layers: list[nn.Module] = []
    channels = 3
    for width, pool in ((16, 2), (32, 2), (32, 1), (64, 2), (64, 1), (_WIDTH, 1)):
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.GroupNorm(8, width), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if pool == 2 else []
        channels = width
    features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.ModuleDict({"features": features, "head": nn.Linear(channels, classes)})


def _images(data: lab_data.Data) -> lab_data.Data:
    """As (n, 3, 32, 32), whatever they were."""

    def made(split: Split) -> Split:
        x = F.avg_pool2d(split.inputs, 2) if split.inputs.shape[-1] == 64 else split.inputs
        x = F.pad(x, ((32 - x.shape[-1]) // 2,) * 4, mode="replicate")
        return Split(x.expand(-1, 3, -1, -1), split.targets)

    return replace(data, **{part: made(getattr(data, part)) for part in ("train", "validation", "test")})


def _few(split: Split, per_class: int | None) -> Split:
    """The first rows of each class."""
    index = torch.cat([(split.targets == c).nonzero()[:per_class, 0] for c in split.targets.unique()])
    return Split(split.inputs[index], split.targets[index])


def _train(
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    rows: Split,
    steps: int,
    seed: int,
    context: Context,
    *,
    augment: bool = True,
) -> None:
    """So many steps, at a rate that rises over a twentieth of them and falls as a cosine."""
    rise = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / rise, 0.5 + 0.5 * math.cos(math.pi * min(i / steps, 1.0)))
    )
    epochs = (
        lab_data.batches(rows, _BATCH, seed=seed, epoch=epoch, augment=augment) for epoch in itertools.count()
    )
    for done, (x, y) in enumerate(itertools.islice(itertools.chain.from_iterable(epochs), steps), 1):
        optimizer.zero_grad()
        loss(x, y).backward()
        optimizer.step()
        schedule.step()
        context.note(done / steps)


@torch.no_grad()
def _logits(features: nn.Module, head: nn.Module, split: Split) -> Tensor:
    return torch.cat([head(features(x)) for x in split.inputs.split(500)])


def _accuracy(logits: Tensor, split: Split) -> float:
    return float((logits.argmax(1) == split.targets).float().mean())
