"""Makes ``works-with.md`` from the tests that exist; ``--check`` only says whether it is stale.

    python docs/make_works_with.py [--check]

pytest is asked which tests it would run. A cell of the table says how many cases of a test there are for a method, and
links the test; where there is none the cell says so. Nothing is marked by hand.
"""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from make_performance import is_stale

from retrograde.report.table import make_table

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "works-with.md"
METHODS = ("exact", "dither", "decorrelate", "deepfocus", "perforate", "spectral")
CONFORMANCE = "tests/conformance/test_conformance.py::test_conformance"
CHECKS = "src/retrograde/testing/method.py"
ADAPTERS = "tests/test_low_rank_adapters.py::test_peft_model"


@dataclass(frozen=True)
class Way:
    """A way of training.

    Attributes:
        name: in the table.
        holds: what its test demands.
        check: file and function that demand it.
        test: file and function that pytest runs.
        ends: with which a case of that test ends, behind the method's name; empty where the method's name is all.
    """

    name: str
    holds: str
    check: str
    test: str = CONFORMANCE
    ends: str = ""


def conforming(name: str, check: str, holds: str, file: str = CHECKS) -> Way:
    """One of the ways that the conformance test goes through."""
    return Way(name, holds, f"{file}::{check}", ends=f"-{check}")


WAYS = (
    conforming(
        "`torch.compile`",
        "compiled",
        "compiled with `fullgraph=True`, training ends where eager training does",
    ),
    conforming(
        "autocast",
        "autocast",
        "under bfloat16 autocast gradients of parameters stay float32, and a method that is set to change nothing "
        "stays near the exact gradients",
    ),
    conforming(
        "activation checkpointing",
        "checkpointing",
        "running the forward pass a second time changes nothing, bit for bit",
    ),
    conforming(
        "gradient accumulation",
        "accumulation",
        "two backward passes count as one step, and their gradients add up",
    ),
    conforming(
        "DDP",
        "ddp",
        "two ranks with different data end with the same model, bit for bit",
        CONFORMANCE.partition("::")[0],
    ),
    conforming(
        "FSDP2, `fully_shard`",
        "fsdp",
        "a sharded model learns what it learns under DDP",
        CONFORMANCE.partition("::")[0],
    ),
    conforming(
        "EMA, SWA, copies",
        "copies",
        "copies, pickles, saved models and `AveragedModel` keep keys and function, and need no session",
    ),
    conforming("resuming", "resume", "a resumed run equals the uninterrupted one, bit for bit"),
    Way(
        "LoRA, by peft",
        "adapters alone move, and what is folded merges to the same function",
        ADAPTERS,
        ADAPTERS,
    ),
)

INTRODUCTION = """\
# Works with

How each method is tested together with the other parts of PyTorch that change how a model trains. A cell says how many
cases its test has for the method: layer kinds (linear, convolutions and transposed ones in one to three dimensions,
attention) times the method's modes. It links the test. This page is written by `docs/make_works_with.py` from the tests
that pytest finds; a cell without a test says so.
"""

END = """\
`Perforate` refuses `nn.MultiheadAttention`, which multiplies by its weights itself in evaluation, past any dendrite;
these cases test that it is refused with this reason. It refuses models that peft has adapted, since peft would neither
save nor merge its dendrites. Compiled cases cover one layer kind of each map.

The order is: build, load pretrained weights, attach, activation checkpointing, compile, DDP or `fully_shard`,
optimizer, train. Attaching in another order is refused by an error that says so
([Troubleshooting](troubleshooting.md)).

What does not work: gradients of gradients and transforms of `torch.func` through an attached layer. Compute such a
term inside `with session.paused():`, its forward pass included. Layers without a linear-like product of one weight,
`nn.LSTM` for example, stay plain, and the plan names them.
"""


def collected(tests: Sequence[str]) -> list[str]:
    """The cases of some tests, as pytest names them."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "-o",
        "addopts=",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run([*command, *tests], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"pytest cannot list the tests:\n{done.stdout}{done.stderr}")
    return [line for line in done.stdout.splitlines() if "::" in line]


def cases(ids: Sequence[str], test: str, method: str, ends: str) -> int:
    """How many cases of a test are about a method, in any of its modes."""
    found = [one.removeprefix(f"{test}[").removesuffix("]") for one in ids if one.startswith(f"{test}[")]
    return sum(
        one == method if not ends else one.startswith(f"{method}-") and one.endswith(ends) for one in found
    )


def cell(ids: Sequence[str], way: Way, method: str) -> str:
    file, _, function = way.test.partition("::")
    if count := cases(ids, way.test, method, way.ends):
        return f"[yes, {count} case{'s' if count > 1 else ''}](../{file}#{function})"
    if cases(ids, f"{way.test}_is_refused", method, way.ends):
        return f"[refused](../{file}#{function}_is_refused)"
    return "not tested"


def page(ids: Sequence[str]) -> str:
    rows = [[way.name, *(cell(ids, way, method) for method in METHODS)] for way in WAYS]
    names = [f"[{method}](methods/{method}.md)" for method in METHODS]
    held = "\n".join(f"- [{way.name}](../{way.check.replace('::', '#')}): {way.holds}." for way in WAYS)
    parts = [
        INTRODUCTION.strip(),
        make_table(["", *names], rows, texts=1 + len(METHODS)).markdown(literal=False),
        f"What each row demands:\n\n{held}",
        END.strip(),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    files = sorted({way.test.partition("::")[0] for way in WAYS})
    made = page(collected(files))
    if "--check" in sys.argv:
        return int(is_stale(PAGE, made))
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
