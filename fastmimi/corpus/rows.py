"""A row of a manifest: one utterance, which is a file or a section of one.

This module imports neither PyTorch nor pyarrow: reader processes start with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Scalar = str | int | float | bool | None


@dataclass(frozen=True)
class Row:
    """One utterance.

    id: unique in its manifest.
    uri: a local path, or any URI that fsspec opens: "s3://bucket/a.flac", "tar://a.flac::/data/shard-0.tar".
    start, end: seconds in the file; None: its begin, its end.
    channel: which channel to take, from 0; None: the mean of all.
    carried: other columns, which the table of codes gets too.
    """

    id: str
    uri: str
    start: float | None = None
    end: float | None = None
    channel: int | None = None
    carried: Mapping[str, Scalar] = field(default_factory=dict)
