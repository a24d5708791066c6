"""Copies of a bundle's files, whatever the kernel and the disk can do."""

from __future__ import annotations

import errno
import os

import pytest

from lminf_export.bundle.copying import copy_file

CONTENT = b"0123456789" * 300_000


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source"
    path.write_bytes(CONTENT)
    return path


def without(*_):
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))


@pytest.mark.parametrize("kernel", [None, without, lambda *_: 0])
def test_a_copy_is_whole_and_a_file_of_its_own(source, tmp_path, monkeypatch, kernel):
    if kernel is not None:
        monkeypatch.setattr(os, "copy_file_range", kernel)
    target = tmp_path / "target"
    copy_file(source, target)
    assert target.read_bytes() == CONTENT
    with open(target, "r+b") as file:
        file.write(b"altered")
    assert source.read_bytes() == CONTENT
    assert source.stat().st_nlink == target.stat().st_nlink == 1


def test_a_link_is_followed(source, tmp_path):
    (tmp_path / "link").symlink_to(source)
    copy_file(tmp_path / "link", tmp_path / "target")
    assert not (tmp_path / "target").is_symlink()
    assert (tmp_path / "target").read_bytes() == CONTENT


def test_a_system_without_the_call_copies_too(source, tmp_path, monkeypatch):
    monkeypatch.delattr(os, "copy_file_range")
    copy_file(source, tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == CONTENT


def test_a_full_disk_and_a_cut_file_are_errors(source, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(OSError, match="No space left"):
        copy_file(source, tmp_path / "full")
    pieces = iter([5, 0])
    monkeypatch.setattr(os, "copy_file_range", lambda *_: next(pieces))
    with pytest.raises(OSError, match="changed while it was copied"):
        copy_file(source, tmp_path / "cut")
    with pytest.raises(FileExistsError):
        copy_file(source, tmp_path / "cut")
