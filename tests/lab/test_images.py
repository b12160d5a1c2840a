import io
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from retrograde.errors import DataError, RetrogradeWarning
from retrograde.lab import source
from retrograde.lab.data import available, load


def noise(size=(16, 16), mode: str = "RGB") -> Image.Image:
    width, height = size
    values = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def photos(path: Path, *classes: str, count: int = 6, size=(16, 16), mode="RGB", kind="png") -> Path:
    """Write ``count`` images into each of the folders ``classes`` of ``path``."""
    for name in classes:
        (path / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            noise(size, mode).save(path / name / f"{number}.{kind}")
    return path


def rows(data) -> tuple[int, int, int]:
    return len(data.train), len(data.validation), len(data.test)


def message(path: Path) -> str:
    with pytest.raises(DataError) as raised:
        load(str(path))
    assert str(path) in str(raised.value)
    return str(raised.value)


# layouts


def test_classes_are_folders_and_the_splits_are_carved(tmp_path):
    data = load(str(photos(tmp_path / "x", "dog", "cat", count=10)))
    assert (data.kind, data.label_names, data.classes) == ("image", ("cat", "dog"), 2)
    assert data.input_shape == (3, 16, 16)
    assert rows(data) == (14, 2, 4)


@pytest.mark.parametrize("validation", ["validation", "val", "Valid"])
def test_splits_are_folders(tmp_path, validation):
    where = tmp_path / "x"
    for split, count in (("train", 5), (validation, 2), ("Test", 3)):
        photos(where, f"{split}/cat", f"{split}/dog", count=count)
    assert rows(load(str(where))) == (10, 4, 6)


def test_each_image_has_the_label_of_its_folder(tmp_path):
    where = tmp_path / "x"
    for split in ("train", "test"):
        for name, shade in (("dark", 10), ("light", 240)):
            (where / split / name).mkdir(parents=True)
            for number in range(4):
                Image.new("L", (8, 8), shade).save(where / split / name / f"{number}.png")
    data = load(str(where))
    assert torch.equal(data.test.targets, torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]))
    assert torch.equal(data.test.inputs.mean((1, 2, 3)) > 0, data.test.targets == 1)


def test_classes_named_like_splits(tmp_path):
    data = load(str(photos(tmp_path / "x", "train", "plane", "test_tube")))
    assert data.label_names == ("plane", "test_tube", "train")


def test_what_is_no_image_is_passed_over(tmp_path):
    where = photos(tmp_path / "x", "cat", "dog")
    (where / "labels.csv").write_text("a,b\n1,2\n")
    for number in range(40):
        (where / "cat" / f"{number}.txt").write_text("a note")
    for left_behind in ("cat/._0.png", "__MACOSX/0.png", ".trash/0.png"):
        (where / left_behind).parent.mkdir(exist_ok=True)
        (where / left_behind).write_bytes(b"no image")
    data = load(str(where))
    assert data.label_names == ("cat", "dog")
    assert sum(rows(data)) == 12


@pytest.mark.parametrize(("classes", "empty"), [(["a", "c"], "b"), (["train/a", "train/c"], "test")])
def test_an_empty_folder_is_told(tmp_path, classes, empty):
    where = photos(tmp_path / "x", *classes)
    (where / empty).mkdir()
    with pytest.warns(RetrogradeWarning, match=f"{empty} in .* is empty, .* there are 2 classes"):
        assert load(str(where)).label_names == ("a", "c")


def test_links_are_followed(tmp_path):
    """To images, to class folders and to splits: whatever lies there would else be left out without a word."""
    elsewhere = photos(tmp_path / "elsewhere", "dog", "bird", count=10)
    where = photos(tmp_path / "x", "cat", count=9)
    (where / "cat" / "9.png").symlink_to(elsewhere / "dog" / "0.png")
    (where / "dog").symlink_to(elsewhere / "dog")
    data = load(str(where))
    assert data.label_names == ("cat", "dog")
    assert sum(rows(data)) == 20
    split = tmp_path / "y"
    split.mkdir()
    (split / "train").symlink_to(elsewhere)
    assert load(str(split)).label_names == ("bird", "dog")


def test_links_that_lead_nowhere_or_in_a_circle_are_named(tmp_path):
    where = photos(tmp_path / "x", "cat", "dog")
    (where / "cat" / "gone.png").symlink_to(tmp_path / "gone")
    assert "gone.png" in message(where)
    circle = photos(tmp_path / "y", "cat", "dog")
    (circle / "cat" / "up").symlink_to(circle)
    assert "is unclear" in message(circle)


def test_names_that_are_not_utf8(tmp_path):
    name = os.fsdecode("Äpfel".encode("latin-1"))
    where = photos(tmp_path / "x", "cat", name)
    (where / name / "0.png").rename(where / name / f"{name}.png")
    for _ in range(2):
        assert load(str(where)).label_names == ("cat", name)


def test_a_name_that_is_too_long_is_no_data_set(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("x" * 300, "a\0b", "x/" * 3000):
        with pytest.raises(DataError, match="No data set"):
            load(name)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"


def test_only_formats_of_pictures_are_opened(tmp_path, monkeypatch):
    """Pillow hands PostScript to Ghostscript, whatever the file is called."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("handed on"))
    where = photos(tmp_path / "x", "cat", "dog")
    (where / "cat" / "x.png").write_bytes(POSTSCRIPT)
    assert "x.png" in message(where)
    table = tmp_path / "y"
    table.mkdir()
    parquet(table, [{"bytes": POSTSCRIPT, "path": "x.png"}])
    assert "Row 0" in message(table)


def parquet(where: Path, first: list[dict]) -> None:
    """A set of ten pictures beside `first`."""
    content = io.BytesIO()
    noise().save(content, "PNG")
    images = [*first, *({"bytes": content.getvalue(), "path": None} for _ in range(10))]
    labels = [i % 2 for i in range(len(images))]
    pq.write_table(pa.table({"image": images, "label": labels}), where / "train.parquet")


@pytest.mark.parametrize("path", ["{}/secret.png", "../secret.png", "link.png", "https://example.org/x.png"])
def test_a_row_reaches_nothing_beyond_its_data_set(tmp_path, path):
    noise().save(tmp_path / "secret.png")
    where = tmp_path / "x"
    where.mkdir()
    (where / "link.png").symlink_to(tmp_path / "secret.png")
    parquet(where, [{"bytes": None, "path": path.format(tmp_path)}])
    assert "Row 0" in message(where)


def test_a_row_may_name_a_file_of_its_data_set(tmp_path):
    where = tmp_path / "x"
    (where / "pictures").mkdir(parents=True)
    noise().save(where / "pictures" / "0.png")
    parquet(where, [{"bytes": None, "path": "pictures/0.png"}])
    assert sum(rows(load(str(where)))) == 11


@pytest.mark.parametrize(
    ("classes", "says"),
    [
        (["cat"], "all of one class, cat"),
        (["train/cat", "test/cat"], "all of one class, cat"),
        (["."], "0 folders below"),
        (["train", "test"], "1 folders below"),
        (["pets/cat", "pets/dog"], "2 folders below"),
        (["train/cat", "train/dog", "more/cat"], "2 folders below"),
        (["train/cat", "train/dog", "."], "0 folders below"),
        (["val/cat", "val/dog"], "No training images"),
        (["train/cat", "train/dog", "test/Dog"], "Class Dog in split test"),
    ],
)
def test_layouts_that_are_unclear(tmp_path, classes, says):
    assert says in message(photos(tmp_path / "x", *classes, count=2))


def test_available_knows_folders_of_images(tmp_path):
    photos(tmp_path / "unclear", "a/b/c")
    photos(tmp_path / "pets", "train/cat", "train/dog", "test/cat", count=3)
    assert available(tmp_path) == ["digits", "pets"]
    assert load("pets", data_dir=tmp_path).label_names == ("cat", "dog")


# images


@pytest.mark.parametrize(
    ("mode", "kind", "channels"),
    [
        ("L", "png", 1),
        ("1", "png", 1),
        ("P", "png", 3),
        ("RGBA", "png", 3),
        ("LA", "png", 3),
        ("CMYK", "jpg", 3),
        ("L", "jpeg", 1),
        ("RGB", "JPG", 3),
        ("RGBA", "webp", 3),
    ],
)
@pytest.mark.filterwarnings("ignore:The .* images:retrograde.errors.RetrogradeWarning")
@pytest.mark.parametrize("side", [16, 70])
def test_modes_and_formats(tmp_path, mode, kind, channels, side):
    data = load(str(photos(tmp_path / "x", "a", "b", mode=mode, kind=kind, size=(side, side))))
    assert data.input_shape == (channels, min(side, 64), min(side, 64))


def test_one_colour_image_among_grey_makes_three_channels(tmp_path):
    where = photos(tmp_path / "x", "train/a", "train/b", "test/a", mode="L")
    noise().save(where / "test" / "a" / "0.png")
    assert load(str(where)).input_shape == (3, 16, 16)


def test_transparent_palette_does_not_warn(tmp_path):
    where = photos(tmp_path / "x", "a", "b")
    noise(mode="P").save(where / "a" / "0.png", transparency=bytes(range(256)))
    assert load(str(where)).input_shape == (3, 16, 16)


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_damaged_image_names_its_file(tmp_path, content):
    where = photos(tmp_path / "x", "cat", "dog")
    broken = where / "cat" / "3.png"
    broken.write_bytes(broken.read_bytes()[:200] if content is None else content)
    assert f"{broken} holds no image" in message(where)


def test_more_than_8_bits_names_its_file(tmp_path):
    where = photos(tmp_path / "x", "cat", "dog")
    Image.fromarray(np.zeros((16, 16), dtype=np.uint16)).save(where / "dog" / "deep.png")
    text = message(where)
    assert "deep.png" in text
    assert "8 bits" in text


# sizes


def test_one_size_up_to_64_is_kept(tmp_path):
    assert load(str(photos(tmp_path / "x", "a", "b", size=(64, 33)))).input_shape == (3, 33, 64)


@pytest.mark.parametrize(
    ("sizes", "side"),
    [
        ([(100, 80), (100, 80)], 64),
        ([(100, 50), (100, 50)], 48),
        ([(200, 70), (65, 90)], 64),
        ([(30, 41), (39, 31)], 28),
        ([(5, 6), (6, 5), (6, 6)], 8),
    ],
)
def test_other_sizes_are_resized_with_a_warning(tmp_path, sizes, side):
    where = tmp_path / "x"
    for number, size in enumerate(sizes):
        photos(where, f"class{number}", size=size)
    with pytest.warns(
        RetrogradeWarning, match=f"resized to {side} × {side} pixels.*resize them yourself"
    ) as w:
        data = load(str(where))
    assert data.input_shape == (3, side, side)
    assert w[0].filename == __file__
    assert f"{sizes[0][0]} × {sizes[0][1]}" in str(w[0].message)
    with pytest.warns(RetrogradeWarning, match="resized to"):  # the second time from the cache
        assert torch.equal(load(str(where)).train.inputs, data.train.inputs)


@pytest.mark.filterwarnings("ignore:The .* images:retrograde.errors.RetrogradeWarning")
@pytest.mark.parametrize(("kind", "side"), [("png", 100), ("jpg", 100), ("jpg", 800)])
def test_the_middle_is_kept_and_not_squeezed(tmp_path, kind, side):
    # black, then a white square, then black: what is kept of a wide image is the square alone
    where = photos(tmp_path / "x", "train/a", "train/b", "test/b", size=(side, side), kind=kind, count=2)
    wide = Image.new("RGB", (3 * side, side))
    wide.paste((255, 255, 255), (side, 0, 2 * side, side))
    (where / "test" / "a").mkdir()
    wide.save(where / "test" / "a" / f"0.{kind}")
    split = source.read(str(where)).parts["test"]
    square = split["pixels"][split["labels"] == 0][0]
    assert square.shape == (3, 64, 64)
    assert square[:, :, 2:-2].min() > 240


@pytest.mark.filterwarnings("ignore:The .* images:retrograde.errors.RetrogradeWarning")
@pytest.mark.parametrize("side", [32, 320])
def test_photographs_are_turned_upright(tmp_path, side):
    where = tmp_path / "x"
    for name in ("train/a", "train/b", "test/a"):
        photos(where, name, count=2, size=(side, side * 3 // 4), kind="jpg")
    picture = Image.new("L", (side * 3 // 4, side))
    picture.paste(255, (0, 0, side, side // 2))  # light above, as it is to be seen
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.transpose(Image.Transpose.ROTATE_90).save(where / "test" / "a" / "0.jpg", exif=exif)
    seen = source.read(str(where)).parts["test"]["pixels"][0]
    assert seen[:, :8].min() > 200
    assert seen[:, -8:].max() < 50


# cache


def test_changed_images_are_decoded_again(tmp_path, monkeypatch):
    where = photos(tmp_path / "x", "a", "b")
    first = source.read(str(where)).parts["train"]["pixels"]
    with monkeypatch.context() as patch:
        patch.setattr(source, "pixels_of_files", lambda *_: pytest.fail("decoded again"))
        assert np.array_equal(source.read(str(where)).parts["train"]["pixels"], first)
    noise(mode="L").convert("RGB").save(where / "a" / "0.png")
    os.utime(where / "a" / "0.png", ns=(1, 1))
    assert not np.array_equal(source.read(str(where)).parts["train"]["pixels"], first)
    (where / "a").rename(where / "c")
    assert load(str(where)).label_names == ("b", "c")
