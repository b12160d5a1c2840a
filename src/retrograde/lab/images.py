"""From encoded images (PNG, JPEG, WebP), in a column or in files of their own, to arrays of bytes.

Images in a column must have one size. Files are a user's own photographs, of any size, so these are resized
where they differ in size or are larger than 64 pixels a side: the shorter side to the target, then the middle
of the longer side is kept. The target is the median of the shorter sides, rounded down to a multiple of 4, at
least 8 and at most 64.
"""

import contextlib
import statistics
from collections.abc import Generator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrograde.errors import DataError

_SMALLEST, _LARGEST = 8, 64
_FORMATS = ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "PNG", "TIFF", "WEBP")
_ORIENTATION = 0x0112  # the EXIF tag; from 5 up, width and height change places


def pixels(split: Any, column: str, at: str, root: Path) -> NDArray[np.uint8]:
    """Decode one image column to (n, C, H, W) bytes: C = 1 where every image is grey, else 3.

    Args:
        split: of a ``datasets.DatasetDict``.
        column: its name.
        at: the split in words.
        root: the folder whose files a row may name in place of bytes; a file reaches nothing beyond its data set.
    """
    from datasets import Image

    try:
        images = split.select_columns([column]).cast_column(column, Image(decode=False))
    except Exception as error:  # pyarrow has no common base for what it raises here
        raise DataError(
            f"The images of {at} cannot be read: column {column} is of type {split.features[column]} "
            f"({error}). Store "
            "encoded images there, as bytes and path."
        ) from error
    decoded: list[NDArray[np.uint8]] = []
    for row, values in enumerate(images):
        try:
            with _opened(_source(values[column], root)) as picture:
                decoded.append(_array(picture))
        except Exception as error:  # Pillow raises many kinds for a damaged file
            raise DataError(
                f"Row {row} of {at} holds no image that can be used, in column {column}: {error}. Replace or "
                "delete the row."
            ) from error
    return np.concatenate(_alike(decoded, at))


def _source(value: dict[str, Any] | None, root: Path) -> Path | BytesIO:
    """What a row's image is read from."""
    if value is None:
        raise ValueError("no image")
    if value["bytes"] is not None:
        return BytesIO(value["bytes"])
    file = (root / str(value["path"])).resolve()
    if not file.is_relative_to(root.resolve()):
        raise ValueError(f"it has no bytes, and names {value['path']}, which lies outside the data set")
    return file


def pixels_of_files(
    splits: Mapping[str, Sequence[Path]], where: str
) -> tuple[dict[str, NDArray[np.uint8]], str | None]:
    """Decode image files to (n, C, H, W) bytes a split, and say what was resized: None where nothing was."""
    sizes = [_size(file) for files in splits.values() for file in files]
    side = _target(sizes)
    arrays = {
        name: np.concatenate(_alike([_read(file, side) for file in files], f"split {name} of {where}"))
        for name, files in splits.items()
    }
    if side is None:
        return arrays, None
    ends = list(dict.fromkeys((min(sizes, key=min), max(sizes, key=max))))
    found = " and ".join(f"{width} × {height}" for width, height in ends)
    return arrays, (
        f"The {len(sizes)} images of {where} were resized to {side} × {side} pixels; they are "
        f"{'between ' if len(ends) > 1 else ''}{found} (width × height). The shorter side was scaled and the "
        "middle of the longer one kept: a batch needs one size, and images in files are taken up to "
        f"{_LARGEST} × {_LARGEST}. To train at another size resize them yourself, all alike, and "
        f"store them as Parquet where that is more than {_LARGEST} pixels a side."
    )


def _target(sizes: Sequence[tuple[int, int]]) -> int | None:
    """Return the side to resize to, None where all sizes are the same and can be kept."""
    shorter = statistics.median_low([min(size) for size in sizes])
    if len(set(sizes)) == 1 and max(map(max, sizes)) <= _LARGEST:
        return None
    return min(max(shorter // 4 * 4, _SMALLEST), _LARGEST)


def _size(file: Path) -> tuple[int, int]:
    """Return width and height as the image is to be seen."""
    with _reading(file) as picture:
        width, height = picture.size
        return (height, width) if picture.getexif().get(_ORIENTATION, 1) >= 5 else (width, height)


def _read(file: Path, side: int | None) -> NDArray[np.uint8]:
    with _reading(file) as picture:
        return _array(picture, side)


@contextlib.contextmanager
def _reading(file: Path) -> Generator[Any]:
    try:
        with _opened(file) as picture:
            yield picture
    except Exception as error:  # Pillow raises many kinds for a damaged file
        raise DataError(
            f"{file} holds no image that can be used: {error}. Replace or delete the file."
        ) from error


def _opened(source: Path | BytesIO) -> Any:
    """A Pillow image of one of `_FORMATS`, whatever the file is called: others hand their content to other programs."""
    from PIL import Image

    Image.init()
    return Image.open(source, formats=[name for name in _FORMATS if name in Image.OPEN])


def _array(picture: Any, side: int | None = None) -> NDArray[np.uint8]:
    """Return a Pillow image as (1, C, H, W) bytes, grey or RGB, upright, as a square of ``side`` where one is given.

    Transparency is dropped.
    """
    from PIL import ImageOps

    if side is not None:
        picture.draft(None, (2 * side, 2 * side))  # a large JPEG is decoded at a fraction of its size
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith(("I", "F")):
        raise ValueError(f"more than 8 bits a channel (mode {picture.mode})")
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # straight to RGB, Pillow warns
    plain = picture.convert("L" if picture.mode in ("1", "L") else "RGB")
    values = np.asarray(plain if side is None else ImageOps.fit(plain, (side, side)), dtype=np.uint8)
    return values[None, None] if values.ndim == 2 else values.transpose(2, 0, 1)[None]


def _alike(blocks: Sequence[NDArray[np.uint8]], at: str) -> list[NDArray[np.uint8]]:
    """Images (n, C, H, W) with the same number of channels, which may differ; their sizes may not."""
    sizes = sorted({block.shape[2:] for block in blocks})
    if len(sizes) > 1:
        found = ", ".join(f"{width} × {height}" for height, width in sizes[:4])
        raise DataError(
            f"The images of {at} differ in size (width × height): {found}{', …' if len(sizes) > 4 else ''}. A batch "
            "needs one size. Resize them before storing."
        )
    # Some sets of colour images (Tiny ImageNet) hold a few that were saved as grey.
    channels = max(block.shape[1] for block in blocks)
    return [np.broadcast_to(block, (len(block), channels, *sizes[0])) for block in blocks]


def one_shape(parts: dict[str, dict[str, NDArray[Any]]], where: str) -> None:
    """Give the images of all splits the same number of channels, and check that they have one size."""
    blocks = _alike([arrays["pixels"] for arrays in parts.values()], f"the splits of {where}")
    for arrays, block in zip(parts.values(), blocks, strict=True):
        arrays["pixels"] = np.ascontiguousarray(block)
