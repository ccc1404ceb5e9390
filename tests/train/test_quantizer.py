"""Training of the codebooks: straight-through, dropout and bypass, moving averages, unused entries, k-means."""

import pytest
import torch
import torch.nn.functional as F

from fastmimi import InputError
from fastmimi.devtools.testing import noise, relative_error
from fastmimi.train.quantizer import kmeans
from fastmimi.train.step import Generator


def quantizer_of(config, seed=0):
    torch.manual_seed(seed)
    generator = Generator(config)
    codec, latents = generator.codec, noise(4, generator.codec.config.hidden_size, 30, seed=seed)
    trained = generator.quantizer
    output = trained(codec, latents, codec.forward_context(len(latents)), 0)
    trained.update(codec, output.statistics, 0)
    return codec, trained, latents


def test_all_sequences_bypass_the_quantizer_if_raw_is_1(tiny_training):
    codec, trained, latents = quantizer_of(tiny_training(raw=1.0))
    assert torch.equal(trained(codec, latents, codec.forward_context(len(latents)), 1).latents, latents)


@pytest.mark.parametrize("architecture", ["mimi", "jodio"])
def test_quantized_sequences_equal_the_decoded_codes(tiny_training, architecture):
    codec, trained, latents = quantizer_of(tiny_training(raw=0.0, dropout=False, architecture=architecture))
    output = trained(codec, latents, codec.forward_context(len(latents)), 1)
    assert torch.equal(output.codes, codec.quantize(latents))
    assert relative_error(output.latents, codec.dequantize(output.codes)) < 1e-5
    assert (
        relative_error(output.semantic, codec.dequantize(output.codes[:, : codec.config.num_semantic_quantizers]))
        < 1e-5
    )


@pytest.mark.parametrize("kept_levels", [1, 3])
def test_levels_are_dropped_for_each_sequence(tiny_training, kept_levels):
    codec, trained, latents = quantizer_of(tiny_training(raw=0.0, kept_levels=kept_levels))
    kept = set()
    for seed in range(12):
        torch.manual_seed(seed)
        output = trained(codec, latents, codec.forward_context(len(latents)), 1)
        for row, codes in zip(output.latents, output.codes, strict=True):
            fits = [n for n in range(1, 5) if relative_error(row, codec.dequantize(codes[None, :n])[0]) < 1e-5]
            assert fits
            kept.add(fits[0])
    assert kept == set(range(kept_levels, 5))


def test_dropout_cannot_keep_more_levels_than_there_are(tiny_training):
    with pytest.raises(InputError, match=r"quantizer\.kept_levels must be at most 4, got 5"):
        quantizer_of(tiny_training(kept_levels=5))


def test_half_of_the_sequences_bypass_the_quantizer_if_raw_is_0_5(tiny_training):
    codec, trained, latents = quantizer_of(tiny_training(raw=0.5))
    torch.manual_seed(0)
    raw = 0
    for _ in range(50):
        output = trained(codec, latents, codec.forward_context(len(latents)), 1)
        raw += sum(torch.equal(row, latent) for row, latent in zip(output.latents, latents, strict=True))
    assert 70 < raw < 130


def test_distillation_gets_the_latents_until_entries_are_initialized(tiny_training):
    """The output of entries of zeros ignores the latents: their gradient would not vanish, and they would grow."""
    torch.manual_seed(0)
    generator = Generator(tiny_training(begin=5))
    codec, latents, context = generator.codec, noise(4, 32, 30), generator.codec.forward_context(4)
    semantic = generator.quantizer(codec, latents, context, 0).semantic
    part = codec.quantizer.parts(4)[0][0]
    assert relative_error(semantic, part.unproject(part.project(latents, context), context)) < 1e-6


def test_bypassing_sequences_have_the_magnitude_of_quantized_ones(tiny_training):
    """A JODIO has no projections, and its decoder gets the sum of two reconstructions of the latents."""
    config = tiny_training(raw=0.0, dropout=False, architecture="jodio", kmeans_latents=120)
    codec, trained, latents = quantizer_of(config)
    quantized = trained(codec, latents, codec.forward_context(len(latents)), 1).latents
    trained.config.raw = 1.0
    raw = trained(codec, latents, codec.forward_context(len(latents)), 1).latents
    assert 0.7 < quantized.norm() / raw.norm() < 1.1


def test_gradients_are_straight_through(tiny_training):
    codec, trained, latents = quantizer_of(tiny_training(raw=0.0, dropout=False))
    latents.requires_grad_()
    output = trained(codec, latents, codec.forward_context(len(latents)), 1)
    output.latents.sum().backward()
    parts = [part for part, _ in codec.quantizer.parts(4)]
    again = latents.detach().requires_grad_()
    sum(
        part.unproject(part.project(again, codec.forward_context(len(latents))), codec.forward_context(len(latents)))
        for part in parts
    ).sum().backward()
    assert relative_error(latents.grad, again.grad) < 1e-5


def test_initial_counts_are_scaled_to_those_of_a_batch(tiny_training):
    """An entry that k-means initialized must weigh as much as one that has been averaged over batches."""
    _, trained, _ = quantizer_of(tiny_training(raw=0.0, replace_every=1000))
    for means in trained.means:
        assert means.usage.mean().item() == pytest.approx(120 / 32, rel=1e-3)


def test_entries_are_moving_averages(tiny_training):
    """Each level averages the residuals of the levels before it."""
    codec, trained, latents = quantizer_of(tiny_training(raw=0.0, replace_every=1000))
    before = [(means.usage.clone(), means.sums.clone()) for means in trained.means]
    output = trained(codec, latents, codec.forward_context(len(latents)), 1)
    codebooks = [part.codebooks().clone() for part, _ in codec.quantizer.parts(4)]
    trained(codec, 2 * latents, codec.forward_context(len(latents)), 1)  # only the given statistics count
    trained.update(codec, output.statistics, 1)
    codes = iter(output.codes.unbind(1))
    for (part, _), means, (usage, sums), entries in zip(
        codec.quantizer.parts(4), trained.means, before, codebooks, strict=True
    ):
        rows = part.project(latents, codec.forward_context(len(latents))).transpose(1, 2).flatten(0, 1)
        for level in range(len(usage)):
            chosen = F.one_hot(next(codes).flatten(), usage.shape[1]).float()
            usage[level] = 0.99 * usage[level] + 0.01 * chosen.sum(dim=0)
            sums[level] = 0.99 * sums[level] + 0.01 * (chosen.T @ rows)
            rows = rows - chosen @ entries[level]
        assert relative_error(means.usage, usage) < 1e-5 and relative_error(means.sums, sums) < 1e-4
        assert relative_error(part.codebooks(), sums / usage[..., None]) < 1e-4, "the codec's own entries are updated"


def test_kmeans_initializes_each_level_with_the_residual_of_the_last(tiny_training):
    codec, _, latents = quantizer_of(tiny_training(raw=0.0, architecture="jodio", kmeans_latents=120))
    part, count = codec.quantizer.parts(4)[1]
    rows = latents.transpose(1, 2).flatten(0, 1)
    residuals = [rows.norm()]
    for levels in range(1, count + 1):
        codes = part.encode(latents, levels, codec.forward_context(len(latents)))
        residuals.append((latents - part.decode(codes, latents.dtype, codec.forward_context(len(latents)))).norm())
    assert residuals[1] < 0.8 * residuals[0] and residuals[2] < 0.75 * residuals[1]


def test_unused_entries_become_latents_of_the_batch(tiny_training):
    codec, trained, latents = quantizer_of(tiny_training(raw=0.0, replace_every=1))
    part, means = codec.quantizer.semantic_residual_vector_quantizer, trained.means[0]
    means.usage[0, :5], means.sums[0, :5] = 1e-3, 1.0  # far from everything
    means.write(part)
    output = trained(codec, latents, codec.forward_context(len(latents)), 1)
    trained.update(codec, output.statistics, 1)
    rows = part.project(latents, codec.forward_context(len(latents))).transpose(1, 2).flatten(0, 1)
    distance = (part.codebooks()[0, :5, None] - rows).norm(dim=-1).amin(dim=1)
    assert (distance < 1e-5).all()


def test_latents_are_collected_before_entries_are_initialized(tiny_training):
    config = tiny_training(raw=0.0, begin=2, kmeans_latents=150)
    generator = Generator(config)
    codec, latents = generator.codec, noise(2, generator.codec.config.hidden_size, 60)
    initialized = []
    for step in range(5):
        output = generator.quantizer(codec, latents, codec.forward_context(len(latents)), step)
        initialized.append(not torch.equal(output.latents, latents))
        generator.quantizer.update(codec, output.statistics, step)
    assert initialized == [False, False, False, True, True], "from step 2 on, 120 latents a step"


def test_one_all_reduce_serves_all_levels(tiny_training, monkeypatch):
    from fastmimi.train import quantizer

    calls = []
    monkeypatch.setattr(quantizer, "all_reduce_sum", lambda x: calls.append(x.numel()) or x)
    quantizer_of(tiny_training())
    assert len(calls) == 1


def test_kmeans_finds_clusters():
    centres = noise(6, 8, seed=1, scale=3.0)
    rows = (centres[torch.arange(600) % 6] + noise(600, 8, seed=2, scale=0.01))[torch.randperm(600)]
    found = kmeans(rows, 24, 20)
    assert torch.cdist(centres, found).amin(dim=1).max() < 0.1
    assert kmeans(rows[:5], 24, 3).shape == (24, 8), "fewer rows than centres"
