"""Figures of a model outside the timed loop: accuracy, dense FLOPs of a step, saved bytes, peak memory."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from retrograde.accounting.memory import saved_bytes
from retrograde.errors import OptionError
from retrograde.forecast import untouched
from retrograde.kernels.work import DISCOUNTS
from retrograde.lab.data import Data, Split, evaluation_batches
from retrograde.lab.record import Timing
from retrograde.lab.timing import interleave
from retrograde.session import Session

_EVALUATION_BATCH = 512


def evaluate(model: nn.Module, split: Split, device: torch.device, precision: str) -> dict[str, float]:
    """Mean loss and accuracy over a split, in eval mode."""
    loss, correct, count = 0.0, 0, 0
    with _answers(model, split, device, precision) as answers:
        for logits, y in answers:
            loss += float(loss_of(logits, y)) * y.numel()
            correct += int((logits.argmax(-1) == y).sum())
            count += y.numel()
    return {"loss": loss / count, "accuracy": correct / count}


def auc(model: nn.Module, split: Split, device: torch.device, precision: str) -> float:
    """Area under the ROC curve over a split, in eval mode; of more than two classes each against the rest."""
    with _answers(model, split, device, precision) as answers:
        logits = torch.cat([logits.cpu() for logits, _ in answers])
    return auc_of(logits, split.targets)


@contextmanager
def _answers(
    model: nn.Module, split: Split, device: torch.device, precision: str
) -> Generator[Iterator[tuple[Tensor, Tensor]]]:
    """Within: logits and labels of each batch of a split, in eval mode."""
    was_training = model.training
    model.eval()
    with torch.no_grad(), autocast(device, precision):
        batches = evaluation_batches(split, _EVALUATION_BATCH)
        yield ((model(inputs.to(device)).float(), targets.to(device)) for inputs, targets in batches)
    model.train(was_training)


def auc_of(logits: Tensor, y: Tensor) -> float:
    """The same, of logits (B, classes) against labels (B)."""
    from sklearn.metrics import roc_auc_score

    if logits.shape[1] == 2:
        return float(roc_auc_score(y, logits[:, 1] - logits[:, 0]))
    return float(roc_auc_score(y, logits.double().softmax(1), multi_class="ovr"))


def loss_of(logits: Tensor, y: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of logits (…, classes) against labels (…)."""
    return F.cross_entropy(logits.flatten(0, -2), y.flatten(), label_smoothing=smoothing)


def losses_of(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each example (B,) of logits (B, …, classes) against labels (B, …): means over the places."""
    each = F.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="none")
    return each.view(len(y), -1).mean(1)


def batch_loss(model: nn.Module, x: Tensor, y: Tensor, precision: str, smoothing: float) -> Tensor:
    """The loss of a batch as a training step takes it, for a forecast and for what it keeps."""
    with autocast(x.device, precision):
        return loss_of(model(x).float(), y, smoothing)


def check_fit(name: str, model: nn.Module, data: Data, x: Tensor, y: Tensor) -> None:
    """Refuse a model that cannot take the data's batches, or whose outputs are no logits of its classes.

    Raises:
        OptionError: with what the model says of the first batch.
    """
    try:
        with torch.no_grad(), untouched(model):
            loss_of(model(x).float(), y)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        given = " × ".join(map(str, x.shape))
        raise OptionError(
            f"model {name} cannot be trained on {data.name}: given a batch of {given} {str(x.dtype)[6:]}, it says: "
            f"{error}. It must take such batches, of which `data.input_shape` is {data.input_shape}, and return "
            f"logits of {data.classes} classes; or name other data, with `--data`."
        ) from error


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context of a recipe's precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


@dataclass(frozen=True)
class StepFlops:
    """Dense FLOPs of one training step of a plain model."""

    forward: float
    backward: float

    @property
    def whole(self) -> float:
        """Of both passes."""
        return self.forward + self.backward


def step_flops(model: nn.Module, x: Tensor, y: Tensor) -> StepFlops:
    """Dense FLOPs of one training step of a plain model, by torch's own counter; leaves no trace in it."""
    model.train()
    counter = FlopCounterMode(display=False)
    # The counter knows attention by its two products, not by the processor's fused kernels.
    with sdpa_kernel(SDPBackend.MATH), untouched(model), counter:
        loss = loss_of(model(x).float(), y)
        forward = counter.get_total_flops()
        loss.backward()
    model.zero_grad()
    return StepFlops(forward, counter.get_total_flops() - forward)


def saved_activation_bytes(model: nn.Module, x: Tensor, y: Tensor, precision: str = "float32") -> int:
    """Bytes that one training forward pass keeps for the backward pass; leaves no trace in the model."""
    model.train()
    with untouched(model):
        return saved_bytes(model, lambda: batch_loss(model, x, y, precision, smoothing=0.0))


def whole_flops(
    session: Session | None,
    step: StepFlops,
    steps: int,
    *,
    passes: tuple[float, float] | None = None,
    precision: str = "float32",
) -> dict[str, Any]:
    """FLOPs of the whole model in a run: sums, the forward pass's part of them, and the methods' overhead.

    What is not attached (attention products, left layers) runs dense and is added.

    Args:
        session: of the run; None where nothing is attached.
        step: of the plain model.
        steps: of the run.
        passes: forward and backward ones of a whole batch that were really run, by the plain model, where they are
            others than one of each a step.
        precision: of a run without a session; sessions know that of each product.
    """
    plain = step.whole * steps
    done = ("needed", "executed", "discounted")
    if session is not None and passes is None:
        found = session.flops().to_dict()
        # A model that grew has more in its layers than the plain one had.
        elsewhere = max(0.0, plain - found["dense"])
        forward = max(0.0, step.forward * steps - found["forward"]["dense"])
        for part, more in ((found, elsewhere), (found["forward"], forward)):
            for name in ("dense", *done):
                part[name] += more
        return found | {"not_attached": elsewhere}
    forwards, backwards = passes or (steps, steps)
    forward = step.forward * forwards
    whole = forward + step.backward * backwards
    discount = DISCOUNTS[precision] if session is None else 1.0
    found, of_forward = (
        {"dense": dense, **dict.fromkeys(done, ran), "discounted": discount * ran}
        for dense, ran in ((plain, whole), (step.forward * steps, forward))
    )
    return {**found, "overhead": 0.0, "forward": of_forward}


def timing(measured: dict[str, tuple[float, int]], forecast: dict[str, Any]) -> Timing:
    """Seconds that the backward pass of each attached layer took in a step, beside the forecast of time and bytes.

    Args:
        measured: layer → seconds in the whole run, and the steps that they were for.
        forecast: of the run's plan; empty where none was made.
    """
    tried = forecast.get("layers", {})
    layers: dict[str, dict[str, float | None]] = {
        name: {"seconds": seconds / steps, "forecast": tried.get(name, {}).get("backward")}
        for name, (seconds, steps) in measured.items()
        if steps
    }
    both = [layer for layer in layers.values() if layer["forecast"] is not None]
    return Timing(
        forecast_ratio=forecast.get("ratio"),
        forecast_bytes=forecast.get("attached_bytes"),
        backward_seconds=sum(layer["seconds"] or 0.0 for layer in both) if both else None,
        backward_forecast=sum(layer["forecast"] or 0.0 for layer in both) if both else None,
        layers=layers,
    )


def sharpness(model: nn.Module, x: Tensor, y: Tensor, *, steps: int = 50, tolerance: float = 1e-3) -> float:
    """λ_max: the Hessian's eigenvalue of largest size, of the mean loss of a batch in eval mode, by power iteration.

    Args:
        model: a plain one, which can be differentiated twice.
        x: inputs (B, …).
        y: labels.
        steps: of the iteration at most.
        tolerance: relative change of the eigenvalue at which it ends.
    """
    model.eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    # Fused attention has no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        gradients = torch.autograd.grad(loss_of(model(x).float(), y), parameters, create_graph=True)
        generator = torch.Generator().manual_seed(0)
        v = [torch.randn(p.shape, generator=generator).to(p.device) for p in parameters]
        value = 0.0
        for _ in range(steps):
            norm = torch.sqrt(sum((t.square().sum() for t in v), torch.zeros((), device=x.device)))
            v = [t / norm.clamp(min=1e-30) for t in v]
            w = torch.autograd.grad(gradients, parameters, grad_outputs=v, retain_graph=True)
            before, value = value, float(sum((a * b).sum() for a, b in zip(v, w, strict=True)))
            v = list(w)
            if abs(value - before) <= tolerance * abs(value):
                break
    return value


def macs_of(model: nn.Module, x: Tensor) -> float:
    """Multiply-adds of a forward pass on x, in eval mode."""
    counter, training = FlopCounterMode(display=False), model.training
    model.eval()
    with counter, torch.no_grad():
        model(x)
    model.train(training)
    return counter.get_total_flops() / 2


def forward_seconds(model: nn.Module, x: Tensor) -> float:
    """Of a forward pass in eval mode: the median of twenty."""
    model.eval()

    def run() -> None:
        model(x)

    with torch.no_grad():
        return interleave({"forward": run}, 20, warmups=3).median("forward")


def peak_memory(device: torch.device) -> int | None:
    """Bytes: of the device's allocator on a GPU, else of the whole process; None where nothing counts it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    # Linux counts in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
