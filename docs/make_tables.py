"""Writes the tables of the README and of the methods' cards from ``results/``; ``--check`` only says which are stale.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``. NAME is ``when``, what each method is for and what
it gave; ``verdicts``, how many claims came out how; ``hand-written``, what such kernels gain; ``ablation``, what
training in subspaces comes to; ``kept``, what steps keep for their backward pass; ``transfer``, what
fine-tuning gained and forgot; or the name of a method, whose claims are listed that have been run. No figure is typed:
the texts have gaps that `FIGURES` fills.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from make_performance import digits
from make_results import anchor, overview

from retrograde.lab.claims import wording
from retrograde.lab.claims.library import Entry, Library
from retrograde.lab.claims.result import Finding, Result, read_result
from retrograde.report.table import NONE, make_table

ROOT = Path(__file__).parent.parent
DOCUMENTS = (
    *(ROOT / "README.md", ROOT / "src" / "retrograde" / "kernels" / "README.md"),
    *sorted((ROOT / "docs" / "methods").glob("*.md")),
)
_TABLE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

WHEN = (
    (
        "layers behind ReLU or max pooling and no BatchNorm, on a CPU; padded batches",
        "`Exact`",
        "a training step of convolutions over words took {exact} of plain training's time on "
        "[IMDB]({claim}exact-imdb-cnn); accuracy changed by {exact_accuracy}",
        "bfloat16 autocast, where it is fast: {exact_bf16} a step there, ours {exact_step}",
    ),
    (
        "the same, and some accuracy to give for more zeros",
        "`Dither`",
        "both backward products of a 3×3 convolution run {conv} as fast as in float32 with {conv_zeros} zeros "
        "([AVX2](results/bench-kernels-avx2.json))",
        "bfloat16, where the processor multiplies it natively",
    ),
    (
        "correlated inputs that nothing normalises: an MLP, above all",
        "`Decorrelate`",
        "{decorrelate} of AdamW's time to where the better of AdamW and SGD ends, {decorrelate_muon} of Muon's; a run "
        "that never gets there counts whole ([CIFAR-10, MLP]({claim}decorrelate-cifar10-mlp-budgets))",
        "BatchNorm added to a [convolutional network]({claim}decorrelate-cifar10-cnn-budgets): {batch_norm}, "
        "decorrelated {decorrelate_cnn}, AdamW {adamw_cnn}",
    ),
    (
        "a deep residual network or a transformer, in float32 on a CPU",
        "`DeepFocus`",
        "{focus_time} less time in the backward pass of a transformer, {skipped} of its blocks' calls skipped "
        "([measured](results/deepfocus-backward-time.json))",
        "a plain step, where branches are small: ours took {focus_step} of its time on "
        "[IMDB]({claim}deepfocus-imdb), accuracy {focus_accuracy}",
    ),
    (
        "more activations than memory",
        "`Dither(keep=2)`, or 4",
        "an MLP keeps {kept_2} or {kept_4} of plain training's activations, and accuracy changes by {kept_accuracy_2} "
        "or {kept_accuracy_4} ([Fashion-MNIST]({claim}dither-kept-activations))",
        "time: a step of a small MLP takes {kept_step} of plain training's with 4 bits",
    ),
    (
        "a pretrained network to fine-tune that must still do what it did",
        "[`TransferPenalty`](docs/methods/spectral-extensions.md#transfer-fine-tune-without-losing-the-source)",
        "{penalty_kept} of accuracy on the source over full fine-tuning, and {penalty_target} on the target "
        "([CIFAR-10 to PneumoniaMNIST]({claim}spectral-transfer-lora-pneumonia)); {images_kept} and {images_target} "
        "([Tiny ImageNet to CIFAR-10]({claim}spectral-transfer-lora-500))",
        "LoRA, where few parameters may be trained: ours gained {penalty_lora} and {images_lora} over it on the "
        "source, {penalty_lora_target} and {images_lora_target} on the target",
    ),
    (
        "a network in use whose inputs drift away from those of training",
        "[`adapt`](docs/methods/spectral-extensions.md#adaptation-to-a-drifting-test-stream)",
        "{adapt_accuracy} of accuracy on corrupted images, without labels; on clean ones nothing changes "
        "([CIFAR-10]({claim}spectral-inference-drift))",
        "time: {adapt_time} an image, {norm_time} with re-estimated BatchNorm, over which ours gained {adapt_norm}",
    ),
    (
        "a trained network that should run faster, or be a smaller file",
        "[`factorise`](docs/methods/spectral-extensions.md#smaller-layers-rgspectralfactorise)",
        "at 15 % of its multiply-adds an MLP ran ×{factors_speed} as fast in batches of 128, and accuracy changed by "
        "{factors_accuracy} ([Fashion-MNIST]({claim}spectral-architecture))",
        "channel pruning, for convolutions: at 30 % of a CNN's ours changed by {factors_pruned} against it",
    ),
    (
        "a gradient to be kept in few directions, to see what they learn",
        "`Spectral`",
        "{spectral_sam} of accuracy over SAM in the same time ([Fashion-MNIST]({claim}spectral-fashion-mnist)); "
        "the peak of saved activations was {memory} of plain training's, since every second step keeps all of them",
        "plain SGD in the same time: against it {spectral_sgd}; and SAM where minima should be flat",
    ),
    (
        "a small network that should become more accurate as it is",
        "no method yet; `Perforate` is meant for it",
        "dendrites changed accuracy by {grown} ([CIFAR-10, MLP]({claim}perforate-cifar10-mlp-compression))",
        "a wider network of as many parameters: against it dendrites lose, {wider}",
    ),
    (
        "a processor with AMX, and the wish for faster steps",
        "no method: `torch.autocast` with bfloat16",
        "a training step of a small GPT takes {step_bf16} under autocast, {step_fp32} in float32 "
        "([all steps](docs/performance.md#whole-training-steps-amx))",
        "nothing here: the fastest method takes {step_ours}, and together with autocast {step_both}",
    ),
)
"""What you have, what to take, what it gave, and what beats it."""


SUBSPACES = {
    "full": "whole",
    "top/none": "leading directions alone",
    "random/none": "random directions alone",
    "bulk/none": "without the leading directions",
    "top/full-step": "leading directions, every second step whole",
    "random/full-step": "random directions, every second step whole",
    "unbiased": "unbiased: leading directions and weighted random channels, as much memory",
}
"""Rows of `ablation`, in words."""

KEEPING = {
    "4 bits": "`Dither(keep=4)`",
    "2 bits": "`Dither(keep=2)`",
    "sketch": '`Spectral(residual="unbiased")`',
}
"""Rows of `kept`, in code."""


def fill(text: str, document: Path) -> str:
    """The document with every table made anew."""

    def anew(match: re.Match[str]) -> str:
        made = render(match[2])
        # Links are written as seen from the README.
        up = "../" * len(document.parent.relative_to(ROOT).parts)
        inside = (
            re.sub(r"\]\((docs|results)/", rf"]({up}\1/", made).replace(f"]({up}docs/", f"]({up[3:]}")
            if up
            else made
        )
        return f"{match[1]}{inside}\n{match[3]}"

    return _TABLE.sub(anew, text)


def render(name: str) -> str:
    makers = {
        "when": when,
        "hand-written": hand_written,
        "ablation": ablation,
        "kept": kept,
        "transfer": transfer,
    }
    if name in makers:
        return makers[name]()
    entries = Library(ROOT / "repro").entries()
    if name == "verdicts":
        return verdicts(entries)
    ours = [entry for entry in entries if entry.claim.id.startswith(f"{name}/") and entry.result]
    return overview(ours).replace("](#", "](docs/results.md#")


def when() -> str:
    """The rows, and where their figures come from."""
    figures = {name: make() for name, make in FIGURES.items()} | {"claim": "docs/results.md#claim-"}
    head = ("you have", "take", "what it gave here", "what beats it")
    rows = [[cell.format_map(figures) for cell in row] for row in WHEN]
    machine, seeds = measured("bench-steps-amx")["machine"], len(claim("decorrelate/cifar10-mlp").seeds)
    made = make_table(head, rows, texts=4).markdown(literal=False)
    other = claim(_EXACT).machine
    return (
        f"{made}\n\n*{machine['cores']} cores ({machine['cpu']}; `Exact`, `Decorrelate` and the functions of "
        f"`rg.spectral`: {other['cpu']}, "
        f"{other['instructions']}), torch {machine['torch']}. "
        f"Claims: mean over {seeds} seeds with its 95 % interval, each variant tuned with "
        "the same number of trials, but for `Exact`, whose gradients are plain training's.*"
    )


def verdicts(entries: Sequence[Entry]) -> str:
    """How many claims came out how, in a sentence."""
    counts = Counter(entry.result.verdict for entry in entries if entry.result and entry.status == "run")
    said = ", ".join(f"{count} *{verdict}*" for verdict, count in counts.most_common())
    run = sum(counts.values())
    return f"Of {len(entries)} claims {run} have been run here, with these verdicts: {said}."


def hand_written() -> str:
    """What each piece gains over plain numba."""
    found = measured("hand-written")
    rows = [
        (piece["name"], f"{1e3 * piece['ours']:.2f} ms", f"{1e3 * piece['numba']:.2f} ms", gain(piece))
        for piece in found["pieces"]
    ]
    made = make_table(("piece", "a product with it", "with plain numba", "gain"), rows, texts=1)
    machine = found["machine"]
    return f"{made.markdown(literal=False)}\n\n*{machine['cpu']}, {machine['instructions']}; `{found['command']}`*"


def ablation() -> str:
    """Final accuracy by subspace; a column for each file of results."""
    found = [measured(f"spectral-ablation-{name}") for name in ("sgd", "slow", "adamw")]
    head = (f"{one['options']['optimizer'].upper()}, rate {one['options']['lr']:g}" for one in found)
    rows = [(label, *(spread(one["results"].get(key)) for one in found)) for key, label in SUBSPACES.items()]
    options = found[0]["options"]
    made = make_table(("gradient", *head), rows, texts=1)
    return (
        f"{made.markdown(literal=False)}\n\n*Test accuracy on {options['data']} after {options['epochs']} epochs, "
        f"{options['model']}, {options['rank']} directions or channels in each layer, {options['seeds']} seeds "
        f"± their standard deviation; `{found[0]['command']}`*"
    )


def kept() -> str:
    """What a step keeps for its backward pass, and the peak of its process, each over plain training's."""
    found = measured("kept-memory")
    by = {(row["model"], row["way"]): row for row in found["rows"]}
    models = list(dict.fromkeys(model for model, _ in by))

    def over(model: str, way: str, key: str) -> str:
        return f"×{by[model, way][key] / by[model, 'plain'][key]:.2f}"

    rows: list[tuple[str, ...]] = [
        ("plain", *(f"{by[model, 'plain']['saved_bytes'] / 2**20:.0f} MiB" for model in models))
    ]
    rows += [
        (
            label,
            *(f"{over(model, way, 'saved_bytes')} ({over(model, way, 'peak_bytes')})" for model in models),
        )
        for way, label in KEEPING.items()
    ]
    made = make_table(("kept (process)", *models), rows, texts=1)
    return (
        f"{made.markdown(literal=False)}\n\n*Activations kept for the backward pass after {found['steps']} steps, "
        f"and in brackets the peak of the process, with its code, weights and moments, both over plain training's; "
        f"`{found['command']}`*"
    )


def transfer() -> str:
    """What each way of fine-tuning gained and forgot, a column for each claim."""
    found = [claim(f"spectral/transfer-lora{end}") for end in ("-pneumonia", "", "-500")]
    head = [one.title.partition(", ")[2] for one in found]
    labels = {name: entry.label for name, entry in found[0].contestants.items()}
    rows = [
        (
            label,
            *(
                f"{wording.cell(one, name, 'accuracy')}; {wording.cell(one, name, 'source_accuracy')}"
                for one in found
            ),
        )
        for name, label in labels.items()
    ]
    made = make_table(("target; source", *head), rows, texts=1)
    names = ", ".join(f"[`{one.claim}`](docs/results.md#{anchor(one.claim)})" for one in found)
    return (
        f"{made.markdown(literal=False)}\n\n*Test accuracy on the target, and of the source's old head on the new "
        f"features: mean over {len(found[0].seeds)} seeds with its 95 % interval; {names}*"
    )


def spread(row: dict[str, Any] | None) -> str:
    return NONE if row is None else f"{100 * row['mean']:.2f} ± {100 * row['std']:.2f} %"


def gain(piece: dict[str, Any]) -> str:
    low, high = piece["quartiles"]
    return f"×{piece['gain']:.2f} ({low:.2f}–{high:.2f})"


# Figures.


@cache
def claim(name: str) -> Result:
    return read_result(ROOT / "results" / f"{name}.json")


@cache
def measured(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))


def finding(name: str, says: str) -> Finding:
    """The check of a claim that says so."""
    return next(found for found in claim(name).findings if found.says == says)


def outcome(name: str, says: str) -> str:
    return wording.outcome(finding(name, says))


def convolution(key: str) -> float:
    """The automatic choice of kernel on a 3×3 convolution, where the processor has AVX2 and no more."""
    rows = measured("bench-kernels-avx2")["rows"]
    row = max(
        (row for row in rows if row["op"] == "conv" and row["kernel"] == "auto" and row["sparsity"] < 0.95),
        key=lambda row: row["sparsity"],
    )
    return row[key]


def step(key: str, autocast: bool = False) -> str:
    """Of the measured training steps of a small GPT: the fastest method, in float32 or under autocast."""
    rows = [row for row in measured("bench-steps-amx")["rows"] if row["model"] == "gpt"]
    rows = [row for row in rows if ("under bfloat16" in row["method"]) == autocast]
    return f"{digits(1e3 * min(rows, key=lambda row: row['seconds'])[key])} ms"


def over_plain(name: str, variant: str, metric: str) -> str:
    """A figure of a claim's variant over its baseline's."""
    return f"×{claim(name).ratios(variant)[metric].mean:.2f}"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def focus(key: str) -> float:
    return measured("deepfocus-backward-time")["transformer"][key]


_BUDGETS, _CNN = "decorrelate/cifar10-mlp-budgets", "decorrelate/cifar10-cnn-budgets"
_COMPRESSION = "perforate/cifar10-mlp-compression"
_FASHION = "spectral/fashion-mnist"
_PENALTY = "spectral/transfer-lora-pneumonia"
_IMAGES = "spectral/transfer-lora-500"

_DRIFT = "spectral/inference-drift"
_FACTORS = "spectral/architecture"
_EXACT = "exact/imdb-cnn"
_KEPT = "dither/kept-activations"

FIGURES: dict[str, Callable[[], str]] = {
    "kept_2": lambda: over_plain(_KEPT, "two", "saved_bytes"),
    "kept_4": lambda: over_plain(_KEPT, "four", "saved_bytes"),
    "kept_step": lambda: over_plain(_KEPT, "four", "late_step_seconds"),
    "kept_accuracy_2": lambda: outcome(_KEPT, "2 bits: accuracy within 0.3 points"),
    "kept_accuracy_4": lambda: outcome(_KEPT, "4 bits: accuracy within 0.3 points of plain training's"),
    "exact": lambda: outcome(_EXACT, "a whole step takes at most half of a plain one's time"),
    "exact_accuracy": lambda: outcome(_EXACT, "accuracy is plain training's, to half a point below"),
    "exact_step": lambda: wording.cell(claim(_EXACT), "exact", "step_seconds"),
    "exact_bf16": lambda: wording.cell(claim(_EXACT), "bfloat16", "step_seconds"),
    "conv": lambda: f"×{convolution('speedup_fp32'):.2f}",
    "conv_zeros": lambda: percent(convolution("sparsity")),
    "decorrelate": lambda: outcome(_BUDGETS, "sooner there than AdamW at all").partition(";")[0],
    "decorrelate_muon": lambda: outcome(_BUDGETS, "sooner there than Muon").partition(";")[0],
    "decorrelate_cnn": lambda: wording.cell(claim(_CNN), "decorrelate", "accuracy"),
    "adamw_cnn": lambda: wording.cell(claim(_CNN), "adamw", "accuracy"),
    "batch_norm": lambda: wording.cell(claim(_CNN), "batch-norm", "accuracy"),
    "skipped": lambda: percent(focus("skip_share")),
    "focus_time": lambda: percent(focus("time_saving_against_plain")),
    "focus_step": lambda: outcome("deepfocus/imdb", "and a step takes less time than a dense one"),
    "focus_accuracy": lambda: outcome("deepfocus/imdb", "above the dense twin, tuned as hard"),
    "adapt_accuracy": lambda: outcome(_DRIFT, "more accurate on corrupted images than no adaptation"),
    "adapt_norm": lambda: outcome(_DRIFT, "more accurate on corrupted images than re-estimated BatchNorm"),
    "adapt_time": lambda: wording.cell(claim(_DRIFT), "spectral", "image_seconds"),
    "norm_time": lambda: wording.cell(claim(_DRIFT), "norm", "image_seconds"),
    "factors_speed": lambda: outcome(_FACTORS, "twice as fast at a batch of 128, the MLP at 15 %"),
    "factors_accuracy": lambda: outcome(
        _FACTORS, "the MLP at 15 % is as accurate as it was, to half a point"
    ),
    "factors_pruned": lambda: outcome(
        _FACTORS, "the CNN at 30 % is more accurate than pruned at equal multiply-adds"
    ),
    "penalty_kept": lambda: outcome(_PENALTY, "keeps more of the source than full fine-tuning"),
    "penalty_target": lambda: outcome(
        _PENALTY, "at least as accurate on the target as full fine-tuning, to half a point"
    ),
    "penalty_lora": lambda: outcome(_PENALTY, "keeps more of the source than LoRA of rank 8"),
    "penalty_lora_target": lambda: outcome(_PENALTY, "more accurate on the target than LoRA of rank 8"),
    "images_kept": lambda: outcome(_IMAGES, "keeps more of the source than full fine-tuning"),
    "images_target": lambda: outcome(
        _IMAGES, "at least as accurate on the target as full fine-tuning, to half a point"
    ),
    "images_lora": lambda: outcome(_IMAGES, "keeps more of the source than LoRA of rank 8"),
    "images_lora_target": lambda: outcome(_IMAGES, "more accurate on the target than LoRA of rank 8"),
    "memory": lambda: over_plain(_FASHION, "spectral", "saved_bytes"),
    "spectral_sam": lambda: outcome(_FASHION, "the default is more accurate than SAM in the same time"),
    "spectral_sgd": lambda: outcome(
        _FASHION, "the default is at least as accurate as plain SGD, to a tenth of a point"
    ),
    "grown": lambda: outcome(_COMPRESSION, "dendrites add accuracy to the narrow network"),
    "wider": lambda: outcome(_COMPRESSION, "more accurate than a wider network of as many parameters"),
    "step_fp32": lambda: step("seconds_fp32"),
    "step_bf16": lambda: step("seconds_bf16"),
    "step_ours": lambda: step("seconds"),
    "step_both": lambda: step("seconds", autocast=True),
}


def main() -> int:
    stale: list[str] = []
    for document in DOCUMENTS:
        before = document.read_text(encoding="utf-8")
        after = fill(before, document)
        if after != before:
            stale.append(document.name)
            if "--check" not in sys.argv:
                document.write_text(after, encoding="utf-8")
    print(f"tables {'to be made anew' if '--check' in sys.argv else 'written'}: {', '.join(stale) or 'none'}")
    return int(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
