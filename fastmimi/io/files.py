"""Atomic file writes, and checks of input and output paths that run before any work is done."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import InputError, shown


def path_of(value: object, name: str) -> Path:
    """`value` as a Path. Raises InputError, calling the argument `name`, if it is not a path."""
    if not isinstance(value, str | Path) or "\0" in str(value):
        raise InputError(f"{name} must be a path, got {shown(value)}")
    return Path(value)


@contextmanager
def replacing(target: str | Path, *, durable: bool = False) -> Iterator[Path]:
    """Write a file atomically: yields a temporary path in the target's directory for the caller to write to.

    The temporary file is renamed to `target` when the block ends, and removed if the block raises. Until then an
    existing target is untouched. If `target` is a symbolic link, the file that it points to is replaced, not the link.
    With `durable` the contents are on the disk before the rename, and the rename is when the block ends: after a crash
    of the machine there is the whole file or none.
    """
    target = Path(os.path.realpath(target))
    temporary = target.with_name(f".{secrets.token_hex(6)}.part")
    try:
        yield temporary
        if durable:
            _sync(temporary, os.O_RDWR)
        os.replace(temporary, target)
        if durable and os.name == "posix":  # elsewhere a folder cannot be opened
            _sync(target.parent, os.O_RDONLY)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(target: str | Path) -> Iterator[Path]:
    """Write a folder atomically: yields a temporary folder beside `target` for the caller to fill.

    It is renamed to `target` when the block ends, and removed if the block raises. Raises InputError, before anything
    is written, if `target` is there and is not an empty folder, or if the folder that would hold it is not there.
    """
    target = check_new_folder(target)
    temporary = target.with_name(f".{secrets.token_hex(6)}.part")
    temporary.mkdir()
    try:
        yield temporary
        if target.is_dir():
            target.rmdir()  # empty; Windows would not replace it
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_new_folder(target: str | Path) -> Path:
    """The real path of `target`, if `new_folder` can write it. Raises InputError otherwise, as that does."""
    target = Path(os.path.realpath(path_of(target, "a folder to write")))
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"cannot write {target}: it exists, and is not an empty folder")
    if not target.parent.is_dir():
        raise InputError(f"cannot write {target}: there is no directory {target.parent}")
    return target


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_input(path: Path) -> Path:
    """`path`, if it is an existing, readable file that is not empty. Raises InputError otherwise."""
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
    """`path`, if a file can be written there and it is none of `inputs`. Raises InputError otherwise.

    `inputs` are the other files that the same operation reads or writes.
    """
    path = path_of(path, "a file to write")
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise InputError(f"cannot write {path}: there is no directory {path.parent}")
    if path.exists() and not path.is_file():  # a directory, or a device, which must not be replaced by a file
        raise InputError(f"cannot write {path}: it is {'a directory' if path.is_dir() else 'not a regular file'}")
    if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise InputError(f"cannot write {path}: permission denied")
    for other in inputs:
        if os.path.realpath(path) == os.path.realpath(other) or (
            path.exists() and other.exists() and path.samefile(other)
        ):
            raise InputError(f"cannot write {path}: {other} is the same file, which is also read or written")
    return path
