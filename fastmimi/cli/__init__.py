"""The command line: `fastmimi encode | decode | roundtrip | info | explain`.

commands: what they are called and take; work: what they do; report: what they print; errors: how they fail.
"""

from .commands import app, main

__all__ = ["app", "main"]
