"""Vectors of sixteen lanes in numba: what LLVM has and Python has no word for.

Functions of a `builder` write LLVM's instructions; intrinsics are called from kernels. Addresses are 64-bit integers in
both. LLVM finds other instructions where a processor lacks vectors of this width.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic as _intrinsic

LANES = 16
I1, I8, I32, I64, F32 = ir.IntType(1), ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()

intrinsic: Any = _intrinsic


def features() -> list[str]:
    """What the processor can do that numba compiles for, each with a + or a -."""
    context: Any = cpu_target.target_context
    return context.codegen().magic_tuple()[2].split(",")


def vector(element: Any, lanes: int = LANES) -> Any:
    """The type of so many lanes."""
    return ir.VectorType(element, lanes)


def name_of(kind: Any) -> str:
    """A vector type in the name of an intrinsic of LLVM's."""
    return f"v{kind.count}{kind.element.intrinsic_name}"


def constant(element: Any, numbers: Any) -> Any:
    """A vector of these numbers."""
    lanes = list(numbers)
    return ir.Constant(vector(element, len(lanes)), lanes)


def splat(builder: Any, number: Any) -> Any:
    """A number in every lane."""
    none = ir.Constant(vector(number.type), ir.Undefined)
    one = builder.insert_element(none, number, ir.Constant(I32, 0))
    return builder.shuffle_vector(one, none, constant(I32, [0] * LANES))


def load(builder: Any, address: Any, kind: Any) -> Any:
    """What lies at an address."""
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)


def store(builder: Any, value: Any, address: Any, mask: Any = None) -> None:
    """Write 4-byte entries, all of them or those of `mask`."""
    place = builder.inttoptr(address, value.type.as_pointer())
    if mask is None:
        builder.store(value, place, align=4)
    else:
        name = f"llvm.masked.store.{name_of(value.type)}.p0"
        call(builder, name, ir.VoidType(), [value, place, ir.Constant(I32, 4), mask])


def call(builder: Any, name: str, kind: Any, arguments: list[Any]) -> Any:
    """Call LLVM's intrinsic `name`, which returns `kind`."""
    function = ir.FunctionType(kind, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), arguments)


def offset(builder: Any, address: Any, number: int) -> Any:
    """``address + number``."""
    return builder.add(address, ir.Constant(I64, number))


def times_4(builder: Any, number: Any) -> Any:
    """Entries in bytes."""
    return builder.shl(number, ir.Constant(I64, 2))


@intrinsic
def address(typingctx: Any, array: Any, at: Any) -> Any:
    """Of entry `at` of a contiguous array, counted over all of its dimensions.

    Taken where it is used: numba frees an array after its last mention.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(array)(context, builder, arguments[0]).data
        size = ir.Constant(I64, array.dtype.bitwidth // 8)
        return builder.add(builder.ptrtoint(data, I64), builder.mul(arguments[1], size))

    return types.int64(array, types.int64), codegen


@intrinsic
def turn(typingctx: Any, target: Any, places: Any, source: Any, stride: Any, scale: Any) -> Any:
    """Transpose sixteen rows of sixteen float32 numbers, times `scale`.

    Row i is read `stride` bytes behind row i - 1; what was column i is written at the place ``places[i]``, an int32
    counted in floats.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target, places, source, stride, scale = arguments
        factor = splat(builder, scale)
        rows: list[Any] = []
        for _ in range(LANES):
            rows.append(builder.fmul(load(builder, source, vector(F32)), factor))
            source = builder.add(source, stride)
        width = 1
        while width < LANES:
            # Swap the off-diagonal blocks of every 2 x 2 blocks of this width.
            low = [j if not j & width else j - width + LANES for j in range(LANES)]
            high = [j + width if not j & width else j + LANES for j in range(LANES)]
            for i in range(LANES):
                if not i & width:
                    a, b = rows[i], rows[i + width]
                    rows[i] = builder.shuffle_vector(a, b, constant(I32, low))
                    rows[i + width] = builder.shuffle_vector(a, b, constant(I32, high))
            width *= 2
        for i, row in enumerate(rows):
            place = builder.sext(load(builder, offset(builder, places, 4 * i), I32), I64)
            store(builder, row, builder.add(target, times_4(builder, place)))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64, types.float32), codegen
