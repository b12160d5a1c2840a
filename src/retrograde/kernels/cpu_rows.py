"""Sums of rows, the one thing that both products of a convolution are made of.

A non-zero adds a contiguous row of the dense operand, times itself, to a sum that stays in registers while a whole list
of non-zeros passes by.
"""

from typing import Any

from llvmlite import ir
from numba import types

from retrograde.kernels.cpu_lanes import (
    F32,
    I32,
    I64,
    LANES,
    call,
    constant,
    features,
    intrinsic,
    load,
    name_of,
    offset,
    splat,
    store,
    times_4,
    vector,
)
from retrograde.kernels.cpu_threads import serial

_WIDE = "+avx512f" in features()
"""Whether a register holds sixteen numbers; there are 32 of them then, and 16 otherwise."""


def _accumulator(vectors: int) -> Any:
    """`accumulate` for so many vectors: they stay in registers until the last run is done."""
    # A sum waits four cycles for the one before it: eight registers of them keep two multipliers busy.
    unroll = max(1, (8 if _WIDE else 4) // vectors)

    def build(builder: Any, out: Any, dense: Any, index: Any, value: Any, runs: Any, count: Any) -> None:
        kind, nothing, wide = vector(F32), ir.Constant(I64, 0), 4 * LANES
        places = [offset(builder, out, wide * v) for v in range(vectors)]
        zero = constant(F32, [0.0] * LANES)
        before = builder.block
        start = [load(builder, place, kind) for place in places] + [zero] * (vectors * (unroll - 1))
        run, entry = builder.append_basic_block("run"), builder.append_basic_block("entry")
        after, done = builder.append_basic_block("after"), builder.append_basic_block("done")
        builder.cbranch(builder.icmp_signed(">", count, nothing), run, done)

        builder.position_at_end(run)
        r = builder.phi(I64)
        sums = [builder.phi(kind) for _ in start]
        at = builder.add(runs, builder.mul(r, ir.Constant(I64, 24)))
        first, last, shift = (load(builder, offset(builder, at, 8 * i), I64) for i in range(3))
        base = builder.add(dense, times_4(builder, shift))
        final = offset(builder, last, -1)
        builder.cbranch(builder.icmp_signed("<", first, last), entry, after)

        builder.position_at_end(entry)
        k = builder.phi(I64)
        inner = [builder.phi(kind) for _ in start]
        later: list[Any] = []
        for u in range(unroll):
            at, inside = k, None
            if u:
                # Behind the end the last entry stands in, times zero: which row is read matters where it is not finite.
                ahead = offset(builder, k, u)
                inside = builder.icmp_signed("<", ahead, last)
                at = builder.select(inside, ahead, final)
            place = builder.sext(load(builder, builder.add(index, times_4(builder, at)), I32), I64)
            number = load(builder, builder.add(value, times_4(builder, at)), F32)
            if inside is not None:
                number = builder.select(inside, number, ir.Constant(F32, 0.0))
            factor = splat(builder, number)
            row = builder.add(base, times_4(builder, place))
            for v in range(vectors):
                found = load(builder, offset(builder, row, wide * v), kind)
                total = inner[u * vectors + v]
                later.append(call(builder, f"llvm.fmuladd.{name_of(kind)}", kind, [found, factor, total]))
        following = offset(builder, k, unroll)
        builder.cbranch(builder.icmp_signed("<", following, last), entry, after)

        builder.position_at_end(after)
        totals = [builder.phi(kind) for _ in start]
        next_run = offset(builder, r, 1)
        builder.cbranch(builder.icmp_signed("<", next_run, count), run, done)

        builder.position_at_end(done)
        results = [builder.phi(kind) for _ in start]
        for v, place in enumerate(places):
            total = results[v]
            for u in range(1, unroll):
                total = builder.fadd(total, results[u * vectors + v])
            store(builder, total, place)

        r.add_incoming(nothing, before)
        r.add_incoming(next_run, after)
        k.add_incoming(first, run)
        k.add_incoming(following, entry)
        for v in range(len(start)):
            sums[v].add_incoming(start[v], before)
            sums[v].add_incoming(totals[v], after)
            inner[v].add_incoming(sums[v], run)
            inner[v].add_incoming(later[v], entry)
            totals[v].add_incoming(sums[v], run)
            totals[v].add_incoming(later[v], entry)
            results[v].add_incoming(start[v], before)
            results[v].add_incoming(totals[v], after)

    @intrinsic
    def accumulate(
        typingctx: Any, out: Any, dense: Any, index: Any, value: Any, runs: Any, count: Any
    ) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            build(builder, *arguments)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), codegen

    return accumulate


_accumulate_1, _accumulate_2, _accumulate_4 = _accumulator(1), _accumulator(2), _accumulator(4)
# More would not fit into the registers of a processor whose vectors have eight numbers.
_accumulate_large, _LARGE = (_accumulator(12), 12) if _WIDE else (_accumulator(6), 6)
_accumulate_half, _HALF = (_accumulator(8), 8) if _WIDE else (_accumulate_4, 4)


@serial
def accumulate(out: Any, dense: Any, index: Any, value: Any, runs: Any, count: Any, vectors: Any) -> None:
    """``out[: 16 · vectors] += Σ_k value[k] · dense[index[k] + shift :]`` over the entries k of `count` runs.

    `runs` holds (first k, last k + 1, shift) of each, int64; all but the last two arguments are addresses.
    """
    while vectors > 0:
        if vectors == _LARGE or vectors >= _LARGE + _HALF:
            done = _LARGE
            _accumulate_large(out, dense, index, value, runs, count)
        elif vectors >= _HALF:
            done = _HALF
            _accumulate_half(out, dense, index, value, runs, count)
        elif vectors >= 4:
            done = 4
            _accumulate_4(out, dense, index, value, runs, count)
        elif vectors >= 2:
            done = 2
            _accumulate_2(out, dense, index, value, runs, count)
        else:
            done = 1
            _accumulate_1(out, dense, index, value, runs, count)
        vectors -= done
        out += 4 * LANES * done
        dense += 4 * LANES * done
