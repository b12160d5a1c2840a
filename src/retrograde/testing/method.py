"""`check_method`: what attaching a method must leave as it is, on every layer kind."""

import copy
import io
import json
import pickle
import re
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from retrograde.accounting.counters import Counters
from retrograde.accounting.flops import Product
from retrograde.engine.layers import AttachedLayer
from retrograde.errors import OptionError, RetrogradeWarning
from retrograde.planning import make_plan
from retrograde.testing.cases import (
    LAYERS,
    Bystander,
    Case,
    Layer,
    Make,
    gradients,
    optimizer_of,
    require_same,
    several,
    state_of,
    train,
    watched,
)

STEPS = 4
"""Optimizer steps of a training: the methods' settings must let them act within these."""

_ROUNDING = 1e-9
"""Of sums of FLOPs."""


def check_method(
    make: Make,
    *,
    neutral: Make | None = None,
    layers: Iterable[Layer] | None = None,
    checks: Iterable[str] | None = None,
    tolerance: float = 1e-5,
) -> dict[str, str]:
    """Check a method on every layer kind; see `CHECKS` for what is checked.

    Args:
        make: makes the method, set so that all it does happens within four steps (warm-ups of one step); or makes
            several methods, which are then attached together.
        neutral: makes it set to change nothing, which must equal plain autograd; None where it cannot be so set.
        layers: what to check on; None for `LAYERS`. Add to those: ``(*LAYERS, Layer("mine", MyLayer, (8, 6)))``.
        checks: names of the checks to run; None for all.
        tolerance: how far a neutral gradient may be from autograd's, as a share of its largest magnitude.

    Returns:
        Why the method declines a layer kind, for each that it declines.

    Raises:
        AssertionError: a check failed; the message says which one, on which layer kind, and what is wrong as a rule.
        OptionError: there is no check of that name.
    """
    chosen = tuple(CHECKS if checks is None else checks)
    if unknown := [name for name in chosen if name not in CHECKS]:
        raise OptionError(f"check_method: there are no checks {unknown}. The checks: {', '.join(CHECKS)}.")
    names = [method.name for method in several(make)]
    reasons: dict[str, str] = {}
    checked = 0
    for layer in LAYERS if layers is None else layers:
        case = Case(make, layer, neutral, tolerance)
        for name in ("declining", *chosen):
            try:
                if name != "declining":
                    CHECKS[name](case)
                elif reason := declined(make, layer):
                    reasons[layer.name] = reason
                    break
            except Exception as error:
                raise AssertionError(f"{'+'.join(names)} on {layer.name}, {name}: {told(error)}") from error
        checked += layer.name not in reasons
    if not checked:
        raise AssertionError(f"{'+'.join(names)} declines every layer kind: {reasons}")
    return reasons


def told(error: Exception) -> str:
    """What a failed check says; of other errors the kind and the first line, the rest hangs on as their cause."""
    if isinstance(error, AssertionError):
        return str(error)
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def declined(make: Make, layer: Layer) -> str:
    """Why none of the methods acts on this layer kind; empty where one does.

    Raises:
        AssertionError: a method leaves a layer out without a reason.
    """
    methods = several(make)
    plan = make_plan(Case(make, layer).plain(), watched(methods), strict=False)
    rows = [row for row in plan.rows if row.methods]
    for row in rows:
        for method in methods:
            if method.name not in row.methods and not re.search(rf"(^|; ){method.name}: \S", row.why):
                raise AssertionError(
                    f"layer {row.name!r} is left out without a reason: make_rule must return a rule or say why not."
                )
    return "" if any(len(row.methods) > 1 for row in rows) else "; ".join({row.why: None for row in rows})


def neutral(case: Case) -> None:
    """The neutral setting is plain autograd: output, gradients, and what the optimizer is given."""
    if case.neutral is None:
        return
    (model, _session), plain, x = case.attached(case.neutral), case.plain(), case.batch()
    _require_close(model(x), plain(x), case.tolerance, "In training the forward pass gives another output.")
    expected = gradients(plain, [x])
    require_same(
        gradients(model, [x]), expected, case.tolerance, "The backward pass is not plain autograd's."
    )
    optimizer_of(model).step()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    del expected["input"]
    require_same(found, expected, case.tolerance, "The slot `grad` changes the gradient.")


def training(case: Case) -> None:
    """A few steps leave finite weights; calls, FLOPs and figures are counted."""
    model, session = case.attached()
    train(case, model, optimizer_of(model), STEPS, session=session)
    for name, value in model.state_dict().items():
        _require(bool(torch.isfinite(value).all()), f"{name} is not finite after {STEPS} steps.")
    _require(session.step == STEPS, f"{STEPS} steps were counted as {session.step}.")
    other, _bystander = case.attached(Bystander)
    train(case, other, optimizer_of(other), STEPS)
    expected = _counters(other)
    for name, counts in _counters(model).items():
        _require_counts(name, counts, expected[name])
    json.dumps(session.metrics())


def _require_counts(name: str, counts: Counters, plain: Counters) -> None:
    what = f"layer {name!r}"
    _require(counts.calls == plain.calls, f"{what} counted {counts.calls} calls of {plain.calls}.")
    flops, dense = counts.flops(), plain.flops()
    _require(flops.overhead >= 0, f"{what} has a negative overhead, {flops.overhead:g}.")
    for product in ("forward", "input_grad", "weight_grad"):
        p: Product = getattr(flops, product)
        most = 1 + _ROUNDING
        _require(
            abs(p.dense - getattr(dense, product).dense) <= _ROUNDING * p.dense,
            f"{what}, {product}: dense FLOPs {p.dense:g} are not plain backpropagation's, "
            f"{getattr(dense, product).dense:g}.",
        )
        _require(
            0 <= p.needed <= p.dense * most, f"{what}, {product}: needed {p.needed:g} of {p.dense:g} FLOPs."
        )
        _require(
            0 <= p.discounted <= p.executed * most,
            f"{what}, {product}: discounted {p.discounted:g} of {p.executed:g} executed FLOPs.",
        )


def checkpointing(case: Case) -> None:
    """Recomputing the forward pass changes nothing, bit for bit."""
    found: list[dict[str, Tensor]] = []
    for saving in (False, True):
        model, session = case.attached()
        run = partial(_recomputed, model) if saving else None
        train(case, model, optimizer_of(model), STEPS, session=session, run=run)
        found.append(state_of(model))
    why = "Activation checkpointing runs the forward pass twice: change no state in it."
    require_same(found[1], found[0], 0.0, why)


def _recomputed(model: nn.Module, x: Tensor) -> Tensor:
    z = checkpoint(model, x, use_reentrant=False)
    assert isinstance(z, Tensor)
    return z


def accumulation(case: Case) -> None:
    """Two backward passes make one step; in the neutral setting their gradients add up."""
    batches = [case.batch(1), case.batch(2)]
    model, session = case.attached()
    optimizer = optimizer_of(model)
    gradients(model, batches)
    optimizer.step()
    _require(session.step == 1, f"two backward passes and a step were counted as {session.step} steps.")
    if case.neutral is not None:
        model, _session = case.attached(case.neutral)
        why = "Gradients of two backward passes do not add up."
        require_same(gradients(model, batches), gradients(case.plain(), batches), case.tolerance, why)


def resume(case: Case) -> None:
    """Half of the steps, a file, the other half: the uninterrupted run, bit for bit."""
    half, file = STEPS // 2, io.BytesIO()
    model, session = case.attached()
    optimizer = optimizer_of(model)
    train(case, model, optimizer, half, session=session)
    torch.save([part.state_dict() for part in (model, optimizer, session)], file)
    train(case, model, optimizer, half, session=session, first=half)
    file.seek(0)
    again, resumed = case.attached(seed=99)
    second = optimizer_of(again)
    for part, state in zip((again, second, resumed), torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    train(case, again, second, half, session=resumed, first=half)
    why = "A resumed run ends elsewhere: a rule keeps state that its state_dict() lacks."
    require_same(state_of(again), state_of(model), 0.0, why)


def copies(case: Case) -> None:
    """Copies, pickles, saved models and averages are plain, with the same keys and the same function."""
    model, session = case.attached()
    average = AveragedModel(model, use_buffers=True)
    train(case, model, optimizer_of(model), STEPS, session=session)
    average.update_parameters(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    made: dict[str, nn.Module] = {
        "copy.deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "torch.save": torch.load(file, weights_only=False),
        "AveragedModel": average.module,
    }
    expected = _evaluated(case, model)
    for how, found in made.items():
        _require(not _attached(found), f"by {how} the model is attached still.")
        _require(found.state_dict().keys() == model.state_dict().keys(), f"by {how} the keys are others.")
        why = f"By {how} the model computes something else: fill `output` and `prepare` together."
        _require_close(_evaluated(case, found), expected, 1e-6, why)


def fold(case: Case) -> None:
    """The folded model has no trace of the engine, the same outputs, and leaves the attached model as it was."""
    model, session = case.attached()
    train(case, model, optimizer_of(model), STEPS, session=session)
    before, expected = state_of(model), _evaluated(case, model)
    folded = session.fold()
    _require(not _attached(folded), "the folded model is attached still.")
    _require_close(_evaluated(case, folded), expected, 1e-5, "The folded model computes something else.")
    require_same(state_of(model), before, 0.0, "Folding changes the attached model.")


def detach(case: Case) -> None:
    """Classes, keys and parameters are those from before, and the backward pass is autograd's."""
    model, plain = case.plain(), case.plain()
    own = {name: id(p) for name, p in model.named_parameters()}
    classes = [type(module) for module in model.modules()]
    _model, session = case.attached(model=model)
    train(case, model, optimizer_of(model), STEPS, session=session)
    with warnings.catch_warnings():
        # What was grown is lost with a warning, as it should be.
        warnings.simplefilter("ignore", RetrogradeWarning)
        session.detach()
    _require([type(module) for module in model.modules()] == classes, "a layer has not its class back.")
    _require({n: id(p) for n, p in model.named_parameters()} == own, "parameters are others than before.")
    plain.load_state_dict(model.state_dict())
    x = [case.batch()]
    require_same(gradients(model, x), gradients(plain, x), 1e-6, "The backward pass is changed still.")


def compiled(case: Case) -> None:
    """Compiled steps, without a graph break, end where eager ones do."""
    found: list[dict[str, Tensor]] = []
    for fast in (False, True):
        torch._dynamo.reset()  # pyright: ignore[reportPrivateUsage]
        model, session = case.attached()
        run: Any = torch.compile(model, fullgraph=True, backend="aot_eager") if fast else None
        train(case, model, optimizer_of(model), STEPS, session=session, run=run)
        found.append(state_of(model))
    torch._dynamo.reset()  # pyright: ignore[reportPrivateUsage]
    require_same(found[1], found[0], 1e-4, "Compiled training ends elsewhere.")


def autocast(case: Case) -> None:
    """Under bfloat16 autocast gradients of parameters stay float32; neutral ones are near the exact ones."""

    def run(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            z: Tensor = model(x)
        return z.float()

    model, _session = case.attached()
    for name, gradient in gradients(model, [case.batch()], partial(run, model)).items():
        _require(gradient.dtype == torch.float32, f"the gradient of {name} is {gradient.dtype}.")
    if case.neutral is not None:
        model, _session = case.attached(case.neutral)
        found = gradients(model, [case.batch()], partial(run, model))
        exact = gradients(case.plain(), [case.batch()])
        require_same(
            found, exact, max(case.tolerance, 0.1), "bfloat16 alone is nearer to the exact gradients."
        )


CHECKS: dict[str, Callable[[Case], None]] = {
    check.__name__: check
    for check in (
        *(neutral, training, checkpointing, accumulation, resume),
        *(copies, fold, detach, compiled, autocast),
    )
}
"""What is checked, by name: each is a function of a `Case`."""


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)


def _require_close(found: Tensor, expected: Tensor, relative: float, why: str) -> None:
    require_same({"the output": found}, {"the output": expected}, relative, why)


def _evaluated(case: Case, model: nn.Module) -> Tensor:
    with torch.no_grad():
        z: Tensor = model.eval()(case.batch())
    return z


def _attached(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, AttachedLayer)}


def _counters(model: nn.Module) -> dict[str, Counters]:
    return {name: module.__dict__["_retrograde"].total for name, module in _attached(model).items()}
