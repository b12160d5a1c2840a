"""What the demonstration compares: a small model for each method, plain training beside it, and one figure.

Sizes are chosen so that three seeds of everything take about a minute on two cores, and kernels of convolutions alone
are compiled: no product of a linear layer is large enough for others than torch's own.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from retrograde.lab.claims.definition import Claim, Variant
from retrograde.lab.recipe import Recipe

BASELINE = "plain"


@dataclass(frozen=True)
class Scenario:
    """One comparison.

    Attributes:
        claim: title, recipe, baseline (first) and methods.
        metric: the figure that decides: a key of `retrograde.lab.claims.metrics.ALL`.
        unit: what the figure is of, for the verdict: ``"a step"``.
        time: the figure that says how long training takes with the method, where time is what it is for.
        least_epochs: fewer show nothing.
        without: the same network without the method, where the baseline is another one.
    """

    claim: Claim
    metric: str
    unit: str
    time: Literal["step_seconds", "late_step_seconds", "seconds_to_target"] | None = None
    least_epochs: int = 1
    without: str | None = None

    @property
    def name(self) -> str:
        """The last part of the claim's id."""
        return self.claim.id.rpartition("/")[2]

    def shortened(self, share: float, seeds: int) -> "Scenario":
        """With so much of its epochs, and so many seeds."""
        epochs = self.claim.recipe["epochs"]
        fewer = min(epochs, max(self.least_epochs, round(epochs * share)))
        recipe = {**self.claim.recipe, "epochs": fewer}
        claim = self.claim.model_copy(update={"recipe": recipe, "seeds": seeds})
        return dataclasses.replace(self, claim=claim)


def scenarios() -> tuple[Scenario, ...]:
    """All of them, in the order in which they are shown."""
    return (_convolutions(), _correlated(), _deep(), _tiny(), _transformer())


def _convolutions() -> Scenario:
    """ReLU and pooling leave most of δ zero where no BatchNorm fills it again."""
    recipe = Recipe(
        data="digits-32",
        model="vgg-small",
        # The memory format in which plain training is faster.
        model_options={"stages": [[32], [256], [512]], "channels_last": True},
        batch_size=32,
        limit=800,
        epochs=2,
    )
    claim = _claim(
        "dither",
        "Skipping zeros: a convolutional network without BatchNorm",
        "ReLU and pooling leave most gradients zero. Kernels that visit the others alone save time without any "
        "approximation; Dither makes more zeros.",
        recipe,
        {
            "exact": Variant(label="Exact()", methods={"exact": {}}),
            "dither": Variant(label="Dither(scale=1)", methods={"dither": {"scale": 1.0}}),
        },
        ["late_step_seconds", "step_seconds", "accuracy", "zeros", "executed"],
    )
    return Scenario(claim, "late_step_seconds", "a step", "late_step_seconds", least_epochs=2)


def _correlated() -> Scenario:
    """Neighbouring pixels, and the hidden features that are made of them, move together."""
    recipe = Recipe(
        data="digits",
        model="mlp",
        model_options={"widths": [256, 256, 256]},
        batch_size=512,
        epochs=30,
        learning_rate=3e-3,
        validation=0.25,
        schedule="constant",
    )
    claim = _claim(
        "decorrelate",
        "Learning in fewer steps: correlated inputs",
        "Pixels move together, and so do hidden features. Decorrelate learns from coordinates that do not.",
        recipe,
        {
            "decorrelate": Variant(
                label="Decorrelate(rank=16)", methods={"decorrelate": {"rank": 16, "every": 16}}
            )
        },
        ["seconds_to_target", "steps_to_target", "step_seconds", "accuracy"],
    )
    return Scenario(
        claim, "seconds_to_target", "to plain’s best accuracy", "seconds_to_target", least_epochs=15
    )


def _deep() -> Scenario:
    """Many residual branches, each of which may be left out of a backward pass."""
    options = {"q_skip": 0.7, "q_full": 0.1, "p_max": 0.05, "low": None, "warmup": 20}
    recipe = Recipe(
        data="digits", model="resmlp", model_options={"depth": 12, "width": 256}, batch_size=64, epochs=10
    )
    claim = _claim(
        "deepfocus",
        "Skipping whole branches: a deep residual network",
        "DeepFocus leaves out the backward pass of the branches whose error is small.",
        recipe,
        {"deepfocus": Variant(label="DeepFocus(q_skip=0.7)", methods={"deepfocus": options})},
        ["backward_seconds", "discounted_backward", "step_seconds", "accuracy"],
    )
    return Scenario(claim, "backward_seconds", "backward pass", "step_seconds", least_epochs=5)


def _tiny() -> Scenario:
    """Few neurons, so that error remains; the control has as many parameters without a dendrite."""
    recipe = Recipe(
        data="digits",
        model="mlp",
        batch_size=64,
        epochs=30,
        learning_rate=1e-2,
        validation=0.2,
        schedule="constant",
        keep="best",
    )
    options = {"max_dendrites": 1, "patience": 3, "limit": 8}
    narrow: dict[str, Any] = {"model_options": {"widths": [6]}}
    claim = _claim(
        "perforate",
        "More from few neurons: a tiny network",
        "Perforate grows artificial dendrites on a trained layer. The baseline has as many parameters without any.",
        recipe,
        {
            "narrow": Variant(label="6 neurons", recipe=narrow),
            "perforate": Variant(
                label="6 neurons, Perforate()", methods={"perforate": options}, recipe=narrow
            ),
        },
        ["accuracy", "parameters", "seconds"],
        baseline=Variant(label="13 neurons, plain", recipe={"model_options": {"widths": [13]}}),
    )
    return Scenario(claim, "accuracy", "at equal parameters", least_epochs=18, without="narrow")


def _transformer() -> Scenario:
    """What a linear layer reads is kept for its own gradient alone, where no ReLU before it keeps the same."""
    options = {"rank": 16, "warmup": 5, "every": 20, "full_every": 4}
    recipe = Recipe(
        data="digits",
        model="vit-small",
        model_options={"layers": 1, "width": 96},
        batch_size=32,
        epochs=10,
        learning_rate=4e-3,
    )
    claim = _claim(
        "spectral",
        "Keeping less for the backward pass: a transformer",
        "Spectral keeps the leading directions of each layer’s input in most steps, in place of the whole input.",
        recipe,
        {"spectral": Variant(label="Spectral(rank=16)", methods={"spectral": options})},
        ["mean_saved_bytes", "saved_bytes", "step_seconds", "accuracy"],
    )
    return Scenario(claim, "mean_saved_bytes", "kept for the backward pass", least_epochs=5)


def _claim(
    name: str,
    title: str,
    sentence: str,
    recipe: Recipe,
    methods: dict[str, Variant],
    table: list[str],
    *,
    baseline: Variant | None = None,
) -> Claim:
    return Claim(
        id=f"demo/{name}",
        title=title,
        claim=sentence,
        source="",
        recipe=recipe.model_dump(mode="json", exclude_unset=True),
        contestants={BASELINE: baseline or Variant(label="plain"), **methods},
        table=table,
        target=BASELINE if "seconds_to_target" in table else None,
    )
