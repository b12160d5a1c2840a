"""The forward pass in 8 bits: its rounding, its product, and what its operands are good for afterwards."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import retrograde as rg
from retrograde.errors import OptionError
from retrograde.kernels import choose, cpu_quantise, int8, linear, reference
from retrograde.kernels.delta import Delta
from retrograde.kernels.dispatch import Products
from retrograde.kernels.int8 import Quantised

SHAPES = [(1, 1), (3, 17), (16, 16), (37, 53), (130, 257), (0, 5), (600, 130)]


def matrix(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["normal", "zero row", "nan", "inf", "tiny"])
def test_fast_rounding_equals_the_reference(shape: tuple[int, int], kind: str) -> None:
    x = matrix(shape)
    if x.numel():
        match kind:
            case "zero row":
                x[-1] = 0
            case "nan" | "inf":
                x[0, -1] = float(kind)
            case "tiny":
                x[-1] *= 1e-41
            case _:
                pass
    found = cpu_quantise.quantise(x)
    for dim, (values, scale) in ((1, found[:2]), (0, found[2:]), (0, cpu_quantise.quantise_columns(x))):
        expected, expected_scale = int8.quantise(x, dim)
        assert torch.equal(values, expected)
        torch.testing.assert_close(scale, expected_scale.view(scale.shape), equal_nan=True)


def test_rounding_is_to_the_nearest_level() -> None:
    x = matrix((40, 60))
    values, scale = int8.quantise(x, 0)
    assert bool(((values * scale - x).abs() <= scale * 0.5001).all())
    assert values.abs().amax(0).tolist() == [127] * 60


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_forward_product_is_that_of_the_rounded_operands(dtype: torch.dtype) -> None:
    x, weight, bias = matrix((2, 5, 33)).to(dtype), matrix((7, 33), 1).to(dtype), matrix((7,), 2).to(dtype)
    z, kept_x, kept_weight = int8.linear(x, weight, bias)
    rows = x.reshape(10, 33)
    (x_row, x_scale), (w_row, w_scale) = int8.quantise(rows, 1), int8.quantise(weight, 1)
    exact = (x_row.long() @ w_row.T.long()) * (x_scale[:, None].double() * w_scale) + bias.double()
    torch.testing.assert_close(z.double(), exact.view(2, 5, 7), rtol=1e-2, atol=1e-2)
    if dtype != torch.bfloat16:
        torch.testing.assert_close(z.double(), exact.view(2, 5, 7), rtol=1e-5, atol=1e-5)
    assert z.dtype == dtype
    for kept, whole in ((kept_x, rows), (kept_weight, weight)):
        assert kept.dense().dtype == dtype
        assert bool(((kept.dense() - whole).abs() <= kept.scale * 0.51 + 0.01 * whole.abs()).all())


def test_non_finite_entries_show() -> None:
    x, weight = matrix((4, 8)), matrix((3, 8), 1)
    x[2, 5] = math.nan
    weight[1, 0] = math.inf
    z, *_ = int8.linear(x, weight, None)
    assert z.isnan().tolist() == [[row == 2 or out == 1 for out in range(3)] for row in range(4)]


@pytest.mark.parametrize("shape", [(4, 8), (2, 3, 8), (0, 8), (1, 8)])
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(shape: tuple[int, ...], bias: bool) -> None:
    arguments = (matrix(shape), matrix((5, 8), 1), matrix((5,), 2) if bias else None)
    torch.library.opcheck(torch.ops.retrograde.int8_linear, arguments)


@pytest.mark.parametrize("kernel", linear.KERNELS)
@pytest.mark.parametrize("transposed", [False, True])
def test_kernels_take_quantised_operands(kernel: str, transposed: bool) -> None:
    levels = (matrix((30, 40)) * 2).round().to(torch.int8)
    operand = int8.quantise_columns(matrix((30 if transposed else 40, 50), 1))
    found = linear.run(kernel, levels, 0.5, operand, transposed=transposed)
    factor = (levels.T if transposed else levels).double()
    exact = 0.5 * (factor @ (operand.values.double() * operand.scale.double()))
    # Levels and 8-bit values are exact in bfloat16; its product is rounded once, to 8 bits.
    tolerance = 2**-7 if kernel == "bfloat16" else 1e-5
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chosen_products_of_quantised_operands(dtype: torch.dtype) -> None:
    """Above the size from which kernels are chosen, and below it."""
    for size in (8, 256):
        values = (matrix((size, size)) * 2).round().to(torch.int8)
        operand = Quantised(*int8.quantise(matrix((size, size), 1), 0), dtype)
        products = Products(Delta(values, 0.5))
        for found, expected in (
            (products.linear_input_grad(operand, (size, size)), values.double()),
            (products.linear_weight_grad(operand), values.T.double()),
        ):
            assert found.value.dtype == dtype
            exact = 0.5 * expected @ (operand.values.double() * operand.scale)
            torch.testing.assert_close(found.value.double(), exact, rtol=0.05, atol=0.5 if size > 8 else 0.1)


@pytest.mark.parametrize("kernel", ["skip-bfloat16", "int8", "dense"])
def test_bfloat16_operands(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast the other operand is bfloat16: kernels take it, and their results are bfloat16."""
    monkeypatch.setattr(choose, "chooser", lambda: _Favour(kernel))
    monkeypatch.setattr(choose, "fast_precision", lambda name: True)
    values = matrix((256, 256)).round().to(torch.int8)  # 38 % zeros
    values[:, ::2] = 0
    values[0, 0] = 1  # a column that is not zero throughout
    weight = matrix((256, 256), 1).bfloat16()
    work = Products(Delta(values, 0.5), "int8").linear_input_grad(weight, (256, 256))
    assert work.kernel == ("reference" if kernel == "dense" else kernel)
    assert work.value.dtype == torch.bfloat16
    exact = reference.linear_input_grad(Delta(values, 0.5), weight.double(), (256, 256))
    torch.testing.assert_close(work.value.double(), exact, rtol=0.02, atol=0.5)


class _Favour:
    def __init__(self, kernel: str) -> None:
        self._kernel = kernel

    def best(self, problem: choose.Problem, allowed: tuple[str, ...], compute: object) -> str:
        assert self._kernel in allowed
        return self._kernel


def _layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(48, 32)


def test_layer_trains_in_8_bits_and_evaluates_exactly() -> None:
    layer, plain, x = _layer(), _layer(), matrix((64, 48))
    rg.attach(layer, rg.Dither(scale=0, forward="int8"))
    z, exact = layer(x), plain(x)
    assert 0 < float((z - exact).abs().max()) < 0.02 * float(exact.abs().max())
    layer.eval()
    assert torch.equal(layer(x), exact)
    layer.train()
    z.square().sum().backward()
    exact.square().sum().backward()
    for mine, theirs in zip(layer.parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert 0 < float((mine.grad - theirs.grad).norm()) < 0.03 * float(theirs.grad.norm())


def test_x_is_kept_in_8_bits() -> None:
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    layer, x = _layer(), matrix((64, 48))
    rg.attach(layer, rg.Dither(forward="int8"))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    assert sum(t.numel() * t.element_size() for t in kept if t.shape[:1] == (64,)) == 64 * 48


def test_forward_flops_are_discounted_as_8_bits() -> None:
    layer = _layer()
    session = rg.attach(layer, rg.Dither(forward="int8"))
    layer(matrix((64, 48))).sum().backward()
    forward = session.flops().forward
    assert forward.discounted == forward.dense / 4 == 2 * 64 * 48 * 32 / 4


def test_compiled_equals_eager() -> None:
    x = matrix((64, 48))
    found: list[list[Tensor]] = []
    for compiled in (False, True):
        layer = _layer()
        session = rg.attach(layer, rg.Dither(forward="int8"), seed=0)
        run = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
        z = run(x)
        z.square().sum().backward()
        found.append([z.detach(), *(p.grad for p in layer.parameters() if p.grad is not None)])
        del session
    for eager, other in zip(*found, strict=True):
        assert torch.equal(eager, other)


def test_composes_with_what_observes_x_and_not_with_what_keeps_something_else() -> None:
    layer = _layer()
    rg.attach(layer, [rg.Dither(forward="int8"), rg.Decorrelate(rank=4, every=1)])
    layer(matrix((64, 48))).sum().backward()
    assert layer.weight.grad is not None
    with pytest.raises(OptionError, match="keeps something other than the layer's input"):
        rg.attach(_layer(), [rg.Dither(forward="int8"), rg.Spectral(rank=4)])


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 64), (64, 1), (1, 1), (48, 32)])
def test_layers_of_one_feature(inputs: int, outputs: int) -> None:
    """torch's own 8-bit product misreads operands of one row or column."""
    torch.manual_seed(0)
    plain, x = nn.Linear(inputs, outputs), matrix((64, inputs))
    layer = copy.deepcopy(plain)
    rg.attach(layer, rg.Dither(scale=0, forward="int8"))
    z, expected = layer(x), plain(x)
    torch.testing.assert_close(z, expected, rtol=0.05, atol=0.05)
    z.sin().sum().backward()
    expected.sin().sum().backward()
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad, rtol=0.1, atol=1.0)


@pytest.mark.parametrize("shape", [(1, 40, 30), (20, 1, 30), (20, 40, 1), (1, 1, 1)], ids=str)
def test_products_of_one_row_or_column(shape: tuple[int, int, int]) -> None:
    a, m, i = shape
    levels, dense = (matrix((a, m)) * 3).round().to(torch.int8), matrix((m, i), 1)
    found = linear.run("int8", levels, 0.5, dense)
    torch.testing.assert_close(found, 0.5 * levels.float() @ dense, rtol=0.05, atol=0.5)
    found = linear.run("int8", levels.T.contiguous(), 0.5, dense, transposed=True)
    torch.testing.assert_close(found, 0.5 * levels.float() @ dense, rtol=0.05, atol=0.5)


def test_convolutions_say_that_their_forward_pass_is_exact() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    plan = rg.attach(model, rg.Dither(forward="int8")).plan
    assert [("8 bits are for linear" in row.why) for row in plan.rows] == [True, False]


@pytest.mark.parametrize("fast", [True, False])
def test_the_plan_says_where_8_bits_are_slow(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "fast_precision", lambda name: fast)
    (row,) = rg.make_plan(_layer(), rg.Dither(forward="int8")).rows
    assert ("longer for it than in float32" in row.why) is not fast


def test_unknown_precision_is_refused() -> None:
    with pytest.raises(OptionError, match="forward='int4'"):
        rg.Dither(forward="int4")  # type: ignore[arg-type]
