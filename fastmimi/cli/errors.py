"""Error handling: a user's mistake is one sentence and exit code 2, a bug of ours keeps its traceback."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from ..errors import InputError

USAGE_ERROR: Any = typer.BadParameter.__base__  # of click, or of the copy of click inside newer versions of typer


class ErrorHandlingGroup(TyperGroup):
    """A command group that prints errors that a user can act on as one sentence."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):  # the last: `| head` closed the pipe
            raise
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None
        except USAGE_ERROR as error:
            command = error.ctx.command_path if error.ctx is not None else "fastmimi"
            typer.echo(f"error: {error.format_message().rstrip('.')}; see {command} --help", err=True)
            raise typer.Exit(2) from None
        except (InputError, OSError) as error:
            typer.echo(f"error: {one_line(error)}", err=True)
            raise typer.Exit(2) from None


def one_line(error: BaseException) -> str:
    """The error's message on one line; for an error of the operating system, the file and the reason."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())
