"""What the page says in words: what a group's best variant reaches, what the figures are, what to know before trust."""

import json

from retrograde.lab.claims import metrics, wording
from retrograde.lab.claims.result import Result
from retrograde.report.comparison import Comparison, Variant


def headline(comparison: Comparison) -> str:
    """What the best variant of a group of run folders reaches, and at what cost; nothing of other results."""
    if not comparison.recorded:
        return ""
    result, summaries = comparison.result, comparison.result.summaries
    scored = [one for one in comparison.variants[1:] if "accuracy" in summaries[one.name]]
    if not scored:
        count = len(result.runs)
        return f"{count} {'run' if count == 1 else 'runs'}; nothing to compare with the baseline yet."
    best = max(scored, key=lambda one: summaries[one.name]["accuracy"].mean)
    of_best, against = summaries[best.name], result.against_baseline.get(best.name, {})
    text = f"{best.label} reaches {wording.spread('accuracy', of_best['accuracy'])} test accuracy"
    if (seeds := of_best["accuracy"].n) > 1:
        text += f" on average over {seeds} seeds"
    if "accuracy" in against:
        text += f", {wording.points(against['accuracy'].minus)} against the baseline"
    text += ". "
    if len(scored) > 1:
        text += f"It is the best of {len(scored)} variants compared. "
    if "needed" in of_best:
        text += (
            f"Skipping every zero would take {wording.spread('needed', of_best['needed'])} of the dense-equivalent "
            "FLOPs. "
        )
    costs: list[str] = []
    if "executed" in of_best:
        costs.append(
            f"executed {wording.spread('executed', of_best['executed'])} of the dense-equivalent FLOPs"
        )
    if (time := wording.ratio(result, best.name, "seconds")) is not None:
        costs.append(f"took {time} the baseline’s time")
    return (text + (f"It {' and '.join(costs)}." if costs else "")).strip()


def caption(result: Result) -> str:
    """What the table's figures are."""
    counts = sorted({len(result.seeds_of(name)) for name in result.contestants})
    seeds = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    means = "One seed: no intervals."
    if counts[-1] > 1:
        means = f"Means over {seeds} seeds ± half of their 95 % interval."
    if not result.claim:
        return f"{means} Differences and times are over {result.contestants[result.baseline].label}’s, seed by seed."
    equal = "the same time" if result.equal == "seconds" else "the same number of steps"
    target = ""
    if result.target is not None and not metrics.TO_TARGET.keys().isdisjoint(result.table):
        target = f" The target is the best validation accuracy of {result.target_label}."
        if result.shorter:
            target = (
                f" The target is the validation accuracy at the end of {result.target_label}; time to it is that of "
                "the shortest of several runs, each with its own schedule, whose end reaches it."
            )
    return f"{means} All variants train for {equal}. The first one is the baseline.{target}"


def caveats(comparison: Comparison) -> tuple[str, ...]:
    """What a reader should know before trusting the figures."""
    result = comparison.result
    found: list[str] = []
    if result.quick:
        held = f" Its checks would say “{result.verdict}”." if result.findings else ""
        found.append(f"This is a quick run, a short form of the claim: it decides nothing.{held}")
    least = min(len(result.seeds_of(name)) for name in result.contestants)
    if least < 3 and len(result.runs) > 1:
        found.append(
            f"A variant with {'one seed' if least == 1 else 'two seeds'} says little: a difference holds the chance of "
            "the seeds as well as the method’s effect. Repeat each variant with several seeds before trusting tenths "
            "of a point."
        )
    if result.jobs > 1:
        found.append(f"{result.jobs} seeds ran at once and took time from each other: times are inflated.")
    commits = commits_of(result)
    if any(commit.endswith("-dirty") for commit in commits):
        found.append("Some runs were made from files that differ from their commit.")
    if len(commits) > 1:
        found.append(f"Runs were made at {len(commits)} different commits.")
    for entry in result.contestants.values():
        failed = sum(trial.error is not None for trial in entry.trials)
        if failed:
            found.append(
                f"{entry.label}: {failed} of {len(entry.trials)} trials of the search ended in an error."
            )
    return (*found, *(_of_records(comparison) if comparison.recorded else ()))


def commits_of(result: Result) -> tuple[str, ...]:
    """The commits that the runs were made at."""
    return tuple(dict.fromkeys(run.commit for run in result.runs if run.commit))


def _of_records(comparison: Comparison) -> list[str]:
    """What run folders say of themselves."""
    result, (baseline, *others) = comparison.result, comparison.variants
    runs = [run for variant in comparison.variants for run in variant.records]
    found: list[str] = []
    if not baseline.records[0].description.baseline:
        found.append(f"No run is plain backpropagation: the others are compared with {baseline.label}.")
    shares = [layer.number("kernel_reference") for run in runs for layer in run.layers.values()]
    if any(share == 1 for share in shares):
        found.append(
            "In some layers every product ran by the reference kernel, which multiplies zeros too: executed stays near "
            "dense there, and time is not saved. Non-zero FLOPs say what a kernel that skips zeros would do."
        )
    if len({json.dumps(run.description.machine, sort_keys=True) for run in runs}) > 1:
        found.append("The runs come from different machines or software, so their times cannot be compared.")
    theirs = set(result.seeds_of(baseline.name))
    for variant in others:
        seeds = result.seeds_of(variant.name)
        alone = [seed for seed in seeds if seed not in theirs]
        if len(alone) == len(seeds):
            found.append(
                f"{variant.label} shares no seed with {baseline.label}, so nothing is compared seed by seed."
            )
        elif alone:
            found.append(
                f"{variant.label} ran with seed {', '.join(map(str, alone))} and {baseline.label} did not: "
                "differences and times leave these runs out."
            )
    return found + [text for variant in comparison.variants for text in _of_variant(variant)]


def _of_variant(variant: Variant) -> list[str]:
    found: list[str] = []
    changed = differing(variant)
    if changed:
        found.append(f"The runs of {variant.label} differ in more than their seed: {', '.join(changed)}.")
    found += [
        f"{variant.seed_label(run)} is {run.outcome.status}: it was not trained to the end."
        for run in variant.records
        if run.outcome.status != "finished"
    ]
    fallbacks = sum(
        layer.fallbacks or 0
        for run in variant.records
        for epoch in run.epochs
        for layer in epoch.layers.values()
    )
    if fallbacks:
        times = "once" if fallbacks == 1 else f"{fallbacks:,} times"
        found.append(
            f"{variant.label} fell back to the exact backward pass {times}, counted over layers"
            + (" and seeds." if len(variant.records) > 1 else ".")
        )
    return found


def differing(variant: Variant) -> list[str]:
    """The recipe's fields, other than the seed, in which a variant's runs differ."""
    recipes = [run.description.recipe for run in variant.records]
    names = sorted({name for recipe in recipes for name in recipe} - {"seed"})
    return [name for name in names if len({json.dumps(r.get(name), sort_keys=True) for r in recipes}) > 1]
