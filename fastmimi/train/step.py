"""One training step: the generator, what it is charged with, and the two updates. No files, no loop."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import convert_to_fp32
from torch import Tensor, nn
from torch.optim import AdamW

from ..checkpoints.weights import load
from ..errors import InputError
from ..models.codec import Codec
from ..models.config import AnyConfig, CodecConfig, JodioConfig
from ..models.jodio import JodioModel
from ..models.mimi import Mimi
from . import losses
from .config import ModelConfig, OptimizerConfig, TrainConfig
from .data import Batch
from .discriminators import Discriminators
from .distillation import Distillation
from .initial import keep_the_power
from .processes import place
from .quantizer import Quantized, TrainedQuantizer


class Generated(NamedTuple):
    audio: Tensor  # [B, C, N]
    quantized: Quantized
    distillation: Tensor | None


class Generator(nn.Module):
    """What the first optimizer trains: the codec, its codebooks' running means, the distillation's projection."""

    def __init__(self, config: TrainConfig):
        super().__init__()
        self.codec = codec_of(config.model)
        frozen = {part for name in config.model.freeze for part in _modules(self.codec)[name].modules()}
        self.frozen = frozen
        self.quantizer = TrainedQuantizer(self.codec, config.quantizer, frozen)
        self.distillation = None
        if config.distillation.teacher is not None:
            self.distillation = Distillation(config.distillation, self.codec.config.hidden_size)
        self.train()

    def train(self, mode: bool = True) -> Generator:
        """What is frozen stays as it is used: without dropout."""
        super().train(mode)
        for module in self.frozen:
            module.training = False
        return self

    def forward(self, audio: Tensor, step: int, targets: Tensor | None = None) -> Generated:
        codec = self.codec
        latents = codec.encode_to_latent(audio)
        quantized = self.quantizer(codec, latents, codec.forward_context(len(latents)), step)
        decoded = codec.decode_latent(quantized.latents)[..., : audio.shape[-1]]
        distilled = None
        if self.distillation is not None and targets is not None:
            distilled = self.distillation(quantized.semantic, targets)
        return Generated(decoded, quantized, distilled)


def codec_of(config: ModelConfig) -> Codec:
    """The codec to train: loaded, or new, with what is frozen not requiring gradients."""
    if config.load is not None:
        codec = load(config.load, impl=config.impl).requires_grad_(True)
    elif config.architecture == "mimi":
        codec = Mimi(_config_of(CodecConfig, config.changes), impl=config.impl)
        keep_the_power(codec)
    else:
        codec = JodioModel(_config_of(JodioConfig, config.changes), impl=config.impl)
        keep_the_power(codec)
        for part, _ in codec.quantizer.parts(codec.total_codebooks):
            part.learned(torch.zeros_like(part.codebooks()), part.usage())  # nothing yet: k-means begins
    for part, _ in codec.quantizer.parts(codec.total_codebooks):
        for entries in part._stored():
            entries.requires_grad_(False)  # running means, not gradients, move them
    modules = _modules(codec)
    for name in config.freeze:
        if name not in modules:
            there = ", ".join(name for name, _ in codec.named_children())
            raise InputError(f"model.freeze must name modules of the codec ({there}...), got {name!r}")
        modules[name].requires_grad_(False)
        _check_whole(codec, name, modules[name])
    if not any(p.requires_grad for p in codec.parameters()):
        raise InputError(f"model.freeze leaves nothing to train, got {', '.join(config.freeze)}")
    return codec


def _check_whole(codec: Codec, name: str, frozen: nn.Module) -> None:
    """Entries of a quantizer stay or move together."""
    tensors = {id(tensor) for tensor in (*frozen.parameters(), *frozen.buffers())}
    for part, _ in codec.quantizer.parts(codec.total_codebooks):
        if part not in frozen.modules() and any(id(entries) in tensors for entries in part._stored()):
            whole = next(key for key, module in codec.named_modules() if module is part)
            raise InputError(f"model.freeze takes a quantizer whole: {whole}, got {name!r}")


def _config_of(kind: type[AnyConfig], changes: dict[str, Any]) -> Any:
    _check_fields(kind, changes)
    config = kind.from_dict(changes)
    for name, inner in changes.items():
        part = getattr(config, name)
        if is_dataclass(part):
            _check_fields(type(part), inner)
    return config


def _check_fields(kind: Any, names: Iterable[str]) -> None:
    known = [f.name for f in fields(kind)]
    for name in names:
        if name not in known:
            raise InputError(f"model.changes must name fields of {kind.__name__} ({', '.join(known)}), got {name!r}")


def _modules(codec: Codec) -> dict[str, nn.Module]:
    """By name; a JODIO's quantizers together too, which are no module of it."""
    return {"quantizer": codec.quantizer, **dict(codec.named_modules())}


def parameter_groups(generator: Generator, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Weight decay is for the transformers' parameters only."""
    trained = [(name, p) for name, p in generator.named_parameters() if p.requires_grad]
    decayed = [p for name, p in trained if "transformer." in name]
    rest = [p for name, p in trained if "transformer." not in name]
    return [{"params": decayed, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]


def optimizer_of(groups: list[dict[str, Any]], config: OptimizerConfig) -> AdamW:
    return AdamW(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]))


class Steps:
    """The parts of a run that learn, and what they do with a batch."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator):
        self.config, self.accelerator = config, accelerator
        generator = Generator(config)
        self.rate = generator.codec.sample_rate
        weights = {name: getattr(config.losses, name) for name in ("adversarial", "features", "l1", "mel")}
        self.balancer = losses.Balancer(
            {name: weight for name, weight in weights.items() if weight}, config.losses.norm,
            config.losses.balancer_decay,
        ).to(accelerator.device)  # fmt: skip
        optimizer = optimizer_of(parameter_groups(generator, config.optimizer), config.optimizer)
        self.generator, self.optimizer = accelerator.prepare(generator, optimizer)
        self.discriminators = self.critic = None
        if weights["adversarial"] or weights["features"]:
            discriminators = Discriminators(config.discriminator, self.codec.config.audio_channels)
            critic = optimizer_of([{"params": list(discriminators.parameters())}], config.optimizer)
            critic.param_groups[0]["weight_decay"] = 0.0
            self.discriminators, self.critic = accelerator.prepare(discriminators, critic)

    @property
    def trained(self) -> Generator:
        """The generator, out of what accelerate wraps it in."""
        return self.accelerator.unwrap_model(self.generator)

    @property
    def codec(self) -> Codec:
        return self.trained.codec

    def __call__(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Train on a batch; every loss by name, detached."""
        seen: dict[str, Tensor] = {}
        distillation = self.trained.distillation
        targets = None
        if distillation is not None and batch.heard is not None:
            with self.accelerator.autocast():
                targets = distillation.targets(batch.heard)
        made: Generated = self.generator(batch.audio, step, targets)
        if self.discriminators is not None:
            seen["discriminator"] = self._criticise(batch.audio, made.audio.detach())
        audio = made.audio.detach().requires_grad_()  # the losses' gradients are balanced here, and go on as one
        # fp16 would round the gradients of means over a batch to nothing, before any loss is scaled
        half = self.accelerator.mixed_precision == "bf16"
        with torch.autocast(audio.device.type, torch.bfloat16, enabled=half):
            charged = self._charged(batch.audio, audio)
        gradient = self.balancer(charged, audio) * place()[1]  # whose mean over the processes is taken
        total = (made.audio * gradient).sum() + self.config.quantizer.commitment * made.quantized.commitment
        seen |= {name: loss.detach() for name, loss in charged.items()}
        seen["commitment"] = made.quantized.commitment.detach()
        if made.distillation is not None:
            total = total + self.config.distillation.weight * made.distillation
            seen["cosine"] = 1 - made.distillation.detach()
        self.accelerator.backward(total)
        norm = self.accelerator.clip_grad_norm_(self.generator.parameters(), self.config.optimizer.clip)
        self.optimizer.step()
        if not self.accelerator.optimizer_step_was_skipped:  # as fp16 does with what it cannot hold
            seen["gradient"] = torch.as_tensor(norm)
        self.optimizer.zero_grad()
        self.trained.quantizer.update(self.codec, step)
        seen["explained"] = made.quantized.explained
        seen["used"] = used(made.quantized.codes, self.codec.config.codebook_size).mean()
        return seen

    def _criticise(self, real: Tensor, fake: Tensor) -> Tensor:
        """The discriminators' own step, which does not reach the generator."""
        assert self.discriminators is not None and self.critic is not None
        with self.accelerator.autocast():
            both, _ = self.discriminators(torch.cat([real, fake]))
            pairs = [logits.chunk(2) for logits in both]
            loss = losses.discriminator_hinge([real for real, _ in pairs], [fake for _, fake in pairs])
        self.accelerator.backward(loss)
        self.critic.step()
        self.critic.zero_grad()
        return loss.detach()

    def _charged(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """The losses of decoded audio [B, C, N], those whose weight is not 0."""
        weights, found = self.balancer.weights, {}
        if self.discriminators is not None:
            # past DDP, as nobody waits for their gradients here, and past accelerate's own autocast, which may be fp16
            critics = self.accelerator.unwrap_model(self.discriminators)
            logits, features = convert_to_fp32(Discriminators.forward(critics, fake))
            if "adversarial" in weights:
                found["adversarial"] = losses.adversarial(logits)
            if "features" in weights:
                with torch.no_grad():
                    _, wanted = convert_to_fp32(Discriminators.forward(critics, real))
                found["features"] = losses.feature_matching(wanted, features)
        if "l1" in weights:
            found["l1"] = F.l1_loss(fake, real)
        if "mel" in weights:
            found["mel"] = losses.mel_distance(real, fake, self.rate)
        return found


def used(codes: Tensor, size: int) -> Tensor:
    """Codes [B, K, T] -> the share of each level's entries that occur [K]."""
    per_level = codes.transpose(0, 1).flatten(1)  # [K, B * T]
    there = torch.zeros(len(per_level), size, device=codes.device).scatter_(1, per_level, 1.0)
    return there.mean(dim=1)
