"""DeepFocus: backward time saved on the clock, against the FLOPs saved on paper, at about half of the calls skipped.

    python repro/deepfocus_backward_time.py [--rounds 40] [--threads 2] [--device cpu] [--out FILE]

Three versions of each model take turns, step by step, so that whatever else the machine does hits all alike: *plain*
(torch), *full* (attached, everything FULL) and *routed* (random routing, which skips a known share; no low precision,
which is emulated and saves no time). Writes
``results/deepfocus-backward-time.json``. The counts are borne out when `share_of_counted_saving`, the time
saved relative to plain divided by the backward FLOPs saved, is 0.8 or more.

Results: results/deepfocus-backward-time.json
"""

import json
import statistics
import time
from typing import Any

import torch
from reports import arguments, head
from torch import nn

import retrograde as rg
from retrograde.engine.branches import Residual
from retrograde.lab import files
from retrograde.lab.models import transformer
from retrograde.methods.deepfocus import DeepFocus

DEPTH = 16


def residual_mlp() -> tuple[nn.Module, tuple[int, ...]]:
    """Sixteen branches of two layers, 512 wide."""
    branches = [nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512)) for _ in range(DEPTH)]
    return nn.Sequential(nn.Linear(64, 512), *map(Residual, branches), nn.Linear(512, 10)), (512, 64)


def small_transformer() -> tuple[nn.Module, tuple[int, ...]]:
    """Eight layers, 256 wide, 64 tokens."""
    body = transformer.blocks(DEPTH // 2, 256, 4, causal=True)
    return nn.Sequential(nn.Linear(64, 256), body, nn.Linear(256, 10)), (16, 64, 64)


def backward_seconds(net: nn.Module, x: torch.Tensor, optimizer: torch.optim.Optimizer) -> float:
    """One step; the time of its backward pass alone."""
    optimizer.zero_grad()
    loss = net(x).square().mean()
    if x.is_cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    loss.backward()
    if x.is_cuda:
        torch.cuda.synchronize()
    took = time.perf_counter() - began
    optimizer.step()
    return took


def measure(make: Any, rounds: int, device: str) -> dict[str, Any]:
    """Mean backward times of the three versions, and the counts of the routed one."""
    nets: dict[str, nn.Module] = {}
    for name in ("plain", "full", "routed"):
        torch.manual_seed(0)
        net, shape = make()
        nets[name] = net.to(device)
    full = DeepFocus(q_skip=0, q_full=1, warmup=0)
    # Of the inner blocks 0.58 · 0.95 are skipped: about half of all.
    routed = DeepFocus(q_skip=0.58, q_full=0.42, p_max=0.05, controller="random", low=None, warmup=0)
    sessions = {name: rg.attach(nets[name], m, seed=1) for name, m in (("full", full), ("routed", routed))}
    optimizers = {name: torch.optim.SGD(net.parameters(), lr=1e-4) for name, net in nets.items()}
    x = torch.randn(shape, device=device)
    for _ in range(4):
        for name, net in nets.items():
            backward_seconds(net, x, optimizers[name])
    session = sessions["routed"]
    session.metrics(reset=True)
    before = session.flops()
    seconds: dict[str, list[float]] = {name: [] for name in nets}
    for turn in range(rounds):
        for name in list(nets)[turn % 3 :] + list(nets)[: turn % 3]:
            seconds[name].append(backward_seconds(nets[name], x, optimizers[name]))
    after = session.flops()

    def spent(kind: str) -> float:
        return sum(
            getattr(getattr(after, product), kind) - getattr(getattr(before, product), kind)
            for product in ("input_grad", "weight_grad")
        )

    overhead = after.overhead - before.overhead
    counted = 1 - (spent("executed") + overhead) / spent("dense")
    # The mean, not the median, of the routed steps: their work varies from step to step.
    times = {name: statistics.fmean(s) for name, s in seconds.items()}
    blocks = session.metrics()["blocks"].values()
    saved = 1 - times["routed"] / times["plain"]
    return {
        "skip_share": sum(b["skip"] for b in blocks) / len(blocks),
        "backward_seconds": times,
        "counted_saving": counted,
        "time_saving_against_plain": saved,
        "time_saving_against_full": 1 - times["routed"] / times["full"],
        "share_of_counted_saving": saved / counted,
        "share_of_counted_saving_against_full": (1 - times["routed"] / times["full"]) / counted,
    }


def main() -> None:
    """Measure both models, and print."""
    parser = arguments(__doc__, "deepfocus-backward-time.json")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report = head(
        "DeepFocus: backward time and counted FLOPs at about half of the calls skipped", options.device
    )
    models = {"residual_mlp": residual_mlp, "transformer": small_transformer}
    found = {name: measure(make, options.rounds, options.device) for name, make in models.items()}
    print(json.dumps(found, indent=2))
    files.write_json(options.out, {**report, **found})


if __name__ == "__main__":
    main()
