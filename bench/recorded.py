"""Records what the models would launch on a GPU, on tensors without memory: Triton kernels and PyTorch's own.

Models and inputs are on the meta device, so that 64 x 10 s need no arithmetic. Each launch is noted with its stage, the
op that the model called, such as "down 4". A pass runs twice, since the first packs the weights.
"""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastmimi.kernels.triton import _launch
from fastmimi.models.codec import Codec
from fastmimi.models.config import JodioConfig, JodioTransformerConfig, MimiCodecConfig
from fastmimi.models.jodio import JodioModel
from fastmimi.models.mimi import Mimi
from fastmimi.models.runner import Pass
from fastmimi.runtime import arrivals, tiles
from fastmimi.runtime.ops import OPS, Ops
from fastmimi.runtime.state import DirectionState

META = torch.device("meta")
SMS = 132  # of the GPU
COUNTERS = 1 << 16  # of arrivals, which exist before any launch
FREE_BYTES = 75e9  # of the GPU's memory, when it is decided about tiles
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "_unsafe_view"}


class Launch(NamedTuple):
    """One launch of a Triton kernel."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]
    stage: str = ""
    targets: tuple[str, ...] = ()  # the GPUs that it is launched on

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def variant(self) -> tuple[Any, ...]:
        """What makes its code: dtypes and constants.

        Triton also specializes for numbers that are 1 or divisible by 16, which changes little.
        """
        dtypes = [str(a.dtype) for a in self.args if isinstance(a, Tensor)]
        return (self.name, *dtypes, str(sorted(self.options.items())))

    @property
    def values(self) -> dict[str, Any]:
        """The arguments by name."""
        return dict(zip(self.kernel.arg_names, self.args, strict=False)) | self.options


class TorchLaunch(NamedTuple):
    """One launch of PyTorch's: a matrix product or an elementwise kernel."""

    name: str
    stage: str
    bytes: int
    flops: float


@dataclass
class Recording:
    """The launches of one pass, and of each stage the (bytes, FLOPs) that its ops need at least, call by call.

    FLOPs are in units of bf16: fp32 is three TF32 products at half the rate and counts six times.
    """

    launches: list[Launch | TorchLaunch] = field(default_factory=list)
    needs: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))


def size(tensors: Any) -> int:
    """Bytes of the distinct tensors among some arguments."""
    views = {
        (t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.dtype): t.numel() * t.element_size()
        for t in tree_leaves(tensors)
        if isinstance(t, Tensor)
    }
    return sum(views.values())


class _TorchLaunches(TorchDispatchMode):
    """Notes PyTorch's operations that launch a kernel: all but views and allocations."""

    def __init__(self, note: Callable[[str, int, float], None]):
        super().__init__()
        self.note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if outputs and not is_view and name not in FREE and outputs[0].numel():
            flops = 0.0
            if name in ("mm", "addmm", "bmm"):
                flops = 2.0 * outputs[0].numel() * args[1 if name == "addmm" else 0].shape[-1]
                flops *= 6 if outputs[0].dtype == torch.float32 else 1
            self.note(name, size([args, outputs]), flops)
        return result


def stage_of(op: str, x: Tensor, *tensors: Tensor, **options: Any) -> str:
    """The name of an op's place in the model."""
    stride = options.get("stride", 1)
    if op == "causal_conv1d":
        return f"down {stride}" if stride > 1 else f"conv {x.shape[1]} to {len(tensors[0])}"
    if op == "causal_conv_transpose1d":
        return f"up {stride}"
    if op == "resblock":
        return f"residual unit {x.shape[1]}"
    if op == "audio_resblock":
        unit, conv = f"residual unit {tensors[0].shape[1]}", f"conv {x.shape[1]} to {len(tensors[4])}"
        return f"{unit}, {conv}" if options["after"] else f"{conv}, {unit}"
    return {"transformer_layer": "transformer", "rvq_encode": "RVQ search", "rvq_decode": "RVQ sum"}.get(op, op)


def triton_ops() -> dict[str, Callable[..., Any]]:
    """The launchers of the Triton backend by op."""
    return {op: getattr(importlib.import_module(f"fastmimi.kernels.triton.{op}"), op) for op in OPS}


@contextmanager
def recording(launched: Callable[[Launch], None] | None = None) -> Iterator[Recording]:
    """Within it the ops are Triton's, and launches are recorded instead of run; `launched` sees each at once."""
    found, stages = Recording(), ["between ops"]

    def record(op: str, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        found.launches.append(Launch(kernel, grid, args, options, stages[-1]))
        if launched is not None:
            launched(found.launches[-1])

    def noted(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            stages.append(stage_of(op, *args, **options))
            for name in ("dropout", "residual_dropout"):  # of training
                options.pop(name, None)
            y = function(*args, **options)
            flops = OPS[op].flops(y, *args, **options) * (6 if args[0].dtype == torch.float32 else 1)
            found.needs[stages.pop()].append((float(needed_bytes(op, y, *args, **options)), flops))
            return y

        return call

    def torch_launch(name: str, bytes_: int, flops: float) -> None:
        found.launches.append(TorchLaunch(name, stages[-1], bytes_, flops))

    ops = Ops(**{op: noted(op, function) for op, function in triton_ops().items()})
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(_launch, "launch", record))
        stack.enter_context(mock.patch.object(Codec, "ops", ops))
        stack.enter_context(arrivals.owned(torch.empty(COUNTERS, dtype=torch.int32, device=META)))  # as on a GPU
        stack.enter_context(mock.patch.object(_launch, "programs", return_value=SMS))
        stack.enter_context(mock.patch.object(_launch, "may_wait", lambda x: not _launch.is_amd(x)))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_TorchLaunches(torch_launch))
        yield found


def needed_bytes(op: str, y: Tensor, *args: Any, **options: Any) -> int:
    """Bytes that an op reads or writes at least: its tensors once; of codebooks only the entries that are chosen."""
    if op == "rvq_decode":
        codes, books = args[:2]
        entries = min(books.numel(), codes.numel() * books.shape[2])
        return size([codes, y]) + entries * books.element_size()
    return size([y, args, options])


class Case(NamedTuple):
    """A pass whose time is predicted: one direction, a batch, and the way it runs; a goal in ms if there is one."""

    direction: str
    batch: int
    way: str  # "whole", "tiles" or "stream" (one frame)
    goal: float | None = None

    @property
    def name(self) -> str:
        if self.way == "stream":
            return f"{self.direction} a frame, {self.batch} stream{'s' if self.batch > 1 else ''}"
        return f"{self.direction} {self.batch} x 10 s, {'whole' if self.way == 'whole' else 'in tiles'}"

    @property
    def seconds(self) -> float:
        """Of audio, of all rows together."""
        return self.batch * (0.08 if self.way == "stream" else 10.0)


CASES = [Case(direction, 64, way, 16.0) for direction in ("encode", "decode") for way in ("whole", "tiles")] + [
    Case(direction, batch, "stream", {1: 0.6, 1024: 5.0}.get(batch))
    for batch in (1, 64, 1024)
    for direction in ("encode", "decode")
]
CODEBOOKS = 8


def mimi(dtype: torch.dtype = torch.bfloat16) -> Mimi:
    with META:
        return Mimi(MimiCodecConfig(), num_codebooks=CODEBOOKS).to(dtype).eval()


def of_case(model: Codec, case: Case) -> Recording:
    """The launches of a case in the steady state."""
    frames = 1 if case.way == "stream" else -(-10 * model.sample_rate // model.frame_size)
    samples = frames * model.frame_size if case.way == "stream" else 10 * model.sample_rate
    state = model.new_direction(case.direction, case.batch) if case.way == "stream" else None
    for _ in range(2):
        with recording() as found:
            _run(model, case, frames, samples, state)
    return found


def _run(model: Codec, case: Case, frames: int, samples: int, state: DirectionState | None = None) -> None:
    if case.direction == "encode":
        x = torch.empty(case.batch, model.config.audio_channels, samples, dtype=model.dtype, device=META)
        run: Pass = model.encode_pass(model.num_codebooks)
    else:
        x = torch.empty(case.batch, model.num_codebooks, frames, dtype=torch.int64, device=META)
        run = model.decode_pass()
    if case.way == "stream":
        run.in_tiles(x, state or model.new_direction(case.direction, case.batch))
    elif case.way == "tiles":
        cuda = torch.device("cuda")
        with mock.patch.object(tiles, "free_bytes", return_value=FREE_BYTES):
            tile = model.tiling.frames_per_tile(frames, case.batch, cuda, model.dtype)
        with mock.patch.object(tiles.Tiling, "frames_per_tile", return_value=tile):
            run.whole(x)
    else:
        with mock.patch.object(tiles.Tiling, "frames_per_tile", return_value=frames):
            run.whole(x)


WITH_WARP_GROUPS, AMD = ("sm_90", "sm_100"), ("gfx942",)


def kernels() -> list[Launch]:
    """The launches of different variants of Mimi and of JODIO: offline, in streams, in pools, and of all cases."""
    found: dict[tuple[Any, ...], Launch] = {}
    for targets in (WITH_WARP_GROUPS, ("sm_80",), AMD):
        with (
            mock.patch.object(_launch, "has_warp_groups", return_value=targets is WITH_WARP_GROUPS),
            mock.patch.object(_launch, "is_amd", return_value=targets is AMD),
        ):
            for launch in _kernels():
                before = found.get(launch.variant, launch)
                found[launch.variant] = before._replace(targets=(*before.targets, *targets))
    return list(found.values())


def _kernels() -> list[Launch]:
    found: dict[tuple[Any, ...], Launch] = {}

    def launched(launch: Launch) -> None:
        found.setdefault(launch.variant, launch)

    few_layers = JodioTransformerConfig(num_hidden_layers=1)  # all layers launch the same kernels
    for dtype in (torch.float32, torch.bfloat16):
        with META:
            jodio = JodioModel(JodioConfig(encoder_transformer=few_layers)).to(dtype).eval()
        for model in (mimi(dtype), jodio):
            with recording(launched):
                for direction in ("encode", "decode"):
                    _run(model, Case(direction, 1, "whole"), 50, 96_000)
                    for batch, frames in ((1, 1), (32, 1), (2, 25)):
                        _run(model, Case(direction, batch, "stream"), frames, 1920 * frames)
                    pool = model.new_direction(direction, 64)
                    for batch in (1, 32):
                        state = pool.select(torch.empty(batch, dtype=torch.int64, device=META))
                        _run(model, Case(direction, batch, "stream"), 1, 1920, state)
        with recording(launched):
            _other_shapes(dtype)
    model = mimi()
    for case in CASES:
        for launch in of_case(model, case).launches:
            if isinstance(launch, Launch):
                launched(launch)
    return list(found.values())


def _other_shapes(dtype: torch.dtype) -> None:
    ops = triton_ops()
    for dim in (16, 128):
        q = torch.empty(1, 250, 4, dim, dtype=dtype, device=META).transpose(1, 2)
        ops["window_attention"](q, q, q, torch.empty(dim // 2, device=META), window=250)
    for dim in (256, 1028):
        ops["rvq_encode"](torch.empty(1000, dim, dtype=dtype, device=META), torch.empty(2, 2048, dim, device=META))
    vector, square, tall = (
        torch.empty(*shape, dtype=dtype, device=META) for shape in ((512,), (512, 512), (2048, 512))
    )
    x = torch.empty(1, 300, 512, dtype=dtype, device=META)
    weights = vector, vector, *[square] * 4, vector, vector, vector, tall, tall.t().contiguous(), vector
    ops["transformer_layer"](x, *weights, torch.empty(32, device=META), window=250, eps=1e-5)
