"""StreamState: everything that a batch of streams carries, explicit and owned by the caller.

Buffers are allocated once and keep their addresses; implementations change them in place. Each direction (audio to
codes, codes to audio) is a `DirectionState`: the named buffers of its layers and, per stream, how many positions its
transformer has seen. Audio that does not fill a frame yet waits in `pending`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, named
from . import masks
from .arrivals import new as new_counters

CPU = torch.device("cpu")
LISTED = 20  # mismatches that an error lists before it only counts them
MOST_POSITIONS = 1 << 53  # of a stream: more than a million years


class StreamingModule:
    """Base class of modules with a streaming state, which is kept under the module's `name`, its path in the model."""

    name = ""

    def state_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        """The shapes of its buffers by name, for so many streams; each begins with the batch."""
        raise NotImplementedError

    @staticmethod
    def set_names(model: nn.Module) -> None:
        """Give each module of the model that has a state its name."""
        for name, module in model.named_modules():
            if isinstance(module, StreamingModule):
                module.name = name


@dataclass(eq=False)  # each is itself: graphs are kept by state
class DirectionState:
    """The state of one direction of a batch of streams.

    `buffers` maps a layer's name to a tensor whose first dimension is the batch; `offset` [B] int64 counts transformer
    positions seen; `active` [B] bool says which rows the current step advances. `arrivals` are counters for kernels.
    Where `rows` [B] int64 are given, these are the tensors of a `pool` of more streams, and those are the batch's rows
    of them (`select`).
    """

    buffers: dict[str, Tensor]
    offset: Tensor
    active: Tensor
    rows: Tensor | None = None
    pool: DirectionState | None = None
    arrivals: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.pool is None:
            self.arrivals = new_counters(self.offset.shape[0], self.offset.device)  # len() would fix an open batch
        else:
            self.arrivals = self.pool.arrivals

    @classmethod
    def of(
        cls, parts: Iterable[nn.Module | None], batch: int, device: torch.device, dtype: torch.dtype
    ) -> DirectionState:
        """The state of `batch` fresh streams, for all layers in `parts` that carry any."""
        shapes: dict[str, tuple[int, ...]] = {}
        for part in parts:
            for module in part.modules() if part is not None else ():
                if isinstance(module, StreamingModule):
                    shapes |= module.state_shapes(batch)
        return cls(
            {name: torch.zeros(shape, device=device, dtype=dtype) for name, shape in shapes.items()},
            offset=torch.zeros(batch, dtype=torch.int64, device=device),
            active=torch.ones(batch, dtype=torch.bool, device=device),
        )

    @property
    def batch_size(self) -> int:
        return len(self.offset if self.rows is None else self.rows)

    def select(self, rows: Tensor) -> DirectionState:
        """The state of the streams `rows` [B] int64, in this state's memory: a step costs what they cost alone.

        A row may be named more than once if it is not active.
        """
        return DirectionState(self.buffers, self.offset, self.active, rows, self)

    def clone(self) -> DirectionState:
        """An independent copy; of selected rows, without the others."""
        mine = slice(None) if self.rows is None else self.rows
        buffers = {name: buffer[mine].clone() for name, buffer in self.buffers.items()}
        copy = DirectionState(buffers, self.offset[mine].clone(), self.active[mine].clone())
        return copy if self.rows is None else copy.select(torch.arange(len(copy.offset), device=copy.offset.device))

    def tensors(self) -> list[Tensor]:
        """All tensors of the state, in order; of selected rows, those of the pool."""
        return [*self.buffers.values(), self.offset, self.active]

    def copy_(self, other: DirectionState) -> None:
        """Take over the values of a `clone`."""
        mine = slice(None) if self.rows is None else self.rows
        for tensor, theirs in zip(self.tensors(), other.tensors(), strict=True):
            tensor[mine] = theirs

    @property
    def first(self) -> Tensor:
        """[B] bool, or of all streams of a pool: those that have received nothing yet."""
        return self.offset == 0

    def advance(self, positions: int) -> None:
        """Add `positions` to the offset of the active rows, once all layers have run."""
        if self.rows is None:
            self.offset.add_(self.active, alpha=positions)
        else:
            self.offset.index_add_(0, self.rows, self.active[self.rows].long(), alpha=positions)

    def reset(self, rows: Tensor) -> None:
        """Reset these rows, int64, to the start of a stream."""
        for buffer in (*self.buffers.values(), self.offset):
            buffer.index_fill_(0, rows, 0)


class StreamState:
    """Both directions of `batch_size` streams; made by `Mimi.new_state`.

    exec_mask: [B] bool, set by the caller: encode, decode and flush do not advance rows that are False, and return -1
        (codes) or 0 (audio) for them. Assignment copies the values, so that the address stays the same.
    invalid: [B] bool, rows on a GPU that were given samples or codes that are none (`check`).
    pending: [B, C, frame_size] samples waiting for their frame to fill; pending_length: [B] int64, on the CPU.
    config: of the model that the state belongs to, if known.
    """

    def __init__(self, encode: DirectionState, decode: DirectionState, pending: Tensor, config: Any = None):
        self.config = config
        self.encode = encode
        self.decode = decode
        self.pending = pending
        self.pending_length = torch.zeros(pending.shape[0], dtype=torch.int64)
        self._exec_mask = torch.ones(pending.shape[0], dtype=torch.bool, device=pending.device)
        self.invalid = torch.zeros_like(self._exec_mask)
        self._mask_at_hand = torch.ones(pending.shape[0], dtype=torch.bool)
        self._mask_version = self._count_of_mask_edits()

    @property
    def exec_mask(self) -> Tensor:
        return self._exec_mask

    @exec_mask.setter
    def exec_mask(self, mask: Tensor) -> None:
        self._exec_mask.copy_(masks.of_streams(mask, "exec_mask", self.batch_size))

    def mask_on(self, device: torch.device) -> Tensor:
        """`exec_mask` on a device; for other devices than its own, a copy on the CPU is renewed only after an edit."""
        if self._exec_mask.device == device:
            return self._exec_mask
        edits = self._count_of_mask_edits()
        if edits is None or edits != self._mask_version:
            self._mask_at_hand, self._mask_version = self._exec_mask.cpu(), edits
        return self._mask_at_hand.to(device)

    def _count_of_mask_edits(self) -> int | None:
        """None: nobody counts them, in a tensor that was made in inference mode."""
        return None if self._exec_mask.is_inference() else self._exec_mask._version

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mask_version": None}  # a copy of a tensor, or one from a file, counts anew

    @property
    def batch_size(self) -> int:
        return self.pending.shape[0]

    def reset(self, mask: Tensor | None = None) -> None:
        """Restart the streams of `mask` [B] bool (all of them by default); their `exec_mask` becomes True."""
        if mask is None:
            mask = torch.ones(self.batch_size, dtype=torch.bool)
        mask = masks.of_streams(mask, "mask", self.batch_size).cpu()
        self.pending_length[mask] = 0
        rows = mask.nonzero()[:, 0].to(self.exec_mask.device)
        self.encode.reset(rows)
        self.decode.reset(rows)
        for tensor, value in ((self.pending, 0), (self.exec_mask, True), (self.invalid, False)):
            tensor.index_fill_(0, rows, value)

    def note_invalid(self, rows: Tensor | None) -> None:
        """Mark the rows [B] that were given samples or codes that are none; None: no row."""
        if rows is not None:
            self.invalid.logical_or_(rows.to(self.invalid.device))

    def check(self) -> None:
        """Raise InputError if streams on a GPU were given NaN, infinite samples or unknown codes since their reset.

        Waits for the GPU. On a CPU nothing is left to be found: `encode` and `decode` raise at once.
        """
        if bad := self.invalid.nonzero()[:, 0].tolist():
            raise InputError(f"streams {bad} were given samples that are NaN or infinite, or codes out of range")

    def summary(self) -> str:
        """A text for people: sizes, where each stream stands, and the buffers that hold NaN or infinity."""
        kind = f"{str(self.pending.dtype)[6:]} on {self.pending.device}"
        tensors = self.state_dict()
        total = sum(tensor.nbytes for tensor in tensors.values())
        lines = [f"{self.batch_size} streams, {kind}, {total / 2**20:.1f} MiB in {len(tensors)} tensors"]
        for name, direction in (("encode", self.encode), ("decode", self.decode)):
            size = sum(buffer.nbytes for buffer in direction.buffers.values())
            lines.append(f"{name}: {len(direction.buffers)} buffers, {size / 2**20:.1f} MiB")
        columns = (self.encode.offset, self.decode.offset, self.pending_length, self.exec_mask)
        streams = zip(*(column[:LISTED].tolist() for column in columns), strict=True)
        for row, (encoded, decoded, pending, active) in enumerate(streams):
            line = f"stream {row}: encoded {encoded} positions, decoded {decoded}, {pending} samples pending"
            lines.append(line if active else f"{line}, masked")
        if self.batch_size > LISTED:
            lines.append(f"and {self.batch_size - LISTED} more streams")
        bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
        return "\n".join([*lines, *(f"not finite: {name}" for name in bad)])

    def push(self, audio: Tensor) -> tuple[Tensor, Tensor | None]:
        """Append audio [B, C, N] and return whole frames [B, C, T * frame_size] and frames per row [B] on the CPU.

        The second is None if every row has all T frames. Rows whose `exec_mask` is False take and return nothing (0).
        """
        size, held = self.pending.shape[-1], int(self.pending_length[0])
        in_step = bool((self.pending_length == held).all())
        if in_step and held == 0 and audio.shape[-1] % size == 0:
            return audio, None
        active = self.mask_on(CPU)
        if not (in_step and active.all()):
            return self._push_drifted(audio, active)
        buffer = torch.cat([self.pending[..., :held], audio], dim=-1)
        left = buffer.shape[-1] % size
        self.pending[..., :left] = buffer[..., buffer.shape[-1] - left :]
        self.pending_length.fill_(left)
        return buffer[..., : buffer.shape[-1] - left], None

    def _push_drifted(self, audio: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        """`push` for rows that hold different numbers of samples, or of which some are not `active` and take none."""
        size, device = self.pending.shape[-1], audio.device
        have = torch.where(active, self.pending_length + audio.shape[-1], 0)
        frames = have // size  # 0 where not active
        buffer = torch.cat([self.pending, audio], dim=-1)  # of `pending`, the first `held` samples count
        held = self.pending_length.to(device)[:, None]
        steps = torch.arange(int(frames.max()) * size, device=device)
        whole = _pick(buffer, torch.where(steps < held, steps, steps - held + size))
        steps = torch.arange(size, device=device) + (frames * size).to(device)[:, None]
        rest = _pick(buffer, torch.where(steps < held, steps, steps - held + size))
        self.pending.copy_(torch.where(self.exec_mask[:, None, None], rest, self.pending))
        self.pending_length.copy_(torch.where(active, have - frames * size, self.pending_length))
        return whole, frames

    def pop_partial(self) -> tuple[Tensor, Tensor]:
        """The samples held back, completed with zeros: [B, C, frame_size] and frames per row (0 or 1) on the CPU."""
        active = self.mask_on(CPU)
        frames = (active & (self.pending_length > 0)).long()
        inside = torch.arange(self.pending.shape[-1]) < self.pending_length[:, None]
        audio = torch.where(inside[:, None].to(self.pending.device), self.pending, 0)
        self.pending_length.copy_(torch.where(active, 0, self.pending_length))
        return audio[..., : int(frames.max()) * audio.shape[-1]], frames

    @torch.inference_mode(False)  # as in `new_state`
    def clone(self) -> StreamState:
        """An independent copy."""
        copy = StreamState(self.encode.clone(), self.decode.clone(), self.pending.clone(), self.config)
        copy.pending_length.copy_(self.pending_length)
        copy.exec_mask.copy_(self.exec_mask)
        copy.invalid.copy_(self.invalid)
        return copy

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors by name, as `safetensors.torch.save_file` takes them; references, not copies."""
        tensors = {"pending": self.pending, "pending_length": self.pending_length, "exec_mask": self.exec_mask}
        for prefix, direction in (("encode", self.encode), ("decode", self.decode)):
            tensors[f"{prefix}.offset"] = direction.offset
            tensors |= {f"{prefix}.{name}": buffer for name, buffer in direction.buffers.items()}
        return tensors

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Copy the values of a `state_dict()` of the same model, batch size and dtype; on an error nothing changes."""
        own = self.state_dict()
        if not isinstance(tensors, dict):
            raise InputError(f"a state must be a dictionary of tensors by name, got {type(tensors).__name__}")
        wrong = [f"missing {name}" for name in own.keys() - tensors.keys()]
        wrong += [f"unknown {named(name)}" for name in tensors.keys() - own.keys()]
        for name in own.keys() & tensors.keys():
            mine, theirs = own[name], tensors[name]
            if not isinstance(theirs, Tensor) or theirs.device.type == "meta" or theirs.layout != torch.strided:
                got = (
                    f"a {theirs.layout} one on {theirs.device}" if isinstance(theirs, Tensor) else type(theirs).__name__
                )
                wrong.append(f"{name} must be a tensor with values, got {got}")
            elif mine.shape != theirs.shape or mine.dtype != theirs.dtype:
                wrong.append(
                    f"{name} must be {mine.dtype} {tuple(mine.shape)}, got {theirs.dtype} {tuple(theirs.shape)}"
                )
            elif name in ("pending_length", "encode.offset", "decode.offset"):
                most = self.pending.shape[-1] - 1 if name == "pending_length" else MOST_POSITIONS
                if bool(((theirs < 0) | (theirs > most)).any()):  # kernels take them for addresses
                    wrong.append(f"{name} must lie in [0, {most}], got {theirs.tolist()}")
        if wrong:
            more = f"; and {len(wrong) - LISTED} more" if len(wrong) > LISTED else ""
            raise InputError(f"this state does not fit: {'; '.join(sorted(wrong)[:LISTED])}{more}")
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        self.invalid.fill_(False)  # the streams that it was about are gone


def _pick(buffer: Tensor, index: Tensor) -> Tensor:
    """Samples of buffer [B, C, N] at index [B or 1, M], indices past the end clamped."""
    index = index.clamp(max=buffer.shape[-1] - 1)[:, None].expand(buffer.shape[0], buffer.shape[1], -1)
    return buffer.gather(2, index)
