"""Two intertwined spirals, 194 points: a base too small for them, alone and with dendrites.

python examples/two_spirals.py                      # 2-8-8-1, dendrites that train by the loss
python examples/two_spirals.py --rule perforated    # a linear layer alone: cascade correlation
"""

import argparse
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import retrograde as rg
from retrograde.methods.perforate import Perforate

STEPS_PER_REPORT = 50


def spirals(i: Tensor) -> tuple[Tensor, Tensor]:
    """Points at parameter `i`, 0 to 96, of both spirals, and their labels."""
    angle, radius = i * math.pi / 16, (104 - i) / 104
    points = torch.stack([radius * torch.sin(angle), radius * torch.cos(angle)], 1)
    return torch.cat([points, -points]), torch.cat([torch.ones_like(i), torch.zeros_like(i)])


def base(learning: str) -> nn.Module:
    """The base: linear for the perforated rule, two hidden layers of eight for the gradient rule."""
    if learning == "perforated":
        return nn.Sequential(nn.Linear(2, 1))
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))


def train(model: nn.Module, reports: int, session: rg.Session | None) -> int:
    """Full-batch Adam until the loss is below 0.005; returns the steps made."""
    x, y = spirals(torch.arange(97.0))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for report in range(1, reports + 1):
        for _ in range(STEPS_PER_REPORT):
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(model(x)[:, 0], y).backward()
            optimizer.step()
        with torch.no_grad():
            loss = float(F.binary_cross_entropy_with_logits(model(x)[:, 0], y))
        if session is not None:
            session.validated(-loss)
        if loss < 0.005 or (session is not None and session.metrics()["perforate"]["phase"] == "finished"):
            return report * STEPS_PER_REPORT
    return reports * STEPS_PER_REPORT


@torch.no_grad()
def accuracy(model: nn.Module, i: Tensor) -> float:
    """Share of points on the right side."""
    x, y = spirals(i)
    return float(((model(x)[:, 0] > 0) == (y > 0.5)).float().mean())


def main() -> None:
    """Train both, and print a line for each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rule", default="gradient", choices=["gradient", "perforated"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reports", type=int, default=500)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    perforated = chosen.rule == "perforated"
    method = Perforate(
        rule=chosen.rule,
        where="*",
        # One set after the other in a cascade, as in the papers.
        norm=None,
        activation="tanh",
        initial="small",
        scale=1.0,
        at_once=1,
        cascade=True,
        grow_after=None,
        max_dendrites=20 if perforated else 6,
        candidates=8 if perforated else 1,
        patience=4 if perforated else 6,
        limit=20 if perforated else 60,
        candidate_patience=2,
        candidate_limit=8,
        candidate_rate=0.05,
        momentum=0.3,
        tries=3,
    )
    dense = torch.linspace(0, 96, 2881)
    for grown in (False, True):
        torch.manual_seed(chosen.seed)
        model = base(chosen.rule)
        session = rg.attach(model, method) if grown else None
        steps = train(model, chosen.reports, session)
        sets = 0 if session is None else int(session.metrics()["perforate"]["dendrites"])
        trained, held_out = accuracy(model, torch.arange(97.0)), accuracy(model, dense)
        name = f"with {sets} dendrite sets" if grown else "base alone"
        print(f"{name}: {steps} steps, {trained:.1%} of 194 points, {held_out:.1%} of 5,762 between them")


if __name__ == "__main__":
    main()
