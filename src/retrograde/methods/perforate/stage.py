"""What a phase does to a model: freeze the network, pin normalisation statistics, give optimizers a fresh start."""

import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase  # pyright: ignore[reportPrivateUsage]

from retrograde.errors import RetrogradeWarning

_DECAYED = 0.01


class Stage:
    """Shared by the rules of one model and their conductor.

    Attributes:
        learning: whether this is a dendrite phase: candidates learn, and nothing else does.
    """

    def __init__(self, model: nn.Module) -> None:
        # Rules hang on the model's layers: a strong reference back would keep a forgotten model alive for a while.
        self._model = weakref.ref(model)
        self.learning = False
        self._pinned: dict[str, tuple[float | None, int | None]] = {}
        self._peaks: weakref.WeakKeyDictionary[torch.optim.Optimizer, list[float]] = (
            weakref.WeakKeyDictionary()
        )
        """The largest learning rate of each group so far."""
        self._lifts: weakref.WeakKeyDictionary[torch.optim.Optimizer, list[float]] = (
            weakref.WeakKeyDictionary()
        )
        """By how much new parameters learn faster than the group's rate; empty until the first step that they make."""
        self._loaded: list[tuple[list[float], list[float] | None]] = []
        """Peaks and lifts of a resumed run, for the optimizers in the order in which they step."""
        self._before: list[tuple[nn.Parameter, Tensor, float]] = []
        self._fresh: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._restart = False

    @property
    def lifts(self) -> bool:
        """Whether the learning rate of what has grown was restarted."""
        return bool(self._lifts) or any(lifts is not None for _, lifts in self._loaded)

    # Phases.

    def freeze(self) -> None:
        """Begin a dendrite phase."""
        self.learning = True
        self._pin()

    def thaw(self) -> None:
        """End it; harmless outside of one."""
        self.learning = False
        self.unpin()
        self._pinned = {}

    def before_step(self, optimizer: torch.optim.Optimizer, new: Sequence[nn.Parameter] = ()) -> None:
        """No gradient in a dendrite phase; moments of weights that were replaced are forgotten.

        Args:
            optimizer: that is about to step.
            new: parameters whose learning rate was restarted.
        """
        self._before = []
        model = self._model()
        mine = set[int]() if model is None else {id(parameter) for parameter in model.parameters()}
        if model is None or not any(
            id(p) in mine for group in optimizer.param_groups for p in group["params"]
        ):
            return
        self._note_rates(optimizer)
        if self._restart and optimizer not in self._fresh:
            self._fresh.add(optimizer)
            for parameter in [p for p in optimizer.state if id(p) in mine]:
                del optimizer.state[parameter]
        if self.learning:
            for parameter in model.parameters():
                parameter.grad = None
        elif new and optimizer in self._lifts:
            self._keep(optimizer, {id(p) for p in new})

    def _note_rates(self, optimizer: torch.optim.Optimizer) -> None:
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        if optimizer not in self._peaks and self._loaded:
            peaks, lifts = self._loaded.pop(0)
            if len(peaks) == len(rates):
                self._peaks[optimizer] = peaks
                if lifts is not None:
                    self._lifts[optimizer] = lifts
        peaks = self._peaks.get(optimizer, [])
        # Groups may be added on the way.
        peaks = [*peaks, *rates[len(peaks) :]][: len(rates)]
        self._peaks[optimizer] = [max(pair) for pair in zip(peaks, rates, strict=True)]

    def restart_rates(self) -> None:
        """What is new from here on learns at the largest rate that its group has had, then as the schedule goes."""
        for optimizer in self._peaks:
            self._lifts[optimizer] = []

    def _keep(self, optimizer: torch.optim.Optimizer, new: set[int]) -> None:
        """The new parameters whose step has to be made longer, as they are before it."""
        groups, peaks = optimizer.param_groups, self._peaks[optimizer]
        if not self._lifts[optimizer]:
            rates = [float(group["lr"]) for group in groups]
            lifts = [peak / rate if rate > 0 else 1.0 for peak, rate in zip(peaks, rates, strict=True)]
            self._lifts[optimizer] = lifts
        for group, lift, peak in zip(groups, self._lifts[optimizer], peaks, strict=False):
            rate = float(group["lr"])
            factor = min(lift, peak / rate) if rate > 0 else 1.0
            if factor > 1:
                self._before += [
                    (p, p.detach().clone(), factor)
                    for p in group["params"]
                    if id(p) in new and p.grad is not None
                ]

    def restart(self) -> None:
        """Weights were replaced: each optimizer's moments go before its next step."""
        self._restart, self._fresh = True, weakref.WeakSet()

    @torch.no_grad()
    def after_step(self) -> None:
        """Steps of parameters whose rate was restarted are made longer, which any rule linear in the rate allows.

        Optimizers that turn up from here on were loaded or made after the restart of moments, and are left alone.
        """
        for parameter, before, factor in self._before:
            parameter.copy_(before.add(parameter - before, alpha=factor))
        self._before = []
        self._restart = self._restart and any(o not in self._fresh for o in self._peaks)

    def warn_of_decay(self) -> None:
        """A plateau at a vanishing learning rate is none."""
        pairs = [
            (float(group["lr"]), float(group.get("initial_lr", peak)))
            for optimizer, peaks in self._peaks.items()
            for group, peak in zip(optimizer.param_groups, peaks, strict=False)
        ]
        if pairs and all(now < _DECAYED * start for now, start in pairs):
            warnings.warn(
                "Perforate declares a plateau while every learning rate is below 1 % of its initial value: the score "
                "may stand still because the schedule has ended, and new dendrites will hardly learn. Use a constant "
                "rate, or a schedule that restarts.",
                RetrogradeWarning,
                stacklevel=2,
            )

    # Normalisation statistics.

    def _norms(self, model: nn.Module | None = None) -> dict[str, _NormBase]:
        model = self._model() if model is None else model
        modules = {} if model is None else dict(model.named_modules())
        return {
            name: m for name, m in modules.items() if isinstance(m, _NormBase) and m.running_mean is not None
        }

    def _pin(self) -> None:
        for name, norm in self._norms().items():
            if name not in self._pinned:
                batches = norm.num_batches_tracked
                self._pinned[name] = (norm.momentum, None if batches is None else int(batches))
            norm.momentum = 0.0

    def unpin(self, model: nn.Module | None = None) -> None:
        """Give norms their momenta and counts of batches back: the model's, or those of a copy."""
        for name, norm in self._norms(model).items():
            if name in self._pinned:
                norm.momentum, batches = self._pinned[name]
                if batches is not None and norm.num_batches_tracked is not None:
                    norm.num_batches_tracked.fill_(batches)

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Phase, pinned norms, learning rates, and whether a restart of moments waits for the next step."""
        rates = [[list(peaks), self._lifts.get(optimizer)] for optimizer, peaks in self._peaks.items()]
        return {
            "learning": self.learning,
            "pinned": dict(self._pinned),
            "restart": self._restart,
            "rates": rates or [[peaks, lifts] for peaks, lifts in self._loaded],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave: the model is frozen and pinned again if it was."""
        own = {name: norm.momentum for name, norm in self._norms().items() if name not in self._pinned}
        for name, (momentum, _) in self._pinned.items():
            own[name] = momentum
        for name, norm in self._norms().items():
            norm.momentum = own[name]
        self.learning = bool(state["learning"])
        self._pinned = {name: (entry[0], entry[1]) for name, entry in state["pinned"].items()}
        if self.learning:
            self._pin()
        self._restart, self._fresh = bool(state["restart"]), weakref.WeakSet()
        self._peaks, self._lifts = weakref.WeakKeyDictionary(), weakref.WeakKeyDictionary()
        self._loaded = [
            (list(map(float, peaks)), None if lifts is None else list(map(float, lifts)))
            for peaks, lifts in state["rates"]
        ]
