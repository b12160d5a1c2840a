"""What one layer's calls add up to: counted, assumed, and counted on a device that is asked late."""

import json
import math

import pytest
import torch
from torch import Tensor

from retrograde.engine.tally import _EVERY, _FIRST, Tally
from retrograde.kernels import reference
from retrograde.kernels.delta import Delta
from retrograde.kernels.work import Work

BOTH = (True, True, True)
PLAIN = (1.0, 1.0)


def delta(zeros: int, entries: int = 100) -> Delta:
    return Delta((torch.arange(entries) >= zeros).float())


def on_a_device(zeros: int) -> Delta:
    """Counted, the number still being where it was counted."""
    found = delta(zeros)
    found.counted = torch.tensor(zeros)
    return found


def call(tally: Tally, own: Delta, quantised: Delta | None = None, *, counting: bool = False) -> None:
    quantised = own if quantised is None else quantised
    tally.look(own, quantised, counting=counting)
    tally.add(1000.0, PLAIN, BOTH, True, own, quantised)


def test_first_calls_of_first_steps_and_of_one_in_so_many() -> None:
    tally, counting = Tally(), set[tuple[int, int]]()
    for step in range(40):
        counting |= {(step, number) for number in range(12) if tally.counting(step, number)}
        call(tally, delta(3))
        tally.end_step()
    assert _FIRST == 8
    assert counting == {(step, call) for step in (*range(8), _EVERY, 2 * _EVERY) for call in range(8)}
    # What methods do in every second, tenth or hundredth step must not fall on the same steps always.
    assert all(math.gcd(_EVERY, period) == 1 for period in (2, 3, 4, 5, 10, 16, 32, 100))


def note(tally: Tally, dtype: torch.dtype = torch.float32, needs: tuple[bool, ...] = BOTH) -> None:
    """A call whose zeros nobody counted, the short way."""
    own = Delta(torch.ones(100))
    assert tally.note(1000.0, own, own, dtype, needs)


def test_noted_as_added() -> None:
    """Counts of δ and of δ̃ enter by either way alike, and are gone by until the next ones."""
    short, long = Tally(), Tally()
    for own, zeros in ((20, 70), (30, 90)):
        for tally in (short, long):
            first, second = delta(own), delta(zeros)
            tally.look(first, second, counting=True)
            if tally is short:
                assert tally.note(1000.0, first, second, torch.float32, BOTH)
            else:
                tally.add(1000.0, (1.0, 1.0), BOTH, True, first, second)
    assert short.state_dict() == long.state_dict()
    assert short.total.zeros == 160
    assert not short.note(1000.0, on_a_device(30), on_a_device(50), torch.float32, BOTH)
    assert not short.note(0.0, Delta(torch.ones(0)), Delta(torch.ones(0)), torch.float32, BOTH)


@pytest.mark.parametrize("short", [False, True])
def test_assumed_as_last_counted(short: bool) -> None:
    """Between counts a call has the share of the last one, by either way of adding it."""
    tally = Tally()
    for share in (20, 60):
        call(tally, delta(share), counting=True)
        for _ in range(3):
            if short:
                note(tally)
            else:
                call(tally, delta(0))
    total = tally.total
    assert (total.calls, total.entries) == (8, 800)
    assert total.zeros == total.own_zeros == 4 * 20 + 4 * 60
    assert total.forward_needed == total.weight_grad_executed == total.input_grad_dense == 8000.0
    assert total.weight_grad_needed == total.input_grad_needed == pytest.approx(4 * 800 + 4 * 400)
    assert tally.kernels == {reference.NAME: 16}


def test_levels_and_what_they_came_from_have_shares_of_their_own() -> None:
    tally = Tally()
    call(tally, delta(10), delta(70), counting=True)
    call(tally, delta(0), delta(0))
    # Without a method in the way δ̃ is δ.
    call(tally, delta(0))
    assert tally.total.own_zeros == 30
    assert tally.total.zeros == 70 + 70 + 10
    assert tally.total.weight_grad_needed == pytest.approx(300 + 300 + 900)


@pytest.mark.parametrize(
    ("needs", "dense"),
    [
        ((True, False, True), (1000.0, 0.0)),
        ((False, True, False), (0.0, 1000.0)),
        ((False, False, True), (0.0, 0.0)),
    ],
)
@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_that_nobody_asked_for(
    needs: tuple[bool, bool, bool], dense: tuple[float, float], short: bool, dtype: torch.dtype
) -> None:
    tally, factor = Tally(), 0.5 if dtype == torch.bfloat16 else 1.0
    if short:
        note(tally, dtype, needs)
    else:
        own = delta(0)
        tally.add(1000.0, (factor, factor), needs, needs[1], own, own)
    total = tally.total
    assert (total.input_grad_dense, total.weight_grad_dense) == dense
    assert (total.input_grad_discounted, total.weight_grad_discounted) == tuple(factor * d for d in dense)
    assert total.forward_discounted == factor * 1000
    assert tally.kernels.total() == sum(needs[:2])


def test_work_of_kernels_and_of_none() -> None:
    """A product is counted as its kernel says; one that a gate dropped is dense work that nobody did."""
    tally, value = Tally(), torch.zeros(())
    dx, dw = Work(value, "fast", 300.0, 400.0, 100.0), Work(value, "small", 30.0, 40.0, 10.0)
    own = delta(0)
    tally.add(1000.0, (0.25, 1.0), BOTH, True, own, own, dx, dw)
    tally.add(1000.0, (0.25, 1.0), BOTH, False, own, own, dx)
    total = tally.total
    assert (total.input_grad_dense, total.input_grad_needed) == (2000.0, 600.0)
    assert (total.input_grad_executed, total.input_grad_discounted) == (800.0, 200.0)
    assert (total.weight_grad_dense, total.weight_grad_needed) == (2000.0, 30.0)
    assert (total.weight_grad_executed, total.weight_grad_discounted) == (40.0, 10.0)
    assert total.forward_discounted == 500.0
    assert (total.calls, total.skipped) == (2, 1)
    assert tally.kernels == {"fast": 2, "small": 1}


def test_empty_calls_are_calls_without_work() -> None:
    tally = Tally()
    call(tally, Delta(torch.ones(0, 4)), counting=True)
    assert (tally.total.calls, tally.total.entries, tally.total.forward_dense) == (1, 0, 0.0)
    assert tally.zeros_of_step() is None


def test_counts_on_a_device_are_read_once_a_step() -> None:
    """Until they are read they are in no sum; then all are, and what is assumed next is what they say."""
    tally = Tally()
    call(tally, on_a_device(30), on_a_device(50), counting=True)
    call(tally, delta(40), on_a_device(90), counting=True)
    assert (tally.total.calls, tally.total.entries, tally.total.zeros) == (2, 0, 0)
    assert tally.zeros_of_step() == pytest.approx(0.7)
    assert (tally.total.own_zeros, tally.total.zeros) == (70, 140)
    assert not isinstance(tally.total.zeros, Tensor)
    call(tally, delta(0), delta(0))
    assert (tally.total.own_zeros, tally.total.zeros) == (70 + 40, 140 + 90)


def test_zeros_of_a_step() -> None:
    tally = Tally()
    assert tally.zeros_of_step() is None
    call(tally, delta(20), counting=True)
    assert tally.zeros_of_step() == pytest.approx(0.2)
    tally.end_step()
    assert tally.zeros_of_step() is None
    for _ in range(2):
        note(tally)
    assert tally.zeros_of_step() == pytest.approx(0.2)
    tally.end_step()
    assert tally.zeros_of_step() is None


def test_state() -> None:
    """Taken with calls that are not summed yet and counts that are not read yet, it has them all."""
    tally, again = Tally(), Tally()
    call(tally, delta(20), counting=True)
    tally.end_step()
    note(tally)
    call(tally, on_a_device(30), on_a_device(50), counting=True)
    state = tally.state_dict()
    again.load_state_dict(json.loads(json.dumps(state)))
    assert again.state_dict() == state
    assert state["total"]["zeros"] == 20 + 20 + 50
    assert again.zeros_of_step() == tally.zeros_of_step() == pytest.approx(0.35)
    for one in (tally, again):
        call(one, delta(0), delta(0))
    assert again.state_dict() == tally.state_dict()
    assert again.total.own_zeros == 20 + 20 + 30 + 30
