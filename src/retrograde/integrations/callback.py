"""What the callbacks for all trainers share: methods that wait for a model, and the session that they become."""

import math
import warnings
from collections.abc import Collection, Mapping
from typing import Any, TypedDict

from torch import nn

from retrograde.assignment import Given, assign
from retrograde.errors import AttachError, OptionError, RetrogradeWarning
from retrograde.forecast import Example
from retrograde.patterns import Choice
from retrograde.session import Session, attach, session_of

_FIGURES = "retrograde"
"""What the figures' names begin with in the trainer's log."""


class AttachOptions(TypedDict, total=False):
    """`attach`'s keyword arguments that a callback passes on; the optimizer is the trainer's."""

    only: Choice | None
    skip: Choice | None
    strict: bool
    seed: int | None
    steps: int | None
    example: Example | None
    decline: bool


class SessionCallback:
    """Base class of the callbacks.

    Attributes:
        session: None before the trainer has a model to attach to; after a fold the session that has ended.
    """

    def __init__(
        self,
        methods: Given | None,
        metric: str | None,
        fold: bool,
        log_layers: bool,
        options: AttachOptions,
    ) -> None:
        if unknown := sorted(options.keys() - AttachOptions.__annotations__.keys()):
            raise OptionError(
                f"RetrogradeCallback has no option {', '.join(unknown)}. Beside its own it takes attach's: "
                f"{', '.join(AttachOptions.__annotations__)}."
            )
        if methods is None and options:
            raise OptionError(
                f"RetrogradeCallback was given {', '.join(sorted(options))}, and no methods to attach with them. Give "
                "it methods, or these options to attach."
            )
        if methods is not None:
            assign(methods)
        self.session: Session | None = None
        self._methods = methods
        self._metric = metric
        self._fold = fold
        self._log_layers = log_layers
        self._options = options
        self._grown = False
        self._scores = 0
        self._lacking: tuple[str, bool, list[str]] | None = None

    # Attaching.

    def _attach(self, model: nn.Module, optimizer_made: str | None = None) -> None:
        """Attach to a model, unless this callback's session is on it already.

        Args:
            model: the trainer's own, not wrapped.
            optimizer_made: where there is an optimizer already, how to attach before it is made.

        Raises:
            AttachError: there are no methods, and none on the model; or there is an optimizer, and it lacks parameters
                that a method has added.
        """
        if self._is_on(model):
            return
        if self._methods is None:
            try:
                self.session = session_of(model)
            except AttachError as error:
                raise AttachError(
                    f"RetrogradeCallback was given no methods, and {error} Give it methods, as in "
                    "RetrogradeCallback(retrograde.Dither()), or attach the model before the trainer has it."
                ) from error
            return
        before = {id(parameter) for parameter in model.parameters()}
        session = attach(model, self._methods, **self._options)
        added = [name for name, parameter in model.named_parameters() if id(parameter) not in before]
        if added and optimizer_made is not None:
            session.detach()
            raise AttachError(
                f"the methods add {len(added)} parameters to the model ({added[0]} is the first), and the trainer's "
                f"optimizer was made before, so they would never learn. {optimizer_made}"
            )
        self.session, self._grown = session, bool(added)

    def _is_on(self, model: nn.Module) -> bool:
        try:
            return self.session is not None and session_of(model) is self.session
        except AttachError:
            return False

    def _load(self, state: dict[str, Any]) -> None:
        """Go on where a session's `state_dict` was taken, on the layers that it was taken from.

        Raises:
            StateError: the state does not fit the session.
        """
        assert self.session is not None
        layers = state.get("layers", {}).keys()
        # A forecast may decline other layers in this process than in the one that wrote the state.
        forecast = self._options.get("example") is not None and self._options.get("decline", True)
        if forecast and not self._grown and layers != self.session.state_dict()["layers"].keys():
            self._attach_only(layers)
        self.session.load_state_dict(state)

    def _begin_anew(self, why: str) -> None:
        """Where a checkpoint has no session's state: say so, once."""
        assert self.session is not None
        warnings.warn(
            f"{why} The methods' own state (scales, bases, thresholds, random numbers) begins anew, and the run is "
            "another one than without the stop.",
            RetrogradeWarning,
            stacklevel=4,
        )
        # Or else the first step complains, too, that the session's state was not loaded.
        self.session.load_state_dict(self.session.state_dict())

    def _attach_only(self, layers: Collection[str]) -> None:
        assert self.session is not None
        assert self._methods is not None
        options = self._options.copy()
        options["only"], options["skip"], options["example"] = lambda name, _: name in layers, None, None
        self.session = attach(self.session.detach(), self._methods, **options)

    # Scores.

    def _report(self, metrics: Mapping[str, Any], name: str, greater_is_better: bool) -> None:
        """Tell the methods one score, or keep in mind that it was not among the metrics."""
        if self.session is None:
            return
        if name not in metrics:
            self._lacking = name, self._metric is not None, sorted(metrics)
            return
        self._scores += 1
        score = float(metrics[name])
        if math.isfinite(score):
            self.session.validated(score if greater_is_better else -score)
        else:
            warnings.warn(
                f"RetrogradeCallback: the evaluation's {name} is {score}, so the methods are told no score.",
                RetrogradeWarning,
                stacklevel=3,
            )

    def _check_scores(self) -> None:
        """After all evaluations of a round: no method has been told a score.

        Raises:
            OptionError: the user named the metric.
        """
        if self._lacking is None or self._scores:
            return
        name, named, known = self._lacking
        self._lacking = None
        what = (
            f"RetrogradeCallback: the evaluation has no metric {name!r} to tell the methods about. It has "
            f"{', '.join(known) or 'none'}. Name one of these."
        )
        if named:
            raise OptionError(what)
        warnings.warn(what, RetrogradeWarning, stacklevel=3)

    # Figures, and the end.

    def _figures(self) -> dict[str, float]:
        """The session's figures since the last call, flat: ``{"retrograde/zeros": 0.9, …}``."""
        if self.session is None:
            return {}
        metrics = self.session.metrics(reset=True)
        if not self._log_layers:
            metrics = {name: value for name, value in metrics.items() if name not in ("layers", "blocks")}
        return dict(_flat(metrics, _FIGURES))

    def _end(self) -> None:
        """Make the trainer's model plain, unless it shall stay attached."""
        if self._fold and self.session is not None and self._is_on(self.session.model):
            self.session.fold(in_place=True)


def _flat(figures: Mapping[str, Any], prefix: str) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in figures.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}/{name}")  # pyright: ignore[reportUnknownArgumentType]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append((f"{prefix}/{name}", float(value)))
    return found
