"""The error raised for invalid user input, and helpers that format values for its message.

This module imports nothing else of the package.
"""

from __future__ import annotations

import reprlib


class InputError(ValueError):
    """Invalid input from the caller; the message is one sentence that names the offending value.

    The command line prints that sentence and exits with code 2. Any other exception is a bug in fastmimi and keeps
    its traceback.
    """


def named(name: object) -> str:
    """Format a name that was read from a file: unchanged if printable and short, else as its shortened `repr`."""
    return name if isinstance(name, str) and name.isprintable() and len(name) <= 100 else shown(name)


def one_line(error: BaseException) -> str:
    """The message of another library's error on one line, shortened because it may quote the contents of a file."""
    return " ".join(str(error).split())[:300]


def shown(value: object) -> str:
    """`repr` of any value, on one line and shortened."""
    if isinstance(value, int) and abs(value) >= 1 << 128:  # Python refuses to print integers of thousands of digits
        return f"an integer of {value.bit_length()} bits"
    return " ".join(_repr.repr(value).split())


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 80
_repr.maxlist = _repr.maxdict = _repr.maxtuple = 8
