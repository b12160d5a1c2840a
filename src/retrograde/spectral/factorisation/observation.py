"""A model run over data in evaluation, its layers watched."""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from retrograde.errors import OptionError, RetrogradeWarning
from retrograde.patterns import ROOT
from retrograde.spectral.factorisation.moments import (
    Plain,
    Spectrum,
    Watch,
    rows_of,
    spectrum_of_outputs,
)
from retrograde.spectral.moments import Moments
from retrograde.spectral.running import evaluating

Call = Callable[[nn.Module, Any], object]
"""Runs a model on one batch of data."""


@dataclass(frozen=True)
class Observation:
    """What the layers of a model did.

    Attributes:
        macs: multiply-adds of each layer for one example.
        moments: of the layers that were asked for.
        first: the first batch.
    """

    macs: dict[str, float]
    moments: dict[str, Moments]
    first: Any

    def spectrum(self, name: str, layer: Plain, centred: bool) -> Spectrum:
        """Of a layer's outputs, whose moments are then forgotten; warns where there were fewer rows than directions.

        Raises:
            OptionError: they are not finite.
        """
        moments = self.moments.pop(name)
        if not all(bool(part.isfinite().all()) for part in moments.finish()):
            raise OptionError(
                f"layer {name or ROOT!r} gives outputs on the data that are not finite, and they have no spectrum. "
                "Look for what overflows there, or leave the layer with `skip`."
            )
        if moments.count < moments.width:
            warnings.warn(
                f"layer {name or ROOT!r} saw {moments.count} rows of {moments.width} values: its spectrum says little, "
                "and directions that the data did not show are cut. Give more data.",
                RetrogradeWarning,
                stacklevel=3,
            )
        return spectrum_of_outputs(layer, moments, centred)


def observe(
    model: nn.Module, data: Tensor | Iterable[Any], run: Call, layers: dict[str, nn.Module], of: set[str]
) -> Observation:
    """Run all of the data through the model.

    Args:
        model: left as it was.
        data: one tensor, or batches.
        run: the model on a batch.
        layers: whose multiply-adds are counted.
        of: those whose moments are gathered.

    Raises:
        OptionError: there are no rows.
    """
    watch, examples, first = Watch(layers, of), 0, None
    try:
        with evaluating(model):
            for batch in [data] if isinstance(data, Tensor) else data:
                run(model, batch)
                examples += rows_of(batch)
                first = batch if first is None else first
    finally:
        watch.stop()
    if not examples:
        raise OptionError(
            "data holds no rows, so no layer has a spectrum. Give one tensor or an iterable of batches; a generator "
            "that has been read already is empty."
        )
    macs = {name: count / examples for name, count in watch.macs.items()}
    return Observation(macs, watch.moments, first)


def inputs_of(model: nn.Module, layers: dict[str, nn.Module], run: Call, example: Any) -> dict[str, Tensor]:
    """The first input of each layer when the model runs on the example."""
    watch = Watch(layers, set())
    watch.inputs = {}
    try:
        with evaluating(model):
            run(model, example)
    finally:
        watch.stop()
    return watch.inputs
