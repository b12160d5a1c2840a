"""The CUDA kernels against plain torch: the same levels bit for bit, and no word to the host in the backward pass.

Without a GPU, Triton's interpreter runs them, in a process of its own: Triton decides when it is imported. What the
interpreter accepts need not compile, so each kernel is compiled as well, which needs no GPU.
"""

import importlib.util
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import retrograde as rg
from cases import assert_same, batch, gradients, program, seeded
from retrograde.engine.blocks import BlockProgram
from retrograde.engine.branches import Residual
from retrograde.engine.program import LayerProgram
from retrograde.engine.tally import Tally
from retrograde.errors import RetrogradeWarning
from retrograde.kernels import dispatch, reference
from retrograde.kernels.delta import Delta
from retrograde.maths import dither
from retrograde.maths.philox import mix_key

TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RUNS = TRITON and (INTERPRETED or torch.cuda.is_available())
DEVICE = "cpu" if INTERPRETED else "cuda"
if RUNS:
    from retrograde.kernels import cuda

pytestmark = pytest.mark.skipif(not TRITON, reason="Triton is not installed")

KEYS = [3, mix_key(1, 2, 3), (1 << 64) - 5]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PATHS = ["triton", "torch"]
"""Where Triton is missing, plain torch does the same on the device."""

NUMPY = pytest.mark.filterwarnings("ignore:invalid value encountered in (multiply|subtract):RuntimeWarning")
"""What the interpreter's arithmetic says of NaN."""


def normal(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stepped(delta: Tensor, bits: int) -> float:
    return 0.9 * float(delta.float().abs().max()) / dither.largest_level(bits)


def by(path: str) -> Callable[..., tuple[Tensor, ...]]:
    return cuda.dither if path == "triton" else dispatch._dither_in_torch


@pytest.fixture(params=PATHS)
def there(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whatever the device, what a GPU with Triton, or one without, would run."""
    monkeypatch.setattr(dispatch, "_waits", lambda values: True)
    monkeypatch.setattr(
        dispatch, "_triton_takes", lambda values: request.param == "triton" and cuda.supports(values)
    )
    return request.param


READS = ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__", "__complex__")
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")


class Silence(TorchDispatchMode):
    """The host asks the device for nothing: what would wait raises."""

    banned = False
    layers = 0

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        for name in READS:
            monkeypatch.setattr(Tensor, name, self._guarded(name, getattr(Tensor, name)))
        own = LayerProgram.backward

        def backward(layer: LayerProgram, *args: Any) -> Any:
            self.layers += 1
            with self, self.set(banned=True):
                return own(layer, *args)

        monkeypatch.setattr(LayerProgram, "backward", backward)
        # A block's own gate is the one thing that waits; the interpreter is no GPU.
        monkeypatch.setattr(BlockProgram, "gate", self._exempt(BlockProgram.gate))
        if INTERPRETED:
            from triton.runtime.interpreter import GridExecutor

            monkeypatch.setattr(GridExecutor, "__call__", self._exempt(GridExecutor.__call__))

    @contextmanager
    def set(self, *, banned: bool) -> Iterator[None]:
        before, self.banned = self.banned, banned
        try:
            yield
        finally:
            self.banned = before

    def _guarded(self, name: str, own: Any) -> Any:
        def read(tensor: Tensor, *args: Any, **options: Any) -> Any:
            assert not self.banned, f"Tensor.{name}"
            return own(tensor, *args, **options)

        return read

    def _exempt(self, own: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            with self.set(banned=False):
                return own(*args, **options)

        return call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not (self.banned and func.__name__.split(".")[0] in WAITS), func.__name__
        return func(*args, **(kwargs or {}))


def model() -> nn.Module:
    """Every layer inside a branch, but for the ends."""
    branches = (nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8)) for _ in range(2))
    convolution = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 1))
    ends = nn.Conv2d(1, 2, 3), nn.Linear(8, 3)
    layers = ends[0], Residual(convolution), nn.Flatten(), *map(Residual, branches), ends[1]
    return seeded(lambda: nn.Sequential(*layers)).to(DEVICE)


class TestKernels:
    """Runs on the GPU, or in the interpreter's process."""

    __test__ = RUNS

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("size", [1, 3, 127, 4096, 4099])
    def test_levels_are_the_references(self, size: int, bits: int, dtype: torch.dtype) -> None:
        delta = normal((size,)).to(dtype)
        step = stepped(delta, bits)
        for key in KEYS:
            found = cuda.nsd(delta.to(DEVICE), step, key, bits)
            expected = reference.nsd(delta, step, key, bits)
            assert found.values.dtype == torch.int8
            assert torch.equal(found.values.cpu(), expected)
            assert found.zeros == int((expected == 0).sum())
            assert found.largest == int(expected.abs().max())

    def test_levels_of_any_layout(self) -> None:
        image = normal((2, 3, 37, 41))
        for delta in (image.transpose(1, 2), image.to(memory_format=torch.channels_last), image[:, :, ::2]):
            found = cuda.nsd(delta.to(DEVICE), 0.3, KEYS[1], 8).values
            assert torch.equal(found.cpu(), reference.nsd(delta, 0.3, KEYS[1], 8))

    @pytest.mark.parametrize("size", [1, 3, 4097, 9001])
    @pytest.mark.parametrize("factor", [1e-36, 1e-6, 1.0, 1e30])
    def test_statistics(self, size: int, factor: float) -> None:
        delta = normal((size,), 1).abs() * factor
        std, peak = cuda.statistics(delta.to(DEVICE))
        expected, largest = dither.statistics(delta.double())
        assert std == pytest.approx(expected, rel=1e-6, abs=1e-9 * factor)
        assert peak == largest

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_statistics_of_halves(self, dtype: torch.dtype) -> None:
        delta = -normal((5000,)).to(dtype).abs()
        found = cuda.statistics(delta.to(DEVICE))
        assert found == pytest.approx(dither.statistics(delta.double()), rel=1e-6)

    def test_deviation_of_a_gradient_far_from_zero(self) -> None:
        delta = normal((90, 97)) * 1e-3 + 10
        assert cuda.statistics(delta.to(DEVICE))[0] == pytest.approx(
            dither.statistics(delta.double())[0], rel=1e-5
        )

    def test_statistics_of_zeros(self) -> None:
        assert cuda.statistics(torch.zeros(5000, device=DEVICE)) == (0.0, 0.0)

    @NUMPY
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("place", [0, 4500, -1])
    def test_what_is_not_finite_shows(self, bad: float, place: int) -> None:
        delta = normal((9001,))
        delta[place] = bad
        std, peak = cuda.statistics(delta.to(DEVICE))
        assert not math.isfinite(std)
        assert not math.isfinite(peak)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("value", [0.1, -3e-30])
    def test_what_does_not_vary_has_no_deviation(self, value: float, dtype: torch.dtype) -> None:
        delta = torch.full((9001,), value, device=DEVICE).to(dtype)
        for size in (1, 40, 4097, 9001):
            assert cuda.statistics(delta[:size]) == (0.0, abs(float(delta[0])))

    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("scale", "bits"), [(2.0, 8), (0.3, 4), (0.0, 8)])
    @pytest.mark.parametrize("size", [3, 127, 4099])
    def test_dithered_is_the_references_levels_times_the_step(
        self, size: int, scale: float, bits: int, dtype: torch.dtype, path: str
    ) -> None:
        delta = normal((size,)).to(dtype)
        delta[1] = 0
        std, peak = dither.statistics(delta.double())
        for key in KEYS:
            out, *numbers = by(path)(delta.to(DEVICE), scale, bits, key, constant=not scale)
            assert all(number.dim() == 0 and number.device == out.device for number in numbers)
            step, largest, finite, own, zeros = (float(number) for number in numbers)
            least = dither.step_size(std, peak, scale, bits)
            # In half precision up to the next number that there is.
            assert least * (1 - 1e-6) <= step <= least * (1 + max(2e-7, torch.finfo(dtype).eps))
            assert float(torch.tensor(step).to(dtype)) == step
            expected = reference.nsd(delta, step, key, bits)
            assert out.dtype == dtype
            wide = expected * torch.tensor(step)
            # The interpreter cuts bfloat16 off instead of rounding it.
            unit = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
            assert bool(((out.cpu().float() - wide).abs() <= unit * wide.abs()).all())
            assert largest == int(expected.abs().max())
            assert (finite, own, zeros) == (1, int((delta == 0).sum()), int((expected == 0).sum()))

    @pytest.mark.parametrize("path", PATHS)
    def test_dithered_of_any_layout(self, path: str) -> None:
        image = normal((2, 3, 37, 41))
        for delta in (image.transpose(1, 2), image.to(memory_format=torch.channels_last), image[:, :, ::2]):
            out, step, *_ = by(path)(delta.to(DEVICE), 1.0, 8, KEYS[1], constant=False)
            expected = reference.nsd(delta, float(step), KEYS[1], 8) * step.cpu().float()
            assert torch.equal(out.cpu(), expected)

    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("scale", [1.0, 0.0])
    def test_dithered_is_unbiased(self, scale: float, dtype: torch.dtype, path: str) -> None:
        """8,000 draws of each entry, in one gradient."""
        exact, draws = normal((23,)).to(dtype), 8000
        out, step, *_ = by(path)(exact.repeat(draws).to(DEVICE), scale, 8, KEYS[1], constant=False)
        found = out.cpu().double().view(draws, -1)
        size = float(step)
        part = (exact.double() / size).remainder(1)
        error = size * (part * (1 - part) / draws).sqrt()
        rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
        off = (found.mean(0) - exact.double()).abs()
        assert bool((off <= 4.5 * error + rounding * exact.double().abs() + 1e-7).all())
        assert torch.equal(found.mean(0).sign(), exact.double().sign())

    @NUMPY
    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("place", [0, 4500, -1])
    def test_what_is_not_finite_passes(self, place: int, bad: float, dtype: torch.dtype, path: str) -> None:
        delta = normal((9001,)).relu().to(dtype)
        delta[place] = bad
        for constant in (False, True):
            out, *numbers = by(path)(delta.to(DEVICE), float(not constant), 8, 3, constant=constant)
            torch.testing.assert_close(out.cpu(), delta, rtol=0, atol=0, equal_nan=True)
            zeros = int((delta == 0).sum())
            assert [float(number) for number in numbers] == [0, 0, 0, zeros, zeros]

    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("value", [0.0, 0.1, -3.0])
    def test_what_does_not_vary_passes(self, value: float, dtype: torch.dtype, path: str) -> None:
        delta = torch.full((5000,), value).to(dtype)
        zeros = 0 if value else 5000
        out, *numbers = by(path)(delta.to(DEVICE), 2.0, 8, 3, constant=False)
        assert torch.equal(out.cpu(), delta)
        assert [float(number) for number in numbers] == [0, 0, 1, zeros, zeros]
        out, step, largest, *_ = by(path)(delta.to(DEVICE), 0.0, 8, 3, constant=True)
        assert float(step) == pytest.approx(abs(float(delta[0])) / 127, rel=0.01)
        assert (float(largest) > 120) == bool(value)
        torch.testing.assert_close(out.cpu(), delta, rtol=0.02, atol=0)

    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.parametrize("factor", [1e-36, 1e-25, 1e30])
    def test_steps_of_extreme_gradients(self, factor: float, path: str) -> None:
        delta = normal((5000,)) * factor
        step = by(path)(delta.to(DEVICE), 2.0, 8, 3, constant=False)[1]
        assert float(step) == pytest.approx(2 * dither.statistics(delta.double())[0], rel=1e-5)

    @pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
    @pytest.mark.parametrize("path", PATHS)
    def test_half_precision_at_its_ends(self, path: str) -> None:
        """Where float16 has few bits left a step is the next that there is; beyond its range there is none."""
        for unit, scale, expected in ((2.0**-24, 0.1, 2.0**-24), (2.0**14, 10.0, 0.0)):
            delta = (normal((5000,)).clamp(-3, 3) * unit).half()
            out, step, *_ = by(path)(delta.to(DEVICE), scale, 8, 3, constant=False)
            assert float(step) == expected
            assert torch.equal(out.cpu(), delta)

    def test_what_there_is_no_kernel_for(self) -> None:
        delta = torch.ones(3, 4, device=DEVICE)
        for call in (
            lambda *given: cuda.nsd(given[0], 0.5, 3, given[1]),
            lambda *given: cuda.dither(given[0], 0.5, given[1], 3),
        ):
            with pytest.raises(ValueError, match=r"a gradient in torch\.float64"):
                call(delta.double(), 8)
            with pytest.raises(ValueError, match="bits=9"):
                call(delta, 9)
            with pytest.raises(ValueError, match="without entries"):
                call(delta[:0], 8)
        with pytest.raises(ValueError, match="without entries"):
            cuda.statistics(delta[:0])
        assert cuda.supports(delta)
        for other in (delta.double(), delta.int(), delta[:0], delta.to("meta")):
            assert not cuda.supports(other)


class TestLayers:
    """Whole layers by the device's path, on the GPU or in the interpreter's process."""

    __test__ = RUNS

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("bits", [8, None])
    def test_dispatched(self, bits: int | None, dtype: torch.dtype, there: str) -> None:
        """Widths and dtypes that Triton has no kernel for run in torch."""
        delta = Delta(batch((2, 3, 5, 7), dtype=dtype).to(DEVICE).to(memory_format=torch.channels_last))
        found = dispatch.dithered(delta, 0.7, bits, 5, small=True)
        expected = reference.nsd(delta.values, float(found.step), 5, bits).to(dtype) * float(found.step)
        torch.testing.assert_close(found.delta.values, expected, rtol=1e-6, atol=0)
        assert found.delta.values.is_contiguous(memory_format=torch.channels_last)
        assert found.delta.step is None
        assert isinstance(delta.counted, Tensor)
        assert isinstance(found.delta.counted, Tensor)
        assert (int(delta.counted), int(found.delta.counted)) == (0, int((expected == 0).sum()))

    @pytest.mark.parametrize("options", [{}, {"target_sparsity": 0.7}, {"bits": None}], ids=str)
    def test_dither_never_waits(
        self, options: dict[str, Any], there: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And gives what the CPU gives, in gradients, counts and figures."""
        found: list[Any] = []
        for path in ("here", "there"):
            layers = model()
            session = rg.attach(layers, rg.Dither(scale=1.0, **options), seed=3)
            optimizer = torch.optim.SGD(layers.parameters(), lr=1e-3)
            silence = Silence(monkeypatch) if path == "there" else None
            with monkeypatch.context() as patch:
                if silence is None:
                    patch.setattr(dispatch, "_waits", lambda values: False)
                for step in range(2):
                    seen = gradients(layers, batch((4, 1, 4, 4), step).to(DEVICE))
                    optimizer.step()
            assert silence is None or silence.layers == 16
            found.append((seen, session.metrics()))
        (expected, others), (seen, figures) = found
        assert_same(seen, expected, 1e-4)
        assert figures["zeros"] == others["zeros"] > figures["own_zeros"] == others["own_zeros"]
        for name, layer in figures["layers"].items():
            for figure in ("largest_level", "bits", "fallbacks", "zeros"):
                assert layer[figure] == others["layers"][name][figure]
            for figure in ("scale", "step"):
                assert layer[figure] == pytest.approx(others["layers"][name][figure], rel=1e-5)

    @NUMPY
    def test_fallbacks_are_read_once_a_step(self, there: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Counted, and warned of, when the optimizer has stepped, or when somebody asks."""
        layer = seeded(lambda: nn.Linear(6, 5)).to(DEVICE)
        plain = seeded(lambda: nn.Linear(6, 5)).to(DEVICE)
        session = rg.attach(layer, rg.Dither())
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
        silence, x, bad = Silence(monkeypatch), batch((8, 6)).to(DEVICE), batch((8, 5), 2).to(DEVICE)
        bad[3, 2] = math.inf
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", RetrogradeWarning)
            for delta in (bad, torch.ones_like(bad), batch((8, 5), 3).to(DEVICE), bad):
                layer(x).backward(delta)
        assert silence.layers == 4
        assert program(layer).total.fallbacks == 0
        with pytest.warns(RetrogradeWarning, match="NaN or Inf") as seen:
            optimizer.step()
        assert len(seen) == 1
        assert session.metrics()["layers"]["(root)"]["fallbacks"] == 3
        layer.zero_grad()
        for module in (layer, plain):
            module(x).backward(bad)
        torch.testing.assert_close(layer.weight.grad, plain.weight.grad, equal_nan=True, rtol=0, atol=0)
        state = session.state_dict()["layers"]["(root)"]
        assert program(layer).total.fallbacks == 4
        assert state["rules"][0]["step"] == pytest.approx(float(batch((8, 5), 3).std(correction=0)))

    @pytest.mark.parametrize("low", ["int8", "bfloat16"])
    def test_low_precision_never_waits(self, low: Any, there: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Rounded, near the dense gradients, counted at the discount."""
        layers, plain, x = model(), model(), batch((4, 1, 4, 4)).to(DEVICE)
        session = rg.attach(layers, rg.DeepFocus(q_skip=0, q_full=0, low=low, warmup=0))
        optimizer = torch.optim.SGD(layers.parameters(), lr=0.0)
        gradients(layers, x)
        optimizer.step()
        before = session.flops().weight_grad
        silence = Silence(monkeypatch)
        if low == "bfloat16" and INTERPRETED:
            # Nobody has counted its zeros, and those of a tensor on the CPU are counted there and then.
            monkeypatch.setattr(Tally, "counting", lambda tally, step, call: False)
        found, expected = gradients(layers, x), gradients(plain, x)
        assert silence.layers == 8
        assert session.metrics()["blocks"]["1.branch"]["low"] == 0.5
        for name, value in expected.items():
            error = float((found[name] - value).norm() / value.norm())
            assert error < (0.2 if low == "int8" else 0.05), name
            assert error > 0 or name.endswith("bias")
        after = session.flops().weight_grad
        discount = {"int8": 0.25, "bfloat16": 0.5}[low]
        executed = after.executed - before.executed
        assert after.discounted - before.discounted == pytest.approx(discount * executed)


@pytest.mark.skipif(RUNS, reason="the kernels run in this process")
def test_kernels_in_tritons_interpreter() -> None:
    """`TestKernels` and `TestLayers`, in a process of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-x",
        "-k",
        "TestKernels or TestLayers",
        __file__,
    ]
    done = subprocess.run(
        command,
        env={**kept, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


SIZES = ("size", "blocks")
POINTERS = {"peaks": "*i32", "means": "*fp64", "squares": "*fp64", "found": "*fp64", "counts": "*i64"}
BARE: dict[str, Any] = {"limit": "fp32", "scale": "fp32", "key": "i64"}


def cases() -> list[Any]:
    """Kernel, types that differ from the usual ones, and what is fixed."""
    combine: dict[str, Any] = {"BLOCK": 4096, "CHUNK": 1024}
    return [
        ("_moments_kernel", {"delta": "*bf16", "BLOCK": 4096}),
        ("_combine_kernel", {**combine, "HALF": None, "CONSTANT": False}),
        ("_combine_kernel", {**combine, "HALF": "bfloat16", "CONSTANT": False}),
        ("_combine_kernel", {**combine, "HALF": "float16", "CONSTANT": True}),
        ("_round_kernel", {"delta": "*bf16", "out": "*i8", "QUADS": 1024}),
        ("_round_kernel", {"delta": "*fp32", "out": "*fp32", "QUADS": 1024}),
        ("_round_kernel", {"delta": "*bf16", "out": "*bf16", "QUADS": 1024}),
        ("_round_kernel", {"delta": "*fp16", "out": "*fp16", "QUADS": 1024}),
    ]


@pytest.mark.skipif(INTERPRETED, reason="compiling is not for the interpreter")
@pytest.mark.parametrize("case", cases(), ids=lambda case: case[0])
def test_kernels_compile_for_hopper(case: tuple[str, dict[str, Any]]) -> None:
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from retrograde.kernels import cuda

    name, given = case
    kernel = getattr(cuda, name)
    usual = {**dict.fromkeys(SIZES, "i32"), **POINTERS, **BARE, **given}
    fixed = {name: usual[name] for name in kernel.arg_names if name.isupper()}
    if fixed.get("HALF"):
        fixed["HALF"] = getattr(tl, fixed["HALF"])
    signature = {name: "constexpr" if name in fixed else usual[name] for name in kernel.arg_names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in SIZES
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=aligned)
    built = compile(source, target=GPUTarget("cuda", 90, 32))
    code = built.asm["ptx"]
    # Divisions are to nearest, and nothing spills into memory.
    assert "div.full" not in code
    assert "div.approx" not in code
    assert ".local" not in code
