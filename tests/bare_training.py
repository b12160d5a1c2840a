"""Attaches, trains, saves, resumes and folds with each method, and prints what came of it as one JSON object.

`python tests/bare_training.py --without numba scipy` does so as if these packages were not installed.
"""

import argparse
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

STEPS = 12
KERNELS = "kernel_"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--without", nargs="*", default=[])
    without = parser.parse_args().without
    # What Python looks up here before it looks for files.
    sys.modules.update(dict.fromkeys(without))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        from retrograde.testing import METHODS

        found = {name: _train(make()) for name, make in METHODS.items()}
        large = _large()
    told = [f"{w.category.__name__}: {w.message} [{Path(w.filename).name}]" for w in caught]
    print(json.dumps({"methods": found, "large": large, "warnings": told}))  # noqa: T201


def _train(method: Any) -> dict[str, Any]:
    """A small convolutional network; half-way the session is saved, and resumed in another model."""
    import torch
    from torch import nn

    import retrograde as rg

    def build() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10)
        )

    data = torch.Generator().manual_seed(1)
    x, y = torch.randn(64, 1, 8, 8, generator=data), torch.randint(10, (64,), generator=data)
    model = build()
    plain, keys = type(model[0]), list(model.state_dict())
    session = rg.attach(model, method, seed=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses: list[float] = []
    for step in range(STEPS):
        if step == STEPS // 2:
            session, optimizer = _resumed(session, optimizer, build())
            model = session.model
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        # A dendrite grows at the second score, and is kept if the next is better.
        session.validated(float(step > 1))
        losses.append(loss.item())
    layers = session.metrics()["layers"].values()
    kernels = {key for layer in layers for key, share in layer.items() if key.startswith(KERNELS) and share}
    model.eval()
    with torch.no_grad():
        attached = model(x)
        folded = session.fold()
        off = float((folded(x) - attached).abs().max())
    return {
        "losses": losses,
        "kernels": sorted(key.removeprefix(KERNELS) for key in kernels),
        "plan": sorted({row.kernel for row in session.plan.attached}),
        "printed": str(session.plan).splitlines()[0].split(),
        "fold differs by": off,
        "plain": type(folded[0]) is plain,
        "keys": [key for key in folded.state_dict() if key not in keys],
    }


def _resumed(session: Any, optimizer: Any, model: Any) -> Any:
    import torch

    import retrograde as rg

    with tempfile.TemporaryDirectory() as folder:
        session.save(f"{folder}/session.pt")
        resumed = rg.resume(model, f"{folder}/session.pt")
    model.load_state_dict(session.model.state_dict())
    again = torch.optim.SGD(model.parameters(), lr=0.05)
    again.load_state_dict(optimizer.state_dict())
    return resumed, again


def _large() -> dict[str, Any]:
    """Products for which a kernel would be chosen, with 8-bit operands and without: no calibration without kernels."""
    import torch
    from torch import nn

    import retrograde as rg
    from retrograde.kernels import compiled

    if compiled.usable():
        return {}
    found: dict[str, Any] = {}
    for forward in ("exact", "int8"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))
        x = torch.randn(64, 512)
        model(x).square().sum().backward()
        expected = model[0].weight.grad
        model.zero_grad()
        session = rg.attach(model, rg.Dither(scale=1.0, forward=forward), seed=3)
        draws = []
        for _ in range(16):
            model(x).square().sum().backward()
            draws.append(model[0].weight.grad)
            model.zero_grad()
        mean = torch.stack(draws).mean(0)
        found[forward] = {
            "off": float((mean - expected).norm() / expected.norm()),
            "one off": float((draws[0] - expected).norm() / expected.norm()),
            "kernels": [k for k in session.metrics()["layers"]["0"] if k.startswith(KERNELS)],
        }
    return found


if __name__ == "__main__":
    main()
