"""Files of a run folder survive a failure while they are written, and damage is named."""

import os
import signal
from collections.abc import Generator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from retrograde import host
from retrograde.errors import CheckpointError, RunError, WriteError
from retrograde.lab import files


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), RuntimeError("bug")])
def test_a_writer_that_fails_leaves_the_old_content(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(file: BinaryIO) -> None:
        file.write(b"half of the n")
        file.flush()
        assert path.read_bytes() == b"old"
        raise error

    with pytest.raises(type(error)):
        host.write_atomically(path, write)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == {"file"}


def test_a_writer_that_fails_leaves_no_new_file(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        host.write_atomically(tmp_path / "file", lambda file: file.write("no bytes"))  # type: ignore[arg-type]
    assert names(tmp_path) == set()


def test_the_new_content_replaces_the_old(tmp_path: Path) -> None:
    for content in (b"one", b"two"):
        host.write_atomically(tmp_path / "file", lambda file, content=content: file.write(content))
    assert (tmp_path / "file").read_bytes() == b"two"
    assert names(tmp_path) == {"file"}


def test_what_a_killed_writer_left_is_cleared_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed and resumed many times must not fill the disk with halves of checkpoints."""

    def killed(file: BinaryIO) -> None:
        raise SystemError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
        patch.setattr(os, "getpid", lambda: 1)
        with pytest.raises(SystemError):
            host.write_atomically(tmp_path / "file", killed)
    host.write_atomically(tmp_path / "file", lambda file: file.write(b"new"))
    assert names(tmp_path) == {"file"}


def test_json_that_cannot_be_made_leaves_the_old(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"größe": 1, "path": tmp_path})
    before = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert "größe" in before
    with pytest.raises(TypeError, match="keys must be str"):
        files.write_json(tmp_path / "a.json", {("a", "pair"): 1})  # pyright: ignore[reportArgumentType]
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == before


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    files.save_checkpoint(tmp_path, {"step": 3, "weight": torch.arange(3.0)})
    content = files.load_checkpoint(tmp_path)
    assert content["step"] == 3
    assert torch.equal(content["weight"], torch.arange(3.0))


def test_a_checkpoint_cut_anywhere_is_named(tmp_path: Path) -> None:
    files.save_checkpoint(tmp_path, {"weight": torch.randn(50), "step": 3, "names": ["a"] * 20})
    path = tmp_path / files.CHECKPOINT
    whole = path.read_bytes()
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="cut off"):
            files.load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "content", [b"\x80\x02", b"hello", b"\x80\x04.", b"PK\x03\x04", b"(", b"0", b"I1\n.", b"\x00" * 99]
)
def test_a_file_that_is_no_checkpoint_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / files.CHECKPOINT).write_bytes(content)
    with pytest.raises(CheckpointError, match="checkpoint"):
        files.load_checkpoint(tmp_path)


def test_a_flipped_bit_anywhere_is_harmless_or_named(tmp_path: Path) -> None:
    content = {"weight": torch.randn(500), "step": 3, "names": ["a"] * 20}
    files.save_checkpoint(tmp_path, content)
    path = tmp_path / files.CHECKPOINT
    whole = path.read_bytes()
    refused = 0
    for place in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            found = files.load_checkpoint(tmp_path)
        except CheckpointError:
            refused += 1
            continue
        assert torch.equal(found.pop("weight"), content["weight"])
        assert found == {"format": files.CHECKPOINT_FORMAT, "step": 3, "names": ["a"] * 20}
    assert refused > 2000 / 7, "every byte of the tensor at least"


@pytest.fixture
def small_disk() -> Generator[None]:
    """Writing fails beyond 100 kB a file, as on a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("small_disk")
def test_a_full_disk_is_named_and_the_old_files_stay(tmp_path: Path) -> None:
    """One error for what json, torch and safetensors each raise in their own words."""
    large = torch.zeros(50_000)
    layer = torch.nn.Linear(250, 250)
    for name, write in {
        "a.json": lambda value: files.write_json(tmp_path / "a.json", {"a": "x" * len(value)}),
        files.CHECKPOINT: lambda value: files.save_checkpoint(tmp_path, {"a": value}),
        files.MODEL: lambda value: files.save_model(
            tmp_path, layer if len(value) > 1 else torch.nn.Linear(1, 1)
        ),
    }.items():
        write(large[:1].clone())
        before = (tmp_path / name).read_bytes()
        with pytest.raises(
            WriteError, match=rf"{name} cannot be written: .*arge.*What was written before is whole"
        ):
            write(large.repeat(4))
        assert (tmp_path / name).read_bytes() == before
    assert names(tmp_path) == {"a.json", files.CHECKPOINT, files.MODEL}


def test_a_folder_is_for_one_run_at_a_time(tmp_path: Path) -> None:
    with files.locked(tmp_path):
        for _ in range(2):
            with pytest.raises(RunError, match="another run is training in"), files.locked(tmp_path):
                pass
    again = files.locked(tmp_path)
    again.__enter__()
    del again
    with files.locked(tmp_path):
        pass
    assert names(tmp_path) == set()


def test_json_holds_names_that_are_not_utf8(tmp_path: Path) -> None:
    content = {"name": os.fsdecode("Äpfel".encode("latin-1")), "größe": "Ω\\"}
    files.write_json(tmp_path / "a.json", content)
    assert files.read_json(tmp_path / "a.json") == content
    assert "größe" in (tmp_path / "a.json").read_text(encoding="utf-8")


class Trap:
    """Unpickling it would run code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (eval, ("1/0",))


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"format": files.CHECKPOINT_FORMAT, "trap": Trap()}, tmp_path / files.CHECKPOINT)
    with pytest.raises(CheckpointError):
        files.load_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [{"format": 99}, {}, [1], torch.zeros(2)])
def test_another_format_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / files.CHECKPOINT)
    with pytest.raises(CheckpointError, match="format"):
        files.load_checkpoint(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        files.load_checkpoint(tmp_path)
