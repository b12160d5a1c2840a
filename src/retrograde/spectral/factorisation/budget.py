r"""Ranks that shrink during training, by a cubic budget.

With B the share of multiply-adds that is aimed at, reached between the optimizer steps t₀ = `start` and t₁ = `end`,

    b(t) = B + (1 − B) (1 − (t − t₀)/(t₁ − t₀))³                                  (1)   AdaLoRA's schedule

Every `every` steps ranks are chosen for all layers jointly within b(t) (`retrograde.spectral.factorisation.ranks`)
from the spectra of the outputs of the last `window` steps, and each layer is projected on its leading directions,

    W ← Q Qᵀ W,   b ← b + (I − Q Qᵀ) m,   M ← Q Qᵀ M                              (2)

m being the mean of W x; of a layer without a bias the spectrum is not centred and m is 0. M is the optimizer's
momentum (``momentum_buffer``, Lion's ``exp_avg``): a direction that was cut must not be put back by it. Adam divides
its own, entry by entry, by the root of squares that no projection maps: put into an entry that never had a gradient, as
those of a silent ReLU, it would make a huge step, so there both stay. Between two projections W moves freely, so a
direction that was cut too early grows again, as AdaLoRA's masked triplets do. From t₁ on Q is fixed, and W and M are
projected after every step, so that what is trained is what `fold` gives.

The layers stay whole until `fold`: keys, parameters and optimizer are the user's own, and no training step gets
cheaper. A projection costs 2 r d_in d_out multiply-adds for each layer, M's as much again.

Deviations from AdaLoRA: W itself in place of an adapter PΛQ; importance is the share of output energy, not sensitivity;
budgets are multiply-adds, not ranks.

Reference: Zhang et al., *AdaLoRA: adaptive budget allocation for parameter-efficient fine-tuning*, ICLR 2023, eq. (12).
"""

import copy
import warnings
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from retrograde.errors import (
    NoEffectError,
    OptionError,
    RetrogradeWarning,
    StateError,
    check_value,
    is_finite,
    is_whole,
)
from retrograde.patterns import ROOT, Choice
from retrograde.spectral.factorisation.factors import candidates, parameters_of, place, split
from retrograde.spectral.factorisation.moments import Plain, Spectrum, Watch, spectrum_of_outputs
from retrograde.spectral.factorisation.parts import Part, ranks_within, report_rows
from retrograde.spectral.factorisation.report import FactorReport

_MOMENTA = ("momentum_buffer", "exp_avg")


class BudgetSchedule:
    """Shrinks the ranks of a model's layers while an optimizer trains it; `fold` gives the smaller model.

    It listens to the optimizer's steps; the training loop has nothing to call. Layers are chosen and left as by
    `retrograde.spectral.factorise`; frozen layers are left too. Ranks of a distributed run decide together.

    Args:
        model: any module, plain.
        optimizer: which trains it.
        budget: B, a share of the multiply-adds of all linear and convolutional layers, below 1.
        start: t₀, the optimizer step of the first projection; 1 or more.
        end: t₁, the step from which on ranks stay.
        every: steps between projections.
        window: steps before a projection whose outputs make the spectra.
        only: glob patterns over full layer names, or a function of name and layer; nothing else is factorised.
        skip: likewise; layers that it chooses are left.

    Raises:
        OptionError: an option's value; or, at the first projection, a budget that even ranks of 1 exceed.
        NoEffectError: no layer can be factorised, or no training forward pass goes through them.
        AttachError: the model is attached, compiled or wrapped.

    Attributes:
        step: optimizer steps since the schedule began.
        ranks: of the layers that are below full rank now.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> import retrograde as rg
        >>> model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> schedule = rg.spectral.BudgetSchedule(model, optimizer, budget=0.5, start=5, end=15, every=5)
        >>> for _ in range(20):
        ...     x = torch.randn(128, 32)
        ...     nn.functional.mse_loss(model(x), x).backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> small, report = schedule.fold()
        >>> round(report.macs[1] / report.macs[0], 1)
        0.5
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        budget: float,
        start: int,
        end: int,
        every: int = 20,
        window: int = 4,
        only: Choice | None = None,
        skip: Choice | None = None,
    ) -> None:
        share = is_finite(budget) and 0 < budget < 1
        check_value("BudgetSchedule", "budget", budget, share, "a share between 0 and 1")
        for option, value in {"start": start, "end": end, "every": every, "window": window}.items():
            fine = is_whole(value) and value >= 1
            check_value("BudgetSchedule", option, value, fine, "a whole number of steps, 1 or more")
        check_value("BudgetSchedule", "end", end, end >= start, f"`start`, {start}, or a later step")
        self._model = model
        self._optimizer = optimizer
        self._budget, self._start, self._end, self._every, self._window = budget, start, end, every, window
        layers, self._left = candidates(model, only, skip)
        theirs = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, layer in layers.items():
            weight = cast(Plain, layer).weight
            if name not in self._left and not (weight.requires_grad and id(weight) in theirs):
                self._left[name] = "frozen" if not weight.requires_grad else "not the optimizer's"
        if len(self._left) == len(layers):
            raise NoEffectError(
                "BudgetSchedule: the optimizer trains no layer that can be factorised. Make it over the model's "
                f"parameters, and choose others with `only` and `skip`. The layers: {self._left}."
            )
        self._layers = layers
        self._parts: dict[str, Part] = {}
        self._macs: dict[str, float] = {}
        self.step = 0
        self.ranks: dict[str, int] = {}
        self._watch = Watch(layers, set(layers) - set(self._left), self._gathers, model)
        self._handle = optimizer.register_step_post_hook(self._after_step)

    def __repr__(self) -> str:
        return (
            f"BudgetSchedule({type(self._model).__name__}: budget={self._budget:g}, steps {self._start} to {self._end} "
            f"every {self._every}; step {self.step}, {len(self.ranks)} of {len(self._layers)} layers below full rank)"
        )

    def share(self, step: int) -> float:
        """b(t), equation (1)."""
        if step < self._start:
            return 1.0
        if step >= self._end:
            return self._budget
        left = 1 - (step - self._start) / (self._end - self._start)
        return self._budget + (1 - self._budget) * left**3

    def fold(self, *, inplace: bool = False) -> tuple[nn.Module, FactorReport]:
        """Stop, and put two plain layers in place of each layer of lower rank: they compute what the model does.

        To go on training, make a new optimizer: the parameters are other ones.

        Args:
            inplace: change the model itself in place of a deep copy.

        Raises:
            NoEffectError: fewer steps than `end` have been made, so the budget is not reached yet.
        """
        if self.step < self._end:
            raise NoEffectError(
                f"the budget is reached at optimizer step {self._end}, and {self.step} have been made. Train on, or "
                "make the schedule with an earlier `end`."
            )
        self.stop()
        model = self._model if inplace else copy.deepcopy(self._model)
        own = dict(model.named_modules())
        pairs = {
            name: split(cast(Plain, own[name]), self._parts[name].spectrum, rank)
            for name, rank in self.ranks.items()
        }
        left = dict.fromkeys(self._layers, "no forward pass in training went through it") | self._left
        left |= {name: part.why for name, part in self._parts.items() if name not in pairs}
        rows = report_rows(self._layers, self._parts, self.ranks, pairs, left, self._macs, {})
        size = parameters_of(model)
        small = place(model, {own[name]: pair for name, pair in pairs.items()})
        return small, FactorReport(
            rows, self._budget * sum(self._macs.values()), (size, parameters_of(small))
        )

    def stop(self) -> None:
        """Listen no more; the layers stay as they are."""
        self._watch.stop()
        self._handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the model's and the optimizer's state, bit for bit.

        Within the `window` steps before a projection it holds the moments gathered so far: 8 d² bytes for each layer
        of width d. They are each rank's own in a distributed run, so every rank saves and loads its own state there.
        """
        spectra = {
            name: (part.spectrum.basis, part.spectrum.eigenvalues, part.spectrum.offset)
            for name, part in self._parts.items()
        }
        return {
            "step": self.step,
            "ranks": dict(self.ranks),
            "macs": dict(self._macs),
            "spectra": spectra,
            "window": self._watch.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave, before the next step.

        Raises:
            StateError: it is of other layers, of layers of other widths, or no such state.
        """
        try:
            step, ranks, macs = int(state["step"]), dict(state["ranks"]), dict(state["macs"])
            spectra, window = dict(state["spectra"]), state["window"]
            gathered = set(window["moments"])
        except (KeyError, TypeError, ValueError) as error:
            raise StateError(
                f"the state of a BudgetSchedule lacks what this one needs: {type(error).__name__}: {error}. Pass what "
                "state_dict() of a schedule of the same model gave."
            ) from error
        strange = sorted((spectra.keys() | ranks.keys() | macs.keys()) - self._layers.keys())
        if strange:
            raise StateError(
                f"the schedule's state is of layers that the model does not have: {strange[:5]}. Load it into a "
                "schedule of the same model."
            )
        for name, (basis, *_) in spectra.items():
            layer = cast(Plain, self._layers[name])
            if len(basis) != len(layer.weight):
                raise StateError(
                    f"the schedule's state has layer {name or ROOT!r} with {len(basis)} outputs, and the model's has "
                    f"{len(layer.weight)}. Load it into a schedule of the same model."
                )
        if gathered != self._watch.moments.keys():
            raise StateError(
                f"the schedule's state is of other layers than this one shrinks: {sorted(gathered)[:5]}, and here "
                f"{sorted(self._watch.moments)[:5]}. Choose the same layers by `only` and `skip`, and make the "
                "optimizer over the same parameters."
            )
        self.step, self.ranks, self._macs = step, ranks, macs
        self._parts = {}
        for name, parts in spectra.items():
            layer = cast(Plain, self._layers[name])
            spectrum = Spectrum(*(part.to(layer.weight.device) for part in parts))
            self._parts[name] = Part(name, layer, spectrum, self._macs[name])
        self._watch.load_state_dict(window)

    def _gathers(self, layer: nn.Module) -> bool:
        """Whether the forward pass that runs now brings rows for the next projection."""
        # A frozen part that is kept in evaluation mode is run, and paid for, all the same.
        if not (layer.training or self._model.training) or self.step >= self._end:
            return False
        # Activation checkpointing runs a part of the model again, within the backward pass: its rows were counted.
        if torch._C._current_graph_task_id() != -1:  # pyright: ignore[reportPrivateUsage]
            return False
        due = self._start
        while due <= self.step:
            due = min(due + self._every, self._end)
        return due - self.step <= self._window

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        self.step += 1
        if self.step > self._end:
            for name, rank in self.ranks.items():
                self._project(name, rank, shift=False)
        elif self.step == self._end or (
            self.step >= self._start and not (self.step - self._start) % self._every
        ):
            self._shrink()

    def _shrink(self) -> None:
        moments, macs = self._watch.moments, self._watch.macs
        if not any(of.count for of in moments.values()):
            raise NoEffectError(
                f"optimizer step {self.step}: no forward pass in training mode went through the layers of the schedule "
                f"in the last {self._window} steps, so there is nothing to shrink by. Call model.train(), and train "
                "the model object that the schedule was given."
            )
        if not all(of.count for of in moments.values()):
            silent = [name for name, of in moments.items() if not of.count]
            warnings.warn(
                f"BudgetSchedule: no forward pass went through {silent[:5]}, whose spectra stay those before.",
                RetrogradeWarning,
                stacklevel=4,
            )
        examples = max(self._watch.examples, 1)
        self._macs |= {
            name: count / examples for name, count in macs.items() if count or name not in self._macs
        }
        for name, of in moments.items():
            layer = cast(Plain, self._layers[name])
            if of.count:
                spectrum = spectrum_of_outputs(layer, of, layer.bias is not None)
                self._parts[name] = Part(name, layer, spectrum, self._macs[name])
        total = sum(self._macs.values())
        free = sum(part.macs for part in self._parts.values())
        least = total - sum(part.macs - part.cost(1) for part in self._parts.values() if part.largest)
        if self._budget * total < least:
            raise OptionError(
                f"BudgetSchedule: budget={self._budget!r} cannot be reached: with all ranks 1 the model costs "
                f"{least / total:.1%} of its multiply-adds, layers that are left included."
            )
        found = ranks_within(self._parts, self.share(self.step) * total - (total - free))
        self.ranks = {name: rank for name, rank in found.items() if rank is not None}
        for name, rank in self.ranks.items():
            self._project(name, rank, shift=True)
        self._watch.reset()

    def _project(self, name: str, rank: int, shift: bool) -> None:
        """Equation (2); the bias only where `shift`."""
        part = self._parts[name]
        layer, q = part.layer, part.spectrum.basis[:, :rank]
        for tensor in (layer.weight, *self._momenta(layer.weight)):
            _project_rows(tensor, q)
        if shift and layer.bias is not None:
            offset = part.spectrum.offset
            layer.bias.add_((offset - q @ (q.mT @ offset)).to(layer.bias.dtype))
            # The bias has it now, and is trained from here on.
            part.spectrum = replace(part.spectrum, offset=torch.zeros_like(offset))

    def _momenta(self, weight: Tensor) -> list[Tensor]:
        state: dict[str, Any] = cast(Any, self._optimizer.state).get(weight, {})
        divided = any(isinstance(value, Tensor) and key.endswith("_sq") for key, value in state.items())
        keys = _MOMENTA[:1] if divided else _MOMENTA
        return [state[key] for key in keys if isinstance(state.get(key), Tensor)]


def _project_rows(tensor: Tensor, q: Tensor) -> None:
    """``T ← Q Qᵀ T`` for T (d_out, …), in float32 at least."""
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    with torch.autocast(tensor.device.type, enabled=False):
        q = q.to(wide)
        tensor.copy_((q @ (q.mT @ tensor.flatten(1).to(wide))).view(tensor.shape))
