"""Cost model: parameters of each stage of a codec, and FLOPs and bytes for one second of audio; and machine peak rates.

The model runs on the meta device with ops that count instead of computing. Bytes count each op's input and output once,
without weights, which are read once per pass. A multiply-add counts as two FLOPs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..models.codec import Codec
from ..models.config import AnyConfig
from ..models.registry import build
from ..runtime import dispatch
from ..runtime.ops import OPS, ForwardContext, Ops

SECONDS = 40  # of audio that is counted, longer than every attention window


@dataclass
class Stage:
    """A part of a model and its cost for one second of audio. `rate` is the rate of its outputs in Hz."""

    name: str
    parameters: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    rate: float = 0.0

    def seconds(self, ceilings: dict[str, float]) -> float:
        """Lower bound on the time for one second of audio in fp32 at the measured peak rates, with cached weights."""
        return max(self.flops / ceilings["fp32 GFLOP/s"], self.bytes / ceilings["copy GB/s"]) / 1e9


@torch.no_grad()
def stages(config: AnyConfig) -> list[Stage]:
    """The stages of encoding and then decoding with all codebooks, in the order in which they run."""
    with torch.device("meta"):
        model = build(config)
        frames = round(SECONDS * config.frame_rate)
        seconds = frames / config.frame_rate
        audio = torch.empty(1, config.audio_channels, frames * config.frame_size)
        count = _Counter(seconds)
        context = ForwardContext(count.ops)
        with count.hooked(model.eval()):
            latents = model.audio_to_latents(audio, context)
            if config.num_quantizers:
                with count.stage("quantizer", model.quantizer):
                    codes = torch.cat(model.latents_to_codes(latents, config.num_quantizers, context), dim=1)
                    latents = model.codes_to_latents(codes, context)
            else:  # continuous latents, of which the decoder may take another number of channels
                latents = audio.new_empty(1, config.hidden_size, frames)
            model.latents_to_audio(latents, context)
    return count.found


def total(found: list[Stage]) -> Stage:
    """The sum of stages."""
    sums = (sum(getattr(stage, name) for stage in found) for name in ("parameters", "flops", "bytes"))
    return Stage("total", *sums)


class _Counter:
    """Ops that add their cost to the current stage instead of computing."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.found: list[Stage] = []
        self.ops = Ops(**{op: self._op(op) for op in OPS})

    def _op(self, op: str) -> Callable[..., Tensor]:
        def run(
            x: Tensor, *tensors: Tensor | None, dropout: float = 0.0, residual_dropout: float = 0.0, **options: object
        ) -> Tensor:
            y = OPS[op].fake(x, *tensors, **options)
            self._add(OPS[op].flops(y, x, *tensors, **options), x, y, y.shape[OPS[op].time])
            return y

        return run

    def _add(self, flops: float, x: Tensor, y: Tensor, length: int) -> None:
        stage = self.found[-1]
        stage.flops += flops / self.seconds
        stage.bytes += (x.nbytes + y.nbytes) / self.seconds
        stage.rate = length / self.seconds

    @contextmanager
    def stage(self, name: str, module: nn.Module) -> Iterator[None]:
        """Begin a new stage; costs are added to it until the next one begins."""
        self.found.append(Stage(name, sum(t.numel() for t in module.state_dict().values())))
        yield

    @contextmanager
    def hooked(self, model: Codec) -> Iterator[None]:
        """Within the context, the forward pass of each module that is a stage begins that stage."""
        names = {module: name for name, module in model.named_modules()}
        handles = []
        for module in _modules(model):

            def begin(module: nn.Module, _: object) -> None:
                with self.stage(names[module], module):
                    pass

            handles.append(module.register_forward_pre_hook(begin))
            if isinstance(module, nn.Linear):  # not an op of ours
                handles.append(module.register_forward_hook(self._linear))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _linear(self, layer: nn.Linear, inputs: tuple[Tensor], y: Tensor) -> None:
        self._add(2.0 * layer.weight.numel() * y.shape[1], inputs[0], y, y.shape[1])


def _modules(model: Codec) -> Iterator[nn.Module]:
    """The modules that are stages: each layer or block of encoder and decoder, and every other part as a whole."""
    for part in (*model.parts("encode"), *model.parts("decode")):
        if part is not None and part not in (model.encoder, model.decoder):
            yield part
        for child in part.children() if part in (model.encoder, model.decoder) and part is not None else ():
            yield from child.children() if isinstance(child, (nn.ModuleList, nn.ModuleDict)) else (child,)


@torch.no_grad()
@torch.inference_mode(False)  # so that our product packs its weight once
def ceilings(device: str = "cpu") -> dict[str, float]:
    """Measured peak rates: GFLOP/s of matrix products in fp32 and bf16, GB/s of a copy (read + written) and of a read.

    On a CPU, of the threads that PyTorch has now; a product is PyTorch's or ours, whichever is faster on the processor.
    The measurement takes half a second.
    """

    def best(call: Callable[[], object], rounds: int = 8) -> float:
        times = []
        for _ in range(rounds + 1):  # the first one is a warm-up
            start = time.perf_counter()
            call()
            if torch.device(device).type != "cpu":
                torch.accelerator.synchronize()
            times.append(time.perf_counter() - start)
        return min(times[1:])

    found, n = {}, 1024 if device == "cpu" else 4096
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        # as a convolution of kernel size 1, on a CPU oneDNN's fastest product
        x = torch.randn(1, n, 32, n // 32, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(n, n, 1, 1, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
        seconds = best(partial(torch.nn.functional.conv2d, x, weight))
        if device == "cpu":
            ours = dispatch.bind(device, dtype).causal_conv1d
            seconds = min(seconds, best(partial(ours, x.flatten(2), weight.flatten(2))))
        found[f"{name} GFLOP/s"] = 2 * n**3 / seconds / 1e9
    source = torch.ones(64 << 20, device=device)
    target = torch.empty_like(source)
    found["copy GB/s"] = 2 * source.nbytes / best(lambda: target.copy_(source)) / 1e9
    found["read GB/s"] = source.nbytes / best(source.amax) / 1e9
    return found
