"""How commands fail: what a user can cause is a sentence and exit code 2; our bugs keep their traceback."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from ..errors import InputError

USAGE_ERROR: Any = typer.BadParameter.__base__  # click's, or that of the copy of click in newer typer


class Sentences(TyperGroup):
    """A group of commands that says in a sentence what the user can act on."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):  # the last: `| head` has seen enough
            raise
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None
        except USAGE_ERROR as error:
            command = error.ctx.command_path if error.ctx is not None else "fastmimi"
            typer.echo(f"error: {error.format_message().rstrip('.')}; see {command} --help", err=True)
            raise typer.Exit(2) from None
        except (InputError, OSError) as error:
            typer.echo(f"error: {sentence(error)}", err=True)
            raise typer.Exit(2) from None


def sentence(error: BaseException) -> str:
    """The error's message on one line; of the operating system's, the file and what is wrong with it."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())
