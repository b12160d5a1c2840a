"""ReLUs that keep a bit: the same numbers as torch's, less memory, and plain again afterwards."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import retrograde as rg
from cases import assert_bitwise, batch, gradients, seeded
from retrograde.accounting.memory import saved_bytes
from retrograde.engine.activations import Lightened, LightReLU
from retrograde.errors import TransformError


def net(inplace: bool = False) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace), nn.Conv2d(8, 8, 3), nn.ReLU(inplace), nn.Flatten()
    )


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_bit_for_bit(inplace: bool, last: bool, dtype: torch.dtype) -> None:
    layout = torch.channels_last if last else torch.contiguous_format
    plain = seeded(lambda: net(inplace)).to(dtype=dtype, memory_format=layout)
    light = copy.deepcopy(plain)
    kept = Lightened(light.modules())
    assert len(kept.modules) == 2
    x = batch((4, 3, 9, 8)).to(dtype=dtype, memory_format=layout)
    assert_bitwise(gradients(light, x), gradients(plain, x))
    assert torch.equal(light.eval()(x), plain.eval()(x))


def test_an_activation_takes_a_bit() -> None:
    """A thirty-second of it; the convolution behind it still keeps what it keeps."""
    model = nn.Sequential(nn.ReLU(), nn.Identity())
    x = batch((64, 100)).requires_grad_()
    assert saved_bytes(model, lambda: model(x)) == 4 * 6400
    _kept = Lightened(model.modules())
    assert saved_bytes(model, lambda: model(x)) == 6400 // 8


def test_restored_it_is_plain() -> None:
    model = net()
    kept = Lightened(model.modules())
    assert all(isinstance(module, LightReLU) for module in kept.modules)
    kept.end()
    assert [type(module) for module in kept.modules] == [nn.ReLU] * 2


def test_copies_and_pickles_are_plain() -> None:
    model = net()
    _kept = Lightened(model.modules())
    assert type(copy.deepcopy(model)[1]) is nn.ReLU
    assert type(pickle.loads(pickle.dumps(model))[1]) is nn.ReLU
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert type(torch.load(file, weights_only=False)[1]) is nn.ReLU
    assert isinstance(model[1], LightReLU)


class Mine(nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        return input.clamp(0, 6)


def test_scripting_is_refused() -> None:
    """As that of attached layers; inside paused() it is a plain module's."""
    model = nn.Sequential(nn.ReLU())
    kept = Lightened(model.modules())
    with pytest.raises(TransformError, match=r"jit\.script"):
        torch.jit.script(model)
    kept.pause(True)
    assert torch.equal(torch.jit.script(model)(torch.tensor([-1.0, 2.0])), torch.tensor([0.0, 2.0]))


def test_what_is_not_plain_is_left() -> None:
    """A subclass, or a forward of its own, may do something else."""
    model = nn.Sequential(Mine(), nn.ReLU())
    model[1].forward = lambda x: x  # type: ignore[method-assign]
    assert not Lightened(model.modules()).modules


def test_a_session_lightens_and_restores() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    session = rg.attach(model, rg.Dither(keep=4))
    assert isinstance(model[1], LightReLU)
    assert type(session.fold()[1]) is nn.ReLU
    session.detach()
    assert type(model[1]) is nn.ReLU
    rg.attach(model, rg.Dither())
    assert type(model[1]) is nn.ReLU


def test_gradients_of_gradients() -> None:
    """torch's own: of the input a ReLU knows nothing but where it is positive, and a bit says that."""
    model = nn.Sequential(nn.Linear(8, 300), nn.ReLU(), nn.Linear(300, 8), nn.ReLU(), nn.Linear(8, 1))
    plain = copy.deepcopy(model)
    _kept = Lightened(model.modules())
    found: list[list[Tensor]] = []
    for of in (model, plain):
        x = batch((6, 8)).requires_grad_()
        (g,) = torch.autograd.grad(of(x).square().sum(), x, create_graph=True)
        (g.norm() - 1).square().backward()
        found.append([g, *(p.grad for p in of.parameters() if p.grad is not None)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_compiled_autograd() -> None:
    """The forward pass ran uncompiled, and its bits are packed."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    plain = copy.deepcopy(model)
    _kept = Lightened(model.modules())
    torch._dynamo.reset()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        model(batch((6, 8))).square().sum().backward()
    plain(batch((6, 8))).square().sum().backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_paused_it_is_torchs() -> None:
    """So gradients of gradients are right there, of attached layers too, and transforms."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    plain, x = copy.deepcopy(model), batch((6, 8)).requires_grad_()
    session = rg.attach(model, rg.Dither(scale=0, keep=8), only=["2"])

    def penalty(of: nn.Module) -> list[Tensor]:
        (g,) = torch.autograd.grad(of(x).square().sum(), x, create_graph=True)
        return list(torch.autograd.grad(g.square().sum(), [of[0].weight, of[2].weight]))

    with session.paused():
        for found, expected in zip(penalty(model), penalty(plain), strict=True):
            torch.testing.assert_close(found, expected)
        parameters = dict(model.named_parameters())
        torch.func.grad(lambda p: torch.func.functional_call(model, p, (x.detach(),)).sum())(parameters)
    assert isinstance(model[1], LightReLU)
    with session.paused():
        session.detach()
    assert type(model[1]) is nn.ReLU


def test_nan_passes() -> None:
    x = torch.full((3,), float("nan"), requires_grad=True)
    model = nn.Sequential(nn.ReLU())
    _kept = Lightened(model.modules())
    model(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1.0] * 3


@pytest.mark.parametrize("inplace", [False, True])
def test_compiled(inplace: bool) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace), nn.Linear(8, 4))
    plain = copy.deepcopy(model)
    _kept = Lightened(model.modules())
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = batch((6, 8))
    assert_bitwise(gradients(model, x, fast), gradients(plain, x))
    torch._dynamo.reset()


def test_a_shared_one_is_light_as_long_as_any_session_needs_it() -> None:
    """Whoever ends first; torch's own while either is paused, and after one that was dropped."""
    shared = nn.ReLU()
    models = [nn.Sequential(nn.Linear(8, 8), shared, nn.Linear(8, 4)) for _ in range(2)]
    for first, second in ((0, 1), (1, 0)):
        sessions = [rg.attach(model, rg.Dither(keep=4)) for model in models]
        with sessions[first].paused():
            assert type(shared) is nn.ReLU
            assert type(copy.deepcopy(shared)) is nn.ReLU
        assert isinstance(shared, LightReLU)
        sessions[first].detach()
        assert isinstance(shared, LightReLU)
        with sessions[second].paused():
            sessions[second].detach()
        assert type(shared) is nn.ReLU
    kept = Lightened(models[0].modules()), Lightened(models[1].modules())
    kept[0].end()
    del kept
    last = Lightened(models[1].modules())
    last.end()
    assert type(shared) is nn.ReLU


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [False, True])
def test_many_gradients_at_once_and_forward_mode(last: bool, dtype: torch.dtype) -> None:
    """As torch's own, however it is asked."""
    x = batch((2, 3, 9, 8)).to(dtype).requires_grad_()
    if last:
        x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    deltas = torch.randn(5, *x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        with forward_ad.dual_level():
            found = forward_ad.unpack_dual(model(forward_ad.make_dual(x, deltas[0]))).tangent
            assert found is not None
            return found

    def mapped(model: nn.Module) -> Tensor:
        y = model(x)
        return torch.func.vmap(lambda d: torch.autograd.grad(y, x, d, retain_graph=True)[0])(deltas)

    ways = (
        lambda model: torch.autograd.grad(model(x), x, deltas, is_grads_batched=True)[0],
        mapped,
        lambda model: torch.autograd.functional.jacobian(lambda x: model(x).sum(0), x, vectorize=True),
        lambda model: forward(model, x),
    )
    light = nn.Sequential(nn.ReLU())
    _kept = Lightened(light.modules())
    for way in ways:
        assert torch.equal(way(light), way(nn.Sequential(nn.ReLU())))
