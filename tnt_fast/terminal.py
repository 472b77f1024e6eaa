"""What ``tnt-fast`` prints. Names and messages come from strangers' files: a terminal shows them, and never obeys them.

An error about an unknown name says which are ``nearest``, wherever it is raised. All that is printed passes ``printable``: the
command's own lines in ``say``, and in ``guarded`` what Python prints for other libraries.
"""

import difflib
import io
import json
import logging
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

LIMIT = 2000  # characters of an error's line; a file may have a key of a million


def printable(text: object, limit: int | None = None) -> str:
    r"""Text as one line that a terminal can show; what is not printable is escaped as in repr(): ``\x1b``, ``\n``, ``\u202e``.

    That is: control characters, line breaks, marks of direction and other invisible characters, surrogates. The text of a
    progress bar goes through here, too.

    Args:
        limit: largest length; what is longer loses its middle, for an error's remedy stands at its end.
    """
    line = str(text)
    if not line.isprintable():
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    if limit is not None and len(line) > limit:
        line = f"{line[: limit // 2 - 2]} … {line[len(line) - (limit - limit // 2 - 1) :]}"
    return line


def nearest(name: object, known: Iterable[str]) -> str:
    """``"; nearest: A, B"`` for an error about a name that is none of these: the most alike, at most 3. ``""``: none is."""
    spelt = {each.lower(): each for each in known}
    near = difflib.get_close_matches(str(name)[:100].lower(), spelt, 3)
    return f"; nearest: {', '.join(spelt[each] for each in near)}" if near else ""


def say(text: object = "", *, error: bool = False) -> None:
    """Print one line, however many the text may have; on stderr at most ``LIMIT`` characters."""
    stream = sys.stderr if error else sys.stdout
    tqdm = sys.modules.get("tqdm")  # where it draws a bar, the line goes above it
    with tqdm.tqdm.external_write_mode(stream) if tqdm else nullcontext():
        print(printable(text, LIMIT if error else None), file=stream)


def complain(text: object) -> None:
    """An error or a warning as one line on stderr; the lines of a longer message are joined."""
    say(one_line(text), error=True)


def say_json(value: Any) -> None:
    """Print exact, valid JSON, all in ASCII: names as they are, escaped."""
    print(json.dumps(value, indent=1, allow_nan=False).replace("\x7f", "\\u007f"))  # the one control character that it leaves


def one_line(text: object) -> str:
    """The lines of a longer message joined."""
    return re.sub(r"\s*\n\s*", " ", str(text).strip())


@contextmanager
def guarded() -> Iterator[None]:
    """Within, warnings and log records are lines for a terminal, and a stdout that has not all characters gets escapes."""
    formatwarning, record_factory = warnings.formatwarning, logging.getLogRecordFactory()

    def as_line(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> str:
        return printable(f"tnt-fast: {category.__name__}: {one_line(message)}", LIMIT) + "\n"

    def as_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = record_factory(*args, **kwargs)
        record.msg, record.args = printable(one_line(record.getMessage()), LIMIT), None
        return record

    stdout = sys.stdout if isinstance(sys.stdout, io.TextIOWrapper) else None
    errors = stdout.errors if stdout else None
    warnings.formatwarning = as_line
    logging.setLogRecordFactory(as_record)
    if stdout:
        stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        warnings.formatwarning = formatwarning
        logging.setLogRecordFactory(record_factory)
        if stdout:
            stdout.reconfigure(errors=errors)
