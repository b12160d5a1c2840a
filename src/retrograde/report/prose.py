"""What the report says in words: a group's headline, what its table compares, and what to know before trusting it."""

import json

from retrograde.report import formats
from retrograde.report.groups import Contestant, Group, differing
from retrograde.report.table import score_difference, time_ratio

# Scores that are better when smaller; all others are taken to be better when larger.
FALLING = ("loss", "perplexity", "error")


def headline(group: Group) -> str:
    """What the group's best contestant reaches, and at what cost, in plain words."""
    scored = [
        (contestant, test)
        for contestant in group.contestants
        if not contestant.baseline and (test := contestant.spread(lambda run: run.test))
    ]
    if not scored:
        number = len(group.runs)
        return f"{number} {'run' if number == 1 else 'runs'}; nothing to compare with the baseline yet."
    sign = -1.0 if group.metric in FALLING else 1.0
    best, test = max(scored, key=lambda entry: sign * entry[1].mean)
    text = f"{best.label} reaches {formats.score(test.mean, group.metric)} test {group.metric}"
    if test.count > 1:
        text += f" on average over {test.count} seeds"
    base = group.base(lambda run: run.test)
    difference = score_difference(group, best)
    if base is not None and difference is not None:
        text += f", {formats.difference(difference.mean, group.metric)}"
        if difference.deviation is not None:
            text += f" ({formats.deviation(difference.deviation, group.metric)})"
        text += f" against the baseline’s {formats.score(base, group.metric)}"
    text += ". "
    if len(scored) > 1:
        what = "contestants" if group.seeded else "runs"
        text += f"It is the best of {len(scored)} {what} compared. "
    return f"{text}{_costs(group, best)}".strip()


def _costs(group: Group, best: Contestant) -> str:
    needed = best.mean(lambda run: run.of_dense("needed"))
    executed = best.mean(lambda run: run.of_dense("executed"))
    ratio = time_ratio(group, best)
    text = ""
    if needed is not None:
        text = f"Skipping every zero would take {formats.share(needed)} of the dense-equivalent FLOPs. "
    costs: list[str] = []
    if executed is not None:
        whole = "them" if needed else "the dense-equivalent FLOPs"
        costs.append(f"executed {formats.share(executed)} of {whole}")
    if ratio is not None:
        costs.append(f"took {ratio.mean:.2f} times the baseline’s time")
    return text + (f"It {' and '.join(costs)}." if costs else "")


def caption(group: Group) -> str:
    """What the summary table compares, and how."""
    if not group.baselines:
        compared = (
            "No run of this group is marked as the baseline, so there is no difference and no time ratio."
        )
    elif len(group.baselines) == 1:
        compared = f"Difference and time ratio are against {group.baselines[0].label}."
    else:
        compared = f"Difference and time ratio are against the mean of the {len(group.baselines)} baselines."
    text = f"{compared} Needed and executed are FLOPs in per cent of the dense-equivalent."
    if group.seeded:
        text += " Numbers are means over seeds, with one standard deviation (±)."
        if group.baselines:
            text += " Difference and time ratio are taken seed by seed before averaging."
    return text


def caveats(group: Group) -> tuple[str, ...]:
    """What a reader must know before trusting the group's numbers."""
    found: list[str] = []
    rows = [row for run in group.runs for row in run.description.plan.layers]
    if any(row.kernel == "reference" and row.methods for row in rows):
        found.append(
            "Reference kernels multiply zeros too: executed stays near dense and time is not saved. "
            "Needed says what a kernel that skips zeros would do."
        )
    # As many seeds as the least repeated contestant has: the weakest comparison sets the trust.
    if len(group.runs) > 1 and min(len(contestant.runs) for contestant in group.contestants) < 3:
        found.append(
            "A difference between two runs holds the chance of their seeds as well as the method’s effect. "
            "Repeat each setting with several seeds before trusting tenths of a point."
        )
    machines = {json.dumps(run.description.machine, sort_keys=True) for run in group.runs}
    if len(machines) > 1:
        found.append("The runs come from different machines or software, so their times cannot be compared.")
    for contestant in group.contestants:
        found += _of_contestant(group, contestant)
    return tuple(found)


def _of_contestant(group: Group, contestant: Contestant) -> list[str]:
    found: list[str] = []
    changed = differing(contestant)
    if changed:
        found.append(f"The runs of {contestant.label} differ in more than their seed: {', '.join(changed)}.")
    paired = {run.seed for base in group.baselines for run in base.runs}
    alone = [run.seed for run in contestant.runs if run.seed not in paired]
    if group.seeded and group.baselines and alone:
        if len(alone) == len(contestant.runs):
            found.append(f"{contestant.label} shares no seed with the baseline, so only means are compared.")
        else:
            seeds = ", ".join(map(str, alone))
            found.append(
                f"{contestant.label} has no baseline of seed {seeds}: its difference and time ratio leave "
                "these runs out."
            )
    found += [
        f"{contestant.seed_label(run)} is {run.result.status}: it was not trained to the end."
        for run in contestant.runs
        if run.result.status != "finished"
    ]
    fallbacks = sum(run.fallbacks for run in contestant.runs)
    if fallbacks:
        times = "once" if fallbacks == 1 else f"{formats.count(fallbacks)} times"
        found.append(
            f"{contestant.label} fell back to the exact backward pass {times}, counted over layers"
            + (" and seeds." if len(contestant.runs) > 1 else ".")
        )
    return found
