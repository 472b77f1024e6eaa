"""Files are whole or as they were, whoever writes beside them."""

import os

import pytest

from tnt_fast.writing import replacing, replacing_by_path


def test_a_link_is_replaced_and_what_it_points_to_is_left(tmp_path):
    other, link = tmp_path / "other", tmp_path / "link"
    other.write_bytes(b"theirs")
    link.symlink_to(other)
    with replacing(link) as file:
        file.write(b"ours")
    assert (link.read_bytes(), other.read_bytes(), link.is_symlink()) == (b"ours", b"theirs", False)


def test_what_fails_on_the_way_leaves_the_old_file_alone(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), replacing(file) as new:  # noqa: PT012
        new.write(b"half")
        raise KeyboardInterrupt
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_two_writers_do_not_meet(tmp_path):
    file = tmp_path / "a"
    with replacing(file) as first:
        first.write(b"first")
        with replacing(file) as second:
            second.write(b"second")
        assert file.read_bytes() == b"second"
    assert file.read_bytes() == b"first"


def test_a_folder_takes_the_place_of_another_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "folder"
    for text in ("first", "second"):
        with replacing_by_path(folder) as new:
            new.mkdir()
            (new / "file").write_text(text)
        assert (folder / "file").read_text() == text
    with pytest.raises(OSError, match="full"), replacing_by_path(folder) as new:  # noqa: PT012
        new.mkdir()
        raise OSError("the disk is full")
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "file"]
    assert (folder / "file").read_text() == "second"


def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").touch()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(PermissionError("no")))
    with pytest.raises(PermissionError), replacing_by_path(folder) as new:
        new.mkdir()
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "file"]
