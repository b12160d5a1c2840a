"""Every method × layer kind × way of running. A new method is one line in METHODS."""

import copy
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import retrograde as rg
from cases import assert_same, batch, gradients, in_two_ranks, seeded, train
from retrograde.errors import NoEffectError


@dataclass(frozen=True)
class Entry:
    """A method under test.

    Attributes:
        name: as in the table.
        make: the method as a user would set it.
        neutral: the setting that equals plain autograd; None when the method has none.
        exceptions: (layer kind, mode), either of them "*", → the reason why this cell is not claimed.
    """

    name: str
    make: Callable[[], rg.Method]
    neutral: Callable[[], rg.Method] | None
    exceptions: dict[tuple[str, str], str] = field(default_factory=dict)

    def excuse(self, kind: str, mode: str) -> str | None:
        keys = ((kind, mode), ("*", mode), (kind, "*"))
        return next((self.exceptions[key] for key in keys if key in self.exceptions), None)


NO_TRANSPOSED = {("transposed2d", "*"): "dendrites copy nn.Linear and nn.Conv1d to nn.Conv3d"}
METHODS = [
    Entry("dither", rg.Dither, lambda: rg.Dither(scale=0)),
    Entry(
        "dither-target", lambda: rg.Dither(1.0, target_sparsity=0.8), lambda: rg.Dither(scale=1e-7, bits=None)
    ),
    Entry("dither-int8", partial(rg.Dither, forward="int8"), None),
    Entry("decorrelate", partial(rg.Decorrelate, rank=2, every=2), None),
    Entry("decorrelate-full", partial(rg.Decorrelate, mode="full", every=1), None),
    Entry("decorrelate-precondition", partial(rg.Decorrelate, mode="precondition", rank=2, every=2), None),
    Entry("deepfocus", partial(rg.DeepFocus, warmup=1), partial(rg.DeepFocus, warmup=100)),
    Entry(
        "perforate",
        partial(rg.Perforate, max_dendrites=1),
        partial(rg.Perforate, max_dendrites=1),
        NO_TRANSPOSED,
    ),
    Entry(
        "perforate-perforated",
        partial(rg.Perforate, rule="perforated", max_dendrites=1),
        partial(rg.Perforate, rule="perforated", max_dendrites=1),
        NO_TRANSPOSED,
    ),
    Entry(
        "spectral",
        partial(rg.Spectral, rank=2, warmup=1, full_every=3, every=2),
        partial(rg.Spectral, rank=2, warmup=100),
    ),
]


@dataclass(frozen=True)
class Kind:
    """A small model around one layer kind, and its input."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]


def _wrap(layer: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(layer(), nn.Tanh(), layer())


KINDS = [
    Kind("linear", partial(_wrap, partial(nn.Linear, 6, 6)), (8, 6)),
    Kind("conv1d", partial(_wrap, partial(nn.Conv1d, 4, 4, 3, padding=1)), (4, 4, 9)),
    Kind("conv2d", partial(_wrap, partial(nn.Conv2d, 4, 4, 3, padding="same")), (4, 4, 6, 6)),
    Kind("conv2d-grouped", partial(_wrap, partial(nn.Conv2d, 4, 4, 3, padding=1, groups=2)), (4, 4, 6, 6)),
    Kind("conv3d", partial(_wrap, partial(nn.Conv3d, 2, 2, 3, padding=1)), (2, 2, 4, 4, 4)),
    Kind("transposed2d", partial(_wrap, partial(nn.ConvTranspose2d, 4, 4, 3, padding=1)), (4, 4, 6, 6)),
]


def attached(kind: Kind, method: rg.Method, seed: int = 3) -> tuple[nn.Module, rg.Session]:
    model = seeded(kind.make)
    return model, rg.attach(model, method, seed=seed)


def states(model: nn.Module) -> dict[str, Tensor]:
    return {n: v.clone() for n, v in model.state_dict().items()}


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def eager(method: Entry, kind: Kind, tmp_path: Path) -> None:
    """The neutral setting is autograd; the real one trains, counts, and undoes itself."""
    if method.neutral is not None:
        model, _session = attached(kind, method.neutral())
        assert_same(
            gradients(model, batch(kind.shape)), gradients(seeded(kind.make), batch(kind.shape)), 1e-5
        )
    model, session = attached(kind, method.make())
    keys = list(seeded(kind.make).state_dict())
    names = {id(p) for name, p in model.named_parameters() if name in keys}
    train(model, sgd(model), kind.shape, 3)
    assert session.step == 3
    assert set(keys) <= set(model.state_dict())
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert session.flops().dense > 0
    session.detach()
    assert names <= {id(p) for p in model.parameters()}
    assert [type(m) for m in model] == [type(m) for m in kind.make()]


def compiled(method: Entry, kind: Kind, tmp_path: Path) -> None:
    """Three compiled steps end where three eager ones do."""
    torch._dynamo.reset()
    found = []
    for fast in (False, True):
        model, _session = attached(kind, method.make())
        run: Any = torch.compile(model, fullgraph=True, backend="aot_eager") if fast else model
        train(run, sgd(model), kind.shape, 3)
        found.append(states(model))
    torch._dynamo.reset()
    assert_same(found[1], found[0], 1e-4)


def autocast(method: Entry, kind: Kind, tmp_path: Path) -> None:
    """bfloat16 autocast: master gradients stay float32, and near the exact ones in the neutral setting."""

    def forward(net: nn.Module) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                z = net(x)
            assert z.dtype == torch.bfloat16
            return z.float()

        return run

    model, _session = attached(kind, method.make())
    assert all(g.dtype == torch.float32 for g in gradients(model, batch(kind.shape), forward(model)).values())
    if method.neutral is not None:
        model, _session = attached(kind, method.neutral())
        assert_same(
            gradients(model, batch(kind.shape), forward(model)),
            gradients(seeded(kind.make), batch(kind.shape)),
            0.1,
        )


def checkpointing(method: Entry, kind: Kind, tmp_path: Path) -> None:
    """Recomputing the forward pass changes nothing, bit for bit."""
    found = []
    for saving in (False, True):
        model, _session = attached(kind, method.make())
        run = partial(checkpoint, model, use_reentrant=False) if saving else model
        train(run, sgd(model), kind.shape, 3)  # type: ignore[arg-type]
        found.append(states(model))
    assert_same(found[1], found[0], 0.0)


def accumulation(method: Entry, kind: Kind, tmp_path: Path) -> None:
    """Two micro-batches make one step; in the neutral setting their sum is the whole batch's gradient."""
    model, session = attached(kind, method.make())
    optimizer = sgd(model)
    for seed in (1, 2):
        torch.sin(model(batch(kind.shape, seed))).sum().backward()
    optimizer.step()
    assert session.step == 1
    if method.neutral is not None:
        model, _session = attached(kind, method.neutral())
        plain = seeded(kind.make)
        whole = torch.cat([batch(kind.shape, 1), batch(kind.shape, 2)])
        torch.sin(plain(whole)).sum().backward()
        for seed in (1, 2):
            torch.sin(model(batch(kind.shape, seed))).sum().backward()
        found, expected = (
            {n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (model, plain)
        )
        assert_same(found, expected, 1e-4)


def ddp(method: Entry, kind: Kind, tmp_path: Path) -> None:
    """Two gloo ranks with different data end with the same model, bit for bit, and with one that learnt."""
    started, *ends = _two_ranks(tmp_path)[method.name, kind.name]
    if isinstance(ends[0], str):
        pytest.fail(ends[0])
    assert_same(ends[1], ends[0], 0.0)
    assert all(torch.isfinite(value).all() for value in ends[0].values())
    assert not torch.equal(ends[0]["0.weight"], started["0.weight"])


_ranks: dict[tuple[str, str], list[Any]] = {}


def _two_ranks(folder: Path) -> dict[tuple[str, str], list[Any]]:
    """States of every cell: before, and at the end of both ranks. One pair of processes runs them all."""
    if not _ranks:
        with pytest.MonkeyPatch.context() as patch:
            in_two_ranks(_train_all, folder, patch)
        both = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
        for kind in KINDS:
            for method in METHODS:
                cell = method.name, kind.name
                _ranks[cell] = [seeded(kind.make).state_dict(), *(found.get(cell) for found in both)]
    return _ranks


def _train_all(rank: int, folder: str) -> None:
    found: dict[tuple[str, str], Any] = {}
    for kind in KINDS:
        for method in METHODS:
            if method.excuse(kind.name, "ddp") is not None:
                continue
            try:
                model, _session = attached(kind, method.make())
                parallel = nn.parallel.DistributedDataParallel(model)
                train(parallel, sgd(model), kind.shape, 3, first=10 * rank)
                found[method.name, kind.name] = states(model)
            except Exception:
                found[method.name, kind.name] = traceback.format_exc()
                raise
            finally:
                torch.save(found, f"{folder}/{rank}.pt")


def resume(method: Entry, kind: Kind, tmp_path: Path) -> None:
    """Two steps, a file, two more: the uninterrupted four, bit for bit."""
    model, session = attached(kind, method.make())
    optimizer = sgd(model)
    train(model, optimizer, kind.shape, 2)
    torch.save([model.state_dict(), optimizer.state_dict(), session.state_dict()], tmp_path / "state.pt")
    train(model, optimizer, kind.shape, 2, first=2)
    again, other = attached(kind, method.make(), seed=99)
    resumed = sgd(again)
    for part, state in zip(
        (again, resumed, other), torch.load(tmp_path / "state.pt", weights_only=True), strict=True
    ):
        part.load_state_dict(state)
    train(again, resumed, kind.shape, 2, first=2)
    assert_same(states(again), states(model), 0.0)


def fold(method: Entry, kind: Kind, tmp_path: Path) -> None:
    """After training, the folded copy has no trace of us and the same outputs; the model is untouched."""
    model, session = attached(kind, method.make())
    train(model, sgd(model), kind.shape, 2)
    before = copy.deepcopy(states(model))
    x = batch(kind.shape)
    folded = session.fold()
    assert not any(type(m).__module__.startswith("retrograde.engine") for m in folded.modules())
    torch.testing.assert_close(folded.eval()(x), model.eval()(x), rtol=1e-5, atol=1e-6)
    assert_same(states(model), before, 0.0)


MODES = {f.__name__: f for f in (eager, compiled, autocast, checkpointing, accumulation, ddp, resume, fold)}


@pytest.mark.conformance
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_conformance(
    method: Entry,
    kind: Kind,
    mode: str,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """One cell of the table that is printed at the end."""
    reason = method.excuse(kind.name, mode)
    if reason is not None:
        # What is not claimed is refused in so many words, not left out in silence.
        with pytest.raises(NoEffectError, match=reason):
            attached(kind, method.make())
        record_property("reason", reason)
        return
    MODES[mode](method, kind, tmp_path)
