"""Errors that a user can mend: every command shows them as a message of one line, without a traceback."""

from __future__ import annotations

from reprlib import Repr

MOST = 600
"""Characters of a line."""
_SHORT = Repr()
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = _SHORT.maxset = 8
_SHORT.maxlevel = 2
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


class CdmError(Exception):
    """Something the user can mend: the message says what is wrong and what to do, one line a problem."""


def line(text: object) -> str:
    """`text` on one line of printable characters; of a long one its beginning and its end."""
    words = " ".join(str(text).split())
    if len(words) > MOST:
        words = f"{words[: MOST // 2]} ... {words[-MOST // 2 :]}"
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in words)


def shown(value: object) -> str:
    """A value in a message, shortened where it is long."""
    try:
        return _SHORT.repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python converts
        return f"a {type(value).__name__} that is too long to show"
