"""From decoded arrays to tensors; scales and vocabularies are learned from the training rows alone.

Each function takes the decoded splits and ``rows``: for each of train, validation and test, the official
split that it comes from and the rows taken from it, in order.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from retrograde.lab.decode import Raw

Rows = dict[str, tuple[str, NDArray[np.int64]]]
"""Part (train, validation, test) → official split, row numbers in it."""

_WORDS = 20_000
_LONGEST = 256
_PADDING, _UNKNOWN = 0, 1


@dataclass(frozen=True, eq=False)
class Split:
    r"""Rows of one split.

    ``inputs`` (n, \*input_shape) are float32 for images and tables and int64 token ids for text and language;
    ``targets`` are int64: (n,) labels, or (n, 128) next characters for language.
    """

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.inputs)


def encode(
    raw: Raw, rows: Rows, *, standardise: bool = True
) -> tuple[dict[str, Split], tuple[str, ...] | None]:
    """Make tensors of the chosen rows, and the vocabulary where there is one; see the module for each kind.

    ``standardise=False`` is for images alone: their pixels stay shares of full brightness, 0 to 1.
    """
    vocabulary: tuple[str, ...] | None = None
    if raw.kind == "language":
        return _language(raw, rows)
    if raw.kind == "text":
        inputs, vocabulary = _texts(raw, rows)
    else:
        inputs = _images(raw, rows, standardise) if raw.kind == "image" else _table(raw, rows)
    labels = _chosen(raw, rows, "labels")
    return {part: Split(x, torch.from_numpy(labels[part])) for part, x in inputs.items()}, vocabulary


def _chosen(raw: Raw, rows: Rows, key: str) -> dict[str, NDArray[Any]]:
    """The rows of each part, of the arrays by this name."""
    return {part: raw.parts[split][key][index] for part, (split, index) in rows.items()}


def _images(raw: Raw, rows: Rows, standardise: bool) -> dict[str, Tensor]:
    """Normalise bytes (n, C, H, W) by the channel means and deviations of the training rows, or to 0 … 1."""
    chosen = _chosen(raw, rows, "pixels")
    if not standardise:
        return {part: torch.from_numpy(x).float().div_(raw.white) for part, x in chosen.items()}
    train = chosen["train"]
    # Exact in integers: 256 counts a channel instead of sums over a float copy of every image.
    counts = np.stack([np.bincount(train[:, c].ravel(), minlength=256) for c in range(train.shape[1])])
    levels, total = np.arange(256), counts[0].sum()
    mean = counts @ levels / total
    deviation = np.sqrt(np.maximum(counts @ levels**2 / total - mean**2, 0))
    deviation[deviation == 0] = 1
    shift = torch.from_numpy(mean).float()[:, None, None]
    scale = torch.from_numpy(1 / deviation).float()[:, None, None]
    return {part: torch.from_numpy(x).float().sub_(shift).mul_(scale) for part, x in chosen.items()}


def _texts(raw: Raw, rows: Rows) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Number the words (n, L): 0 padding, 1 unknown, then the training rows' words, the commonest first.

    A word seen once counts as unknown, so that the vector for unknown words is trained. L is the 95th
    percentile of the training lengths, at most 256; longer texts keep their first L words.
    """
    words = raw.words if raw.words is not None else ()
    train, index = rows["train"]
    lengths = raw.parts[train]["lengths"]
    chosen = np.zeros(len(lengths), dtype=np.bool_)
    chosen[index] = True
    counts = np.bincount(raw.parts[train]["tokens"][np.repeat(chosen, lengths)], minlength=len(words))
    order = np.argsort(-counts, kind="stable")[: _WORDS - 2]
    kept = order[counts[order] > 1]
    number = np.full(len(words), _UNKNOWN, dtype=np.int64)
    number[kept] = np.arange(2, 2 + len(kept))
    length = int(np.clip(np.ceil(np.percentile(lengths[index], 95)), 1, _LONGEST))

    def padded(arrays: dict[str, NDArray[Any]], index: NDArray[np.int64]) -> Tensor:
        texts = np.split(number[arrays["tokens"]], np.cumsum(arrays["lengths"])[:-1])
        first = [torch.from_numpy(texts[i][:length]) for i in index]
        x = pad_sequence(first, batch_first=True, padding_value=_PADDING)
        return pad(x, (0, length - x.shape[1]), value=_PADDING)

    inputs = {part: padded(raw.parts[split], index) for part, (split, index) in rows.items()}
    return inputs, ("<padding>", "<unknown>", *(words[int(i)] for i in kept))


def _language(raw: Raw, rows: Rows) -> tuple[dict[str, Split], tuple[str, ...]]:
    """Number the characters: 0 unknown, then the training rows' by code; targets are moved on by one."""
    chosen = _chosen(raw, rows, "windows")
    known = np.unique(chosen["train"])
    splits: dict[str, Split] = {}
    for part, windows in chosen.items():
        place = np.minimum(np.searchsorted(known, windows), len(known) - 1)
        tokens = torch.from_numpy(np.where(known[place] == windows, place + 1, 0).astype(np.int64))
        splits[part] = Split(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    return splits, ("<unknown>", *(chr(code) for code in known))


def _table(raw: Raw, rows: Rows) -> dict[str, Tensor]:
    """Standardise numbers and spread categories over a column a value, (n, features), by the training rows.

    A missing number becomes the mean, a missing category (``?``) a category of its own, and a category that
    the training rows lack becomes all zeros.
    """
    from sklearn.preprocessing import OneHotEncoder

    numbers, categories = _chosen(raw, rows, "numbers"), _chosen(raw, rows, "categories")
    train = np.ma.masked_invalid(numbers["train"])
    mean = np.ma.filled(train.mean(axis=0), 0.0)
    deviation = np.ma.filled(train.std(axis=0), 0.0)
    deviation[deviation == 0] = 1
    encoder = OneHotEncoder(handle_unknown="ignore", sparse_output=False)
    spread = categories["train"].shape[1] > 0
    if spread:
        encoder.fit(categories["train"])
    inputs: dict[str, Tensor] = {}
    for part, values in numbers.items():
        standard = np.nan_to_num((values - mean) / deviation, nan=0.0, posinf=0.0, neginf=0.0)
        blocks = [standard.astype(np.float32)]
        if spread:
            blocks.append(np.asarray(encoder.transform(categories[part]), dtype=np.float32))
        inputs[part] = torch.from_numpy(np.concatenate(blocks, axis=1))
    return inputs
