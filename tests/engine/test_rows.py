"""Sampled rows are what the weight multiplies, evenly spread and within the budget."""

import pytest
import torch
from torch import nn

from cases import LAYERS, Case, batch, seeded
from retrograde.engine.layers import LayerKind, find_kind
from retrograde.engine.rows import sample_rows, weight_from_matrix, weight_matrix
from retrograde.kernels.geometry import Geometry

EVERYTHING = 10**6


def read(case: Case) -> tuple[nn.Module, torch.Tensor, Geometry | None]:
    layer = seeded(case.make)
    kind = find_kind(layer)
    assert isinstance(kind, LayerKind)
    operands = kind.operands(layer, batch(case.shape), **case.call)
    x = operands.x
    if operands.geometry is not None and x.dim() == len(operands.geometry.stride) + 1:
        x = x.unsqueeze(0)
    return layer, x, operands.geometry


@pytest.mark.parametrize("case", [c for c in LAYERS if not c.name.startswith("transposed")], ids=str)
def test_rows_times_matrix_is_the_layer(case: Case) -> None:
    """All rows: each is one position of the output, in order, channel by channel of each group."""
    layer, x, geometry = read(case)
    rows = sample_rows(x, layer.weight, geometry, EVERYTHING)
    matrix = weight_matrix(layer.weight, geometry.groups if geometry else 1, False)
    z = (rows @ matrix.mT).transpose(0, 1).flatten(1)
    if layer.bias is not None:
        z = z + layer.bias
    expected = layer(batch(case.shape))
    if geometry is None:
        expected = expected.reshape(-1, expected.shape[-1])
    else:
        expected = expected if expected.dim() == x.dim() else expected.unsqueeze(0)
        expected = expected.movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(z, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", [c for c in LAYERS if c.name.startswith("transposed2d")], ids=str)
def test_transposed_rows_times_matrix_is_the_layer(case: Case) -> None:
    """All rows: each is one pixel of the input, and its products, folded back, are the output."""
    layer, x, g = read(case)
    assert g is not None
    rows = sample_rows(x, layer.weight, g, EVERYTHING)
    products = rows @ weight_matrix(layer.weight, g.groups, True).mT
    if not x.numel():
        assert products.shape[1] == 0
        return
    # (groups, N·pixels, C_out/groups · kernel) → (N, C_out · kernel, pixels), which fold adds up.
    columns = products.transpose(0, 1).flatten(1).unflatten(0, (x.shape[0], -1)).transpose(1, 2)
    expected = torch.nn.functional.conv_transpose2d(
        x, layer.weight, None, g.stride, g.padding, g.output_padding, g.groups, g.dilation
    )
    z = torch.nn.functional.fold(
        columns, expected.shape[2:], layer.kernel_size, g.dilation, g.padding, g.stride
    )
    torch.testing.assert_close(z, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_matrix_round_trip(case: Case) -> None:
    layer, x, geometry = read(case)
    groups, transposed = (geometry.groups, geometry.transposed) if geometry else (1, False)
    matrix = weight_matrix(layer.weight, groups, transposed)
    assert matrix.shape[0] == groups
    assert matrix.shape[2] == sample_rows(x, layer.weight, geometry, 4).shape[2]
    assert torch.equal(weight_from_matrix(matrix, layer.weight.shape, transposed), layer.weight)


def test_budget_is_spread() -> None:
    """A budget is kept, deterministic, and its rows come from all over the batch."""
    x = torch.arange(1000.0).unsqueeze(1)
    rows = sample_rows(x, torch.zeros(1, 1), None, 50)
    assert rows.shape == (1, 50, 1)
    assert torch.equal(rows, sample_rows(x, torch.zeros(1, 1), None, 50))
    assert len(set(rows.flatten().tolist())) == 50
    counts = torch.histc(rows, 10, 0, 1000)
    assert int(counts.min()) >= 4
    assert int(counts.max()) <= 6


def test_low_precision_is_widened() -> None:
    assert sample_rows(torch.ones(3, 2).bfloat16(), torch.zeros(1, 2), None, 2).dtype == torch.float32
    assert sample_rows(torch.ones(3, 2).double(), torch.zeros(1, 2), None, 2).dtype == torch.float64
