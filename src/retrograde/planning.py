"""What happens to each layer of a model, decided before anything is changed."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from retrograde import host
from retrograde.assignment import Assignment, Given, assign
from retrograde.engine import ranks
from retrograde.engine.activations import Lightened
from retrograde.engine.layers import AttachedLayer, find_kind
from retrograde.engine.maps.base import LayerKind
from retrograde.engine.slots import Block, BlockRule, Method, Rule, Site
from retrograde.errors import NoEffectError, OptionError, RetrogradeWarning
from retrograde.forecast import Example, LayerForecast, StepForecast, observe, untouched
from retrograde.kernels import compiled, reference
from retrograde.methods.exact import Exact
from retrograde.patterns import ROOT, Choice, select, some
from retrograde.plan import BlockRow, Plan, PlanRow, over
from retrograde.trials import Candidate, Trials

_NORMALISATIONS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    *(nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
)


@dataclass(frozen=True)
class Placement:
    """A layer that will be attached, as methods were asked about it, and these with their rules, by method name."""

    site: Site
    kind: LayerKind
    methods: dict[str, Method]
    rules: dict[str, Rule]

    @property
    def name(self) -> str:
        """Full name; ``"(root)"`` for the model itself."""
        return self.site.name or ROOT


@dataclass(frozen=True)
class BlockPlacement:
    """A block that will be attached, with the names of the attached layers inside."""

    block: Block
    rule: BlockRule
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Decision:
    """What attaching does: the plan that tells it, and the layers and blocks with their rules."""

    plan: Plan
    layers: tuple[Placement, ...]
    blocks: tuple[BlockPlacement, ...]


def make_plan(
    model: nn.Module,
    methods: Given,
    *,
    only: Choice | None = None,
    skip: Choice | None = None,
    strict: bool = True,
    steps: int | None = None,
    example: Example | None = None,
    decline: bool = True,
) -> Plan:
    """Decide what attaching would do to each layer, without changing the model.

    Args:
        model: any module.
        methods: what to attach, as `attach` takes it.
        only: glob patterns over full layer names (``"features.*"``), or a function of name and layer; nothing else is
            attached.
        skip: likewise; layers that it chooses are left alone.
        strict: raise on a pattern or a method without effect.
        steps: optimizer steps of the whole run, where a method's option is a share of it.
        example: one batch, with which each layer is tried, plain and attached: the model's inputs, or a function
            without arguments that returns the loss, whose gradients are then the true ones.
        decline: leave plain the layers that attaching would not make faster, where saving time is all that their
            methods are for.

    Raises:
        PatternError: a pattern is empty or, when strict, matches no layer.
        NoEffectError: a method can act on no layer (when strict), or none can. A method whose layers are all declined
            is not an error here: the plan says so.
        OptionError: the example is not a batch, or the model is attached already.
    """
    # Without a method every layer is left, which the plan may well say.
    assignment = Assignment(()) if methods == [] else assign(methods)
    return decide(model, assignment.for_run(steps), only, skip, strict, example, decline).plan


def decide(
    model: nn.Module,
    assignment: Assignment,
    only: Choice | None,
    skip: Choice | None,
    strict: bool,
    example: Example | None,
    decline: bool,
) -> Decision:
    """`make_plan`, with the rules that attaching puts in place."""
    if not any(method.lightens for method in assignment.methods):
        # Faster, but a process then never shrinks: not for who wants less memory.
        host.keep_freed_memory()
    # To read a computed weight is to compute it, which may step a power iteration or draw a random number.
    with untouched(model):
        return _decide(model, assignment, only, skip, strict, example, decline)


def _decide(
    model: nn.Module,
    assignment: Assignment,
    only: Choice | None,
    skip: Choice | None,
    strict: bool,
    example: Example | None,
    decline: bool,
) -> Decision:
    methods = assignment.methods
    layers = _layers(model)
    fused, aliases, sharers, adapters = _fused(model), _aliases(model), _sharers(layers), _adapters(model)
    candidates = {
        name: [name, *aliases.get(name, [])] for name, layer in layers if find_kind(layer) is not None
    }
    chosen, left, patterns = set(candidates), set[str](), [*assignment.check(candidates, strict)]
    if only is not None:
        chosen, found = select(candidates, only, "only", strict, dict(layers))
        patterns += found
    if skip is not None:
        left, found = select(candidates, skip, "skip", strict, dict(layers))
        patterns += found
    selected = [
        name for name, layer in layers if isinstance(find_kind(layer), LayerKind) and name in chosen - left
    ]
    last = selected[-1] if len(selected) > 1 else None
    rows: list[PlanRow] = []
    placements: list[Placement] = []
    kernel = "auto" if compiled.installed() else reference.NAME
    for name, layer in layers:
        kind = find_kind(layer)
        status, why, rules = "left", "", dict[str, Rule]()
        if not isinstance(kind, LayerKind):
            why = kind or _why_no_layer(layer)
        elif name not in chosen:
            why = "not in `only`"
        elif name in left:
            why = "in `skip`"
        elif not (acting := assignment.of(candidates[name])[0]):
            why = assignment.why_plain(candidates[name])
        elif (dtype := _dtype(layer, weight := _weight(layer, kind))) and not dtype.is_floating_point:
            why = f"weight is {dtype}: only real floating-point layers are attached"
        elif weight is not None and not weight.numel():
            why = "weight without entries: nothing to multiply"
        else:
            map, names = kind.map(layer), kind.names(layer)
            site = Site(
                name,
                layer,
                map,
                layer._parameters.get(names[0]),  # pyright: ignore[reportPrivateUsage]
                layer._parameters.get(names[1]),  # pyright: ignore[reportPrivateUsage]
                kind,
                name in sharers,
                name == last,
                tuple(fused.get(id(layer), ())),
                adapters.get(id(layer)),
                None if weight is None else weight.shape,
            )
            reasons: list[str] = []
            around = {id(place.site.layer) for place in placements}
            inside = [m for m in site.fused_by if isinstance(m, nn.MultiheadAttention) and m is not layer]
            alone = any(id(module) not in around for module in inside)
            if alone:
                reasons.append("nn.MultiheadAttention is left alone, and multiplies by this weight itself")
            for method in () if alone else acting:
                answer = method.make_rule(site)
                if isinstance(answer, Rule):
                    rules[method.name] = answer
                else:
                    reasons.append(f"{method.name}: {answer}")
            remarks = [rule.remark for rule in rules.values() if rule.remark]
            why = "; ".join([*reasons, *remarks, *_remarks(name, site, aliases, sharers)])
            if rules:
                status = "attached"
                mine = {method.name: method for method in acting if method.name in rules}
                placements.append(Placement(site, kind, mine, rules))
        rows.append(
            PlanRow(
                name or ROOT,
                _type_name(layer),
                _shape(layer, kind),
                sum(p.numel() for p in layer.parameters(recurse=False)),
                tuple(rules),
                kernel if status == "attached" else "",
                status,
                why,
            )
        )
    refuse_no_effect(rows, methods, strict)
    _warn_of_idle(placements)
    block_rows, blocks = _plan_blocks(model, methods, placements)
    step = None
    if example is not None:
        step = _forecast(model, rows, placements, blocks, example, decline)
    plan = Plan(tuple(rows), block_rows, step, tuple(patterns), _notes(model, methods, placements))
    return Decision(plan, tuple(placements), blocks)


def _notes(model: nn.Module, methods: Sequence[Method], placements: list[Placement]) -> tuple[str, ...]:
    """What the methods that act say about the whole model."""
    notes: list[str] = []
    for method in methods:
        rules = {p.name: p.rules[method.name] for p in placements if p.methods.get(method.name) == method}
        notes += method.notes(model, rules) if rules else ()
    return tuple(notes)


def _warn_of_idle(placements: Sequence[Placement]) -> None:
    """Say that `Exact` does nothing where it stands beside other methods throughout."""
    beside = [
        {name for name, rule in place.rules.items() if type(rule) is not Rule}
        for place in placements
        if Exact.name in place.rules
    ]
    if beside and all(beside):
        others = sorted(set[str]().union(*beside))
        warnings.warn(
            f"{Exact.name} adds nothing beside {' and '.join(others)}: zeros are skipped with every method. "
            "Leave it out, or attach it alone.",
            RetrogradeWarning,
            stacklevel=6,
        )


def _forecast(
    model: nn.Module,
    rows: list[PlanRow],
    placements: list[Placement],
    blocks: Sequence[BlockPlacement],
    example: Example,
    decline: bool,
) -> StepForecast | None:
    """Try the layers that would be attached; rows and placements are changed in place.

    Of several ranks each one tries by itself, so there only the methods that need no word from the others are tried:
    those that are there to save time.
    """
    if any(isinstance(module, AttachedLayer) for module in model.modules()):
        raise OptionError(
            "the model is attached already, and what attaching would save can be forecast only for a plain one. "
            "Detach it first."
        )
    # What is there to save bytes may take time for it.
    lightens = any(m.lightens for place in placements for m in place.methods.values())
    fast = {p.name for p in placements if all(m.saves_time and not m.lightens for m in p.methods.values())}
    tried = [p for p in placements if p.name in fast or ranks.count() == 1]
    if not tried:
        return None
    layers = {place.name: place.site.layer for place in tried}
    seen = observe(model, layers, example)
    memory = seen.memory
    if lightens:
        light = Lightened(model.modules())
        try:
            memory = observe(model, layers, example).memory
        finally:
            light.end()
    around = _innermost(blocks)
    trials, changes = Trials(), [(0.0, 0.0, 0.0)]
    stays: list[Placement] = []
    for place in tried:
        calls = seen.layers.get(place.name)
        if not calls:
            continue
        found = trials.run(Candidate(place.name, place.site, place.methods, around.get(place.name)), calls)
        if not seen.memory.keeps(place.name):
            # Activation checkpointing runs it again, and keeps nothing of it before.
            found = replace(found, plain_bytes=0.0, attached_bytes=0.0)
            trials.kept.pop(place.name, None)
        index = next(i for i, row in enumerate(rows) if row.name == place.name)
        rows[index] = replace(rows[index], forecast=found)
        if decline and found.loses and place.name in fast:
            rows[index] = replace(
                rows[index],
                methods=(),
                kernel="",
                status="declined",
                why=_why_declined(found, rows[index].why),
            )
            placements.remove(place)
        else:
            stays.append(place)
            low, high = found.quartiles
            changes.append((found.attached - found.plain, low - found.plain, high - found.plain))
    attached, low, high = (seen.seconds + sum(column) for column in zip(*changes, strict=True))
    kept = {place.name: trials.kept[place.name] for place in stays if place.name in trials.kept}
    said = {method.name: method.forecast_note for place in stays for method in place.methods.values()}
    notes = tuple(note for note in said.values() if note)
    plain_bytes, attached_bytes = float(seen.memory.plain), memory.attached(kept)
    return StepForecast(seen.seconds, attached, (low, high), plain_bytes, attached_bytes, notes)


def _innermost(places: Sequence[BlockPlacement]) -> dict[str, tuple[Block, BlockRule]]:
    """By layer: the block that speaks for it."""
    found: dict[str, BlockPlacement] = {}
    for place in places:
        for layer in place.layers:
            if layer not in found or len(place.layers) <= len(found[layer].layers):
                found[layer] = place
    return {layer: (place.block, place.rule) for layer, place in found.items()}


def _why_declined(found: LayerForecast, why: str) -> str:
    reason = f"would take {over(found)} the time, at {found.zeros:.0%} zeros"
    return f"{reason}; {why}" if why else reason


def _plan_blocks(
    model: nn.Module, methods: Sequence[Method], placements: list[Placement]
) -> tuple[tuple[BlockRow, ...], tuple[BlockPlacement, ...]]:
    """The blocks of the one method that grants work to blocks: branches, and the layers outside them as chains."""
    answers = [(method, found) for method in methods if (found := method.branches(model)) is not None]
    if not answers:
        return (), ()
    if len(answers) > 1:
        names = " and ".join(method.name for method, _ in answers)
        raise OptionError(f"{names} both decide how much work a block is worth; attach one of them.")
    (method, branches) = answers[0]
    placed = {id(place.site.layer): place for place in placements if method.name in place.rules}
    outside = {
        id(layer): name
        for name, layer in model.named_modules()
        if isinstance(find_kind(layer), LayerKind) and id(layer) not in placed
    }
    entries: list[tuple[Block, tuple[str, ...], str]] = []
    covered: set[int] = set()
    for block in branches:
        inside = {id(module) for member in block.members for module in member.modules()}
        foreign = [name for key, name in outside.items() if key in inside]
        frozen = not any(p.requires_grad for member in block.members for p in member.parameters())
        left = f"holds {some(foreign)}, which {method.name} leaves alone" if foreign else ""
        left = left or ("frozen: nothing inside is trained" if frozen else "")
        entries.append((block, tuple(p.name for key, p in placed.items() if key in inside), left))
        covered |= set() if left else inside
    for key, place in placed.items():
        if key not in covered and any(p.requires_grad for p in place.site.layer.parameters()):
            chain = Block(
                place.name, "chain", place.site.layer, (place.site.layer,), why="layer in no branch"
            )
            entries.append((chain, (place.name,), ""))
    order = {id(module): position for position, module in enumerate(model.modules())}
    entries.sort(key=lambda entry: (order[id(entry[0].members[0])], entry[0].name))
    rows = tuple(
        BlockRow(
            block.name,
            _type_name(block.module),
            block.kind,
            sum({id(p): p.numel() for member in block.members for p in member.parameters()}.values()),
            layers,
            "left" if left else "attached",
            left or block.why,
        )
        for block, layers, left in entries
    )
    kept = [(block, layers) for block, layers, left in entries if not left]
    rules = method.block_rules([block for block, _ in kept])
    return rows, tuple(
        BlockPlacement(block, rule, layers) for (block, layers), rule in zip(kept, rules, strict=True)
    )


def _layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules with parameters of their own or of a kind we know, each once."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if not _is_inside_parametrization(name)
        and (next(module.parameters(recurse=False), None) is not None or find_kind(module) is not None)
    ]


def _is_inside_parametrization(name: str) -> bool:
    # torch keeps a parametrised weight's originals in submodules of the layer; they are no layers of their own.
    return "parametrizations" in name.split(".")


def _fused(model: nn.Module) -> dict[int, list[nn.Module]]:
    """By layer: the modules that multiply by its weight themselves in evaluation, without calling it."""
    found: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        inside: list[nn.Module] = []
        if isinstance(module, nn.MultiheadAttention):
            inside = [module, module.out_proj]
        elif isinstance(module, nn.TransformerEncoderLayer):
            inside = [module.linear1, module.linear2]
        elif isinstance(module, nn.TransformerEncoder):
            layers = [m for m in module.modules() if isinstance(m, nn.TransformerEncoderLayer)]
            inside = [linear for layer in layers for linear in (layer.linear1, layer.linear2)]
        for layer in inside:
            found.setdefault(id(layer), []).append(module)
    return found


def _adapters(model: nn.Module) -> dict[int, Literal["factor", "peft"]]:
    """By layer: its part in an adapter. LoRA is known by its shape: (r, i) and (o, r) beside a frozen (o, i)."""
    found: dict[int, Literal["factor", "peft"]] = {}
    for module in model.modules():
        if hasattr(module, "peft_config"):
            return {id(layer): "peft" for layer in module.modules()}
        inside = [
            child
            for part in module.children()
            for child in (part.children() if isinstance(part, nn.ModuleDict) else (part,))
            if isinstance(child, nn.Linear) and isinstance(child._parameters.get("weight"), Tensor)  # pyright: ignore[reportPrivateUsage]
        ]
        frozen = [layer for layer in inside if not layer.weight.requires_grad]
        factors = [layer for layer in inside if layer.weight.requires_grad and layer.bias is None]  # pyright: ignore[reportUnnecessaryComparison]
        for base in frozen:
            for a in factors:
                for b in factors:
                    rank = a.out_features
                    fits = a.in_features == base.in_features and b.out_features == base.out_features
                    if fits and rank == b.in_features and rank < min(base.weight.shape):
                        found |= {id(a): "factor", id(b): "factor"}
    return found


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return {group[0]: group[1:] for group in names.values() if len(group) > 1}


def _sharers(layers: list[tuple[str, nn.Module]]) -> dict[str, list[str]]:
    owners: dict[int, list[str]] = {}
    for name, layer in layers:
        for parameter in layer.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    shared: dict[str, list[str]] = {}
    for group in owners.values():
        for name in group:
            others = [other for other in group if other != name]
            if others:
                shared.setdefault(name, []).extend(others)
    return shared


def _remarks(
    name: str, site: Site, aliases: dict[str, list[str]], sharers: dict[str, list[str]]
) -> list[str]:
    remarks: list[str] = []
    if name in aliases:
        remarks.append(f"one layer, also called {', '.join(aliases[name])}")
    if name in sharers:
        remarks.append(f"weight tied to {', '.join(dict.fromkeys(sharers[name]))}")
    if nn.utils.parametrize.is_parametrized(site.layer):
        remarks.append("parametrised: its weight is computed anew in every forward pass")
    elif site.weight is not None and not site.weight.requires_grad:
        remarks.append("weight frozen: only the input gradient is computed")
    return remarks


def _why_no_layer(layer: nn.Module) -> str:
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag):
        return "embedding: a lookup, no product"
    if isinstance(layer, nn.RNNBase | nn.RNNCellBase):
        return "recurrent: all its products run inside one fused kernel"
    if isinstance(layer, nn.Bilinear):
        return "bilinear: a product of two inputs, not a linear map of one"
    if isinstance(layer, _NORMALISATIONS):
        return "normalisation: no product"
    return "not a registered linear-like layer; see register_layer"


def _type_name(layer: nn.Module) -> str:
    if isinstance(layer, AttachedLayer):
        return type(layer).__name__.removeprefix("Retrograde")
    return type(layer).__name__


def _weight(layer: nn.Module, kind: LayerKind) -> Tensor | None:
    weight = getattr(layer, kind.weight, None)
    return weight if isinstance(weight, Tensor) else None


def _dtype(layer: nn.Module, weight: Tensor | None) -> torch.dtype | None:
    # A registered layer may compute its weight; any parameter then tells.
    known = weight if weight is not None else next(layer.parameters(), None)
    return None if known is None else known.dtype


def _shape(layer: nn.Module, kind: LayerKind | str | None) -> str:
    if isinstance(kind, LayerKind):
        return kind.describe(layer)
    weight = getattr(layer, "weight", None)
    return "×".join(map(str, weight.shape)) if isinstance(weight, Tensor) else ""


def refuse_no_effect(rows: Sequence[PlanRow], methods: Sequence[Method], strict: bool) -> None:
    """Refuse methods that act on no layer; those that act beside others only when strict."""
    acting = {name for row in rows for name in row.methods}
    for method in methods:
        if method.name not in acting and (strict or not acting):
            reasons = "; ".join(f"{row.name} ({row.type}): {row.why}" for row in rows[:8])
            if len(rows) > 8:
                reasons += f"; and {len(rows) - 8} more"
            raise NoEffectError(
                f"{method.name} would touch no layer of the model, so it would have no effect. Layers: "
                f"{reasons or 'none with parameters'}. {_remedy(rows)}"
            )


def _remedy(rows: Sequence[PlanRow]) -> str:
    if any(row.status == "declined" for row in rows):
        return (
            "Layers were declined because attaching would save less than 5 % of their time on this machine: train the "
            "plain model, attach anyway with decline=False, or let a script go on with strict=False, which only warns."
        )
    return "Check `only` and `skip`, or register a layer type with retrograde.register_layer."
