"""Decoded data sets, kept as one uncompressed ``.npz`` file each.

Decoding tens of thousands of PNG files or reviews takes seconds, reading the result back a fraction of one.
The folder is ``$RETROGRADE_CACHE/data``, or ``~/.cache/retrograde/data`` where that is not set. Anything in
it may be deleted at any time: what is missing or damaged is decoded again.
"""

import hashlib
import os
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retrograde.errors import DataError, RetrogradeWarning
from retrograde.host import cache_folder, write_atomically

_FORMAT = 1
"""Raised whenever what is stored changes meaning, so that older files are no longer found."""


def fingerprint(files: Iterable[Path]) -> str:
    """Return a key for the present contents of ``files``: their paths, sizes and times of modification.

    Raises :class:`~retrograde.errors.DataError` where one of them cannot be read.
    """
    digest = hashlib.sha256(f"format {_FORMAT}".encode())
    for file in sorted(files):
        try:
            status = file.stat()
        except OSError as error:
            raise DataError(
                f"{file} cannot be read: {error.strerror}. Replace or delete it, or what it is a link to."
            ) from error
        digest.update(b"\0%b\0%d\0%d" % (os.fsencode(file.resolve()), status.st_size, status.st_mtime_ns))
    return digest.hexdigest()[:32]


def read(key: str) -> dict[str, NDArray[np.generic]] | None:
    """Return the arrays stored under ``key``, or None where there are none or the file is damaged."""
    try:
        # Opened here: numpy leaves the file open when it cannot make sense of it.
        with _path(key).open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def write(key: str, arrays: dict[str, NDArray[np.generic]]) -> None:
    """Store ``arrays`` under ``key``, whole or not at all; a folder that cannot be written is a warning."""
    path = _path(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: np.savez(file, **arrays), shared=True)  # pyright: ignore[reportArgumentType]
    except OSError as error:
        warnings.warn(
            f"The decoded data was not cached in {path.parent} ({error}): it will be decoded again the next "
            "time. Set RETROGRADE_CACHE to a folder that can be written.",
            RetrogradeWarning,
            stacklevel=2,
        )


def _path(key: str) -> Path:
    return cache_folder("data") / f"{key}.npz"
