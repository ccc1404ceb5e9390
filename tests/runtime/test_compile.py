"""torch.compile(fullgraph=True) and torch.export of both directions, with each backend."""

import pytest
import torch

import fastmimi
from fastmimi.devtools.testing import SMALL, noise, relative_error, small_model

pytestmark = pytest.mark.slow

IMPLS = ["reference", "cpu", "onednn", pytest.param("triton", marks=pytest.mark.kernels)]


def model_with(impl, **changes):
    model = small_model(upsampling_ratios=[4, 2], frame_rate=1500, num_hidden_layers=1, **changes)
    model.impl = impl
    return model.cuda() if impl == "triton" and torch.cuda.is_available() else model


class Direction(torch.nn.Module):
    """A method of a model as a module, which torch.export takes."""

    def __init__(self, model, method):
        super().__init__()
        self.model, self.method = model, method

    def forward(self, x):
        return getattr(self.model, self.method)(x)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dynamic", [False, True])
@torch.no_grad()
def test_compile(impl, dynamic):
    torch.compiler.reset()
    model = model_with(impl)
    encode, decode = (
        torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic) for f in (model.encode, model.decode)
    )
    for samples in (1000, 1357) if dynamic else (1000,):
        audio = noise(2, 1, samples).to(model.device)
        codes = model.encode(audio)
        assert torch.equal(encode(audio), codes)
        assert relative_error(decode(codes), model.decode(codes)) < 1e-6


@pytest.mark.parametrize("impl", IMPLS)
def test_compiled_training_step(impl):
    torch.compiler.reset()
    model = model_with(impl).requires_grad_(True)
    audio = noise(1, 1, 480).to(model.device)

    def loss(audio):
        _, latents = model.straight_through(audio)
        return model.decode_latent(latents).square().mean()

    gradients = []
    for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        f(audio).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert relative_error(gradients[1][name], gradient) < 1e-5, name


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_export(impl, strict):
    model = model_with(impl)
    audio = noise(2, 1, 1000).to(model.device)
    codes = model.encode(audio)
    for method, x, truth in (("encode", audio, codes), ("decode", codes, model.decode(codes))):
        program = torch.export.export(Direction(model, method), (x,), strict=strict)
        assert relative_error(program.module()(x), truth) < 1e-6
        ours = {str(node.target) for node in program.graph.nodes if "fastmimi" in str(node.target)}
        assert bool(ours) == (impl != "reference")  # the reference is plain ATen


def test_compiled_by_inductor():
    torch.compiler.reset()
    model = model_with("reference")
    audio = noise(1, 1, 480)
    assert torch.equal(torch.compile(model.encode, fullgraph=True)(audio), model.encode(audio))


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_transformers_drop_in(masked):
    """A model that was never called: what it binds at its first call must not be traced."""
    torch.compiler.reset()
    audio, mask = noise(2, 1, 4000), torch.ones(2, 4000, dtype=torch.bool)
    mask[1, 2500:] = not masked
    arguments = {"padding_mask": mask} if masked else {}
    model = fastmimi.MimiModel(fastmimi.MimiConfig(**{**SMALL, "num_hidden_layers": 1})).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(audio, **arguments)
    program = torch.export.export(fastmimi.MimiModel(model.config).eval(), (audio,), arguments)
    exported = program.module()(audio, **arguments)
    assert exported.audio_codes.shape == compiled.audio_codes.shape
    truth = model(audio, **arguments)
    assert torch.equal(compiled.audio_codes, truth.audio_codes)
    assert relative_error(compiled.audio_values, truth.audio_values) < 1e-6
