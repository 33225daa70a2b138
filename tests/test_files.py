"""Files that appear whole or not at all, locks between processes, and JSON that is broken."""

from __future__ import annotations

import os

import pytest

from mgp5.errors import Mgp5Error
from mgp5.files import (
    digest,
    lock,
    read_json,
    read_text,
    remove_leftovers,
    replacing,
    text_lines,
    write_json,
    write_text,
)


def test_a_block_that_fails_leaves_the_old_content(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(ZeroDivisionError), replacing(path) as part:
        part.write_text(str(1 / 0))
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
    with replacing(tmp_path / "folder", durable=True) as part:
        part.mkdir()
        (part / "file").touch()
        assert not (tmp_path / "folder").exists()
    assert (tmp_path / "folder/file").exists()
    (tmp_path / ".folder.part").mkdir()  # of a process that was killed
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "folder"]


def test_what_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(Mgp5Error, match=r"cannot write .*gone/a\.json \(No such file"):
        write_json(tmp_path / "gone/a.json", {})


def test_a_lock_keeps_other_processes_out(tmp_path):
    def other() -> int:
        """Exit code of a process that takes the lock: 0 if it could."""
        if not (child := os.fork()):
            try:
                lock(tmp_path / "x/.lock")
                os._exit(0)
            except Mgp5Error as error:
                os._exit(3 if "at work in" in str(error) else 4)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    with lock(tmp_path / "x/.lock"):
        assert other() == 3
    assert other() == 0


@pytest.mark.parametrize(
    ("text", "reason"), [("{\n]", "a.json:2 is not JSON"), ("[]", "holds a JSON list"), ("[" * 10**5, "not JSON")]
)
def test_broken_json_is_one_line(tmp_path, text, reason):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(Mgp5Error, match=reason) as error:
        read_json(tmp_path / "a.json", "make it again")
    assert str(error.value).endswith(": make it again") and "\n" not in str(error.value)


def test_texts_have_no_byte_order_mark_and_lines_end_at_newlines_only(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffa fox\x0c\x85\u2028b\r\n \n owl \rcat".encode())
    assert text_lines(read_text(path)) == ["a fox\x0c\x85\u2028b", "owl", "cat"]
    path.write_bytes(b"a fox \xff")
    with pytest.raises(Mgp5Error, match=r"a\.txt cannot be read as UTF-8 text.*: save it as UTF-8"):
        read_text(path)


def test_digests_tell_values_apart():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1})
    assert digest("x") == digest(b"x") and len(digest("x", size=8)) == 16
