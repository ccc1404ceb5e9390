"""The command line: `fastmimi encode | decode | roundtrip | info | explain | tokenize | detokenize | corpus | export |
train | evaluate | serve`.

`commands` and `corpus` define the commands and their options, `work`, `exporting`, `training`, `serving` and
`corpus_results` what they do, `report` what they print, and `errors` how errors are shown.
"""

from .commands import app, main

__all__ = ["app", "main"]
