"""Files that are written whole or not at all, and the checks of paths before any work is done. A leaf."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import InputError, shown


def path_of(value: Any, name: str) -> Path:
    """The path that an argument of this name is; InputError where it is none."""
    if not isinstance(value, str | Path) or "\0" in str(value):
        raise InputError(f"{name} must be a path, got {shown(value)}")
    return Path(value)


@contextmanager
def replacing(target: str | Path) -> Iterator[Path]:
    """A temporary name beside `target` to write to; renamed to it at the end, removed on any error.

    A symbolic link is followed, so that it stays one. Until the end an existing target is untouched.
    """
    target = Path(os.path.realpath(target))
    part = target.with_name(f".{secrets.token_hex(6)}.part")
    try:
        yield part
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def check_input(path: Path) -> Path:
    """A file that is there, holds something and can be read; InputError with one sentence otherwise."""
    path = path_of(path, "a file to read")
    if not path.exists():
        raise InputError(f"{path} does not exist")
    if not path.is_file():
        raise InputError(f"{path} is not a file")
    if not os.access(path, os.R_OK):
        raise InputError(f"{path} cannot be read: permission denied")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty")
    return path


def check_output(path: Path, inputs: Iterable[Path] = ()) -> Path:
    """A target that can be written and is none of the inputs; InputError with one sentence otherwise."""
    path = path_of(path, "a file to write")
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise InputError(f"cannot write {path}: there is no directory {path.parent}")
    if path.exists() and not path.is_file():  # a directory; a device, which must not be replaced by a file
        raise InputError(f"cannot write {path}: it is {'a directory' if path.is_dir() else 'not a plain file'}")
    if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise InputError(f"cannot write {path}: permission denied")
    for other in inputs:
        if os.path.realpath(path) == os.path.realpath(other) or (
            path.exists() and other.exists() and path.samefile(other)
        ):
            raise InputError(f"cannot write {path}: {other} is the same file, which is needed beside it")
    return path
