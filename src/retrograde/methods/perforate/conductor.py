"""When dendrites grow: at a step of the run, or by phases that validation scores drive.

    neuron ── step `grow_after` ──► (hybrid: dendrite phase) ──► all sets, rows of w zero ──► neuron, to the end

    neuron ── plateau ──► restore best ──► (perforated, hybrid: dendrite phase) ──► accept, zero row of w ──► neuron …

A plateau ends a *cycle*: one growth, tried once. A cycle without a new best score is undone, and tried again with
new candidates; after `tries` of them the best state is restored for good.
"""

import warnings
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from retrograde.engine import ranks
from retrograde.engine.slots import Conductor
from retrograde.errors import RetrogradeWarning
from retrograde.methods.perforate import dendrites
from retrograde.methods.perforate.rule import DendriteRule
from retrograde.methods.perforate.stage import Stage

if TYPE_CHECKING:
    from retrograde.methods.perforate import Perforate

Phase = Literal["neuron", "dendrite", "finished"]

_THRESHOLDS = (1e-3, 1e-4, 0.0)
"""Relative margin of a new best score, by the number of dendrites in use."""

_DEFAULT_PERIOD = 10_000
_SILENT = 1000
"""Steps without a score after which a warning says that none has come."""
_OVERFIT = 0.1
"""Of the training score: how far it may be above the validation score."""
_PLAIN = (
    *(
        "phase",
        "best",
        "reports",
        "age",
        "stale",
        "quiet",
        "attempt",
        "growths",
        "improved",
        "since",
        "warned",
        "overfits",
    ),
)
_PHASES = {"dendrite phase": "dendrite", "finished": "finished"}


class PerforateConductor(Conductor):
    """Phases of one model.

    Attributes:
        phase: ``"neuron"``, ``"dendrite"`` or ``"finished"``.
        best: best score so far; its model state is kept on the CPU.
        reports: scores reported.
        age: reports in this phase.
        stale: reports in this phase since the best score.
        quiet: reports of a dendrite phase since a candidate improved.
        attempt: failed cycles at the present number of dendrites.
        growths: cycles begun.
        improved: whether this cycle brought a new best score.
        overfits: whether a training score was far above the validation score, which was said.
        marks: ``(step, report, event, dendrites)`` of every phase change, for a graph of the scores.
    """

    def __init__(self, method: "Perforate", model: nn.Module, rules: Mapping[str, DendriteRule]) -> None:
        self._method = method
        self._model = weakref.ref(model)
        self._rules = dict(rules)
        self._stage = Stage(model)
        for rule in self._rules.values():
            rule.stage = self._stage
        self.phase: Phase = "neuron"
        self.best: float | None = None
        self.reports = self.age = self.stale = self.quiet = self.attempt = self.growths = 0
        self.improved = False
        self.since = 0
        self.warned = self.overfits = False
        self.marks: list[tuple[int, int, str, int]] = []
        self._snapshot: dict[str, Tensor] | None = None

    @property
    def dendrites(self) -> int:
        """Dendrite sets in use."""
        return max((rule.active for rule in self._rules.values()), default=0)

    @property
    def _steps(self) -> int:
        return max((rule.steps for rule in self._rules.values()), default=0)

    # What drives it.

    def validated(self, score: float, train: float | None = None) -> None:
        """One score; under data parallelism every rank reports, and the mean counts."""
        model = self._model()
        if model is None:
            return
        device = next(model.parameters()).device
        wide = torch.float32 if device.type == "mps" else torch.float64
        if train is not None:
            self._look_for_overfitting(score, train)
        score = float(ranks.mean(torch.tensor(score, dtype=wide, device=device)))
        self.reports += 1
        self.age += 1
        if self._method.first_growth is not None:
            self.best = score if self.best is None else max(self.best, score)
        elif self.phase == "neuron":
            self._judge(score)
        elif self.phase == "dendrite" and self._method.rule == "perforated":
            # Every layer is asked: each notes its own progress.
            better = [rule.improved() for rule in self._rules.values()]
            self.quiet = 0 if any(better) else self.quiet + 1
            if self.quiet >= self._method.candidate_patience or self.age >= self._method.candidate_limit:
                self._accept()

    def _look_for_overfitting(self, score: float, train: float) -> None:
        if self.overfits or self.dendrites or train - score <= _OVERFIT * abs(train):
            return
        self.overfits = True
        warnings.warn(
            f"the training score, {train:.4g}, is far above the validation score, {score:.4g}: the network overfits, "
            "and dendrites, which add capacity, will not help. Regularise it or give it more data, or leave Perforate "
            "out.",
            RetrogradeWarning,
            stacklevel=4,
        )

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Dendrite phase: nothing moves but the candidates, whichever optimizer steps."""
        rules = self._rules.values() if self._stage.lifts else ()
        self._stage.before_step(optimizer, [p for rule in rules for p in rule.new_parameters()])

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Growth at its step, and the end of a phase that ends by itself; without scores, phases of a fixed length."""
        self._stage.after_step()
        if self.phase == "finished":
            return
        if self._method.rule == "hybrid" and self.phase == "dendrite":
            # Ranks answer together.
            if all(rule.ready() for rule in self._rules.values()):
                self._accept()
            return
        first = self._method.first_growth
        if first is not None:
            if not self.dendrites and self._steps >= first:
                self._grow()
            return
        if self.reports:
            return
        period = self._method.period
        if period is None and not self.warned and self._steps >= _SILENT:
            self.warned = True
            warnings.warn(
                f"Perforate has seen {self._steps} steps and no validation score: no dendrite has grown. While no "
                f"score comes, its phases last {_DEFAULT_PERIOD} steps each, nothing is judged, and no state is "
                "restored. Say how long the run is, attach(…, steps=…), so that dendrites can grow at a share of it; "
                "or call session.validated(…) after each validation (higher is better), or set `period`.",
                RetrogradeWarning,
                stacklevel=2,
            )
        if self._steps - self.since < (period or _DEFAULT_PERIOD):
            return
        if self.phase == "dendrite":
            self._accept()
        elif self.dendrites < self._method.max_dendrites:
            self._stage.warn_of_decay()
            self._grow()
        else:
            self._enter("finished", "finished")

    # Decisions.

    def _judge(self, score: float) -> None:
        margin = _THRESHOLDS[min(self.dendrites, len(_THRESHOLDS) - 1)]
        if self.best is None or score > self.best + margin * abs(self.best):
            self.best, self.improved, self.stale = score, True, 0
            self._snapshot = self._take()
        else:
            self.stale += 1
        if self.stale >= self._method.patience or self.age >= self._method.limit:
            self._plateau()

    def _plateau(self) -> None:
        self._stage.warn_of_decay()
        self.attempt = 0 if self.improved else self.attempt + 1
        self._restore()
        if self.dendrites >= self._method.max_dendrites or self.attempt >= self._method.tries:
            self._enter("finished", "finished")
        else:
            self._grow()

    def _grow(self) -> None:
        self.improved = False
        self.growths += 1
        if self._method.rule == "gradient":
            self._accept()
            return
        for rule in self._rules.values():
            rule.begin(self.growths)
        self._stage.freeze()
        self._enter("dendrite", "dendrite phase")

    def _accept(self) -> None:
        early = self._method.first_growth is not None
        for rule in self._rules.values():
            rule.grow(self.growths)
            while early and not rule.full:
                rule.grow(self.growths)
            rule.end()
        self._stage.thaw()
        if early:
            # Other parameters go on as they were; the new ones never had a gradient, so they have no moments.
            self._stage.restart_rates()
        else:
            self._stage.restart()
        self._enter("neuron", f"{self.dendrites} dendrites")

    def _enter(self, phase: Phase, event: str) -> None:
        self.phase = phase
        self.age = self.stale = self.quiet = 0
        self.since = self._steps
        self.marks.append((self._steps, self.reports, event, self.dendrites))

    # The best state.

    def _take(self) -> dict[str, Tensor]:
        model = self._model()
        state = {} if model is None else model.state_dict()
        return {name: _cpu_copy(value) for name, value in state.items()}

    def _restore(self) -> None:
        model = self._model()
        if self._snapshot is None or model is None:
            return
        model.load_state_dict(self._snapshot)
        self._stage.restart()

    def fold(self, model: nn.Module) -> None:
        """Norms count batches again, and encoders without a dendrite may pack padded ones."""
        self._stage.unpin(model)
        for encoder in model.modules():
            if isinstance(encoder, nn.TransformerEncoder) and encoder.__dict__.pop(dendrites.UNPACKED, False):
                kept = any(isinstance(module, dendrites.Dendritic) for module in encoder.modules())
                encoder.use_nested_tensor = not kept

    # Figures and state.

    def metrics(self) -> dict[str, Any]:
        """Phase, dendrites, cycles, phase marks, and what the run can cost at most.

        ``bound`` is the largest number of reports until the method has finished, where reports drive it;
        ``parameters_bound`` the parameters that it can add, ``parameters_added`` those in use.
        """
        sizes = [
            sum(p.numel() for p in s.parameters()) for rule in self._rules.values() for s in rule.growths
        ]
        used = [p.numel() for rule in self._rules.values() for p in rule.new_parameters()]
        first = self._method.first_growth
        found = {
            "phase": self.phase,
            "marks": [
                {"step": step, "phase": _PHASES.get(event, "neuron"), "event": event, "dendrites": count}
                for step, _, event, count in self.marks
            ],
            "dendrites": float(self.dendrites),
            "cycles": float(self.growths),
            "attempt": float(self.attempt),
            "reports": float(self.reports),
            **({"bound": float(self._method.bound())} if first is None else {"grow_after": float(first)}),
            "parameters_added": float(sum(used)),
            "parameters_bound": float(sum(sizes)),
        }
        return found if self.best is None else {**found, "best": self.best}

    def state_dict(self) -> dict[str, Any]:
        """Phase, counts, marks, and the best model state."""
        return {
            **{name: getattr(self, name) for name in _PLAIN},
            "marks": [list(mark) for mark in self.marks],
            "snapshot": self._snapshot,
            "stage": self._stage.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        for name in _PLAIN:
            setattr(self, name, state[name])
        self.marks = [
            (int(step), int(report), str(event), int(count)) for step, report, event, count in state["marks"]
        ]
        snapshot = state["snapshot"]
        self._snapshot = None if snapshot is None else {k: _cpu_copy(v) for k, v in snapshot.items()}
        self._stage.load_state_dict(state["stage"])


def _cpu_copy(value: Any) -> Any:
    # An extra state (`nn.Module.get_extra_state`) may be no tensor.
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
