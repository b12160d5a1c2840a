import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from retrograde.errors import DataError, OptionError, RetrogradeWarning
from retrograde.lab import source
from retrograde.lab.data import Split, available, batches, evaluation_batches, load


def png(pixels) -> dict[str, object]:
    file = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def folder(path: Path, **splits) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name, columns in splits.items():
        parquet.write_table(pa.table(columns), path / f"{name}.parquet")
    return path


def pictures(count: int, shape=(8, 8, 3), seed: int = 0, classes: int = 2, column: str = "img"):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)
    return pixels, {column: [png(p) for p in pixels], "label": np.arange(count) % classes}


# digits


def test_digits_need_no_files():
    data = load("digits")
    assert (data.kind, data.classes, data.input_shape, data.vocabulary) == ("image", 10, (1, 8, 8), None)
    assert len(data.train) + len(data.validation) + len(data.test) == 1797
    assert data.train.inputs.dtype == torch.float32
    assert data.train.targets.dtype == torch.int64
    assert abs(data.train.inputs.mean()) < 1e-5
    assert abs(data.train.inputs.std() - 1) < 1e-3


def test_enlarged_digits_are_the_same_pictures():
    small, large = load("digits"), load("digits-32")
    assert large.input_shape == (1, 32, 32)
    assert torch.equal(small.train.targets, large.train.targets)
    shrunk = torch.nn.functional.avg_pool2d(large.train.inputs, 4)
    assert float(torch.corrcoef(torch.stack([shrunk.flatten(), small.train.inputs.flatten()]))[0, 1]) > 0.95


def test_digits_test_rows_are_the_same_for_every_seed():
    one, two = load("digits", seed=1), load("digits", seed=2)
    assert torch.equal(one.test.targets, two.test.targets)
    pixels = [
        (d.test.inputs - d.test.inputs.min()) / (d.test.inputs.max() - d.test.inputs.min())
        for d in (one, two)
    ]
    torch.testing.assert_close(*pixels)
    assert not torch.equal(one.validation.targets, two.validation.targets)


def test_same_seed_gives_the_same_data():
    one, two = load("digits", seed=3), load("digits", seed=3)
    for part in ("train", "validation", "test"):
        assert torch.equal(getattr(one, part).inputs, getattr(two, part).inputs)


def test_carved_splits_are_stratified():
    counts = torch.bincount(load("digits").validation.targets)
    assert counts.min() >= 13
    assert counts.max() <= 16


def test_limit():
    data = load("digits", limit=50)
    assert (len(data.train), len(data.validation), len(data.test)) == (50, 50, 50)
    assert torch.equal(data.train.targets, load("digits").train.targets[:50])


def test_import_loads_nothing_heavy():
    code = "import sys, retrograde.lab.data; sys.exit(any(m in sys.modules for m in ('datasets', 'sklearn')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# images


def test_images_are_normalised_by_the_training_rows(tmp_path):
    pixels, train = pictures(40)
    test_pixels, test = pictures(10, seed=1)
    data = load("toy", data_dir=folder(tmp_path / "toy", train=train, test=test).parent, validation=0.25)
    assert (data.kind, data.classes, data.input_shape) == ("image", 2, (3, 8, 8))
    assert (len(data.train), len(data.validation), len(data.test)) == (30, 10, 10)
    together = torch.cat([data.train.inputs, data.validation.inputs])
    mean = data.train.inputs.mean((0, 2, 3))
    torch.testing.assert_close(mean, torch.zeros(3), atol=1e-5, rtol=0)
    # one affine map a channel takes the stored bytes to the inputs
    original = torch.from_numpy(test_pixels).permute(0, 3, 1, 2).float()
    for channel in range(3):
        x, y = original[:, channel].flatten(), data.test.inputs[:, channel].flatten()
        assert torch.corrcoef(torch.stack([x, y]))[0, 1] > 1 - 1e-6
    assert len(together) == len(pixels)
    assert torch.equal(data.test.targets, torch.arange(10) % 2)


def test_images_that_are_not_standardised_are_shares_of_full_brightness(tmp_path):
    _, train = pictures(12)
    test_pixels, test = pictures(6, seed=1)
    data = load("toy", data_dir=folder(tmp_path / "toy", train=train, test=test).parent, standardise=False)
    expected = torch.from_numpy(test_pixels).permute(0, 3, 1, 2).float() / 255
    torch.testing.assert_close(data.test.inputs, expected)
    digits = load("digits", standardise=False).train.inputs
    assert (digits.min(), digits.max()) == (0, 1)


def test_only_images_can_be_left_unstandardised(tmp_path):
    texts = {"text": ["a film", "a play"] * 6, "label": [0, 1] * 6}
    path = folder(tmp_path / "toy", train=texts, test=texts).parent
    with pytest.raises(OptionError, match=r"toy holds no images \(text\)"):
        load("toy", data_dir=path, standardise=False)


def test_grey_images_keep_one_channel_and_few_grey_among_colour_get_three(tmp_path):
    _, grey = pictures(20, shape=(8, 8), column="image")
    assert load(str(folder(tmp_path / "grey", train=grey))).input_shape == (1, 8, 8)
    _, colour = pictures(20, column="image")
    colour["image"][3] = grey["image"][3]
    assert load(str(folder(tmp_path / "mixed", train=colour))).input_shape == (3, 8, 8)


def test_one_bit_images(tmp_path):
    bits = [Image.fromarray(np.eye(8, dtype=np.uint8) * 255).convert("1") for _ in range(20)]
    data = load(
        str(folder(tmp_path / "bits", train={"image": [png(b) for b in bits], "label": np.arange(20) % 2}))
    )
    assert data.input_shape == (1, 8, 8)
    assert len(data.train.inputs.unique()) == 2


@pytest.mark.parametrize("name", ["valid", "validation", "val"])
def test_validation_split_names(tmp_path, name):
    train, validation, test = (pictures(n, column="image")[1] for n in (20, 6, 8))
    where = folder(tmp_path / "tiny", **{"train": train, name: validation, "test": test})
    data = load(str(where))
    assert (len(data.train), len(data.validation), len(data.test)) == (20, 6, 8)


def test_official_validation_is_the_test_split_where_there_is_none(tmp_path):
    where = folder(tmp_path / "tiny", train=pictures(20)[1], valid=pictures(6, classes=2, seed=5)[1])
    data = load(str(where))
    assert (len(data.train), len(data.validation), len(data.test)) == (18, 2, 6)


def test_new_classes_in_the_test_split_are_allowed_when_all_are_new(tmp_path):
    _, train = pictures(20)
    _, test = pictures(8)
    test["label"] = test["label"] + 2
    assert load(str(folder(tmp_path / "few", train=train, test=test))).classes == 4


def test_rows_ordered_by_label_are_shuffled(tmp_path):
    _, train = pictures(40)
    train["label"] = np.sort(train["label"])
    data = load(str(folder(tmp_path / "sorted", train=train, test=train)), limit=8)
    for split in (data.train, data.validation, data.test):
        assert len(split.targets.unique()) == 2


# text


def words(*texts):
    return {"text": list(texts), "label": np.arange(len(texts)) % 2}


def test_text_vocabulary_is_learned_from_the_training_rows(tmp_path):
    train = words(*["Good film good", "bad film once"] * 5)
    train["text"][0] = "good good film rare"
    validation = words("good", "")
    test = words("good unseen film", "unseen unseen")
    data = load(str(folder(tmp_path / "t", train=train, validation=validation, test=test)))
    assert (data.kind, data.classes) == ("text", 2)
    # padding, unknown, good, film, bad, once; "rare" is there once and "unseen" not at all
    assert data.vocabulary == 6
    row = data.test.inputs[0].tolist()
    assert row[1] == 1
    assert row[0] != row[2]
    assert min(row[0], row[2]) >= 2
    assert data.train.inputs.max() == 5
    assert data.validation.inputs[1].tolist() == [0] * data.input_shape[0]
    assert data.validation.inputs[0].tolist() == [row[0]] + [0] * (data.input_shape[0] - 1)


def test_long_texts_keep_their_first_words(tmp_path):
    train = words(*[" ".join(f"w{i}" for i in range(300))] * 20)
    data = load(str(folder(tmp_path / "t", train=train)))
    assert data.input_shape == (256,)
    assert (data.train.inputs >= 2).all()
    assert len(data.train.inputs[0].unique()) == 256


def test_negations_and_short_words_are_words(tmp_path):
    data = load(str(folder(tmp_path / "t", train=words(*["i do n't"] * 20))))
    assert data.vocabulary == 2 + 3


# language


def test_language_targets_are_inputs_moved_on_by_one(tmp_path):
    text = "".join(chr(97 + (i * i) % 26) for i in range(129 * 40 + 17))
    where = folder(tmp_path / "l", train={"text": [text]}, test={"text": ["é" * 130]})
    data = load(str(where))
    assert (data.kind, data.input_shape) == ("language", (128,))
    assert (len(data.train), len(data.validation), len(data.test)) == (36, 4, 1)
    assert torch.equal(data.train.inputs[:, 1:], data.train.targets[:, :-1])
    names = data.label_names
    assert names is not None
    assert data.classes == data.vocabulary == len(names)
    # the validation windows are the last four of the text
    assert "".join(names[i] for i in data.validation.inputs[0].tolist()) == text[129 * 36 : 129 * 36 + 128]
    assert (data.test.inputs == 0).all()  # a character unseen in training


# tables


def test_table_standardises_numbers_and_spreads_categories(tmp_path):
    train = {
        "age": [float(i) for i in range(20)],
        "job": ["a", "b", "?", None] * 5,
        "constant": [7] * 20,
        "label": np.arange(20) % 2,
    }
    test = {"age": [None, 9.5], "job": ["never", "b"], "constant": [7, 8], "label": np.arange(2)}
    data = load(str(folder(tmp_path / "t", train=train, validation=train, test=test)))
    assert data.kind == "table"
    assert data.input_shape == (2 + 3,)
    torch.testing.assert_close(data.train.inputs[:, 0].mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(data.train.inputs[:, 0].std(unbiased=False), torch.tensor(1.0))
    assert torch.equal(data.train.inputs[:, 2:].sum(0), torch.tensor([10.0, 5.0, 5.0]))
    assert data.test.inputs[0].tolist() == [0.0] * 5
    assert torch.isfinite(data.test.inputs).all()
    assert data.test.inputs[1, 2:].tolist() == [0.0, 0.0, 1.0]


# errors


def message(path: Path, **splits) -> str:
    with pytest.raises(DataError) as caught:
        load(str(folder(path, **splits)))
    return str(caught.value)


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the hub: call it with what asking for a data set does, and with what loading it does."""
    import datasets
    import huggingface_hub

    def raising(result):
        def call(*arguments, **_):
            if isinstance(result, Exception):
                raise result
            return result(*arguments) if callable(result) else result

        return call

    def set_up(asked, loaded=None):
        monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", raising(asked))
        monkeypatch.setattr(datasets, "load_dataset", raising(loaded))

    return set_up


def test_unknown_name_lists_what_is_here(tmp_path, hub):
    hub(OSError("no route"), AssertionError("loaded without a network"))
    folder(tmp_path / "flowers", train=pictures(4)[1])
    with pytest.raises(DataError) as caught:
        load("flower", data_dir=tmp_path)
    text = str(caught.value)
    assert str(tmp_path) in text
    assert "Did you mean 'flowers'?" in text
    assert "digits" in text
    assert "could not be reached" in text


def test_hub_without_the_name(hub):
    from datasets.exceptions import DatasetNotFoundError

    hub(None, DatasetNotFoundError("gone"))
    with pytest.raises(
        DataError, match=r"Nor does the Hugging Face hub have somebody/flower.*Correct the name"
    ):
        load("somebody/flower")


def test_hub_set_that_does_not_load(hub):
    hub(None, ValueError("choose a configuration"))
    with pytest.raises(DataError, match=r"somebody/flower.*could not be loaded: choose a configuration\."):
        load("somebody/flower")


def test_missing_path_is_not_asked_of_the_hub(tmp_path, hub):
    hub(AssertionError("asked"), AssertionError("loaded"))
    with pytest.raises(DataError, match="no such folder") as caught:
        load(str(tmp_path / "nothing"))
    assert "hub" not in str(caught.value)


def test_hub_set_goes_through_the_same_loader(tmp_path, hub):
    import datasets

    loaded = []
    where = folder(tmp_path / "x", train=pictures(20)[1])
    both = datasets.load_dataset(str(where), cache_dir=str(tmp_path / "hub"))

    def load_dataset(name):
        loaded.append(name)
        return both

    hub(None, load_dataset)
    assert load("mnist").classes == 2
    assert load("somebody/flower").classes == 2
    assert loaded == ["ylecun/mnist", "somebody/flower"]


def test_hub_id_finds_the_folder_with_its_short_name(tmp_path):
    folder(tmp_path / "cifar10", train=pictures(20)[1])
    assert load("uoft-cs/cifar10", data_dir=tmp_path).name == "uoft-cs/cifar10"


def test_truncated_parquet_names_the_file(tmp_path):
    where = folder(tmp_path / "cut", train=pictures(40)[1], test=pictures(40)[1])
    file = where / "test.parquet"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(DataError, match=r"test\.parquet cannot be read as Parquet.*again"):
        load(str(where))


def test_other_files(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.bin").write_bytes(b"x")
    with pytest.raises(DataError, match="should hold Parquet files"):
        load("notes", data_dir=tmp_path)


def test_no_usable_columns(tmp_path):
    text = message(tmp_path / "x", train={"height": [1, 2], "weight": [3, 4]})
    assert "height, weight" in text
    assert "img or image with label" in text


def test_columns_that_differ_between_splits(tmp_path):
    text = message(tmp_path / "x", train=words("a", "b"), test={"text": ["a"], "other": [1]})
    assert str(tmp_path / "x") in text
    assert "same columns" in text


def test_empty_split(tmp_path):
    empty = {"text": pa.array([], pa.string()), "label": pa.array([], pa.int64())}
    assert "test.parquet is empty" in message(tmp_path / "x", train=words("a", "b"), test=empty)


def test_empty_split_of_the_hub(hub):
    import datasets

    rows = datasets.Dataset.from_dict({"text": ["a"], "label": [0]})
    both = datasets.DatasetDict(train=rows, test=rows.select([]))
    hub(None, both)
    with pytest.raises(DataError, match="Split test of somebody/empty is empty"):
        load("somebody/empty")


def test_no_training_split(tmp_path):
    assert "No training split" in message(tmp_path / "x", test=words("a", "b"), validation=words("a", "b"))


def test_too_few_rows_to_carve(tmp_path):
    assert "too few" in message(tmp_path / "x", train=words("a"))


def test_image_sizes_that_differ(tmp_path):
    _, train = pictures(4)
    train["img"][2] = png(np.zeros((9, 8, 3), np.uint8))
    assert "8 × 8, 8 × 9" in message(tmp_path / "x", train=train)


def test_image_sizes_that_differ_between_splits(tmp_path):
    text = message(tmp_path / "x", train=pictures(4)[1], test=pictures(4, shape=(6, 6, 3))[1])
    assert "6 × 6, 8 × 8" in text


def test_damaged_image_names_its_row(tmp_path):
    _, train = pictures(4)
    train["img"][2]["bytes"] = b"not a picture"
    assert "Row 2 of split train" in message(tmp_path / "x", train=train)


def test_image_column_without_images(tmp_path):
    text = message(tmp_path / "x", train={"image": [1, 2], "label": [0, 1]})
    assert "column image" in text


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (["a", "b", "a", "b"], "type string"),
        ([0.0, 1.0, 0.5, 1.0], "type double"),
        ([0, 1, None, 1], "1 of them are missing"),
        ([0, 1, -1, 1], "row 2 has -1"),
    ],
)
def test_labels_that_cannot_be_used(tmp_path, labels, says):
    _, train = pictures(4)
    train["label"] = labels
    assert says in message(tmp_path / "x", train=train)


def test_label_out_of_range_between_splits(tmp_path):
    text = message(tmp_path / "x", train=pictures(20)[1], test=pictures(9, classes=3)[1])
    assert "Label 2 in split test" in text


def test_label_beyond_the_names(tmp_path):
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    table = pa.table({"text": ["x"] * 4, "label": [0, 1, 0, 1]}).replace_schema_metadata(
        features.arrow_schema.metadata
    )
    where = folder(tmp_path / "x")
    parquet.write_table(table, where / "train.parquet")
    assert load(str(where)).label_names == ("a", "b")
    worse = table.set_column(1, "label", pa.array([0, 1, 2, 1]))
    parquet.write_table(worse, where / "train.parquet")
    with pytest.raises(DataError, match=r"could not be read.*less than|out of range"):
        load(str(where))


def test_text_too_short_for_a_window(tmp_path):
    assert "too short" in message(tmp_path / "x", train={"text": ["short"]})


def test_text_column_without_text(tmp_path):
    assert "column text is of type" in message(tmp_path / "x", train={"text": [1, 2], "label": [0, 1]})


def test_table_column_that_is_nested(tmp_path):
    assert "Column a of split train" in message(tmp_path / "x", train={"a": [[1], [2]], "label": [0, 1]})


# cache


def test_second_load_comes_from_the_cache_and_is_equal(tmp_path, monkeypatch):
    where = folder(tmp_path / "x", train=pictures(20)[1])
    first = load(str(where))
    monkeypatch.setattr(source, "decode", lambda *_: pytest.fail("decoded again"))
    second = load(str(where))
    assert torch.equal(first.train.inputs, second.train.inputs)
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_damaged_cache_is_rebuilt(tmp_path):
    where = folder(tmp_path / "x", train=words(*["good film", "bad film"] * 5))
    first = load(str(where))
    (file,) = (tmp_path / "cache").rglob("*.npz")
    whole = file.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], whole[:200] + bytes(100) + whole[300:]):
        file.write_bytes(damaged)
        assert torch.equal(first.train.inputs, load(str(where)).train.inputs)
        assert file.read_bytes() == whole


def test_changed_files_are_decoded_again(tmp_path):
    where = folder(tmp_path / "x", train=pictures(20)[1])
    load(str(where))
    folder(where, train=pictures(30)[1])
    os.utime(where / "train.parquet", ns=(1, 1))
    data = load(str(where))
    assert len(data.train) + len(data.validation) + len(data.test) == 30


def test_cache_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RETROGRADE_CACHE", str(tmp_path / "file"))
    with pytest.warns(RetrogradeWarning, match="RETROGRADE_CACHE"):
        data = load(str(folder(tmp_path / "x", train=pictures(20)[1])))
    assert data.classes == 2


def test_progress_bars_come_back(tmp_path):
    import datasets

    datasets.enable_progress_bars()
    load(str(folder(tmp_path / "x", train=pictures(20)[1])))
    assert not datasets.are_progress_bars_disabled()


# available


def test_available(tmp_path, monkeypatch):
    assert available() == ["digits"]
    folder(tmp_path / "d" / "toy", train=pictures(20)[1], test=pictures(4)[1])
    monkeypatch.setenv("RETROGRADE_DATA", str(tmp_path / "d"))
    assert available() == available(tmp_path / "d") == ["digits", "toy"]
    with pytest.raises(DataError, match="does not exist"):
        available(tmp_path / "nowhere")


# batches


def numbered(rows: int, shape=(1, 8, 8)) -> Split:
    targets = torch.arange(rows)
    return Split(torch.randn(rows, *shape, generator=torch.Generator().manual_seed(0)), targets)


def order(split, **options) -> list[int]:
    return torch.cat([y for _, y in batches(split, 4, **options)]).tolist()


def test_batches_visit_every_row_once_in_an_order_of_their_own():
    split = numbered(40)
    first = order(split, seed=0, epoch=0)
    assert sorted(first) == list(range(40))
    torch.manual_seed(9)
    assert order(split, seed=0, epoch=0) == first
    assert len({tuple(order(split, seed=s, epoch=e)) for s in (0, 1, 2**32) for e in (0, 1)}) == 6


def test_batches_resume_where_they_stopped():
    split = numbered(40)
    whole = list(batches(split, 4, seed=1, epoch=2, augment=True))
    rest = list(batches(split, 4, seed=1, epoch=2, augment=True, start=7))
    assert len(rest) == 3
    for (x, y), (again, y_again) in zip(whole[7:], rest, strict=True):
        assert torch.equal(x, again)
        assert torch.equal(y, y_again)


def test_incomplete_batch_is_dropped_unless_alone():
    assert [len(y) for _, y in batches(numbered(10), 4, seed=0, epoch=0)] == [4, 4]
    assert [len(y) for _, y in batches(numbered(3), 4, seed=0, epoch=0)] == [3]
    assert [len(y) for _, y in evaluation_batches(numbered(10), 4)] == [4, 4, 2]
    assert torch.cat([y for _, y in evaluation_batches(numbered(10), 4)]).tolist() == list(range(10))


def test_augmented_images_are_crops_of_the_reflected_image():
    split = numbered(64, (2, 12, 12))
    flipped = moved = 0
    for x, y in batches(split, 16, seed=0, epoch=0, augment=True):
        for image, row in zip(x, y, strict=True):
            padded = torch.nn.functional.pad(split.inputs[row][None], (4, 4, 4, 4), mode="reflect")[0]
            windows = padded.unfold(1, 12, 1).unfold(2, 12, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
            plain = (windows == image).flatten(1).all(1)
            mirrored = (windows == image.flip(-1)).flatten(1).all(1)
            assert plain.any() or mirrored.any()
            flipped += int(mirrored.any() and not plain.any())
            moved += int(not torch.equal(image, split.inputs[row]))
    assert 16 < flipped < 48
    assert moved > 50


def test_batches_refuse_what_they_cannot_do():
    with pytest.raises(OptionError, match="augment"):
        next(batches(numbered(4, (5,)), 2, seed=0, epoch=0, augment=True))


# real data


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "kind", "classes", "shape", "rows"),
    [
        ("breastmnist", "image", 2, (1, 28, 28), (546, 78, 156)),
        ("sst2", "text", 2, None, (6920, 872, 1821)),
        ("trec", "text", 6, None, (4907, 545, 500)),
        ("adult", "table", 2, None, (29305, 3256, 16281)),
        ("tiny-shakespeare", "language", 66, (128,), None),
    ],
)
def test_real_data(data_dir, name, kind, classes, shape, rows):
    data = load(name, data_dir=data_dir)
    assert (data.kind, data.classes) == (kind, classes)
    assert shape in (None, data.input_shape)
    assert rows in (None, (len(data.train), len(data.validation), len(data.test)))
    for split in (data.train, data.validation, data.test):
        assert split.inputs.shape[1:] == data.input_shape
        assert len(split) == len(split.targets)
