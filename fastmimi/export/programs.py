"""`torch.export` programs of a codec: whole audio and steps, with every length left open."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as shapes

from ..models.codec import Codec
from .frozen import FrozenCodec, rounded
from .modules import Direction, Port, Step, Whole

BATCH, FRAMES = 2, 67  # of the example that is traced: a length that no layer treats in a special way
AUTO = Dim.AUTO


@dataclass(frozen=True)
class Program:
    """A traced direction of a codec.

    name: "encoder", "decoder", "encoder_step" or "decoder_step". input, output: audio and codes. state: of steps, the
    inputs that follow; the outputs that follow are the new state in the same order.
    """

    name: str
    program: ExportedProgram
    input: Port
    output: Port
    state: tuple[Port, ...] = ()


def programs(model: Codec, weights: str, only: str = "") -> Iterator[Program]:
    """The programs of the directions that the model has, whole audio before steps, whose names end with `only`."""
    for direction, part in (("encode", model.encoder), ("decode", model.decoder)):
        if part is not None:
            frozen = FrozenCodec(rounded(model, weights), direction, weights)
            modules: dict[str, Direction] = {"": Whole(frozen), "_step": Step(frozen)}
            for suffix, module in modules.items():
                if suffix.endswith(only):
                    yield _traced(module, f"{direction}r{suffix}")


def _traced(module: Direction, name: str) -> Program:
    source, result = module.ports()
    codec = module.frozen.codec
    if source.name == "audio":
        example = torch.zeros(BATCH, codec.config.audio_channels, FRAMES * codec.frame_size)
    else:
        example = torch.zeros(BATCH, codec.num_codebooks, FRAMES, dtype=torch.int64)
    open_lengths = {dim: AUTO for dim, size in enumerate(source.shape) if isinstance(size, str)}
    ports: tuple[Port, ...] = ()
    with _for_any_length():
        if isinstance(module, Step):
            ports, state = tuple(module.state_ports()), module.new_state(BATCH)
            lengths = (open_lengths, {port.name: {0: AUTO} for port in ports})
            program = torch.export.export(module, (example, state), dynamic_shapes=lengths, strict=False)
        else:
            program = torch.export.export(module, (example,), dynamic_shapes=(open_lengths,), strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names files of the machine that exports
    # Tracing notes where PyTorch chose strides for a length other than 1, which the result does not depend on
    getattr(program, "_guards_code", []).clear()
    program.example_inputs = None  # a .pt2 would keep them
    return Program(name, program, source, result, ports)


@contextmanager
def _for_any_length() -> Iterator[None]:
    """Trace open lengths without the assumption that they are 2 or more."""
    with torch.no_grad(), warnings.catch_warnings(), shapes.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        warnings.simplefilter("ignore", FutureWarning)
        yield
