"""Programs: the native calls of one step of a stream, recorded once and replayed as a single call, without Python.

Like a CUDA graph, a program repeats the recorded calls with the recorded addresses. It therefore keeps alive every
tensor that a call points to: each op passes them to `native().keep(...)`, and a call with a pointer to any other memory
cannot be recorded. Only the addresses of the stream's state are replaced before each run, so that one program serves
all streams whose state has the same shapes. A program must not be run by two threads at once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ...runtime import layout
from ._native import Call, native, recording

WORD = 8  # bytes


class NotRecordable(Exception):
    """A recorded call has a pointer to memory that is neither the stream's state nor kept alive."""


class Program:
    """The native calls of `step(x)`, which reads and updates the tensors of `state`.

    Operations of PyTorch between the native calls are not recorded. The caller must compare a first run with the result
    of the model itself before it trusts the program. Raises NotRecordable.
    """

    def __init__(self, step: Callable[[Tensor], list[Tensor]], x: Tensor, state: list[Tensor]):
        variant = native()
        calls: list[Call] = []
        kept: list[object] = []
        self.input = layout.empty_channels_last(x, x.shape[1], x.shape[2]).copy_(x)
        with recording(variant, calls, kept):
            self.results = step(self.input)
        self.kept, self.count, self.run_calls = kept, len(calls), variant.run_program
        image, pointers = _image(calls)
        self.image = torch.tensor(image, dtype=torch.int64)
        self.image[1 : 2 * self.count : 2] += self.image.data_ptr()
        self._find_state(pointers, state)

    def run(self, x: Tensor, state: list[Tensor]) -> list[Tensor]:
        """The results of the step for x, with these tensors as its state; shapes must be those that were recorded."""
        self.input.copy_(x)
        addresses = torch.tensor([t.data_ptr() for t in state], dtype=torch.int64)
        self.image[self.words] = addresses[self.owners] + self.offsets
        self.run_calls(self.image.data_ptr(), self.count)
        return [result.clone() for result in self.results]

    def _find_state(self, words: list[int], state: list[Tensor]) -> None:
        """For each pointer into the state, note its word, the tensor it points into and the offset, in bytes.

        Raises NotRecordable if a pointer is neither null nor into the state or a tensor that is kept alive.
        """
        kept, found = list(_tensors(self.kept)), []
        for word in words:
            address = int(self.image[word])
            owners = [i for i, tensor in enumerate(state) if _holds(tensor, address)]
            found += [(word, i, address - state[i].data_ptr()) for i in owners]
            if address and not owners and not any(_holds(tensor, address) for tensor in kept):
                raise NotRecordable
        self.words, self.owners, self.offsets = torch.tensor(found, dtype=torch.int64).view(-1, 3).t().contiguous()


def _image(calls: list[Call]) -> tuple[list[int], list[int]]:
    """The program's memory as 64-bit words, and the indices of the words that are pointers to other memory.

    It is an array of steps (native/library.cpp) and then the structures that they point to, for now by a byte offset
    from the start of the image, whose address is not known yet.
    """
    image, pointers = [0] * (2 * len(calls)), []
    for i, (entry, call) in enumerate(calls):
        image[2 * i : 2 * i + 2] = ctypes.cast(entry, ctypes.c_void_p).value or 0, len(image) * WORD
        pointers += [len(image) + word for word in _pointer_words(type(call))]
        image += memoryview(bytes(call)).cast("q")
    return image, pointers


def _holds(tensor: Tensor, address: int) -> bool:
    """Whether an address lies in a tensor's storage."""
    storage = tensor.untyped_storage()
    return storage.data_ptr() <= address < storage.data_ptr() + max(1, storage.nbytes())


def _tensors(kept: object) -> Iterator[Tensor]:
    """All tensors in nested lists and tuples."""
    if isinstance(kept, Tensor):
        yield kept
    elif isinstance(kept, (list, tuple)):
        for part in kept:
            yield from _tensors(part)


def _pointer_words(structure: type[ctypes.Structure]) -> list[int]:
    """The word indices of a structure's pointers."""
    found = []
    for name, kind, *_ in structure._fields_:
        word = getattr(structure, name).offset // WORD
        if kind is ctypes.c_void_p:
            found.append(word)
        elif issubclass(kind, ctypes.Structure):
            found += [word + inner for inner in _pointer_words(kind)]
    return found
