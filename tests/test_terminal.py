"""What a terminal gets: nothing that it would obey, one line for one line, on a stdout of any encoding; JSON is exact."""

import io
import json
import logging
import sys
import warnings

import pytest

from tnt_fast import terminal
from tnt_fast.terminal import LIMIT, complain, guarded, nearest, printable, say, say_json

HOSTILE = {
    "clear the screen": "cat\x1b[2J",
    "set the clipboard": "cat\x1b]52;c;cm0gLXJmIH4=\x07",
    "8-bit escape": "cat\x9b31m",
    "overwrite the line": "cat\rdog",
    "forge a line": "cat\n99.00% dog",
    "forge a line in Unicode": "cat\u2028dog\x85dog\x0bdog",
    "erase": "cat\x08\x08\x7f",
    "right to left": "cat\u202egnp.exe\u2066\u200f",
    "nothing to see": "c\u200bat\ufeff\U000e0041",
    "a name that is not UTF-8": b"caf\xe9".decode("utf-8", "surrogateescape"),
    "half a character": "\ud83d cat",
}


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_what_a_terminal_would_obey_is_shown_escaped(name, capsys):
    shown = printable(name)
    assert shown.isprintable()
    assert shown == ascii(name)[1:-1]  # exactly what it is can be read, and pasted into Python
    say(name)
    say(name, error=True)
    assert capsys.readouterr() == (shown + "\n", shown + "\n")


@pytest.mark.parametrize("name", ["Kätzchen, 猫 ねこ", "🐱 (1).jpg", r"C:\cats\new", "", "قطة"])
def test_names_that_a_terminal_can_show_stay(name):
    assert printable(name) == name


def test_a_long_error_keeps_its_beginning_and_its_remedy(capsys):
    complain(f"cannot load 'a.pt': unexpected key {'k' * 10**6}; leave it out")
    (line,) = capsys.readouterr().err.splitlines()
    assert len(line) == LIMIT
    assert line.startswith("cannot load 'a.pt': unexpected key kkk")
    assert line.endswith("kkk; leave it out")
    assert [printable("abcdefghij", limit) for limit in (10, 9, 8)] == ["abcdefghij", "ab … ghij", "ab … hij"]


def test_an_error_of_several_lines_is_one(capsys):
    complain("cannot run:\n  - a reason\n  - another\n")
    assert capsys.readouterr().err == "cannot run: - a reason - another\n"


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [("ascii", r"caf\xe9 \xd7 \u732b"), ("latin-1", r"café × \u732b"), ("utf-8", "café × 猫")],
)
def test_a_stdout_that_has_not_all_characters_gets_escapes(encoding, expected, monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stdout)
    with guarded():
        say("café × 猫")
        print("café × 猫")  # as argparse does
    stdout.flush()
    assert stdout.buffer.getvalue().decode(encoding) == f"{expected}\n" * 2
    assert stdout.errors == "strict"  # as it was


def test_warnings_and_log_records_of_other_libraries_are_lines_too(capsys):
    before = warnings.formatwarning, logging.getLogRecordFactory()
    logger, handler = logging.getLogger("someone.else"), logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)
    try:
        with guarded():
            sys.stderr.write(
                warnings.formatwarning(UserWarning("bad \x1b[2J\nEXIF"), UserWarning, "their.py", 1)
            )  # as Python does
            logger.warning("unexpected key %s\n", "\x1b]0;x\x07" + "k" * 10**5)
    finally:
        logger.removeHandler(handler)
    first, second = capsys.readouterr().err.splitlines()
    assert first == r"tnt-fast: UserWarning: bad \x1b[2J EXIF"
    assert second.startswith(r"unexpected key \x1b]0;x\x07kkk")
    assert len(second) == LIMIT
    assert (warnings.formatwarning, logging.getLogRecordFactory()) == before


def test_json_is_exact_ascii_and_valid(capsys):
    value = [{"file": name, "p": 0.25, "none": None} for name in [*HOSTILE.values(), *map(chr, range(160))]]
    say_json(value)
    text = capsys.readouterr().out
    assert json.loads(text) == value
    assert all(" " <= c <= "~" or c == "\n" for c in text)
    with pytest.raises(ValueError, match="not JSON compliant"):
        say_json(float("nan"))


def test_a_line_goes_above_a_progress_bar(monkeypatch):
    tqdm = pytest.importorskip("tqdm")
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    with tqdm.tqdm(total=2, file=screen, ncols=40, leave=False) as bar:
        bar.update()
        terminal.say("a.png  cat", error=True)
    assert any(line.rpartition("\r")[2] == "a.png  cat" for line in screen.getvalue().split("\n"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [("Adamv", "; nearest: adam, AdamW"), ("sdg", "; nearest: sgd"), ("nothing like it", ""), ("", ""), (3, "")],
    ids=str,
)
def test_an_error_names_what_is_nearest(name, expected):
    assert nearest(name, ["AdamW", "sgd", "adam"]) == expected
