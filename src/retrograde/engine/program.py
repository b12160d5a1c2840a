"""The program of one attached layer: its rules sorted into slots, its random keys, its counts."""

import hashlib
import itertools
import math
import warnings
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retrograde.accounting.counters import Counters
from retrograde.accounting.flops import DISCOUNTS, convolution_flops, linear_flops
from retrograde.engine.blocks import BlockProgram
from retrograde.engine.rows import sample_rows
from retrograde.engine.slots import Call, Grant, Needs, Operands, Rule, Step, Tier
from retrograde.engine.statistics import InputStatistics, StatisticsSpec
from retrograde.errors import AttachError, OptionError, RetrogradeWarning, StateError
from retrograde.kernels.delta import Delta
from retrograde.kernels.dispatch import Done, Products
from retrograde.kernels.geometry import Geometry
from retrograde.kernels.int8 import Quantised
from retrograde.maths.philox import mix_key

_PASSES_WITHOUT_STEP = 1000
_ROUNDING_FLOPS = 6
"""For each entry of an operand that a forward pass in 8 bits rounds: largest magnitude, scaling and rounding, twice."""
_handles = itertools.count()
# An op takes tensors and numbers only, so a layer's op finds its program by number; weakly, to keep nothing alive.
_programs: "weakref.WeakValueDictionary[int, LayerProgram]" = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class Gradients:
    """What one backward call returns; None where autograd asked for nothing."""

    input: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


@dataclass(frozen=True)
class _Work:
    """FLOPs of one product of a call: all, those with a non-zero, and the discount of the layer's own precision."""

    dense: float
    needed: float
    discount: float


class LayerProgram:
    """Runs one attached layer.

    Args:
        name: full name of the layer in the model.
        kind: ``"linear"`` or ``"convolution"``.
        rules: the methods' rules for this layer; their order is kept within a slot.
        seed: the session's seed.
    """

    def __init__(self, name: str, kind: str, rules: Sequence[Rule], seed: int) -> None:
        self.name = name
        self.kind = kind
        self.rules = tuple(rules)
        self.seed = seed
        for rule in self.rules:
            rule.seed = seed
        self.active = True
        self.block: BlockProgram | None = None
        """The innermost block around the layer, or its own when it is a chain; its grant is the tier to begin with."""
        self.exit: BlockProgram | None = None
        """The block that ends at this layer's output."""
        self.clock: object = None
        """Kept by the layers, so that a model trains on when nobody keeps the session."""
        self.excused = False
        self.step = 0
        self.calls = 0
        self.idle_steps = 0
        self._passes, self._last_pass = 0, -1
        self.total = Counters()
        self.clocked = 0.0
        """Seconds of the backward calls so far: on a GPU, of launching them. No part of the state."""
        self.clocked_steps = 0
        """Optimizer steps that these seconds belong to."""
        self.kernels: Counter[str] = Counter()
        """Products by the kernel that computed them."""
        self._at_step = Counters()
        self._layer_key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest())
        self._fill_slots()
        self.statistics = _shared_statistics(self.rules)
        # A plain flag, not a question about the step: compiled code is guarded by what forward reads.
        self.sampling = self.statistics is not None
        handle = next(_handles)
        _programs[handle] = self
        # [handle, backward calls]: read on the host by the layer's op, which declares it mutated.
        self.token = torch.tensor([handle, 0])

    def _fill_slots(self) -> None:
        def filling(slot: str) -> tuple[Rule, ...]:
            return tuple(rule for rule in self.rules if rule.fills(slot))

        self._input, self._output = filling("input"), filling("output")
        self._gate, self._delta, self._observe = filling("gate"), filling("delta"), filling("observe")
        self._grad, self._local, self._fold = filling("grad"), filling("local"), filling("fold")
        for rule in {*self._input, *self._output}.difference(self._fold):
            raise OptionError(
                f"{type(rule).__name__} changes the forward pass of layer {self.name!r} (slot `input` or `output`) but "
                "does not fill `fold`: copies, pickles and folded models would compute another function. Fill `fold`."
            )
        save, product = filling("save"), filling("product")
        if save != product or len(save) > 1:
            names = ", ".join(sorted({type(rule).__name__ for rule in (*save, *product)}))
            raise OptionError(
                f"slots `save` and `product` of layer {self.name!r} are filled by {names}: whoever keeps something "
                "other than the layer's input must also say how the weight gradient comes from it, and only one "
                "method can. Attach one of them to this layer; `only` and `skip` choose layers."
            )
        self._save = save[0] if save else None
        self.int8 = self.kind == "linear" and any(rule.int8_forward for rule in self.rules)
        """Whether the forward product runs in 8 bits."""
        if self.int8 and self._save is not None:
            raise OptionError(
                f"layer {self.name!r}: {type(self._save).__name__} keeps something other than the layer's input, and a "
                "forward pass in 8 bits keeps the rounded one; only one can be kept. Leave the forward pass exact, or "
                "attach one of them to this layer; `only` and `skip` choose layers."
            )

    @property
    def changes_forward(self) -> bool:
        """Whether the attached layer computes another function than its plain class."""
        return bool(self._input or self._output)

    @staticmethod
    def find(token: Tensor) -> "LayerProgram":
        """The program that `token` names."""
        program = _programs.get(int(token[0]))
        if program is None:
            raise AttachError(
                "a backward pass reached a layer whose session is gone: it was detached, or no reference to the "
                "attached model is left. Run the forward pass again after detaching."
            )
        return program

    # Forward: slots 1 to 3.

    def transform(self, operands: Operands) -> Operands:
        """Slot 1."""
        for rule in self._input:
            operands = rule.input(operands)
        return operands

    def keep(self, x: Tensor) -> tuple[Tensor, ...]:
        """Slot 3."""
        return (x,) if self._save is None else self._save.save(x)

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Slots 6, forward, and 3 of a linear layer: z, and what is kept for the backward pass."""
        learns = weight.requires_grad
        if not self.int8:
            return F.linear(x, weight, bias), self.keep(x) if learns else ()
        z, x_values, x_scale, *rounded_weight = torch.ops.retrograde.int8_linear(x, weight, bias)
        return z, (*rounded_weight, x_values, x_scale) if learns else tuple(rounded_weight)

    def sample(self, operands: Operands) -> Tensor | None:
        """Rows of x for the input statistics, kept for the backward pass in the steps that bring them.

        Args:
            operands: as they came, before slot 1: what statistics follow must not depend on what is made of them.
        """
        if self.statistics is None or not self.sampling:
            return None
        with torch.no_grad():
            return sample_rows(operands.x, operands.weight, operands.geometry, self.statistics.spec.rows)

    def extend(self, x: Tensor, z: Tensor) -> Tensor:
        """Slot 2, on the layer's own input."""
        for rule in self._output:
            z = rule.output(x, z)
        return z

    # Backward: slots 4 to 6.

    def backward(
        self,
        delta: Tensor,
        saved: Sequence[Tensor],
        rows: Tensor | None,
        weight: Tensor,
        input_shape: Sequence[int],
        geometry: Geometry | None,
        needs: Needs,
    ) -> Gradients:
        """Gradients of one call; see `Call` for the arguments."""
        self.token[1] += 1
        if needs.weight or needs.bias:
            self._expect_steps()
        grant = self._block_grant(delta)
        if grant is None:
            # Counted by the block, as where autograd never comes here.
            return Gradients(
                delta.new_zeros(tuple(input_shape)) if needs.input else None,
                torch.zeros_like(weight) if needs.weight else None,
                delta.new_zeros(_bias_size(weight, geometry)) if needs.bias else None,
            )
        key = mix_key(self.seed, self.step, self._layer_key, _rank(), self.calls)
        self.calls += 1
        rounded: list[Quantised] = []
        if self.int8:
            pairs = zip(saved[::2], saved[1::2], strict=True)
            rounded = [Quantised(values, scale, weight.dtype) for values, scale in pairs]
            saved = [x.dense().view(tuple(input_shape)) for x in rounded[1:]] if self._observe else ()
        call = Call(delta, saved, weight, input_shape, geometry, key, needs, self.total, grant.tier)
        call.int8_weight, call.int8_x = (*rounded, None, None)[:2]
        for rule in self._gate:
            call.tier = min(call.tier, rule.gate(call))
        arrived = quantised = Delta(call.delta)
        for rule in self._delta:
            quantised = rule.delta(call, quantised)
        if self.statistics is not None and rows is not None:
            self.statistics.collect(rows)
        for rule in self._observe:
            rule.observe(call, quantised)
        keep_weight = needs.weight and call.tier is not Tier.SKIP
        work = self._count(call, arrived, quantised, keep_weight)
        call.products = Products(quantised, call.allowed, needs.input + keep_weight)
        weight_grad = self._weight_grad(call, quantised, work, keep_weight) if needs.weight else None
        if weight_grad is not None and grant.scale != 1:
            weight_grad = weight_grad * grant.scale
        return Gradients(
            self._input_grad(call, work) if needs.input else None,
            weight_grad,
            # The bias gradient is a sum over what arrived: exact, and free.
            _bias_grad(call) if needs.bias else None,
        )

    def _block_grant(self, delta: Tensor) -> Grant | None:
        """What the layer's block grants this call; None where the whole block is pruned."""
        if self.block is None:
            return Grant(Tier.FULL)
        if self.block.block.kind == "chain":
            return self.block.gate(delta)
        # A branch's scale is in δ already.
        return None if self.block.pruned else Grant(self.block.grant.tier)

    def pass_by(self, dense: Counters, ratio: float) -> None:
        """Count calls that a block pruned: their forward pass ran, their backward pass did not.

        Args:
            dense: what an executed call of the block counted at this layer.
            ratio: size of the pruned call relative to that one.
        """
        self.calls += dense.calls
        total = self.total
        total.calls += dense.calls
        total.skipped += dense.calls
        total.forward_dense += dense.forward_dense * ratio
        total.forward_needed += dense.forward_needed * ratio
        total.forward_executed += dense.forward_executed * ratio
        total.forward_discounted += dense.forward_discounted * ratio
        total.input_grad_dense += dense.input_grad_dense * ratio
        total.weight_grad_dense += dense.weight_grad_dense * ratio

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
                "owns its weight: whatever the methods learn is not learnt. Use a torch.optim.Optimizer over the "
                "model's parameters, or pass `optimizer=` to attach.",
                RetrogradeWarning,
                stacklevel=2,
            )

    def _input_grad(self, call: Call, work: "_Work") -> Tensor:
        products, weight = call.products, call.int8_weight
        if call.geometry is None:
            found, done = products.linear_input_grad(
                call.weight if weight is None else weight, call.input_shape
            )
        else:
            found, done = products.convolution_input_grad(call.weight, call.input_shape, call.geometry)
        executed, discounted = self._executed(call, work, done)
        self.total.input_grad_executed += executed
        self.total.input_grad_discounted += discounted
        return found

    def _weight_grad(self, call: Call, delta: Delta, work: "_Work", wanted: bool) -> Tensor:
        if not wanted:
            return torch.zeros_like(call.weight)
        products, x = call.products, call.int8_x
        if self._save is not None:
            found, done = self._save.product(call, delta), Done()
        elif call.geometry is None:
            found, done = products.linear_weight_grad(call.saved[0] if x is None else x)
        else:
            found, done = products.convolution_weight_grad(call.saved[0], call.weight, call.geometry)
        executed, discounted = self._executed(call, work, done)
        self.total.weight_grad_executed += executed
        self.total.weight_grad_discounted += discounted
        return found

    def _executed(self, call: Call, work: "_Work", done: Done) -> tuple[float, float]:
        """FLOPs that a product did, and discounted for its precision."""
        self.kernels[done.kernel] += 1
        executed = work.needed if done.skips_zeros else work.dense
        rounded = [p for p in (call.precision, done.precision) if p is not None]
        return executed, executed * min([work.discount, *(DISCOUNTS[p] for p in rounded)])

    def _count(self, call: Call, own: Delta, delta: Delta, weight_wanted: bool) -> "_Work":
        """Count what a call must do; what it does is counted with each product."""
        total, entries = self.total, call.delta.numel()
        total.calls += 1
        total.skipped += call.needs.weight and not weight_wanted
        if not entries:
            return _Work(0.0, 0.0, 1.0)
        if call.geometry is None:
            dense = linear_flops(call.delta.shape[:-1].numel(), *call.weight.shape)
        else:
            dense = convolution_flops(call.input_shape, call.weight.shape, call.delta.shape, call.geometry)
        needed = dense * (1 - delta.zeros / entries)
        discount = DISCOUNTS[str(call.weight.dtype).removeprefix("torch.")]
        total.entries += entries
        total.own_zeros += own.zeros
        total.zeros += delta.zeros
        total.forward_dense += dense
        total.forward_needed += dense
        total.forward_executed += dense
        total.forward_discounted += dense * (DISCOUNTS["int8"] if self.int8 else discount)
        if self.int8:
            total.overhead += _ROUNDING_FLOPS * (math.prod(call.input_shape) + call.weight.numel())
        if call.needs.input:
            total.input_grad_dense += dense
            total.input_grad_needed += needed
        if call.needs.weight:
            total.weight_grad_dense += dense
        if weight_wanted:
            total.weight_grad_needed += needed
        return _Work(dense, needed, discount)

    # The clock: slots 7 and 8.

    def kernel_shares(self) -> dict[str, float]:
        """Share of the products since attaching by the kernel that computed them."""
        return {f"kernel_{name}": count / self.kernels.total() for name, count in self.kernels.items()}

    def before_step(self, layer: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Slot 7."""
        if self._grad:
            step = Step(layer, self.step, optimizer, self.total - self._at_step)
            for rule in self._grad:
                rule.grad(step)

    def pause(self, paused: bool) -> None:
        """Let the plain layer run (True), or the program again (False)."""
        self.active = not paused
        self.excused = True

    def after_step(self, layer: nn.Module, optimizer: torch.optim.Optimizer, *, idle: bool) -> None:
        """Slot 8, then the next step begins; `idle` when no layer of this optimizer ran a backward pass."""
        refreshed = False
        if self.statistics is not None and self.statistics.refresh():
            refreshed = True
            self.total.overhead += self.statistics.flops
        if self._local:
            step = Step(layer, self.step, optimizer, self.total - self._at_step, refreshed)
            for rule in self._local:
                rule.local(step)
        self._at_step = self.total.copy()
        self.idle_steps = self.idle_steps + 1 if idle and not self.excused else 0
        # A pause excuses the steps that it touches: plain autograd ran, as was asked.
        self.excused = not self.active
        self.clocked_steps += self.calls > 0
        self.step += 1
        self.calls = self._passes = 0
        self._decide_sampling()

    def _decide_sampling(self) -> None:
        self.sampling = self.statistics is not None and self.statistics.due(self.step)

    def fold(self, layer: nn.Module) -> nn.Module:
        """Slot 9, on a plain copy of the layer."""
        for rule in self._fold:
            layer = rule.fold(layer)
        return layer

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to go on bit for bit."""
        return {
            "step": self.step,
            "calls": self.calls,
            "total": self.total.to_dict(),
            "at_step": self._at_step.to_dict(),
            "kernels": dict(self.kernels),
            "statistics": self.statistics.state_dict() if self.statistics else None,
            "rules": [rule.state_dict() for rule in self.rules],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        if len(state["rules"]) != len(self.rules):
            raise StateError(
                f"the state of layer {self.name!r} is of {len(state['rules'])} methods, but {len(self.rules)} are "
                "attached. Attach the methods that the state was saved with."
            )
        self.step, self.calls = int(state["step"]), int(state["calls"])
        self.kernels = Counter(state["kernels"])
        self.total, self._at_step = Counters(**state["total"]), Counters(**state["at_step"])
        if self.statistics is not None:
            self.statistics.load_state_dict(state["statistics"])
        self._decide_sampling()
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


def _bias_size(weight: Tensor, geometry: Geometry | None) -> int:
    if geometry is None or not geometry.transposed:
        return weight.shape[0]
    return weight.shape[1] * geometry.groups


def _bias_grad(call: Call) -> Tensor:
    if call.geometry is None:
        return call.delta.reshape(call.delta.shape[:-1].numel(), call.delta.shape[-1]).sum(0)
    return call.delta.sum([0, *range(2, call.delta.dim())])


def _rank() -> int:
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
