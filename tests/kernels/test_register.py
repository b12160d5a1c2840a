"""Kernels that somebody else adds: tried, taken where they are fastest and allowed, counted as what they do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from retrograde.errors import OptionError
from retrograde.kernels import choose, linear, reference
from retrograde.kernels.delta import Delta
from retrograde.kernels.dispatch import Products
from retrograde.lab import contestants

N = 256


@pytest.fixture(autouse=True)
def _own_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(linear, "_registered", {})
    monkeypatch.setattr(linear, "PRECISION", dict(linear.PRECISION))
    monkeypatch.setattr(linear, "SKIPPING", set(linear.SKIPPING))


def sparse(levels: Tensor, dense: Tensor) -> Tensor:
    return torch.sparse.mm(levels.to(dense.dtype).to_sparse(), dense)


def rounded(levels: Tensor, dense: Tensor) -> Tensor:
    return levels.float() @ dense.bfloat16().float()


class Favours:
    """A machine on which one kernel takes no time."""

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel

    def best(self, problem: Any, allowed: tuple[str, ...], compute: object = None) -> str:
        return self.kernel if self.kernel in allowed else "dense"


def levels() -> Delta:
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(N, N, generator=generator) > 0.9
    return Delta((kept * torch.randint(-9, 10, (N, N), generator=generator)).to(torch.int8), 0.1)


def test_it_stands_in_for_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    linear.register_kernel("sparse", sparse, skips=True)
    monkeypatch.setattr(choose, "chooser", lambda: Favours("sparse"))
    delta, weight, x = levels(), torch.randn(N, N), torch.randn(N, N)
    products = Products(delta)
    for work, expected in (
        (products.linear_input_grad(weight, (N, N)), reference.linear_input_grad(delta, weight, (N, N))),
        (products.linear_weight_grad(x), reference.linear_weight_grad(delta, x)),
    ):
        assert work.kernel == "sparse"
        torch.testing.assert_close(work.value, expected, rtol=1e-4, atol=1e-4)
        assert (
            work.executed == work.discounted == work.needed == pytest.approx(2 * N**3 * delta.nonzero_share)
        )


def test_one_that_rounds_is_taken_where_that_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    linear.register_kernel("rounded", rounded, precision="bfloat16")
    monkeypatch.setattr(choose, "chooser", lambda: Favours("rounded"))
    weight = torch.randn(N, N)
    found = {
        p: Products(levels(), p).linear_input_grad(weight, (N, N)) for p in ("float32", "bfloat16", "int8")
    }
    assert [work.kernel for work in found.values()] == [reference.NAME, "rounded", "rounded"]
    assert found["int8"].discounted == found["int8"].executed / 2 == N**3


@pytest.mark.parametrize(
    ("delta", "dense"),
    [
        (Delta(torch.randn(N, N)), torch.randn(N, N)),
        (levels(), torch.randn(N, N).bfloat16()),
    ],
    ids=["exact gradient", "bfloat16 operand"],
)
def test_it_gets_nothing_but_levels_and_float32(
    delta: Delta, dense: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear.register_kernel("sparse", sparse, skips=True)
    monkeypatch.setattr(choose, "chooser", lambda: Favours("sparse"))
    assert Products(delta, "int8").linear_input_grad(dense, (N, N)).kernel == reference.NAME


def test_it_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the others, also where these have been tried without it."""
    monkeypatch.setenv("RETROGRADE_CACHE", str(tmp_path))
    monkeypatch.setattr(choose, "_choosers", {})
    monkeypatch.setattr(choose, "fast_precision", lambda name: False)
    Products(levels()).linear_input_grad(torch.randn(N, N), (N, N))
    linear.register_kernel("sparse", sparse, skips=True)
    Products(levels()).linear_input_grad(torch.randn(N, N), (N, N))
    without, with_it = choose.chooser().answers.values()
    assert set(without["seconds"]) == {"dense", "skip"}
    assert "sparse" in with_it["seconds"]


def test_benchmarks_list_it() -> None:
    linear.register_kernel("sparse", sparse, skips=True)
    shape = contestants.Linear(8, 4, 3)
    assert "sparse" in contestants.kernels_for(shape)
    layer, x, delta = contestants.operands(shape)
    dx, dw = contestants.products(shape, layer.weight.detach(), x, delta, 1.0)["sparse"]()
    assert dx.shape == x.shape
    assert dw.shape == layer.weight.shape


def test_refusals() -> None:
    linear.register_kernel("sparse", sparse)
    linear.register_kernel("sparse", sparse)  # the same again
    with pytest.raises(OptionError, match="a kernel named 'sparse' is registered already"):
        linear.register_kernel("sparse", rounded)
    with pytest.raises(OptionError, match="a kernel named 'skip' is registered already"):
        linear.register_kernel("skip", sparse)
    with pytest.raises(OptionError, match="precision='int4' of 'other'"):
        linear.register_kernel("other", sparse, precision="int4")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="one word without spaces"):
        linear.register_kernel("my kernel", sparse)
