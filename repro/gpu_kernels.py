"""Dithering on a GPU: first whether it is right, then what it costs beside the products that it dithers for.

    python repro/gpu_kernels.py [--rounds 30] [--out FILE]

Made for one data-centre GPU (H100, H200); takes a minute or two there, most of it compilation. What is checked: levels
bit for bit against the CPU's reference, the counts and the step, and that a second run repeats the first; and that the
host waits for nothing in the backward pass of an attached layer, of which torch itself makes an error. A failed check
ends the script before anything is measured.

What is measured, in float32 (TF32 allowed) and in bfloat16: dithering by itself, the two products of a linear layer's
backward pass, and one training step's forward and backward pass of such a layer, plain and attached. The contestants
take turns, so that whatever else the machine does hits all alike. On a GPU every product is dense, so dithering saves
no time there: the question is how little it takes. Writes ``results/gpu-kernels.json``.

Results: results/gpu-kernels.json
"""

import statistics
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from reports import arguments, head
from torch import Tensor, nn

import retrograde as rg
from retrograde.kernels import reference
from retrograde.lab import files
from retrograde.maths import dither
from retrograde.maths.philox import mix_key

SHAPES = ((4096, 4096, 4096), (8192, 1024, 4096), (512, 1024, 1024))
"""(rows, outputs, inputs) of the layers."""
DTYPES = (torch.float32, torch.bfloat16)
SCALE = 2.0
CALLS = 5
"""Calls between two events."""
WARMUPS = 3

Contestants = dict[str, Callable[[], object]]


def check(device: str, sizes: Sequence[int]) -> dict[str, bool]:
    """Each check by name, and whether it passed."""
    from retrograde.kernels import cuda

    found: dict[str, bool] = {}
    for dtype in (*DTYPES, torch.float16):
        for size in sizes:
            delta = torch.randn(size).to(dtype)
            std, peak = dither.statistics(delta.double())
            seen = cuda.statistics(delta.to(device))
            found[f"statistics/{dtype}/{size}"] = abs(seen[0] - std) <= 1e-5 * std and seen[1] == peak
            key, least = mix_key(size, 1), dither.step_size(std, peak, SCALE, 8)
            once, twice = (cuda.dither(delta.to(device), SCALE, 8, key) for _ in range(2))
            found[f"repeated/{dtype}/{size}"] = all(map(torch.equal, once, twice))
            step, largest, finite, own, zeros = (float(number) for number in once[1:])
            # What does not vary stays as it is; in half precision Δ is the next number that there is.
            slack = max(1e-6, torch.finfo(dtype).eps)
            found[f"step/{dtype}/{size}"] = (
                least * (1 - 1e-6) <= step <= least * (1 + slack) if std else not step
            )
            levels = reference.nsd(delta, step or 1.0, key)
            alone = cuda.nsd(delta.to(device), step or 1.0, key, 8)
            expected = levels * torch.tensor(step) if step else delta.float()
            found[f"levels/{dtype}/{size}"] = torch.equal(alone.values.cpu(), levels)
            found[f"values/{dtype}/{size}"] = torch.equal(once[0].cpu(), expected.to(dtype))
            most = int(levels.abs().max()) if step else 0
            counts = (1, int((delta == 0).sum()), int((expected == 0).sum()), most)
            found[f"counts/{dtype}/{size}"] = (finite, own, zeros, largest) == counts
    return found


def check_silence(device: str) -> dict[str, bool]:
    """Whether the backward passes of attached layers leave the host alone."""
    found: dict[str, bool] = {}
    for name, layer, shape in (
        ("linear", nn.Linear(64, 32), (128, 64)),
        ("convolution", nn.Conv2d(8, 16, 3), (4, 8, 16, 16)),
    ):
        layer.to(device)
        _session = rg.attach(layer, rg.Dither(scale=SCALE))
        # The first call compiles, and may wait.
        for mode in ("default", "error"):
            loss = layer(torch.randn(shape, device=device)).square().sum()
            torch.cuda.set_sync_debug_mode(mode)
            try:
                loss.backward()
                found[f"silence/{name}"] = True
            except RuntimeError as error:
                print(f"  {name}: {error}")
                found[f"silence/{name}"] = False
            finally:
                torch.cuda.set_sync_debug_mode("default")
    return found


def contestants(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> Contestants:
    """What takes turns on one layer."""
    from retrograde.kernels import cuda

    rows, outputs, inputs = shape
    x, delta = (torch.randn(rows, size, device=device).to(dtype) for size in (inputs, outputs))
    x.requires_grad_()
    plain, attached = (nn.Linear(inputs, outputs, device=device, dtype=dtype) for _ in range(2))
    session = rg.attach(attached, rg.Dither(scale=SCALE))
    optimizer = torch.optim.SGD(attached.parameters(), lr=0.0)
    weight = plain.weight.detach()

    def products() -> tuple[Tensor, Tensor]:
        return delta @ weight, delta.T @ x.detach()

    def layer(module: nn.Module) -> Callable[[], object]:
        return lambda: torch.autograd.grad(module(x), (x, *module.parameters()), delta)

    def stepped() -> object:
        # With the one wait of a step.
        _ = session
        found = layer(attached)()
        optimizer.step()
        return found

    return {
        "dithering": lambda: cuda.dither(delta, SCALE, 8, 1),
        "products": products,
        "plain_layer": layer(plain),
        "attached_layer": layer(attached),
        "attached_layer_and_step": stepped,
    }


def seconds(call: Callable[[], object], calls: int = CALLS) -> float:
    """Of one call, by the device's clock."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    for _ in range(calls):
        call()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / 1000 / calls


def interleave(found: Contestants, rounds: int) -> dict[str, list[float]]:
    """Seconds of each contestant, round by round; each round begins with another one."""
    for call in found.values():
        seconds(call, WARMUPS)
    names = list(found)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(seconds(found[name]))
    return times


def measure(shapes: Sequence[tuple[int, int, int]], rounds: int, device: str) -> list[dict[str, Any]]:
    """A row for each layer and precision."""
    torch.backends.cuda.matmul.allow_tf32 = True
    found: list[dict[str, Any]] = []
    for shape in shapes:
        for dtype in DTYPES:
            times = interleave(contestants(shape, dtype, device), rounds)
            row = {"layer": "×".join(map(str, shape)), "dtype": str(dtype).removeprefix("torch.")}
            found.append(row | {f"{name}_seconds": statistics.median(spent) for name, spent in times.items()})
            print(found[-1])
    return found


def main() -> None:
    """Check, measure, print and write."""
    parser = arguments(__doc__, "gpu-kernels.json")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_kernels: torch sees no CUDA device here; this script measures one.")
    if find_spec("triton") is None:
        sys.exit("gpu_kernels: Triton is not installed; torch's CUDA builds bring it along.")
    from retrograde.kernels import cuda

    if not cuda.supports(torch.ones(1, device="cuda")):
        sys.exit("gpu_kernels: the kernels need an NVIDIA GPU of compute capability 8.0 or later.")
    torch.manual_seed(0)
    report = head("Dithering beside a linear layer's products, and such a layer plain and attached", "cuda")
    checks = check("cuda", (1, 3, 4099, 5_000_001)) | check_silence("cuda")
    failed = [name for name, passed in checks.items() if not passed]
    print(f"{len(checks) - len(failed)} of {len(checks)} checks passed")
    if failed:
        sys.exit("gpu_kernels: wrong results, so nothing was measured: " + ", ".join(failed))
    import triton

    report["machine"] |= {
        "gpu": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
    }
    report |= {
        "checks": len(checks),
        "rounds": options.rounds,
        "calls": CALLS,
        "rows": measure(SHAPES, options.rounds, "cuda"),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(options.out, report)


if __name__ == "__main__":
    main()
