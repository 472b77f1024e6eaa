"""Files are whole or as they were, whoever writes beside them."""

import os

import pytest

from tnt_fast.writing import replacing


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
