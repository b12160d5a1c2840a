r"""Dynamic spectral inference: features of a drifting test stream are taken back to where training left them.

For features h (d,) of a layer, a convolution's being those of each pixel, the source has mean μ_s and covariance
C_s ≈ Q_s Λ_s Q_sᵀ + ρ_s (I − Q_s Q_sᵀ), Q_s (d × k). Of each batch of n test examples, with mean m and covariance S,

    μ_t ← (1 − a) μ_t + a m,  C_t ← (1 − a) C_t + a S + a(1 − a)(m − μ_t)(m − μ_t)ᵀ,  a = 1 − exp(−n/N)   (1)
    Q_t ← orth(C_t Q_t)                                     (2)   one QR step a batch
    drift = (k − ‖Q_sᵀ Q_t‖²)/k                             (3)   of the subspace, 0 to 1
    displacement = mean_i (q_iᵀ(μ_t − μ_s))²/λ_i            (4)   q_i, λ_i the source's
    spectrum = mean_i log²(q_iᵀ C_t q_i/λ_i)                (5)

and the test statistics start as the source's, so that a first small batch moves them little and a batch of one works.

The gate. A brighter picture moves μ_t, a paler one shrinks C_t, and neither turns Q_t: (3) alone would miss them. With
q the `quantile` and m the median of each of (3) to (5) over a stream of source batches, q/m says how far it scatters
there, and s is the median of q/m over all layers and measures. The largest one of all, each divided by its limit, is

    level = max of (3) to (5) over f·q·max(q/m, s);  the gate opens above 1 and closes below the level's quantile  (6)

so both limits come from source data alone. f = (1 − 2/(9ν) − 1.645 √(2/(9ν)))⁻³, 2.7 to 1 as there are more batches, is
what the number B = ν + 1 of source batches leaves uncertain: the upper 95 % bound of a variance over its estimate. The
stream of source batches is held against statistics of other ones (`retrograde.spectral.adaptation.gate`). While the
gate is closed the model runs as it is, bit for bit. What (1) keeps of a far-off stream fades slowly, so while the gate
is open each layer has a second set of statistics on trial: it begins as the source's, begins anew whenever its level
is above 1, and takes the place of the first when it has lasted for three windows and is below the closing level.

While it is open, with P_s = Q_s Q_sᵀ, P_t = Q_t Q_tᵀ and τ relative to the mean of Λ_s,

    μ_s + T (h − μ_t),  T C_t T = C_s, T = Tᵀ ≻ 0           (7)   ``"transport"``: C_s, C_t as above, each plus τI
    μ_s + (h − μ_t)                                         (8)   ``"mean"``
    μ_s + [Q_s diag(√((λ_i + τ)/(q_iᵀC_tq_i + τ))) Q_sᵀ + √(ρ_s/ρ_t)(I − P_s)](h − μ_t)     (9)   ``"scale"``
    μ_s + [Q_s R Q_tᵀ + (I − P_s)(I − P_t)](h − μ_t)        (10)  ``"align"``: R the polar factor of Q_sᵀQ_t
    μ_s + [Q_t diag(λ/(λ + τ)) Q_tᵀ + (I − P_t)](h − μ_t)   (11)  ``"shrink"``: λ_i = q_iᵀC_tq_i of Q_t

(7) is the optimal transport between the two normal distributions: of all maps that give back the source's covariance
the one that moves features least. ``"colour"`` is T = C_s^{1/2} C_t^{-1/2} in its place, which gives it back too.
Layers are corrected in order, so that a later one sees what the earlier ones left.

Deviations from the sources. Published forms of (10) and (11) are without the second term, which drops what lies
outside the subspace: that is ``rest="drop"``. Q_s Q_tᵀ pairs eigenvectors by their number, and they come in any order
and sign where eigenvalues are close; R does not depend on either. The sources act on the last features alone; here
the outputs of all linear-like layers but the last one are corrected, which are the inputs of norms where these follow.

Cost for each batch and layer: 2·rows·d² for C_t, 2d²k for (2); while open both twice, 4dk (or 2d²) for each row, and in
(7) the eigenvectors of one matrix of min(2k, d) a side. Memory 2d² + 3dk numbers a layer. On a GPU the gate waits for
the device a few times in each layer.

References:
    Muthuraman, *Dynamic spectral backpropagation*, arXiv 2505.23369 (the idea, from summaries).
    Cordier et al., *Test-time adaptation with principal component analysis*, 2022: TTAwPCA, (11).
    You et al., *Test-time correlation alignment*, 2025: LinearTCA, ``"colour"`` of the last features.
    Schneider et al., *Improving robustness against common corruptions by covariate shift adaptation*, NeurIPS 2020.
    Fernando et al., *Unsupervised visual domain adaptation using subspace alignment*, ICCV 2013: (10).
    Sun, Feng, Saenko, *Return of frustratingly easy domain adaptation*, AAAI 2016: ``"colour"``.
"""

import copy
import inspect
import threading
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from retrograde.engine.layers import find_kind
from retrograde.errors import (
    AttachError,
    NoEffectError,
    OptionError,
    RetrogradeWarning,
    StateError,
    check_value,
    is_finite,
    is_whole,
)
from retrograde.patterns import ROOT, Choice, select, some
from retrograde.spectral.adaptation.features import follow, hooked, width_of
from retrograde.spectral.adaptation.gate import FEWEST_BATCHES, limits, measure
from retrograde.spectral.adaptation.tracking import (
    SOURCE,
    Correction,
    Precise,
    Tracker,
    corrected,
    is_source,
    source_of,
)

__all__ = ["Adapted", "Shift", "adapt"]

Statistics = Mapping[str, Mapping[str, Tensor]]
Gate = Literal["auto", "open", "closed"]

_PLACES: tuple[Literal["output", "input"], ...] = ("output", "input")
_MADE = ("at", "window", "rows", "rank", "energy", "quantile")
"""Options that source statistics and the gate's limits depend on."""


@dataclass(frozen=True)
class Shift:
    """How far the test stream is from the source at one layer.

    Attributes:
        layer: full name.
        rank: k.
        drift: equation (3), 0 to 1.
        displacement: equation (4), in variances.
        spectrum: equation (5), in squared logarithms.
        level: the largest of the three, each divided by its limit; equation (6).
    """

    layer: str
    rank: int
    drift: float
    displacement: float
    spectrum: float
    level: float


@dataclass(frozen=True)
class _Options:
    at: Literal["output", "input"]
    correction: Correction
    tau: float
    rest: Literal["keep", "drop"]
    window: float
    rows: int
    rank: int | None
    energy: float
    quantile: float

    def __post_init__(self) -> None:
        for option, choices in (
            ("at", _PLACES),
            ("correction", get_args(Correction)),
            ("rest", ("keep", "drop")),
        ):
            value = getattr(self, option)
            check_value("adapt", option, value, value in choices, f"one of {', '.join(map(repr, choices))}")
        tau, window, rows, rank = self.tau, self.window, self.rows, self.rank
        energy, quantile = self.energy, self.quantile
        for option, fine, must in (
            ("tau", is_finite(tau) and tau >= 0, "a finite number, 0 or more"),
            ("window", is_finite(window) and window > 0, "a positive number"),
            ("rows", is_whole(rows) and rows >= 2, "a whole number, 2 or more"),
            (
                "rank",
                rank is None or (is_whole(rank) and rank >= 1),
                "a whole number, 1 or more, or None to follow `energy`",
            ),
            ("energy", is_finite(energy) and 0 < energy <= 1, "above 0 and at most 1"),
            ("quantile", is_finite(quantile) and 0.5 < quantile <= 1, "above 0.5 and at most 1"),
        ):
            check_value("adapt", option, getattr(self, option), fine, must)

    def made(self) -> dict[str, Tensor]:
        """What source statistics and the gate's limits depend on, as numbers to be saved with them."""
        at, rank = float(_PLACES.index(self.at)), float(self.rank or 0)
        numbers = (at, self.window, self.rows, rank, self.energy, self.quantile)
        return {
            option: torch.tensor(number, dtype=torch.float64)
            for option, number in zip(_MADE, numbers, strict=True)
        }

    def corrects(self) -> tuple[float, ...]:
        """How features are corrected, as numbers to be saved."""
        return get_args(Correction).index(self.correction), self.tau, ("keep", "drop").index(self.rest)

    def must_correct(self, saved: Sequence[float]) -> None:
        """Refuse a state that another correction was saved with, by what `corrects` gave.

        Raises:
            StateError: it is another one.
        """
        own = self.corrects()
        theirs = {
            "correction": get_args(Correction)[int(saved[0])],
            "tau": saved[1],
            "rest": ("keep", "drop")[int(saved[2])],
        }
        for (option, value), number, other in zip(theirs.items(), own, saved, strict=True):
            if number != other:
                raise StateError(
                    f"adapt: {option}={getattr(self, option)!r} contradicts a state saved with {option}={value!r}, so "
                    f"it would not go on as it was. Give {option}={value!r} to adapt."
                )

    def taking(self, saved: Mapping[str, Tensor], what: str) -> "_Options":
        """These, with `rank`, `energy` and `quantile` of what was `saved` by `made`.

        Raises:
            StateError: `at`, `window` or `rows` are others than those that it was made with.
        """
        numbers = {option: float(saved[option]) for option in _MADE}
        at = _PLACES[int(numbers["at"])]
        for option, theirs in (("at", at), ("window", numbers["window"]), ("rows", int(numbers["rows"]))):
            own = getattr(self, option)
            if own != theirs:
                said = f"{theirs:g}" if option == "window" else repr(theirs)
                raise StateError(
                    f"adapt: {option}={own!r} contradicts {what} made with {option}={said}: the gate's limits hold for "
                    f"that alone, and clean data would be corrected. Give {option}={said} to adapt, or source batches."
                )
        rank, energy = int(numbers["rank"]) or None, numbers["energy"]
        return replace(self, rank=rank, energy=energy, quantile=numbers["quantile"])


_locks: "weakref.WeakKeyDictionary[nn.Module, Any]" = weakref.WeakKeyDictionary()
_making = threading.Lock()


def _lock_of(adapted: nn.Module) -> Any:
    # Beside the module, whose copies and pickles must hold none.
    with _making:
        return _locks.setdefault(adapted, threading.RLock())


class Adapted(Precise):
    """A model with the statistics that correct its features; made by `adapt`.

    It is called as the model is; calls from several threads take turns. In evaluation mode every call counts as a batch
    of the test stream; in training mode the model runs as it is. The model itself is never changed: hooks are on it
    during a call alone, and act in its thread alone. The statistics are buffers, saved and moved with the rest, and
    stay float32 or wider when the model is cast.

    Attributes:
        model: the model, as it was.
        limits: levels above which the gate opens and below which it closes, (2,).
    """

    limits: Tensor
    is_open: Tensor

    def __init__(
        self, model: nn.Module, trackers: Mapping[str, Tracker], limits: Tensor, options: _Options
    ) -> None:
        super().__init__()
        self.model = model
        self._gate: Gate = "auto"
        self._names = tuple(trackers)
        self._options = options
        self.trackers = nn.ModuleList(trackers.values())
        # Made within a caller's inference mode, they could not be loaded, or trained through, outside of it.
        with torch.inference_mode(False):
            self.register_buffer("limits", limits.clone())
            self.register_buffer("is_open", torch.zeros((), dtype=torch.bool, device=limits.device))
        self.train(model.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward pass on corrected features.

        Raises:
            NoEffectError: none of the layers was called.
        """
        if self.training:
            if not torch.is_grad_enabled():
                warnings.warn(
                    "adapt: the model is in training mode, in which nothing is tracked or corrected. Call "
                    "adapted.eval() before a test stream.",
                    RetrogradeWarning,
                    stacklevel=2,
                )
            return self.model(*args, **kwargs)
        with _lock_of(self):
            return self._run(args, kwargs)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        levels: list[float] = []
        hooks = {
            name: partial(self._on_call, name, cast(Tracker, tracker), levels)
            for name, tracker in zip(self._names, self.trackers, strict=True)
        }
        with hooked(self.model, hooks, self._options.at):
            result = self.model(*args, **kwargs)
        if not levels:
            raise NoEffectError(
                f"none of the layers that are adapted ({some(list(self._names))}) was called, so nothing was "
                "corrected. Wrap a model that calls its layers, and do not replace them afterwards."
            )
        if self.active and max(levels) < float(self.limits[1]):
            self.is_open.fill_(False)
        return result

    @property
    def gate(self) -> Gate:
        """``"auto"``, or ``"open"`` or ``"closed"`` to have it so; with ``"closed"`` the stream is only watched."""
        return self._gate

    @gate.setter
    def gate(self, value: Gate) -> None:
        choices = get_args(Gate)
        check_value("adapt", "gate", value, value in choices, f"one of {', '.join(map(repr, choices))}")
        self._gate = value

    @property
    def active(self) -> bool:
        """Whether features are corrected."""
        return self.gate == "open" or (self.gate == "auto" and bool(self.is_open))

    @property
    def drift(self) -> dict[str, float]:
        """Equation (3) by layer."""
        return {shift.layer: shift.drift for shift in self.report()}

    def report(self) -> tuple[Shift, ...]:
        """How far the stream is from the source, by layer."""
        found: list[Shift] = []
        for name, module in zip(self._names, self.trackers, strict=True):
            tracker = cast(Tracker, module)
            drift, displacement, spectrum = tracker.shift().tolist()
            rank = tracker.source_values.shape[0]
            found.append(Shift(name, rank, drift, displacement, spectrum, tracker.level()))
        return tuple(found)

    def reset(self) -> None:
        """Forget the test stream and close the gate."""
        for tracker in self.trackers:
            cast(Tracker, tracker).reset()
        self.is_open.fill_(False)

    def statistics(self) -> dict[str, dict[str, Tensor]]:
        """The source's statistics, in plain tensors to save and to give to `adapt` in place of source data.

        For each layer they hold the options that they were made with as well, by which `adapt` knows them again.
        """
        pairs = zip(self._names, self.trackers, strict=True)
        return {
            name: source_of(cast(Tracker, tracker)) | {"limits": self.limits.clone()} | self._options.made()
            for name, tracker in pairs
        }

    def get_extra_state(self) -> Tensor:
        """The options that the statistics were made with, how features are corrected, and the gate: (10,)."""
        own = (*self._options.corrects(), get_args(Gate).index(self.gate))
        made = torch.stack(list(self._options.made().values()))
        return torch.cat([made, torch.tensor(own, dtype=made.dtype)])

    def set_extra_state(self, state: Tensor) -> None:
        """Take back what `get_extra_state` gave.

        Raises:
            StateError: it was made with another `at`, `window` or `rows`, or corrects in another way.
        """
        options = self._options.taking(dict(zip(_MADE, state, strict=False)), "a state")
        corrects = state[len(_MADE) :].tolist()
        # One of an earlier version does not say.
        if corrects:
            options.must_correct(corrects[:-1])
            self._gate = get_args(Gate)[int(corrects[-1])]
        self._options = options

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        state_dict, prefix = args[:2]
        # Before anything is written.
        saved = state_dict.get(f"{prefix}_extra_state")
        if saved is not None:
            self.set_extra_state(saved)
        super()._load_from_state_dict(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Adapted":
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        # As in `__init__`.
        with torch.inference_mode(False):
            copied.__setstate__(copy.deepcopy(self.__dict__, memo))
        return copied

    def unwrap(self) -> nn.Module:
        """The model, as it was."""
        return self.model

    def __repr__(self) -> str:
        options, state = self._options, "correcting" if self.active else "watching"
        return (
            f"Adapted({type(self.model).__name__}: {len(self._names)} layers, at={options.at!r}, "
            f"correction={options.correction!r}, window={options.window:g}, gate={self.gate!r}, {state})"
        )

    def _on_call(
        self, name: str, tracker: Tracker, levels: list[float], layer: nn.Module, x: Any
    ) -> Tensor | None:
        opens, closes = self.limits.tolist()
        trial = (opens, closes) if bool(self.is_open) else None
        x, axis = follow(name, tracker, self._options.rows, self._options.window, layer, x, trial)
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            levels.append(tracker.level())
            if levels[-1] > opens and not bool(self.is_open):
                self.is_open.fill_(True)
                for other in self.trackers:
                    cast(Tracker, other).start_trial()
            if not self.active:
                return None
            affine = tracker.map(self._options.correction, self._options.tau, self._options.rest == "drop")
        return corrected(x, axis, tracker, affine)


def adapt(
    model: nn.Module,
    source: Iterable[Any] | Statistics,
    *,
    layers: Choice | None = None,
    at: Literal["output", "input"] = "output",
    rank: int | None = None,
    energy: float = 0.99,
    correction: Correction = "transport",
    tau: float = 1e-3,
    rest: Literal["keep", "drop"] = "keep",
    window: float = 100,
    quantile: float = 0.99,
    rows: int = 8192,
) -> Adapted:
    """Wrap a trained model so that it follows a drifting test stream, without labels or gradients.

    Args:
        model: it stays as it is; the wrapper calls it.
        source: batches of data like those of training, held out where there are some: 10 batches at least, in
            random order, but in the same one each time. They are read twice, up to twelve times where they are
            fewer than 100, and more often where half of them are less than three windows. A shuffled DataLoader without
            a `generator` of its own keeps its order here. Batches are inputs, tuples that begin with them, or mappings
            of keyword arguments. Or what `Adapted.statistics` gave: then `at`, `window` and `rows` must be those that
            it was made with, and `rank`, `energy` and `quantile` are settled.
        layers: by patterns over full names, or a function of name and layer; None takes every linear-like layer but the
            last one that is called (the first one, with ``at="input"``).
        at: correct what these layers return, or what they are given.
        rank: k; None takes the smallest that holds `energy`.
        energy: share of a layer's variance that the automatic rank holds. With 1 all directions count, and the
            subspace cannot drift.
        correction: equations (7) to (11), or ``"colour"``.
        tau: τ, relative to the mean of the source's eigenvalues.
        rest: ``"keep"`` what lies outside the subspace, or ``"drop"`` it as the sources of (10) and (11) do.
        window: N, examples: how long the stream is remembered.
        quantile: of source batches, by which shifts are measured; see equation (6).
        rows: of a layer's features that a batch is represented by, at most.

    Returns:
        The wrapper, in the model's mode.

    Raises:
        OptionError: a value out of its range, or too few source batches, or batches that can be read only once, or
            that the model does not take, or whose features are not finite; or a `rank`, `energy` or `quantile` beside
            ready statistics, which were made with another.
        PatternError: a pattern that matches no layer.
        NoEffectError: no layer to adapt, or one that is never called.
        AttachError: a compiled model, or a layer whose features are not one floating-point tensor.
        StateError: ready statistics of other layers, or of layers of other widths; the latter at the first call where a
            layer does not say how many features it has. Or made with another `at`, `window` or `rows`.

    Examples:
        >>> adapted = rg.spectral.adapt(model.eval(), loader)
        >>> with torch.no_grad():
        ...     for x in stream:
        ...         logits = adapted(x)
        >>> adapted.active, adapted.drift
    """
    options = _Options(at, correction, tau, rest, window, rows, rank, energy, quantile)
    for name, module in model.named_modules():
        if (
            type(module).__name__ == "OptimizedModule"
            or module.__dict__.get("_compiled_call_impl") is not None
        ):
            raise AttachError(
                f"module {name or ROOT!r} is compiled already, and compiled code does not see the hooks that correct "
                "features. Adapt the plain model, and compile what is returned."
            )
    if isinstance(source, Mapping):
        return _ready(model, cast(Statistics, source), layers, options)
    chosen = _chosen(model, layers)
    halves, batches = measure(model, source, chosen, at)
    if batches < FEWEST_BATCHES:
        raise OptionError(
            f"adapt: the source has {batches} batches, and the gate's limits need {FEWEST_BATCHES} or more. Give more "
            "data, or smaller batches."
        )
    names = _called(list(halves), chosen, layers, at)
    trackers = {name: Tracker.of(halves[name][0].plus(halves[name][1]), rank, energy) for name in names}
    usual, closing = limits(
        model, source, halves, batches, trackers, at=at, rows=rows, window=window, quantile=quantile
    )
    for tracker, own in zip(trackers.values(), usual, strict=True):
        tracker.usual.copy_(own)
    levels = torch.stack((torch.ones_like(closing), closing))
    return Adapted(model, trackers, levels.to(next(iter(trackers.values())).source_mean), options)


def _chosen(model: nn.Module, layers: Choice | None) -> list[str]:
    """Names of the layers that are adapted if they are called."""
    modules = dict(model.named_modules())
    if layers is None:
        return [name for name, layer in modules.items() if _is_linear_like(layer)]
    return list(select({name: [name] for name in modules}, layers, "layers", True, modules)[0])


def _called(called: list[str], chosen: list[str], layers: Choice | None, at: str) -> list[str]:
    """Names of those that are adapted, in the order of their calls."""
    if layers is not None and len(called) < len(chosen):
        missing = [name for name in chosen if name not in called]
        raise NoEffectError(
            f"adapt: {some(missing)} chosen by `layers` is never called by the model. Name other layers."
        )
    found = called if layers is not None else called[1:] if at == "input" else called[:-1]
    if not found:
        raise NoEffectError(
            "adapt: no layer to adapt: of the linear-like layers that the model calls, the last one (with "
            f"at='input' the first one) is left out by default. It calls {some(called)}. Name some in `layers`."
        )
    return found


def _is_linear_like(layer: nn.Module) -> bool:
    # Attention returns its weights too, and its own linear layers are not called as such.
    return not isinstance(find_kind(layer), str | None) and not isinstance(layer, nn.MultiheadAttention)


def _ready(model: nn.Module, source: Statistics, layers: Choice | None, options: _Options) -> Adapted:
    modules = dict(model.named_modules())
    strange = [name for name in source if name not in modules]
    lacking = [
        name
        for name, own in source.items()
        if not ({*SOURCE, "limits"} <= set(cast(Mapping[str, Any], own)) and is_source(own))
    ]
    if strange or lacking or not source:
        raise StateError(
            f"adapt: ready statistics of {some(list(source))} do not fit {type(model).__name__}: "
            f"{f'it has no layer {some(strange)}' if strange else 'they are not what Adapted.statistics() gives'}. "
            "Give source batches instead, or the statistics of this model."
        )
    options = _settled(source, options)
    for name, own in source.items():
        width = width_of(modules[name], options.at)
        if width is not None and width != len(own["source_mean"]):
            raise StateError(
                f"adapt: ready statistics do not fit {type(model).__name__}: layer {name!r} has {width} features at "
                f"its {options.at}, and they are of {len(own['source_mean'])}. Give source batches "
                "instead, or the statistics of this model."
            )
    names = list(source)
    if layers is not None:
        names = [
            n for n in names if n in select({n: [n] for n in source}, layers, "layers", True, modules)[0]
        ]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    trackers = {name: Tracker({key: source[name][key].to(device) for key in SOURCE}) for name in names}
    return Adapted(model, trackers, source[names[0]]["limits"].to(device), options)


def _settled(source: Statistics, options: _Options) -> _Options:
    """The options as ready statistics settle them."""
    lacking = [name for name, own in source.items() if not set(_MADE) <= set(own)]
    if lacking:
        raise StateError(
            f"adapt: ready statistics of {some(lacking)} do not say which {', '.join(_MADE)} they were made with: they "
            "are of an earlier version. Give source batches, and save the statistics of what is returned."
        )
    defaults = inspect.signature(adapt).parameters
    settled = options
    for own in source.values():
        settled = options.taking(own, "ready statistics")
        for option in ("rank", "energy", "quantile"):
            given, theirs = getattr(options, option), getattr(settled, option)
            if given not in (theirs, defaults[option].default):
                raise OptionError(
                    f"adapt: {option}={given!r} has no effect on ready statistics, which were made with "
                    f"{option}={theirs!r}. Leave it out, or give source batches."
                )
    return settled
