"""The program of one attached layer: its rules sorted into slots, its random keys, its counts."""

import math
import warnings
import weakref
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from retrograde.accounting.counters import Counters
from retrograde.engine import boundary, ranks
from retrograde.engine.blocks import BlockProgram, cross
from retrograde.engine.maps.base import Gradients, Map
from retrograde.engine.slots import Call, Grant, Needs, Rule, Step, Tier
from retrograde.engine.statistics import InputStatistics, StatisticsSpec
from retrograde.engine.tally import Tally
from retrograde.errors import OptionError, RetrogradeWarning, StateError
from retrograde.kernels import reference
from retrograde.kernels.delta import Delta
from retrograde.kernels.dispatch import SMALL, Products
from retrograde.kernels.int8 import Quantised
from retrograde.kernels.work import DISCOUNTS, DTYPE_DISCOUNTS, Work
from retrograde.maths.philox import key_of, mix_key

_PASSES_WITHOUT_STEP = 1000
_ROUNDING_FLOPS = 6
"""For each entry of an operand that a forward pass in 8 bits rounds: largest magnitude, scaling and rounding, twice."""
_FULL = Grant(Tier.FULL)
# Whether autocast is on for any device, which takes less time to say.
autocasting: Any = torch._C._is_any_autocast_enabled  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]


def ordered(rules: Mapping[str, Rule]) -> dict[str, Rule]:
    """Rules by method name, as slots run them."""
    return {name: rules[name] for name in sorted(rules, key=lambda name: (rules[name].precedence, name))}


class LayerProgram:
    """Runs one attached layer.

    Args:
        name: full name of the layer in the model.
        rules: the methods' rules for this layer by method name.
        seed: the session's seed.
        names: of the layer's weight and bias.
    """

    def __init__(
        self, name: str, rules: Mapping[str, Rule], seed: int, names: tuple[str, str] = ("weight", "bias")
    ) -> None:
        self.name = name
        self.names = names
        self._by_method = ordered(rules)
        self.rules = tuple(self._by_method.values())
        self.reseed(seed)
        self.active = True
        self.block: BlockProgram | None = None
        """The innermost block around the layer, or its own when it is a chain; its grant is the tier to begin with."""
        self.exit: BlockProgram | None = None
        """The block that ends at this layer's output."""
        self.owner: object = None
        """The session, kept by its layers, so that a model trains on when nothing else keeps it."""
        self.map: Map | None = None
        """How the layer multiplied in its last backward call."""
        self.may_idle = False
        """Whether a step without a backward pass is as the user wants it: the session was paused."""
        self.loaded = False
        """Whether the layer's state was loaded, and none of this program's since."""
        self.step = 0
        self.calls = 0
        self.idle_steps = 0
        self._passes, self._last_pass = 0, -1
        self.tally = Tally()
        self.clocked = 0.0
        """Seconds of the backward calls so far: on a GPU, of launching them. No part of the state."""
        self.clocked_steps = 0
        """Optimizer steps that these seconds belong to."""
        self._kept = (0, 0.0, 0.0)
        """Backward calls that found something else kept in place of the layer's input; bytes of the inputs, and those
        that were kept. No part of the state."""
        self._settled: tuple[float, torch.dtype, float] | None = None
        """Size, dtype and zeros of a product without rules for which torch's own kernels were chosen."""
        self._treated: tuple[weakref.ref[Tensor], int] | None = None
        self._layer_key = key_of(name)
        self._key_of: tuple[tuple[int, ...], int] = (), 0
        self._fill_slots()
        self.statistics = _shared_statistics(self.rules)
        # A plain flag, not a question about the step: compiled code is guarded by what forward reads.
        self.sampling = self.statistics is not None
        self.token = boundary.token(self)

    def reseed(self, seed: int) -> None:
        """Take the seed of the session, or of the one whose state is loaded."""
        self.seed = seed
        for rule in self.rules:
            rule.seed = seed

    def _fill_slots(self) -> None:
        def filling(slot: str) -> tuple[Rule, ...]:
            return tuple(rule for rule in self.rules if rule.fills(slot))

        self._output, self._gate, self._delta = filling("output"), filling("gate"), filling("delta")
        self._observe, self._grad, self._local = filling("observe"), filling("grad"), filling("local")
        self._fold = filling("fold")
        save, product = filling("save"), filling("product")
        if save != product or len(save) > 1:
            names = ", ".join(sorted({self._method_of(rule) for rule in (*save, *product)}))
            raise OptionError(
                f"slots `save` and `product` of layer {self.name!r} are filled by {names}: the rule that keeps "
                "something other than the layer's input must also compute the weight gradient from it, and only one "
                "rule can. Attach one of them to this layer; `only` and `skip` choose layers."
            )
        self._save = save[0] if save else None
        self._plain = not (save or self._gate or self._delta or self._observe)
        """Whether no rule acts in the backward pass."""
        reading = next((rule for rule in self.rules if rule.needs_input), None)
        if reading is not None and self._save not in (None, reading):
            raise OptionError(
                f"layer {self.name!r}: {self._method_of(reading)} reads the layer's input in the backward pass, and "
                f"{self._method_of(self._save)} keeps something else in its place. Attach one of them to this layer; "
                "`only` and `skip` choose layers."
            )
        self.int8 = any(rule.int8_forward for rule in self.rules)
        """Whether the forward product runs in 8 bits."""
        if self.int8 and self._save is not None:
            raise OptionError(
                f"layer {self.name!r}: {self._method_of(self._save)} keeps something other than the layer's input, and "
                "a forward pass in 8 bits keeps the rounded one; only one can be kept. Leave the forward pass exact, "
                "or attach one of them to this layer; `only` and `skip` choose layers."
            )

    def _method_of(self, rule: Rule | None) -> str:
        return next(name for name, own in self._by_method.items() if own is rule)

    # Forward.

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None, map: Map) -> Tensor:
        """``z = W x + b`` with the program in its backward pass, and what rules make of it."""
        own = x
        if (torch.compiler.is_compiling() or autocasting()) and torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = _autocast(x, dtype), _autocast(weight, dtype)
            bias = None if bias is None else _autocast(bias, dtype)
        rows = self._sample(own, weight, map) if self.sampling else None
        z = boundary.apply(x, weight, bias, rows, self, map)
        for rule in self._output:
            z = rule.output(own, z, map)
        return z if self.exit is None else cross(z, self.exit)

    def _sample(self, x: Tensor, weight: Tensor, map: Map) -> Tensor | None:
        """Rows of x for the input statistics, kept for the backward pass in the steps that bring them."""
        if self.statistics is None:
            return None
        with torch.no_grad():
            # Detached: rows may be a view of x, which would keep its graph, and whoever computes with them record one.
            width = weight.numel() // map.outputs(weight.shape) * map.groups
            return map.rows(x.detach(), weight, self.statistics.spec.budget(x.numel(), width))

    def multiply(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, map: Map
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """z, and what is kept for the backward pass; inside the boundary."""
        learns = weight.requires_grad
        if not self.int8:
            kept = () if not learns else (x,) if self._save is None else self._save.save(x, weight, map)
            return map.forward(x, weight, bias), kept
        z, x_values, x_scale, *rounded = torch.ops.retrograde.int8_linear(x, map.factor(weight), bias)
        return z, (*rounded, x_values, x_scale) if learns else tuple(rounded)

    # Backward.

    def backward(
        self,
        delta: Tensor,
        saved: Sequence[Tensor],
        rows: Tensor | None,
        weight: Tensor,
        input_shape: Sequence[int],
        map: Map,
        needs: Sequence[bool],
    ) -> Gradients:
        """Gradients of one call; see `Call` for the arguments."""
        self.map = map
        if needs[1] or needs[2]:
            self._expect_steps()
        flops = map.flops(input_shape, weight.shape, delta.shape)
        if rows is not None and self.statistics is not None:
            self.statistics.collect(rows, flops)
        small = flops < 2 * SMALL or delta.device.type != "cpu"
        number = self.calls
        if self._plain and self.block is None and saved:
            # Between two counts of zeros a larger product, too, stays with the kernels that it was given.
            counting = self.tally.counting(self.step, number)
            settled = not counting and self._settled == (flops, weight.dtype, self.tally.own_share)
            if small or settled:
                self.calls = number + 1
                own = Delta(delta)
                if counting:
                    own.count()
                self._tally(flops, weight.dtype, needs, needs[1], own, own)
                if small:
                    return map.gradients(delta, saved[0], weight, needs)
                dx, dw, _ = map.gradients(delta, saved[0], weight, (needs[0], needs[1], False))
                return dx, dw, map.bias_grad(delta) if needs[2] else None
        own, needs = Delta(delta), Needs(*needs[:3])
        grant = _FULL
        if self.block is not None:
            if self.block.block.kind == "chain":
                grant = self.block.gate(delta)
            elif self.block.pruned:
                # Counted by the block, as where autograd never comes here.
                return (
                    delta.new_zeros(tuple(input_shape)) if needs.input else None,
                    torch.zeros_like(weight) if needs.weight else None,
                    delta.new_zeros(map.outputs(weight.shape)) if needs.bias else None,
                )
            else:
                # A branch's scale is in δ already.
                grant = Grant(self.block.grant.tier)
        self.calls = number + 1
        call = Call(delta, saved, weight, input_shape, map, needs, flops, small, self, number, grant.tier)
        if saved and (self.int8 or self._save is not None):
            self._count_kept(call, rows)
        if self.int8:
            self._unpack(call)
        for rule in self._gate:
            call.tier = min(call.tier, rule.gate(call))
        quantised = own
        for rule in self._delta:
            quantised = rule.delta(call, quantised)
        for rule in self._observe:
            rule.observe(call, quantised)
        learns = needs.weight and call.tier is not Tier.SKIP
        self.tally.look(own, quantised, counting=self.tally.counting(self.step, number))
        dx: Tensor | None
        dw: Tensor | None
        db: Tensor | None = None
        input_work = weight_work = None
        bare = call.low_weight is None and call.low_input is None and self._save is None
        if small and bare and quantised.step is None and (call.saved or not learns):
            x = call.saved[0] if call.saved else weight.new_empty(()).expand(tuple(input_shape))
            asked = needs.input, learns, needs.bias and quantised is own
            dx, dw, db = map.gradients(quantised.values, x, weight, asked)
        else:
            call.products = Products(quantised, call.min_precision, needs.input + learns, call.rounded)
            # A convolution's dW first: one call of torch may then compute both. A linear layer's dx first, as torch has
            # it: the larger result then takes the memory that was freed last, without new pages.
            if learns and not map.plain_rows:
                weight_work = self._weight_grad(call, quantised)
            if needs.input:
                operand = map.factor(weight) if call.low_weight is None else call.low_weight
                input_work = map.input_grad(call.products, operand, input_shape)
            if learns and weight_work is None:
                weight_work = self._weight_grad(call, quantised)
            dx = None if input_work is None else input_work.value
            dw = None if weight_work is None else weight_work.value
        self._tally(flops, weight.dtype, needs, learns, own, quantised, input_work, weight_work)
        if self._plain:
            chosen = {work.kernel for work in (input_work, weight_work) if work is not None}
            dense = chosen == {reference.NAME}
            self._settled = (flops, weight.dtype, self.tally.own_share) if dense else None
        if dw is not None and grant.scale != 1:
            dw = dw * grant.scale
        if needs.weight and not learns:
            dw = torch.zeros_like(weight)
        if needs.bias and db is None:
            # A sum over what arrived: exact, and free.
            db = map.bias_grad(delta)
        return dx, dw, db

    def _tally(
        self,
        flops: float,
        dtype: torch.dtype,
        needs: Sequence[bool],
        learns: bool,
        own: Delta,
        delta: Delta,
        dx: Work | None = None,
        dw: Work | None = None,
    ) -> None:
        """Count a call; `dx` and `dw` are the products that torch's own kernels did not compute together."""
        simple = dx is dw is None and learns == needs[1] and not self.int8
        if simple and self.tally.note(flops, own, delta, dtype, needs):
            return
        discount = DTYPE_DISCOUNTS[dtype]
        forward = DISCOUNTS["int8"] if self.int8 else discount
        self.tally.add(flops, (forward, discount), needs, learns, own, delta, dx, dw)

    @property
    def total(self) -> Counters:
        """Sums over the calls since attaching."""
        return self.tally.total

    def key(self, call: int) -> int:
        """64-bit random key of a call of this step."""
        parts = self.seed, self.step, self._layer_key, ranks.rank()
        if parts != self._key_of[0]:
            self._key_of = parts, mix_key(*parts)
        return mix_key(call, start=self._key_of[1])

    def _count_kept(self, call: Call, rows: Tensor | None) -> None:
        calls, plain, kept = self._kept
        plain += math.prod(call.input_shape) * call.weight.element_size()
        kept += sum(tensor.nbytes for tensor in call.saved)
        if rows is not None:
            # Of a small batch rows are a view of the input, which a full step has saved.
            place = rows.untyped_storage().data_ptr()
            if all(tensor.untyped_storage().data_ptr() != place for tensor in call.saved):
                kept += rows.nbytes
        self._kept = calls + 1, plain, kept

    @property
    def kept(self) -> tuple[float, float] | None:
        """Bytes of an input, and those kept in its place, a call; None before one in which something else was kept."""
        calls, plain, kept = self._kept
        return (plain / calls, kept / calls) if calls else None

    def _unpack(self, call: Call) -> None:
        """What a forward pass in 8 bits kept: W and x as levels."""
        kept, dtype = call.saved, call.weight.dtype
        call.low_weight = Quantised(kept[0], kept[1], dtype)
        self.total.overhead += _ROUNDING_FLOPS * call.weight.numel()
        call.saved = ()
        if len(kept) > 2:
            x = Quantised(kept[2], kept[3], dtype)
            call.low_input = x
            self.total.overhead += _ROUNDING_FLOPS * math.prod(call.input_shape)
            # For whoever observes: dense, as it was rounded.
            call.saved = (x.dense().view(tuple(call.input_shape)),) if self._observe else ()

    def _weight_grad(self, call: Call, delta: Delta) -> Work:
        if self._save is not None:
            return self._save.product(call, delta)
        return call.map.weight_grad(call.products, call.operand, call.weight)

    def pass_by(self, dense: Counters, ratio: float) -> None:
        """Count calls that a block pruned, see `Tally.pass_by`."""
        self.calls += dense.calls
        self.tally.pass_by(dense, ratio)

    def _expect_steps(self) -> None:
        # A layer may be called many times within one backward pass: passes are what is counted.
        backward_pass = torch._C._current_graph_task_id()  # pyright: ignore[reportPrivateUsage]
        if backward_pass == self._last_pass:
            return
        self._last_pass = backward_pass
        self._passes += 1
        if self._passes == _PASSES_WITHOUT_STEP:
            warnings.warn(
                f"{self._passes} backward passes went through layer {self.name!r} without a step of an optimizer that "
                "owns its weight: the methods' own state (scales, bases, thresholds) is never updated. Use a "
                "torch.optim.Optimizer over the model's parameters, or pass `optimizer=` to attach.",
                RetrogradeWarning,
                stacklevel=2,
            )

    # The clock.

    def read(self) -> None:
        """Fetch what lies on a GPU."""
        self.tally.read()
        for rule in self.rules:
            rule.read()

    def kernel_shares(self) -> dict[str, float]:
        """Share of the products since attaching by the kernel that computed them."""
        kernels = self.tally.kernels
        # Calls of a frozen layer whose input needs no gradient have no products.
        total = kernels.total() or 1
        return {f"kernel_{name}": count / total for name, count in kernels.items()}

    def before_step(self, layer: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Rules' `grad`, once for a gradient: one that an optimizer refused is not treated again."""
        if not self._grad:
            return
        step = Step(layer, self.step, optimizer, self)
        weight = step.weight
        gradient = None if weight is None else weight.grad
        if gradient is not None and self._treated is not None:
            known, version = self._treated
            if known() is gradient and version == gradient._version:  # pyright: ignore[reportPrivateUsage]
                return
        for rule in self._grad:
            rule.grad(step)
        gradient = None if weight is None else weight.grad
        self._treated = None if gradient is None else (weakref.ref(gradient), gradient._version)  # pyright: ignore[reportPrivateUsage]

    def remember(self, layer: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """A step inside a step begins: what the outer one did to the weights is no part of it."""
        for rule in self._grad:
            rule.remember(Step(layer, self.step, optimizer, self))

    def rule_of(self, method: str) -> Rule:
        """The rule of a method by its name."""
        return self._by_method[method]

    def pause(self, paused: bool) -> None:
        """Let the plain layer run (True), or the program again (False)."""
        self.active = not paused
        self.may_idle = True

    def after_step(self, layer: nn.Module, optimizer: torch.optim.Optimizer, *, idle: bool) -> None:
        """Rules' `local`, then the next step begins; `idle` when no layer of this optimizer ran a backward pass."""
        self._treated = None
        self.tally.read()
        refreshed = self.statistics is not None and self.statistics.refresh()
        if refreshed and self.statistics is not None:
            self.total.overhead += self.statistics.flops
        if self._local:
            step = Step(layer, self.step, optimizer, self, refreshed)
            for rule in self._local:
                rule.local(step)
        self.tally.end_step()
        self.idle_steps = self.idle_steps + 1 if idle and not self.may_idle else 0
        # A pause excuses the steps that it touches: plain autograd ran, as was asked.
        self.may_idle = not self.active
        self.clocked_steps += self.calls > 0
        self.step += 1
        self.calls = self._passes = 0
        if self.statistics is not None:
            self.sampling = self.statistics.due(self.step)

    def folds(self, rule: Rule) -> bool:
        """Whether a rule has something of its own to do when folding."""
        return rule in self._fold

    def fold(self, layer: nn.Module) -> nn.Module:
        """On a plain copy of the layer, or on the layer after it was swapped out."""
        for rule in self._fold:
            layer = rule.fold(layer)
        return layer

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to go on bit for bit."""
        return {
            "step": self.step,
            "calls": self.calls,
            **self.tally.state_dict(),
            "statistics": self.statistics.state_dict() if self.statistics else None,
            "rules": [rule.state_dict() for rule in self.rules],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        if len(state["rules"]) != len(self.rules):
            raise StateError(
                f"the state of layer {self.name!r} holds {len(state['rules'])} methods, but {len(self.rules)} are "
                "attached. Attach the methods that the state was saved with."
            )
        self.loaded = False
        self.step, self.calls = int(state["step"]), int(state["calls"])
        self.tally.load_state_dict(state)
        if self.statistics is not None:
            self.statistics.load_state_dict(state["statistics"])
            self.sampling = self.statistics.due(self.step)
        for rule, saved in zip(self.rules, state["rules"], strict=True):
            rule.load_state_dict(saved)


def _shared_statistics(rules: Sequence[Rule]) -> InputStatistics | None:
    """One set of statistics for all rules of the layer that need them."""
    asking = [rule for rule in rules if rule.needs_statistics is not None]
    specs = [rule.needs_statistics for rule in asking if rule.needs_statistics is not None]
    if not specs:
        return None
    statistics = InputStatistics(reduce(StatisticsSpec.merged, specs))
    for rule in asking:
        rule.statistics = statistics
    return statistics


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # Autocast leaves float64 alone, and so do we.
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
