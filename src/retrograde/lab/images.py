"""From encoded images (PNG, JPEG, WebP) to arrays of bytes."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrograde.errors import DataError

__all__ = ["one_shape", "pixels"]

_BATCH = 1000


def pixels(split: Any, column: str, at: str) -> NDArray[np.uint8]:
    """Decode one image column to (n, C, H, W) bytes: C = 1 where every image is grey, else 3."""
    from datasets import Image

    try:
        images = split.select_columns([column]).cast_column(column, Image())
    except Exception as error:  # pyarrow has no common base for what it raises here
        raise DataError(
            f"The images of {at} cannot be read: column {column} is of type {split.features[column]} "
            f"({error}). Store "
            "encoded images there, as bytes and path."
        ) from error
    blocks: list[NDArray[np.uint8]] = []
    for first in range(0, len(images), _BATCH):
        last = min(first + _BATCH, len(images))
        try:
            decoded = [_array(picture) for picture in images[first:last][column]]
        except Exception as error:  # Pillow and datasets raise many kinds for a damaged file
            raise _broken_image(images, column, first, last, at) from error
        shapes = sorted({picture.shape[1:] for picture in decoded})
        if len(shapes) > 1:
            raise _sizes_differ(shapes, at)
        channels = max(picture.shape[0] for picture in decoded)
        # Some sets of colour images (Tiny ImageNet) hold a few that were saved as grey.
        blocks.append(
            np.stack([np.broadcast_to(picture, (channels, *picture.shape[1:])) for picture in decoded])
        )
    return _stack(blocks, at)


def _array(picture: Any) -> NDArray[np.uint8]:
    """Return one Pillow image as (1, H, W) or (3, H, W) bytes."""
    if picture is None:
        raise ValueError("no image")
    if picture.mode.startswith(("I", "F")):
        raise ValueError(f"more than 8 bits a channel (mode {picture.mode})")
    if picture.mode in ("1", "L"):
        return np.asarray(picture.convert("L"), dtype=np.uint8)[None]
    return np.asarray(picture.convert("RGB"), dtype=np.uint8).transpose(2, 0, 1)


def _broken_image(images: Any, column: str, first: int, last: int, at: str) -> DataError:
    for row in range(first, last):
        try:
            _array(images[row][column])
        except Exception as error:
            return DataError(
                f"Row {row} of {at} holds no image that can be used, in column {column}: {error}. Replace or "
                "delete the row."
            )
    return DataError(f"Rows {first} to {last - 1} of {at} could not be read. Fetch the file again.")


def _sizes_differ(shapes: list[tuple[int, ...]], at: str) -> DataError:
    found = ", ".join(f"{width} × {height}" for height, width in shapes[:4])
    return DataError(
        f"The images of {at} differ in size (width × height): {found}{', …' if len(shapes) > 4 else ''}. A "
        "batch needs "
        "one size. Resize them before storing."
    )


def _stack(blocks: list[NDArray[np.uint8]], at: str) -> NDArray[np.uint8]:
    """Join blocks of images that may differ in channels but not in size."""
    shapes = sorted({block.shape[2:] for block in blocks})
    if len(shapes) > 1:
        raise _sizes_differ(shapes, at)
    channels = max(block.shape[1] for block in blocks)
    return np.concatenate(
        [np.broadcast_to(block, (len(block), channels, *block.shape[2:])) for block in blocks]
    )


def one_shape(parts: dict[str, dict[str, NDArray[Any]]], where: str) -> None:
    """Give the images of all splits the same number of channels, and check that they have one size."""
    sizes = sorted({arrays["pixels"].shape[2:] for arrays in parts.values()})
    if len(sizes) > 1:
        raise _sizes_differ(sizes, f"the splits of {where}")
    channels = max(arrays["pixels"].shape[1] for arrays in parts.values())
    for arrays in parts.values():
        arrays["pixels"] = np.ascontiguousarray(
            np.broadcast_to(arrays["pixels"], (len(arrays["pixels"]), channels, *sizes[0]))
        )
