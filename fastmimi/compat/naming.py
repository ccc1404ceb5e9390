"""The names that the installed transformers gives to arguments and to the fields of outputs.

They change: key-value caches are `cache` since 5.24 and were `past_key_values` before. Positions do not, so that names
are read off the peer's own classes by position.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from transformers.models.mimi import modeling_mimi as peer

Method = Callable[..., Any]

# Of the transformer's output and arguments, of `encode`'s output and of `decode`'s
CACHE, ENCODER_CACHE, DECODER_CACHE = (
    fields(cls)[1].name for cls in (peer.BaseModelOutputWithPast, peer.MimiEncoderOutput, peer.MimiDecoderOutput)
)


def signature_of(theirs: Method) -> Callable[[Method], Method]:
    """Give a method the signature of the peer's `theirs`: the same arguments in the same order, under its names.

    The decorated method declares them under names of its own, with `return_dict` last, since newer versions take that
    by keyword only. `more` receives the peer's `**kwargs`; where it has none, other keywords are a TypeError.
    """
    signature = inspect.signature(theirs)
    positional = [name for name, p in signature.parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    takes_more = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())

    def decorate(method: Method) -> Method:
        own = [name for name, p in inspect.signature(method).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
        names = dict(zip(own, [*positional[: len(own) - 1], "return_dict"], strict=True))

        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            # Not `Signature.bind`, which torch.compile cannot trace before torch 2.11
            known = {mine: kwargs.pop(name) for mine, name in names.items() if name in kwargs}
            if kwargs and not takes_more:
                raise TypeError(f"{method.__name__}() got an unexpected keyword argument {next(iter(kwargs))!r}")
            return method(self, *args, **known, more=kwargs)

        call.__signature__ = signature  # type: ignore[attr-defined]
        if "cache" in positional and hasattr(peer, "deprecate_kwarg"):  # the peer takes the old name too, and warns
            return peer.deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")(call)
        return call

    return decorate
