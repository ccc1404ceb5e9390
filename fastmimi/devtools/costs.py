"""What a codec costs by stage: parameters, and work and bytes for a second of audio; and what this machine can do.

A model on the meta device runs with ops that count in place of computing. Bytes are each op's input and output once;
weights are read once a pass, and stand apart. A product of a multiplication and an addition is two FLOP.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.codec import Codec
from ..models.config import AnyConfig
from ..models.registry import build
from ..runtime.ops import OPS, ForwardContext, Ops

SECONDS = 40  # of audio that the counting is done on: attention's window is full in half of it


@dataclass
class Stage:
    """A part of a model, for one second of audio; `rate` is of its outputs, in Hz."""

    name: str
    parameters: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    rate: float = 0.0

    def seconds(self, ceilings: dict[str, float]) -> float:
        """The least that one second of audio takes here in fp32, its weights in a cache."""
        return max(self.flops / ceilings["fp32 GFLOP/s"], self.bytes / ceilings["copy GB/s"]) / 1e9


@torch.no_grad()
def stages(config: AnyConfig) -> list[Stage]:
    """Both directions of a codec with all codebooks, stage by stage, in the order of the audio's way."""
    with torch.device("meta"):
        model = build(config)
        frames = round(SECONDS * config.frame_rate)
        seconds = frames / config.frame_rate
        audio = torch.empty(1, config.audio_channels, frames * config.frame_size)
        count = _Counter(seconds)
        context = ForwardContext(count.ops)
        with count.hooked(model.eval()):
            latents = model.audio_to_latents(audio, context)
            with count.stage("quantizer", model.quantizer):
                codes = torch.cat(model.latents_to_codes(latents, config.num_quantizers, context), dim=1)
                latents = model.codes_to_latents(codes, context)
            model.latents_to_audio(latents, context)
    return count.found


def total(found: list[Stage]) -> Stage:
    """The sum of stages."""
    sums = (sum(getattr(stage, name) for stage in found) for name in ("parameters", "flops", "bytes"))
    return Stage("total", *sums)


class _Counter:
    """Ops that count, for the stage at hand."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.found: list[Stage] = []
        self.ops = Ops(**{op: self._op(op) for op in OPS})

    def _op(self, op: str) -> Callable[..., Tensor]:
        def run(*tensors: Any, dropout: float = 0.0, residual_dropout: float = 0.0, **options: Any) -> Tensor:
            y = OPS[op].fake(*tensors, **options)
            self._add(OPS[op].flops(y, *tensors, **options), tensors[0], y, y.shape[OPS[op].time])
            return y

        return run

    def _add(self, flops: float, x: Tensor, y: Tensor, length: int) -> None:
        stage = self.found[-1]
        stage.flops += flops / self.seconds
        stage.bytes += (x.nbytes + y.nbytes) / self.seconds
        stage.rate = length / self.seconds

    @contextmanager
    def stage(self, name: str, module: nn.Module) -> Iterator[None]:
        """Within, what is counted belongs to a new stage of this name."""
        self.found.append(Stage(name, sum(t.numel() for t in module.state_dict().values())))
        yield

    @contextmanager
    def hooked(self, model: Codec) -> Iterator[None]:
        """Within, each stage of the model's directions begins with its module's forward."""
        names = {module: name for name, module in model.named_modules()}
        handles = []
        for module in _modules(model):

            def begin(module: nn.Module, _: Any) -> None:
                with self.stage(names[module], module):
                    pass

            handles.append(module.register_forward_pre_hook(begin))
            if isinstance(module, nn.Linear):  # which is no op
                handles.append(module.register_forward_hook(self._linear))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _linear(self, layer: Any, inputs: tuple[Tensor], y: Tensor) -> None:
        self._add(2.0 * layer.weight.numel() * y.shape[1], inputs[0], y, y.shape[1])


def _modules(model: Codec) -> Iterator[nn.Module]:
    """The modules that are stages: an encoder or decoder layer by layer or block by block, all else whole."""
    for part in (*model.parts("encode"), *model.parts("decode")):
        if part is not None and part not in (model.encoder, model.decoder):
            yield part
        for child in part.children() if part in (model.encoder, model.decoder) and part is not None else ():
            yield from child.children() if isinstance(child, (nn.ModuleList, nn.ModuleDict)) else (child,)


def ceilings(device: str = "cpu") -> dict[str, float]:
    """Measured in half a second: GFLOP/s of products in fp32 and bf16, GB/s of a copy (read and written) and a read."""

    def best(call: Any, rounds: int = 8) -> float:
        times = []
        for _ in range(rounds + 1):  # the first is to warm up
            start = time.perf_counter()
            call()
            if torch.device(device).type != "cpu":
                torch.accelerator.synchronize()
            times.append(time.perf_counter() - start)
        return min(times[1:])

    found, n = {}, 1024 if device == "cpu" else 4096
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        # on a CPU a convolution with one tap: oneDNN, which is at its peak on every processor
        x = torch.randn(1, n, 32, n // 32, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(n, n, 1, 1, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
        found[f"{name} GFLOP/s"] = 2 * n**3 / best(lambda x=x, w=weight: torch.nn.functional.conv2d(x, w)) / 1e9
    source = torch.ones(64 << 20, device=device)
    target = torch.empty_like(source)
    found["copy GB/s"] = 2 * source.nbytes / best(lambda: target.copy_(source)) / 1e9
    found["read GB/s"] = source.nbytes / best(source.amax) / 1e9
    return found
