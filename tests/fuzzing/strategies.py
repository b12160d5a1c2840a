"""What programs are drawn from."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st

import retrograde as rg
from fuzzing.models import OPERATIONS, Part
from fuzzing.programs import EVENTS, Program
from retrograde.errors import OptionError

pick = st.sampled_from


def _made(method: Callable[..., rg.Method], **options: list[Any]) -> st.SearchStrategy[Any]:
    """The method with options drawn from lists, or left at their defaults; what it refuses is left out."""

    def make(drawn: dict[str, Any]) -> rg.Method | None:
        try:
            return method(**drawn)
        except OptionError:
            return None

    drawn = st.fixed_dictionaries({}, optional={name: pick(values) for name, values in options.items()})
    return drawn.map(make).filter(lambda made: made is not None)


SIDES = ["input", "output", "both"]
NEUTRAL = {
    # The other modes train other coordinates from their second step on.
    "decorrelate": st.builds(
        rg.Decorrelate, mode=st.just("precondition"), damping=st.just(1e12), every=pick([1, 2])
    ),
    "deepfocus": st.builds(rg.DeepFocus, warmup=st.just(100), unbiased=st.booleans())
    | st.just(rg.DeepFocus(warmup=0, q_skip=0.0, q_full=1.0)),
    "dither": pick(
        [rg.Dither(0.0), rg.Dither(0.0, bits=None), rg.Dither(1e-7, bits=None, products="float32")]
    ),
    "perforate": st.builds(
        rg.Perforate,
        rule=pick(["gradient", "hybrid", "perforated"]),
        where=st.just("*"),
        max_dendrites=pick([1, 2]),
    ),
    "spectral": st.builds(
        rg.Spectral, rank=pick([1, 1, 1, None]), side=pick(SIDES), skip_head=pick([False, True])
    ),
}
"""By method, settings that change nothing within a few steps."""

_DECORRELATE = {"rank": [1, 2], "every": [1, 2], "rows": [2, 8], "damping": [0.0, 1.0], "kappa": [0.0, 1.0]}
_DECORRELATE |= {"lr": [0.1], "variant": ["normalized"], "power": [0.5], "until": [2]}
_DEEPFOCUS = {
    "q_skip": [0.0, 0.8],
    "q_full": [0.0, 0.1],
    "warmup": [0, 1],
    "unbiased": [True],
    "p_max": [0.05],
}
_DEEPFOCUS |= {"low": ["bfloat16", None], "controller": ["random"], "momentum": [0.0]}
_DITHER = {"scale": [0.5, 4.0, 1e3], "target_sparsity": [0.8], "bits": [2, None], "forward": ["int8"]}
_PERFORATE = {"max_dendrites": [1, 2], "patience": [1], "limit": [1, 2], "period": [1, 2], "tries": [1]}
_PERFORATE |= {"candidates": [2], "candidate_patience": [1], "candidate_limit": [1, 2], "cascade": [True]}
_PERFORATE |= {"norm": ["batch", None], "initial": ["small"], "at_once": [1, 2], "grow_after": [0, 1, None]}
_PERFORATE |= {"scale": [1.0], "fit_rows": [1, 20], "fit_steps": [1, 2]}
_SPECTRAL = {
    "rank": [1, 2, 3],
    "side": SIDES,
    "every": [1, 2],
    "full_every": [2, 3],
    "warmup": [0, 1],
    "random": [1],
}
_SPECTRAL |= {"residual": ["full-step", "none"], "basis": ["random", "bulk"], "rows": [1, 8], "decay": [1e-3]}
ACTIVE = {
    "decorrelate": _made(rg.Decorrelate, mode=["lowrank", "full", "precondition"], **_DECORRELATE),
    "deepfocus": _made(rg.DeepFocus, **_DEEPFOCUS),
    "dither": _made(rg.Dither, products=["float32", "bfloat16"], **_DITHER),
    "perforate": _made(
        partial(rg.Perforate, where="*"),
        rule=["gradient", "hybrid", "perforated"],
        activation=["tanh", "sigmoid", "relu"],
        **_PERFORATE,
    ),
    "spectral": _made(rg.Spectral, update=["lie"], skip_head=[False], **_SPECTRAL),
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
        if kind == "conv2" and options["kernel_size"] == 1:
            # torch 2.13 itself writes beyond its memory there, where the input is channels_last.
            options["stride"] = 1
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
