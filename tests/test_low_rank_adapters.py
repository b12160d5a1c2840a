"""Low-rank adapters of the package peft: they train and merge with every method that does not refuse them."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import retrograde as rg
from cases import batch, seeded
from retrograde.engine.layers import AttachedLayer
from retrograde.engine.slots import Method
from retrograde.errors import NoEffectError

STEPS = 6
METHODS: dict[str, Method] = {
    "exact": rg.Exact(),
    "dither": rg.Dither(),
    "decorrelate": rg.Decorrelate(rank=2, every=2),
    "deepfocus": rg.DeepFocus(warmup=1),
    "spectral": rg.Spectral(rank=2, warmup=1, full_every=3, every=2),
}


def adapted() -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4))
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config)


def trained(model: Any, session: rg.Session | None) -> dict[str, torch.Tensor]:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(STEPS):
        torch.sin(model(batch((16, 8), seed=step))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert session is None or session.step == STEPS
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("method", METHODS)
def test_peft_model(method: str) -> None:
    """Adapters move, as by no other method, the base does not, and what is folded merges to the same function."""
    plain, model = seeded(adapted), seeded(adapted)
    before = copy.deepcopy(model.state_dict())
    session = rg.attach(model, METHODS[method], seed=1)
    expected, found = trained(plain, None), trained(model, session)
    changed = {name for name, value in found.items() if not torch.equal(value, before[name])}
    assert changed == {name for name in found if "lora_" in name}
    # These layers are too small for anything but torch's own products.
    differs = any(not torch.equal(found[name], expected[name]) for name in changed)
    assert differs is (method != "exact")
    x = batch((5, 8), seed=99)
    model.eval()
    with torch.no_grad():
        answer = model(x)
        merged = session.fold().merge_and_unload()
        torch.testing.assert_close(merged(x), answer)
    assert not any(isinstance(module, AttachedLayer) for module in merged.modules())
    assert merged.state_dict().keys() == {f"{at}.{part}" for at in (0, 2, 4) for part in ("weight", "bias")}


@pytest.mark.parametrize("method", ["perforate"])
def test_peft_model_is_refused(method: str) -> None:
    """Of a method whose parameters peft would neither save nor merge."""
    with pytest.raises(NoEffectError, match="peft"):
        rg.attach(adapted(), {"perforate": rg.Perforate()}[method])
