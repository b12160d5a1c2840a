"""Neutral settings equal autograd on every layer kind; a class swap changes nothing else."""

import copy
import gc
import io
import itertools
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import retrograde as rg
from cases import LAYERS, NEUTRAL, Case, assert_same, batch, cnn, gradients, mlp, program, seeded, train
from retrograde.engine import layers as engine_layers
from retrograde.engine.maps import base
from retrograde.engine.maps.linear import TURNED
from retrograde.errors import TransformError


@pytest.fixture
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test teaches with register_layer is forgotten after it."""
    monkeypatch.setattr(base, "_KINDS", dict(base._KINDS))
    monkeypatch.setattr(base, "_NAMED", dict(base._NAMED))
    monkeypatch.setattr(base, "_MAPS", dict(base._MAPS))


def compare(
    make: Callable[[], nn.Module], x: Tensor, method: rg.Dither, output: float = 0.0, **call: Any
) -> rg.Session:
    """The attached float64 model has plain autograd's output, to `output`, and its gradients."""
    plain, attached = (seeded(make).double() for _ in range(2))
    session = rg.attach(attached, method, seed=3)
    expected, found = gradients(plain, x, **call), gradients(attached, x, **call)
    torch.testing.assert_close(attached(x, **call), plain(x, **call), rtol=output, atol=output)
    assert_same(found, expected)
    with session.paused():
        assert_same(gradients(attached, x, **call), expected, 0.0)
    return session


@pytest.mark.parametrize("case", LAYERS, ids=str)
@pytest.mark.parametrize("neutral", NEUTRAL)
def test_neutral_equals_autograd(case: Case, neutral: str) -> None:
    """Every layer kind: output bitwise, gradients of input, weight and bias to 1e-6."""
    session = compare(case.make, batch(case.shape, dtype=torch.float64), NEUTRAL[neutral], **case.call)
    assert session.flops().dense > 0 or 0 in case.shape


@pytest.mark.parametrize("case", [c for c in LAYERS if "empty" not in c.name], ids=str)
def test_a_computed_weight_is_computed_once_a_pass(case: Case) -> None:
    """A spectral norm steps its power iteration at every reading."""
    counts: list[int] = []
    for attached in (False, True):
        layer = seeded(case.make)
        parametrize.register_parametrization(layer, "weight", counting := Counting())
        if attached:
            rg.attach(layer, rg.Dither(scale=0))
        counting.readings = 0
        layer(batch(case.shape), **case.call)
        counts.append(counting.readings)
    assert counts == [1, 1]


class Counting(nn.Module):
    """The weight itself, and how often it was read."""

    readings = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.readings += 1
        return weight


def test_figures_of_calls_without_products() -> None:
    """A frozen layer whose input needs no gradient, and whose bias alone learns."""
    layer = nn.Conv2d(2, 2, 1)
    layer.weight.requires_grad_(False)
    session = rg.attach(layer, rg.Perforate(where="*"))
    layer(batch((1, 2, 3, 3))).sum().backward()
    assert session.metrics()["layers"]["(root)"]["zeros"] is not None


@pytest.mark.parametrize("case", [c for c in LAYERS if len(c.shape) >= 4 and "un" not in c.name], ids=str)
def test_channels_last(case: Case) -> None:
    """Memory format of input and weight makes no difference, and is kept in the output."""
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}[len(case.shape)]
    x = batch(case.shape, dtype=torch.float64).to(memory_format=layout)

    def make() -> nn.Module:
        return case.make().to(memory_format=layout)

    compare(make, x, rg.Dither(scale=0), **case.call)
    plain, attached = seeded(make).double(), seeded(make).double()
    rg.attach(attached, rg.Dither(scale=0))
    assert attached(x, **case.call).stride() == plain(x, **case.call).stride()


@pytest.mark.parametrize("widths", [(4, 4, 0), (0, 3, 3)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_linear_without_features(widths: tuple[int, int, int]) -> None:
    """A degenerate layer is left plain among others, which train as ever."""

    def make() -> nn.Module:
        return nn.Sequential(*(nn.Linear(i, o) for i, o in itertools.pairwise(widths)))

    compare(make, batch((5, widths[0]), dtype=torch.float64), rg.Dither(scale=0))


@pytest.mark.parametrize("neutral", NEUTRAL)
@pytest.mark.parametrize("frozen", ["weight", "bias", "both"])
def test_frozen_parameters(neutral: str, frozen: str) -> None:
    """A frozen parameter gets no gradient, the other ones what they would have got."""

    def make() -> nn.Module:
        model = cnn()
        for layer in (model[0], model[3], model[6]):
            if frozen != "bias":
                layer.weight.requires_grad_(False)
            if frozen != "weight" and layer.bias is not None:
                layer.bias.requires_grad_(False)
        return model

    compare(make, batch((3, 3, 8, 8), dtype=torch.float64), NEUTRAL[neutral])


def test_frozen_weight_keeps_nothing_of_the_input() -> None:
    """With a frozen weight the boundary saves no input: activations are not held for nothing."""
    layer = nn.Linear(4, 3)
    layer.weight.requires_grad_(False)
    rg.attach(layer, rg.Dither())
    z = layer(batch((5, 4)).requires_grad_())
    assert [t.shape for t in z.grad_fn.saved_tensors if t is not None] == [(3, 4)]


def test_input_without_grad() -> None:
    """The first layer computes no input gradient, and counts none."""
    model = mlp()
    session = rg.attach(model, rg.Dither(scale=0))
    model(batch((5, 8))).sum().backward()
    flops = program(model[0]).total
    assert flops.input_grad_dense == 0
    assert flops.weight_grad_dense == 2 * 5 * 8 * 16
    assert session.flops().weight_grad.dense == 2 * 5 * (8 * 16 + 16 * 16 + 16 * 4)


class Twice(nn.Module):
    """One layer applied twice, and once more under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.b = self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(torch.tanh(self.a(x)))))


class Tied(nn.Module):
    """A head tied to an embedding, and two linear layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.up, self.again = nn.Linear(6, 6), nn.Linear(6, 6)
        self.again.weight = self.up.weight
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.arange(5) % 11
        return self.head(torch.tanh(self.again(torch.tanh(self.up(self.embed(tokens) + x)))))


class InPlace(nn.Module):
    """In-place operations on what attached layers return, unbatched convolution included."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv1d(3, 4, 3), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        z = F.relu_(self.conv(x))
        return self.linear(z).add_(1).tanh_()


def spectral() -> nn.Module:
    return nn.Sequential(
        parametrizations.weight_norm(nn.Linear(6, 6)), nn.Tanh(), parametrizations.orthogonal(nn.Linear(6, 6))
    )


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def old_weight_norm() -> nn.Module:
    return nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(6, 6)), nn.Tanh())


@pytest.mark.parametrize("neutral", NEUTRAL)
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (Twice, (5, 6)),
        (Tied, (5, 6)),
        (InPlace, (3, 7)),
        (spectral, (5, 6)),
        pytest.param(
            old_weight_norm, (5, 6), marks=pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
        ),
    ],
    ids=["twice", "tied", "in_place", "parametrised", "old_weight_norm"],
)
def test_neutral_in_awkward_models(
    make: Callable[[], nn.Module], shape: tuple[int, ...], neutral: str
) -> None:
    """Shared layers, tied weights, in-place neighbours and computed weights all get autograd's gradients."""
    compare(make, batch(shape, dtype=torch.float64), NEUTRAL[neutral])


@pytest.mark.parametrize("neutral", NEUTRAL)
def test_transformer_encoder_layer(neutral: str) -> None:
    """Its linear layers are attached, and both projections of its attention."""
    session = compare(
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
        batch((3, 5, 8), dtype=torch.float64),
        NEUTRAL[neutral],
        1e-14,
    )
    attached = {row.name for row in session.plan.rows if row.status == "attached"}
    assert attached == {"self_attn", "self_attn.out_proj", "linear1", "linear2"}
    calls = {name: program(session.model.get_submodule(name)).calls for name in attached}
    # Of the two forward passes in training, one had a backward pass.
    assert calls == dict.fromkeys(attached, 1)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: setattr(layer, "padding", (2, 2)),
        lambda layer: [setattr(layer, "padding", (2, 2)), setattr(layer, "dilation", (2, 2))],
        lambda layer: setattr(layer, "padding", "same"),
        lambda layer: setattr(layer, "padding", 2),
        lambda layer: setattr(layer, "stride", 2),
        lambda layer: setattr(layer, "stride", [2, 2]),
        lambda layer: setattr(layer, "dilation", 2),
    ],
    ids=[
        "padding",
        "padding_and_dilation",
        "same",
        "int_padding",
        "int_stride",
        "list_stride",
        "int_dilation",
    ],
)
def test_geometry_changed_after_construction(change: Callable[[nn.Module], Any]) -> None:
    """Segmentation models rewrite a backbone's stride, padding and dilation: the attached layer follows them."""

    def make() -> nn.Module:
        layer = nn.Conv2d(4, 6, 3, padding=1)
        change(layer)
        return layer

    compare(make, batch((2, 4, 9, 9), dtype=torch.float64), rg.Dither(scale=0))


def test_same_padding_follows_dilation() -> None:
    """padding="same" is computed from the dilation in force, not from that of construction."""

    def make() -> nn.Module:
        layer = nn.Conv2d(4, 6, 3, padding="same")
        layer.dilation = (2, 2)
        return layer

    compare(make, batch((2, 4, 9, 9), dtype=torch.float64), rg.Dither(scale=0))


def test_strided_delta() -> None:
    """δ that is expanded, transposed or sliced is read rightly."""
    for layer, shape in ((nn.Linear(6, 6), (6, 6)), (nn.Conv1d(6, 6, 3, padding=1), (6, 6, 6))):
        plain, attached = copy.deepcopy(layer).double(), copy.deepcopy(layer).double()
        rg.attach(attached, rg.Dither(scale=0))
        x = batch(shape, dtype=torch.float64)
        for delta in (
            torch.ones((), dtype=torch.float64).expand(shape),
            batch(shape, 2, torch.float64).transpose(-1, -2),
        ):
            expected = torch.autograd.grad(plain(x), list(plain.parameters()), delta)
            found = torch.autograd.grad(attached(x), list(attached.parameters()), delta)
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


# Identity: attach and detach leave everything else alone.


def test_identity() -> None:
    """Parameters, keys, buffers, hooks, mode and module tree are the very same, attached and detached."""
    model = seeded(cnn)
    model[0].weight.requires_grad_(False)
    seen: list[str] = []
    model[3].register_forward_hook(lambda *_: seen.append("forward"))
    model[3].register_full_backward_hook(lambda *_: seen.append("backward"))
    model[6].register_forward_pre_hook(lambda *_: seen.append("pre"))
    model[1].eval()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    train(model, optimizer, (4, 3, 8, 8), 1)
    seen.clear()

    def picture() -> Any:
        return (
            [(n, id(m)) for n, m in model.named_modules(remove_duplicate=False)],
            [(n, id(p), p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False)],
            [(n, id(b)) for n, b in model.named_buffers()],
            [
                (n, m.training, len(m._forward_hooks), len(m._backward_hooks))
                for n, m in model.named_modules()
            ],
            list(model.state_dict()),
        )

    before, text, state = picture(), repr(model), copy.deepcopy(model.state_dict())
    moments = copy.deepcopy(optimizer.state_dict())
    session = rg.attach(model, rg.Dither())
    assert picture() == before
    assert repr(model).replace("Retrograde", "") == text
    assert isinstance(model[0], nn.Conv2d)
    assert isinstance(model[6], nn.Linear)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    torch.testing.assert_close(optimizer.state_dict(), moments, rtol=0, atol=0)
    gradients(model, batch((4, 3, 8, 8)))
    assert sorted(seen) == ["backward", "forward", "pre"]
    assert session.detach() is model
    assert picture() == before
    assert repr(model) == text
    assert [type(m) for m in model.modules()] == [type(m) for m in cnn().modules()]
    assert all(
        "_retrograde" not in m.__dict__ and "_retrograde_kind" not in m.__dict__ for m in model.modules()
    )


def test_load_state_dict_into_attached() -> None:
    """Weights pass both ways between a plain and an attached model, strictly."""
    plain, attached = seeded(cnn, 0), seeded(cnn, 1)
    rg.attach(attached, rg.Dither())
    attached.load_state_dict(plain.state_dict(), strict=True)
    seeded(cnn, 2).load_state_dict(attached.state_dict(), strict=True)
    assert torch.equal(plain.eval()(batch((2, 3, 8, 8))), attached.eval()(batch((2, 3, 8, 8))))


def test_deepcopy() -> None:
    """A deep copy is plain and independent, with the same outputs and ties; the model stays attached."""
    for make, shape in ((cnn, (2, 3, 8, 8)), (Tied, (5, 6)), (Twice, (5, 6)), (spectral, (5, 6))):
        model = seeded(make)
        rg.attach(model, rg.Dither())
        folded = copy.deepcopy(model)
        assert repr(folded) == repr(seeded(make))
        assert any(isinstance(m, engine_layers.AttachedLayer) for m in model.modules())
        mine, theirs = {id(p) for p in model.parameters()}, {id(p) for p in folded.parameters()}
        assert not mine & theirs
        assert len(mine) == len(theirs)
        assert torch.equal(model.eval()(batch(shape)), folded.eval()(batch(shape)))


def test_fold() -> None:
    """Session.fold is such a copy; parameter ties inside it hold."""
    model = seeded(Tied)
    session = rg.attach(model, rg.Dither())
    folded = session.fold()
    assert type(folded.head) is nn.Linear
    assert folded.head.weight is folded.embed.weight
    assert folded.head.weight is not model.head.weight
    assert torch.equal(model(batch((5, 6))), folded(batch((5, 6))))


LOADER = """
import sys
import torch
{extra}
model = {load}
assert "retrograde" not in sys.modules
assert type(model[0]) is torch.nn.Linear and type(model[2]) is torch.nn.Linear, type(model[0])
assert not any(k.startswith("_retrograde") for m in model.modules() for k in m.__dict__)
print(model(torch.ones(1, 8)).tolist())
"""


@pytest.mark.parametrize("how", ["torch.save", "pickle"])
def test_file_loads_without_retrograde(how: str, tmp_path: Path) -> None:
    """A file of an attached model holds a plain one, for readers that do not have retrograde."""
    model = seeded(mlp)
    rg.attach(model, rg.Dither())
    path = tmp_path / "model.pt"
    if how == "torch.save":
        torch.save(model, path)
        load, extra = f"torch.load({str(path)!r}, weights_only=False)", ""
    else:
        path.write_bytes(pickle.dumps(model))
        load, extra = f"pickle.load(open({str(path)!r}, 'rb'))", "import pickle"
    done = subprocess.run(
        [sys.executable, "-c", LOADER.format(load=load, extra=extra)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(model.eval()(torch.ones(1, 8)).tolist())


@pytest.mark.parametrize("method", [rg.Dither(), rg.DeepFocus(), rg.Perforate()], ids=lambda m: m.name)
def test_a_restricted_unpickler_takes_the_file(method: rg.Method) -> None:
    """``torch.load`` with ``weights_only`` needs the plain classes allowed, and nothing else."""
    model = seeded(mlp)
    session = rg.attach(model, method)
    classes = [type(layer) for layer in model]
    for _ in range(2):
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        with torch.serialization.safe_globals([nn.Sequential, nn.Linear, nn.ReLU, nn.Tanh]):
            twin = torch.load(file)
        assert [type(layer) for layer in model] == classes
        assert torch.equal(twin.eval()(torch.ones(1, 8)), model.eval()(torch.ones(1, 8)))
    session.detach()
    assert type(model[0]).__name__ in ("Linear", "DendriticLinear")


def test_a_pickler_that_fails_leaves_the_layer_attached() -> None:
    layer = nn.Linear(4, 3)
    session = rg.attach(nn.Sequential(layer), rg.Dither())
    attached = type(layer)

    class Full(io.BytesIO):
        def write(self, data: object) -> int:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        pickle.dump(layer, Full())
    assert type(layer) is attached
    kept = layer.__reduce_ex__(2)
    assert list(kept[3]) == []
    session.detach()
    del kept
    assert type(layer) is nn.Linear


def test_copies_are_plain() -> None:
    """deepcopy, copy and pickle of one layer give its plain class; hooks and mode come along."""
    layer = nn.Linear(4, 3).eval()
    rg.attach(nn.Sequential(layer), rg.Dither())
    for twin in (copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is nn.Linear
        assert not twin.training
        assert torch.equal(twin(torch.ones(4)), layer(torch.ones(4)))
    assert copy.deepcopy(layer).weight is not layer.weight
    averaged = torch.optim.swa_utils.AveragedModel(nn.Sequential(layer))
    assert type(averaged.module[0]) is nn.Linear


def test_export_is_plain() -> None:
    """torch.export of the eval model sees aten's own ops."""
    model = seeded(mlp)
    rg.attach(model, rg.Dither())
    text = str(torch.export.export(model.eval(), (batch((2, 8)),)).graph)
    assert "aten.linear" in text
    assert "retrograde" not in text


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_trace_is_plain() -> None:
    """torch.jit.trace and torch.fx of the eval model compute the same."""
    model = seeded(mlp).eval()
    rg.attach(model, rg.Dither())
    x = batch((2, 8))
    assert torch.equal(torch.jit.trace(model, x)(x), model(x))
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_script_of_a_folded_model() -> None:
    """TorchScript reads source: an attached layer is refused by name and stays attached, a folded one is ordinary."""
    model = seeded(mlp)
    session = rg.attach(model, rg.Dither())
    with pytest.raises(TransformError, match=r"'0' is attached.*session\.fold"):
        torch.jit.script(model)
    assert session.plan.attached
    assert isinstance(model[0], engine_layers.AttachedLayer)
    x = batch((2, 8))
    assert torch.equal(torch.jit.script(session.fold())(x), model.eval()(x))


def test_eval_and_no_grad_run_the_plain_layer() -> None:
    """Outside training there is no boundary, no count, no noise."""
    model = seeded(mlp)
    rg.attach(model, rg.Dither())
    with torch.no_grad():
        model(batch((2, 8)))
    z = model.eval()(batch((2, 8)))
    assert "Boundary" not in type(z.grad_fn).__name__
    z.sum().backward()
    assert program(model[0]).total.calls == 0


def test_keyword_input() -> None:
    """A layer called by keyword works as the plain one."""
    linear, turned = nn.Linear(4, 3), nn.ConvTranspose1d(2, 3, 3, stride=2)
    _session = rg.attach(nn.ModuleList([linear, turned]), rg.Dither())
    assert linear(input=torch.ones(2, 4)).shape == (2, 3)
    assert turned(input=torch.ones(1, 2, 5), output_size=[12]).shape == (1, 3, 12)


# register_layer.


class GPT2Conv1D(nn.Module):
    """GPT-2's linear layer, with the weight the other way round."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) * 0.1)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class Kept(nn.Module):
    """A linear layer that keeps its parameters in a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.base.weight, self.base.bias)


GPT2: dict[str, Any] = {
    "function": lambda layer, x: rg.Operands(x, layer.weight.T, layer.bias),
    "kind": rg.LinearKind(turned=True),
}


@pytest.mark.usefixtures("_own_registry")
@pytest.mark.parametrize("neutral", NEUTRAL)
@pytest.mark.parametrize("how", GPT2)
def test_register_layer(how: str, neutral: str) -> None:
    """A taught layer gets autograd's gradients, its own class back, and a plain copy."""
    assert engine_layers.find_kind(GPT2Conv1D(3, 4)) is None
    rg.register_layer(GPT2Conv1D, GPT2[how])
    session = compare(lambda: GPT2Conv1D(5, 6), batch((2, 3, 6), dtype=torch.float64), NEUTRAL[neutral])
    assert program(session.model).map is TURNED
    assert type(session.fold()) is GPT2Conv1D
    assert type(session.detach()) is GPT2Conv1D


@pytest.mark.parametrize("neutral", NEUTRAL)
def test_layers_known_by_name(neutral: str) -> None:
    """transformers' Conv1D is known though it need not be installed: by the name of its module and class."""
    named = {"__module__": "transformers.pytorch_utils", "__qualname__": "Conv1D"}
    conv1d = type("Conv1D", (GPT2Conv1D,), named)
    session = compare(lambda: conv1d(5, 6), batch((2, 3, 6), dtype=torch.float64), NEUTRAL[neutral])
    assert [(row.type, row.shape, row.status) for row in session.plan.rows] == [("Conv1D", "6→5", "attached")]
    assert program(session.model).map is TURNED


@pytest.mark.usefixtures("_own_registry")
def test_register_layer_by_name() -> None:
    rg.register_layer(f"{GPT2Conv1D.__module__}.GPT2Conv1D", rg.LinearKind(turned=True))
    compare(lambda: GPT2Conv1D(5, 6), batch((3, 6), dtype=torch.float64), rg.Dither(scale=0))


@pytest.mark.usefixtures("_own_registry")
def test_register_layer_with_parameters_below() -> None:
    """A taught layer may keep its parameters in submodules: it attaches, and its clock ticks."""
    rg.register_layer(Kept, lambda layer, x: rg.Operands(x, layer.base.weight, layer.base.bias))
    model = nn.Sequential(Kept())
    session = rg.attach(model, rg.Dither(), only="0")
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), (4, 6), 2)
    assert session.step == 2


class OwnConvolution(nn.Module):
    """A convolution that pads by itself, with a filter that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 3, 3)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(F.pad(x, (2, 0)), torch.tanh(self.weight), self.bias, stride=2)


@pytest.mark.usefixtures("_own_registry")
@pytest.mark.parametrize("neutral", NEUTRAL)
@pytest.mark.parametrize("shape", [(2, 3, 9), (3, 9)], ids=str)
def test_register_convolution(shape: tuple[int, ...], neutral: str) -> None:
    """Of a taught convolution, too, the input need not be a batch."""
    geometry = rg.Geometry((2,), (0,), (1,), False, (0,), 1)
    rg.register_layer(
        OwnConvolution,
        lambda layer, x: rg.Operands(F.pad(x, (2, 0)), torch.tanh(layer.weight), layer.bias, geometry),
    )
    compare(OwnConvolution, batch(shape, dtype=torch.float64), NEUTRAL[neutral])


@pytest.mark.usefixtures("_own_registry")
def test_register_layer_refuses() -> None:
    with pytest.raises(rg.errors.OptionError, match=r"class of torch\.nn\.Module"):
        rg.register_layer(nn.Linear(2, 2), lambda layer, x: None)  # type: ignore[arg-type]
    with pytest.raises(rg.errors.OptionError, match=r"retrograde\.LayerKind or a function, not 'bilinear'"):
        rg.register_layer(GPT2Conv1D, "bilinear")  # type: ignore[arg-type]


class HalvedMap(rg.LinearMap):
    """z = x (W/2)ᵀ + b, a map of a third party's."""

    name = "halved"

    @classmethod
    def of(cls, numbers: Any) -> rg.Map:
        return cls()

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super().forward(x, weight / 2, bias)

    def gradients(self, delta: Tensor, x: Tensor, weight: Tensor, needs: Any) -> Any:
        dx, dw, db = super().gradients(delta, x, weight, needs)
        return None if dx is None else dx / 2, None if dw is None else dw / 2, db


class Halved(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight / 2, self.bias)


class HalvedKind(rg.LinearKind):
    def __init__(self) -> None:
        super().__init__()
        self._map = HalvedMap()


@pytest.mark.usefixtures("_own_registry")
@pytest.mark.parametrize("fast", [False, True])
def test_a_map_of_ones_own(fast: bool) -> None:
    """Attached like any other, and known to compiled code by its name."""
    rg.register_map(HalvedMap)
    rg.register_layer(Halved, HalvedKind())
    plain, attached = seeded(lambda: Halved(6, 5)), seeded(lambda: Halved(6, 5))
    _session = rg.attach(attached, rg.Dither(scale=0))
    torch._dynamo.reset()
    run = torch.compile(attached, fullgraph=True, backend="aot_eager") if fast else None
    x = batch((7, 6))
    assert_same(gradients(attached, x, run), gradients(plain, x), 1e-5)
    assert type(program(attached).map) is HalvedMap
    torch._dynamo.reset()


class OwnForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class OwnConvForward(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return 2 * super()._conv_forward(input, weight, bias)


class Inheriting(nn.Linear):
    pass


def test_subclasses_in_the_plan() -> None:
    """A subclass with a forward of its own is named and left; one that inherits it is attached."""
    model = nn.ModuleDict(
        {"own": OwnForward(3, 3), "conv": OwnConvForward(3, 3, 1), "inherits": Inheriting(3, 3)}
    )
    session = rg.attach(model, rg.Dither())
    rows = {row.name: row for row in session.plan.rows}
    assert rows["own"].status == rows["conv"].status == "left"
    assert "subclass of Linear with a forward() of its own" in rows["own"].why
    assert "_conv_forward()" in rows["conv"].why
    assert rows["inherits"].status == "attached"
    assert rows["inherits"].type == "Inheriting"
    assert type(session.fold()["inherits"]) is Inheriting


def test_forward_replaced_on_the_instance() -> None:
    """A forward set on the object itself hides the program: the plan must not call that layer attached."""
    model = seeded(mlp)
    own = model[0].forward
    model[0].forward = lambda x: 2 * own(x)  # as accelerate and several wrappers do
    plan = rg.make_plan(model, [rg.Dither()])
    row = next(row for row in plan.rows if row.name == "0")
    assert row.status != "attached", row
    assert "forward" in row.why


# Detach.


def test_a_forward_wrapped_on_the_instance() -> None:
    """As tracers and hooking libraries do it: what was bound while attached still runs when the layer is plain."""
    model = seeded(mlp)
    session = rg.attach(model, rg.Dither())
    inner = model[0].forward
    model[0].forward = lambda x: 2 * inner(x)
    x = batch((3, 8))
    expected = model(x)
    assert_same({"": session.fold()(x)}, {"": expected}, 1e-6)
    session.detach()
    assert_same({"": model(x)}, {"": expected}, 1e-6)


def test_layers_that_torch_makes_a_class_for_are_not_kept() -> None:
    """A parametrised layer has a class of its own, which must go with it."""
    alive: list[weakref.ref[Any]] = []
    for _ in range(3):
        layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        rg.attach(nn.Sequential(layer), rg.Dither())
        alive += [weakref.ref(layer), weakref.ref(type(layer))]
        del layer
    gc.collect()
    assert [ref() for ref in alive] == [None] * 6


def test_detach_twice() -> None:
    session = rg.attach(mlp(), rg.Dither())
    session.detach()
    with pytest.raises(rg.errors.DetachError, match="detached already"):
        session.detach()


def test_detach_with_later_parametrization_changes_nothing() -> None:
    """A refused detach leaves every layer attached, and works once the obstacle is gone."""
    model = mlp()
    session = rg.attach(model, rg.Dither())
    parametrizations.weight_norm(model[2])
    with pytest.raises(rg.errors.DetachError, match=r"'2'.*remove_parametrizations"):
        session.detach()
    assert isinstance(model[0], engine_layers.AttachedLayer)
    parametrize.remove_parametrizations(model[2], "weight")
    session.detach()
    assert [type(m) for m in model] == [type(m) for m in mlp()]


def test_copy_with_later_parametrization() -> None:
    """A layer that was parametrised while attached has no plain class to copy to: said, not guessed."""
    model = mlp()
    session = rg.attach(model, rg.Dither())
    parametrizations.weight_norm(model[2])
    with pytest.raises(rg.errors.DetachError, match=r"'2' has become a Parametrized"):
        session.fold()
    nn.utils.parametrize.remove_parametrizations(model[2], "weight")
    assert type(session.fold()[2]) is nn.Linear


def test_attach_again_after_detach() -> None:
    model = seeded(mlp)
    rg.attach(model, rg.Dither()).detach()
    session = rg.attach(model, rg.Dither())
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), (4, 8), 1)
    assert session.step == 1


def test_backward_after_detach() -> None:
    """A graph made while attached still gives its gradients after detaching."""
    model, plain = seeded(mlp), seeded(mlp)
    session = rg.attach(model, rg.Dither(scale=0))
    loss = torch.sin(model(batch((4, 8)))).sum()
    session.detach()
    loss.backward()
    torch.sin(plain(batch((4, 8)))).sum().backward()
    found, expected = ({n: p.grad for n, p in m.named_parameters()} for m in (model, plain))
    assert_same(found, expected)


def test_compiled_graph_after_the_session_is_gone() -> None:
    """An op whose program is gone says what happened, in words."""
    layer = nn.Linear(4, 3)
    session = rg.attach(layer, rg.Dither())
    token = program(layer).token
    session.detach()
    del session
    with pytest.raises(rg.errors.AttachError, match="session is gone"):
        torch.ops.retrograde.backward(
            *(torch.ones(2, 3), [torch.ones(2, 4)], None, torch.ones(3, 4)),
            *(token, (2, 4), [True] * 3, "linear", (0,)),
        )


def test_forgotten_model_is_freed() -> None:
    """Neither hooks nor registries keep an attached model alive."""
    import gc
    import weakref

    def make() -> Iterator[Any]:
        model = mlp()
        session = rg.attach(model, rg.Dither())
        yield weakref.ref(model[0])
        yield weakref.ref(session)

    refs = list(make())
    gc.collect()
    assert all(ref() is None for ref in refs)
