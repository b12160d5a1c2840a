"""A layer by itself, plain and attached in turns: how the forecast of a layer comes about.

The attached copy makes real steps, with everything that its methods do around an optimizer's step; the optimizer alone
changes nothing. Methods are taken as they are once they have warmed up. What then differs from step to step is tried in
all its kinds, and counts by how often it happens:

- the steps of a rule's cycle (`Rule.cycle`), which follow each other;
- steps whose backward passes bring rows for the input's statistics, and the refresh that ends them;
- the tiers that a block is granted (`BlockRule.shares`).
"""

import copy
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import product
from math import lcm
from statistics import median, quantiles
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as tree  # pyright: ignore[reportPrivateUsage]

from retrograde.accounting.memory import saved_storages
from retrograde.engine.blocks import BlockProgram
from retrograde.engine.layers import swap_in
from retrograde.engine.program import LayerProgram
from retrograde.engine.slots import Block, BlockCall, BlockRule, Grant, Method, Rule, Site, Tier
from retrograde.errors import OptionError
from retrograde.forecast import Kept, LayerForecast, Seen, differentiable

_BUDGET = 0.25
"""Seconds for the rounds of one layer."""
_ROUNDS = (5, 40)
_ROUNDS_OF_A_KIND = 3
"""At least, where steps are of several kinds."""
_WARMUPS = 2
_GRAIN = 32
"""Shares of zeros are told apart in steps of one part in so many: layers alike in all else are tried once."""


@dataclass(frozen=True)
class Candidate:
    """A layer to be tried.

    Attributes:
        name: full name.
        site: the plain layer, as its methods were asked about it.
        methods: that act on it, by name.
        block: kind and rule of the innermost block around it, or of itself where it is a chain.
    """

    name: str
    site: Site
    methods: Mapping[str, Method]
    block: tuple[Block, BlockRule] | None = None

    @property
    def layer(self) -> nn.Module:
        """The plain layer."""
        return self.site.layer

    @property
    def tiers(self) -> dict[Tier, float]:
        """Shares of the calls, of the tiers that are granted at all."""
        shares = {Tier.FULL: 1.0} if self.block is None else self.block[1].shares()
        return {tier: share for tier, share in shares.items() if share > 0}

    def make_rules(self, layer: nn.Module) -> dict[str, Rule]:
        """Rules for a copy of the layer, past their methods' warm-up, with what decides for the whole model."""
        # Methods may change what is around a layer, which a copy has no part in.
        site = replace(self.site, layer=layer, fused_by=())
        rules: dict[str, Rule] = {}
        for name, method in self.methods.items():
            rule = _warm(method).make_rule(site)
            if isinstance(rule, Rule):
                rules[name] = rule
        return rules


def _warm(method: Method) -> Method:
    if is_dataclass(method) and any(field.name == "warmup" for field in fields(method)):
        return cast(Method, replace(cast(Any, method), warmup=0))
    return method


@dataclass(frozen=True)
class _Found:
    """What a trial has found, for one application of a layer and of all like it."""

    forecast: LayerForecast
    plain: Kept
    attached: Kept


class Trials:
    """Tries layers one by one; those alike are tried once.

    Attributes:
        kept: what each layer tried keeps in a step, plain and attached.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], _Found] = {}
        self.kept: dict[str, tuple[Kept, Kept]] = {}

    @torch.enable_grad()
    def run(self, candidate: Candidate, calls: Sequence[Seen]) -> LayerForecast:
        """The forecast for all applications of a layer in one step.

        Raises:
            OptionError: the layer's output is empty.
        """
        # One application stands for the others, by size.
        largest = max(calls, key=lambda seen: seen.delta.numel())
        if not largest.delta.numel():
            raise OptionError(
                f"the example is empty at layer {candidate.name}, so there is nothing to be timed. Pass a batch of the "
                "size that is trained on."
            )
        size = sum(seen.delta.numel() for seen in calls) / largest.delta.numel()
        found = self._once(candidate, largest)
        plain, attached = (replace(kept, own=kept.own * size) for kept in (found.plain, found.attached))
        self.kept[candidate.name] = plain, attached
        given = [seen.tensors for seen in calls]
        return replace(
            found.forecast.times(size), plain_bytes=plain.bytes(given), attached_bytes=attached.bytes(given)
        )

    def _once(self, candidate: Candidate, seen: Seen) -> _Found:
        plain, attached = _Pass(_copied(candidate.layer), seen), _Attached(candidate, seen)
        for left in reversed(range(_WARMUPS)):
            plain()
            # As in a real step, one pass brings the rows.
            attached.program.sampling = not left
            attached()
        total = attached.program.total
        zeros = total.zeros / total.entries if total.entries else 0.0
        methods = repr(candidate.methods), tuple(candidate.tiers.items())
        key = (*_signature(candidate.layer, seen), methods, round(zeros * _GRAIN))
        if key not in self._known:
            self._known[key] = _compare(plain, attached, zeros)
        return self._known[key]


class _Pass:
    """A forward and backward pass of a layer with what the example brought it."""

    def __init__(self, layer: nn.Module, seen: Seen) -> None:
        made: dict[int, Tensor] = {}
        # One input that is given several times stays one: attention asks whether query, key and value are the same.
        given: Any = tree.tree_map_only(
            Tensor, lambda t: made.setdefault(id(t), _fresh(t)), (seen.args, seen.kwargs)
        )
        self.layer = layer
        self._args, self._kwargs = given
        self._inputs = [t for t in tree.tree_leaves(given) if isinstance(t, Tensor)]
        self._wanted = [t for t in (*layer.parameters(), *self._inputs) if t.requires_grad]
        self._delta, self._precision = seen.delta, seen.precision
        self.device = seen.delta.device
        self.gradients: list[tuple[Tensor, Tensor | None]] = []
        """Of the last pass."""

    def __call__(self) -> float:
        """Run it, and return its seconds."""
        self.gradients = []
        _wait(self.device)
        start = time.perf_counter()
        found: Any = torch.autograd.grad(self._forward(), self._wanted, self._delta, allow_unused=True)
        _wait(self.device)
        seconds = time.perf_counter() - start
        self.gradients = list(zip(self._wanted, found, strict=True))
        return seconds

    def kept(self) -> Kept:
        """What one forward pass keeps."""
        found = saved_storages(self.layer, self._forward)
        given = [tensor.untyped_storage().data_ptr() for tensor in self._inputs]
        own = sum(size for storage, size in found.items() if storage not in given)
        return Kept(tuple(float(storage in found) for storage in given), float(own))

    def _forward(self) -> Tensor:
        if self._precision is None:
            return _output(self.layer(*self._args, **self._kwargs))
        with torch.autocast(self.device.type, self._precision):
            return _output(self.layer(*self._args, **self._kwargs))


@dataclass(frozen=True)
class _Kind:
    """A kind of step that any step of a cycle may be, with its share of the steps."""

    tier: Tier
    sampling: bool
    share: float


class _Attached(_Pass):
    """The same of an attached copy, which makes steps as well.

    Attributes:
        program: the copy's.
    """

    def __init__(self, candidate: Candidate, seen: Seen) -> None:
        layer, kind = _copied(candidate.layer), candidate.site.kind
        self._tiers = candidate.tiers
        rules = candidate.make_rules(layer)
        self.program = LayerProgram(candidate.name, rules, 0, kind.names(layer))
        swap_in(layer, kind, self.program)
        self._conductors = [method.conductor(layer, rules) for method in candidate.methods.values()]
        """Kept for the rules that ask them."""
        self._granted = _Granted(None if candidate.block is None else copy.deepcopy(candidate.block[1]))
        if candidate.block is not None:
            block = Block(candidate.name, candidate.block[0].kind, layer, (layer,))
            self.program.block = BlockProgram(block, self._granted, 0, (), None)
        # Rules may have added parameters.
        parameters = list(layer.parameters())
        self._optimizer = torch.optim.SGD(parameters, lr=0.0) if parameters else None
        super().__init__(layer, seen)

    @property
    def cycle(self) -> int:
        """Steps after which the rules begin again."""
        return lcm(*(rule.cycle for rule in self.program.rules))

    @property
    def refreshes(self) -> int:
        """How often the statistics of the input were refreshed."""
        return 0 if self.program.statistics is None else self.program.statistics.refreshes

    def kinds(self) -> list[_Kind]:
        """All kinds that any step may be."""
        share = 0.0 if self.program.statistics is None else self.program.statistics.share
        sampling = {True: share, False: 1 - share}
        pairs = product(self._tiers.items(), sampling.items())
        found = [_Kind(tier, samples, often * part) for (tier, often), (samples, part) in pairs]
        return [kind for kind in found if kind.share > 0]

    def become(self, kind: _Kind) -> None:
        """Make the next passes ones of this kind."""
        self.program.sampling = kind.sampling
        self._granted.tier = kind.tier
        if self.program.block is not None:
            self.program.block.grant = Grant(kind.tier)

    def step(self) -> float:
        """What happens around an optimizer's step after a pass; its seconds."""
        if self._optimizer is None:
            return 0.0
        learning = [(tensor, g) for tensor, g in self.gradients if isinstance(tensor, nn.Parameter)]
        for parameter, gradient in learning:
            parameter.grad = gradient
        _wait(self.device)
        start = time.perf_counter()
        with torch.no_grad():
            self.program.before_step(self.layer, self._optimizer)
        self.program.after_step(self.layer, self._optimizer, idle=False)
        _wait(self.device)
        seconds = time.perf_counter() - start
        for parameter, _ in learning:
            parameter.grad = None
        return seconds

    def refresh(self) -> float:
        """Seconds around a step that refreshes the input's statistics, divided by the steps from one to the next."""
        statistics, program = self.program.statistics, self.program
        if statistics is None or not statistics.share:
            return 0.0
        every = statistics.spec.every
        program.step += -program.step % every
        statistics.due(program.step)
        program.sampling = True
        self()
        statistics.complete()
        return self.step() / every


class _Granted(BlockRule):
    """Grants what it is told to, at the cost of the rule that would decide."""

    def __init__(self, rule: BlockRule | None) -> None:
        self.tier = Tier.FULL
        self._rule = rule

    def gate(self, call: BlockCall) -> Grant:
        if self._rule is not None:
            self._rule.gate(call)
        return Grant(self.tier)


def _compare(plain: _Pass, attached: _Attached, zeros: float) -> _Found:
    # The first step: statistics are learnt, and what the later ones are is known.
    attached.step()
    kinds, cycle, program = attached.kinds(), attached.cycle, attached.program
    parts = [(step, kind) for step in range(cycle) for kind in kinds]
    kept: list[tuple[float, Kept]] = []

    def warm(kind: _Kind) -> None:
        kept.append((kind.share / cycle, attached.kept()))
        attached()

    _make_steps(attached, kinds, cycle, warm)
    rounds = min(max(int(_BUDGET / (plain() + attached() + 1e-9)), _ROUNDS[0]), _ROUNDS[1])
    turns = rounds if len(parts) == 1 else max(rounds // len(parts), _ROUNDS_OF_A_KIND)
    pairs: list[tuple[float, float]] = []
    backward: list[float] = []

    def measure(kind: _Kind) -> None:
        before = program.clocked
        pairs.append((plain(), attached()))
        backward.append(program.clocked - before)

    # A refresh is counted once, and by its share of the steps, below.
    around = [s for _ in range(turns) for s in _make_steps(attached, kinds, cycle, measure)]
    # By itself: taking turns with another layer's code and data would cost a small one half as much again.
    alone = median(plain() for _ in range(turns * len(parts)))
    low = ratio = high = ((median(around) if around else 0.0) + attached.refresh()) / alone
    seconds = 0.0
    for number, (_, kind) in enumerate(parts):
        share = kind.share / cycle
        mine = slice(number, None, len(parts))
        # The ratio's median, not the median's ratio: what disturbs a round disturbs both.
        found = quantiles((m / t for t, m in pairs[mine]), n=4, method="inclusive")
        low, ratio, high = (sum_ + share * q for sum_, q in zip((low, ratio, high), found, strict=True))
        seconds += share * median(backward[mine])
    tally = program.tally.kernels
    forecast = LayerForecast(
        alone,
        alone * ratio,
        seconds,
        zeros,
        # Where the bias alone learns, there is no product.
        {name: count / max(1, tally.total()) for name, count in tally.items()},
        (alone * low, alone * high),
    )
    inputs = zip(*([share * part for part in each.inputs] for share, each in kept), strict=True)
    own = sum(share * each.own for share, each in kept)
    return _Found(forecast, plain.kept(), Kept(tuple(map(sum, inputs)), own))


def _make_steps(
    attached: _Attached, kinds: Sequence[_Kind], cycle: int, act: Callable[[_Kind], None]
) -> list[float]:
    """One cycle, in each step of which every kind has its turn; seconds around the steps, refreshes left out."""
    seconds: list[float] = []
    for _ in range(cycle):
        for kind in kinds:
            attached.become(kind)
            act(kind)
        before = attached.refreshes
        found = attached.step()
        if attached.refreshes == before:
            seconds.append(found)
    return seconds


def _output(output: Any) -> Tensor:
    found = differentiable(output)
    assert found is not None
    return found


def _copied(layer: nn.Module) -> nn.Module:
    """Without hooks, which may belong to anything, but for those by which torch computes weights."""
    memo: dict[int, Any] = {}
    for module in layer.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach()
            elif "_hooks" in name and isinstance(value, dict):
                hooks = cast("dict[int, Any]", value)
                kept = {k: h for k, h in hooks.items() if type(h).__module__.startswith("torch.nn.utils")}
                memo[id(hooks)] = OrderedDict(copy.deepcopy(kept))
    return copy.deepcopy(layer, memo)


def _fresh(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _wait(device: torch.device) -> None:
    """For what runs on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _signature(layer: nn.Module, seen: Seen) -> tuple[Any, ...]:
    """What a layer's time depends on, beside its zeros and its methods."""
    leaves = tree.tree_leaves((seen.args, seen.kwargs))
    tensors = [
        (tuple(t.shape), t.stride(), t.dtype, t.requires_grad) if isinstance(t, Tensor) else t for t in leaves
    ]
    learning = tuple(p.requires_grad for p in layer.parameters())
    return type(layer), layer.extra_repr(), repr(tensors), seen.delta.stride(), seen.precision, learning
