"""Every error and warning of retrograde.

A message says what happened, where (the layer's full name, the file), why, and what to do, in that order.
"""

import math
from numbers import Integral, Real
from typing import TypeGuard


class RetrogradeError(Exception):
    """Base class of every error that retrograde raises on purpose."""


class OptionError(RetrogradeError, ValueError):
    """A method, recipe or command was given an option that does not exist or a value that it cannot take."""


class PatternError(RetrogradeError, ValueError):
    """A layer pattern in ``only`` or ``skip`` is empty or matches no layer."""


class NoEffectError(RetrogradeError):
    """A method would touch no layer, or training steps went through no attached layer."""


class AttachError(RetrogradeError):
    """The model cannot be attached as it is: already attached, compiled or wrapped, or with lazy layers."""


class DetachError(RetrogradeError):
    """The model cannot be restored because something else has replaced a layer's class since attaching."""


class DoubleBackwardError(RetrogradeError):
    """A gradient of a gradient was asked for through an attached layer."""


class TransformError(RetrogradeError):
    """A layer was given to a transform that cannot look into it: one of ``torch.func``, or ``torch.jit.script``."""


class StateError(RetrogradeError):
    """A session's saved state does not fit the session that loads it."""


class DataError(RetrogradeError):
    """A data set is missing, truncated, or of another schema."""


class CheckpointError(RetrogradeError):
    """A checkpoint is missing, damaged, incomplete, or belongs to another recipe."""


class RunError(RetrogradeError):
    """A run folder or report input cannot be read, or another process trains in the folder."""


class WriteError(RetrogradeError):
    """A file cannot be written: the disk is full, the folder read-only, or the name too long."""


class MissingPackageError(RetrogradeError, ImportError):
    """A part of retrograde needs a package that is not installed; the message names what brings it."""


class RetrogradeWarning(UserWarning):
    """Base class of the warnings: the run goes on by a defined, counted fallback."""


def check_option(config: object, option: str, fine: bool, must: str) -> None:
    """Refuse an option's value: ``Method: option=value must be …``.

    Args:
        config: what has the option as an attribute.
        option: its name.
        fine: whether the value can be taken.
        must: what it must be.

    Raises:
        OptionError: it is not fine.
    """
    check_value(type(config).__name__, option, getattr(config, option), fine, must)


def check_value(what: str, option: str, value: object, fine: bool, must: str) -> None:
    """`check_option` of a function, or of a class whose options are not attributes.

    Args:
        what: its name.
        option: the option's name.
        value: what was given.
        fine: whether the value can be taken.
        must: what it must be.

    Raises:
        OptionError: it is not fine.
    """
    if not fine:
        raise OptionError(f"{what}: {option}={value!r} must be {must}.")


def is_whole(value: object) -> TypeGuard[int]:
    """Whether an option's value is an integer, of Python or NumPy, and not a truth value."""
    return not isinstance(value, bool) and isinstance(value, Integral)


def is_finite(value: object) -> TypeGuard[float]:
    """Whether an option's value is a finite real number, of Python or NumPy, and not a truth value."""
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def check_steps(config: object, option: str) -> None:
    """Refuse what is neither a number of optimizer steps nor a share of a run (`retrograde.Method.shares`).

    Args:
        config: what has the option as an attribute.
        option: its name.

    Raises:
        OptionError: it is neither.
    """
    value = getattr(config, option)
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    share = isinstance(value, float) and 0 < value < 1
    check_option(
        config, option, whole or share, "a number of steps, 0 or more, or a share of the run between 0 and 1"
    )
