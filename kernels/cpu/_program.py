"""Native calls recorded once and run again as one: a step of a stream without Python between its layers.

As a CUDA graph does, a program repeats what was called, at the addresses of that time: it keeps every tensor that a
call points at (each op says `native().keep(...)`, and a pointer into anything else is refused). Only the addresses of
the stream's state are put in anew at each run, so that one program serves all streams of a shape. It holds one run at a
time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...runtime import layout
from ._native import ENTRIES, MOST_ARGUMENTS, native, recording

WORD = 8


class NotRecordable(Exception):
    """A recorded call points at memory that nothing keeps."""


class Program:
    """The native calls of `step(x)`, which reads and changes `state`.

    What PyTorch itself computes in between is not in the program: the caller compares a first run with the model's own.
    Raises NotRecordable.
    """

    def __init__(self, step: Callable[[Tensor], list[Tensor]], x: Tensor, state: list[Tensor]):
        variant = native()
        calls: list[tuple[str, tuple[Any, ...]]] = []
        kept: list[Any] = []
        self.input = layout.empty_channels_last(x, x.shape[1], x.shape[2]).copy_(x)
        with recording(variant, calls, kept):
            self.results = step(self.input)
        self.kept, self.count, self.run_calls = kept, len(calls), variant.run
        self.image = torch.tensor(self._image(calls), dtype=torch.int64)
        inner = torch.tensor([word for word, relative in self.pointers if relative], dtype=torch.int64)
        self.image[inner] += self.image.data_ptr()
        self._find_state([word for word, relative in self.pointers if not relative], state)

    def run(self, x: Tensor, state: list[Tensor]) -> list[Tensor]:
        """The step's results for x, with these tensors for its state; they are of the shapes that were recorded."""
        self.input.copy_(x)
        addresses = torch.tensor([t.data_ptr() for t in state], dtype=torch.int64)
        self.image[self.words] = addresses[self.owners] + self.offsets
        self.run_calls(self.image.data_ptr(), self.count)
        return [result.clone() for result in self.results]

    def _image(self, calls: list[tuple[str, tuple[Any, ...]]]) -> list[int]:
        """Calls of fixed size, then their structures; pointers to these are still relative to the beginning."""
        entries = list(ENTRIES)
        size = 1 + MOST_ARGUMENTS
        image = [0] * (size * len(calls))
        self.pointers: list[tuple[int, bool]] = []  # word, and whether it points into the image
        for i, (entry, arguments) in enumerate(calls):
            image[i * size] = entries.index(entry)
            for j, (argument, kind) in enumerate(zip(arguments, ENTRIES[entry], strict=True), i * size + 1):
                if isinstance(argument, ctypes.Structure):
                    image[j] = len(image) * WORD
                    self.pointers.append((j, True))
                    self.pointers += [(len(image) + word, False) for word in _pointer_words(type(argument))]
                    image += _words(argument)
                else:
                    image[j] = int(argument or 0)
                    if kind is ctypes.c_void_p:
                        self.pointers.append((j, False))
        return image

    def _find_state(self, words: list[int], state: list[Tensor]) -> None:
        """Which pointers lie in which tensor of the state, and how far in; all others must be of what is kept."""
        kept, found = list(_tensors(self.kept)), []
        for word in words:
            address = int(self.image[word])
            owners = [i for i, tensor in enumerate(state) if _holds(tensor, address)]
            found += [(word, i, address - state[i].data_ptr()) for i in owners]
            if address and not owners and not any(_holds(tensor, address) for tensor in kept):
                raise NotRecordable
        self.words, self.owners, self.offsets = torch.tensor(found, dtype=torch.int64).view(-1, 3).t().contiguous()


def _holds(tensor: Tensor, address: int) -> bool:
    storage = tensor.untyped_storage()
    return storage.data_ptr() <= address < storage.data_ptr() + max(1, storage.nbytes())


def _tensors(kept: Any) -> Iterator[Tensor]:
    """All tensors in lists and tuples."""
    if isinstance(kept, Tensor):
        yield kept
    elif isinstance(kept, (list, tuple)):
        for part in kept:
            yield from _tensors(part)


def _words(structure: ctypes.Structure) -> list[int]:
    size = ctypes.sizeof(structure)
    buffer = (ctypes.c_int64 * -(-size // WORD))()
    ctypes.memmove(buffer, ctypes.addressof(structure), size)
    return list(buffer)


def _pointer_words(structure: Any) -> list[int]:
    """Where a structure has pointers, in words."""
    found = []
    for name, kind in structure._fields_:
        word = getattr(structure, name).offset // WORD
        if kind is ctypes.c_void_p:
            found.append(word)
        elif issubclass(kind, ctypes.Structure):
            found += [word + inner for inner in _pointer_words(kind)]
    return found
