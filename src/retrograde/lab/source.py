"""Where data sets are found: folders first, then the Hugging Face hub; decoded once and cached.

A folder holds Parquet files, or image files in one folder a class (``photos/cat/1.jpg``), these in one folder
a split where the splits are given (``photos/train/cat/1.jpg``). The classes are numbered by name.

Nothing is imported, downloaded or written until a data set is asked for.
"""

import contextlib
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Collection, Generator, Iterable
from pathlib import Path
from typing import Any, cast

import numpy as np

from retrograde.errors import DataError, RetrogradeWarning
from retrograde.lab import cache
from retrograde.lab.decode import SPLITS, Raw, decode
from retrograde.lab.images import one_shape, pixels_of_files
from retrograde.methods.registry import suggest

_HUB = {
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "fashion_mnist": "zalando-datasets/fashion_mnist",
    "imdb": "stanfordnlp/imdb",
    "mnist": "ylecun/mnist",
    "tiny-imagenet": "zh-plus/tiny-imagenet",
}
_SHORT = {identifier: short for short, identifier in _HUB.items()}
# Those that Pillow may not read are named all the same: an error is better than a picture left out.
_IMAGE_FILES = {".avif", ".bmp", ".gif", ".heic", ".heif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
_LAYOUT = (
    "Put the images into one folder a class, cat/1.jpg say, or a split and a class, train/cat/1.jpg; or give "
    "the folder that holds these."
)
_IDENTIFIER = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def available(data_dir: Path | None = None) -> list[str]:
    """Return what loads here without a network: ``digits``, and what the data folder has in Parquet or images.

    Raises :class:`~retrograde.errors.DataError` where the data folder, ``data_dir`` or ``$RETROGRADE_DATA``, does
    not exist.
    """
    root = _root(data_dir)
    if root is None:
        return ["digits"]
    if not os.path.isdir(root):
        raise DataError(f"The data folder {root} does not exist. Correct --data-dir or RETROGRADE_DATA.")
    return ["digits", *(folder.name for folder in sorted(root.iterdir()) if _has_data(folder))]


def _has_data(folder: Path) -> bool:
    files = _files(folder)
    if any(file.suffix == ".parquet" for file in files):
        return True
    with contextlib.suppress(DataError):
        return bool(_image_splits(folder, _image_files(folder, files)))
    return False


def read(name: str, data_dir: Path | None = None) -> Raw:
    """Return the decoded data set ``name``: a folder in the data folder, a path to a folder, or a hub id."""
    folder = _folder(name, _root(data_dir))
    if folder is None:
        from datasets import config

        dataset = _from_hub(name, _root(data_dir))
        files = [Path(entry["filename"]) for split in dataset.values() for entry in split.cache_files]
        root = Path(config.HF_CACHE_HOME)
        return _decoded(files, lambda: decode(dataset, name, root))
    files = _files(folder)
    images = _image_files(folder, files)
    if images:
        splits = _image_splits(folder, images)
        raw = _decoded(images, lambda: _from_images(splits, str(folder)))
        for change in (raw.change, _empty(folder, splits["train"].keys())):
            if change is not None:
                warnings.warn(change, RetrogradeWarning, stacklevel=3)
        return raw

    def decoded() -> Raw:
        # The library's own copy of the files would be a second cache of the same data: it goes at the end.
        with tempfile.TemporaryDirectory() as scratch:
            return decode(_from_folder(folder, scratch), str(folder), folder)

    return _decoded(files, decoded)


def _files(folder: Path) -> list[Path]:
    """What lies below `folder`; through a link to a folder, as far below it as a split and a class lie."""
    found: list[Path] = []
    for entry in folder.rglob("*"):
        if not entry.is_dir():
            found.append(entry)
        elif entry.is_symlink():
            found += [file for depth in ("*", "*/*") for file in entry.glob(depth) if not file.is_dir()]
    return found


def _empty(folder: Path, classes: Collection[str]) -> str | None:
    """A word on folders that would be classes if they held images; None where there are none."""
    below = [entry for depth in ("*", "*/*") for entry in folder.glob(depth) if entry.is_dir()]
    names = sorted(entry.name for entry in below if entry.name not in classes and not any(entry.iterdir()))
    if not names:
        return None
    return (
        f"{', '.join(names)} in {folder} {'are' if len(names) > 1 else 'is'} empty, and no class or split is made of "
        f"{'them' if len(names) > 1 else 'it'}: there are {len(classes)} classes. Add images, or delete what is empty."
    )


def _decoded(files: Iterable[Path], decoder: Callable[[], Raw]) -> Raw:
    """Return what the cache holds of ``files``, or decode and store it."""
    key = cache.fingerprint(files)
    packed = cache.read(key)
    if packed is not None:
        with contextlib.suppress(KeyError, ValueError):
            return Raw.unpack(packed)
    with _quiet():
        try:
            raw = decoder()
        except UnicodeError as error:
            raise DataError(f"A text of the data set is not UTF-8: {error}. Store it as UTF-8.") from error
    cache.write(key, raw.pack())
    return raw


def _root(data_dir: Path | None) -> Path | None:
    named = data_dir or os.environ.get("RETROGRADE_DATA")
    return Path(named).expanduser() if named else None


def _folder(name: str, root: Path | None) -> Path | None:
    places = [Path(name).expanduser()]
    if root is not None:
        places = [root / name, *([root / _SHORT[name]] if name in _SHORT else []), *places]
    # `Path.is_dir` raises for a name that is too long.
    return next((place for place in places if os.path.isdir(place)), None)


def _image_files(folder: Path, files: list[Path]) -> list[Path]:
    """Return the images among ``files``, or none where these are illustrations or named by other files."""
    # What systems leave behind is hidden or in __MACOSX: ._1.jpg is no image.
    seen = [
        file
        for file in files
        if not any(part.startswith(".") or part == "__MACOSX" for part in file.relative_to(folder).parts)
    ]
    images = sorted(file for file in seen if file.suffix.lower() in _IMAGE_FILES)
    tables = any(file.suffix == ".parquet" or file.stem == "metadata" for file in seen)
    loose = all(file.parent == folder for file in images) and len(images) < len(seen)
    return [] if tables or loose else images


def _image_splits(folder: Path, images: list[Path]) -> dict[str, dict[str, list[Path]]]:
    """Sort ``images`` by split and class; nothing is guessed where they lie in another way."""
    tops = {file.relative_to(folder).parts[0] for file in images if file.parent != folder}
    named = bool(tops) and all(top.lower() in SPLITS for top in tops)
    depth = 2 if named else 1
    splits: dict[str, dict[str, list[Path]]] = {}
    for file in images:
        *above, _ = file.relative_to(folder).parts
        if len(above) != depth:
            raise DataError(
                f"The class of image {file} is unclear: it lies {len(above)} folders below {folder}, and "
                f"{depth} is expected{' where the first are splits' if named else ''}. {_LAYOUT}"
            )
        split = SPLITS[above[0].lower()] if named else "train"
        splits.setdefault(split, {}).setdefault(above[-1], []).append(file)
    if "train" not in splits:
        raise DataError(
            f"No training images in {folder}: its folders are {', '.join(sorted(tops))}. {_LAYOUT}"
        )
    if len(splits["train"]) < 2:
        raise DataError(
            f"The training images of {folder} are all of one class, {next(iter(splits['train']))}, and "
            f"there is nothing to distinguish. {_LAYOUT}"
        )
    for split, classes in splits.items():
        if unknown := sorted(classes.keys() - splits["train"].keys()):
            raise DataError(
                f"Class {unknown[0]} in split {split} of {folder} has no training images: the classes there "
                f"are {', '.join(sorted(splits['train']))}. Rename its folder, or add training images."
            )
    return splits


def _from_images(splits: dict[str, dict[str, list[Path]]], where: str) -> Raw:
    names = tuple(sorted(splits["train"]))
    rows = {
        split: [(file, names.index(name)) for name, files in classes.items() for file in files]
        for split, classes in splits.items()
    }
    arrays, change = pixels_of_files(
        {split: [file for file, _ in found] for split, found in rows.items()}, where
    )
    parts = {
        split: {"pixels": arrays[split], "labels": np.asarray([label for _, label in found], dtype=np.int64)}
        for split, found in rows.items()
    }
    one_shape(parts, where)
    return Raw("image", parts, names, change=change)


def _from_folder(folder: Path, scratch: str) -> dict[str, Any]:
    import datasets
    import pyarrow as pa
    from pyarrow import parquet

    try:
        return cast("dict[str, Any]", datasets.load_dataset(str(folder), cache_dir=scratch))
    except Exception as error:  # the library wraps what its readers raise in several unrelated classes
        for file in sorted(folder.rglob("*.parquet")):
            try:
                rows = parquet.read_metadata(file).num_rows
            except (OSError, pa.ArrowException):
                raise DataError(
                    f"{file} cannot be read as Parquet: the file is cut off or damaged. Copy or fetch it again."
                ) from error
            if rows == 0:
                raise DataError(f"{file} is empty: it has no rows. Fill it or delete it.") from error
        raise DataError(
            f"The data folder {folder} could not be read: {_cause(error)} It should hold Parquet files, train.parquet "
            "and test.parquet say, all with the same columns, or images in one folder a class."
        ) from error


def _from_hub(name: str, root: Path | None) -> dict[str, Any]:
    names = available(root if root is not None and os.path.isdir(root) else None)
    looked = f"in {root}" if root is not None else "(RETROGRADE_DATA is not set)"
    missing = (
        f"No data set {name}: no such folder {looked}, nor at that path (here: {', '.join(names)})."
        f"{'' if name in _HUB else suggest(name, [*names, *_HUB])}"
    )
    advice = "Correct the name, or set --data-dir or RETROGRADE_DATA to the folder that holds it."
    if not _IDENTIFIER.fullmatch(name):
        raise DataError(f"{missing} {advice}")
    with _quiet():
        import datasets
        import huggingface_hub
        from datasets.exceptions import DatasetNotFoundError
        from huggingface_hub.errors import RepositoryNotFoundError

        identifier = _HUB.get(name, name)
        known = huggingface_hub.is_offline_mode()
        try:
            if not known:
                # Asked once first: without a network ``load_dataset`` tries again for half a minute.
                huggingface_hub.HfApi().dataset_info(identifier, timeout=10)
                known = True
            return cast("dict[str, Any]", datasets.load_dataset(identifier))
        except (DatasetNotFoundError, RepositoryNotFoundError) as error:
            why, because = f"{missing} Nor does the Hugging Face hub have {identifier}. {advice}", error
        except Exception as error:
            because = error
            # What the question raises are the HTTP library's own classes, which change with it.
            if not known or isinstance(error, OSError | RuntimeError):
                why = (
                    f"{missing} And the Hugging Face hub could not be reached for {identifier}: {_cause(error)} "
                    f"{advice}"
                )
            else:
                why = (
                    f"The data set {identifier} on the Hugging Face hub could not be loaded: {_cause(error)} "
                    "Download it and give the folder instead."
                )
        raise DataError(why) from because


def _cause(error: BaseException) -> str:
    """Return the first line of what went wrong underneath, as a sentence."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"{line.rstrip('.')}."


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Keep ``datasets`` from drawing progress bars and reporting usage; the user's settings return."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import datasets

    disabled, bars = logging.root.manager.disable, datasets.are_progress_bars_disabled()
    logging.disable()  # what the libraries log before raising is in the error already
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logging.disable(disabled)
        if not bars:
            datasets.enable_progress_bars()
