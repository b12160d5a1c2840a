"""`nn.MultiheadAttention`, attached whole: in training it is torch's own, product by product."""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import retrograde as rg
from cases import assert_same, batch, gradients, program, seeded, train

DOUBLE = torch.float64
WIDTH, HEADS, BATCH, QUERIES, KEYS = 8, 2, 3, 5, 4
TOLERANCE = 1e-10


def attention(**options: Any) -> nn.MultiheadAttention:
    """Biases and all away from zero, where torch starts them."""
    layer = nn.MultiheadAttention(WIDTH, HEADS, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape))
    return layer


def inputs(kind: str, *, batch_first: bool, batched: bool = True) -> list[Tensor]:
    """Query, key and value: one tensor, two, or three."""

    def sequence(length: int, seed: int) -> Tensor:
        shape = (BATCH, length, WIDTH) if batch_first else (length, BATCH, WIDTH)
        return batch(shape if batched else (length, WIDTH), seed, DOUBLE)

    if kind == "self":
        return [sequence(QUERIES, 1)] * 3
    if kind == "encoder-decoder":
        return [sequence(QUERIES, 1), *[sequence(KEYS, 2)] * 2]
    return [sequence(QUERIES, 1), sequence(KEYS, 2), sequence(KEYS, 3)]


def found_of(
    layer: nn.Module, x: list[Tensor], call: dict[str, Any]
) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """Output, weights, and the gradients of a loss that depends on both."""
    layer.zero_grad(set_to_none=True)
    leaves = {id(t): t.detach().clone().requires_grad_() for t in x}
    z, weights = layer(*(leaves[id(t)] for t in x), **call)
    ramp = torch.linspace(-1.0, 1.0, z.numel(), dtype=DOUBLE).view(z.shape)
    loss = (torch.sin(z) * ramp).sum()
    if weights is not None:
        slope = torch.linspace(-1.0, 2.0, weights.numel(), dtype=DOUBLE).view(weights.shape)
        loss = loss + (weights.square() * slope).sum()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    for number, leaf in enumerate(leaves.values()):
        gradients[f"input {number}"] = leaf.grad
    return z.detach(), None if weights is None else weights.detach(), gradients


def compare(
    make: Callable[[], nn.Module], x: list[Tensor], seed: int | None = None, **call: Any
) -> nn.Module:
    """Attached in training equals plain, outputs and all gradients; `seed` is torch's, for both."""
    plain, attached = seeded(make).double(), seeded(make).double()
    session = rg.attach(nn.ModuleList([attached]), rg.Dither(scale=0))
    assert [row.status for row in session.plan.rows] == ["attached", "attached"]
    results = []
    for layer in (plain, attached):
        if seed is not None:
            torch.manual_seed(seed)
        results.append(found_of(layer, x, call))
    (z, weights, expected), (mine, my_weights, found) = results
    assert mine.shape == z.shape
    torch.testing.assert_close(mine, z, rtol=0, atol=TOLERANCE)
    assert (my_weights is None) == (weights is None)
    if weights is not None:
        assert my_weights.shape == weights.shape
        torch.testing.assert_close(my_weights, weights, rtol=0, atol=TOLERANCE)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=TOLERANCE, msg=name)
    assert program(attached).calls == len({id(t) for t in x})
    assert program(attached.out_proj).calls == 1
    return attached


INPUTS = ("self", "encoder-decoder", "three")
NEEDED = {
    "attended alone": {"need_weights": False},
    "mean weights": {"need_weights": True},
    "weights of each head": {"need_weights": True, "average_attn_weights": False},
}


def padding(kind: str, x: list[Tensor], *, batched: bool = True) -> Tensor:
    """Leaves the first key of every example to all queries."""
    length = QUERIES if x[0] is x[1] else KEYS
    mask = torch.rand((BATCH, length), generator=torch.Generator().manual_seed(4)) < 0.4
    mask[:, 0] = False
    if kind == "float":
        mask = torch.where(mask, -torch.inf, batch((BATCH, length), 6, DOUBLE))
    return mask if batched else mask[0]


def blocking(kind: str, x: list[Tensor], *, batched: bool = True) -> Tensor:
    """2-D, or one for each example and head, boolean or to be added."""
    length = QUERIES if x[0] is x[1] else KEYS
    form, kind = kind.split()
    lead = () if form == "2-D" else ((BATCH if batched else 1) * HEADS,)
    mask = torch.rand((*lead, QUERIES, length), generator=torch.Generator().manual_seed(5)) < 0.4
    mask[..., 0] = False
    return mask if kind == "bool" else torch.where(mask, -torch.inf, batch(tuple(mask.shape), 7, DOUBLE))


# In training it computes what torch's own does.


@pytest.mark.parametrize("needed", NEEDED)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", INPUTS)
def test_equals_plain(kind: str, batch_first: bool, needed: str) -> None:
    compare(
        lambda: attention(batch_first=batch_first), inputs(kind, batch_first=batch_first), **NEEDED[needed]
    )


@pytest.mark.parametrize("needed", NEEDED)
@pytest.mark.parametrize("kind", INPUTS)
def test_unbatched(kind: str, needed: str) -> None:
    """A sequence alone, with masks of both sorts."""
    x = inputs(kind, batch_first=True, batched=False)
    compare(attention, x, **NEEDED[needed])
    compare(
        attention,
        x,
        key_padding_mask=padding("bool", x, batched=False),
        attn_mask=blocking("3-D bool", x, batched=False),
        **NEEDED[needed],
    )


@pytest.mark.parametrize("needed", NEEDED)
@pytest.mark.parametrize("sort", ["bool", "float"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", INPUTS)
def test_key_padding_mask(kind: str, batch_first: bool, sort: str, needed: str) -> None:
    x = inputs(kind, batch_first=batch_first)
    mask = padding(sort, x)
    compare(lambda: attention(batch_first=batch_first), x, key_padding_mask=mask, **NEEDED[needed])


@pytest.mark.parametrize("needed", NEEDED)
@pytest.mark.parametrize("padded", [None, "bool", "float"])
@pytest.mark.parametrize("form", ["2-D bool", "2-D float", "3-D bool", "3-D float"])
@pytest.mark.parametrize("kind", ["self", "encoder-decoder"])
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask and attn_mask:UserWarning")
def test_attn_mask(kind: str, form: str, padded: str | None, needed: str) -> None:
    """For all examples and heads, or for each; with padding masked besides, of the same type or another."""
    x = inputs(kind, batch_first=True)
    masks = {} if padded is None else {"key_padding_mask": padding(padded, x)}
    compare(lambda: attention(batch_first=True), x, attn_mask=blocking(form, x), **masks, **NEEDED[needed])


@pytest.mark.parametrize("needed", NEEDED)
@pytest.mark.parametrize("padded", [False, True])
def test_is_causal(padded: bool, needed: str) -> None:
    """The hint stands for the mask, or goes with it."""
    x = inputs("self", batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(QUERIES, dtype=DOUBLE)
    masks = {"key_padding_mask": padding("float", x)} if padded else {}
    attached = compare(
        lambda: attention(batch_first=True), x, attn_mask=mask, is_causal=True, **masks, **NEEDED[needed]
    )
    # What comes later plays no part.
    later = x[0].clone()
    later[:, 3:] += 1
    z, _ = attached(x[0], x[0], x[0], attn_mask=mask, is_causal=True, need_weights=False)
    other, _ = attached(later, later, later, attn_mask=mask, is_causal=True, need_weights=False)
    torch.testing.assert_close(other[:, :3], z[:, :3])
    assert not torch.allclose(other[:, 3:], z[:, 3:])


def test_a_hint_without_a_mask_is_refused_as_by_torch() -> None:
    layer = attention(batch_first=True).double()
    x = inputs("self", batch_first=True)
    with pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"):
        layer(*x, is_causal=True, need_weights=False)
    _session = rg.attach(layer, rg.Dither(scale=0))
    with pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"):
        layer(*x, is_causal=True, need_weights=False)


OPTIONS: dict[str, dict[str, Any]] = {
    "bias": {"bias": False},
    "add_bias_kv": {"add_bias_kv": True},
    "add_zero_attn": {"add_zero_attn": True},
    "all": {"bias": False, "add_bias_kv": True, "add_zero_attn": True},
    "same widths given": {"kdim": WIDTH, "vdim": WIDTH},
}


@pytest.mark.parametrize("needed", NEEDED)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", INPUTS)
def test_options(kind: str, option: str, masked: bool, needed: str) -> None:
    x = inputs(kind, batch_first=True)
    masks = {"key_padding_mask": padding("bool", x), "attn_mask": blocking("3-D bool", x)} if masked else {}
    compare(lambda: attention(batch_first=True, **OPTIONS[option]), x, **masks, **NEEDED[needed])


@pytest.mark.parametrize("needed", NEEDED)
@pytest.mark.parametrize("batch_first", [True, False])
def test_dropout(batch_first: bool, needed: str) -> None:
    """Drops what torch would have dropped after the same seed, and something else after another."""
    x = inputs("self", batch_first=batch_first)

    def make() -> nn.Module:
        return attention(batch_first=batch_first, dropout=0.4)

    attached = compare(make, x, seed=5, **NEEDED[needed])
    torch.manual_seed(5)
    one, _ = attached(*x, **NEEDED[needed])
    other, _ = attached(*x, **NEEDED[needed])
    assert not torch.allclose(one, other)
    attached.eval()
    assert torch.equal(attached(*x, **NEEDED[needed])[0], attached(*x, **NEEDED[needed])[0])


@pytest.mark.parametrize("needed", NEEDED)
@pytest.mark.parametrize("batch_first", [True, False])
def test_dropout_behind(batch_first: bool, needed: str) -> None:
    """The output lies in memory as torch's does: a dropout draws its mask in that order."""
    x = inputs("self", batch_first=batch_first)
    layer = attention(batch_first=batch_first).to(x[0].dtype)
    plain = layer(*x, **NEEDED[needed])[0]
    rg.attach(layer, rg.Dither(scale=0))
    attached = layer(*x, **NEEDED[needed])[0]
    assert attached.stride() == plain.stride()
    torch.manual_seed(5)
    expected = nn.functional.dropout(plain, 0.5)
    torch.manual_seed(5)
    assert torch.equal(nn.functional.dropout(attached, 0.5) == 0, expected == 0)


def test_dropout_trains() -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.2, batch_first=True)
    session = rg.attach(layer, rg.Dither(scale=0.5))
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.03)
    x, target = batch((16, QUERIES, WIDTH)), batch((16, QUERIES, WIDTH), 2).mean(1, keepdim=True)

    def loss() -> Tensor:
        return (layer(x, x, x, need_weights=False)[0] - target).square().mean()

    layer.eval()
    before = float(loss())
    layer.train()
    for _ in range(40):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    layer.eval()
    assert float(loss()) < 0.7 * before
    assert session.step == 40


@pytest.mark.parametrize("frozen", ["in_proj_weight", "in_proj_bias", "out_proj.weight", "bias_k"])
@pytest.mark.parametrize("kind", INPUTS)
def test_frozen_parameters(kind: str, frozen: str) -> None:
    """Get no gradient, and take nobody else's."""

    def make() -> nn.Module:
        layer = attention(batch_first=True, add_bias_kv=True)
        layer.get_parameter(frozen).requires_grad_(False)
        return layer

    compare(make, inputs(kind, batch_first=True))


@pytest.mark.parametrize("needed", NEEDED)
def test_autocast(needed: str) -> None:
    """The same dtypes as plain autocast, and nearly its values; float64 is left alone."""

    def make() -> nn.Module:
        return attention(batch_first=True)

    plain, attached = seeded(make), seeded(make)
    _session = rg.attach(attached, rg.Dither(scale=0))
    mask = blocking("2-D float", inputs("self", batch_first=True)).float()

    def forward(net: nn.Module) -> Any:
        def run(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                z, weights = net(x, x, x, attn_mask=mask, **NEEDED[needed])
            dtypes.append((z.dtype, None if weights is None else weights.dtype))
            return z.float()

        return run

    dtypes: list[Any] = []
    x = batch((BATCH, QUERIES, WIDTH))
    assert_same(gradients(attached, x, forward(attached)), gradients(plain, x, forward(plain)), 0.05)
    assert dtypes[0] == dtypes[1]
    assert dtypes[0][0] == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "x"),
    [({"kdim": 6, "vdim": 4}, (6, 4)), ({"kdim": 6}, (6, WIDTH)), ({"vdim": 4}, (WIDTH, 4))],
    ids=["both", "kdim", "vdim"],
)
def test_other_widths_are_left(options: dict[str, int], x: tuple[int, int]) -> None:
    """Their projections are not packed: the plan says so, and the layer is torch's own."""
    layer = attention(batch_first=True, **options)
    model = nn.ModuleDict({"attention": layer, "head": nn.Linear(WIDTH, 3)})
    session = rg.attach(model, rg.Dither(scale=2.0))
    row = next(row for row in session.plan.rows if row.name == "attention")
    assert row.status == "left"
    assert "kdim, vdim" in row.why
    assert "not packed" in row.why
    assert type(layer) is nn.MultiheadAttention
    q, k, v = batch((2, QUERIES, WIDTH)), batch((2, KEYS, x[0]), 2), batch((2, KEYS, x[1]), 3)
    plain = seeded(lambda: attention(batch_first=True, **options))
    plain.load_state_dict(layer.state_dict())
    for net in (layer, plain):
        net(q, k, v)[0].square().sum().backward()
    for mine, theirs in zip(layer.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


# What a method does to it.


@pytest.mark.parametrize("kind", INPUTS)
def test_noise_is_drawn_for_each_product(kind: str) -> None:
    """Dithered gradients differ from the exact ones, are unbiased, and are drawn anew in every pass."""
    torch.manual_seed(0)
    layer = attention(batch_first=True).double()
    x = inputs(kind, batch_first=True)
    _, _, exact = found_of(layer, x, {})
    _session = rg.attach(layer, rg.Dither(scale=1.0, bits=None), seed=3)
    draws = [found_of(layer, x, {})[2]["in_proj_weight"] for _ in range(400)]
    assert not torch.equal(draws[0], draws[1])
    found = torch.stack(draws)
    error = (found.mean(0) - exact["in_proj_weight"]).abs()
    # Of 192 entries' means, few lie four standard errors off.
    far = error > 4 * found.std(0) / 20 + 1e-12
    assert float(far.double().mean()) < 0.02


def test_hooks_and_states_stay() -> None:
    """Hooks run as before; keys stay, and classes come back."""
    model = nn.ModuleDict({"attention": attention(batch_first=True), "head": nn.Linear(WIDTH, 2)})
    keys, parameters = list(model.state_dict()), [id(p) for p in model.parameters()]
    x = batch((BATCH, QUERIES, WIDTH))
    seen: list[str] = []
    model["attention"].register_forward_pre_hook(lambda *_: seen.append("before"))
    model["attention"].register_forward_hook(lambda *_: seen.append("after"))
    session = rg.attach(model, rg.Dither(scale=0))
    model["attention"](x, x, x)
    assert seen == ["before", "after"]
    assert list(model.state_dict()) == keys
    assert [id(p) for p in model.parameters()] == parameters
    assert isinstance(model["attention"], nn.MultiheadAttention)
    session.detach()
    assert type(model["attention"]) is nn.MultiheadAttention
    assert type(model["attention"].out_proj) is type(nn.MultiheadAttention(8, 2).out_proj)


def test_only_one_of_the_two() -> None:
    """With its output projection left out, the attention is attached all the same, and equals plain."""
    plain, attached = (seeded(lambda: attention(batch_first=True)).double() for _ in range(2))
    session = rg.attach(attached, rg.Dither(scale=0), skip="out_proj")
    assert type(attached.out_proj) is type(plain.out_proj)
    x = inputs("self", batch_first=True)
    expected, found = found_of(plain, x, {})[2], found_of(attached, x, {})[2]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=TOLERANCE)
    assert session.metrics()["layers"].keys() == {"(root)"}


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "fold"])
def test_copies_are_plain(how: str) -> None:
    layer = attention(batch_first=True)
    session = rg.attach(layer, rg.Dither())
    twin = {
        "deepcopy": lambda: copy.deepcopy(layer),
        "pickle": lambda: pickle.loads(pickle.dumps(layer)),
        "fold": session.fold,
    }[how]()
    assert type(twin) is nn.MultiheadAttention
    assert type(twin.out_proj) is type(nn.MultiheadAttention(8, 2).out_proj)
    x = batch((BATCH, QUERIES, WIDTH))
    torch.testing.assert_close(twin(x, x, x)[0], layer(x, x, x)[0])


def test_paused_and_eval_are_torchs() -> None:
    """Outside training torch's own function runs, and nothing is counted."""
    plain, attached = (seeded(lambda: attention(batch_first=True)).double() for _ in range(2))
    session = rg.attach(attached, rg.Dither(scale=3.0))
    x = inputs("self", batch_first=True)
    with session.paused():
        assert_same(found_of(attached, x, {})[2], found_of(plain, x, {})[2], 0.0)
    assert_same(found_of(attached.eval(), x, {})[2], found_of(plain.eval(), x, {})[2], 0.0)
    with torch.no_grad():
        assert torch.equal(attached(*x)[0], plain(*x)[0])
    assert program(attached).total.calls == program(attached.out_proj).total.calls == 0


# Compiled and recomputed.


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Around(nn.Module):
    """Attention among other layers, one input in."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.attention = nn.Linear(WIDTH, WIDTH), attention(batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x))
        keys, values = {"self": (y, y), "encoder-decoder": (x, x), "three": (x, x + 1)}[self.kind]
        return self.attention(y, keys, values, need_weights=False)[0]


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("scale", [0, 2.0])
@pytest.mark.parametrize("kind", INPUTS)
def test_compiled(kind: str, scale: float) -> None:
    """fullgraph: the same noise, the same gradients, the same counts."""
    eager, fast = (seeded(lambda: Around(kind)) for _ in range(2))
    sessions = [rg.attach(model, rg.Dither(scale=scale), seed=5) for model in (eager, fast)]
    x = batch((BATCH, QUERIES, WIDTH))
    run = torch.compile(fast, fullgraph=True, backend="aot_eager")
    assert_same(gradients(fast, x, run), gradients(eager, x), 1e-4)
    assert sessions[1].flops() == sessions[0].flops()
    assert sessions[1].metrics() == sessions[0].metrics()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed(reentrant: bool) -> None:
    plain, saving = (seeded(lambda: Around("self")) for _ in range(2))
    sessions = [rg.attach(model, rg.Dither(scale=2.0), seed=5) for model in (plain, saving)]
    x = batch((BATCH, QUERIES, WIDTH))
    found = gradients(saving, x, lambda y: checkpoint(saving, y, use_reentrant=reentrant))
    assert_same(found, gradients(plain, x), 0.0)
    assert sessions[0].metrics() == sessions[1].metrics()


# Inside torch's transformer layers, whose evaluation has a fast path of its own.


def encoder_layer(**options: Any) -> nn.TransformerEncoderLayer:
    options = {"dim_feedforward": 16, "dropout": 0.0, "batch_first": True} | options
    return nn.TransformerEncoderLayer(WIDTH, HEADS, **options)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"norm_first": True}, {"activation": "gelu"}, {"bias": False}], ids=str
)
def test_encoder_layer_trains_as_plain(options: dict[str, Any], padded: bool, causal: bool) -> None:
    plain, attached = (seeded(lambda: encoder_layer(**options)).double() for _ in range(2))
    _session = rg.attach(attached, rg.Dither(scale=0))
    x = inputs("self", batch_first=True)
    call: dict[str, Any] = {"src_key_padding_mask": padding("float", x)} if padded else {}
    if causal:
        mask = nn.Transformer.generate_square_subsequent_mask(QUERIES, dtype=DOUBLE)
        call |= {"src_mask": mask, "is_causal": True}
    found, expected = gradients(attached, x[0], **call), gradients(plain, x[0], **call)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=TOLERANCE, msg=name)


def test_decoder_layer_trains_as_plain() -> None:
    """Two attention layers: one with itself, one with the encoder's output."""

    class Decoding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 16, 0.0, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x, memory)

    memory = batch((BATCH, KEYS, WIDTH), 3, DOUBLE)
    plain, attached = (seeded(Decoding).double() for _ in range(2))
    session = rg.attach(attached, rg.Dither(scale=0))
    x = batch((BATCH, QUERIES, WIDTH), dtype=DOUBLE)
    found, expected = gradients(attached, x), gradients(plain, x)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=TOLERANCE, msg=name)
    names = {f"layer.{part}" for part in ("self_attn", "multihead_attn")}
    assert names | {f"{name}.out_proj" for name in names} <= session.metrics()["layers"].keys()
    calls = {name: program(attached.get_submodule(name)).calls for name in names}
    assert calls == {"layer.self_attn": 1, "layer.multihead_attn": 2}


def encoder(nested: bool = True) -> nn.TransformerEncoder:
    return nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=nested)


NEVER = 10**6
METHODS: dict[str, Callable[[], rg.Method]] = {
    "dither": rg.Dither,
    "decorrelate": lambda: rg.Decorrelate(rank=2, every=2),
    "spectral": lambda: rg.Spectral(rank=2, warmup=1),
    "deepfocus": lambda: rg.DeepFocus(warmup=1),
    "perforate": lambda: rg.Perforate(max_dendrites=2, period=NEVER),
    "perforate grown": lambda: rg.Perforate(max_dendrites=2, period=1),
    "perforated grown": lambda: rg.Perforate(rule="perforated", max_dendrites=1, period=2),
}


@pytest.mark.parametrize("whole", [False, True], ids=["layer", "encoder"])
@pytest.mark.parametrize("padded", [None, "bool", "left aligned"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype:UserWarning")
@pytest.mark.filterwarnings("ignore:.*learning rate:retrograde.errors.RetrogradeWarning")
def test_evaluation_is_the_same_on_every_path(method: str, padded: str | None, whole: bool) -> None:
    """torch's fused kernels, taken without gradients alone, compute what the layers compute that training shaped."""
    model = seeded(encoder if whole else encoder_layer)
    session = rg.attach(model, METHODS[method](), seed=3)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), (BATCH, QUERIES, WIDTH), 5)
    x = batch((BATCH, QUERIES, WIDTH))
    mask = None if padded is None else padding("bool", [x, x])
    if padded == "left aligned":
        mask = torch.arange(QUERIES) >= torch.tensor([[5], [3], [2]])
    if "grown" in method:
        assert session.metrics()["perforate"]["dendrites"] >= 1
        # Dendrites that matter.
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "dendrite" in name:
                    parameter.add_(0.5 * batch(tuple(parameter.shape), 8))
    model.eval()
    with_grad = model(x, src_key_padding_mask=mask).detach()
    with torch.no_grad():
        without = model(x, src_key_padding_mask=mask)
        if "grown" in method:
            plain = seeded(encoder if whole else encoder_layer).eval()
            plain.load_state_dict(model.state_dict(), strict=False)
            assert not torch.allclose(plain(x, src_key_padding_mask=mask), without, atol=1e-3)
    # Where padding is cut away before the layers, torch fills its places with zeros afterwards.
    seen = torch.ones(BATCH, QUERIES, dtype=torch.bool) if mask is None else ~mask
    torch.testing.assert_close(without[seen], with_grad[seen], rtol=1e-4, atol=1e-5)
    if "grown" in method:
        # Dendrites are on no fast path, nested tensors neither: the same everywhere.
        torch.testing.assert_close(without, with_grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["dither", "perforate", "perforate grown"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype:UserWarning")
@pytest.mark.filterwarnings("ignore:detaching takes:retrograde.errors.RetrogradeWarning")
def test_detaching_gives_the_fast_path_back(method: str) -> None:
    """Nested tensors and fused kernels as before; the copy that fold makes has them where it needs nothing else."""
    model = seeded(encoder)
    assert model.use_nested_tensor
    session = rg.attach(model, METHODS[method]())
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), (BATCH, QUERIES, WIDTH), 3)
    folded = session.fold()
    if method != "perforate grown":
        assert folded.use_nested_tensor
        assert not any(module._forward_hooks for module in folded.modules())
    session.detach()
    assert model.use_nested_tensor
    assert not any(module._forward_hooks for module in model.modules())
    x = batch((BATCH, QUERIES, WIDTH))
    mask = torch.arange(QUERIES) >= torch.tensor([[5], [3], [2]])
    with torch.no_grad():
        assert not model.eval()(x, src_key_padding_mask=mask)[mask].any()
