"""A folded model of each method leaves torch: by `torch.export`, ONNX and `torch.jit.trace`."""

import importlib.util
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import retrograde as rg
from cases import seeded

METHODS = {
    "dither": rg.Dither(),
    "decorrelate": rg.Decorrelate(rank=8, every=2),
    "deepfocus": rg.DeepFocus(warmup=2),
    "perforate": rg.Perforate(period=3),
    "spectral": rg.Spectral(warmup=2, every=2),
}


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        rg.Residual(nn.Conv2d(8, 8, 3, padding=1)),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 16),
        nn.ReLU(),
        nn.Linear(16, 4),
    )


@pytest.fixture(scope="module", params=METHODS)
def folded(request: pytest.FixtureRequest) -> nn.Module:
    """Trained for some steps, so that methods have had their effect: dendrites are in use, norms have statistics."""
    model = seeded(network)
    session = rg.attach(model, METHODS[request.param])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(8):
        nn.functional.cross_entropy(model(torch.randn(8, 3, 6, 6)), torch.randint(4, (8,))).backward()
        optimizer.step()
        optimizer.zero_grad()
    plain = session.fold().eval()
    assert any("dendrite" in key for key in plain.state_dict()) == (request.param == "perforate")
    return plain


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 3, 6, 6)


def test_torch_export(folded: nn.Module, x: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(folded, (x,))
    torch.testing.assert_close(program.module()(x), folded(x))


def test_onnx(folded: nn.Module, x: Tensor, tmp_path: Path) -> None:
    """Of any batch size: what it computes there is what the model does here."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    import onnxruntime

    batch = torch.export.Dim("batch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = tmp_path / "model.onnx"
        torch.onnx.export(folded, (x,), file, dynamo=True, verbose=False, dynamic_shapes=({0: batch},))
    runtime = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for given in (x, torch.randn(2, 3, 6, 6)):
        (found,) = runtime.run(None, {runtime.get_inputs()[0].name: given.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), folded(given), rtol=1e-4, atol=1e-4)


def test_jit_trace(folded: nn.Module, x: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(folded, (x,))
    other = torch.randn(3, 3, 6, 6)
    torch.testing.assert_close(traced(other), folded(other))
