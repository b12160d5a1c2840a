r"""Exact skipping: the zeros of a gradient are not multiplied, and nothing else changes.

ReLU, max pooling, dropout, padding and masked losses leave zeros in the gradient δ at a layer's output. They add
nothing to either backward product:

    dx_n = Σ_{o: δ_no ≠ 0} δ_no W_o       (1)   the non-zeros alone, one by one,
    dW_o = Σ_{n: δ_no ≠ 0} δ_no x_n       (2)   where these are few
    dx_R = δ_RC W_C,  dW_C = δ_RCᵀ x_R    (3)   or rows R and columns C that are not zero throughout, densely

for a linear layer; for a convolution likewise, with images and channels for rows and columns. (1) and (2) run in
float32 on a CPU; (3) in any precision, under autocast too. Which of them computes a product, or torch's own dense
kernel, is measured when a product of its shape and share of zeros is first met.

Deviations: none, since there is no approximation. Sums are taken in another order, so gradients differ from plain
training's by rounding alone. A zero of δ that meets an infinite or undefined number gives zero here, and NaN there.

Cost: counting δ's zeros, in a few steps only, and finding the first non-zero of each of its rows.

Suggested settings: there are none. It pays for layers that are followed by ReLU or max pooling and by no BatchNorm,
whose gradients have 80 to 99 % zeros, and for padded or masked batches. BatchNorm's backward pass makes δ dense, and so
does GELU; give `attach` an `example`, and layers that would not become faster are left plain. Every other method skips
zeros, too: attach this one alone where nothing else is to change. On a GPU rows and columns are not looked for.
"""

from dataclasses import dataclass
from typing import ClassVar

from retrograde.engine.slots import Method, Rule, Site


@dataclass(frozen=True)
class Exact(Method):
    """Skips zeros of δ, and changes nothing else; `retrograde methods exact` prints its equations and cost.

    Examples:
        >>> session = rg.attach(model, rg.Exact())
    """

    name: ClassVar[str] = "exact"
    saves_time: ClassVar[bool] = True

    def make_rule(self, site: Site) -> Rule:
        """One without slots: the engine skips zeros wherever that is faster."""
        return Rule(site.name)
