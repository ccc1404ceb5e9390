"""JODIO: the printed module tree and its repairs, chunking, and equal results of all backends."""

import copy
import csv
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fastmimi
from fastmimi import JodioConfig, JodioModel
from fastmimi.checkpoints import weights
from fastmimi.devtools.testing import assert_same_codes, chunks, noise, relative_error
from fastmimi.models.config import JodioTransformerConfig

FRAME = 1920
BACKENDS = ["reference", "cpu", "onednn", pytest.param("triton", marks=pytest.mark.kernels)]
REPAIRED = {  # path of the tree: its row as printed, and as it is
    "": (("JODIO", ""), ("JodioModel", "")),
    "post_vq_proj": (
        ("Linear", "in_features=6, out_features=896, bias=True"),
        ("Linear", "in_features=256, out_features=896, bias=True"),
    ),
    "quantizer_out_proj": (None, ("Linear", "in_features=1028, out_features=256, bias=True")),
}


def small(seed=0, **changes):
    return weights.random(JodioConfig.small(**changes), seed).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def whole():
    """The full-size model, without its weights."""
    with torch.device("meta"):
        return JodioModel()


def printed_tree():
    """{path: (class, arguments)} of the printed tree, with ranges of indices expanded."""
    tree = {}
    with (Path(__file__).resolve().parents[1] / "data" / "jodio_tree.tsv").open(newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            ranges = [range(int(a), int(b) + 1) for a, b in re.findall(r"\b(\d+)-(\d+)\b", row["path"])]
            assert len(ranges) <= 1
            for i in ranges[0] if ranges else [""]:
                path = re.sub(r"\b\d+-\d+\b", str(i), row["path"])
                tree[path] = (row["class"], row["arguments"])
    return tree


def test_the_tree_is_as_printed_but_for_the_repairs(whole):
    mine = {path: (type(m).__name__, m.extra_repr()) for path, m in whole.named_modules()}
    printed = printed_tree()
    assert len(printed) == 547
    for path, (before, after) in REPAIRED.items():
        assert printed.get(path) == before and mine[path] == after
    differing = {path for path in printed.keys() | mine.keys() if printed.get(path) != mine.get(path)}
    assert differing == REPAIRED.keys()


def test_the_documentation_names_each_repair():
    page = Path(__file__).resolve().parents[2].joinpath("docs", "jodio.md").read_text()
    for text in (JodioConfig.__doc__, page):
        assert all(name in text for name in ("post_vq_proj", "quantizer_out_proj", "input_proj", "as_printed_padding"))


def test_the_parameters_are_those_of_the_printed_modules(whole):
    count = sum(p.numel() for p in whole.parameters())
    conv = 896 * 896 * 3 + 896
    normed = conv + 896
    blocks = 8 * (3 * normed + conv) + 2 * conv + (896 * 3 + 896) + (896 * 3 + 1)
    layer = 4 * 1028 * 1024 + 2 * 1028 * 4112 + 2 * 1028
    after = 4 * 256 * 256 + 2 * 256 * 1024 + 2 * 256
    projections = 896 * 1028 + 1028 + 1028 * 256 + 256 + 256 * 896 + 896
    assert count == blocks + 22 * layer + 1028 + 4 * after + 256 + 10 * 2048 * 1028 + projections


# Numbers


def fp64_latents(model, audio):
    """Latents of audio [B, 1, N] in fp64 with PyTorch's functions, attention with a dense mask; and the fp64 model."""
    model = copy.deepcopy(model).double()

    def conv(module, x):
        padding = (module.kernel_size[0] - 1) * module.dilation[0]
        return F.conv1d(F.pad(x, (padding, 0)), module.weight, module.bias, module.stride, 0, module.dilation)

    x = conv(model.encoder.input_proj, audio.double())
    for block in model.encoder.conv_blocks:
        for layer in block.layers:
            x = F.silu(conv(layer[0], x))
        x = conv(block.downsample, x)
    x = model.pre_vq_proj(conv(model.encoder.final_conv, x).transpose(1, 2))
    return fp64_transformer(model.encoder_transformer, x, model.config.sliding_window).transpose(1, 2), model


def fp64_transformer(transformer, x, window):
    steps = torch.arange(x.shape[1])
    visible = (steps <= steps[:, None]) & (steps > steps[:, None] - window)

    def norm(module, x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * module.weight

    for block in transformer.layers:
        a, n = block.attention, norm(block.attention_norm, x)
        heads = [p(n).unflatten(-1, (-1, a.head_dim)).transpose(1, 2) for p in (a.q_proj, a.k_proj, a.v_proj)]
        half = a.head_dim // 2
        angle = steps[:, None] * 10_000.0 ** (-torch.arange(half).double() / half)
        rotation = torch.polar(torch.ones_like(angle), angle)
        for i in (0, 1):
            pair = torch.complex(*(part.contiguous() for part in heads[i].split(half, dim=-1))) * rotation
            heads[i] = torch.cat([pair.real, pair.imag], dim=-1)
        scores = (heads[0] @ heads[1].transpose(2, 3) / a.head_dim**0.5).masked_fill(~visible, -torch.inf)
        x = x + a.out_proj((scores.softmax(-1) @ heads[2]).transpose(1, 2).flatten(-2))
        hidden = block.feed_forward.linear1(norm(block.mlp_norm, x))
        x = x + block.feed_forward.linear2(hidden * torch.special.ndtr(hidden))
    return norm(transformer.norm, x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_encoder_and_decoder_equal_an_explicit_computation(backend):
    model = small()
    model.impl = backend
    audio = noise(2, 1, 9 * FRAME)
    latents, wide = fp64_latents(model, audio)
    assert relative_error(model.encode_to_latent(audio), latents) < 1e-5

    def up(module, x):
        stride = module.stride[0]
        y = F.conv_transpose1d(x, module.weight, module.bias, stride, output_padding=max(0, stride - 3))
        return y[..., : x.shape[-1] * stride]

    codes = model.encode(audio)
    x = model.dequantize(codes).double()
    parts = (model.semantic_rvq, model.acoustic_rvq)
    books = [level.codebook.weight for part in parts for level in part.quantizers]
    assert relative_error(x, sum(b[c].transpose(1, 2) for b, c in zip(books, codes.unbind(1), strict=True))) < 1e-6
    x = fp64_transformer(
        wide.decoder_transformer, wide.quantizer_out_proj(x.transpose(1, 2)), model.config.sliding_window
    )
    x = up(wide.decoder.initial_upsample, wide.post_vq_proj(x).transpose(1, 2))
    for block in wide.decoder.conv_blocks:
        x = up(block.upsample, x)
        for layer in block.layers:
            conv = layer[0]
            padding = 2 * conv.dilation[0]
            x = F.silu(F.conv1d(F.pad(x, (padding, 0)), conv.weight, conv.bias, 1, 0, conv.dilation))
    last = wide.decoder.final_proj
    truth = F.conv1d(F.pad(x, (2, 0)), last.weight, last.bias)
    assert truth.shape == audio.shape
    assert relative_error(model.decode(codes), truth) < 1e-5


@pytest.mark.parametrize("samples", [1, FRAME - 1, FRAME, FRAME + 1, 7 * FRAME + 33])
def test_lengths(samples):
    model = small()
    codes = model.encode(noise(1, 1, samples))
    frames = -(-samples // FRAME)
    assert codes.shape == (1, 5, frames) and model.decode(codes).shape == (1, 1, frames * FRAME)
    assert model.encode(noise(1, 1, samples), last_frame="layers").shape == codes.shape


def test_both_quantizers_get_the_same_latents():
    """They work in parallel: the acoustic codes do not depend on the semantic codebooks."""
    model = small()
    audio = noise(1, 1, 4 * FRAME)
    codes = model.encode(audio)
    for level in model.semantic_rvq.quantizers:
        level.codebook.weight.copy_(level.codebook.weight.flip(0))
    again = model.encode(audio)
    assert torch.equal(again[:, 2:], codes[:, 2:]) and not torch.equal(again[:, :2], codes[:, :2])
    assert_same_codes(again, again, model.encode_to_latent(audio), model)


# Streams


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_chunking_equals_the_whole(backend):
    model = small()
    # Triton's interpreter takes seconds for each frame of the streams; 7 frames are two attention windows
    batch, frames = (2, 7) if backend == "triton" else (3, 11)
    audio = noise(batch, 1, frames * FRAME + 100)
    model.impl = "reference"
    codes = model.encode(audio)
    sound = model.decode(codes)
    model.impl = backend
    state = model.new_state(batch)
    encoded = [model.encode(chunk, state=state) for chunk in audio.split(chunks(audio.shape[-1], 1, 5000), dim=-1)]
    assert torch.equal(torch.cat([*encoded, model.flush(state)], dim=-1), codes)
    decoded = [model.decode(chunk, state=state) for chunk in codes.split(chunks(codes.shape[-1], 2, 5), dim=-1)]
    assert relative_error(torch.cat(decoded, dim=-1), sound) < 1e-5


def test_masked_streams_wait_and_reset_streams_begin_again():
    model = small()
    audio = noise(2, 1, 8 * FRAME)
    codes, state = model.encode(audio), model.new_state(2)
    first = model.encode(audio[..., : 4 * FRAME], state=state)
    state.exec_mask[1] = False
    active = model.encode(audio[..., 4 * FRAME : 6 * FRAME], state=state)
    assert (active[1] == -1).all() and torch.equal(active[0], codes[0, :, 4:6])
    state.exec_mask[1] = True
    rest = torch.stack([audio[0, :, 6 * FRAME :], audio[1, :, 4 * FRAME : 6 * FRAME]])
    assert torch.equal(model.encode(rest, state=state), torch.stack([codes[0, :, 6:], codes[1, :, 4:6]]))
    state.reset(torch.tensor([True, False]))
    restarted = model.encode(audio[:, :, : 2 * FRAME].clone(), state=state)
    assert torch.equal(restarted[0], codes[0, :, :2]) and torch.equal(first, codes[..., :4])
    assert state.clone().state_dict().keys() == state.state_dict().keys()


def test_padded_rows_equal_the_unpadded_rows():
    model = small()
    audio, mask = noise(3, 1, 6 * FRAME), torch.ones(3, 6 * FRAME, dtype=torch.bool)
    mask[1, 3 * FRAME + 7 :] = mask[2, : 2 * FRAME] = False
    codes = model.encode(audio, padding_mask=mask)
    assert torch.equal(codes[1, :, :4], model.encode(audio[1:2, :, : 3 * FRAME + 7])[0])
    assert torch.equal(codes[2, :, 2:], model.encode(audio[2:, :, 2 * FRAME :])[0])
    assert (codes[1, :, 4:] == -1).all() and (codes[2, :, :2] == -1).all()


def test_tiles_equal_the_whole(monkeypatch):
    from fastmimi.runtime import tiles

    model, audio = small(), noise(1, 1, 12 * FRAME)
    monkeypatch.setattr(tiles, "SUBTILE_SAMPLES", 100 * FRAME)
    codes = model.encode(audio)
    sound = model.decode(codes)
    monkeypatch.setattr(tiles, "TILE_SAMPLES", 3 * FRAME)
    monkeypatch.setattr(tiles, "SUBTILE_SAMPLES", FRAME)
    assert torch.equal(model.encode(audio), codes)
    assert relative_error(model.decode(codes), sound) < 1e-5


# As printed


def test_as_printed_padding_equals_pytorchs_modules():
    """The forward passes of PyTorch's own modules with the printed arguments."""
    model = small(as_printed_padding=True)
    x = noise(1, 1, 3 * FRAME).double()
    wide = copy.deepcopy(model).double()

    def run(module, x):
        if isinstance(module, torch.nn.ConvTranspose1d):
            return torch.nn.ConvTranspose1d.forward(module, x)
        return torch.nn.Conv1d.forward(module, x)

    x = run(wide.encoder.input_proj, x)
    for block in wide.encoder.conv_blocks:
        for layer in block.layers:
            x = F.silu(run(layer[0], x))
        x = run(block.downsample, x)
    x = wide.pre_vq_proj(run(wide.encoder.final_conv, x).transpose(1, 2))
    truth = fp64_transformer(wide.encoder_transformer, x, model.config.sliding_window).transpose(1, 2)
    for backend in ("reference", "cpu", "onednn"):
        model.impl = backend
        assert relative_error(model.encode_to_latent(noise(1, 1, 3 * FRAME)), truth) < 1e-5
    codes = model.encode(noise(1, 1, 3 * FRAME))
    x = wide.quantizer_out_proj(model.dequantize(codes).double().transpose(1, 2))
    x = wide.post_vq_proj(fp64_transformer(wide.decoder_transformer, x, model.config.sliding_window)).transpose(1, 2)
    x = run(wide.decoder.initial_upsample, x)
    for block in wide.decoder.conv_blocks:
        x = run(block.upsample, x)
        for layer in block.layers:
            x = F.silu(run(layer[0], x))
    truth = run(wide.decoder.final_proj, x)
    for backend in ("reference", "cpu", "onednn"):
        model.impl = backend
        assert relative_error(model.decode(codes), truth) < 1e-5


@pytest.mark.parametrize("call", [
    lambda model: model.new_state(),
    lambda model: model.encode(noise(1, 1, 100), padding_mask=torch.ones(1, 100, dtype=torch.bool)),
])  # fmt: skip
def test_as_printed_padding_refuses_streams_and_masks(call):
    with pytest.raises(fastmimi.InputError, match="as_printed_padding=True"):
        call(small(as_printed_padding=True))


# Weights


def test_save_and_load(tmp_path):
    model, audio = small(3), noise(1, 1, 3 * FRAME)
    model.save_pretrained(tmp_path)
    for again in (JodioModel.from_pretrained(tmp_path), fastmimi.load(tmp_path)):
        assert again.config == model.config and torch.equal(again.encode(audio), model.encode(audio))
    assert weights.fingerprint(again) == weights.fingerprint(model) != weights.fingerprint(small(4))


def test_a_mimi_is_not_a_jodio(tmp_path):
    fastmimi.save_pretrained(weights.random(fastmimi.MimiCodecConfig(num_hidden_layers=1, num_filters=8)), tmp_path)
    with pytest.raises(fastmimi.InputError, match="holds a Mimi, not a JodioModel"):
        JodioModel.from_pretrained(tmp_path)
    with pytest.raises(fastmimi.InputError, match="only a Mimi can be saved in Kyutai's layout, got a JodioModel"):
        fastmimi.save_kyutai(small(), tmp_path / "x.safetensors")


def test_tensors_that_do_not_fit_are_listed(tmp_path):
    small().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"channels": 8', '"channels": 9'))
    with pytest.raises(fastmimi.InputError, match=r"does not fit the model: .*must be \(9, "):
        fastmimi.load(tmp_path)


def test_weight_norm_is_computed_once_and_again_after_an_edit():
    from fastmimi.models.seanet import weight_of

    model = small()
    conv = model.encoder.conv_blocks[0].layers[0][0]
    once = weight_of(conv)
    assert weight_of(conv) is once and torch.equal(once, conv.weight)
    audio = noise(1, 1, 2 * FRAME)
    before = model.encode_to_latent(audio)
    conv.parametrizations.weight.original0.mul_(2.0)
    assert torch.equal(weight_of(conv), conv.weight) and not torch.equal(model.encode_to_latent(audio), before)


def test_weight_norm_along_any_dimension():
    from torch.nn.utils.parametrizations import weight_norm

    from fastmimi.models.seanet import weight_of

    conv = torch.nn.Conv1d(3, 5, 4).requires_grad_(False)
    before = conv.weight.clone()
    assert relative_error(weight_of(weight_norm(conv, dim=1)), before) < 1e-6


def test_autocast_keeps_fp32_results():
    model, audio = small(), noise(1, 1, 6 * FRAME)
    latents = model.encode_to_latent(audio)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model.encode_to_latent(audio)
        assert model.decode(model.encode(audio)).dtype == torch.float32
    assert mixed.dtype == torch.float32 and 0 < relative_error(mixed, latents) < 0.1


def test_half_precision_keeps_the_codebooks_in_fp32():
    model, audio = small(), noise(1, 1, 6 * FRAME)
    books, latents = model.semantic_rvq.codebooks(), model.encode_to_latent(audio)
    model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16 and torch.equal(model.semantic_rvq.codebooks(), books)
    assert relative_error(model.encode_to_latent(audio), latents) < 0.1
    assert model.decode(model.encode(audio)).isfinite().all()


def test_gradients_reach_all_but_the_codebooks():
    """Codebooks are updated by moving averages, not by gradients."""
    model = small().train().requires_grad_(True)
    _, latents = model.straight_through(noise(1, 1, 4 * FRAME))
    model.decode_latent(latents).square().mean().backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == {name for name, _ in model.named_parameters() if ".codebook." in name}


def test_dropout_only_in_training():
    model, audio = small(), noise(1, 1, 4 * FRAME)
    assert torch.equal(model.encode_to_latent(audio), model.encode_to_latent(audio))
    model.train()
    assert not torch.equal(model.encode_to_latent(audio), model.encode_to_latent(audio))


def test_copies_are_independent():
    model, audio = small(), noise(1, 1, 2 * FRAME)
    codes, copied = model.encode(audio), copy.deepcopy(model)
    copied.semantic_rvq.quantizers[0].codebook.weight.zero_()
    assert torch.equal(model.encode(audio), codes) and not torch.equal(copied.encode(audio), codes)


# Bad input


@pytest.mark.parametrize("make, sentence", [
    (lambda: JodioConfig(channels=0), "channels must be greater than or equal to 1, got 0"),
    (lambda: JodioConfig(strides=[4, 0]), r"strides\.1 must be greater than or equal to 1, got 0"),
    (lambda: JodioConfig(dilations=[]), r"dilations must have at least 1 item after validation, not 0, got \[\]"),
    (lambda: JodioConfig(dropout=1.0), "dropout must be less than 1, got 1.0"),
    (lambda: JodioTransformerConfig(head_dim=7), "head_dim must be even, got 7"),
    (lambda: small().encode(noise(1, 2, 5)), r"audio must be \[batch, 1, samples\], got \(1, 2, 5\)"),
    (lambda: small().decode(torch.zeros(1, 1, 4, dtype=torch.long)), "codebooks must be from 2 to 5, got 1"),
    (lambda: small().decode(torch.full((1, 5, 4), 32)), r"codes must lie in \[0, 32\), got 32"),
])  # fmt: skip
def test_bad_input(make, sentence):
    with pytest.raises(fastmimi.InputError, match=sentence):
        make()


def test_int8_is_for_mimi(tmp_path):
    small().save_pretrained(tmp_path)
    with pytest.raises(fastmimi.InputError, match="weights='int8' is only for Mimi"):
        fastmimi.load(tmp_path, weights="int8")
