"""The command line: `fastmimi encode | decode | roundtrip | info | explain | train | evaluate | serve`.

`commands` defines the commands and their options, `work`, `training` and `serving` what they do, `report` what they
print, and `errors` how errors are shown.
"""

from .commands import app, main

__all__ = ["app", "main"]
