"""The command line: `fastmimi encode | decode | roundtrip | info | explain | train | evaluate`.

commands: what they are called and take; work, learning: what they do; report: what they print; errors: how they fail.
"""

from .commands import app, main

__all__ = ["app", "main"]
