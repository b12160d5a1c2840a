"""Every method × layer kind × way of running, by `retrograde.testing`. A new method is one line in METHODS."""

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import decorrelate_step
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import retrograde as rg
from cases import in_two_ranks
from retrograde.engine import ranks
from retrograde.errors import NoEffectError
from retrograde.testing import CHECKS, LAYERS, Case, Layer, check_method, declined
from retrograde.testing.cases import Make, optimizer_of, require_same, state_of, train


@dataclass(frozen=True)
class Entry:
    """A method under test.

    Attributes:
        name: as in the table.
        make: the method, set to act within a few steps.
        neutral: the setting that equals plain autograd, or that does so until it has learnt something.
        tolerance: of a neutral gradient.
        explicit: what one step must be once it acts, where that can be written down.
    """

    name: str
    make: Callable[[], rg.Method]
    neutral: Make
    tolerance: float = 1e-5
    explicit: Callable[[Case], None] | None = None

    def case(self, kind: Layer) -> Case:
        # Attention in training multiplies in another order than torch's class.
        tolerance = max(self.tolerance, 1e-5 if kind.name == "attention" else 0)
        return Case(self.make, kind, self.neutral, tolerance)


METHODS = [
    Entry("exact", rg.Exact, rg.Exact),
    Entry("dither", rg.Dither, lambda: rg.Dither(scale=0)),
    Entry(
        "dither-target", lambda: rg.Dither(1.0, target_sparsity=0.8), lambda: rg.Dither(scale=1e-7, bits=None)
    ),
    Entry("dither-int8", partial(rg.Dither, forward="int8"), lambda: rg.Dither(0, forward="int8"), 0.05),
    *(
        Entry(f"decorrelate{name}", make, make, 1e-6, decorrelate_step.check)
        for name, make in (
            ("", partial(rg.Decorrelate, rank=2, every=2)),
            ("-full", partial(rg.Decorrelate, mode="full", every=1)),
            ("-precondition", partial(rg.Decorrelate, mode="precondition", rank=2, every=2)),
        )
    ),
    Entry("deepfocus", partial(rg.DeepFocus, warmup=1), partial(rg.DeepFocus, warmup=100)),
    *(
        Entry(name, make, make)
        for name, make in (
            ("perforate", partial(rg.Perforate, where="*", max_dendrites=2, patience=1, limit=2)),
            (
                "perforate-perforated",
                partial(
                    rg.Perforate,
                    rule="perforated",
                    where="*",
                    max_dendrites=1,
                    patience=1,
                    limit=1,
                    candidate_limit=1,
                ),
            ),
        )
    ),
    Entry(
        "spectral",
        partial(rg.Spectral, rank=2, warmup=1, full_every=3, every=2),
        partial(rg.Spectral, rank=2, warmup=100),
    ),
]
DECLINES = {
    (name, "attention"): "multiplies by this weight itself" for name in ("perforate", "perforate-perforated")
}
"""(method, layer kind) → why this cell is not claimed."""
COMPILED = ("linear", "linear-turned", "conv2d-grouped", "transposed2d", "attention")
"""Layer kinds that are compiled: those left out are of the same maps."""


def ddp(case: Case, method: Entry, tmp_path: Path) -> None:
    """Two gloo ranks with different data end with the same model, bit for bit, and with one that learnt."""
    started, *ends = _two_ranks(tmp_path)[method.name, case.layer.name][:3]
    if isinstance(ends[0], str):
        pytest.fail(ends[0])
    require_same(ends[1], ends[0], 0.0, "The ranks' models differ.")
    assert all(torch.isfinite(value).all() for value in ends[0].values())
    assert any(not torch.equal(ends[0][name], value) for name, value in started.items())


def fsdp(case: Case, method: Entry, tmp_path: Path) -> None:
    """Sharded over two ranks a model learns what it learns in DDP."""
    _, replicated, _, sharded, _ = _two_ranks(tmp_path)[method.name, case.layer.name]
    if isinstance(sharded, str):
        pytest.fail(sharded)
    require_same(sharded, replicated, 1e-5, "Sharded and replicated models differ.")


_ranks: dict[tuple[str, str], list[Any]] = {}


def _two_ranks(folder: Path) -> dict[tuple[str, str], list[Any]]:
    """States of every cell: before, and at the end of both ranks, in DDP and sharded.

    One pair of processes runs them all.
    """
    if not _ranks:
        with pytest.MonkeyPatch.context() as patch:
            in_two_ranks(_train_all, folder, patch)
        both = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
        for kind in LAYERS:
            for method in METHODS:
                cell = method.name, kind.name
                ends = [found.get((*cell, how)) for how in _PARALLEL for found in both]
                _ranks[cell] = [state_of(method.case(kind).plain()), *ends]
    return _ranks


def _train_all(rank: int, folder: str) -> None:
    found: dict[tuple[str, str, str], Any] = {}
    for kind in LAYERS:
        for method in METHODS:
            if (method.name, kind.name) in DECLINES:
                continue
            for how, parallel in _PARALLEL.items():
                try:
                    case = method.case(kind)
                    model, session = case.attached()
                    wrapped = parallel(model)
                    train(case, wrapped, optimizer_of(model), 4, session=session, first=10 * rank)
                    found[method.name, kind.name, how] = _whole(state_of(model))
                except Exception:
                    found[method.name, kind.name, how] = traceback.format_exc()
                    raise
                finally:
                    torch.save(found, f"{folder}/{rank}.pt")


def _whole(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: ranks.whole(value) for name, value in state.items()}


_PARALLEL: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": nn.parallel.DistributedDataParallel,
    "fsdp": fully_shard,
}

CELLS = [
    (method, kind, mode)
    for method in METHODS
    for kind in LAYERS
    for mode in (*CHECKS, "explicit", "ddp", "fsdp")
    if (mode != "compiled" or kind.name in COMPILED) and (mode != "explicit" or method.explicit is not None)
]


@pytest.mark.conformance
@pytest.mark.parametrize(
    ("method", "kind", "mode"),
    [pytest.param(*cell, id=f"{cell[0].name}-{cell[1].name}-{cell[2]}") for cell in CELLS],
)
def test_conformance(
    method: Entry, kind: Layer, mode: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """One cell of the table that is printed at the end."""
    case, expected = method.case(kind), DECLINES.get((method.name, kind.name), "")
    if expected:
        # What is not claimed is refused in so many words, not left out in silence.
        reason = declined(method.make, kind)
        assert expected in reason
        with pytest.raises(NoEffectError, match=expected):
            rg.attach(case.plain(), method.make())
        record_property("reason", reason)
    elif mode in ("ddp", "fsdp"):
        {"ddp": ddp, "fsdp": fsdp}[mode](case, method, tmp_path)
    elif mode == "explicit":
        assert method.explicit is not None
        method.explicit(case)
    else:
        check_method(
            method.make, neutral=method.neutral, layers=[kind], checks=[mode], tolerance=case.tolerance
        )
