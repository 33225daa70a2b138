"""Files that appear whole or not at all, claims between processes, and JSON that is broken."""

import os
import re

import pytest

from mgp5.errors import Mgp5Error
from mgp5.files import (
    Claim,
    digest,
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


@pytest.mark.parametrize("beside", [False, True])
def test_one_process_at_a_time_has_a_folder(tmp_path, beside):
    folder = tmp_path / "deep/x"

    def other() -> str:
        """What another process is told that claims the folder, "" if it gets it."""
        read, write = os.pipe()
        if not (child := os.fork()):
            try:
                Claim(folder, beside)
            except Mgp5Error as error:
                os.write(write, str(error).encode())
            os._exit(0)
        os.close(write)
        os.waitpid(child, 0)
        with open(read) as told:
            return told.read()

    with Claim(folder, beside):
        whose = rf"another process is at work in {folder} \(.*, process {os.getpid()}, since 20.*\): wait for it, .*"
        assert re.fullmatch(whose, other())
    assert not (tmp_path / "deep" if beside else folder).exists()  # nothing was written
    assert other() == ""  # it ends without letting go
    with Claim(folder, beside):
        assert other()


@pytest.mark.parametrize("beside", [False, True])
def test_a_folder_that_cannot_be_claimed_is_told(tmp_path, beside):
    (tmp_path / "file").touch()
    with pytest.raises(Mgp5Error, match=r"file.* has a file in its way"):
        Claim(tmp_path / "file/out" if beside else tmp_path / "file", beside)


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
