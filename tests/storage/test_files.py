"""Atomic writes: the new content or the old one, no leftovers, and file systems that cannot flush a folder."""

import errno
import os

import pytest

from bdistil.errors import RunError
from bdistil.storage import files
from bdistil.storage.files import atomic, disk_errors, write_atomically


class Killed(BaseException):
    """The process ends here."""


def killed(*_, **__):
    raise Killed


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "text"
    write_atomically(path, "before")
    return path


@pytest.mark.parametrize("step", ["sync", "os.replace"])
def test_a_file_is_there_whole_or_as_it_was(path, monkeypatch, step):
    monkeypatch.setattr(f"bdistil.storage.files.{step}", killed)
    with pytest.raises(Killed):
        write_atomically(path, "after, and longer")
    assert [(file.name, file.read_text()) for file in path.parent.iterdir()] == [("text", "before")]


def test_an_error_of_the_block_removes_what_it_wrote(path):
    with pytest.raises(Killed), atomic(path) as temporary:
        killed(temporary.write_text("half"))
    assert [(file.name, file.read_text()) for file in path.parent.iterdir()] == [("text", "before")]


def test_leftovers_of_a_killed_process_do_not_matter(path):
    leftover = path.with_name(".text.tmp")
    leftover.mkdir()
    (leftover / "half").touch()
    write_atomically(path, "after")
    assert [(file.name, file.read_text()) for file in path.parent.iterdir()] == [("text", "after")]


def test_a_folder_comes_with_all_that_is_in_it_flushed(tmp_path, monkeypatch):
    flushed, sync = [], files.sync
    monkeypatch.setattr(files, "sync", lambda path: (flushed.append(path.name), sync(path)))
    with atomic(tmp_path / "folder") as folder:
        (folder / "inner").mkdir(parents=True)
        (folder / "inner" / "file").touch()
        assert not (tmp_path / "folder").exists()
    assert (tmp_path / "folder" / "inner" / "file").is_file()
    assert sorted(flushed[:2]) == ["file", "inner"]
    assert flushed[2:] == [".folder.tmp", tmp_path.name]


@pytest.mark.parametrize(("number", "fails"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_a_file_system_that_cannot_flush_folders_will_do(path, monkeypatch, number, fails):
    fsync = os.fsync

    def folders_refused(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(number, os.strerror(number))
        fsync(handle)

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    monkeypatch.setattr(os, "fsync", folders_refused)
    if fails:
        with pytest.raises(OSError, match=os.strerror(number)):
            write_atomically(path, "after")
    else:
        write_atomically(path, "after")
    assert path.read_text() == "after"


def test_a_file_that_cannot_be_flushed_is_an_error(path, monkeypatch):
    def refused(handle):
        raise OSError(errno.EINVAL, "no")

    monkeypatch.setattr(os, "fsync", refused)
    with pytest.raises(OSError, match="no"):
        write_atomically(path, "after")
    assert path.read_text() == "before"


def test_a_missing_file_of_the_user_is_no_error_of_the_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.png"), disk_errors("the ledger", tmp_path / "run"):
        (tmp_path / "none.png").read_bytes()
    with pytest.raises(RunError, match="Could not finish the ledger"), disk_errors("the ledger", tmp_path):
        (tmp_path / "none.png").read_bytes()
