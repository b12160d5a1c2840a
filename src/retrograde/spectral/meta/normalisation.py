"""Normalisation layers under `torch.func`: without side effects, and with the right second derivatives under vmap.

With a scale or a shift fused into it, the backward pass of batch, layer or instance normalisation is differentiated
wrongly under `torch.func.vmap`, without an error: vmap's rule takes the saved mean and deviation for constants
(pytorch/functorch#534, seen in torch 2.13: values and first derivatives are right, MAML's outer gradient is not). Apart
from the scale all of it is right, so the scale and the shift are applied behind.
"""

from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


class Normalisation(TorchFunctionMode):
    """Within, batch normalisation goes by each batch's own statistics, or by the running ones, and writes none.

    Scales and shifts are applied apart. Fused into the normalisation they make second derivatives wrong under vmap,
    without an error: its rule for the backward pass takes the saved mean and deviation for constants
    (pytorch/functorch#534).

    Args:
        batch_statistics: which of the two.
    """

    def __init__(self, batch_statistics: bool) -> None:
        super().__init__()
        self._batch_statistics = batch_statistics

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """`func` itself, but for three functions."""
        axis = _NORMS.get(func)
        if axis is None:
            return func(*args, **(kwargs or {}))
        given = signature(func).bind(*args, **(kwargs or {})).arguments
        weight, bias = given.pop("weight", None), given.pop("bias", None)
        if func is F.batch_norm:
            given["training"] = True if given.get("running_mean") is None else self._batch_statistics
        elif func is F.instance_norm:
            given["use_input_stats"] = True if given.get("running_mean") is None else self._batch_statistics
        if func is not F.layer_norm and self._batch_statistics:
            given |= {"running_mean": None, "running_var": None}
        z = func(**given)
        for value, apply in ((weight, torch.mul), (bias, torch.add)):
            if value is not None:
                z = apply(z, value.view(-1, *[1] * (z.dim() - 2)) if axis else value)
        return z


_NORMS = {F.batch_norm: 1, F.instance_norm: 1, F.layer_norm: 0}
"""Normalisations that vmap differentiates wrongly with a scale → the axis of their scale; 0 for the last ones."""
