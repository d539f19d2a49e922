"""Status and history: private, replaced whole, written on a change only, and never a reason to stop serving."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path

import pytest

from gracehooks.instances import Instance
from gracehooks.upgrade.history import Book, default_state_dir, index_dir, private_dir, run_dir


@pytest.fixture(autouse=True)
def _run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))


@pytest.fixture
def complaints() -> list[str]:
    return []


@pytest.fixture
def book(tmp_path: Path, complaints: list[str]) -> Book:
    return Book(tmp_path / "state", complaints.append)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_files_are_private(book: Book):
    before = os.umask(0)
    try:
        book.write_status({"state": "serving"})
        book.append({"id": "a"})
        book.register(12345)
    finally:
        os.umask(before)
    assert mode(book.directory) == 0o700
    assert mode(book.directory / "status.json") == 0o600
    assert mode(book.directory / "history.jsonl") == 0o600
    assert mode(index_dir()) == 0o700
    assert mode(index_dir() / "12345") == 0o600


def test_the_status_is_replaced_whole_and_only_on_a_change(book: Book):
    book.write_status({"state": "serving"})
    first = (book.directory / "status.json").stat()
    assert book.write_status({"state": "serving"})
    assert (book.directory / "status.json").stat().st_ino == first.st_ino
    book.write_status({"state": "stopping"})
    assert (book.directory / "status.json").stat().st_ino != first.st_ino
    assert json.loads((book.directory / "status.json").read_text()) == {"state": "stopping"}
    assert os.listdir(book.directory) == ["status.json"]


def test_the_history_grows_a_line_at_a_time(book: Book):
    for number in range(3):
        book.append({"id": number})
    lines = (book.directory / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [0, 1, 2]


def test_what_cannot_be_written_is_said_once_and_again_after_it_was_mended(book: Book, complaints: list[str]):
    book.directory.write_text("in the way")
    assert not book.write_status({"state": "serving"})
    assert not book.append({"id": 1})
    assert len(complaints) == 1
    assert str(book.directory) in complaints[0]
    book.directory.unlink()
    assert book.write_status({"state": "serving"})
    shutil.rmtree(book.directory)
    book.directory.write_text("in the way")
    assert not book.append({"id": 2})
    assert len(complaints) == 2


def test_a_failed_write_is_tried_again(book: Book):
    book.directory.write_text("in the way")
    assert not book.write_status({"state": "serving"})
    book.directory.unlink()
    assert book.write_status({"state": "serving"})
    assert (book.directory / "status.json").exists()


def test_lines_that_could_not_be_written_come_with_the_next_write_and_in_order(book: Book):
    book.directory.write_text("in the way")
    assert not book.append({"id": 1})
    assert not book.append({"id": 2})
    book.directory.unlink()
    assert book.write_status({"state": "serving"})
    assert book.append({"id": 3})
    lines = (book.directory / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [1, 2, 3]


def test_a_disk_that_takes_half_a_line_spoils_no_other(book: Book, monkeypatch: pytest.MonkeyPatch):
    assert book.append({"id": 1})
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[: len(data) // 2]))
    assert not book.append({"id": 2})
    monkeypatch.undo()
    assert book.append({"id": 3})
    assert [record["id"] for record in Instance(book.directory).history()] == [1, 2, 3]


def test_the_index_names_the_directory_by_pid(book: Book):
    book.register(4242)
    assert (index_dir() / "4242").read_text() == str(book.directory)
    book.unregister(4242)
    book.unregister(4242)
    assert not (index_dir() / "4242").exists()


def test_default_directories(tmp_path: Path):
    assert default_state_dir("/run/app/gunicorn.pid", 1) == Path("/run/app/gunicorn.gracehooks")
    assert default_state_dir("/run/app/gunicorn", 1) == Path("/run/app/gunicorn.gracehooks")
    assert default_state_dir("app.pid", 1) == Path.cwd() / "app.gracehooks"
    assert default_state_dir(None, 77) == run_dir() / "77" == tmp_path / "run" / "gracehooks" / "77"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_somebody_else_is_refused(tmp_path: Path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    os.chown(theirs, 65534, 65534)
    with pytest.raises(PermissionError, match="another user"):
        private_dir(theirs)
