"""Blocks: where they are found, what skipping one does to gradients and parameters, and that nothing is left behind."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import retrograde as rg
from cases import assert_same, batch, gradients, program, seeded
from retrograde.engine.branches import Residual, find_branches
from retrograde.engine.maps import base
from retrograde.engine.slots import Block, BlockCall, BlockRule, Grant

SKIP, LOW, FULL = rg.Tier.SKIP, rg.Tier.LOW, rg.Tier.FULL


class _Fixed(BlockRule):
    def __init__(self, grants: list[Grant], log: list[float]) -> None:
        self.grants, self.log = grants, log

    def gate(self, call: BlockCall) -> Grant:
        self.log.append(float(call.delta.abs().sum()))
        return self.grants[min(len(self.log), len(self.grants)) - 1]


class _Halve(rg.Rule):
    """Halves δ on the LOW tier."""

    def delta(self, call: rg.Call, delta: rg.Delta) -> rg.Delta:
        return rg.Delta(delta.values * 0.5) if call.tier is LOW else delta


class Script(rg.Method):
    """Grants as written down: block name → one grant, or one for each call (the last one goes on)."""

    name = "script"

    def __init__(self, blocks: Sequence[str] | None = None, **grants: Any) -> None:
        self.patterns = blocks
        self.grants = {k.replace("__", "."): v if isinstance(v, list) else [v] for k, v in grants.items()}
        self.seen: dict[str, list[float]] = {}

    def branches(self, model: nn.Module) -> Sequence[Block]:
        return find_branches(model, self.patterns)

    def block_rules(self, blocks: Sequence[Block]) -> Sequence[BlockRule]:
        assert self.grants.keys() <= {block.name for block in blocks}
        self.seen = {block.name: [] for block in blocks}
        grants = {n: [g if isinstance(g, Grant) else Grant(g) for g in v] for n, v in self.grants.items()}
        return [_Fixed(grants.get(b.name, [Grant(FULL)]), self.seen[b.name]) for b in blocks]

    def make_rule(self, site: rg.Site) -> rg.Rule:
        return _Halve(site.name)


def branch() -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), Residual(branch()), Residual(branch()), nn.Linear(8, 4))


def reference(dead: Sequence[int]) -> nn.Module:
    """Plain autograd with the branches `dead` detached from the graph."""
    net = seeded(model)
    for i in dead:
        net[i].branch.register_forward_hook(lambda module, x, y: y.detach())
    return net


@pytest.fixture(params=["eager", "compiled"])
def runner(request: pytest.FixtureRequest) -> Iterator[Callable[[nn.Module], Any]]:
    torch._dynamo.reset()
    if request.param == "eager":
        yield lambda net: net
    else:
        yield lambda net: torch.compile(net, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()


def nonzero(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in found.items() if value.any()}


# Finding.


class Basic(nn.Module):
    """As torchvision writes it."""

    def __init__(self, inputs: int, outputs: int, *, norm: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        if norm:
            self.bn2 = nn.BatchNorm2d(outputs)
        self.norm = norm
        self.downsample = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.relu(self.bn1(self.conv1(x))))
        if self.norm:
            out = self.bn2(out)
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class PreActivation(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.shortcut = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x))
        return self.conv2(F.relu(self.bn2(self.conv1(y)))) + self.shortcut(y)


def test_found() -> None:
    """Names, kinds and members of every sort of branch; what is in no branch is a chain; model order."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        Basic(4, 6),
        Basic(6, 6, norm=False),
        PreActivation(6),
        Residual(nn.Conv2d(6, 6, 1)),
    )
    plan = rg.make_plan(net, [Script()])
    rows = {row.name: (row.kind, row.layers) for row in plan.blocks}
    assert rows == {
        "0": ("chain", ("0",)),
        "1.bn2": ("branch", ("1.conv1", "1.conv2")),
        "1.downsample": ("chain", ("1.downsample",)),
        "2.conv2": ("branch", ("2.conv1", "2.conv2")),
        "3.conv2": ("branch", ("3.conv1", "3.conv2")),
        "3.shortcut": ("chain", ("3.shortcut",)),
        "4.branch": ("branch", ("4.branch",)),
    }
    assert list(rows) == [row.name for row in plan.blocks]
    assert plan.to_dict()["blocks"][1]["why"] == "added to what goes round it"
    assert "added to what goes round it" in str(plan)
    # The first norm of a pre-activation block feeds its shortcut too, so it does not rest with the branch.
    (block,) = find_branches(net[3])
    assert block.members == (net[3].conv1, net[3].bn2, net[3].conv2)


@pytest.mark.parametrize("first", [True, False])
def test_transformer_layers_found(first: bool) -> None:
    """Norms belong to a sub-block exactly when they come before it."""
    options = {"nhead": 2, "dim_feedforward": 16, "batch_first": True, "norm_first": first}
    encoder, decoder = nn.TransformerEncoderLayer(8, **options), nn.TransformerDecoderLayer(8, **options)
    blocks = {block.name: set(block.members) for block in find_branches(encoder)}
    norms = [{norm} if first else set() for norm in (encoder.norm1, encoder.norm2)]
    assert blocks == {
        "sa_block": {encoder.self_attn} | norms[0],
        "ff_block": {encoder.linear1, encoder.linear2} | norms[1],
    }
    assert [b.name for b in find_branches(decoder)] == ["sa_block", "mha_block", "ff_block"]


def test_attention_belongs_to_its_block() -> None:
    """Both projections are layers of the attention's sub-block; outside of branches each is a chain of its own."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    rows = {row.name: row for row in rg.make_plan(layer, [Script()]).blocks}
    assert {name: row.layers for name, row in rows.items()} == {
        "sa_block": ("self_attn", "self_attn.out_proj"),
        "ff_block": ("linear1", "linear2"),
    }
    rows = {row.name: row for row in rg.make_plan(Attending(), [Script()]).blocks}
    assert {name: (row.kind, row.layers) for name, row in rows.items()} == {
        name: ("chain", (name,)) for name in ("attention", "attention.out_proj")
    }


def test_named_blocks() -> None:
    """Patterns choose among found branches and add modules; what cannot be one is refused."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.mlp = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.mlp(self.norm(x))

    net = nn.Sequential(Own(), Residual(branch()), nn.Linear(8, 8))
    assert [b.name for b in find_branches(net)] == ["1.branch", "0.mlp"]
    assert find_branches(net)[1].members == (net[0].norm, net[0].mlp)
    assert [b.name for b in find_branches(net, ["*.norm", "*.branch"])] == ["0.norm", "1.branch"]
    assert find_branches(net, []) == ()
    with pytest.raises(rg.errors.PatternError, match="no branch and no module"):
        find_branches(net, ["*.attn"])
    with pytest.raises(rg.errors.OptionError, match=r"nn\.Sequential"):
        find_branches(net, ["2"])


def test_blocks_that_are_left() -> None:
    """A branch that holds a layer which `skip` leaves alone, and a frozen one, are not gated; the plan says why."""
    net = seeded(model)
    net[2].requires_grad_(False)
    rows = {row.name: row for row in rg.make_plan(net, [Script()], skip="1.branch.3").blocks}
    assert rows["1.branch"].status == "left"
    assert "1.branch.3" in rows["1.branch"].why
    assert rows["1.branch.1"].kind == "chain"
    assert "frozen" in rows["2.branch"].why


def test_two_gating_methods_are_refused() -> None:
    class Other(Script):
        name = "other"

    with pytest.raises(rg.errors.OptionError, match="script and other"):
        rg.make_plan(seeded(model), [Script(), Other()])


# Tiers.


def test_full_is_plain(runner: Callable[[nn.Module], Any]) -> None:
    net = seeded(model)
    _session = rg.attach(net, Script())
    assert_same(gradients(net, batch((5, 8)), runner(net)), gradients(seeded(model), batch((5, 8))), 1e-6)


def test_skipped_branch(runner: Callable[[nn.Module], Any]) -> None:
    """Everything else has the gradient of a model whose branch is detached; the branch has none, or zeros."""
    net = seeded(model)
    session = rg.attach(net, Script(**{"1__branch": [FULL, SKIP]}))
    run = runner(net)
    gradients(net, batch((5, 8)), run)
    found = gradients(net, batch((5, 8)), run)
    assert_same(nonzero(found), gradients(reference([1]), batch((5, 8))), 1e-5)
    if run is net:
        assert not any(name.startswith("1.branch") for name in found)
    figures = session.metrics()["blocks"]["1.branch"]
    assert (figures["skip"], figures["full"], figures["calls"]) == (0.5, 0.5, 2)


def test_a_hook_of_a_skipped_parameter_gets_zeros() -> None:
    """Hooks that scale or clip are called with a tensor; the parameter rests all the same."""
    net, plain = seeded(model), reference([1])
    seen: list[Tensor] = []

    def clip(gradient: Tensor) -> Tensor:
        seen.append(gradient)
        return gradient.clamp(-1, 1) * 0.5

    for name in ("1.branch.1.weight", "1.branch.3.bias"):
        net.get_parameter(name).register_hook(clip)
    _session = rg.attach(net, Script(**{"1__branch": SKIP}))
    optimizer = torch.optim.SGD(net.parameters(), 0.1, weight_decay=0.1)
    x = batch((5, 8))
    before = {name: p.clone() for name, p in net.named_parameters()}
    found = gradients(net, x)
    assert len(seen) == 2
    assert not any(gradient.any() for gradient in seen)
    optimizer.step()
    expected = gradients(plain, x)
    assert_same({n: g for n, g in found.items() if n in expected}, expected)
    still = {name for name, p in net.named_parameters() if torch.equal(p, before[name])}
    assert still == {name for name in before if name.startswith("1.")}


def test_pruned_work_is_counted(runner: Callable[[nn.Module], Any]) -> None:
    """Half the calls skipped: the branch's dense work stays, its backward work halves, at any batch size."""
    net = seeded(model)
    _session = rg.attach(net, Script(**{"1__branch": [FULL, SKIP]}))
    run = runner(net)
    gradients(net, batch((5, 8)), run)
    gradients(net, batch((15, 8)), run)
    for layer, size in ((net[1].branch[1], 8 * 12), (net[1].branch[3], 12 * 8)):
        total = program(layer).total
        assert (total.calls, total.skipped) == (2, 1)
        assert total.forward_executed == total.input_grad_dense == total.weight_grad_dense == 2 * 20 * size
        assert total.input_grad_executed == total.weight_grad_executed == 2 * 5 * size


def test_pruning_runs_nothing() -> None:
    """No backward op of the branch runs: only the boundary's own arithmetic is left."""

    class Spy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.set_materialize_grads(False)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Tensor | None:
            seen.append(grads[0] is None)
            return grads[0]

    class Watched(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Spy.apply(x)

    seen: list[bool] = []
    net = nn.Sequential(
        nn.Linear(8, 8), Residual(nn.Sequential(Watched(), nn.Linear(8, 8), nn.ReLU())), nn.Linear(8, 4)
    )
    _session = rg.attach(net, Script(**{"1__branch": [SKIP, FULL]}))
    gradients(net, batch((5, 8)))
    gradients(net, batch((5, 8)))
    assert seen == [True, False]


def test_scaled_branch(runner: Callable[[nn.Module], Any]) -> None:
    """The scale multiplies δ of a branch."""
    net = seeded(model)
    _session = rg.attach(net, Script(**{"2__branch": Grant(FULL, 4.0)}))
    plain = seeded(model)
    plain[2].branch.register_forward_hook(lambda module, x, y: 4 * y - 3 * y.detach())
    assert_same(gradients(net, batch((5, 8)), runner(net)), gradients(plain, batch((5, 8))), 1e-5)


def test_chain(runner: Callable[[nn.Module], Any]) -> None:
    """In a chain SKIP drops dW alone, and the scale is on dW alone."""
    plain = gradients(seeded(model), batch((5, 8)))
    for grant, factor in ((Grant(SKIP), 0.0), (Grant(FULL, 3.0), 3.0)):
        net = seeded(model)
        _session = rg.attach(net, Script(**{"3": grant}))
        assert_same(
            gradients(net, batch((5, 8)), runner(net)), plain | {"3.weight": factor * plain["3.weight"]}, 1e-5
        )


def test_layers_read_their_innermost_block(runner: Callable[[nn.Module], Any]) -> None:
    """LOW outside and FULL inside, and the other way round."""

    def nested() -> nn.Module:
        return nn.Sequential(
            nn.Linear(8, 8), Residual(nn.Sequential(nn.Linear(8, 8), Residual(nn.Linear(8, 8))))
        )

    plain = gradients(seeded(nested), batch((5, 8)))
    for outer, inner in ((LOW, FULL), (FULL, LOW)):
        net = seeded(nested)
        _session = rg.attach(net, Script(**{"1__branch": outer, "1__branch__1__branch": inner}))
        found = gradients(net, batch((5, 8)), runner(net))
        weight = "1.branch.1.branch.weight"
        torch.testing.assert_close(found[weight], plain[weight] * (0.5 if inner is LOW else 1))
        assert [program(m).block.block.name for m in (net[0], net[1].branch[0], net[1].branch[1].branch)] == [
            "0",
            "1.branch",
            "1.branch.1.branch",
        ]


def test_nested_pruning(runner: Callable[[nn.Module], Any]) -> None:
    """A block inside a pruned one is asked nothing and counts nothing."""

    def nested() -> nn.Module:
        inner = Residual(nn.Linear(8, 8))
        return nn.Sequential(
            nn.Linear(8, 8), Residual(nn.Sequential(nn.Linear(8, 8), inner)), nn.Linear(8, 4)
        )

    net = seeded(nested)
    script = Script(**{"1__branch": [FULL, SKIP]})
    session = rg.attach(net, script)
    run = runner(net)
    for _ in range(3):
        gradients(net, batch((5, 8)), run)
    assert session.metrics()["blocks"]["1.branch.1.branch"]["calls"] == 1
    assert len(script.seen["1.branch.1.branch"]) == 1
    total = program(net[1].branch[1].branch).total
    assert total.weight_grad_dense == total.forward_dense == 3 * 2 * 5 * 64
    assert total.weight_grad_executed == 2 * 5 * 64


def test_two_calls_in_one_pass(runner: Callable[[nn.Module], Any]) -> None:
    """A block called twice decides twice, last call first, and its layers follow the right decision."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Residual(nn.Sequential(nn.Linear(8, 8), nn.Tanh()))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * self.inner(x + 1)

    class Reference(Twice):
        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * (x + 1 + self.inner.branch(x + 1).detach())

    net = seeded(Twice)
    session = rg.attach(net, Script(**{"inner__branch": [SKIP, FULL]}))
    assert_same(gradients(net, batch((5, 8)), runner(net)), gradients(seeded(Reference), batch((5, 8))), 1e-5)
    assert session.metrics()["blocks"]["inner.branch"]["skip"] == 0.5


def test_pruned_attention(runner: Callable[[nn.Module], Any]) -> None:
    """A skipped attention block passes nothing back into either projection, and its work is counted as left out."""

    def make() -> nn.Module:
        return nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)

    net, plain = seeded(make), seeded(make)
    session = rg.attach(net, Script(**{"sa_block": [FULL, SKIP]}))
    run, x = runner(net), batch((3, 5, 8))
    assert_same(gradients(net, x, run), gradients(plain, x), 1e-5)
    found = nonzero(gradients(net, x, run))
    assert not any(name.startswith("self_attn") for name in found)
    for layer, size in ((net.self_attn, 8 * 24), (net.self_attn.out_proj, 8 * 8)):
        total = program(layer).total
        assert (total.calls, total.skipped) == (2, 1)
        assert total.forward_executed == total.weight_grad_dense == 2 * (2 * 15 * size)
        assert total.input_grad_executed == total.weight_grad_executed == 2 * 15 * size
    assert session.metrics()["blocks"]["sa_block"]["skip"] == 0.5


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_checkpointing(reentrant: bool, inside: bool) -> None:
    """Checkpointed around a residual, or inside its branch: the same gradients and counts, each call decided once."""

    class Checkpointed(nn.Module):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.body = body

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.body, x, use_reentrant=reentrant)

    def make(saving: bool) -> nn.Module:
        def wrap(body: nn.Module) -> nn.Module:
            return Checkpointed(body) if saving else nn.Sequential(body)

        middle = Residual(wrap(branch())) if inside else wrap(Residual(branch()))
        return nn.Sequential(nn.Linear(8, 8), middle, nn.Linear(8, 4))

    name = "1.branch" if inside else "1.0.branch"
    results = []
    for saving in (False, True):
        net = seeded(lambda s=saving: make(s))
        key = name if inside or not saving else "1.body.branch"
        script = Script(**{key.replace(".", "__"): [FULL, SKIP]})
        session = rg.attach(net, script)
        gradients(net, batch((5, 8)))
        found = nonzero(gradients(net, batch((5, 8))))
        assert len(script.seen[key]) == 2
        results.append(([*found.values()], session.flops()))
    assert len(results[0][0]) == len(results[1][0])
    for one, two in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(one, two)
    assert results[0][1] == results[1][1]


def test_convolutional_blocks(runner: Callable[[nn.Module], Any]) -> None:
    """torchvision's block adds in place to the boundary's output; a branch that ends in a layer has it there."""
    for norm, name in ((True, "1__bn2"), (False, "1__conv2")):

        def make(norm: bool = norm) -> nn.Module:
            return nn.Sequential(
                nn.Conv2d(3, 4, 3), Basic(4, 4, norm=norm), nn.Flatten(), nn.Linear(4 * 16, 3)
            )

        x = batch((4, 3, 6, 6))
        net, plain = seeded(make), seeded(make)
        _session = rg.attach(net, Script(**{name: [FULL, SKIP]}))
        run = runner(net)
        assert_same(gradients(net, x, run), gradients(plain, x), 1e-5)
        last = plain[1].bn2 if norm else plain[1].conv2
        last.register_forward_hook(lambda module, x, y: y.detach().clone())
        expected = gradients(plain, x)
        found = nonzero(gradients(net, x, run))
        assert_same({k: v for k, v in found.items() if k in expected}, expected, 1e-5)
        assert found.keys() == expected.keys()


@pytest.mark.parametrize("first", [True, False])
def test_transformer_sub_blocks(first: bool, runner: Callable[[nn.Module], Any]) -> None:
    """Attention or feed-forward pruned on its own, in training; eval and its fast path are untouched."""

    def make() -> nn.Module:
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=first)
        return nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))

    x = batch((3, 5, 8))
    for part in ("sa", "ff"):
        net, plain = seeded(make), seeded(make)
        session = rg.attach(net, Script(**{f"1__layers__1__{part}_block": SKIP}))
        layer = plain[1].layers[1]
        original = getattr(layer, f"_{part}_block")
        object.__setattr__(layer, f"_{part}_block", lambda *a, f=original, **k: f(*a, **k).detach())
        found, expected = nonzero(gradients(net, x, runner(net))), nonzero(gradients(plain, x))
        assert_same(found, expected, 1e-5)
        prefix = "self_attn" if part == "sa" else "linear"
        assert not any(name.startswith(f"1.layers.1.{prefix}") for name in found)
        with torch.no_grad():
            torch.testing.assert_close(net.eval()(x), seeded(make).eval()(x))
        session.detach()
        assert type(net[1].layers[1]) is nn.TransformerEncoderLayer


# Parameters at the step.


def optimizers() -> dict[str, Callable[[Any], torch.optim.Optimizer]]:
    return {
        "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
        "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1),
        "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    }


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("name", optimizers())
def test_skipped_parameters_rest(name: str, to_none: bool, runner: Callable[[nn.Module], Any]) -> None:
    """Neither momentum, moments nor weight decay move a skipped branch (norm, biases and all), nor a chain's weight."""
    net = seeded(model)
    session = rg.attach(net, Script(**{"1__branch": [FULL, FULL, SKIP, FULL], "3": [FULL, FULL, SKIP, FULL]}))
    run, optimizer = runner(net), optimizers()[name](net.parameters())
    moved = []
    for step in range(4):
        optimizer.zero_grad(set_to_none=to_none)
        before = {n: p.detach().clone() for n, p in net.named_parameters()}
        torch.sin(run(batch((5, 8), step))).sum().backward()
        optimizer.step()
        moved.append({n for n, p in net.named_parameters() if not torch.equal(p, before[n])})
    everything = {n for n, _ in net.named_parameters()}
    resting = {n for n in everything if n.startswith("1.branch")} | {"3.weight"}
    assert moved == [everything, everything, everything - resting, everything]
    assert session.step == 4


class Turned(nn.Module):
    """A linear layer whose weight lies as (i, o) under a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.bias = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kernel + self.bias


class Attending(nn.Module):
    """Attention in no branch."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


CHAINS: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "linear": (lambda: nn.Linear(8, 8), "1", "1.weight"),
    "turned": (Turned, "1", "1.kernel"),
    "attention": (Attending, "1.attention", "1.attention.in_proj_weight"),
    "parametrised": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
        "1",
        "1.parametrizations.weight.original",
    ),
}


@pytest.mark.parametrize("kind", CHAINS)
def test_skipped_weight_of_a_chain_rests(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the weight is called: momentum does not move it, and everything else moves."""
    monkeypatch.setattr(base, "_KINDS", dict(base._KINDS))
    rg.register_layer(Turned, rg.LinearKind(turned=True, weight="kernel"))
    make, chain, weight = CHAINS[kind]
    net = seeded(lambda: nn.Sequential(nn.Linear(8, 8), make(), nn.Linear(8, 4)))
    _session = rg.attach(net, Script(**{chain.replace(".", "__"): [FULL, SKIP]}))
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    moved = []
    for step in range(2):
        optimizer.zero_grad()
        before = {n: p.detach().clone() for n, p in net.named_parameters()}
        torch.sin(net(batch((2, 5, 8), step))).sum().backward()
        optimizer.step()
        moved.append({n for n, p in net.named_parameters() if not torch.equal(p, before[n])})
    assert moved[0] - moved[1] == {n for n in before if n.startswith(weight)}
    assert moved[1] < moved[0]


def test_accumulation() -> None:
    """Of two micro-batches one skipped: the parameters move, by the other's gradient; both skipped: they rest."""
    net = seeded(model)
    _session = rg.attach(net, Script(**{"1__branch": [FULL, SKIP, SKIP, SKIP]}))
    optimizer = torch.optim.SGD(net.parameters(), 0.1, weight_decay=0.1)
    weight = net[1].branch[1].weight
    for moves in (True, False):
        before = weight.detach().clone()
        optimizer.zero_grad()
        for part in range(2):
            torch.sin(net(batch((5, 8), part))).sum().backward()
        optimizer.step()
        assert torch.equal(weight, before) is not moves


def test_tied_parameters_move() -> None:
    """A weight that a skipped branch shares with a part that ran is moved by that part, its decay included."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner, self.last = nn.Linear(8, 8), Residual(nn.Linear(8, 8)), nn.Embedding(8, 8)
            self.inner.branch.weight = self.last.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.first(x)) @ self.last.weight

    net = seeded(Tied)
    _session = rg.attach(net, Script(**{"inner__branch": SKIP}))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    before, bias = net.last.weight.detach().clone(), net.inner.branch.bias.detach().clone()
    torch.sin(net(batch((5, 8)))).sum().backward()
    optimizer.step()
    assert not torch.equal(net.last.weight, before)
    assert torch.equal(net.inner.branch.bias, bias)


def test_two_optimizers() -> None:
    """Each block steps with the optimizer that owns it."""
    net = seeded(model)
    script = Script()
    session = rg.attach(net, script)
    one = torch.optim.SGD([*net[0].parameters(), *net[1].parameters()], 0.1)
    two = torch.optim.SGD([*net[2].parameters(), *net[3].parameters()], 0.1)
    for optimizer in (one, one, two):
        torch.sin(net(batch((5, 8)))).sum().backward()
        optimizer.step()
    assert [session._blocks[n].step for n in ("0", "1.branch", "2.branch", "3")] == [2, 2, 1, 1]


# Attaching leaves no trace.


def test_attach_and_detach() -> None:
    """Parameters, keys and hooks stay the same objects; classes come back; the root of a slice runs."""
    net = seeded(model)
    classes = [type(m) for m in net.modules()]
    parameters = {n: id(p) for n, p in net.named_parameters()}
    keys = list(net.state_dict())
    session = rg.attach(net, Script())
    assert type(net[1].branch).__name__ == "RetrogradeSequential"
    assert isinstance(net[1].branch, nn.Sequential)
    assert {n: id(p) for n, p in net.named_parameters()} == parameters
    assert list(net.state_dict()) == keys
    assert net[1].branch[:2](batch((2, 8))).shape == (2, 12)
    with pytest.raises(rg.errors.AttachError, match="attached already"):
        rg.attach(net[1].branch, Script())
    session.detach()
    assert [type(m) for m in net.modules()] == classes
    assert all("_retrograde_blocks" not in m.__dict__ for m in net.modules())
    assert_same(gradients(net, batch((5, 8))), gradients(seeded(model), batch((5, 8))), 0.0)


@pytest.mark.parametrize("way", ["fold", "deepcopy", "pickle", "save"])
def test_copies_are_plain(way: str) -> None:
    net = nn.Sequential(
        seeded(model), nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True), Residual(nn.Linear(4, 4))
    )
    session = rg.attach(net, Script())
    if way == "pickle":
        data = pickle.dumps(net)
        assert b"retrograde.engine.blocks" not in data
        assert b"Attached" not in data
        twin = pickle.loads(data)
    elif way == "save":
        buffer = io.BytesIO()
        torch.save(net, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    else:
        twin = session.fold() if way == "fold" else copy.deepcopy(net)
    assert not any(type(m).__name__.startswith("Retrograde") for m in twin.modules())
    assert type(twin[0][1].branch) is nn.Sequential
    assert type(twin[1]) is nn.TransformerEncoderLayer
    x = batch((3, 5, 8))
    torch.testing.assert_close(twin(x), net(x))
    assert twin.state_dict().keys() == net.state_dict().keys()
    assert twin[0][1].branch[1].weight is not net[0][1].branch[1].weight


def test_changed_class_is_reported() -> None:
    net = seeded(model)
    session = rg.attach(net, Script())
    own = type(net[1].branch)
    net[1].branch.__class__ = type("Else", (own,), {})
    with pytest.raises(rg.errors.DetachError, match=r"1\.branch"):
        session.detach()
    net[1].branch.__class__ = own
    session.detach()


def test_paused_and_eval() -> None:
    """Where the methods are off, no block decides anything."""
    net = seeded(model)
    script = Script(**{"1__branch": SKIP})
    session = rg.attach(net, script)
    plain = gradients(seeded(model), batch((5, 8)))
    with session.paused():
        assert_same(gradients(net, batch((5, 8))), plain, 0.0)
    assert_same(gradients(net.eval(), batch((5, 8))), plain, 0.0)
    assert script.seen["1.branch"] == []


def test_errors() -> None:
    """A block of several outputs, and a gradient of a gradient, are refused where they happen."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"y": self.linear(x), "x": x}

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = Pair()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.pair(x)["y"]

    net = Holder()
    _session = rg.attach(net, Script(["pair"]))
    with pytest.raises(rg.errors.OptionError, match="'pair' returns a dict"):
        net(batch((5, 8)))
    net = nn.Sequential(nn.Linear(8, 8), Residual(nn.Linear(8, 8)))
    _other = rg.attach(net, Script())
    z = torch.sin(net[1](batch((5, 8)).requires_grad_())).sum()
    with pytest.raises(rg.errors.DoubleBackwardError, match=r"1\.branch"):
        torch.autograd.grad(z, net[1].branch.weight, create_graph=True)


def test_transforms_are_refused_by_the_blocks_name() -> None:
    """Many gradients at once reach the boundary before any layer."""
    net = nn.Sequential(nn.Linear(8, 8), Residual(nn.Linear(8, 8)))
    _session = rg.attach(net, Script())
    x = batch((5, 8)).requires_grad_()
    deltas = torch.eye(8)
    for way in (
        lambda y: torch.autograd.grad(y, x, deltas, is_grads_batched=True),
        lambda y: torch.func.vmap(lambda d: torch.autograd.grad(y, x, d))(deltas),
    ):
        with pytest.raises(rg.errors.TransformError, match=r"block '1\.branch'.*session\.paused"):
            way(net(x).sum(0))
