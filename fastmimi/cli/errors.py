"""How commands fail: what a user can cause is a sentence and exit code 2; our bugs keep their traceback."""

from __future__ import annotations

import dis
from typing import Any

import typer
from typer.core import TyperGroup

USAGE_ERROR: Any = typer.BadParameter.__base__  # click's, or that of the click which typer has inside since 0.20


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
        except (OSError, ValueError, RuntimeError) as error:
            if not (isinstance(error, OSError) or raised_by_us(error)):
                raise
            typer.echo(f"error: {sentence(error)}", err=True)
            raise typer.Exit(2) from None


def raised_by_us(error: BaseException) -> bool:
    """Whether a `raise` statement of this package made the error.

    Our checks raise ValueError (dispatch: RuntimeError) with a sentence. The same types come out of torch,
    numpy and the interpreter where our code is wrong; those are no fault of the user's and must not look it.
    """
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or not trace.tb_frame.f_globals.get("__name__", "").startswith("fastmimi."):
        return False
    return dis.opname[trace.tb_frame.f_code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"


def sentence(error: BaseException) -> str:
    """The error's message on one line; of the operating system's, the file and what is wrong with it."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())
