"""Fake-quantized weights: which are quantized and how, and the CPU kernels that read them as int8."""

import copy

import pytest
import torch

import fastmimi
from fastmimi.devtools.testing import STREAMABLE, as_function, assert_as_exact, longest_sum, noise, small_model
from fastmimi.kernels.cpu import _native, _pack
from fastmimi.runtime import dispatch, packing, quantized

needs_library = pytest.mark.skipif(not _native.variants(), reason="the native library is not built here")


@pytest.fixture
def every_layer(monkeypatch):
    monkeypatch.setattr(quantized, "LEAST_WEIGHTS", 1)


@pytest.fixture
def packed(monkeypatch):
    """The dtypes of all weights that are packed."""
    seen, pack = [], _pack.in_panels
    monkeypatch.setattr(_pack, "in_panels", lambda weight: seen.append(weight.dtype) or pack(weight))
    return seen


def quantized_model(name="small", **changes):
    model = small_model(name, **changes)
    quantized.round_weights(model)
    return model


@pytest.mark.parametrize("shape, channel", [((8, 5, 3), 0), ((5, 8, 4), 1), ((7, 1), 0), ((3, 1000), 0)])
@pytest.mark.parametrize("scale", [1e-30, 0.02, 1e10])
def test_round_to_grid(shape, channel, scale):
    weight = noise(*shape, scale=scale)
    weight.select(channel, 1).zero_()
    weight.select(channel, 2).neg_().abs_().neg_()  # only negative values
    values, scales = quantized.round_to_grid(weight, channel)
    largest = weight.abs().amax([d for d in range(weight.dim()) if d != channel], keepdim=True)
    assert ((values - weight).abs() <= largest / 127 * 0.501).all()
    assert all(map(torch.equal, quantized.round_to_grid(values, channel), (values, scales)))
    integers = quantized.integers(values, scales, channel)
    multiples = scales.view([-1 if d == channel else 1 for d in range(len(shape))])
    assert integers.dtype == torch.int8 and torch.equal(integers * multiples, values)
    others = [d for d in range(weight.dim()) if d != channel]
    assert ((integers.abs().amax(others) == 127) == (weight.abs().amax(others) > 0)).all()


def test_values_that_are_no_multiples_of_the_scales_give_no_integers():
    weight, scales = quantized.round_to_grid(noise(8, 20))
    assert quantized.integers(weight, scales) is not None
    assert quantized.integers(weight, None) is None
    assert quantized.integers(weight.bfloat16(), scales) is None
    assert quantized.integers(weight, scales.bfloat16()) is None
    weight[5, 7] += 1e-6
    assert quantized.integers(weight, scales) is None
    assert quantized.integers(noise(8, 20), scales) is None


def test_only_weights_with_scales_are_packed_as_int8(every_layer, packed):
    """Weights with scales are packed as int8, also in a copy of the model; equal values without scales stay fp32."""
    model, audio = quantized_model(), noise(1, 1, 48)
    copy.deepcopy(model).encode(audio)
    assert torch.int8 in packed
    assert "weight_scale" not in "".join(model.state_dict())
    packed.clear()
    other = small_model()
    other.load_state_dict(model.state_dict())
    other.encode(audio)
    assert set(packed) == {torch.float32}


def test_only_large_layers_are_quantized(monkeypatch):
    monkeypatch.setattr(quantized, "LEAST_WEIGHTS", 1000)
    model, before = quantized_model(), small_model()
    for (name, mine), theirs in zip(model.named_parameters(), before.parameters(), strict=True):
        large = mine.dim() > 1 and mine.numel() >= 1000
        assert torch.equal(mine, theirs) != large, name
        assert mine.requires_grad == theirs.requires_grad


def test_fp64_and_grouped_layers(every_layer):
    """fp64 becomes fp32; grouped transposed convolutions, whose output channels are not one dimension, stay."""
    layers = torch.nn.ModuleList([torch.nn.Linear(5, 3).double(), torch.nn.ConvTranspose1d(4, 4, 4, groups=2)])
    before = layers[1].weight.detach().clone()
    quantized.round_weights(layers)
    assert quantized.integers(layers[0].weight.detach(), layers[0].weight_scale) is not None
    assert torch.equal(layers[1].weight, before) and quantized.scales_of(layers[1]) is None


@needs_library
@pytest.mark.parametrize("name", STREAMABLE)
def test_int8_kernels_are_as_exact_as_the_reference(every_layer, packed, name):
    _as_exact_as_the_reference(name)
    assert torch.int8 in packed


@needs_library
@pytest.mark.parametrize("variant", _native.variants())
def test_int8_kernels_of_every_variant(every_layer, packed, variant):
    with _native.using(variant):
        _as_exact_as_the_reference("ratios", num_filters=12, hidden_size=72, intermediate_size=200, upsample_groups=72)
    assert set(packed) <= {torch.int8, torch.float32} and packed.count(torch.int8) > packed.count(torch.float32)


@needs_library
@pytest.mark.parametrize("variant", _native.variants())
def test_activations_of_any_magnitude(variant):
    """Each time step has its own scale: small ones next to large ones keep their precision; NaN stays in its step."""
    conv = dispatch.implementation("causal_conv1d", "cpu")
    weight, scales = quantized.round_to_grid(noise(37, 51, 1, scale=1.0))
    sizes = torch.tensor([0.0, 1e-25, 1e-6, 1.0, 3e4, 1e25, torch.nan, 1.0, 2.0])
    x = noise(1, 51, 9, scale=1.0) * sizes
    with _native.using(variant):
        y = conv(x, weight, scales=scales)[0]
    truth = (weight[:, :, 0].double() @ x[0].double())[:, sizes.isfinite()]
    assert y[:, sizes.isnan()].isnan().all()
    errors = (y[:, sizes.isfinite()] - truth).abs().amax(0)
    assert (errors <= 5e-7 * truth.abs().amax(0)).all()


def _as_exact_as_the_reference(name, **changes):
    mine, plain = (quantized_model(name, **changes) for _ in range(2))
    plain.impl = "reference"
    audio = noise(2, mine.config.audio_channels, 9 * mine.frame_size + 5)
    for method, x in (("encode_to_latent", audio), ("decode_latent", plain.encode_to_latent(audio))):
        call, reference = getattr(mine, method), as_function(plain, method)
        operands = (x, *plain.parameters())
        assert_as_exact(lambda x, *_, f=call: f(x), reference, operands, longest=longest_sum(plain))
    state = mine.new_state(2)
    latents = [mine.encode_to_latent(chunk, state=state) for chunk in audio.split(3 * mine.frame_size, dim=-1)]
    assert torch.equal(torch.cat(latents, dim=-1), mine.encode_to_latent(audio)[..., :9])
    single = mine.new_state(1)  # steps so short that threads divide the weights
    latents = [mine.encode_to_latent(chunk, state=single) for chunk in audio[:1].split(mine.frame_size, dim=-1)]
    assert torch.equal(torch.cat(latents, dim=-1), mine.encode_to_latent(audio[:1])[..., :9])


@needs_library
def test_a_residual_unit_with_one_quantized_convolution(packed, monkeypatch):
    """A residual unit's two convolutions run in one kernel: both in int8 or both in fp32."""
    monkeypatch.setattr(quantized, "LEAST_WEIGHTS", 64)
    mine, plain = quantized_model("residual_layers"), quantized_model("residual_layers")
    plain.impl = "reference"
    audio = noise(1, 1, 4 * mine.frame_size)
    assert torch.allclose(mine.encode_to_latent(audio), plain.encode_to_latent(audio), rtol=1e-4, atol=1e-5)
    assert {torch.int8, torch.float32} <= set(packed)


@needs_library
def test_equal_scales_in_another_tensor_need_no_packing():
    """A compiled model joins the scales of several weights anew at each call."""
    conv = dispatch.implementation("causal_conv1d", "cpu")
    weight, scales = quantized.round_to_grid(noise(8, 4, 3))
    first = conv(noise(1, 4, 9), weight, scales=scales)
    before = packing.preparations()
    assert torch.equal(conv(noise(1, 4, 9), weight, scales=scales.clone()), first)
    assert packing.preparations() == before


@needs_library
def test_edited_weights_are_packed_as_fp32(every_layer, packed):
    model = quantized_model()
    audio = noise(1, 1, model.frame_size)
    model.encode(audio)
    model.requires_grad_(True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-3 * noise(*parameter.shape))
    packed.clear()
    model.encode(audio)
    assert set(packed) == {torch.float32}


def test_load_with_int8_weights(tmp_path):
    fastmimi.save_pretrained(small_model(hidden_size=512, intermediate_size=512, upsample_groups=512), tmp_path)
    plain, mine = fastmimi.load(tmp_path), fastmimi.load(tmp_path, weights="int8")
    layers = "encoder_transformer.layers.0.mlp.fc1.weight", "encoder.layers.0.conv.weight"
    equal = [torch.equal(mine.get_parameter(name), plain.get_parameter(name)) for name in layers]
    assert equal == [False, True]
    ones = torch.ones(1, 6, 3, dtype=torch.int64)
    assert torch.equal(mine.dequantize(ones), plain.dequantize(ones))
    with pytest.raises(fastmimi.InputError, match="weights must be None or 'int8', got 'int4'"):
        fastmimi.load(tmp_path, weights="int4")
    with pytest.raises(fastmimi.InputError, match=r"computes in float32, got dtype=torch.bfloat16"):
        fastmimi.load(tmp_path, weights="int8", dtype=torch.bfloat16)
