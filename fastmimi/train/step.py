"""One training step: the generator, its losses, and the updates of generator and discriminators."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import convert_to_fp32
from torch import Tensor, nn
from torch.optim import AdamW

from ..checkpoints.weights import load
from ..errors import InputError, shown
from ..models.codec import Codec
from ..models.config import AnyConfig
from ..models.registry import ARCHITECTURES, build
from ..models.validation import Json
from . import losses
from .config import AUDIO_LOSSES, ModelConfig, OptimizerConfig, TrainConfig
from .data import Batch
from .discriminators import MultiScaleSTFTDiscriminator
from .distillation import Distillation, Teacher
from .distributed import rank_and_world_size
from .initialization import variance_preserving_init_
from .muon import Muon
from .quantizer import Quantized, TrainedQuantizer
from .widen import widen


class GeneratorOutput(NamedTuple):
    """The result of the generator's forward pass."""

    audio: Tensor  # [B, C, N], decoded
    quantized: Quantized
    distillation: Tensor | None  # the distillation loss


class StepResult(NamedTuple):
    """The losses and metrics of one training step: detached scalars by name."""

    losses: dict[str, Tensor]
    # Empty in the discriminators' head start. "gradient", the norm of the generator's, is missing from a skipped step.
    metrics: dict[str, Tensor]
    # A gradient overflowed in fp16, so that the generator (in the head start: the discriminators) was not updated.
    skipped: bool

    @property
    def scalars(self) -> dict[str, Tensor]:
        """Losses and metrics."""
        return self.losses | self.metrics


class Generator(nn.Module):
    """Codec, quantizer in training and projection of the distillation: what the generator's optimizer trains."""

    def __init__(self, config: TrainConfig, teacher_width: int | None = None):
        super().__init__()
        self.codec = build_codec(config.model)
        frozen = {part for name in config.model.freeze for part in _modules(self.codec)[name].modules()}
        self.frozen = frozen
        self.quantizer = TrainedQuantizer(self.codec, config.quantizer, frozen)
        self.distillation = None
        if teacher_width is not None:
            self.distillation = Distillation(self.codec.config.hidden_size, teacher_width)
        self.train()

    def train(self, mode: bool = True) -> Generator:
        """As nn.Module.train, but frozen modules stay in eval mode, without dropout."""
        super().train(mode)
        for module in self.frozen:
            module.training = False
        return self

    def forward(self, audio: Tensor, step: int, targets: Tensor | None = None) -> GeneratorOutput:
        """Encode, quantize and decode audio [B, C, N]; `targets` are the teacher's embeddings, for the distillation."""
        codec = self.codec
        latents = codec.encode_to_latent(audio)
        quantized = self.quantizer(codec, latents, codec.forward_context(len(latents)), step)
        decoded = codec.decode_latent(quantized.latents)[..., : audio.shape[-1]]
        distilled = None
        if self.distillation is not None and targets is not None:
            distilled = self.distillation(quantized.semantic, targets)
        return GeneratorOutput(decoded, quantized, distilled)


def build_codec(config: ModelConfig) -> Codec:
    """The codec to train, loaded or new; codebooks and frozen modules do not require gradients."""
    if config.load is not None:
        codec = load(config.load, impl=config.impl)
        if config.widen:
            codec = widen(codec, config.widen, config.impl)
        codec.requires_grad_(True)
    elif config.widen:
        raise InputError(f"model.widen needs model.load, the codec to widen, got {shown(config.widen)}")
    else:
        architecture = ARCHITECTURES[config.architecture]
        codec = build(_build_codec_config(architecture.config, config.changes), impl=config.impl)
        variance_preserving_init_(codec)
        for part, _ in codec.quantizer.parts(codec.total_codebooks):
            part.learned(torch.zeros_like(part.codebooks()), part.usage())  # zeros: k-means will initialize them
    for part, _ in codec.quantizer.parts(codec.total_codebooks):
        for entries in part._stored():
            entries.requires_grad_(False)  # updated by moving averages, not by gradients
    modules = _modules(codec)
    for name in config.freeze:
        if name not in modules:
            known = ", ".join(name for name, _ in codec.named_children())
            raise InputError(f"model.freeze must name modules of the codec ({known}...), got {name!r}")
        modules[name].requires_grad_(False)
        _check_quantizers_are_frozen_whole(codec, name, modules[name])
    if not any(p.requires_grad for p in codec.parameters()):
        raise InputError(f"model.freeze leaves nothing to train, got {', '.join(config.freeze)}")
    return codec


def _check_quantizers_are_frozen_whole(codec: Codec, name: str, frozen: nn.Module) -> None:
    """Raise InputError if a part of a residual quantizer is frozen: its entries are frozen or trained together."""
    tensors = {id(tensor) for tensor in (*frozen.parameters(), *frozen.buffers())}
    for part, _ in codec.quantizer.parts(codec.total_codebooks):
        if part not in frozen.modules() and any(id(entries) in tensors for entries in part._stored()):
            whole = next(key for key, module in codec.named_modules() if module is part)
            raise InputError(f"model.freeze must name a whole residual quantizer, such as {whole}, got {name!r}")


def _build_codec_config(kind: type[AnyConfig], changes: Json) -> AnyConfig:
    """The configuration of a new codec; raises InputError for a field that it does not have."""
    _check_fields(kind, changes)
    config = kind.from_dict(changes)
    for name, inner in changes.items():
        part = getattr(config, name)
        if is_dataclass(part):
            _check_fields(type(part), inner)
    return config


def _check_fields(kind: type, names: Iterable[str]) -> None:
    known = [f.name for f in fields(kind)]
    for name in names:
        if name not in known:
            raise InputError(f"model.changes must name fields of {kind.__name__} ({', '.join(known)}), got {name!r}")


def _modules(codec: Codec) -> dict[str, nn.Module]:
    """The codec's modules by name, and "quantizer": in a JODIO that is not a submodule, and groups two that are."""
    return {"quantizer": codec.quantizer, **dict(codec.named_modules())}


def parameter_groups(generator: Generator, config: OptimizerConfig) -> list[dict[str, object]]:
    """Parameter groups for AdamW: weight decay applies to the transformers' parameters only."""
    trained = [(name, p) for name, p in generator.named_parameters() if p.requires_grad]
    decayed = [p for name, p in trained if "transformer." in name]
    rest = [p for name, p in trained if "transformer." not in name]
    return [{"params": decayed, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]


def build_optimizer(groups: list[dict[str, object]], kind: str, lr: float, betas: list[float]) -> AdamW:
    """AdamW or Muon for parameter groups."""
    optimizer = {"adamw": AdamW, "muon": Muon}[kind]
    return optimizer(groups, lr=lr, betas=(betas[0], betas[1]))


class TrainingStep:
    """Teacher, generator, discriminators and their optimizers; calling it is one step, on one batch."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator):
        self.config, self.accelerator = config, accelerator
        self.teacher = None
        if config.distillation.teacher is not None:
            self.teacher = Teacher(config.distillation.teacher, config.distillation.normalize, accelerator.device)
        generator = Generator(config, None if self.teacher is None else self.teacher.width)
        self.rate = generator.codec.sample_rate
        weights = {name: getattr(config.losses, name) for name in AUDIO_LOSSES}
        self.balancer = losses.Balancer(
            {name: weight for name, weight in weights.items() if weight}, config.losses.norm,
            config.losses.balancer_decay,
        ).to(accelerator.device)  # fmt: skip
        lr, betas = config.optimizer.lr, config.optimizer.betas
        optimizer = build_optimizer(parameter_groups(generator, config.optimizer), config.optimizer.kind, lr, betas)
        self.generator, self.optimizer = accelerator.prepare(generator, optimizer)
        self.discriminators = self.discriminator_optimizer = None
        if weights["adversarial"] or weights["features"]:
            discriminators = MultiScaleSTFTDiscriminator(config.discriminator, self.codec.config.audio_channels)
            groups = [{"params": list(discriminators.parameters()), "weight_decay": 0.0}]
            optimizer = build_optimizer(groups, "adamw", config.discriminator.lr or lr, betas)
            self.discriminators, self.discriminator_optimizer = accelerator.prepare(discriminators, optimizer)

    @property
    def unwrapped_generator(self) -> Generator:
        """The generator without the wrappers of accelerate."""
        return self.accelerator.unwrap_model(self.generator)

    @property
    def codec(self) -> Codec:
        """The codec in training."""
        return self.unwrapped_generator.codec

    def __call__(self, batch: Batch, step: int) -> StepResult:
        """Train the discriminators and, after their head start, the generator on a batch; `step` counts from 0."""
        step -= self.config.discriminator.head_start  # of the generator; negative ones leave new codebooks as they are
        if step < 0:
            with torch.no_grad():
                decoded = self.generator(batch.audio, step).audio
            found = {"discriminator": self._discriminator_step(batch.audio, decoded)}
            assert self.discriminator_optimizer is not None
            return StepResult(found, {}, self.discriminator_optimizer.step_was_skipped)
        targets = None
        if self.teacher is not None and batch.teacher_audio is not None:
            with self.accelerator.autocast():
                targets = self.teacher(batch.teacher_audio)
        output: GeneratorOutput = self.generator(batch.audio, step, targets)
        quantized = output.quantized
        found = {"commitment": quantized.commitment}
        if self.discriminators is not None:
            found["discriminator"] = self._discriminator_step(batch.audio, output.audio.detach())
        audio = output.audio.detach().requires_grad_()  # the losses' gradients are balanced with respect to this leaf
        # No fp16 here: the gradient scaler does not scale these losses, and gradients of means over a batch underflow.
        bf16 = self.accelerator.mixed_precision == "bf16"
        with torch.autocast(audio.device.type, torch.bfloat16, enabled=bf16):
            audio_losses = self._audio_losses(batch.audio, audio)
        gradient = self.balancer(audio_losses, audio) * rank_and_world_size()[1]  # DDP averages over the processes
        total = (output.audio * gradient).sum() + self.config.quantizer.commitment * quantized.commitment
        usage = codebook_usage(quantized.codes, self.codec.config.codebook_size)
        metrics = {"explained": quantized.explained, "used": usage.mean()}
        if output.distillation is not None:
            total = total + self.config.distillation.weight * output.distillation
            metrics["cosine"] = 1 - output.distillation
        self.accelerator.backward(total)
        norm = self.accelerator.clip_grad_norm_(self.generator.parameters(), self.config.optimizer.clip)
        self.optimizer.step()
        if not self.optimizer.step_was_skipped:
            metrics["gradient"] = torch.as_tensor(norm)
        self.optimizer.zero_grad()
        self.unwrapped_generator.quantizer.update(self.codec, quantized.statistics, step)
        return StepResult(_detached(found | audio_losses), _detached(metrics), self.optimizer.step_was_skipped)

    def _discriminator_step(self, real: Tensor, fake: Tensor) -> Tensor:
        """Update the discriminators on real and (detached) decoded audio [B, C, N]; return their loss."""
        assert self.discriminators is not None and self.discriminator_optimizer is not None
        with self.accelerator.autocast():
            logits, _ = self.discriminators(torch.cat([real, fake]))
            pairs = [scale.chunk(2) for scale in logits]
            loss = losses.discriminator_hinge_loss([real for real, _ in pairs], [fake for _, fake in pairs])
        self.accelerator.backward(loss)
        self.discriminator_optimizer.step()
        self.discriminator_optimizer.zero_grad()
        return loss.detach()

    def _audio_losses(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """The losses on decoded audio [B, C, N] whose weight is not 0, by name."""
        weights, found = self.balancer.weights, {}
        if self.discriminators is not None:
            # Unwrapped, and through the class's forward: DDP must not wait for gradients of the discriminators, which
            # get none here, and accelerate's autocast, which wraps the instance's forward, may be fp16.
            unwrapped = self.accelerator.unwrap_model(self.discriminators)
            logits, features = convert_to_fp32(MultiScaleSTFTDiscriminator.forward(unwrapped, fake))
            if "adversarial" in weights:
                found["adversarial"] = losses.generator_hinge_loss(logits)
            if "features" in weights:
                with torch.no_grad():
                    _, real_features = convert_to_fp32(MultiScaleSTFTDiscriminator.forward(unwrapped, real))
                silence = losses.SILENCE * self.config.discriminator.gain
                found["features"] = losses.feature_matching_loss(real_features, features, silence)
        if "l1" in weights:
            found["l1"] = F.l1_loss(fake, real)
        if "mel" in weights:
            found["mel"] = losses.mel_distance(real, fake, self.rate, self.config.losses.mel_floor)
        if "spectrum" in weights:
            found["spectrum"] = losses.spectrum_distance(real, fake)
        return found


def _detached(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in values.items()}


def codebook_usage(codes: Tensor, size: int) -> Tensor:
    """The fraction of each level's entries that occur in codes [B, K, T]: [K]."""
    per_level = codes.transpose(0, 1).flatten(1)  # [K, B * T]
    occurs = torch.zeros(len(per_level), size, device=codes.device).scatter_(1, per_level, 1.0)
    return occurs.mean(dim=1)
