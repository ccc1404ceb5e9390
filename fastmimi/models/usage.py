"""How the entries of the codebooks are used by codes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class Usage:
    """How one codebook is used over all files."""

    level: int  # counted from 1
    used: float  # fraction of the entries that occur
    perplexity: float  # exp of the entropy of the codes: the effective number of entries


def usage_from_histograms(histograms: np.ndarray) -> list[Usage]:
    """The usage of each codebook from how often each of its entries occurs [K, S]."""
    found = []
    for level, counts in enumerate(histograms, 1):
        shares = counts[counts > 0] / max(counts.sum(), 1)
        found.append(Usage(level, float((counts > 0).mean()), float(np.exp(-(shares * np.log(shares)).sum()))))
    return found
