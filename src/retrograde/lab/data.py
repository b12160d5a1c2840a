"""Data sets for experiments: one loader for bundled digits, local folders and the Hugging Face hub.

>>> data = load("digits")
>>> for x, y in batches(data.train, 128, seed=0, epoch=0):
...     ...

A name means, in this order: ``digits``, which scikit-learn bundles, or ``digits-32``, the same enlarged to 32 × 32
pixels, where convolutions have room; a folder of that name in ``data_dir`` or ``$RETROGRADE_DATA``; a path to a
folder; a data set on the hub. Folders hold image files, one folder a class (see :mod:`retrograde.lab.source`), or
Parquet files (or others that ``datasets.load_dataset`` reads) in the columns that the hub uses. The columns decide
what is made of them: see :mod:`retrograde.lab.decode` for the columns and :mod:`retrograde.lab.encode` for the tensors.

Splits: where there is no test split, the official validation split is the test split; where there is neither,
a fifth of the training rows is, the same for every seed. Where there is no validation split, one is taken
from the training rows, keyed on the seed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from retrograde.errors import DataError, OptionError
from retrograde.lab.decode import Kind, Raw
from retrograde.lab.encode import Rows, Split, encode
from retrograde.lab.source import available, read

__all__ = ["Data", "Split", "available", "batches", "evaluation_batches", "load"]

DIGITS = {"digits": 8, "digits-32": 32}
"""Pixels a side of the bundled digits, by name."""

_TEST_SEED = 20_1797
_TEST_FRACTION = 0.2
_CROP = 4


@dataclass(frozen=True, eq=False)
class Data:
    """A data set ready for training.

    ``classes`` is the number of labels, or the size of the vocabulary for language. ``input_shape`` is that
    of one example: (C, H, W), (L,) or (features,). ``vocabulary`` is the number of token ids, None for images
    and tables; id 0 is padding in text and an unknown character in language. ``label_names`` are the
    characters for language.
    """

    name: str
    kind: Kind
    train: Split
    validation: Split
    test: Split
    classes: int
    input_shape: tuple[int, ...]
    vocabulary: int | None
    label_names: tuple[str, ...] | None


def load(
    name: str,
    *,
    data_dir: Path | None = None,
    validation: float = 0.1,
    seed: int = 0,
    limit: int | None = None,
    standardise: bool = True,
) -> Data:
    """Load ``name``: ``digits`` or ``digits-32``, a folder of ``data_dir`` or ``$RETROGRADE_DATA``, a path, a hub id.

    The training rows come in an order keyed on ``seed``. ``validation``, between 0 and 1, is the share of them set
    apart where there is no official validation split. ``limit``, 1 or more, keeps so many rows of each split, those
    of validation and test being the same for every seed where these splits are official. ``standardise=False``
    leaves the pixels of images between 0 and 1.

    Raises :class:`~retrograde.errors.DataError` for data that are missing, damaged or of another schema, and
    :class:`~retrograde.errors.OptionError` for ``standardise=False`` for other data than images.
    """
    raw = _digits(DIGITS[name]) if name in DIGITS else read(name, data_dir)
    if not standardise and raw.kind != "image":
        raise OptionError(
            f"standardise=False leaves pixels between 0 and 1, and {name} holds no images ({raw.kind}). Leave it out."
        )
    rows = _partition(raw, validation, seed, limit, name)
    splits, vocabulary = encode(raw, rows, standardise=standardise)
    if raw.kind == "language":
        classes, label_names = len(vocabulary or ()), vocabulary
    else:
        top = max(int(arrays["labels"].max()) for arrays in raw.parts.values())
        classes, label_names = len(raw.names or ()) or top + 1, raw.names
    return Data(
        name=name,
        kind=raw.kind,
        classes=classes,
        input_shape=tuple(splits["train"].inputs.shape[1:]),
        vocabulary=None if vocabulary is None else len(vocabulary),
        label_names=label_names,
        **splits,
    )


def batches(
    split: Split, batch_size: int, *, seed: int, epoch: int, augment: bool = False, start: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the training batches of one epoch, from batch ``start`` on, as (inputs, targets).

    The order depends on ``seed`` and ``epoch`` alone, and the random numbers of ``augment`` on the batch's
    number too, so that a resumed run sees what an uninterrupted one does. ``augment`` crops images at random
    after reflecting 4 pixels at each border, and flips half of them left to right. The last batch is dropped
    where it is incomplete, unless it is the only one.
    """
    if augment and split.inputs.dim() != 4:
        raise OptionError(
            "augment=True crops and flips images, and these inputs have the shape "
            f"{tuple(split.inputs.shape[1:])}. Leave it out."
        )
    order = torch.randperm(len(split), generator=_generator(seed, epoch))
    size = min(batch_size, len(split))
    for number in range(start, len(split) // size if size else 0):
        index = order[number * size : (number + 1) * size]
        x = split.inputs[index]
        if augment:
            x = _augmented(x, _generator(seed, epoch, number))
        yield x, split.targets[index]


def steps_in_epoch(split: Split, batch_size: int) -> int:
    """Batches of one epoch: an incomplete last one is dropped, unless it is the only one."""
    return max(1, len(split) // batch_size)


def first_batch(split: Split, batch_size: int, *, augment: bool = False) -> tuple[Tensor, Tensor]:
    """A batch such as training will bring: shapes and figures of a step come from it."""
    return next(iter(batches(split, batch_size, seed=0, epoch=0, augment=augment)))


def evaluation_batches(split: Split, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Return all rows in order as (inputs, targets); the last batch may be smaller."""
    return zip(split.inputs.split(batch_size), split.targets.split(batch_size), strict=True)


def _generator(*key: int) -> torch.Generator:
    """Return a generator keyed on all of ``key``: neighbouring seeds and epochs share nothing."""
    # Two words for each part and their number first: SeedSequence takes [1, 2] and [1, 2, 0] for the same.
    words = [len(key), *(word for part in key for word in (part % 2**32, (part >> 32) % 2**32))]
    state = np.random.SeedSequence(words).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def _augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Crop and flip x (B, C, H, W), each image in its own way."""
    count, channels, height, width = x.shape
    pads = [min(_CROP, width - 1), min(_CROP, height - 1)]
    padded = F.pad(x, (pads[0], pads[0], pads[1], pads[1]), mode="reflect")
    top = torch.randint(2 * pads[1] + 1, (count, 1), generator=generator)
    left = torch.randint(2 * pads[0] + 1, (count, 1), generator=generator)
    flip = torch.rand(count, 1, generator=generator) < 0.5
    rows = top + torch.arange(height)
    columns = left + torch.where(flip, torch.arange(width - 1, -1, -1), torch.arange(width))
    image = torch.arange(count)[:, None, None, None]
    channel = torch.arange(channels)[None, :, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def _partition(raw: Raw, validation: float, seed: int, limit: int | None, name: str) -> Rows:
    """Choose the rows of each part."""
    each_row = "windows" if raw.kind == "language" else "labels"
    official: Rows = {split: (split, np.arange(len(arrays[each_row]))) for split, arrays in raw.parts.items()}
    if "test" not in official and "validation" in official:
        official["test"] = official.pop("validation")
    elif "test" not in official:
        official |= _carved(raw, official, "test", _TEST_FRACTION, seed=_TEST_SEED, name=name)
    for part, (split, index) in official.items():
        # Drawn at random: the first rows of a set that is ordered by label have one label only.
        if part != "train" and limit is not None and limit < len(index):
            kept = np.random.default_rng(_TEST_SEED).permutation(index)[:limit]
            official[part] = (split, kept)
    if "validation" not in official:
        official |= _carved(raw, official, "validation", validation, seed=seed, name=name)
        if limit is not None:
            official["validation"] = ("train", official["validation"][1][:limit])
    train = np.random.default_rng(seed % 2**64).permutation(official["train"][1])
    return official | {"train": ("train", train[:limit])}


def _carved(raw: Raw, official: Rows, part: str, share: float, *, seed: int, name: str) -> Rows:
    """Take ``share`` of the training rows ``index``, in proportion to the labels where these allow it."""
    index = official["train"][1]
    count = max(1, round(share * len(index)))
    if count >= len(index):
        raise DataError(
            f"Data set {name} has no {part} split, and its {len(index)} training rows are too few to take "
            f"one from. Add rows, or a {part} split."
        )
    if raw.kind == "language":
        # The end of the text: windows from the middle would be continued by their neighbours in training.
        return {"train": ("train", index[:-count]), part: ("train", index[-count:])}
    from sklearn.model_selection import train_test_split

    labels = raw.parts["train"]["labels"][index]
    sizes = np.unique(labels, return_counts=True)[1]
    divisible = sizes.min() >= 2 and len(sizes) <= min(count, len(index) - count)
    kept, taken = train_test_split(
        index, test_size=count, random_state=seed % 2**32, stratify=labels if divisible else None
    )
    return {"train": ("train", np.asarray(kept)), part: ("train", np.asarray(taken))}


def _digits(side: int) -> Raw:
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    pixels = digits.images.astype(np.uint8)[:, None]
    if side != pixels.shape[-1]:
        larger = F.interpolate(torch.from_numpy(pixels).float(), size=(side, side), mode="bilinear")
        pixels = larger.round().numpy().astype(np.uint8)
    names = tuple(str(digit) for digit in range(10))
    parts = {"train": {"pixels": pixels, "labels": digits.target.astype(np.int64)}}
    return Raw("image", parts, names, white=16)
