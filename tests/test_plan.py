"""The plan says what happens to every layer, and why, and changes nothing."""

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

import retrograde as rg
from cases import cnn, mlp, program
from retrograde.errors import NoEffectError, PatternError


class Zoo(nn.Module):
    """One layer of every fate."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.norm = nn.LayerNorm(8)
        self.rnn = nn.GRU(8, 8)
        self.conv = nn.Conv2d(4, 8, (3, 5), groups=2)
        self.frozen = nn.Linear(8, 3).requires_grad_(False)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 3))
        self.head = nn.Linear(8, 7, bias=False)
        self.head.weight = self.embed.weight
        self.same = self.conv
        self.complex = nn.Linear(3, 3, dtype=torch.complex64)
        self.scale = nn.PReLU()


def rows(model: nn.Module, **options: Any) -> dict[str, rg.plan.PlanRow]:
    return {row.name: row for row in rg.make_plan(model, [rg.Dither()], **options).rows}


def test_zoo() -> None:
    found = rows(Zoo())
    expected = {
        "embed": ("left", "embedding"),
        "attention": ("attached", ""),
        "attention.out_proj": ("attached", ""),
        "norm": ("left", "normalisation"),
        "rnn": ("left", "recurrent"),
        "conv": ("attached", "also called same"),
        "frozen": ("attached", "frozen"),
        "normed": ("attached", "parametrised"),
        "head": ("attached", "weight tied to embed"),
        "complex": ("left", "complex64"),
        "scale": ("left", "register_layer"),
    }
    assert {name: row.status for name, row in found.items()} == {n: s for n, (s, _) in expected.items()}
    for name, (_, word) in expected.items():
        assert word in found[name].why, name
    assert found["conv"].shape == "4→8 3×5 /2"
    assert found["conv"].parameters == 8 * 2 * 15 + 8
    assert found["head"].shape == "8→7"
    assert found["attention"].shape == "8→24"
    assert found["attention"].parameters == 3 * 8 * 8 + 3 * 8
    assert found["attention.out_proj"].shape == "8→8"
    assert found["attention.out_proj"].parameters == 8 * 8 + 8
    assert found["conv"].methods == ("dither",)
    assert found["embed"].methods == ()


class OtherWidths(nn.Module):
    """Attention whose keys and values have projections of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, kdim=4, vdim=6)
        self.head = nn.Linear(8, 3)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.head(self.attention(q, k, v)[0])


@pytest.mark.parametrize("why", ["widths", "skip"])
def test_attached_is_what_runs(why: str) -> None:
    """A layer that the plan calls attached is one whose program runs: attention left plain calls no layer inside."""
    model = OtherWidths() if why == "widths" else nn.TransformerEncoderLayer(8, 2, 16)
    attention = "attention" if why == "widths" else "self_attn"
    session = rg.attach(model, rg.Dither(), skip=None if why == "widths" else attention)
    found = {row.name: row for row in session.plan.rows}
    assert found[attention].status == "left"
    x = (torch.randn(5, 2, 8), torch.randn(4, 2, 4), torch.randn(4, 2, 6))
    model(*x[: 3 if why == "widths" else 1]).sum().backward()
    ran = {
        name
        for name, layer in model.named_modules()
        if "_retrograde" in layer.__dict__ and program(layer).calls
    }
    assert ran == {name for name, row in found.items() if row.status == "attached"}


def test_plan_changes_nothing() -> None:
    model = Zoo()
    plan = rg.make_plan(model, [rg.Dither()])
    assert not any("_retrograde" in m.__dict__ for m in model.modules())
    json.dumps(plan.to_dict())
    text = str(plan)
    for row in plan.rows:
        assert row.name in text


def test_a_computed_weight_is_read_without_a_trace() -> None:
    """A spectral norm steps its power iteration whenever the weight is read in training."""
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)))
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    rg.make_plan(model, [rg.Dither()])
    rg.attach(model, rg.Dither())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_plan_of_an_attached_model() -> None:
    """make_plan of an attached model gives the plan that attached it."""
    session = rg.attach(mlp(), rg.Dither())
    assert rg.make_plan(session.model, [rg.Dither()]).rows == session.plan.rows


def test_module_called_weight() -> None:
    """A layer whose attribute `weight` is no tensor does not upset the plan."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Linear(3, 3)
            self.gain = nn.Parameter(torch.ones(1))

    found = rows(nn.Sequential(Odd()))
    assert found["0"].status == "left"
    assert found["0.weight"].status == "attached"


def test_root() -> None:
    """A model that is one layer goes by "(root)"."""
    assert rows(nn.Linear(2, 3))["(root)"].status == "attached"
    assert rows(nn.Linear(2, 3), only="(root)")["(root)"].status == "attached"


@pytest.mark.parametrize("option", ["only", "skip"])
def test_patterns(option: str) -> None:
    """Misspelt, empty and blank patterns, each with a way out in the message."""
    model = nn.ModuleDict({"encoder": mlp(), "decoder": cnn()})
    with pytest.raises(
        PatternError, match=r"'encodr\.0' in `\w+` matches no layer.*Nearest names: encoder\.0"
    ):
        rows(model, **{option: "encodr.0"})
    with pytest.raises(PatternError, match=r"'zzz'.*Layers: encoder\.0"):
        rows(model, **{option: ["encoder.*", "zzz"]})
    with pytest.raises(PatternError, match="empty list"):
        rows(model, **{option: []})
    for blank in ("", "  ", ["encoder.0", ""], [None], [3]):
        with pytest.raises(PatternError, match="not a layer pattern"):
            rows(model, **{option: blank})
    # A layer that exists but is of no kind we know matches nothing either.
    with pytest.raises(PatternError):
        rows(model, **{option: "encoder.1"})


def test_globs() -> None:
    model = nn.ModuleDict({"encoder": mlp(), "decoder": mlp()})
    assert [n for n, r in rows(model, only="enc*").items() if r.status == "attached"] == [
        "encoder.0",
        "encoder.2",
        "encoder.4",
    ]
    found = rows(model, only=["encoder.*", "decoder.0"], skip="*.0")
    assert [n for n, r in found.items() if r.status == "attached"] == ["encoder.2", "encoder.4"]
    assert found["encoder.0"].why == "in `skip`"
    assert found["decoder.2"].why == "not in `only`"


def test_alias_as_pattern() -> None:
    """Every name that a shared layer goes by chooses it."""
    model = nn.Module()
    model.first = nn.Linear(2, 2)
    model.second = model.first
    model.other = nn.Linear(2, 2)
    found = rows(model, skip="second")
    assert found["first"].status == "left"
    assert found["other"].status == "attached"


class Talkative(rg.Method):
    """Says of the whole model how many layers it acts on."""

    name = "talkative"

    def make_rule(self, site: rg.Site) -> rg.Rule | str:
        return rg.Rule(site.name) if isinstance(site.layer, nn.Linear) else "no linear layer"

    def notes(self, model: nn.Module, rules: Any) -> list[str]:
        return [f"{len(list(model.parameters()))} parameters, rules for {', '.join(rules)}."]


def test_notes_of_methods() -> None:
    """A method may say something about the whole model; one that acts on nothing says nothing."""
    plan = rg.make_plan(mlp(), [Talkative(), rg.Dither()], only=["0", "4"])
    assert plan.notes == ("6 parameters, rules for 0, 4.",)
    assert str(plan).endswith("\n\n6 parameters, rules for 0, 4.")
    assert plan.to_dict()["notes"] == list(plan.notes)
    plan = rg.make_plan(cnn(), [Talkative(), rg.Dither()], only="0", strict=False)
    assert plan.notes == ()
    assert "notes" not in plan.to_dict()


def test_not_strict() -> None:
    """strict=False forgives a pattern without a match, not a plan without effect."""
    assert rows(mlp(), skip="nothing", strict=False)["0"].status == "attached"
    with pytest.raises(NoEffectError):
        rows(mlp(), only="nothing", strict=False)


def test_no_effect_names_the_layers() -> None:
    with pytest.raises(NoEffectError, match=r"0 \(BatchNorm1d\): normalisation"):
        rows(nn.Sequential(nn.BatchNorm1d(3)))
