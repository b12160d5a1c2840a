"""What is a residual branch and what only has the name of one, by passes that leave no trace."""

import copy
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import retrograde as rg
from cases import assert_bitwise, batch, seeded
from retrograde.engine.branches import find_branches
from retrograde.engine.residual import trace

GREEDY = rg.DeepFocus(warmup=2, q_skip=1.0, q_full=0.0, p_min=1e-6, p_max=1e-6, low=None)
"""Skips whatever it may, from the third step on."""


class Down(nn.Module):
    """An encoder's step, called as a residual block is, with nothing added."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)
        self.downsample = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.downsample(F.relu(self.bn2(self.conv2(x))))


class Gate(nn.Module):
    """Squeeze and excitation: the gradient goes round it through a product, not a sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 2, 1), nn.Conv2d(2, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


class Inverted(nn.Module):
    """As timm writes it; with a gate before the sum."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv_pw, self.bn1 = nn.Conv2d(inputs, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.conv_dw, self.bn2, self.se = nn.Conv2d(12, 12, 3, 1, 1, groups=12), nn.BatchNorm2d(12), Gate(12)
        self.conv_pwl, self.bn3 = nn.Conv2d(12, outputs, 1), nn.BatchNorm2d(outputs)
        self.has_skip = inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv_pw(x)), inplace=True)
        y = self.bn3(self.conv_pwl(self.se(F.relu(self.bn2(self.conv_dw(y))))))
        return y + x if self.has_skip else y


class Block(nn.Module):
    """Two sub-blocks after norms; `turns` makes it one that no made-up input fits."""

    def __init__(self, *, adds: bool = True, parallel: bool = False, turns: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attn, self.mlp = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.adds, self.parallel, self.turns = adds, parallel, turns

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor] | None = None) -> Tensor:
        if self.turns:
            cos, sin = turn  # type: ignore[misc]
            x = x * cos + x * sin
        if self.parallel:
            return x + self.attn(self.norm1(x)) + self.mlp(self.norm2(x))
        y = self.attn(self.norm1(x))
        x = x + y if self.adds else y
        y = self.mlp(self.norm2(x))
        return x + y if self.adds else y


class PostNorm(nn.Module):
    """The sum lies inside a child that is given both terms."""

    class Output(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

        def forward(self, y: Tensor, x: Tensor) -> Tensor:
            return self.norm(self.dense(y) + x)

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.output = nn.Linear(8, 8), PostNorm.Output()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.output(torch.tanh(self.inner(x)), x)


class Stack(nn.Module):
    """Blocks that are given a tuple too, as rotary embeddings are."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.first, self.blocks, self.last = nn.Linear(8, 8), nn.ModuleList(blocks), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x, (torch.ones(8), torch.zeros(8)))
        return self.last(x)


class Mixer(nn.Module):
    """Layers over positions, and a shortcut of fewer parameters than its branch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.tokens, self.shortcut = nn.LayerNorm(8), nn.Linear(5, 5), nn.Linear(8, 8, bias=False)
        self.tokens2 = nn.Linear(5, 5, bias=False)
        self.narrow = nn.Linear(5, 5).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.tokens2(F.gelu(self.narrow(self.tokens(self.norm(x).mT)))).mT
        return self.shortcut(x) + y


class Cross(nn.Module):
    """Attention to a memory that has no other way: neither all of it nor one of its parts is a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return x + F.scaled_dot_product_attention(self.q(x), self.k(memory), self.v(memory))


FOUND: dict[str, tuple[Callable[[], nn.Module], dict[str, set[str]]]] = {
    "encoder": (lambda: Down(3, 4), {}),
    "gate": (lambda: Gate(4), {}),
    "inverted": (
        lambda: Inverted(4, 4),
        {"bn3": {"conv_pw", "bn1", "conv_dw", "bn2", "se", "conv_pwl", "bn3"}},
    ),
    "inverted without a sum": (lambda: Inverted(4, 6), {}),
    "pre-norm": (Block, {"attn": {"norm1", "attn"}, "mlp": {"norm2", "mlp"}}),
    "parallel": (lambda: Block(parallel=True), {"attn": {"norm1", "attn"}, "mlp": {"norm2", "mlp"}}),
    "chain": (lambda: Block(adds=False), {}),
    "mixer": (Mixer, {"tokens2": {"norm", "tokens", "narrow", "tokens2"}}),
    "cross-attention": (Cross, {}),
    "post-norm": (PostNorm, {"output.dense": {"inner", "output.dense"}}),
}


@pytest.mark.parametrize("name", FOUND)
def test_trace(name: str) -> None:
    """By the graph, whatever modules are called."""
    make, expected = FOUND[name]
    found = trace(make())
    assert found is not None
    assert {branch.name: set(branch.members) for branch in found} == expected


def test_trace_leaves_no_trace() -> None:
    """No buffer, random number, gradient, hook, attribute or class is another afterwards."""

    class Counting(Block):
        calls = 0

        def forward(self, x: Tensor, turn: Any = None) -> Tensor:
            self.calls += 1
            x = x + torch.rand(1) * random.random()
            return super().forward(F.dropout(x), turn)

    net = nn.Sequential(Inverted(4, 4), nn.Flatten(2), Counting())
    net[0].register_forward_hook(lambda *_: pytest.fail("a hook of the user's ran"))
    before, classes = copy.deepcopy(net.state_dict()), [type(m) for m in net.modules()]
    states = torch.get_rng_state(), random.getstate()
    assert len(find_branches(net)) == 3
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert_bitwise(net.state_dict(), before)
    assert all(p.grad is None and p.device.type == "cpu" for p in net.parameters())
    assert [type(m) for m in net.modules()] == classes
    assert (net[2].calls, net.training, len(net[0]._forward_hooks)) == (0, True, 1)


def steps_without_gradient(
    model: nn.Module, method: rg.DeepFocus, shape: tuple[int, ...], weight: str, steps: int = 12
) -> tuple[int, rg.Session]:
    session = rg.attach(model, method, seed=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    lost = 0
    for step in range(steps):
        torch.sin(model(batch(shape, seed=step))).square().mean().backward()
        lost += model.get_parameter(weight).grad is None
        optimizer.step()
        optimizer.zero_grad()
    return lost, session


def test_what_only_has_the_name_is_not_a_branch() -> None:
    make = nn.Sequential(Down(3, 4), Down(4, 4), Down(4, 4), nn.Flatten(), nn.Linear(64, 3))
    lost, session = steps_without_gradient(make, GREEDY, (2, 3, 32, 32), "0.conv1.weight")
    assert lost == 0
    assert {row.kind for row in session.plan.blocks} == {"chain"}


def test_called_as_a_branch() -> None:
    """Where no made-up input fits, the first pass of training decides, and says so."""
    net = seeded(lambda: Stack(*[Block(turns=True) for _ in range(2)], *[Block(turns=True, adds=False)]))
    plan = rg.make_plan(net, [GREEDY])
    assert [row.name for row in plan.blocks if row.kind == "branch"] == [
        f"blocks.{i}.{part}" for i in range(3) for part in ("attn", "mlp")
    ]
    assert "first pass of training" in plan.blocks[1].why
    with pytest.warns(rg.errors.RetrogradeWarning, match="is not a residual branch") as caught:
        lost, session = steps_without_gradient(net, GREEDY, (2, 5, 8), "first.weight")
    assert lost == 0
    assert len(caught) == 2
    figures = session.metrics()["blocks"]
    for name, block in figures.items():
        # The first and the last one, layers outside of branches, never are.
        assert (block["skip"] > 0) is name.startswith(("blocks.0", "blocks.1")), name
    whys = {row.name: row.why for row in session.plan.blocks}
    assert "has shown that the gradient goes round it" in whys["blocks.0.attn"]
    assert "never skipped" in whys["blocks.2.mlp"]
    # Nothing but the boundaries is left of the pass.
    assert type(net.blocks[0]) is Block
    assert pickle.loads(pickle.dumps(net)).state_dict().keys() == net.state_dict().keys()


def test_named_by_the_user() -> None:
    """Trusted, by name, until a pass shows that nothing goes round it; the sum may lie further out."""

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            return self.body(x), None

    class Outer(nn.Module):
        def __init__(self, *, adds: bool) -> None:
            super().__init__()
            self.part, self.adds = Wrapped(), adds

        def forward(self, x: Tensor, turn: Any) -> Tensor:
            y, _ = self.part(x)
            return x + y if self.adds else y

    net = seeded(lambda: Stack(Outer(adds=True), Outer(adds=False), Outer(adds=True)))
    method = rg.DeepFocus(**{**GREEDY.__dict__, "warmup": 0, "blocks": ("blocks.*.part.body",)})
    with pytest.warns(rg.errors.RetrogradeWarning, match=r"blocks\.1\.part\.body"):
        lost, session = steps_without_gradient(net, method, (2, 5, 8), "first.weight")
    assert lost == 0
    shares = {name: block["skip"] for name, block in session.metrics()["blocks"].items()}
    assert shares["blocks.0.part.body"] > 0
    assert shares["blocks.1.part.body"] == 0


def test_a_tuple_crosses_by_its_first_item() -> None:
    """Attention returns its weights beside its output."""

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor, turn: Any) -> Tensor:
            return x + self.attention(x, x, x)[0]

    net = seeded(lambda: Stack(*[Attends() for _ in range(3)]))
    lost, session = steps_without_gradient(net, GREEDY, (2, 5, 8), "first.weight")
    assert lost == 0
    assert session.metrics()["blocks"]["blocks.1.attention"]["skip"] > 0


def test_a_decoder_does_not_cut_its_memory_off() -> None:
    """Cross-attention is skipped where the encoder's gradient does not depend on it."""

    class Seq2Seq(nn.Module):
        def __init__(self, *, trained: bool) -> None:
            super().__init__()
            self.encoder = nn.Linear(8, 8).requires_grad_(trained)
            self.first = nn.Linear(8, 8)
            layers = [nn.TransformerDecoderLayer(8, 2, 16, 0.0, batch_first=True) for _ in range(3)]
            self.layers, self.last = nn.ModuleList(layers), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            memory, y = self.encoder(x), self.first(x)
            for layer in self.layers:
                y = layer(y, memory)
            return self.last(y)

    for trained in (True, False):
        net = seeded(lambda trained=trained: Seq2Seq(trained=trained))
        if trained:
            with pytest.warns(rg.errors.RetrogradeWarning, match="mha_block"):
                lost, session = steps_without_gradient(net, GREEDY, (2, 5, 8), "encoder.weight")
            assert lost == 0
        else:
            _, session = steps_without_gradient(net, GREEDY, (2, 5, 8), "first.weight")
        share = session.metrics()["blocks"]["layers.1.mha_block"]["skip"]
        assert (share > 0) is not trained
