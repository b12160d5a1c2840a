"""Turns, ratios, dropped variants and time budgets, by a clock of the test's own."""

from collections.abc import Callable
from statistics import median

from retrograde.lab.timing import DROPPED_AT, Times, interleave


def test_variants_take_turns_and_every_other_round_is_in_reverse() -> None:
    order: list[str] = []
    ticks: list[str] = []
    interleave(
        {name: lambda name=name: order.append(name) for name in "abc"},
        3,
        warmups=1,
        tick=lambda: ticks.append(order[-1]),
    )
    assert "".join(order) == "cba" + "abc" + "cba" + "abc"
    assert ticks == order


def test_seconds_are_the_clocks_and_warming_up_does_not_count() -> None:
    now = 0.0
    lasting = iter([50.0, 50.0, 1.0, 2.0, 4.0, 3.0])

    def work() -> None:
        nonlocal now
        now += next(lasting)

    times = interleave({"a": work, "b": work}, 2, warmups=1, clock=lambda: now)
    assert times.seconds == {"a": [1.0, 3.0], "b": [2.0, 4.0]}
    assert times.median("b") == 3.0


def test_ratios_are_taken_within_rounds() -> None:
    """The machine is ten times slower in two of five rounds: the ratios do not see it."""
    theirs, mine = [4.0, 40.0, 6.0, 60.0, 8.0], [2.0, 20.0, 2.0, 15.0, 2.0]
    found = Times({"mine": mine, "fp32": theirs}).speedup("mine", "fp32")
    # 2, 2, 3, 4, 4
    assert found.ratio == 3.0
    assert found.quartiles == (2.0, 4.0)
    assert found.of_medians == median(theirs) / median(mine) == 4.0


def test_one_round_has_no_spread() -> None:
    found = Times({"mine": [2.0], "fp32": [3.0]}).speedup("mine", "fp32")
    assert (found.ratio, found.quartiles) == (1.5, (1.5, 1.5))


class Clock:
    """Work that lasts as long as it says."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, *lasting: float) -> Callable[[], None]:
        """Each run takes the next of these; the last one stays."""
        left = list(lasting)

        def run() -> None:
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


def test_who_loses_the_first_round_is_not_run_again() -> None:
    clock = Clock()
    runs = {"fp32": clock.work(1.0), "slow": clock.work(DROPPED_AT), "late": clock.work(100.0, 1.0, 100.0)}
    times = interleave(runs, 3, against="fp32", clock=clock)
    assert times.seconds == {"fp32": [1.0] * 3, "slow": [DROPPED_AT], "late": [1.0, 100.0, 100.0]}
    assert times.dropped == {"slow": DROPPED_AT}, "what takes long in the warm-up, or later, stays"
    assert times.rounds == 3
    assert times.speedup("slow", "fp32").ratio == 1 / DROPPED_AT
    assert not interleave(runs, 3, clock=clock).dropped, "against nothing"


def test_a_budget_stops_the_rounds_but_not_the_first() -> None:
    clock = Clock()
    assert interleave({"a": clock.work(1.0)}, 9, seconds=3.5, clock=clock).rounds == 3
    assert interleave({"a": clock.work(1.0)}, 2, seconds=3.5, clock=clock).rounds == 2
    assert interleave({"a": clock.work(9.0)}, 9, seconds=3.5, clock=clock).rounds == 1
