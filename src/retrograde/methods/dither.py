r"""Dithered backpropagation: stochastically quantised, sparse gradients.

At every linear or convolutional layer the gradient at the output is rounded, stochastically and without bias, to
integer multiples of a step before **both** backward products. Most entries become zero, the rest small integers:

    Δ = s · std(δ)                      (1)   per layer and call
    q = floor(δ/Δ + u),  u ~ U[0, 1)    (2)
    dx = Δ (q W)                        (3)   and the quantised gradient is what travels further down
    dW = Δ (qᵀ x)                       (4)
    db = Σ δ                            (5)   exact: it is free

Deviations from the paper: Δ is widened to max|δ|/(2^(bits−1) − 1) so that int8 levels never saturate, which would bias
them; δ with a non-finite entry or without variance is left exact, and counted (`fallbacks`).

``keep=4`` rounds x, too, without bias, but only what is kept of it for equation (4): 4 bits and a quarter for each
entry in place of 32 (`retrograde.kernels.pack`). The forward pass, dx and evaluation are as they were, and so is E[dW].
`nn.ReLU` modules, whose backward pass would keep the same activations whole, then keep a bit of each: its sign.

Cost for each entry of δ: three passes for the statistics, one for noise and rounding; about 22 operations. On a GPU two
passes, and the host never waits for them in the backward pass: steps and counts are read once a step, and the warning
about a δ that is not finite comes then.

Suggested settings: the default, ``scale=1``, costs little accuracy; 2 to 4 buy more zeros, and cost transformers some.
Convolutions followed by ReLU and no BatchNorm have 80 to 90 % zeros by themselves; BatchNorm makes δ dense, and
dithering makes it sparse again. With small batches on a CPU call ``torch.set_flush_denormal(True)``, as the command
line does: moments of weights that see only zeros for a while decay to denormal numbers, with which an optimizer's step
is several times slower.

Reference:
    Wiedemann, Mehari, Kepp, Samek. *Dithered backprop: A sparse and quantized backpropagation algorithm for more
    efficient deep neural network training.* CVPR Workshops 2020, arXiv 2004.04729.
    Chen et al. *ActNN: Reducing training memory footprint via 2-bit activation compressed training.* ICML 2021: `keep`.
"""

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from retrograde.accounting.counters import Counters
from retrograde.engine.maps.base import Map
from retrograde.engine.slots import Call, Method, Rule, Site, Step
from retrograde.errors import OptionError, RetrogradeWarning, check_option
from retrograde.kernels import choose, dispatch, pack
from retrograde.kernels.delta import Delta
from retrograde.kernels.work import Work
from retrograde.maths.philox import key_of, mix_key

_FLOPS_PER_ENTRY = 22
"""Overhead: 5 for standard deviation and peak, 3 for scaling and rounding, 14 for Philox (a fourth of seven rounds)."""
_PACKING_FLOPS = 22
"""The same for each entry of x: 2 for its range, 4 for rounding, 14 for Philox, 2 to have it back."""

_PRECISION = {"auto": "int8", "bfloat16": "bfloat16", "float32": "float32"}
_GAIN = 1.0
_SCALE_RANGE = (1e-3, 1e3)


@dataclass(frozen=True)
class Dither(Method):
    """Dithered backpropagation; `retrograde methods dither` prints its equations, cost and source.

    Args:
        scale: s, the quantisation step in standard deviations of δ; 0 leaves δ as it is, as `Exact` does.
        target_sparsity: hold this share of zeros, in (0, 1), by adapting `scale` layer by layer after every step;
            `scale` is then the start.
        products: the least precision that the other operand of a product may be rounded to where that is faster: to
            nearest, which the noise of dithering drowns. ``"auto"`` allows int8 with a scale for each column,
            ``"float32"`` rounds nothing. Sums are kept in float32 or int32.
        bits: width of the integer levels, 2 to 8; None leaves them unbounded, without widening the step.
        forward: ``"int8"``: the forward products of linear layers run in 8 bits too, to nearest, and keep x in 8 bits
            for the backward pass (`retrograde.kernels.int8`); weights and evaluation stay as they are.
        keep: bits in which a layer's input is kept for its weight gradient, 2, 4 or 8, rounded without bias; None keeps
            it as it is.

    Raises:
        OptionError: a value out of its range.

    Examples:
        >>> session = rg.attach(model, rg.Dither(scale=1.0))
    """

    name: ClassVar[str] = "dither"
    saves_time: ClassVar[bool] = True
    adjustable: ClassVar[Collection[str]] = ("scale", "target_sparsity", "products")
    short_run: ClassVar[Mapping[str, Any]] = {"scale": 1.0}
    benchmarks: ClassVar[Mapping[str, Sequence[Mapping[str, Any]]]] = {
        "float32": ({"scale": 2.0}, {"scale": 4.0}, {"scale": 2.0, "forward": "int8"}),
        "bfloat16": ({"scale": 4.0},),
    }

    scale: float = 1.0
    target_sparsity: float | None = None
    bits: int | None = 8
    products: Literal["auto", "float32", "bfloat16"] = "auto"
    forward: Literal["exact", "int8"] = "exact"
    keep: Literal[2, 4, 8] | None = None

    def __post_init__(self) -> None:
        check_option(
            self, "scale", math.isfinite(self.scale) and self.scale >= 0, "a finite number, 0 or more"
        )
        target = self.target_sparsity
        fine = target is None or 0 < target < 1
        check_option(self, "target_sparsity", fine, "a share of zeros between 0 and 1, both excluded")
        if target is not None and self.scale == 0:
            raise OptionError("Dither: target_sparsity needs a positive scale to start from, not scale=0.")
        check_option(
            self, "products", self.products in _PRECISION, f"one of {', '.join(map(repr, _PRECISION))}"
        )
        check_option(self, "forward", self.forward in ("exact", "int8"), "'exact' or 'int8'")
        kept = self.keep is None or (isinstance(self.keep, int) and self.keep in pack.BITS)  # pyright: ignore[reportUnnecessaryIsInstance]
        check_option(self, "keep", kept, "2, 4 or 8 bits, or None")
        if self.keep is not None and self.forward == "int8":
            raise OptionError(
                f"Dither: forward='int8' keeps the layer's input in 8 bits already; leave out keep={self.keep}."
            )
        whole = isinstance(self.bits, int) and 2 <= self.bits <= 8
        check_option(
            self,
            "bits",
            self.bits is None or whole,
            "a whole number from 2 to 8, or None for unbounded levels",
        )

    @property
    def lightens(self) -> bool:
        """With `keep`: what the layers no longer keep, activations must not keep for them."""
        return self.keep is not None

    def make_rule(self, site: Site) -> Rule:
        """Every linear-like layer is dithered."""
        rule = _DitherRule(site.name, self) if self.keep is None else _KeepingRule(site.name, self)
        if self.forward == "int8":
            rule.int8_forward = site.map.plain_rows
            if not rule.int8_forward:
                rule.remark = "forward pass exact: 8 bits are for linear layers"
            elif _is_on_cpu(site) and not choose.fast_precision("int8"):
                rule.remark = "forward pass in 8 bits: this machine takes longer for it than in float32"
        return rule


def _is_on_cpu(site: Site) -> bool:
    return site.weight is None or site.weight.device.type == "cpu"


class _DitherRule(Rule):
    def __init__(self, name: str, method: Dither) -> None:
        super().__init__(name)
        self._method = method
        self._scale = method.scale
        self._largest_level = 0
        self._step_size = 0.0
        self._warned = False
        self._unread: list[tuple[Counters, tuple[float | Tensor, ...]]] = []
        """Of calls on a GPU: where their fallbacks count, and step, largest level, and whether δ is finite."""

    def adjust(self, method: Method) -> None:
        """Another scale, target or precision."""
        assert isinstance(method, Dither)
        if method.scale != self._method.scale:
            self._scale = method.scale
        self._method = method

    def delta(self, call: Call, delta: Delta) -> Delta:
        """Equations (1) and (2)."""
        if delta.quantised or self._scale == 0 or delta.values.numel() == 0:
            return delta
        bits = self._method.bits
        found = dispatch.dithered(delta, self._scale, bits, call.key, small=call.small)
        call.spend(_FLOPS_PER_ENTRY * delta.values.numel())
        step = found.step
        if isinstance(step, Tensor):
            self._unread.append((call.counters, (step, found.largest, found.finite)))
            return found.delta
        if not step:
            self._fall_back(call.counters, bool(found.finite))
            return delta
        self._largest_level = max(self._largest_level, int(found.largest))
        self._step_size = step
        call.min_precision = _PRECISION[self._method.products]
        return found.delta

    def read(self) -> None:
        """Take what calls on a GPU have found, which the host waits for: once a step, never in the backward pass."""
        unread, self._unread = self._unread, []
        if not unread:
            return
        flat = [torch.as_tensor(number) for _, numbers in unread for number in numbers]
        found = torch.stack(flat).view(-1, 3).tolist()
        for (counters, _), (step, largest, finite) in zip(unread, found, strict=True):
            if step:
                self._largest_level = max(self._largest_level, int(largest))
                self._step_size = step
            else:
                self._fall_back(counters, bool(finite))

    def _fall_back(self, counters: Counters, finite: bool) -> None:
        counters.fallbacks += 1
        if not finite and not self._warned:
            self._warned = True
            warnings.warn(
                f"the gradient at the output of layer {self.name!r} holds NaN or Inf: it is passed on exactly, "
                "undithered, so that a GradScaler or you can see it. Further ones are only counted "
                "(`fallbacks`). Lower the learning rate or the loss scale if this was not expected.",
                RetrogradeWarning,
                stacklevel=2,
            )

    def local(self, step: Step) -> None:
        """Hold the target: more scale when there are too few zeros."""
        self.read()
        target = self._method.target_sparsity
        zeros = None if target is None else step.zeros
        if target is None or zeros is None:
            return
        error = target - zeros
        low, high = _SCALE_RANGE
        self._scale = min(max(self._scale * math.exp(_GAIN * error), low), high)

    def metrics(self) -> dict[str, float]:
        """Scale in use, last step size, largest level so far and the bits that it needs with its sign."""
        self.read()
        return {
            "scale": self._scale,
            "step": self._step_size,
            "largest_level": self._largest_level,
            "bits": self._largest_level.bit_length() + 1 if self._largest_level else 0,
        }

    def state_dict(self) -> dict[str, Any]:
        self.read()
        return {"scale": self._scale, "step": self._step_size, "largest_level": self._largest_level}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._unread = []
        self._scale, self._step_size = float(state["scale"]), float(state["step"])
        self._largest_level = int(state["largest_level"])


class _KeepingRule(_DitherRule):
    """With x in a few bits for dW."""

    def __init__(self, name: str, method: Dither) -> None:
        super().__init__(name, method)
        self._key = torch.zeros(1, dtype=torch.int64)
        """Of this step's noise: a tensor, by which compiled code is not guarded; replaced, never written to."""

    def prepare(self, layer: nn.Module) -> None:
        """The first step's key."""
        self._draw(0)

    def save(self, x: Tensor, weight: Tensor, map: Map) -> tuple[Tensor, ...]:
        """x in `keep` bits."""
        assert self._method.keep is not None
        return pack.pack(x, self._key, self._method.keep)

    def product(self, call: Call, delta: Delta) -> Work:
        """Equation (4) with what was kept."""
        levels, ranges, order = call.saved
        x = pack.unpack(levels, ranges, order, torch.Size(call.input_shape), call.weight.dtype)
        call.spend(_PACKING_FLOPS * x.numel())
        return call.map.weight_grad(call.products, x, call.weight)

    def local(self, step: Step) -> None:
        super().local(step)
        self._draw(step.index + 1)

    def _draw(self, index: int) -> None:
        key = mix_key(self.seed, index, key_of(f"{self.name}/kept"))
        self._key = torch.tensor([key - (1 << 64) if key >> 63 else key])

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "key": self._key}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._key = state["key"]
