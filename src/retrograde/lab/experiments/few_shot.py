"""Few-shot classification: meta-train on the classes of one part of a data set, adapt to unseen ones of another.

A task draws `ways` classes, gives them labels in random order, and draws `shots` images of each to adapt on and
`queries` others to be judged by.

* ``omniglot``: 28 × 28, each character in four rotations a class of its own. Background characters are split into 800
  for training and the rest for validation; the evaluation alphabets are the test.
* ``tiny-imagenet-50``: 32 × 32; of the 50 classes 30 are for training, 8 for validation, 12 for the test.
* ``pneumoniamnist``, ``breastmnist``: their two classes leave none unseen. The official splits are kept, and tasks of
  the two classes (``ways=2``) differ in their images and in which class has which label.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retrograde.accounting.memory import peak_bytes
from retrograde.lab.experiments.base import Context, Experiment
from retrograde.lab.source import read
from retrograde.spectral import maml

_SPLIT_SEED = 2019
_BATCH = 10
_WARM_UP = 5

Batch = tuple[Tensor, Tensor, Tensor, Tensor]
"""Support inputs and targets, query inputs and targets, tasks first."""


class FewShot(Experiment):
    """A cell: meta-training, then accuracy on tasks of unseen classes.

    Attributes:
        data: see above.
        ways: classes of a task.
        shots: support images of a class.
        queries: query images of a class in training; 15 in tests.
        model: four strided convolutions of `width`, or hidden layers of 256, 128, 64 and 64, with batch normalisation.
        width: of the convolutions.
        inner_steps: in training and in tests.
        inner_rate: their learning rate.
        rank: of the projection; 0 for none.
        basis: of the projection.
        first_order: without second derivatives.
        head_only: ANIL.
        learning_rate: outer, of Adam, falling to zero by a cosine.
        tasks: of an outer step.
        iterations: outer steps.
        test_tasks: that are judged.
    """

    data: Literal["omniglot", "tiny-imagenet-50", "pneumoniamnist", "breastmnist"] = "omniglot"
    ways: int = 5
    shots: int = 1
    queries: int = 5
    model: Literal["convolutional", "mlp"] = "mlp"
    width: int = 32
    inner_steps: int = 1
    inner_rate: float = 0.4
    rank: int = 0
    basis: Literal["tracked", "task", "random"] = "tracked"
    first_order: bool = False
    head_only: bool = False
    learning_rate: float = 3e-3
    tasks: int = 16
    iterations: int = 1000
    test_tasks: int = 1000

    def run(self, context: Context) -> dict[str, float]:
        """Accuracy, its interval over tasks, time, and time and memory of an outer step."""
        splits = classes(self.data, context.data_dir)
        torch.manual_seed(self.seed)
        model = self._network(splits["train"][0].shape[1:])
        learner = maml(
            model,
            self.inner_steps,
            self.inner_rate,
            self.rank or None,
            basis=self.basis,
            first_order=self.first_order,
            only="head" if self.head_only else None,
        )
        optimizer = torch.optim.Adam(model.parameters(), self.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.iterations)
        times: list[float] = []

        def step(batch: Batch) -> None:
            optimizer.zero_grad(set_to_none=True)
            learner.loss(*batch).backward()
            optimizer.step()

        source = self._batches(splits["train"], self.tasks, self.queries, self.seed)
        for number in range(self.iterations):
            batch = next(source)
            start = time.perf_counter()
            step(batch)
            times.append(time.perf_counter() - start)
            schedule.step()
            context.note(0.9 * (number + 1) / self.iterations)
        learner.eval()
        scores: list[Tensor] = []
        judged = self._batches(splits["validation" if context.trial else "test"], _BATCH, 15, _SPLIT_SEED)
        with torch.no_grad():
            for _ in range(self.test_tasks // _BATCH):
                x, y, queries, targets = next(judged)
                scores.append((learner(x, y, queries).argmax(-1) == targets).float().mean(-1))
        score = torch.cat(scores)
        learner.train()
        return {
            "accuracy": float(score.mean()),
            "task_interval": float(1.96 * score.std() / len(score) ** 0.5),
            "seconds": sum(times),
            "step_seconds": float(np.median(times[_WARM_UP:] or times)),
            "step_peak_bytes": peak_bytes(lambda: step(next(source))),
        }

    def _network(self, shape: torch.Size) -> nn.Module:
        layers: list[nn.Module] = []
        channels, side = shape[0], shape[1]
        if self.model == "convolutional":
            for _ in range(4):
                layers += [nn.Conv2d(channels, self.width, 3, 2, 1), nn.BatchNorm2d(self.width), nn.ReLU()]
                channels, side = self.width, (side + 1) // 2
            layers.append(nn.Flatten())
            features = channels * side * side
        else:
            layers.append(nn.Flatten())
            features = shape.numel()
            for size in (256, 128, 64, 64):
                layers += [nn.Linear(features, size), nn.BatchNorm1d(size), nn.ReLU()]
                features = size
        network = nn.Sequential(*layers)
        network.add_module("head", nn.Linear(features, self.ways))
        return network

    def _batches(self, images: list[Tensor], tasks: int, queries: int, seed: int) -> Iterator[Batch]:
        """Meta-batches without end, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        rotations = 4 if self.data == "omniglot" else 1
        y = torch.arange(self.ways)
        while True:
            drawn: list[Tensor] = []
            for _ in range(tasks):
                chosen = torch.randperm(rotations * len(images), generator=generator)[: self.ways].tolist()
                for one in chosen:
                    own = images[one // rotations]
                    index = torch.randperm(len(own), generator=generator)[: self.shots + queries]
                    drawn.append(torch.rot90(own[index], one % rotations, (-2, -1)))
            x = torch.stack(drawn).unflatten(0, (tasks, self.ways)).float() / 255
            support, query = x[:, :, : self.shots].flatten(1, 2), x[:, :, self.shots :].flatten(1, 2)
            targets = [y.repeat_interleave(n).expand(tasks, -1) for n in (self.shots, queries)]
            yield support, targets[0], query, targets[1]


def classes(name: str, data_dir: Path | None) -> dict[str, list[Tensor]]:
    """Images (n, C, H, W) of each class, bytes, by split."""
    parts = read(name, data_dir).parts
    side = {"omniglot": 28, "tiny-imagenet-50": 32}.get(name)
    found: dict[str, list[Tensor]] = {}
    for part, arrays in parts.items():
        pixels = torch.tensor(arrays["pixels"])
        if side is not None:
            small = [F.interpolate(some.float(), size=side, mode="area") for some in pixels.split(1000)]
            pixels = torch.cat(small).round().byte()
        labels = torch.tensor(arrays["labels"])
        found[part] = [pixels[labels == label] for label in labels.unique()]
    order = torch.randperm(len(found["train"]), generator=torch.Generator().manual_seed(_SPLIT_SEED)).tolist()
    if name == "omniglot":
        background = [found["train"][i] for i in order]
        return {"train": background[:800], "validation": background[800:], "test": found["test"]}
    if name == "tiny-imagenet-50":
        whole = [found["train"][i] for i in order]
        return {"train": whole[:30], "validation": whole[30:38], "test": whole[38:]}
    return found
