"""Runs killed at random moments and resumed: do they end in the weights of a run that nobody killed, bit for bit?

    python repro/kills.py [--kills 200] [--seed 0]

Each method trains a small network; every few steps model, optimizer and ``session.state_dict()`` go into one file,
which replaces the one before it at once. A process that trains is killed (SIGKILL) after a random time, and the next
one goes on from the file, until the run ends; then another begins. *Lost*: a file that was written is gone or cannot
be read, or a process failed. *Different*: a run ended in other weights. ``results/kills.json`` gets both for each
method, and the phases and moments in which the kills fell.

Results: results/kills.json
"""

import mmap
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from reports import arguments, head
from torch import Tensor, nn

import retrograde as rg
from retrograde.engine.slots import Method
from retrograde.host import write_atomically
from retrograde.lab import files

STEPS, SAVE_EVERY, REPORT_EVERY = 240, 3, 4
MOMENTS = ("starting", "forward and backward", "optimizer step", "saving")

# Set so that all that a method goes through happens within the steps.
METHODS: dict[str, Method] = {
    "decorrelate": rg.Decorrelate(rank=4, every=7),
    "deepfocus": rg.DeepFocus(warmup=60, p_max=0.2),
    "dither": rg.Dither(scale=1.0, target_sparsity=0.8),
    "perforate": rg.Perforate(rule="perforated", max_dendrites=2, patience=3, limit=10, candidate_limit=8),
    "spectral": rg.Spectral(4, warmup=60, every=9, full_every=3, skip_head=False),
}


def build() -> nn.Module:
    """A convolution, a residual branch and a head."""
    torch.manual_seed(0)
    branch = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 16),
        rg.Residual(branch),
        nn.Linear(16, 4),
    )


class Board:
    """What a process that may be killed tells the one that kills it: its step, phase and moment."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, 4)

    def tell(self, step: int, phase: int, moment: int) -> None:
        self._shared[:] = bytes([step % 256, step // 256, phase, moment])

    def read(self) -> tuple[int, int, int]:
        low, high, phase, moment = self._shared[:]
        return low + 256 * high, phase, moment


PHASES = (
    "full steps of the warm-up",
    "after the warm-up",
    "neuron phase",
    "dendrite phase",
    "finished",
    "refresh",
    "between refreshes",
    "training",
)


def phase_of(name: str, session: rg.Session, step: int) -> int:
    """Where a method is."""
    method = METHODS[name]
    match method:
        case rg.Perforate():
            found = session.metrics()["perforate"]["phase"]
            return PHASES.index(found if found == "finished" else f"{found} phase")
        case rg.DeepFocus() | rg.Spectral():
            return int(step >= method.warmup)
        case rg.Decorrelate():
            return PHASES.index("refresh" if step % method.every == 0 else "between refreshes")
        case _:
            return PHASES.index("training")


def train(name: str, file: Path, board: Board) -> dict[str, Tensor]:
    """A whole run, from the file where there is one."""
    board.tell(0, 0, 0)
    model = build()
    session = rg.attach(model, METHODS[name], seed=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    parts, first = (model, optimizer, session), 0
    if file.exists():
        first, *states = torch.load(file, weights_only=True)
        for part, state in zip(parts, states, strict=True):
            part.load_state_dict(state)
    for step in range(first, STEPS):
        phase = phase_of(name, session, step)
        board.tell(step, phase, 1)
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(16, 2, 4, 4, generator=generator), torch.randint(4, (16,), generator=generator)
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        board.tell(step, phase, 2)
        optimizer.step()
        if step % REPORT_EVERY == 0:
            session.report(val=-float(loss.detach()))
        if (step + 1) % SAVE_EVERY == 0:
            board.tell(step, phase, 3)
            content = [step + 1, *(part.state_dict() for part in parts)]
            write_atomically(file, lambda opened, content=content: torch.save(content, opened))
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Keys and bits."""
    return found.keys() == expected.keys() and all(torch.equal(found[k], v) for k, v in expected.items())


def in_process(name: str, file: Path, board: Board) -> int:
    """Train in a process of its own, which leaves its weights beside the file; returns its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        weights = train(name, file, board)
        write_atomically(file.with_suffix(".end"), lambda opened: torch.save(weights, opened))
        status = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(status)


def ended(file: Path) -> dict[str, Tensor] | None:
    """The weights of a run that has ended, whose files are taken away."""
    end = file.with_suffix(".end")
    weights = torch.load(end, weights_only=True) if end.exists() else None
    end.unlink(missing_ok=True)
    file.unlink(missing_ok=True)
    return weights


def kill(name: str, kills: int, folder: Path, dice: random.Random) -> dict[str, Any]:
    """The row of one method: runs until that many kills have fallen, and the last one to its end."""
    board, file = Board(), folder / f"{name}.pt"
    began = time.perf_counter()
    os.waitpid(in_process(name, file, board), 0)
    seconds, expected = time.perf_counter() - began, ended(file)
    assert expected is not None
    found = {"kills": 0, "runs": 0, "lost": 0, "different": 0}
    phases, moments = Counter[str](), Counter[str]()
    saved = 0
    while found["kills"] < kills or file.exists():
        child = in_process(name, file, board)
        if found["kills"] < kills:
            time.sleep(dice.uniform(0, seconds))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if status == signal.SIGKILL:
            found["kills"] += 1
            step, phase, moment = board.read()
            moments[MOMENTS[moment]] += 1
            if moment:
                phases[PHASES[phase]] += 1
                # The last save that was over before.
                saved = max(saved, step // SAVE_EVERY * SAVE_EVERY)
            found["lost"] += saved > 0 and torch.load(file, weights_only=True)[0] < saved
            continue
        found["runs"] += 1
        weights, saved = ended(file), 0
        found["lost"] += weights is None
        found["different"] += weights is not None and not same(weights, expected)
    return {"name": name, "method": repr(METHODS[name]), **found, "phases": phases, "moments": moments}


def main() -> None:
    parser = arguments(__doc__, "kills.json")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    what = f"runs of {STEPS} steps, killed at random moments and resumed, against runs that nobody killed"
    report, dice, began = head(what), random.Random(options.seed), time.perf_counter()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        # What is loaded late is loaded now, once for all processes. Dither alone starts no threads, which do not fork.
        train("dither", Path(folder) / "first.pt", Board())
        for name in METHODS:
            rows.append(kill(name, -(-options.kills // len(METHODS)), Path(folder), dice))
            print(name, {k: v for k, v in rows[-1].items() if k != "method"}, file=sys.stderr, flush=True)
    report |= {
        "seed": options.seed,
        "seconds": time.perf_counter() - began,
        **{key: sum(row[key] for row in rows) for key in ("kills", "runs", "lost", "different")},
        "rows": rows,
    }
    files.write_json(options.out, report)


if __name__ == "__main__":
    main()
