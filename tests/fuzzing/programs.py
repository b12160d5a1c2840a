"""Generated programs: a model, a training loop and methods, run attached and plain, and compared.

A `Program` is a value that its `repr` tells whole, so a case can be run again by itself:

    >>> outcome(Program((Part("linear", 3, 2),), (rg.Dither(scale=0.0),), neutral=True))
"""

import contextlib
import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import retrograde as rg
from fuzzing.models import Model, Part, brief
from retrograde.engine import program
from retrograde.engine.branches import AttachedBlock
from retrograde.engine.layers import AttachedLayer
from retrograde.kernels import choose, dispatch
from retrograde.testing.cases import require_same

SAME, TYPED, WRONG = "same as plain", "typed error", "wrong"
TOLERANCE = {torch.float64: 1e-6, torch.float32: 5e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
"""Of the largest magnitude in a tensor, after a few steps."""


@dataclass(frozen=True, repr=False)
class Program:
    """One case: what is built, how it is trained, and what is attached."""

    parts: tuple[Part, ...]
    methods: tuple[rg.Method, ...]
    neutral: bool
    """Whether the methods are set to change nothing."""
    loop: tuple[str, ...] = ("step", "step")
    optimizer: str = "sgd"
    batch: int = 4
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    returns: str = "tensor"
    fast: bool = False
    """Whether kernels that skip zeros or round operands compute all products."""
    strict: bool = False
    seed: int = 0

    def __repr__(self) -> str:
        return brief(self).replace(
            repr(self.methods), f"({''.join(f'rg.{brief(m)}, ' for m in self.methods)})"
        )


EVENTS = (
    *("accumulate", "autocast", "cast", "clip", "evaluate", "in_closure", "no_grad", "paused"),
    *("raise_in_backward", "raise_in_step", "resume", "retain"),
)
"""What a step of the loop may be, beside ``"step"``: methods of `Run`."""


class StopTrainingError(Exception):
    """Raised in the middle of a step."""


class Run:
    """One training run, attached or plain; `ends` has what is compared."""

    def __init__(self, case: Program, attached: bool) -> None:
        self.case, self.attached, self.dtype = case, attached, case.dtype
        self.ends: dict[str, Tensor] = {}
        self.losses = 0
        self.warned: set[str] = set()
        self.folded: nn.Module | None = None

    def start(self) -> None:
        """Build, attach, make the optimizers."""
        case = self.case
        torch.manual_seed(case.seed)
        self.model = Model(case.parts, case.channels_last, case.returns).to(self.dtype)
        for module in self.model.modules():
            if case.channels_last and isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                module.to(memory_format=torch.channels_last)
        self.session = None
        if self.attached:
            self.keys = list(self.model.state_dict())
            self.classes = [type(module) for module in self.model.modules()]
            self.session = rg.attach(self.model, case.methods, strict=case.strict, seed=case.seed)
        self.ends["random state when attached"] = torch.get_rng_state()
        self.optimizers = list(self.make_optimizers())

    def make_optimizers(self) -> Iterator[torch.optim.Optimizer]:
        owners: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            owners.setdefault(name.rpartition(".")[0], []).append(parameter)
        groups = list(owners.values())
        shares = [groups[::2], groups[1::2]] if self.case.optimizer == "two" else [groups]
        for share in filter(None, shares):
            own = [parameter for group in share for parameter in group]
            match self.case.optimizer:
                case "adamw":
                    yield torch.optim.AdamW(own, 1e-3, eps=1e-3, weight_decay=0.1)
                case "lbfgs":
                    yield torch.optim.LBFGS(own, 1e-3, max_iter=2)
                case "rmsprop":
                    yield torch.optim.RMSprop(own, 1e-3, eps=1e-2, foreach=True)
                case _:
                    yield torch.optim.SGD(own, 0.01, momentum=0.9, weight_decay=1e-3)

    def batch(self, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(number)
        return torch.randn(self.case.batch, 12, generator=generator).to(self.dtype)

    def loss(self, number: int) -> Tensor:
        z = self.model(self.batch(number).requires_grad_())
        tensors = [z] if isinstance(z, Tensor) else list(z) if isinstance(z, tuple) else [z["z"], z["x"][0]]
        loss = sum(
            (torch.sin(t.double()).square().sum() / max(t.numel(), 1) for t in tensors),
            torch.zeros((), dtype=torch.float64),
        )
        self.losses += 1
        self.ends[f"loss {self.losses}"] = loss.detach()
        return loss

    def backward(self, number: int) -> Tensor:
        loss = self.loss(number)
        loss.backward()
        return loss

    def train(self) -> None:
        for number, event in enumerate(self.case.loop):
            torch.manual_seed(number)
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            getattr(self, event)(number)
            if self.session is not None:
                self.session.report(val=-float(number % 2))
        for name, value in self.model.state_dict().items():
            self.ends[name] = value.clone()
        self.backward(99)
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                self.ends[f"gradient of {name}"] = parameter.grad
        self.ends["random state"] = torch.get_rng_state()

    def step(self, number: int) -> None:
        self.backward(number)
        for optimizer in self.optimizers:
            optimizer.step((lambda: self.closure(number)) if self.case.optimizer == "lbfgs" else None)

    def closure(self, number: int) -> Tensor:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        return self.backward(number)

    def in_closure(self, number: int) -> None:
        for optimizer in self.optimizers:
            optimizer.step(lambda: self.closure(number))

    def accumulate(self, number: int) -> None:
        self.backward(10 + number)
        self.step(number)

    def clip(self, number: int) -> None:
        self.backward(number)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        self.step(number)

    def retain(self, number: int) -> None:
        self.loss(number).backward(retain_graph=True)
        self.step(number)

    def evaluate(self, number: int) -> None:
        self.model.eval()
        self.loss(number)
        with torch.no_grad():
            self.loss(number)
        self.model.train()
        self.step(number)

    def no_grad(self, number: int) -> None:
        with torch.no_grad():
            self.loss(number)
        self.step(number)

    def autocast(self, number: int) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.loss(number)
        loss.backward()
        self.in_closure(number)

    def paused(self, number: int) -> None:
        with self.session.paused() if self.session else contextlib.nullcontext():
            self.step(number)

    def raise_in_step(self, number: int) -> None:
        def closure() -> Tensor:
            self.closure(number)
            raise StopTrainingError

        with contextlib.suppress(StopTrainingError):
            self.optimizers[0].step(closure)
        self.step(number)

    def raise_in_backward(self, number: int) -> None:
        def stop(grad: Tensor) -> None:
            raise StopTrainingError

        loss = self.loss(number)
        hooks = [p.register_hook(stop) for p in list(self.model.parameters())[:1] if p.requires_grad]
        with contextlib.suppress(StopTrainingError):
            loss.backward()
        for hook in hooks:
            hook.remove()
        # Which gradients were there already is left to autograd's order.
        self.model.zero_grad()
        self.step(number)

    def cast(self, number: int) -> None:
        self.dtype = torch.float64 if self.dtype == torch.float32 else torch.float32
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.model.to(self.dtype)
        self.step(number)

    def resume(self, number: int) -> None:
        state = copy.deepcopy([part.state_dict() for part in self.parts()])
        with torch.random.fork_rng(devices=[]):
            self.start()
        for part, saved in zip(self.parts(), state, strict=True):
            part.load_state_dict(saved)
        self.step(number)

    def parts(self) -> list[Any]:
        return [self.model, *self.optimizers, *([self.session] if self.session else [])]

    # Afterwards.

    def evaluated(self, model: nn.Module) -> dict[str, Tensor]:
        with torch.no_grad():
            z = model.eval()(self.batch(98))
        tensors = [z] if isinstance(z, Tensor) else list(z) if isinstance(z, tuple) else [z["z"]]
        return {f"output {number}": t.nan_to_num() for number, t in enumerate(tensors)}

    def copied(self) -> nn.Module:
        """What folding is compared with: it makes a copy, too."""
        # Without a graph, which computed weights would keep.
        self.evaluated(self.model)
        return copy.deepcopy(self.model) if self.session is None else self.session.fold()

    def check_fold_and_detach(self) -> None:
        session, folded = self.session, self.folded
        assert session is not None
        assert folded is not None
        tolerance = TOLERANCE[self.dtype] * 0.1
        found, expected = self.evaluated(folded), self.evaluated(self.model)
        require_same(found, expected, tolerance, "The folded model computes something else.")
        if any(isinstance(m, AttachedLayer | AttachedBlock) for m in folded.modules()):
            raise AssertionError("The folded model is attached still.")
        grown = any(figures.get("dendrites") for figures in session.metrics()["layers"].values())
        if not grown and list(folded.state_dict()) != self.keys:
            raise AssertionError("The folded model has other keys.")
        str(session.summary()), str(session.plan), session.metrics(reset=True)
        session.detach()
        if list(self.model.state_dict()) != self.keys:
            raise AssertionError("The detached model has other keys.")
        if [type(module) for module in self.model.modules()] != self.classes:
            raise AssertionError("A detached module has another class.")
        if not grown:
            require_same(self.evaluated(self.model), expected, tolerance, "Detaching changes the function.")
        self.model.train()
        self.step(97)


@dataclass(frozen=True)
class Outcome:
    """How a program ended; `why` is an error's type and message."""

    kind: str
    why: str = ""


def outcome(case: Program) -> Outcome:
    """Run a program plain and attached, and compare."""
    with _kernels(case.fast):
        plain, error = _run(case, attached=False)
        run, found = _run(case, attached=True)
        if isinstance(found, rg.errors.RetrogradeError):
            return Outcome(TYPED, _told(found))
        if found is not None:
            # Attaching may meet what plain training meets later, or never if it does not use the layer.
            known = (error,) if run.losses else (error, _unreadable(case))
            return Outcome(TYPED if type(found) in map(type, known) else WRONG, _told(found))
        if error is not None:
            return Outcome(WRONG if case.neutral else TYPED, f"plain alone raised {_told(error)}")
        try:
            _compare(case, run, plain)
            _compare_uninterrupted(case, run)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                run.check_fold_and_detach()
        except Exception as wrong:
            return Outcome(WRONG, _told(wrong))
    return Outcome(SAME)


def _unreadable(case: Program) -> Exception | None:
    """What computing the weight of some layer raises, as torch has no orthogonal matrices in bfloat16."""
    run = Run(case, attached=False)
    try:
        run.start()
        for module in run.model.modules():
            getattr(module, "weight", None)
    except Exception as error:
        return error
    return None


def _run(case: Program, attached: bool) -> tuple[Run, Exception | None]:
    run = Run(case, attached)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            run.start()
            run.train()
            run.folded = run.copied()
        except Exception as error:
            return run, error
    run.warned = {str(w.message) for w in caught if not issubclass(w.category, rg.errors.RetrogradeWarning)}
    return run, None


def _compare(case: Program, run: Run, plain: Run) -> None:
    if surplus := run.warned - plain.warned:
        raise AssertionError(f"Attached training warns of more: {surplus}")
    for name in [name for name in plain.ends if name.startswith("random")]:
        found, expected = run.ends.pop(name), plain.ends.pop(name)
        # L-BFGS evaluates as often as its losses make it, and dropout draws each time.
        counted = case.neutral or case.optimizer != "lbfgs" or name != "random state"
        if counted and not torch.equal(found, expected):
            raise AssertionError(f"The {name} is another.")
    for name, value in run.ends.items():
        if _arbitrary(case) and "parametrizations.weight.original" in name:
            continue
        fine = (plain.ends[name],) if name in plain.ends else plain.ends.values()
        if not value.isfinite().all() and all(other.isfinite().all() for other in fine):
            raise AssertionError(f"{name} is not finite.")
    if case.neutral and not _arbitrary(case):
        found = {name: value.nan_to_num() for name, value in run.ends.items() if "dendrites." not in name}
        expected = {name: value.nan_to_num() for name, value in plain.ends.items()}
        _require_near(found, expected, _tolerance(case))


def _arbitrary(case: Program) -> bool:
    """Whether plain training computes nothing itself: in 16 bits `torch.matrix_exp` gives infinities, NaN and 2^100."""
    return case.dtype in (torch.bfloat16, torch.float16) and "orthogonal" in repr(case.parts)


def _compare_uninterrupted(case: Program, run: Run) -> None:
    """A run that was resumed from its states is the one that was not, bit for bit."""
    # After a cast torch's optimizers do not hold this either: they load their state in the parameters' new precision.
    if "resume" not in case.loop or "cast" in case.loop:
        return
    loop = tuple("step" if event == "resume" else event for event in case.loop)
    whole, error = _run(replace(case, loop=loop), attached=True)
    # Steps without a backward pass are counted anew after resuming: only the other run had enough of them in a row.
    if isinstance(error, rg.errors.NoEffectError):
        return
    if error is not None:
        raise error
    for name, value in whole.ends.items():
        if name in run.ends and not torch.equal(value, run.ends[name]) and value.isfinite().all():
            raise AssertionError(f"{name} is another than without resuming.")


def _tolerance(case: Program) -> float:
    """Of the coarsest precision that the program goes through."""
    through = {case.dtype}
    through |= {torch.float32} if "cast" in case.loop else set()
    through |= {torch.bfloat16} if "autocast" in case.loop else set()
    return max(TOLERANCE[dtype] for dtype in through)


_CANCELLED = 1e-2
"""Of a loss of order one: gradients smaller than this throughout are sums that cancel."""


def _require_near(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """To the tolerance, of the largest magnitude among losses, among gradients, or among weights."""
    if found.keys() != expected.keys():
        raise AssertionError(f"{sorted(found.keys() ^ expected.keys())} are on one side only.")
    kinds = {name: name.split()[0] if " " in name else "weight" for name in expected}
    largest = dict.fromkeys(kinds.values(), 0.0)
    for name, kind in kinds.items():
        largest[kind] = max([largest[kind], *expected[name].abs().flatten().tolist()])
    if "gradient" in largest:
        # Behind a norm all that there are may vanish but for the rounding of sums that cancel.
        largest["gradient"] = max(largest["gradient"], _CANCELLED)
    for name, kind in kinds.items():
        value = expected[name]
        worst = float((found[name] - value).abs().max()) if value.numel() else 0.0
        # Behind a norm a small gradient in low precision may be rounding and nothing else.
        rounding = kind == "gradient" and tolerance > TOLERANCE[torch.float32]
        if found[name].dtype != value.dtype or not (rounding or worst <= tolerance * largest[kind]):
            raise AssertionError(
                f"{name} is off by {worst:.3g}, of {largest[kind]:.3g}: not as in plain training."
            )


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:300]


class _Forced(choose.Chooser):
    """A chooser that takes the last of the kernels that are allowed: never the dense one where there is another."""

    def best(self, problem: Any, allowed: tuple[str, ...], compute: Any) -> str:
        return allowed[-1]


@contextlib.contextmanager
def _kernels(fast: bool) -> Iterator[None]:
    """With `fast`, no product is small, and kernels that skip zeros or round operands compute it."""
    kept = dispatch.SMALL, program.SMALL, choose.chooser
    if fast:
        dispatch.SMALL = program.SMALL = 0
        choose.chooser = _Forced
    try:
        yield
    finally:
        dispatch.SMALL, program.SMALL, choose.chooser = kept
