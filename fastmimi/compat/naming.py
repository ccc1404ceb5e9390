"""Adaptation to the installed version of transformers: names of arguments and output fields, and calling conventions.

Names change between versions: key-value caches have been called `cache` since 5.24, and `past_key_values` before. The
order of arguments and fields does not change, so their names are read from transformers' own classes by position.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.models.mimi import modeling_mimi as peer

Method = Callable[..., Any]

HALVES = hasattr(peer, "MimiEncoderModel")  # transformers >= 5.20: encoder and decoder are models of their own

# Names of the fields that hold key-value caches, in the outputs of a transformer, of `encode` and of `decode`. The
# argument of a transformer has the same name as its field.
CACHE, ENCODER_CACHE, DECODER_CACHE = (
    fields(cls)[1].name for cls in (peer.BaseModelOutputWithPast, peer.MimiEncoderOutput, peer.MimiDecoderOutput)
)


def signature_of(theirs: Method) -> Callable[[Method], Method]:
    """Decorator that gives a method the signature of the peer's method `theirs`.

    The decorated method declares the same arguments in the same order, under names of its own; callers use the peer's
    names. `return_dict` must be declared last, since newer versions take it by keyword only. What the peer would take
    as `**kwargs` is passed as a dict in the keyword-only argument `extra`; if the peer takes no `**kwargs`, unknown
    keywords raise a TypeError.
    """
    signature = inspect.signature(theirs)
    positional = [name for name, p in signature.parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    takes_kwargs = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())

    def decorate(method: Method) -> Method:
        own = [name for name, p in inspect.signature(method).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
        names = dict(zip(own, [*positional[: len(own) - 1], "return_dict"], strict=True))

        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            # Not `Signature.bind`, which torch.compile cannot trace before torch 2.11
            known = {own_name: kwargs.pop(name) for own_name, name in names.items() if name in kwargs}
            if kwargs and not takes_kwargs:
                raise TypeError(f"{method.__name__}() got an unexpected keyword argument {next(iter(kwargs))!r}")
            return method(self, *args, **known, extra=kwargs)

        call.__signature__ = signature  # type: ignore[attr-defined]
        if "cache" in positional and hasattr(peer, "deprecate_kwarg"):  # like the peer, accept the old name and warn
            return peer.deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")(call)
        return call

    return decorate


def run_transformer(transformer: Any, x: Tensor, past: list[Any], **kwargs: Any) -> Tensor:
    """Run one of the peer's transformers on x [B, hidden, T].

    `past` is a list of one item: the key-value cache, or None, before the call; it is replaced by the one after it.
    """
    x = x.transpose(1, 2)
    if not hasattr(peer, "create_sliding_window_causal_mask"):  # transformers 4 has no window without a mask
        seen = 0 if past[0] is None else past[0].get_seq_length()
        positions = torch.arange(seen, seen + x.shape[1], device=x.device)
        kwargs["attention_mask"] = create_sliding_window_causal_mask(transformer.config, x, None, positions, past[0])
    output = transformer(x, return_dict=True, **{CACHE: past[0]}, **kwargs)
    past[0] = getattr(output, CACHE)
    return output.last_hidden_state.transpose(1, 2)


def as_returned(output: Any, return_dict: bool | None, config: Any) -> Any:
    """The output, or the tuple that the installed transformers returns in its place without `return_dict`."""
    if return_dict if return_dict is not None else config.return_dict:
        return output
    return output.to_tuple() if HALVES else tuple(getattr(output, name) for name in output.__dataclass_fields__)
