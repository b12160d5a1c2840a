"""The variants of a benchmark: products of one layer by every kernel, single layers, whole training steps.

Each is a function without arguments. Ours do all that happens from δ on: statistics, random numbers,
indexing, packing, quantising.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from retrograde.engine.slots import Method
from retrograde.errors import OptionError
from retrograde.kernels import compiled, dispatch, reference
from retrograde.kernels import work as kernel_work
from retrograde.kernels.delta import Delta
from retrograde.kernels.dispatch import Products
from retrograde.kernels.geometry import Geometry
from retrograde.kernels.int8 import Quantised, quantise_columns
from retrograde.lab.measure import autocast, loss_of
from retrograde.lab.timing import Work
from retrograde.maths import dither
from retrograde.session import Session, attach

_CPU = torch.device("cpu")
_BITS = 8
_SAMPLE = 1 << 18
_RATE = 1e-4


# Products of one layer.


@dataclass(frozen=True)
class Linear:
    """δ (n, o) of a linear layer with i inputs, written ``n x o x i``."""

    rows: int
    outputs: int
    inputs: int

    op = "linear"

    def __str__(self) -> str:
        return f"{self.rows}x{self.outputs}x{self.inputs}"

    def layer(self) -> nn.Module:
        """A layer of this shape."""
        return nn.Linear(self.inputs, self.outputs)

    def input_shape(self) -> tuple[int, ...]:
        """Of x."""
        return self.rows, self.inputs

    def plain(self, delta: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """dx and dW, torch's own."""
        return delta @ weight, delta.T @ x

    def fixed(self, kernel: str, delta: Delta, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Both by one kernel."""
        from retrograde.kernels import cpu, linear

        lists = cpu.lists(delta.values) if kernel in linear.LISTED else None
        return (
            linear.run(kernel, delta.values, delta.step, weight, lists=lists),
            linear.run(kernel, delta.values, delta.step, x, transposed=True, lists=lists),
        )

    def chosen(
        self, delta: Delta, x: Tensor | Quantised, weight: Tensor | Quantised
    ) -> tuple[kernel_work.Work, ...]:
        """Both by the kernels that are chosen for them, and which."""
        products = Products(delta, "int8")
        return products.linear_input_grad(weight, x.shape), products.linear_weight_grad(x)


@dataclass(frozen=True)
class Convolution:
    """x (N, C_in, side, side) → C_out channels by a square kernel, padded so that stride 1 keeps the size."""

    images: int
    inputs: int
    side: int
    outputs: int
    kernel: int
    stride: int = 1
    groups: int = 1

    op = "conv"

    def __str__(self) -> str:
        kernel = f"{self.kernel}x{self.kernel}"
        more = f" stride {self.stride}" if self.stride > 1 else ""
        more += f" groups {self.groups}" if self.groups > 1 else ""
        return f"{self.images}x{self.inputs}x{self.side}x{self.side}->{self.outputs} {kernel}{more}"

    def layer(self) -> nn.Module:
        """A layer of this shape."""
        return nn.Conv2d(
            self.inputs, self.outputs, self.kernel, self.stride, padding=self.kernel // 2, groups=self.groups
        )

    def input_shape(self) -> tuple[int, ...]:
        """Of x."""
        return self.images, self.inputs, self.side, self.side

    def plain(self, delta: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """dx and dW, torch's own, in one call."""
        return reference.convolution_grads(Delta(delta), x, weight, self._geometry())

    def fixed(self, kernel: str, delta: Delta, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Both by one kernel."""
        from retrograde.kernels import convolution

        g = self._geometry()
        if kernel == "bfloat16":
            return convolution.both(delta, x, weight, g)
        sparse = convolution.compact(delta, g) if kernel in convolution.SKIPPING else None
        return (
            convolution.input_grad(kernel, delta, weight, x.shape, g, sparse),
            convolution.weight_grad(kernel, delta, x, weight, g, sparse),
        )

    def chosen(self, delta: Delta, x: Tensor, weight: Tensor) -> tuple[kernel_work.Work, ...]:
        """Both by the kernels that are chosen for them, and which."""
        products, g = Products(delta, "int8"), self._geometry()
        return (
            products.convolution_input_grad(weight, x.shape, g),
            products.convolution_weight_grad(x, weight, g),
        )

    def _geometry(self) -> Geometry:
        padding = (self.kernel // 2,) * 2
        return Geometry((self.stride,) * 2, padding, (1, 1), False, (0, 0), self.groups)


Shape = Linear | Convolution


def kernels_for(shape: Shape) -> tuple[str, ...]:
    """Names of the fixed kernels."""
    compiled.require("the benchmark of kernels")
    from retrograde.kernels import convolution, linear

    if isinstance(shape, Linear):
        return (*linear.KERNELS, *linear.registered())
    return convolution.KERNELS


def operands(shape: Shape) -> tuple[nn.Module, Tensor, Tensor]:
    """A layer, x, and a heavy-tailed δ: normal entries, each times a log-normal size."""
    layer, generator = shape.layer(), torch.Generator().manual_seed(0)
    x = torch.randn(shape.input_shape(), generator=generator)
    with torch.no_grad():
        z = layer(x)
    size = torch.randn(z.shape, generator=generator).exp_()
    return layer, x, torch.randn(z.shape, generator=generator).mul_(size).mul_(1e-3)


def scale_for(delta: Tensor, sparsity: float) -> float:
    """The scale at which dithering should leave this share of zeros, by bisection.

    Raises:
        OptionError: no scale does: 8-bit levels widen the step to hold the largest entry.
    """
    std, peak = dither.statistics(delta)
    sizes = delta.abs().flatten()[:: max(1, delta.numel() // _SAMPLE)]

    def zeros(scale: float) -> float:
        return float((1 - sizes / dither.step_size(std, peak, scale, _BITS)).clamp_(min=0).mean())

    low, high = 1e-3, 1e4
    if not zeros(low) <= sparsity <= zeros(high):
        raise OptionError(
            f"bench: no scale gives a sparsity of {sparsity} here. Choose one between {zeros(low):.2f} and "
            f"{zeros(high):.2f}."
        )
    for _ in range(40):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if zeros(middle) < sparsity else (low, middle)
    return high


def dithered(delta: Tensor, scale: float) -> Delta:
    """δ̃ as `retrograde.methods.dither` makes it."""
    std, peak = dispatch.statistics(delta)
    return dispatch.nsd(delta, dither.step_size(std, peak, scale, _BITS), 0, _BITS)[0]


AFTER_INT8 = "auto after int8"
"""The chosen kernels on operands that a forward pass in 8 bits has left quantised."""


def products(shape: Shape, weight: Tensor, x: Tensor, delta: Tensor, scale: float) -> dict[str, Work]:
    """Both baselines, every fixed kernel, ``"auto"``, and for linear layers `AFTER_INT8`.

    In bfloat16 all operands are so already, as under autocast, and dW stays so, where autocast would widen it.
    """
    half = (delta.bfloat16(), x.bfloat16(), weight.bfloat16())

    def fixed(kernel: str) -> Work:
        return lambda: shape.fixed(kernel, dithered(delta, scale), x, weight)

    return {
        "fp32": lambda: shape.plain(delta, x, weight),
        "bf16": lambda: shape.plain(*half),
        **{kernel: fixed(kernel) for kernel in kernels_for(shape)},
        **chosen(shape, weight, x, delta, scale),
    }


def chosen(
    shape: Shape, weight: Tensor, x: Tensor, delta: Tensor, scale: float
) -> dict[str, Callable[[], tuple[kernel_work.Work, ...]]]:
    """What is chosen, by name."""
    found = {"auto": lambda: shape.chosen(dithered(delta, scale), x, weight)}
    if isinstance(shape, Linear):
        left = quantise_columns(x), quantise_columns(weight)
        found[AFTER_INT8] = lambda: shape.chosen(dithered(delta, scale), *left)
    return found


# Layers.


def passes(shape: Shape, method: Method) -> tuple[dict[str, Work], Session]:
    """Forward and backward passes of a layer, plain as both baselines and attached as ``"auto"``.

    Under autocast x and δ are bfloat16, as between the layers of a model.
    """
    layer, x, delta = operands(shape)
    plain = nn.Sequential(layer)
    half, attached = copy.deepcopy(plain), copy.deepcopy(plain)
    session = attach(attached, method, seed=0)
    return {
        "fp32": _pass(plain, x, delta, "float32"),
        "bf16": _pass(half, x.bfloat16(), delta.bfloat16(), "bfloat16"),
        "auto": _pass(attached, x, delta, "float32"),
    }, session


def _pass(model: nn.Module, x: Tensor, delta: Tensor, precision: str) -> Work:
    x = x.clone().requires_grad_()

    def run() -> None:
        x.grad = None
        model.zero_grad()
        with autocast(_CPU, precision):
            z = model(x)
        z.backward(delta)

    return run


# Steps.


@dataclass(frozen=True)
class Workload:
    """A model and the batch that it trains on.

    Attributes:
        build: makes the model.
        input_shape: (B, …) of the batch.
        target_shape: of its labels.
        classes: number of labels.
        tokens: number of token ids, where the batch is such.
    """

    build: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    target_shape: tuple[int, ...]
    classes: int
    tokens: int | None = None

    def batch(self) -> tuple[Tensor, Tensor]:
        """Random inputs and labels, always the same."""
        generator = torch.Generator().manual_seed(0)
        if self.tokens is None:
            x = torch.randn(self.input_shape, generator=generator)
        else:
            x = torch.randint(self.tokens, self.input_shape, generator=generator)
        return x, torch.randint(self.classes, self.target_shape, generator=generator)


@dataclass(frozen=True)
class Contestant:
    """A method in whole steps, and the precision that the model runs in: ``"bfloat16"`` is autocast."""

    method: Method
    precision: str = "float32"


def steps(workload: Workload, methods: dict[str, Contestant]) -> tuple[dict[str, Work], dict[str, Session]]:
    """Training steps with Adam from the same weights: both baselines, and each variant with its session."""
    x, y = workload.batch()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = workload.build()
    found: dict[str, Work] = {
        "fp32": _step(copy.deepcopy(model), x, y, "float32"),
        "bf16": _step(copy.deepcopy(model), x, y, "bfloat16"),
    }
    sessions: dict[str, Session] = {}
    for label, contestant in methods.items():
        mine = copy.deepcopy(model)
        sessions[label] = attach(mine, contestant.method, seed=0)
        found[label] = _step(mine, x, y, contestant.precision)
    return found, sessions


def _step(model: nn.Module, x: Tensor, y: Tensor, precision: str) -> Work:
    # The fastest there is: what an optimizer takes beside them would flatter slow passes.
    optimizer = torch.optim.Adam(model.parameters(), _RATE, fused=True)

    def run() -> None:
        with autocast(_CPU, precision):
            logits = model(x)
        loss_of(logits.float(), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run
