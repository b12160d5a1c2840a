"""The CUDA kernels against plain torch: the same levels bit for bit, the same products but for rounding.

Without a GPU, Triton's interpreter runs them, in a process of its own: Triton decides when it is imported. What the
interpreter accepts need not compile, so each kernel is compiled as well, which needs no GPU.
"""

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from retrograde.kernels import int8, reference
from retrograde.kernels.int8 import Quantised
from retrograde.maths import dither
from retrograde.maths.philox import mix_key

TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RUNS = TRITON and (INTERPRETED or torch.cuda.is_available())
DEVICE = "cpu" if INTERPRETED else "cuda"
if RUNS:
    from retrograde.kernels import cuda, cuda_products

pytestmark = pytest.mark.skipif(not TRITON, reason="Triton is not installed")

KEYS = [3, mix_key(1, 2, 3), (1 << 64) - 5]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (5, 3, 2), (64, 128, 64), (33, 65, 129), (70, 257, 130)]
KERNELS = ["dense", "bfloat16", "int8", "skip-blocks"]
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Rounding errors. The interpreter cuts bfloat16 off instead of rounding it: twice as much."""

NUMPY = pytest.mark.filterwarnings("ignore:invalid value encountered in (multiply|subtract):RuntimeWarning")
"""What the interpreter's arithmetic says of NaN."""


def normal(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sparse(shape: tuple[int, ...], share: float, seed: int = 0) -> Tensor:
    """int8 levels with about `share` zeros."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(-127, 128, shape, generator=generator)
    return (levels * (torch.rand(shape, generator=generator) >= share)).to(torch.int8)


def stepped(delta: Tensor, bits: int) -> float:
    return 0.9 * float(delta.float().abs().max()) / dither.largest_level(bits)


def columns(dense: Tensor) -> tuple[Tensor, Tensor]:
    """Each column rounded to 8 bits, and the scales: every division to nearest."""
    peaks = dense.float().abs().amax(0)
    factor = torch.full_like(peaks, 127) / peaks
    return (dense.float() * factor).round().to(torch.int8), peaks / torch.full_like(peaks, 127)


def close(found: Tensor, factor: Tensor, dense: Tensor, rounding: str | None) -> None:
    """`found` is ``factor · dense``, within what `rounding` and the dtype allow."""
    assert found.dtype == dense.dtype
    found, wide = found.cpu().double(), dense.double()
    expected, terms = factor @ wide, factor.abs() @ wide.abs()
    operand = {None: max(UNIT[dense.dtype], 2e-7), "bfloat16": 2.0**-8, "int8": 0.0}[rounding]
    allowed = 4 * (operand + UNIT[dense.dtype]) * terms
    if rounding == "int8":
        allowed = allowed + factor.abs().sum(1, keepdim=True) * wide.abs().amax(0) / 250
    assert found.shape == expected.shape
    assert bool(((found - expected).abs() <= allowed + 1e-12).all())


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

    def test_levels_of_nothing(self) -> None:
        found = cuda.nsd(torch.empty(0, 5, device=DEVICE), 1.0, 3, 8)
        assert (found.values.shape, found.zeros, found.largest) == ((0, 5), 0, 0)

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

    @pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
    @pytest.mark.parametrize("transposed", [False, True])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_int8_sums_are_exact(
        self, shape: tuple[int, int, int], transposed: bool, dtype: torch.dtype
    ) -> None:
        a, m, i = shape
        levels = sparse((m, a) if transposed else (a, m), 0.6)
        dense = normal((m, i), 1).to(dtype)
        rounded, scale = columns(dense)
        sums = (levels.T if transposed else levels).int() @ rounded.int()
        expected = sums.float() * (scale * torch.tensor(0.01))
        found = cuda.int8_product(levels.to(DEVICE), 0.01, dense.to(DEVICE), transposed=transposed)
        assert found.dtype == dtype
        error = (found.cpu().float() - expected).abs()
        assert bool((error <= (0 if dtype == torch.float32 else 2 * UNIT[dtype]) * expected.abs()).all())

    def test_int8_tiles_agree(self) -> None:
        levels, dense = sparse((130, 200), 0.3).to(DEVICE), normal((200, 140), 1).to(DEVICE)
        large, small = (
            cuda.int8_product(levels, 0.5, dense, tile=tile)
            for tile in (cuda_products.LARGE, cuda_products.SMALL)
        )
        assert torch.equal(large, small)

    @NUMPY
    def test_int8_columns_of_zeros_and_of_what_is_not_finite(self) -> None:
        dense = normal((70, 5))
        dense[:, 1] = 0
        dense[3, 2], dense[4, 3] = math.nan, math.inf
        found = cuda.int8_product(sparse((9, 70), 0.5).to(DEVICE), 0.1, dense.to(DEVICE)).cpu()
        assert found.isfinite().all(0).tolist() == [True, True, False, False, True]
        assert not found[:, 1].any()
        assert not found[:, 2:4].isfinite().any()

    @pytest.mark.parametrize("transposed", [False, True])
    def test_int8_sums_stay_in_range(self, transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """Long ones are cut, each part with scales of its own."""
        assert cuda_products._LONGEST * 127**2 < 2**31
        monkeypatch.setattr(cuda_products, "_LONGEST", 128)
        levels, dense = sparse((5, 300), 0.5), normal((300, 7), 1)
        dense[150:] *= 100
        expected = torch.zeros(5, 7)
        for part in (slice(0, 128), slice(128, 256), slice(256, 300)):
            rounded, scale = columns(dense[part])
            expected += (levels[:, part].int() @ rounded.int()).float() * (scale * 0.5)
        given = (levels.T if transposed else levels).to(DEVICE)
        found = cuda.int8_product(given, 0.5, dense.to(DEVICE), transposed=transposed)
        torch.testing.assert_close(found.cpu(), expected)
        rounded, scale = columns(dense)
        operand = Quantised(rounded.to(DEVICE), scale.to(DEVICE), torch.float32)
        again = cuda.run("int8", given, 0.5, operand, transposed=transposed)
        expected = (levels.double() @ rounded.double() * (0.5 * scale)).float()
        torch.testing.assert_close(again.cpu(), expected)

    @pytest.mark.parametrize("transposed", [False, True])
    @pytest.mark.parametrize("kernel", KERNELS)
    def test_quantised_operands(self, kernel: str, transposed: bool) -> None:
        values, scale = columns(normal((65, 70), 1))
        levels = sparse((65, 40) if transposed else (40, 65), 0.5)
        operand = Quantised(values.to(DEVICE), scale.to(DEVICE), torch.float32)
        found = cuda.run(kernel, levels.to(DEVICE), 0.5, operand, transposed=transposed)
        factor = (levels.T if transposed else levels).double() * 0.5
        # Nothing is rounded again, but to bfloat16.
        exact = None if kernel == "int8" else cuda.PRECISION.get(kernel)
        close(found, factor, int8.Quantised(values, scale, torch.float32).dense(), exact)

    @pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
    @pytest.mark.parametrize("transposed", [False, True])
    @pytest.mark.parametrize("share", [0.0, 0.95, 1.0])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_skipping(
        self, shape: tuple[int, int, int], share: float, transposed: bool, dtype: torch.dtype
    ) -> None:
        a, m, i = shape
        values = sparse((m, a) if transposed else (a, m), share)
        dense = normal((m, i), 1).to(dtype)
        found = cuda.skip_product(values.to(DEVICE), 0.01, dense.to(DEVICE), transposed=transposed)
        close(found, (values.T if transposed else values).double() * 0.01, dense, None)

    @pytest.mark.parametrize("transposed", [False, True])
    def test_what_is_skipped(self, transposed: bool) -> None:
        """Rows of zeros, and strips of zeros: counted, and the operand beside them is not read."""
        values = sparse((200, 300), 0.2)
        values[torch.rand(200, generator=torch.Generator().manual_seed(1)) < 0.6] = 0
        values[:, 40:290] = 0
        values[:, 0] = 0
        rows = values.bool().any(1).nonzero().flatten()
        values[rows[64:], 7] = 0
        blocks = values[rows].split(cuda_products.BLOCK_A)
        assert 1 < len(blocks) < 200 // cuda_products.BLOCK_A
        dense = normal((300, 50), 1)
        dense[40:290] = math.nan
        dense[0] = math.inf
        given = (values.T if transposed else values).to(DEVICE)
        strips = cuda_products.strips(given, torch.float32, transposed=transposed)
        assert strips.rows[: int(strips.used)].tolist() == rows.tolist()
        listed = [block.bool().any(0).nonzero().flatten().tolist() for block in blocks]
        assert [len(which) for which in listed] == [49, 48]
        for which, index in zip(listed, strips.index, strict=False):
            assert index[: len(which)].tolist() == which
        assert strips.executed(50) == sum(map(len, listed)) * cuda_products.BLOCK_A * 50
        found = cuda.skip_product(given, 0.5, dense.to(DEVICE), transposed=transposed)
        again = cuda.skip_product(given, 0.5, dense.to(DEVICE), transposed=transposed, found=strips)
        close(found, values.double() * 0.5, dense.nan_to_num(0, 0, 0), None)
        assert torch.equal(found, again)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("kernel", KERNELS)
    def test_run(self, kernel: str, dtype: torch.dtype) -> None:
        """Levels that overflow float16 without their step, and a D of columns."""
        levels = sparse((1100, 9), 0.1).abs()
        dense = (normal((17, 1100), 1).abs() + 1).to(dtype).T
        assert cuda.supports(levels.to(DEVICE), dense.to(DEVICE))
        found = cuda.run(kernel, levels.to(DEVICE), 1e-3, dense.to(DEVICE), transposed=True)
        close(found, levels.T.double() * 1e-3, dense, cuda.PRECISION.get(kernel))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("kernel", ["dense", "skip-blocks"])
    @pytest.mark.parametrize("transposed", [False, True])
    def test_a_gradient_that_is_no_levels(self, kernel: str, dtype: torch.dtype, transposed: bool) -> None:
        values, dense = normal((66, 40)).relu().to(dtype), normal((66 if transposed else 40, 30), 1).to(dtype)
        found = cuda.run(kernel, values.to(DEVICE), None, dense.to(DEVICE), transposed=transposed)
        close(found, (values.T if transposed else values).double(), dense, None)

    @pytest.mark.parametrize("kernel", KERNELS)
    @pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
    def test_products_of_nothing(self, kernel: str, shape: tuple[int, int, int]) -> None:
        a, m, i = shape
        levels = torch.ones(a, m, dtype=torch.int8, device=DEVICE)
        found = cuda.run(kernel, levels, 0.5, torch.ones(m, i, device=DEVICE))
        assert found.shape == (a, i)
        assert not found.any()

    def test_what_there_is_no_kernel_for(self) -> None:
        levels, dense = torch.ones(2, 3, dtype=torch.int8, device=DEVICE), torch.ones(3, 4, device=DEVICE)
        with pytest.raises(ValueError, match="kernel='fast' must be one of"):
            cuda.run("fast", levels, 0.5, dense)
        with pytest.raises(ValueError, match=r"levels in torch\.float32"):
            cuda.run("int8", levels.float(), 0.5, dense)
        for kernel in ("int8", "skip-blocks"):
            with pytest.raises(ValueError, match=r"\(2, 3\), transposed, and an operand \(3, 4\) do not fit"):
                cuda.run(kernel, levels, 0.5, dense, transposed=True)
        with pytest.raises(ValueError, match=r"a gradient in torch\.float64"):
            cuda.nsd(dense.double(), 0.5, 3, 8)
        with pytest.raises(ValueError, match="bits=9"):
            cuda.nsd(dense, 0.5, 3, 9)
        with pytest.raises(ValueError, match="without entries"):
            cuda.statistics(dense[:0])
        assert cuda.supports(levels, dense)
        assert not cuda.supports(levels, dense.double())
        assert not cuda.supports(levels.int(), dense)
        assert not cuda.supports(levels[:0], dense)
        assert not cuda.supports(levels.to("meta"), dense)


@pytest.mark.skipif(RUNS, reason="the kernels run in this process")
def test_kernels_in_tritons_interpreter() -> None:
    """`TestKernels`, in a process of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", "-k", "TestKernels", __file__]
    done = subprocess.run(
        command,
        env={**kept, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


SIZES = ("m", "i", "a", "width", "size", "rows", "columns", "length", "blocks", "row_stride", "column_stride")
POINTERS = {
    "levels": "*i8", "rounded": "*i8", "flags": "*i8", "matrix": "*i8",
    "rows": "*i32", "used": "*i32", "index": "*i32", "counts": "*i32",
    "scales": "*fp32", "means": "*fp64", "squares": "*fp64",
}  # fmt: skip
BARE: dict[str, Any] = {"step": "fp32", "limit": "fp32", "key": "i64"}


def cases() -> list[Any]:
    """Kernel, types that differ from the usual ones, and what is fixed."""
    skip = {"BLOCK_A": 64, "TILE_I": 128}
    strips = {"values": "*i8", "packed": "*bf16", "BLOCK_A": 64, "SIDE": 64}
    split = {
        "packed": "*bf16",
        "dense": "*fp32",
        "out": "*fp32",
        "PARTS": 3,
        "TILE_M": 32,
        "PRECISION": "tf32",
    }
    half = {
        "packed": "*bf16",
        "dense": "*bf16",
        "out": "*bf16",
        "PARTS": 1,
        "TILE_M": 64,
        "PRECISION": "tf32",
    }
    single = {
        "packed": "*fp32",
        "dense": "*fp32",
        "out": "*fp32",
        "PARTS": 1,
        "TILE_M": 32,
        "PRECISION": "tf32x3",
    }
    tile = {"out": "*fp32", "TILE_A": 128, "TILE_I": 128, "TILE_M": 128, "GROUP": 8}
    return [
        ("cuda", "_nsd_kernel", {"delta": "*bf16", "found": "*i64", "QUADS": 1024}),
        ("cuda", "_moments_kernel", {"delta": "*bf16", "peaks": "*i32", "BLOCK": 4096}),
        ("cuda", "_combine_kernel", {"peaks": "*i32", "found": "*fp64", "BLOCK": 4096, "CHUNK": 1024}),
        ("cuda_products", "_peaks_kernel", {"dense": "*bf16", "peaks": "*i32", "ROWS": 512, "SIDE": 64}),
        ("cuda_products", "_round_kernel", {"dense": "*fp32", "peaks": "*fp32", "SIDE": 64}),
        ("cuda_products", "_turn_kernel", {"packed": "*i8", "rows": "i32", "row_stride": 1, "SIDE": 64}),
        ("cuda_products", "_int8_kernel", tile),
        ("cuda_products", "_list_kernel", {"SCAN": 1024}),
        ("cuda_products", "_strips_kernel", {**strips, "column_stride": 1}),
        ("cuda_products", "_strips_kernel", {**strips, "row_stride": 1}),
        ("cuda_products", "_skip_kernel", {**skip, **half}),
        ("cuda_products", "_skip_kernel", {**skip, **split}),
        ("cuda_products", "_skip_kernel", {**skip, **single, "TILE_I": 64}),
    ]


@pytest.mark.skipif(INTERPRETED, reason="compiling is not for the interpreter")
@pytest.mark.parametrize("case", cases(), ids=lambda case: case[1])
def test_kernels_compile_for_hopper(case: tuple[str, str, dict[str, Any]]) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    module, name, given = case
    kernel = getattr(importlib.import_module(f"retrograde.kernels.{module}"), name)
    usual = {**dict.fromkeys(SIZES, "i32"), **POINTERS, **BARE, **given}
    fixed = {
        name: usual[name]
        for name in kernel.arg_names
        if usual[name] in (1, "tf32", "tf32x3") or name.isupper()
    }
    signature = {name: "constexpr" if name in fixed else usual[name] for name in kernel.arg_names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (kind == "i32" and name in SIZES)
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=aligned)
    built = compile(source, target=GPUTarget("cuda", 90, 32))
    code = built.asm["ptx"]
    if name == "_int8_kernel":
        assert "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8" in code
    if name == "_skip_kernel":
        number = "tf32" if given["PRECISION"] == "tf32x3" else "bf16"
        assert f".f32.{number}.{number}" in code
        assert "cp.async" in code
    # Divisions are to nearest, and nothing spills into memory.
    assert "div.full" not in code
    assert "div.approx" not in code
    assert ".local" not in code
