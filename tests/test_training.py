"""One training step: who is trained by what, the losses, the teacher."""

import accelerate
import pytest
import torch
import torch.nn.functional as F

import fastmimi
from fastmimi.devtools.testing import noise, relative_error
from fastmimi.train import losses, processes
from fastmimi.train.config import DiscriminatorConfig, DistillationConfig
from fastmimi.train.data import Batch
from fastmimi.train.discriminators import Discriminators
from fastmimi.train.distillation import Distillation
from fastmimi.train.step import Generator, Steps, parameter_groups

RATE = 24_000


@pytest.fixture
def steps(tiny_training):
    def make(seed=0, **changes):
        torch.manual_seed(seed)
        return Steps(tiny_training(**changes), accelerate.Accelerator(cpu=True))

    return make


def batch(heard=True, seed=1):
    audio = noise(3, 1, 9600, seed=seed, scale=0.1)
    return Batch(audio, noise(3, 6400, seed=seed + 1) if heard else None, ["a", "b", "c"], [])


# Who is trained by what


@pytest.mark.parametrize("architecture", ["mimi", "jodio"])
def test_weight_decay_is_for_the_transformers(tiny_training, architecture):
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
def test_every_parameter_gets_a_gradient(steps, architecture, monkeypatch):
    learns = steps(architecture=architecture)
    for optimizer in (learns.optimizer, learns.critic):
        monkeypatch.setattr(optimizer, "step", lambda *_: None)
        monkeypatch.setattr(optimizer, "zero_grad", lambda *_: None)
    for i in range(2):  # the first one fills the codebooks
        learns(batch(seed=i), i)
    trained = [(name, p.grad) for name, p in learns.trained.named_parameters() if p.requires_grad]
    assert not [name for name, gradient in trained if gradient is None or not gradient.any()]
    assert all(p.grad is not None and p.grad.any() for p in learns.discriminators.parameters())


def test_each_side_has_its_own_step(steps, monkeypatch):
    learns, reached = steps(), []
    backward = learns.accelerator.backward

    def watched(loss):
        before = [p.grad for p in learns.discriminators.parameters()]
        assert all(grad is None or not grad.any() for grad in before), "the codec's losses left gradients there"
        backward(loss)
        reached.append(any(p.grad is not None for p in learns.trained.parameters()))

    monkeypatch.setattr(learns.accelerator, "backward", watched)
    learns(batch(), 0)
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
def test_what_is_frozen_stays(steps, tmp_path, architecture, frozen, stays, moves):
    learned = steps(architecture=architecture)
    learned(batch(), 0)
    fastmimi.save_pretrained(learned.codec, tmp_path)
    learns = steps(architecture=architecture, load=str(tmp_path), freeze=frozen)
    before = {name: tensor.clone() for name, tensor in learns.codec.state_dict().items()}
    for i in range(2):
        learns(batch(seed=i), i)
    moved = {name for name, tensor in learns.codec.state_dict().items() if not torch.equal(tensor, before[name])}
    assert not [name for name in moved if name.startswith(tuple(stays))]
    assert all(any(name.startswith(part) for name in moved) for part in moves)


def test_what_is_frozen_has_no_dropout(tiny_training, tmp_path):
    generator = Generator(tiny_training(architecture="jodio", freeze=["encoder_transformer"])).train()
    assert not any(module.training for module in generator.codec.encoder_transformer.modules())
    assert generator.codec.decoder_transformer.training


@pytest.mark.parametrize("inside", ["layers", "layers.0.codebook"])
def test_entries_are_frozen_together(tiny_training, inside):
    part = "quantizer.acoustic_residual_vector_quantizer"
    with pytest.raises(ValueError, match=rf"model\.freeze takes a quantizer whole: {part}, got '{part}\.{inside}'"):
        Generator(tiny_training(freeze=[f"{part}.{inside}"]))


def test_what_cannot_be_frozen(tiny_training):
    with pytest.raises(ValueError, match=r"model\.freeze names a quantizer that has no entries yet"):
        Generator(tiny_training(freeze=["quantizer"]))
    everything = ["encoder", "encoder_transformer", "downsample", "upsample", "decoder_transformer", "decoder"]
    with pytest.raises(ValueError, match=r"model\.freeze leaves nothing to train"):
        Generator(tiny_training(freeze=[*everything, "quantizer"]))


@pytest.mark.parametrize("architecture", ["mimi", "jodio"])
def test_new_codecs_hear(tiny_training, architecture):
    """What varies with the audio is a good part of the latents, and of the decoded audio, and about as large."""
    torch.manual_seed(0)
    codec = Generator(tiny_training(architecture=architecture)).codec.eval()
    audio = noise(8, 1, 9600)
    with torch.no_grad():
        latents = codec.encode_to_latent(audio)
        decoded = codec.decode_latent(latents)
    for found in (latents, decoded):
        assert found.var(dim=0).mean() > 0.2 * found.square().mean()
        assert 0.03 < found.norm() / found.numel() ** 0.5 / audio.std() < 30


def test_a_frozen_name_must_be_there(tiny_training):
    with pytest.raises(ValueError, match=r"model.freeze must name modules of the codec .*, got 'encodr'"):
        Generator(tiny_training(freeze=["encodr"]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cpu", "onednn", "triton"])
def test_fused_ops_train_as_the_reference(steps, kind, request, monkeypatch):
    from fastmimi.runtime import dispatch

    if kind == "triton" and not request.config.getoption("--kernels"):
        pytest.skip("runs Triton kernels: pass --kernels")
    if sentence := dispatch.why_not(kind, "resblock", dispatch.Target("cpu", torch.float32)):
        pytest.skip(sentence)
    first, second = (steps(impl=impl, kmeans_latents=75) for impl in ("reference", kind))
    for i in range(7):  # so that no two entries are the same
        first(batch(seed=i), i)
    for name in ("generator", "discriminators", "balancer"):
        getattr(second, name).load_state_dict(getattr(first, name).state_dict())
    told, gradients = [], []
    for learns in (first, second):
        learns.critic.optimizer.state.clear()
        monkeypatch.setattr(learns.optimizer, "step", lambda *_: None)
        monkeypatch.setattr(learns.optimizer, "zero_grad", lambda *_: None)
        torch.manual_seed(1)
        told.append(learns(batch(seed=1), 1))
        gradients.append({name: p.grad for name, p in learns.trained.named_parameters()})
    for name in told[0]:
        assert told[1][name].item() == pytest.approx(told[0][name].item(), rel=1e-4, abs=1e-6), name
    largest = max(gradient.abs().max() for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        assert (gradients[1][name] - gradient).abs().max() < 1e-3 * gradient.abs().max() + 1e-6 * largest, name


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("architecture", ["mimi", "jodio"])
def test_mixed_precision(tiny_training, impl, architecture, monkeypatch):
    """In bf16 where PyTorch multiplies; the search, the losses and what is kept stay fp32."""
    from accelerate.state import AcceleratorState

    charged = []
    whole = losses.adversarial
    monkeypatch.setattr(losses, "adversarial", lambda logits: charged.append(logits[0].dtype) or whole(logits))
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        torch.manual_seed(0)
        config = tiny_training(impl=impl, architecture=architecture)
        learns = Steps(config, accelerate.Accelerator(cpu=True, mixed_precision="bf16"))
        teacher = learns.trained.distillation.teacher.encoder.layers[0].feed_forward.output_dense
        seen = [_dtypes(module) for module in (learns.discriminators.scales[0].last, teacher)]
        told = [learns(batch(seed=i), i) for i in range(3)]
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert all(loss.isfinite() for losses in told for loss in losses.values())
    assert all(tensor.dtype != torch.bfloat16 for tensor in learns.trained.state_dict().values())
    assert [set(dtypes) for dtypes in seen] == [{torch.bfloat16}] * 2 and set(charged) == {torch.float32}


def _dtypes(module):
    """Of what it gives from now on."""
    seen = []
    module.register_forward_hook(lambda _, __, made: seen.append(made.dtype))
    return seen


def test_what_fp16_would_round_to_nothing_is_fp32(steps, monkeypatch):
    """The gradients of means over a batch, which nothing has scaled: accelerate's own autocast does not reach them."""
    learns = steps()
    monkeypatch.setattr(learns.accelerator.state, "_mixed_precision", "fp16")
    critics = learns.discriminators
    half = torch.autocast("cpu", torch.float16)(critics.forward)
    monkeypatch.setattr(critics, "forward", half)  # as `Accelerator.prepare` wraps it
    seen = _dtypes(critics.scales[0].last)
    learns._charged(batch().audio, noise(3, 1, 9600).requires_grad_())
    assert set(seen) == {torch.float32}


# The losses


def test_hinges():
    real, fake = [torch.tensor([2.0, 0.5])], [torch.tensor([-3.0, 0.0])]
    assert losses.discriminator_hinge(real, fake).item() == pytest.approx(0.25 + 0.5)
    assert losses.adversarial(fake).item() == pytest.approx((4 + 1) / 2)


def test_features_are_matched_as_a_share():
    real, fake = [[torch.full((2, 3), 4.0), torch.ones(1)]], [[torch.full((2, 3), 5.0), torch.ones(1)]]
    assert losses.feature_matching(real, fake).item() == pytest.approx(0.125)


def test_features_of_silence_are_matched_too():
    """Of which there is no share."""
    assert losses.feature_matching([[torch.zeros(2, 3)]], [[torch.full((2, 3), 1e-3)]]).item() == pytest.approx(1)


def test_mel_distance_is_a_logarithm():
    audio = noise(2, 1, 9600)
    assert losses.mel_distance(audio, audio, RATE).item() == 0
    assert losses.mel_distance(audio, 10 * audio, RATE).item() == pytest.approx(1, rel=1e-3)


def test_mel_distance_has_a_gradient_after_an_evaluation():
    losses._bands.cache_clear()
    audio = noise(1, 1, 9600)
    with torch.inference_mode():
        losses.mel_distance(audio, 2 * audio, RATE)
    other = noise(1, 1, 9600, seed=1).requires_grad_()
    losses.mel_distance(audio, other, RATE).backward()
    assert other.grad.any()


def test_the_balancer_gives_each_loss_its_share():
    balancer = losses.Balancer({"a": 1.0, "b": 3.0}, norm=2.0, decay=0.5)
    audio = noise(4, 1, 100).requires_grad_()
    first, second = torch.zeros(4, 1, 100), torch.zeros(4, 1, 100)
    first[..., :50], second[..., 50:] = 1e-4, 1e5
    for _ in range(3):
        gradient = balancer({"a": (audio * first).sum(), "b": (audio * second).sum()}, audio)
    norms = gradient.flatten(1)[:, :50].norm(dim=1), gradient.flatten(1)[:, 50:].norm(dim=1)
    assert norms[0].tolist() == pytest.approx([0.5] * 4) and norms[1].tolist() == pytest.approx([1.5] * 4)


def test_discriminators_look_at_several_scales():
    critics = Discriminators(DiscriminatorConfig())
    logits, features = critics(noise(2, 1, 4800))
    assert [scale.n_fft for scale in critics.scales] == [2048, 1024, 512, 256, 128]
    assert all(score.shape[:2] == (2, 1) and len(layers) == 5 for score, layers in zip(logits, features, strict=True))
    assert [layers[0].shape for layers in features[:2]] == [(2, 32, 10, 1025), (2, 32, 19, 513)]


@pytest.mark.slow
def test_new_discriminators_hear_quiet_sound():
    """As they hear loud sound: what they say of it is as much smaller, and no less of what they take."""
    torch.manual_seed(0)
    critics, audio = Discriminators(DiscriminatorConfig()), noise(4, 1, 9600)
    with torch.no_grad():
        loud, features = critics(audio)
        quiet, _ = critics(audio * 1e-4)
    for more, less in zip(loud, quiet, strict=True):
        assert relative_error(less * 1e4, more) < 1e-4
    for scale in features:
        assert 0.2 < scale[-1].norm() / scale[-1].numel() ** 0.5 / audio.std() < 5


@pytest.mark.slow
def test_discriminators_learn_to_tell(steps):
    """Their hinge is 2 where they cannot, 0 where they always can."""
    learns = steps(lr=2e-3)
    real = noise(3, 1, 9600, seed=1, scale=0.1)
    told = [learns._criticise(real, real.cumsum(dim=-1) * 0.05).item() for _ in range(60)]
    assert told[0] == pytest.approx(2, abs=0.1) and told[-1] < 1


# The teacher


def test_the_teacher_speaks_at_the_codecs_rate(wavlm_config):
    distillation = Distillation(DistillationConfig(teacher=str(wavlm_config)), 16)
    heard = noise(2, 16_000 * 2)
    targets = distillation.targets(heard)
    assert targets.shape == (2, 25, 32)
    louder = distillation.targets(5 * heard + 1)
    assert relative_error(louder, targets) < 1e-3, "it hears audio of mean 0 and variance 1"
    assert distillation(noise(2, 16, 25), targets).item() == pytest.approx(1, abs=0.5)
    with torch.no_grad():
        distillation.project.weight.copy_(torch.eye(32, 16))
        distillation.project.bias.zero_()
    same = F.pad(targets[..., :16], (0, 16))
    assert distillation(targets[..., :16].mT, same).item() == pytest.approx(0, abs=1e-5)


def test_pooling_is_centred(wavlm_config, monkeypatch):
    """Frame t of 80 ms is the mean of eight of the teacher's, around its middle."""
    distillation = Distillation(DistillationConfig(teacher=str(wavlm_config)), 16)
    ramp = torch.arange(100.0)[None, :, None]

    class Answer:
        last_hidden_state = ramp

    monkeypatch.setattr(type(distillation.teacher), "forward", lambda *_: Answer)
    targets = distillation.targets(noise(1, 32_000))[0, :, 0]
    assert targets[1:-1].tolist() == [4 * t + 1.5 for t in range(1, 24)]


def test_a_teacher_must_be_there(tmp_path):
    with pytest.raises(ValueError, match=r"distillation.teacher must be a hub id, a directory or a config\.json"):
        Distillation(DistillationConfig(teacher=str(tmp_path / "none.json")), 16)
    with pytest.raises(ValueError, match="could not be loaded"):
        Distillation(DistillationConfig(teacher=str(tmp_path)), 16)


def test_alone_there_is_one_process():
    assert processes.place() == (0, 1)
