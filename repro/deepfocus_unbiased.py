"""DeepFocus, ``unbiased=True``: the mean gradient over many draws against the dense gradient, six residual blocks.

    python repro/deepfocus_unbiased.py [--draws 20000] [--low none|int8|bfloat16]

Prints JSON: the largest |mean − dense| in standard errors over all entries, and the mean square of that score (1 for an
unbiased estimate).

Results: printed
"""

import json
import warnings

import torch
from reports import arguments
from torch import nn

import retrograde as rg
from retrograde.engine.branches import Residual
from retrograde.methods.deepfocus import DeepFocus

BLOCKS, WIDTH = 6, 4


def model() -> nn.Module:
    """Six branches with a norm and a non-linearity, in float64."""
    torch.manual_seed(0)
    branches = [
        nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 6), nn.Tanh(), nn.Linear(6, WIDTH))
        for _ in range(BLOCKS)
    ]
    ends = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)
    return nn.Sequential(ends[0], *(Residual(branch) for branch in branches), ends[1]).double()


def gradient(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """All gradients, flattened; zeros where there is none."""
    net.zero_grad()
    torch.sin(net(x)).sum().backward()
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in net.parameters()]
    )


def main() -> None:
    """Draw, and print."""
    parser = arguments(__doc__)
    parser.add_argument("--draws", type=int, default=20_000)
    parser.add_argument("--low", default="none", choices=("none", "int8", "bfloat16"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    # No optimizer steps here: every draw is of one and the same gradient.
    warnings.simplefilter("ignore", rg.errors.RetrogradeWarning)
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    expected = gradient(model(), x)
    net = model()
    method = DeepFocus(unbiased=True, low=None if options.low == "none" else options.low, warmup=0, p_min=0.2)
    session = rg.attach(net, method, seed=0)
    gradient(net, x)
    state = session.state_dict()
    for block in state["blocks"].values():
        mean = block["rule"]["step"][1]
        # The mean at twice the error that the dense gradient has: r is around 0.5, and α above it.
        block["rule"] |= {"alpha": 1.0, "beta": 1.2, "mean": 2 * mean, "step": [0, 0.0, 0, 0]}
    session.load_state_dict(state)
    session.metrics(reset=True)
    total, squares = torch.zeros_like(expected), torch.zeros_like(expected)
    for _ in range(options.draws):
        found = gradient(net, x) - expected
        total += found
        squares += found * found
    mean = total / options.draws
    error = ((squares / options.draws - mean**2).clamp(min=0) / options.draws).sqrt()
    random = error > 1e-12
    score = (mean[random] / error[random]).abs()
    blocks = list(session.metrics()["blocks"].values())[1:-1]
    print(
        json.dumps(
            {
                "draws": options.draws,
                "low": options.low,
                "entries": int(random.sum()),
                "largest_score": float(score.max()),
                "mean_square_score": float(score.square().mean()),
                "largest_error_of_exact_entries": float(mean[~random].abs().max())
                if bool((~random).any())
                else 0.0,
                "relative_deviation_of_one_draw": float(
                    squares.sum().div(options.draws).sqrt() / expected.norm()
                ),
                "skip": sum(b["skip"] for b in blocks) / len(blocks),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
