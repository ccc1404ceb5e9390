"""The one error that a user's input raises, and how values stand in its sentence. A leaf."""

from __future__ import annotations

import reprlib
from typing import Any


class InputError(ValueError):
    """What was handed in cannot be served; the message is one sentence that names the value and says what to do.

    The command line shows that sentence and ends with exit code 2. Any other exception is a bug of ours, and keeps
    its traceback.
    """


def named(name: Any) -> str:
    """A name out of a file, for a sentence: as it is, or where it is no plain word, quoted and cut short."""
    return name if isinstance(name, str) and name.isprintable() and len(name) <= 100 else shown(name)


def one_line(error: BaseException) -> str:
    """What another library says of a file, which may quote the file."""
    return " ".join(str(error).split())[:300]


def shown(value: Any) -> str:
    """`repr` of any value, cut short."""
    if isinstance(value, int) and abs(value) >= 1 << 128:  # Python refuses to write integers of thousands of digits
        return f"an integer of {value.bit_length()} bits"
    return " ".join(_repr.repr(value).split())


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 80
_repr.maxlist = _repr.maxdict = _repr.maxtuple = 8
