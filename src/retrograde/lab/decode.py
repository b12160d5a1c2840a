"""From the files of a data set to arrays, one set per official split, before anything is learned from them.

What comes out does not depend on a seed, so it can be cached; :mod:`retrograde.lab.encode` makes tensors of
it once the training rows are known.

===========  ==============================  ===============================================================
kind         columns                         arrays of a split of n rows
===========  ==============================  ===============================================================
image        ``img`` or ``image``; label     ``pixels`` (n, C, H, W) uint8
text         ``text``; label                 ``tokens`` (sum of lengths,) uint32, ``lengths`` (n,) int64
language     ``text`` alone                  ``windows`` (n, 129) uint32: Unicode code points
table        any others; label               ``numbers`` (n, F) float64, ``categories`` (n, G) str
===========  ==============================  ===============================================================

``labels`` (n,) int64 goes with all but language. A label column is called ``label``, ``fine_label`` or
``target``.
"""

import json
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from retrograde.errors import DataError
from retrograde.lab.images import one_shape, pixels

Kind = Literal["image", "text", "language", "table"]

WINDOW = 129
"""Characters in one window of a language set: 128 inputs, and the same moved on by one as targets."""

SPLITS = {"train": "train", "test": "test"} | dict.fromkeys(
    ("validation", "valid", "val", "dev"), "validation"
)
"""What a split may be called → what it is."""

_IMAGES = ("img", "image")
_LABELS = ("label", "fine_label", "target")
_BATCH = 1000
# Words may be one letter long or hold an apostrophe, unlike scikit-learn's default: "n't" decides a review.
_WORD = r"(?u)\b\w[\w']*\b"

_Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Raw:
    """A data set as it was published, decoded.

    ``parts`` holds the arrays of each official split (train, validation, test, where they exist), ``names``
    what the labels are called, and ``words`` what the token ids of a text set stand for. ``change`` says what
    was done to the data in decoding, for a warning at every load; None where nothing was. ``white`` is the
    value of a pixel of full brightness: 255 in every file, so the cache does not hold it.
    """

    kind: Kind
    parts: dict[str, _Arrays]
    names: tuple[str, ...] | None = None
    words: tuple[str, ...] | None = None
    change: str | None = None
    white: int = 255

    def pack(self) -> _Arrays:
        """Return everything as arrays under flat names, for the cache."""
        about = json.dumps({k: v for k, v in vars(self).items() if k not in ("parts", "white")})
        packed = {
            f"{part}/{key}": value for part, arrays in self.parts.items() for key, value in arrays.items()
        }
        return packed | {"about": np.frombuffer(about.encode(), dtype=np.uint8)}

    @staticmethod
    def unpack(packed: Mapping[str, NDArray[Any]]) -> "Raw":
        """Undo :meth:`pack`."""
        about: dict[str, Any] = json.loads(packed["about"].tobytes())
        about |= {key: tuple(value) for key, value in about.items() if isinstance(value, list)}
        parts: dict[str, _Arrays] = {}
        for name, value in packed.items():
            part, _, key = name.partition("/")
            if key:
                parts.setdefault(part, {})[key] = value
        return Raw(parts=parts, **about)


def decode(dataset: Mapping[str, Any], where: str, root: Path) -> Raw:
    """Decode a ``datasets.DatasetDict``; ``where`` is the folder or hub id for messages, ``root`` where its files lie.

    Raises :class:`~retrograde.errors.DataError` where there is no training split, a split is empty, no
    columns can be used, images cannot be decoded or differ in size, or labels are not integers from 0 up.
    """
    splits: dict[str, Any] = {}
    for name, split in dataset.items():
        if name in SPLITS:
            splits.setdefault(SPLITS[name], split)
    if "train" not in splits:
        raise DataError(
            f"No training split in {where}: the splits found are {', '.join(dataset)}. Name the file "
            "train.parquet, or train-*.parquet where it is in pieces."
        )
    for name, split in splits.items():
        if len(split) == 0:
            raise DataError(f"Split {name} of {where} is empty: it has no rows. Fill it or delete its file.")
    kind, content, label = _columns(splits["train"].column_names, where)
    for name, split in splits.items():
        if missing := {content, label} - {"", *split.column_names}:
            raise DataError(
                f"Split {name} of {where} lacks the column {', '.join(sorted(missing))} that the training "
                f"split has: it has {', '.join(split.column_names)}. Give all splits the same columns."
            )
    words: dict[str, int] = {}
    decoders: dict[Kind, Callable[[Any, str], _Arrays]] = {
        "image": lambda split, at: {"pixels": pixels(split, content, at, root)},
        "text": lambda split, at: _tokens(split, words, at),
        "language": _windows,
        "table": lambda split, at: _cells(split, label, at),
    }
    parts: dict[str, _Arrays] = {}
    for name, split in splits.items():
        at = f"split {name} of {where}"
        parts[name] = decoders[kind](split, at)
        if label:
            parts[name]["labels"] = _labels(split, label, at)
    if kind == "image":
        one_shape(parts, where)
    names = getattr(splits["train"].features[label], "names", None) if label else None
    if label:
        _check_range(parts, names, where)
    return Raw(kind, parts, names and tuple(names), tuple(words) if kind == "text" else None)


def _columns(columns: list[str], where: str) -> tuple[Kind, str, str]:
    """Return the kind of the data set, and the columns of its images or texts and of its labels; empty: none."""
    image = next((name for name in _IMAGES if name in columns), "")
    label = next((name for name in _LABELS if name in columns), "")
    if image and label:
        return "image", image, label
    if "text" in columns and not image:
        return ("text" if label else "language"), "text", label
    if label and len(columns) > 1 and not image:
        return "table", "", label
    raise DataError(
        f"No usable columns in {where}: it has {', '.join(columns) or 'none'}. Expected are img or image "
        "with label, text with label, text alone, or any columns of numbers and words with label or target. "
        "Rename the columns."
    )


def _labels(split: Any, label: str, at: str) -> NDArray[np.int64]:
    column = split.select_columns([label]).with_format("arrow")[:].column(label)
    kind = str(column.type)
    if column.null_count or not kind.startswith(("int", "uint", "bool")):
        found = (
            f"{column.null_count} of them are missing" if column.null_count else f"they are of type {kind}"
        )
        raise DataError(
            f"The labels of {at} cannot be used: column {label} must hold integers from 0 up, but {found}. "
            "Number the classes from 0."
        )
    labels = np.asarray(column.to_numpy()).astype(np.int64)
    if labels.min() < 0:
        raise DataError(
            f"The labels of {at} cannot be used: row {int(labels.argmin())} has {int(labels.min())} in "
            f"column {label}, "
            "as sets with hidden labels do. Use a split with labels, numbered from 0."
        )
    return labels


def _check_range(parts: dict[str, _Arrays], names: list[str] | None, where: str) -> None:
    """Refuse labels beyond the names, or beyond the training split's unless all are new (few-shot sets)."""
    known = parts["train"]["labels"]
    limit = len(names) if names else int(known.max()) + 1
    for name, arrays in parts.items():
        labels = arrays["labels"]
        disjoint = not names and not np.isin(labels, known).any()
        if labels.max() >= limit and not disjoint:
            source = "column's list of names" if names else "training split"
            raise DataError(
                f"Label {int(labels.max())} in split {name} of {where} is out of range: the {source} has "
                f"{limit} "
                f"classes, 0 to {limit - 1}. Correct the label, or add the class."
            )


def _tokens(split: Any, words: dict[str, int], at: str) -> _Arrays:
    """Number the words of every text in order of first appearance, adding to ``words``."""
    from sklearn.feature_extraction.text import CountVectorizer

    analyse = CountVectorizer(token_pattern=_WORD).build_analyzer()
    tokens, lengths = array("I"), array("q")
    for text in _texts(split, at):
        found = [words.setdefault(word, len(words)) for word in analyse(text)]
        tokens.extend(found)
        lengths.append(len(found))
    return {"tokens": np.asarray(tokens, dtype=np.uint32), "lengths": np.asarray(lengths, dtype=np.int64)}


def _windows(split: Any, at: str) -> _Arrays:
    """Cut the text, rows joined by line ends, into windows of code points; the remainder is dropped."""
    text = "\n".join(_texts(split, at))
    codes = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32)
    count = len(codes) // WINDOW
    if count == 0:
        raise DataError(
            f"The text of {at} is too short: {len(codes)} characters, and one window takes {WINDOW}. Use a "
            "longer text."
        )
    return {"windows": codes[: count * WINDOW].reshape(count, WINDOW)}


def _texts(split: Any, at: str) -> Iterator[str]:
    """Yield the strings in column ``text``."""
    kind = split.features["text"]
    if getattr(kind, "dtype", None) not in ("string", "large_string"):
        raise DataError(
            f"The texts of {at} cannot be used: column text is of type {kind}. Store strings there."
        )
    for batch in split.select_columns(["text"]).iter(batch_size=_BATCH):
        yield from (text or "" for text in batch["text"])


def _cells(split: Any, label: str, at: str) -> _Arrays:
    """Sort the columns of a table into numbers (missing: nan) and categories (missing: ``?``)."""
    numbers: list[NDArray[np.float64]] = []
    categories: list[NDArray[np.str_]] = []
    for column in split.column_names:
        if column == label:
            continue
        feature = split.features[column]
        values = split.select_columns([column]).with_format("arrow")[:].column(column)
        kind = str(values.type)
        if kind.startswith(("int", "uint", "float", "double", "bool")) and not hasattr(feature, "names"):
            filled = [np.nan if value is None else float(value) for value in values.to_pylist()]
            numbers.append(np.asarray(filled, dtype=np.float64))
        elif kind in ("string", "large_string") or hasattr(feature, "names"):
            filled = ["?" if value is None else str(value).strip() for value in values.to_pylist()]
            categories.append(np.asarray(filled, dtype=np.str_))
        else:
            raise DataError(
                f"Column {column} of {at} cannot be used: it is of type {kind}, and a table holds numbers "
                "and strings. Delete the column or turn it into one of these."
            )
    empty = (len(split), 0)
    return {
        "numbers": np.stack(numbers, axis=1) if numbers else np.empty(empty, dtype=np.float64),
        "categories": np.stack(categories, axis=1) if categories else np.empty(empty, dtype="<U1"),
    }
