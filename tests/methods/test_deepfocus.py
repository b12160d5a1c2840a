"""DeepFocus: rates, thresholds, exact neutrality, unbiasedness, agreement across ranks, bitwise resumption."""

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import retrograde as rg
from cases import Turned, assert_bitwise, assert_same, batch, gradients, in_two_ranks, program, seeded, train
from retrograde.engine.branches import Residual
from retrograde.kernels import reference
from retrograde.kernels.dispatch import Products
from retrograde.maths.deepfocus import skip_share
from retrograde.methods.deepfocus import DeepFocus


def resnet(blocks: int = 6, width: int = 8) -> nn.Module:
    branches = (
        nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 12), nn.Tanh(), nn.Linear(12, width))
        for _ in range(blocks)
    )
    return nn.Sequential(nn.Linear(8, width), *(Residual(branch) for branch in branches), nn.Linear(width, 4))


def cnn() -> nn.Module:
    branch = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    return nn.Sequential(nn.Conv2d(3, 4, 3), Residual(branch), nn.Flatten(), nn.Linear(4 * 36, 4))


def turned() -> nn.Module:
    branch = nn.Sequential(nn.LayerNorm(8), Turned(8, 12), nn.Tanh(), Turned(12, 8))
    return nn.Sequential(Turned(8, 8), Residual(branch), Turned(8, 4))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet": (resnet, (6, 8)),
    "cnn": (cnn, (6, 3, 8, 8)),
    "turned": (turned, (6, 8)),
}
BUSY = DeepFocus(q_skip=0.6, q_full=0.2, p_max=0.3, warmup=2)


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, fullgraph=True, backend="aot_eager")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def shares(session: rg.Session) -> dict[str, float]:
    """Tier shares over all inner blocks."""
    blocks = list(session.metrics()["blocks"].values())[1:-1]
    return {tier: sum(b[tier] for b in blocks) / len(blocks) for tier in ("skip", "low", "full")}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("run", ["eager", "compiled"])
@pytest.mark.parametrize(
    "method",
    [DeepFocus(q_skip=0, q_full=1, warmup=0), DeepFocus(warmup=50), DeepFocus(q_skip=0, low=None, warmup=0)],
    ids=["all_full", "warmup", "low_exact"],
)
def test_neutral(method: DeepFocus, run: str, name: str) -> None:
    """Nothing skipped nor rounded: plain autograd's gradients to 1e-6, at every one of several steps."""
    make, shape = MODELS[name]
    model, plain = seeded(make), seeded(make)
    _session = rg.attach(model, method)
    forward = compiled(model) if run == "compiled" else None
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (model, plain)]
    for step in range(3):
        x = batch(shape, step)
        assert_same(gradients(model, x, forward), gradients(plain, x), 1e-6)
        for optimizer in optimizers:
            optimizer.step()
        plain.load_state_dict(model.state_dict())


def fixed(method: DeepFocus, draw: int, blocks: int = 6) -> tuple[nn.Module, rg.Session]:
    """A float64 model whose thresholds and means are set, so that routing is at its busiest."""
    model = seeded(lambda: resnet(blocks)).double()
    session = rg.attach(model, method, seed=draw)
    state = session.state_dict()
    for block in state["blocks"].values():
        block["rule"] |= {"alpha": 1.2, "beta": 1.3, "mean": 0.5}
        block["step"] = 1000
    session.load_state_dict(state)
    return model, session


@pytest.mark.parametrize("low", [None, "int8"])
def test_unbiased(low: Any) -> None:
    """600 draws through six residual blocks: the mean gradient within 4.5 standard errors of the dense one."""
    x, draws = batch((3, 8), dtype=torch.float64), 600
    expected = gradients(seeded(resnet).double(), x)
    model, session = fixed(DeepFocus(unbiased=True, p_min=0.3, p_max=0.5, low=low, warmup=0), 1)
    total = {n: torch.zeros_like(g) for n, g in expected.items()}
    squares = {n: torch.zeros_like(g) for n, g in expected.items()}
    for _ in range(draws):
        for n, g in gradients(model, x).items():
            total[n] += g
            squares[n] += g * g
    assert 0.2 < shares(session)["skip"] < 0.8
    scores = []
    for n, g in expected.items():
        mean = total[n] / draws
        error = ((squares[n] / draws - mean**2).clamp(min=0) / draws).sqrt()
        exact = error < 1e-12
        torch.testing.assert_close(mean[exact], g[exact])
        scores.append(((mean - g)[~exact] / error[~exact]).flatten())
    z = torch.cat(scores)
    assert float(z.abs().max()) < 4.5
    # A bias of a tenth of a standard deviation would show in the mean square.
    assert float(z.square().mean()) < 1.5


def test_biased_is_biased() -> None:
    """The same test sees the missing part when probes are not scaled: it can fail."""
    x, draws = batch((3, 8), dtype=torch.float64), 100
    expected = gradients(seeded(resnet).double(), x)["3.branch.1.weight"]
    model, _session = fixed(DeepFocus(p_min=0.3, p_max=0.5, low=None, warmup=0), 1)
    found = [gradients(model, x).get("3.branch.1.weight", torch.zeros_like(expected)) for _ in range(draws)]
    assert float(torch.stack(found).mean(0).norm() / expected.norm()) < 0.7


@pytest.mark.parametrize("low", ["int8", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_low_precision(name: str, low: Any) -> None:
    """Everything LOW: rounded, not equal, near the dense gradients by the format's error; counted at its discount."""
    make, shape = MODELS[name]
    model, x = seeded(make), batch(shape)
    session = rg.attach(model, DeepFocus(q_skip=0, q_full=0, low=low, warmup=0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    gradients(model, x)
    optimizer.step()
    before = session.flops()
    found, expected = gradients(model, x), gradients(seeded(make), x)
    assert shares(session)["low"] == 0.5
    for key, value in expected.items():
        error = float((found[key] - value).norm() / value.norm())
        assert error < (0.25 if low == "int8" else 0.05), key
        assert error > 0 or key.endswith("bias")
    after, discount = session.flops(), {"int8": 0.25, "bfloat16": 0.5}[low]
    executed = after.weight_grad.executed - before.weight_grad.executed
    assert after.weight_grad.discounted - before.weight_grad.discounted == pytest.approx(discount * executed)
    assert after.overhead > before.overhead


@pytest.mark.parametrize(("q_skip", "q_full"), [(0.5, 0.2), (0.3, 0.5)])
def test_rates(q_skip: float, q_full: float) -> None:
    """After the warm-up the shares are those asked for; the ends are never skipped."""
    model = seeded(lambda: resnet(2))
    method = DeepFocus(q_skip=q_skip, q_full=q_full, p_max=0.05, warmup=120)
    session = rg.attach(model, method, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    generator = torch.Generator().manual_seed(0)

    def run(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            scale = torch.randn((), generator=generator).exp()
            (scale * model(torch.randn(4, 8, generator=generator)).square().sum()).backward()
            optimizer.step()

    run(120)
    assert all(b["full"] == 1 for b in session.metrics(reset=True)["blocks"].values())
    run(300)
    found = shares(session)
    assert found["skip"] == pytest.approx(0.95 * q_skip, abs=0.05)
    assert found["full"] == pytest.approx(q_full, abs=0.05)
    blocks = session.metrics()["blocks"]
    assert blocks["0"]["skip"] == blocks["3"]["skip"] == 0
    assert blocks["0"]["low"] == pytest.approx(1 - q_full, abs=0.05)
    assert all(0 < b["alpha"] <= 0.95 * b["beta"] for b in blocks.values())
    assert blocks["1.branch"]["calls"] == 300


def test_random_controller() -> None:
    """At random: the stated shares, whatever the error."""
    model = seeded(resnet)
    method = DeepFocus(q_skip=0.6, q_full=0.3, controller="random", warmup=0, p_min=0.1, p_max=0.4)
    session = rg.attach(model, method, seed=0)
    train(model, torch.optim.SGD(model.parameters(), lr=0.01), (4, 8), 250)
    found = shares(session)
    assert found["skip"] == pytest.approx(skip_share(0.6, 0.1, 0.4), abs=0.04)
    assert found["full"] == pytest.approx(0.3, abs=0.04)
    assert session.metrics()["blocks"]["1.branch"]["alpha"] == 0.6


def test_large_errors_get_full_work() -> None:
    """The block's error decides: a gradient ten times the usual is FULL, a tenth of it LOW or SKIP."""
    model = seeded(resnet)
    session = rg.attach(model, DeepFocus(p_max=0.05, warmup=5), seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for scale, tier, least in ((1.0, None, 0.0), (10.0, "full", 1.0), (0.1, "skip", 0.5)):
        for _ in range(40 if tier is None else 1):
            optimizer.zero_grad()
            (scale * model(batch((4, 8))).square().sum()).backward()
            optimizer.step()
        if tier:
            assert shares(session)[tier] >= least
        session.metrics(reset=True)


def test_skipped_blocks_rest_in_training() -> None:
    """Under AdamW with weight decay, whatever was skipped in a step stays to the bit, norms and biases included."""
    model = seeded(resnet)
    session = rg.attach(model, BUSY, seed=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    rested = 0
    for step in range(30):
        session.metrics(reset=True)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        train(model, optimizer, (4, 8), 1, first=step)
        for name, figures in session.metrics()["blocks"].items():
            skipped = figures["skip"] == 1
            rested += skipped
            for n, p in model.named_parameters():
                if n.startswith(name + "."):
                    assert torch.equal(p, before[n]) == skipped, (step, n)
    assert rested > 20


def test_same_when_compiled() -> None:
    """Compiled and eager decide alike, count alike and end in the same weights."""
    for make, shape in MODELS.values():
        eager, fast = seeded(make), seeded(make)
        sessions = [
            rg.attach(m, DeepFocus(q_skip=0.6, p_max=0.3, warmup=2, low=None), seed=5) for m in (eager, fast)
        ]
        optimizers = [
            torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1) for m in (eager, fast)
        ]
        train(eager, optimizers[0], shape, 12)
        train(compiled(fast), optimizers[1], shape, 12)
        one, two = (s.metrics()["blocks"] for s in sessions)
        for block, figures in one.items():
            for tier in ("skip", "low", "full", "calls", "probes"):
                assert two[block][tier] == figures[tier], (block, tier)
        assert sessions[0].flops() == sessions[1].flops()
        assert_same(dict(fast.named_parameters()), dict(eager.named_parameters()), 1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool) -> None:
    """The same training bit for bit with the blocks checkpointed."""
    results = []
    for saving in (False, True):
        model = seeded(resnet)
        session = rg.attach(model, BUSY, seed=5)

        class Checkpointed(nn.Module):
            def forward(self, x: Tensor, model: Any = model, saving: bool = saving) -> Tensor:
                x = model[0](x)
                for block in model[1:-1]:
                    x = checkpoint(block, x, use_reentrant=reentrant) if saving else block(x)
                return model[-1](x)

        train(Checkpointed(), torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), (4, 8), 12)
        results.append((model.state_dict(), session.metrics()))
    assert_bitwise(results[1][0], results[0][0])
    assert results[1][1] == results[0][1]
    assert any(b["skip"] for b in results[0][1]["blocks"].values())


def test_accumulation() -> None:
    """Each micro-batch is decided on by itself; thresholds and means move once a step, by the mean over its calls."""
    model = seeded(resnet)
    session = rg.attach(model, DeepFocus(warmup=0), seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: list[float] = []
    model[1].branch.register_full_backward_hook(
        lambda m, i, o: seen.append(float(o[0].square().mean().sqrt()))
    )
    for step in range(2):
        optimizer.zero_grad()
        for part in range(3):
            torch.sin(model(batch((4, 8), 10 * step + part))).sum().backward()
        optimizer.step()
    figures = session.metrics()["blocks"]["1.branch"]
    assert figures["calls"] == 6
    first = sum(seen[:3]) / 3
    assert figures["full"] >= 0.5
    state = session.state_dict()["blocks"]["1.branch"]["rule"]
    assert state["step"] == [0, 0.0, 0, 0]
    assert 0.9 * first < state["mean"] < 1.1 * first
    assert state["alpha"] != 0.95


def test_autocast() -> None:
    """bfloat16 autocast with every tier at work: finite, counted, and near the plain run."""

    def run(methods: Any) -> tuple[nn.Module, Any]:
        model = seeded(resnet)
        session = rg.attach(model, methods, seed=1) if methods else None
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for step in range(20):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(batch((8, 8), step)).float().square().mean()
            loss.backward()
            optimizer.step()
        return model, session

    model, session = run(BUSY)
    plain, _ = run(None)
    found = shares(session)
    assert min(found.values()) > 0.02
    assert all(p.dtype == torch.float32 for p in model.parameters())
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert float((p - q).abs().max()) < 0.1


def test_non_finite_gradients_run_in_full() -> None:
    """An Inf is neither skipped nor learnt from: it reaches every parameter, and counts."""
    model = seeded(resnet)
    session = rg.attach(model, DeepFocus(q_skip=1, q_full=0, p_min=0.01, p_max=0.01, warmup=0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    train(model, optimizer, (4, 8), 5)
    before = session.state_dict()["blocks"]["3.branch"]["rule"]
    optimizer.zero_grad()
    (model(batch((4, 8))).sum() * math.inf).backward()
    assert not bool(model[3].branch[1].weight.grad.isfinite().all())
    after = session.state_dict()["blocks"]["3.branch"]["rule"]
    assert after == before
    assert session.metrics()["blocks"]["3.branch"]["fallbacks"] == 1
    assert session.summary().fallbacks >= 8


def test_resume_is_bitwise(tmp_path: Path) -> None:
    """Interrupted within an accumulation and resumed in new objects: weights, state and figures of the straight run."""

    def start() -> tuple[nn.Module, rg.Session, torch.optim.Optimizer]:
        model = seeded(resnet)
        session = rg.attach(model, BUSY, seed=8)
        return model, session, torch.optim.AdamW(model.parameters(), lr=0.01)

    def half_step(model: nn.Module, step: int) -> None:
        torch.sin(model(batch((4, 8), 500 + step))).square().mean().backward()

    def finish(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        half_step(model, 1)
        optimizer.step()
        train(model, optimizer, (4, 8), 10, first=12)

    model, session, optimizer = start()
    train(model, optimizer, (4, 8), 12)
    optimizer.zero_grad()
    half_step(model, 0)
    torch.save(
        [
            model.state_dict(),
            session.state_dict(),
            optimizer.state_dict(),
            {n: p.grad for n, p in model.named_parameters()},
        ],
        tmp_path / "state.pt",
    )
    finish(model, optimizer)
    twin, other, again = start()
    states = torch.load(tmp_path / "state.pt", weights_only=True)
    twin.load_state_dict(states[0])
    other.load_state_dict(states[1])
    again.load_state_dict(states[2])
    for n, p in twin.named_parameters():
        p.grad = states[3][n]
    finish(twin, again)
    assert_bitwise(twin.state_dict(), model.state_dict())
    assert other.state_dict() == session.state_dict()
    assert other.metrics() == session.metrics()
    assert shares(session)["skip"] > 0.1


def test_state_of_other_blocks_is_refused() -> None:
    session = rg.attach(seeded(resnet), DeepFocus())
    state = session.state_dict()
    del state["blocks"]["2.branch"]
    with pytest.raises(rg.errors.StateError):
        session.load_state_dict(state)


def worker(rank: int, folder: str) -> None:
    model = seeded(resnet)
    # Seeds that differ: decisions must agree all the same.
    session = rg.attach(model, BUSY, seed=rank)
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    decisions, rested = [], True
    for step in range(20):
        optimizer.zero_grad()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        session.metrics(reset=True)
        torch.sin(parallel(batch((4, 8), seed=10 * step + rank))).square().mean().backward()
        optimizer.step()
        blocks = session.metrics()["blocks"]
        decisions.append([(b["skip"], b["low"], b["full"]) for b in blocks.values()])
        for name in (n for n, b in blocks.items() if b["skip"] == 1):
            inside = [n for n in before if n.startswith(name + ".")]
            rested &= all(torch.equal(model.get_parameter(n), before[n]) for n in inside)
    torch.save(
        {"decisions": decisions, "rested": rested, "parameters": model.state_dict()},
        f"{folder}/rank{rank}.pt",
    )


def test_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Different data and seeds on each rank: the same decisions, the same weights, and skipped blocks rest."""
    in_two_ranks(worker, tmp_path, monkeypatch)
    one, two = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert one["decisions"] == two["decisions"]
    assert one["rested"]
    assert two["rested"]
    flat = [d for step in one["decisions"] for d in step]
    assert sum(d[0] for d in flat) > 15
    assert_bitwise(two["parameters"], one["parameters"])


@pytest.mark.parametrize(
    "options",
    [
        {"q_skip": 1.1},
        {"q_full": -0.1},
        {"q_skip": 0.6, "q_full": 0.5},
        {"p_min": 0.0},
        {"p_min": 0.5, "p_max": 0.4},
        {"h": -1.0},
        {"h": math.inf},
        {"warmup": -1},
        {"warmup": 1.0},
        {"momentum": 1.0},
        {"low": "int4"},
        {"controller": "vcas"},
    ],
)
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(rg.errors.OptionError, match="DeepFocus"):
        DeepFocus(**options)


@pytest.mark.parametrize("width", [8, 256])
def test_dithers_rounding_stays(width: int) -> None:
    """In a LOW call δ̃ is Dither's, to the bit; what LOW adds is that the other operands are rounded too."""

    def weight_grads(methods: list[rg.Method]) -> tuple[dict[str, Tensor], rg.Session]:
        model = seeded(lambda: nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)))
        session = rg.attach(model, methods, seed=1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        train(model, optimizer, (width, width), 2)
        return gradients(model, batch((width, width))), session

    # Nothing but LOW rounds: alone, Dither may take the 8 bits of a processor that is fast at them.
    dither = rg.Dither(scale=1.0, products="float32")
    low = DeepFocus(q_skip=0, q_full=0, low="int8", warmup=0)
    alone, one = weight_grads([dither])
    both, two = weight_grads([low, dither])
    figures = two.metrics()["layers"]["2"]
    assert figures["zeros"] == pytest.approx(one.metrics()["layers"]["2"]["zeros"])
    assert figures["zeros"] > figures["own_zeros"] + 0.2
    # dW of the last layer: the same δ̃ times x that is rounded; dx by no more than W's rounding.
    difference = float((both["2.weight"] - alone["2.weight"]).norm() / alone["2.weight"].norm())
    assert 0 < difference < 0.05
    assert (
        program(two.model[2]).total.weight_grad_discounted
        < program(one.model[2]).total.weight_grad_discounted
    )


def test_composes_with_dither() -> None:
    """Dither quantises whatever is not quantised yet; LOW calls have levels already or are left to it."""
    model = seeded(resnet)
    session = rg.attach(model, [rg.Dither(scale=1.0), BUSY], seed=2)
    train(model, torch.optim.SGD(model.parameters(), lr=0.05), (4, 8), 15)
    assert shares(session)["skip"] > 0.1
    assert session.summary().zeros > session.summary().own_zeros
    assert program(model[1].branch[1]).total.skipped > 0


def test_both_products_of_a_convolution_take_rounded_operands() -> None:
    """In LOW dx comes from the rounded weight, also where torch could compute it along with dW from the exact one."""
    layers = nn.Sequential(
        nn.Conv3d(8, 16, 3, padding=1), nn.Conv3d(16, 16, 3, padding=1), nn.Conv3d(16, 8, 3)
    )
    x = batch((4, 8, 8, 8, 8))
    model = copy.deepcopy(layers)
    rg.attach(model, rg.DeepFocus(warmup=0, q_skip=0.0, q_full=0.0), seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    used: list[Tensor] = []
    own = Products.convolution_input_grad

    def watched(self: Products, weight: Tensor, *args: Any) -> Any:
        used.append(weight)
        work = own(self, weight, *args)
        exact = reference.convolution_input_grad(self._delta, weight, *args)
        torch.testing.assert_close(work.value, exact)
        return work

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Products, "convolution_input_grad", watched)
        for _ in range(2):
            torch.sin(model(x)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert any(not any(torch.equal(weight, layer.weight) for layer in layers) for weight in used)
