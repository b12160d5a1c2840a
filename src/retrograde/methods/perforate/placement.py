"""Which layers get dendrites, what these cost, and what the plan says about both."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING

from torch import nn

from retrograde.engine.slots import Site
from retrograde.methods.perforate import dendrites
from retrograde.methods.perforate.sets import fan_in

if TYPE_CHECKING:
    from retrograde.methods.perforate import Perforate
    from retrograde.methods.perforate.rule import DendriteRule

_MOST_INPUTS = 4
"""For each output, of a layer that need not be named."""


def refusal(method: "Perforate", site: Site) -> str:
    """Why a layer gets no dendrites; empty where it can have them. `where` is another question."""
    if isinstance(site.layer, dendrites.Dendritic):
        return "has dendrites already, of an earlier session"
    if any(isinstance(module, nn.MultiheadAttention) for module in site.fused_by):
        return "nn.MultiheadAttention multiplies by this weight itself in evaluation, past any dendrite"
    if site.weight is None:
        return "dendrites would be copies of a weight that is computed"
    if site.adapter == "peft":
        return "in a peft model, which saves and merges its own adapters alone, and would leave dendrites out"
    if site.adapter == "factor":
        return "factor of a low-rank adapter: a merge multiplies its weight, and would leave dendrites out"
    if hasattr(site.layer, "dendrites"):
        return "has an attribute `dendrites` of its own"
    if not site.weight.requires_grad:
        if method.rule != "gradient":
            return "weight frozen: its input, which dendrites are fitted to, is not kept"
        if method.where is None:
            return "weight frozen, and dendrites would train: name it in Perforate(where=…) if you want that"
    inputs, outputs = fan_in(site.map, site.weight.shape), site.map.outputs(site.weight.shape)
    if method.where is None and inputs > _MOST_INPUTS * outputs:
        return (
            f"{inputs:,.0f} inputs for {outputs:,} outputs: with more than {_MOST_INPUTS} for one, dendrites cost many "
            "parameters and add few neurons; name it in Perforate(where=…) if you want that"
        )
    return ""


def cost(method: "Perforate", site: Site) -> int:
    """Parameters of all dendrites of a layer: M and its bias, or γ and β; w; V."""
    assert site.weight is not None
    shape, growths = site.weight.shape, method.growths
    own = 3 if method.normalises else 1 + (site.bias is not None)
    cascade = sum(sum(growths[:i]) * sets for i, sets in enumerate(growths)) if method.cascade else 0
    return method.max_dendrites * prod(shape) + site.map.outputs(shape) * (
        method.max_dendrites * own + cascade
    )


def remark(method: "Perforate", site: Site) -> str:
    """Cost of a layer's dendrites, their keys, and when they grow."""
    assert site.weight is not None
    added, outputs = cost(method, site), site.map.outputs(site.weight.shape)
    wider = outputs + added // (site.weight.numel() // outputs + (site.bias is not None))
    growths = method.growths
    products = "1 product" if len(growths) == 1 else f"{len(growths)} products"
    most = "" if len(set(growths)) == 1 else "up to "
    return (
        f"{method.max_dendrites} dendrite sets by {products} of {most}{max(growths) * outputs:,} outputs, {added:,} "
        f"parameters (as many as a plain layer of {wider:,} outputs in place of {outputs:,}), from the start, with "
        f"keys in state_dict: dendrites.*; when they grow: {_when(method)}"
    )


def _when(method: "Perforate") -> str:
    if method.first_growth is not None:
        return f"after step {method.first_growth}"
    if method.period is not None:
        return f"every {method.period} steps, or as each session.validated(…) decides"
    decides = "each session.validated(…) decides"
    if method.grow_after is None:
        return decides
    unknown = f"the run's length, for grow_after={method.grow_after}, is not known: attach(…, steps=…)"
    return f"{decides} ({unknown})"


def notes(method: "Perforate", model: nn.Module, rules: Mapping[str, "DendriteRule"]) -> Sequence[str]:
    """What all dendrites cost, and that a network without normalisation gains by that first."""
    whole = sum(parameter.numel() for parameter in model.parameters())
    added = sum(rule.cost for rule in rules.values())
    found = [
        f"perforate: {added:,} parameters for dendrites on {len(rules)} layers, beside {whole:,} of the model. Where "
        "widths may change, wider layers with as many are as accurate or more so."
    ]
    if method.normalises and not any("norm" in type(module).__name__.lower() for module in model.modules()):
        found.append(
            "perforate: the model has no normalisation. Most of what dendrites with a norm bring to such a network, a "
            "norm in the network brings as well: compare with that."
        )
    return found
