"""One training step: which parameters each optimizer trains, the losses, and the distillation teacher."""

import accelerate
import pytest
import torch
import torch.nn.functional as F

import fastmimi
from fastmimi.devtools.testing import noise, relative_error
from fastmimi.train import distributed, losses
from fastmimi.train.data import Batch
from fastmimi.train.distillation import Distillation, Teacher
from fastmimi.train.step import Generator, TrainingStep, parameter_groups

RATE, CPU = 24_000, torch.device("cpu")


def batch(teacher_audio=True, seed=1):
    audio = noise(3, 1, 9600, seed=seed, scale=0.1)
    return Batch(audio, noise(3, 6400, seed=seed + 1) if teacher_audio else None, ["a", "b", "c"], [])


# Which parameters each optimizer trains


@pytest.mark.parametrize("architecture", ["mimi", "jodio"])
def test_weight_decay_applies_to_the_transformers_only(tiny_training, architecture):
    config = tiny_training(architecture=architecture)
    generator = Generator(config)
    names = {id(p): name for name, p in generator.named_parameters()}
    decayed, rest = parameter_groups(generator, config.optimizer)
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.05, 0.0)
    inside = ("codec.encoder_transformer.", "codec.decoder_transformer.")
    assert all(names[id(p)].startswith(inside) for p in decayed["params"])
    assert not any(names[id(p)].startswith(inside) for p in rest["params"])
    trained = {name for name, p in generator.named_parameters() if p.requires_grad}
    assert {names[id(p)] for group in (decayed, rest) for p in group["params"]} == trained
    assert {"codec.encoder_transformer.layers.0", "codec.decoder_transformer.layers.0"} <= {
        ".".join(names[id(p)].split(".")[:4]) for p in decayed["params"]
    }


@pytest.mark.parametrize("architecture", ["mimi", "jodio"])
def test_every_parameter_gets_a_gradient(make_training_step, architecture, monkeypatch):
    training_step = make_training_step(architecture=architecture)
    for optimizer in (training_step.optimizer, training_step.discriminator_optimizer):
        monkeypatch.setattr(optimizer, "step", lambda *_: None)
        monkeypatch.setattr(optimizer, "zero_grad", lambda *_: None)
    for i in range(2):  # the first step initializes the codebooks
        training_step(batch(seed=i), i)
    trained = [(name, p.grad) for name, p in training_step.unwrapped_generator.named_parameters() if p.requires_grad]
    assert not [name for name, gradient in trained if gradient is None or not gradient.any()]
    assert all(p.grad is not None and p.grad.any() for p in training_step.discriminators.parameters())


def test_generator_and_discriminators_are_updated_separately(make_training_step, monkeypatch):
    training_step, reached = make_training_step(), []
    backward = training_step.accelerator.backward

    def checked(loss):
        before = [p.grad for p in training_step.discriminators.parameters()]
        assert all(grad is None or not grad.any() for grad in before), (
            "the discriminators have gradients of the codec's losses"
        )
        backward(loss)
        reached.append(any(p.grad is not None for p in training_step.unwrapped_generator.parameters()))

    monkeypatch.setattr(training_step.accelerator, "backward", checked)
    training_step(batch(), 0)
    assert reached == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture, frozen, stays, moves",
    [
        ("mimi", ["encoder", "quantizer"], ["encoder.", "quantizer."], ["encoder_transformer.", "decoder."]),
        ("mimi", ["quantizer.semantic_residual_vector_quantizer"], ["quantizer.semantic"], ["quantizer.acoustic"]),
        ("jodio", ["quantizer"], ["semantic_rvq.", "acoustic_rvq."], ["encoder.", "decoder."]),
        ("jodio", ["semantic_rvq"], ["semantic_rvq."], ["acoustic_rvq.", "quantizer_out_proj."]),
        ("jodio", ["quantizer_out_proj"], ["quantizer_out_proj."], ["semantic_rvq.", "acoustic_rvq."]),
    ],
)
def test_frozen_modules_do_not_change(make_training_step, tmp_path, architecture, frozen, stays, moves):
    learned = make_training_step(architecture=architecture)
    learned(batch(), 0)
    fastmimi.save_pretrained(learned.codec, tmp_path)
    training_step = make_training_step(architecture=architecture, load=str(tmp_path), freeze=frozen)
    before = {name: tensor.clone() for name, tensor in training_step.codec.state_dict().items()}
    for i in range(2):
        training_step(batch(seed=i), i)
    moved = {name for name, tensor in training_step.codec.state_dict().items() if not torch.equal(tensor, before[name])}
    assert not [name for name in moved if name.startswith(tuple(stays))]
    assert all(any(name.startswith(part) for name in moved) for part in moves)


def test_frozen_modules_have_no_dropout(tiny_training):
    generator = Generator(tiny_training(architecture="jodio", freeze=["encoder_transformer"])).train()
    assert not any(module.training for module in generator.codec.encoder_transformer.modules())
    assert generator.codec.decoder_transformer.training


@pytest.mark.parametrize("inside", ["layers", "layers.0.codebook"])
def test_a_residual_quantizer_is_frozen_as_a_whole(tiny_training, inside):
    part = "quantizer.acoustic_residual_vector_quantizer"
    with pytest.raises(
        ValueError, match=rf"must name a whole residual quantizer, such as {part}, got '{part}\.{inside}'"
    ):
        Generator(tiny_training(freeze=[f"{part}.{inside}"]))


def test_modules_that_cannot_be_frozen(tiny_training):
    with pytest.raises(ValueError, match=r"model\.freeze names a quantizer that has no entries yet"):
        Generator(tiny_training(freeze=["quantizer"]))
    everything = ["encoder", "encoder_transformer", "downsample", "upsample", "decoder_transformer", "decoder"]
    with pytest.raises(ValueError, match=r"model\.freeze leaves nothing to train"):
        Generator(tiny_training(freeze=[*everything, "quantizer"]))


@pytest.mark.parametrize("architecture", ["mimi", "jodio"])
def test_new_codecs_depend_on_their_input(tiny_training, architecture):
    """The variance over different inputs is a large part of the latents and of the decoded audio."""
    torch.manual_seed(0)
    codec = Generator(tiny_training(architecture=architecture)).codec.eval()
    audio = noise(8, 1, 9600)
    with torch.no_grad():
        latents = codec.encode_to_latent(audio)
        decoded = codec.decode_latent(latents)
    for found in (latents, decoded):
        assert found.var(dim=0).mean() > 0.2 * found.square().mean()
        assert 0.03 < found.norm() / found.numel() ** 0.5 / audio.std() < 30


def test_convolutions_that_apply_silu_get_its_gain(tiny_training):
    codec = Generator(tiny_training(architecture="jodio", impl="reference")).codec
    block = codec.decoder.conv_blocks[0]
    weights = [layer[0].weight for layer in block.layers]
    spread = torch.cat([w.flatten() for w in weights]).std() * weights[0][0].numel() ** 0.5
    assert 1.4 < spread < 2.0
    plain = torch.cat([b.downsample.weight.flatten() for b in codec.encoder.conv_blocks])
    assert 0.8 < plain.std() * weights[0][0].numel() ** 0.5 < 1.2


def test_frozen_modules_must_exist(tiny_training):
    with pytest.raises(ValueError, match=r"model.freeze must name modules of the codec .*, got 'encodr'"):
        Generator(tiny_training(freeze=["encodr"]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cpu", "onednn", "triton"])
def test_fused_ops_give_the_reference_gradients(make_training_step, kind, request, monkeypatch):
    from fastmimi.runtime import dispatch

    if kind == "triton" and not request.config.getoption("--kernels"):
        pytest.skip("runs Triton kernels: pass --kernels")
    if sentence := dispatch.why_not(kind, "resblock", dispatch.Target("cpu", torch.float32)):
        pytest.skip(sentence)
    first, second = (make_training_step(impl=impl, kmeans_latents=75) for impl in ("reference", kind))
    for i in range(7):  # until no two entries are equal
        first(batch(seed=i), i)
    for name in ("generator", "discriminators", "balancer"):
        getattr(second, name).load_state_dict(getattr(first, name).state_dict())
    logged, gradients = [], []
    for training_step in (first, second):
        training_step.discriminator_optimizer.optimizer.state.clear()
        monkeypatch.setattr(training_step.optimizer, "step", lambda *_: None)
        monkeypatch.setattr(training_step.optimizer, "zero_grad", lambda *_: None)
        torch.manual_seed(1)
        logged.append(training_step(batch(seed=1), 1).scalars)
        gradients.append({name: p.grad for name, p in training_step.unwrapped_generator.named_parameters()})
    for name in logged[0]:
        assert logged[1][name].item() == pytest.approx(logged[0][name].item(), rel=1e-4, abs=1e-6), name
    largest = max(gradient.abs().max() for gradient in gradients[0].values())
    # Rounding may cross a kink of a loss or an activation: of three batches on one processor, gradients differed by
    # 1.7e-3, 2e-4 and 2e-6.
    for name, gradient in gradients[0].items():
        assert (gradients[1][name] - gradient).abs().max() < 1e-2 * gradient.abs().max() + 1e-6 * largest, name


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("architecture", ["mimi", "jodio"])
def test_mixed_precision(tiny_training, impl, architecture, monkeypatch):
    """Matrix products are in bf16; the search, the losses and the parameters stay in fp32."""
    from accelerate.state import AcceleratorState

    dtypes_of_logits = []
    original = losses.generator_hinge_loss
    monkeypatch.setattr(losses, "generator_hinge_loss", lambda x: dtypes_of_logits.append(x[0].dtype) or original(x))
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        torch.manual_seed(0)
        config = tiny_training(impl=impl, architecture=architecture)
        training_step = TrainingStep(config, accelerate.Accelerator(cpu=True, mixed_precision="bf16"))
        teacher = training_step.teacher.model.encoder.layers[0].feed_forward.output_dense
        seen = [_dtypes(module) for module in (training_step.discriminators.scales[0].last, teacher)]
        results = [training_step(batch(seed=i), i) for i in range(3)]
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert all(value.isfinite() for result in results for value in result.scalars.values())
    assert all(tensor.dtype != torch.bfloat16 for tensor in training_step.unwrapped_generator.state_dict().values())
    assert [set(dtypes) for dtypes in seen] == [{torch.bfloat16}] * 2 and set(dtypes_of_logits) == {torch.float32}


def _dtypes(module):
    """The dtypes of the module's outputs from now on."""
    seen = []
    module.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    return seen


def test_audio_losses_are_fp32_in_fp16_training(make_training_step, monkeypatch):
    """Gradients of means over a batch would underflow in fp16: accelerate's own autocast must not apply to them."""
    training_step = make_training_step()
    monkeypatch.setattr(training_step.accelerator.state, "_mixed_precision", "fp16")
    discriminators = training_step.discriminators
    half = torch.autocast("cpu", torch.float16)(discriminators.forward)
    monkeypatch.setattr(discriminators, "forward", half)  # as `Accelerator.prepare` wraps it
    seen = _dtypes(discriminators.scales[0].last)
    training_step._audio_losses(batch().audio, noise(3, 1, 9600).requires_grad_())
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("overflowing", ["discriminators", "generator"])
def test_a_step_is_skipped_if_the_generators_gradient_overflows(tiny_training, monkeypatch, overflowing):
    """And not if the discriminators' does: with a gradient scaler, each optimizer skips its own update."""
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu")
    training_step = TrainingStep(tiny_training(), accelerator)
    backward, passes = accelerator.backward, iter(("discriminators", "generator"))
    monkeypatch.setattr(
        accelerator, "backward", lambda loss: backward(loss * (torch.inf if next(passes) == overflowing else 1))
    )
    before = {name: tensor.clone() for name, tensor in training_step.discriminators.state_dict().items()}
    result = training_step(batch(), 0)
    moved = any(
        not torch.equal(tensor, before[name]) for name, tensor in training_step.discriminators.state_dict().items()
    )
    assert moved is result.skipped is ("gradient" not in result.metrics) is (overflowing == "generator")


def test_a_step_has_the_configured_mel_floor(make_training_step):
    training_step, audio = make_training_step(), batch().audio
    training_step.config.losses.mel_floor = 1.0  # all of the audio is below it
    assert training_step._audio_losses(audio, (2 * audio).requires_grad_())["mel"] == 0


def test_a_step_has_the_spectrum_loss_if_it_has_a_weight(make_training_step):
    assert "spectrum" in make_training_step(spectrum=0.5)(batch(), 0).losses
    assert "spectrum" not in make_training_step()(batch(), 0).losses


# The teacher


def test_embeddings_of_the_teacher_have_the_frame_rate_of_the_codec(wavlm_config):
    teacher, distillation = Teacher(str(wavlm_config), True, CPU), Distillation(16, 32)
    teacher_audio = noise(2, 16_000 * 2)
    targets = teacher(teacher_audio)
    assert targets.shape == (2, 25, 32)
    louder = teacher(5 * teacher_audio + 1)
    assert relative_error(louder, targets) < 1e-3, "its input is normalized to mean 0 and variance 1"
    assert distillation(noise(2, 16, 25), targets).item() == pytest.approx(1, abs=0.5)
    with torch.no_grad():
        distillation.project.weight.copy_(torch.eye(32, 16))
        distillation.project.bias.zero_()
    same = F.pad(targets[..., :16], (0, 16))
    assert distillation(targets[..., :16].mT, same).item() == pytest.approx(0, abs=1e-5)


def test_the_teacher_is_not_in_checkpoints(make_training_step):
    names = make_training_step().unwrapped_generator.state_dict()
    assert {name for name in names if not name.startswith(("codec.", "quantizer."))} == {
        "distillation.project.weight", "distillation.project.bias",
    }  # fmt: skip


def test_pooling_windows_are_centred(wavlm_config, monkeypatch):
    """The target of a frame of 80 ms is the mean of the eight embeddings around its centre."""
    teacher = Teacher(str(wavlm_config), True, CPU)
    ramp = torch.arange(100.0)[None, :, None]

    class Output:
        last_hidden_state = ramp

    monkeypatch.setattr(type(teacher.model), "forward", lambda *_: Output)
    targets = teacher(noise(1, 32_000))[0, :, 0]
    assert targets[1:-1].tolist() == [4 * t + 1.5 for t in range(1, 24)]


def test_a_missing_teacher_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"distillation.teacher must be a hub id, a directory or a config\.json"):
        Teacher(str(tmp_path / "none.json"), True, CPU)
    with pytest.raises(ValueError, match="could not be loaded"):
        Teacher(str(tmp_path), True, CPU)


def test_without_torch_distributed_there_is_one_process():
    assert distributed.rank_and_world_size() == (0, 1)
