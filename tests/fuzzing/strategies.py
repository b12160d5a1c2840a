"""What programs are drawn from."""

from typing import Any

import torch
from hypothesis import strategies as st

import retrograde as rg
from fuzzing.models import OPERATIONS, Part
from fuzzing.programs import EVENTS, Program
from retrograde.errors import OptionError

pick = st.sampled_from


def _made(method: type[rg.Method], **options: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """The method with drawn options, of which those that it refuses are left out."""

    def make(drawn: dict[str, Any]) -> rg.Method | None:
        try:
            return method(**drawn)
        except OptionError:
            return None

    return st.fixed_dictionaries({}, optional=options).map(make).filter(lambda made: made is not None)


_MODE = pick(["lowrank", "full", "precondition"])
NEUTRAL = {
    # The other modes train other coordinates from their second step on.
    "decorrelate": st.builds(
        rg.Decorrelate, mode=st.just("precondition"), damping=st.just(1e12), every=pick([1, 2])
    ),
    "deepfocus": st.builds(rg.DeepFocus, warmup=st.just(100), unbiased=st.booleans())
    | st.builds(rg.DeepFocus, warmup=st.just(0), q_skip=st.just(0.0), q_full=st.just(1.0)),
    "dither": st.builds(rg.Dither, scale=st.just(0.0), bits=pick([8, None]))
    | st.just(rg.Dither(scale=1e-7, bits=None, products="float32")),
    "perforate": st.builds(rg.Perforate, rule=pick(["gradient", "perforated"]), max_dendrites=pick([1, 2])),
    "spectral": st.builds(
        rg.Spectral,
        rank=pick([1, 1, 1, None]),
        side=pick(["input", "output", "both"]),
        skip_head=pick([False, False, True]),
    ),
}
"""By method, settings that change nothing within a few steps."""

ACTIVE = {
    "decorrelate": _made(
        rg.Decorrelate,
        mode=_MODE,
        rank=pick([1, 2]),
        every=pick([1, 2]),
        kappa=pick([0.0, 1.0]),
        lr=pick([0.1]),
        variant=pick(["published", "normalized"]),
        damping=pick([0.0, 1.0]),
        power=pick([0.5]),
        rows=pick([2, 8]),
        until=pick([0.5]),
        total_steps=pick([4]),
    ),
    "deepfocus": _made(
        rg.DeepFocus,
        q_skip=pick([0.0, 0.8]),
        q_full=pick([0.0, 0.1]),
        warmup=pick([0, 1]),
        unbiased=st.booleans(),
        low=pick(["int8", "bfloat16", None]),
        controller=pick(["quantile", "random"]),
        p_max=pick([0.05]),
        momentum=pick([0.0]),
    ),
    "dither": _made(
        rg.Dither,
        scale=pick([0.5, 4.0, 1e3]),
        target_sparsity=pick([0.8]),
        bits=pick([2, None]),
        products=pick(["float32", "bfloat16"]),
        forward=pick(["exact", "int8"]),
    ),
    "perforate": _made(
        rg.Perforate,
        rule=pick(["gradient", "perforated"]),
        max_dendrites=pick([1, 2]),
        activation=pick(["tanh", "sigmoid", "relu"]),
        patience=st.just(1),
        tries=pick([1]),
        candidates=pick([2]),
        limit=pick([1, 2]),
        candidate_patience=pick([1]),
        candidate_limit=pick([1, 2]),
        period=pick([1, 2]),
    ),
    "spectral": _made(
        rg.Spectral,
        rank=pick([1, 1, 2, 3]),
        side=pick(["output", "both"]),
        every=pick([1, 2]),
        update=pick(["lie"]),
        residual=pick(["full-step", "none"]),
        full_every=pick([2, 3]),
        warmup=pick([0, 1]),
        decay=pick([1e-3]),
        random=pick([1]),
        basis=pick(["random", "bulk"]),
        rows=pick([1, 8]),
        skip_head=st.just(False),
    ),
}
"""By method, settings that act within a few steps."""


MAPS = ["linear", "linear", "sequence", "turned", "attention", "encoder"]
MAPS += [f"{kind}{dim}" for kind in ("conv", "transposed") for dim in (1, 2, 3)]
OTHERS = ["lazy", "lstm", "layernorm", "batchnorm1", "batchnorm2", "batchnorm3"]
AROUNDS = ["", "", "frozen weight", "frozen", "backward hook", "forward hook", "parameter hook"]
COMPUTED = ["weight_norm", "spectral_norm", "orthogonal", "prune"]


@st.composite
def layers(draw: st.DrawFn, kinds: list[str], arounds: list[str]) -> Part:
    """One layer, of a few features."""
    kind = draw(pick(kinds))
    options: dict[str, Any] = {}
    if kind in MAPS and kind != "turned":
        options["bias"] = draw(st.booleans())
    if kind.startswith(("conv", "transposed")):
        options |= {"kernel_size": draw(pick([1, 2, 3])), "groups": draw(pick([1, 2]))}
        options |= {
            "stride": draw(pick([1, 2])),
            "dilation": draw(pick([1, 1, 2])),
            "padding": draw(pick([0, 1])),
        }
        if kind.startswith("conv"):
            options["padding_mode"] = draw(pick(["zeros", "zeros", "circular", "reflect", "replicate"]))
            if options["stride"] == 1 and draw(st.booleans()):
                options["padding"] = "same"
    features = pick([1, 2, 3, 3, 4, 5, 8])
    if kind in ("linear", "sequence") and draw(pick([False] * 7 + [True])):
        features = pick([0, 1, 3])
    around = "" if kind == "lazy" else draw(pick(arounds))
    return Part(kind, draw(features), draw(features), tuple(options.items()), around)


def _containers(inner: st.SearchStrategy[Part]) -> st.SearchStrategy[Part]:
    kinds = pick(["nested", "residual", "twice", "tied", "checkpoint", "unused"])
    return st.builds(
        lambda kind, inner: Part(kind, inner=tuple(inner)), kinds, st.lists(inner, min_size=1, max_size=3)
    )


parts = st.recursive(
    layers(MAPS + OTHERS, AROUNDS + COMPUTED) | pick(sorted(OPERATIONS)).map(Part), _containers, max_leaves=4
)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """A whole case."""
    neutral = draw(st.booleans())
    names = draw(st.lists(pick(sorted(NEUTRAL)), min_size=1, max_size=2, unique=True))
    methods = tuple(draw((NEUTRAL if neutral else ACTIVE)[name]) for name in names)
    dtype = draw(pick([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    # How often a line search asks for a gradient hangs on roundings.
    searching = ["lbfgs"] if dtype.itemsize > 2 else []
    return Program(
        (draw(layers(MAPS, [*[""] * 4, *AROUNDS])), *draw(st.lists(parts, max_size=3))),
        methods,
        neutral,
        tuple(draw(st.lists(pick(["step", "step", "step", *EVENTS]), min_size=1, max_size=6))),
        draw(pick(["sgd", "adamw", "rmsprop", "two", *searching])),
        draw(pick([4, 4, 4, 3, 1, 0])),
        dtype,
        draw(st.booleans()),
        draw(pick(["tensor", "tuple", "dict"])),
        draw(pick([False, False, True])),
        draw(pick([False, False, False, True])),
        draw(st.integers(0, 99)),
    )
