"""How `retrograde.spectral.adapt` reaches features: hooks that are on the model during a call alone, and rows."""

import contextlib
import threading
from collections.abc import Callable, Generator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from retrograde.engine.maps.base import spread, wide
from retrograde.errors import AttachError, StateError
from retrograde.spectral.adaptation.tracking import Tracker

_FIRST = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_SECOND = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm)


def channel_axis(layer: nn.Module, x: Tensor) -> int:
    """The axis of x that holds the features of `layer`: that of channels for convolutions and their norms, or last."""
    if isinstance(layer, _FIRST):
        return x.dim() - 1 - len(layer.kernel_size)
    return 1 if isinstance(layer, _SECOND) and x.dim() > 1 else x.dim() - 1


def rows_of(x: Tensor, axis: int, budget: int) -> Tensor:
    """At most `budget` rows (n, d) of x, evenly spread; for images a row is a pixel."""
    rows = x.detach().movedim(axis, -1).reshape(-1, x.shape[axis])
    return wide(rows[spread(rows.shape[0], budget, rows.device)])


def width_of(layer: nn.Module, at: str) -> int | None:
    """How many features `layer` returns, or is given; None where it does not say."""
    if isinstance(layer, (nn.Linear, *_FIRST)):
        names = ("out_features", "out_channels") if at == "output" else ("in_features", "in_channels")
    elif isinstance(layer, _SECOND):
        names = ("num_features", "num_channels")
    elif isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        return layer.normalized_shape[-1]
    else:
        return None
    # Lazy layers say 0.
    return next(getattr(layer, name) for name in names if hasattr(layer, name)) or None


def follow(
    name: str,
    tracker: Tracker,
    budget: int,
    window: float,
    layer: nn.Module,
    x: Any,
    trial: tuple[float, float] | None = None,
) -> tuple[Tensor, int]:
    """Let what the layer gave, or was given, move the stream's statistics; those features, and their axis.

    With `trial`, the levels above which the gate opens and below which it closes, they count in the trial too.

    Raises:
        AttachError: they are not one floating-point tensor.
        StateError: the statistics are of another width.
    """
    x = features(name, x)
    axis = channel_axis(layer, x)
    if x.shape[axis] != tracker.width:
        raise StateError(
            f"adapt: layer {name!r} has {x.shape[axis]} features in this call, and its statistics are of "
            f"{tracker.width}: they are of another model, or the layer was replaced. Call adapt again with source "
            "batches, or with this model's statistics."
        )
    # The statistics outlive a caller's inference mode, in which they could not be loaded or trained through.
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        rows = rows_of(x, axis, budget).to(tracker.source_mean)
        if rows.shape[0]:
            windows = (x.shape[0] if axis else 1) / window
            tracker.update(rows, windows)
            if trial is not None:
                tracker.put_on_trial(rows, windows, *trial)
    return x, axis


@contextlib.contextmanager
def hooked(
    model: nn.Module, hooks: Mapping[str, Callable[[nn.Module, Any], Any]], at: str
) -> Generator[None]:
    """Within: each hook is given its layer and the layer's output, or first input, and may return another.

    Calls of the model in other threads see nothing of it.
    """
    modules = dict(model.named_modules())
    handles: list[Any] = []
    thread = threading.get_ident()

    def before(hook: Callable[[nn.Module, Any], Any], layer: nn.Module, args: tuple[Any, ...]) -> Any:
        if threading.get_ident() != thread:
            return None
        found = hook(layer, args[0] if args else None)
        return None if found is None else (found, *args[1:])

    def after(hook: Callable[[nn.Module, Any], Any], layer: nn.Module, args: Any, output: Any) -> Any:
        return hook(layer, output) if threading.get_ident() == thread else None

    try:
        for name, hook in hooks.items():
            layer = modules[name]
            if at == "input":
                handles.append(layer.register_forward_pre_hook(partial(before, hook)))
            else:
                handles.append(layer.register_forward_hook(partial(after, hook)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def features(name: str, x: Any) -> Tensor:
    """What the layer of this name returned or was given, when it is features.

    Raises:
        AttachError: it is not one floating-point tensor.
    """
    if isinstance(x, Tensor) and x.is_floating_point() and x.dim():
        return x
    what = f"{type(x).__name__} of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
    raise AttachError(
        f"layer {name!r} cannot be adapted: its features are a {what}, not one floating-point tensor. Leave it out of "
        "`layers`, or name a layer within it."
    )
