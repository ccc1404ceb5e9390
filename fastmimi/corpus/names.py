"""File names for ids, in folders and in tar files: any id gives a name of its own, and no name leaves its folder."""

from __future__ import annotations

import hashlib
import re
import tarfile
from io import BytesIO

LONGEST = 180  # bytes of a part of a name: file systems take 255, and a suffix and a temporary name follow
UNSAFE = re.compile(r"[^\w-]")  # among them the dot: WebDataset ends a key at the first one


def file_name(id: str) -> str:
    """A relative path without a suffix for the files of `id`, in the id's folders: "a/b c.wav" -> "a/b%20c%2Ewav".

    Other characters than letters, digits, "_" and "-" are percent-encoded as in a URL, so `urllib.parse.unquote` gives
    the id back; only a part that is too long for a file system ends in "~" and a hash instead.
    """
    return "/".join(_part(part) for part in id.split("/"))


def _part(part: str) -> str:
    name = UNSAFE.sub(lambda found: _encoded(found[0]), part) or "%"  # an empty part, as in "/a" or "a//b"
    if len(name.encode("utf-8", "surrogatepass")) <= LONGEST:
        return name
    digest = hashlib.sha256(part.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    kept = name.encode("utf-8", "surrogatepass")[: LONGEST - 40].decode("utf-8", "ignore")
    return f"{kept}~{digest}"


def _encoded(text: str) -> str:
    return "".join(f"%{byte:02X}" for byte in text.encode("utf-8", "surrogatepass"))


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Append a file to a tar; equal contents give equal tars, since the time is always 0."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, BytesIO(data))
