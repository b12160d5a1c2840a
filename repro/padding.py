"""Padded batches: what rows of zeros that leave the products save, against batches sorted by length.

    RETROGRADE_DATA=… python repro/padding.py [--rounds 7]

A transformer encoder of torch's own (4 layers of width 256) on the real lengths of IMDB's texts, cut at 512 words: each
batch of 32 is padded to its longest text. Padding is masked in the attention and left out of the mean, so its rows of δ
are zero in every layer. Four ways of a step are timed in turns, in float32 and under bfloat16 autocast: as it is, with
`Exact`, with texts sorted by length (64 batches are drawn, sorted, and cut anew, as loaders with buckets do), and both.
Then a GPT whose loss ignores 70 % of its tokens. Gradients are compared with plain training's.

Results: results/padding.json
"""

import time
from collections.abc import Callable
from statistics import median, quantiles
from typing import Any

import torch
from reports import arguments, head
from torch import Tensor, nn
from torch.nn import functional as F

import retrograde as rg
from retrograde.lab.files import write_json
from retrograde.lab.models.transformer import GPT
from retrograde.lab.source import read

LONGEST, BATCH, WIDTH, WORDS = 512, 32, 256, 20_000
IGNORED = 0.7
LEAST = 10
"""Steps before those that count, and of those: kernels are tried in the first few."""
Step = Callable[[], tuple[float, float]]


class Classifier(nn.Module):
    """Token ids (B, L), 0 for padding → logits (B, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH, padding_idx=0)
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        padded = tokens == 0
        x = self.encoder(self.embedding(tokens), src_key_padding_mask=padded)
        real = (~padded)[..., None]
        return self.head((x * real).sum(1) / real.sum(1))


def texts(lengths: list[int], generator: torch.Generator) -> Tensor:
    """Random words, padded to the longest."""
    batch = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in zip(batch, lengths, strict=True):
        row[:length] = torch.randint(1, WORDS, (length,), generator=generator)
    return batch


def step(model: nn.Module, inputs: list[Tensor], loss: Callable[[Tensor], Tensor], half: bool) -> Step:
    """A training step on each input in turn: its seconds, and those of its backward pass."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5, fused=True)
    number = 0

    def run() -> tuple[float, float]:
        nonlocal number
        x = inputs[number % len(inputs)]
        number += 1
        optimizer.zero_grad()
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            value = loss(model(x))
        middle = time.perf_counter()
        value.backward()
        end = time.perf_counter()
        optimizer.step()
        return time.perf_counter() - start, end - middle

    return run


def gradients(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor], half: bool) -> Tensor:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        value = loss(model(x))
    value.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def compared(
    make: Callable[[], nn.Module],
    groups: dict[str, list[Tensor]],
    loss: Callable[[Tensor], Tensor],
    half: bool,
    rounds: int,
) -> dict[str, Any]:
    """Every group of inputs with the plain and with the attached model; ratios are against the first, plain."""
    runs: dict[str, Step] = {}
    off = 0.0
    for name, inputs in groups.items():
        plain, attached = make(), make()
        rg.attach(attached, rg.Exact(), seed=0)
        expected = gradients(plain, inputs[0], loss, half)
        found = gradients(attached, inputs[0], loss, half)
        off = max(off, float((found - expected).norm() / expected.norm()))
        runs[name], runs[f"{name}, exact"] = (step(m, inputs, loss, half) for m in (plain, attached))
    turns = max(len(inputs) for inputs in groups.values())
    for run in runs.values():
        for _ in range(max(2 * turns, LEAST)):
            run()
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(max(rounds, LEAST // turns)):
        for name, run in runs.items():
            # A round is every input once, so that lengths weigh alike.
            times = [run() for _ in range(turns)]
            seconds[name].append((sum(t for t, _ in times) / turns, sum(b for _, b in times) / turns))
    first = seconds[next(iter(runs))]
    return {
        "gradients_off": off,
        "runs": {
            name: {
                "step_seconds": median(s for s, _ in mine),
                "backward_seconds": median(b for _, b in mine),
                "step_speedup": quartiles([p / s for (p, _), (s, _) in zip(first, mine, strict=True)]),
                "backward_speedup": quartiles([p / b for (_, p), (_, b) in zip(first, mine, strict=True)]),
            }
            for name, mine in seconds.items()
        },
    }


def quartiles(values: list[float]) -> list[float]:
    """Quartiles of the ratios of the rounds."""
    return quantiles(values, n=4)


def main() -> None:
    parser = arguments(__doc__, "padding.json")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=6, help="batches of a round")
    options = parser.parse_args()
    report = head("a transformer on padded batches, and a GPT whose loss ignores tokens: Exact against plain")
    generator = torch.Generator().manual_seed(0)
    lengths = read("imdb").parts["train"]["lengths"]
    drawn = torch.randperm(len(lengths), generator=generator)[: 64 * BATCH]
    found = [min(int(n), LONGEST) for n in torch.as_tensor(lengths)[drawn]]
    ordered = sorted(found)
    chosen = torch.randperm(64, generator=generator)[: options.batches].tolist()
    groups = {
        name: [texts(order[BATCH * i : BATCH * (i + 1)], generator) for i in chosen]
        for name, order in (("as drawn", found), ("sorted", ordered))
    }
    # Sorted batches of these numbers hold other texts: compare time for a word.
    words = {name: sum(int((x != 0).sum()) for x in inputs) for name, inputs in groups.items()}
    padding = {name: 1 - words[name] / sum(x.numel() for x in inputs) for name, inputs in groups.items()}

    def classify(z: Tensor) -> Tensor:
        return F.cross_entropy(z.float(), torch.arange(len(z)) % 2)

    tokens = torch.randint(0, 1000, (16, 128), generator=generator)
    targets = torch.where(torch.rand(16, 128, generator=generator) < IGNORED, -100, tokens.roll(-1, 1))

    def predict(z: Tensor) -> Tensor:
        return F.cross_entropy(z.float().flatten(0, 1), targets.flatten(), ignore_index=-100)

    masked = {"masked": [tokens]}
    about = {"padding": padding, "words": words}
    rows: list[dict[str, Any]] = [
        {
            "what": what,
            "precision": "bfloat16" if half else "float32",
            **facts,
            **compared(seeded(make), inputs, loss, half, options.rounds),
        }
        for what, make, inputs, loss, facts in (
            ("encoder, padded texts", Classifier, groups, classify, about),
            (f"GPT, {IGNORED:.0%} of the tokens ignored", lambda: GPT(20_000, 128), masked, predict, {}),
        )
        for half in (False, True)
    ]
    for row in rows:
        print(row["what"], row["precision"], f"gradients off by {row['gradients_off']:.1e}", flush=True)
        runs: dict[str, Any] = row["runs"]
        for name, run in runs.items():
            print(
                f"  {name:18} step ×{run['step_speedup'][1]:.2f}, backward ×{run['backward_speedup'][1]:.2f}"
            )
    write_json(options.out, {**report, "rounds": options.rounds, "rows": rows})


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """The same weights every time."""

    def made() -> nn.Module:
        torch.manual_seed(0)
        return make()

    return made


if __name__ == "__main__":
    main()
