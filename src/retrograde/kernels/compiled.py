"""Whether the compiled kernels can be had: they come with numba, without which the reference does everything.

numba takes a second or more to import, so it is looked for when a model is attached, and imported when a kernel is
first needed.
"""

import functools
import importlib
import warnings

from retrograde.errors import MissingPackageError, RetrogradeWarning
from retrograde.extras import is_installed

_LOST = (
    "every backward product on a CPU is torch's own dense one: no zeros are skipped, nothing is multiplied in bfloat16 "
    "or int8, and dithering itself takes longer. Results differ in rounding alone."
)


@functools.cache
def installed() -> bool:
    """Whether numba is installed; it is not imported."""
    return is_installed("numba")


def announce() -> None:
    """Warn, once in a process, if numba is not installed."""
    if not installed():
        _warn(f"numba is not installed, so {_LOST} Install it: pip install numba")


@functools.cache
def usable() -> bool:
    """Whether the compiled kernels can be imported; warns, once in a process, if not."""
    if not installed():
        announce()
        return False
    try:
        importlib.import_module("numba")
    except Exception as error:  # an installation can be broken in many ways; one for another numpy is common
        _warn(
            f"numba cannot be imported ({type(error).__name__}: {error}), so {_LOST} "
            "Reinstall it: pip install --upgrade numba"
        )
        return False
    return True


def require(part: str) -> None:
    """Refuse what means nothing without the compiled kernels.

    Args:
        part: what needs them, as the beginning of a sentence.

    Raises:
        MissingPackageError: numba cannot be imported.
    """
    if not usable():
        raise MissingPackageError(
            f"{part} needs numba, which cannot be imported. Install it: pip install numba"
        )


@functools.cache
def _warn(text: str) -> None:
    # The user's line, where `attach` or `resume` announces it.
    warnings.warn(text, RetrogradeWarning, stacklevel=5)
