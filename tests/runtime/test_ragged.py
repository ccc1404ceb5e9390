"""Batches with a padding mask: each row's codes and audio are identical to those of the unpadded row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmimi.devtools.testing import CONFIGS, noise, relative_error, short_tiles, small_model

FAST = {"upsampling_ratios": [4, 3, 2]}  # frames of 48 samples


@pytest.fixture(scope="module", params=[name for name in CONFIGS if name != "mimi"])
def model(request):
    return small_model(request.param, **FAST)


def batch(model, lengths, side, fill):
    """Audio of rows of these lengths, padded with `fill`, and the mask."""
    total = max(lengths)
    audio = torch.full((len(lengths), model.config.audio_channels, total), fill)
    mask = torch.zeros(len(lengths), total, dtype=torch.bool)
    for row, length in enumerate(lengths):
        where = slice(total - length, total) if side == "left" else slice(0, length)
        audio[row, :, where] = noise(model.config.audio_channels, length, seed=row)
        mask[row, where] = True
    return audio, mask


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("last_frame", ["waveform", "layers"])
def test_rows_equal_the_unpadded_rows(model, side, last_frame):
    lengths = [1, 47, 48, 49, 1000, 480, 999]
    audio, mask = batch(model, lengths, side, fill=3.0)
    codes = model.encode(audio, padding_mask=mask, last_frame=last_frame)
    frames = model.frame_mask(mask)
    assert torch.equal(codes[:, 0] >= 0, frames)
    decoded = model.decode(codes, padding_mask=frames)
    latents = model.encode_to_latent(audio, padding_mask=mask, last_frame=last_frame)
    for row, length in enumerate(lengths):
        unpadded = audio[row : row + 1, :, mask[row]]
        assert unpadded.shape[-1] == length
        unpadded_codes = model.encode(unpadded, last_frame=last_frame)
        assert torch.equal(codes[row, :, frames[row]], unpadded_codes[0])
        samples = frames[row].repeat_interleave(model.frame_size)
        assert relative_error(decoded[row, :, samples], model.decode(unpadded_codes)[0]) < 1e-5
        assert (decoded[row, :, ~samples] == 0).all()
        unpadded_latents = model.encode_to_latent(unpadded, last_frame=last_frame)[0]
        assert relative_error(latents[row, :, frames[row]], unpadded_latents) < 1e-5
        assert (latents[row, :, ~frames[row]] == 0).all()


MODEL = small_model(**FAST)


@settings(max_examples=20)
@given(
    lengths=st.lists(st.integers(0, 700), min_size=1, max_size=5).filter(any),
    side=st.sampled_from(["left", "right"]),
    tile=st.sampled_from([1, 3, 10_000]),
)
def test_rows_of_any_length_and_in_tiles(lengths, side, tile):
    audio, mask = batch(MODEL, lengths, side, fill=float("nan"))
    for last_frame in ("waveform", "layers"):
        with short_tiles(MODEL, len(lengths), tile) as tiled:
            codes = MODEL.encode(audio, padding_mask=mask, last_frame=last_frame)
        assert bool(tiled) == (max(lengths) > 4 * MODEL.frame_size)
        for row, length in enumerate(lengths):
            if length:
                unpadded = MODEL.encode(audio[row : row + 1, :, mask[row]], last_frame=last_frame)
                assert torch.equal(codes[row, :, codes[row, 0] >= 0], unpadded[0])
            else:
                assert (codes[row] == -1).all()


def test_masks_of_other_shapes_and_dtypes():
    audio, mask = batch(MODEL, [100, 60], "right", fill=1.0)
    expected = MODEL.encode(audio, padding_mask=mask)
    for other in (mask[:, None], mask.long(), mask.float()):
        assert torch.equal(MODEL.encode(audio, padding_mask=other), expected)


@pytest.mark.parametrize(
    "mask, sentence",
    [
        (torch.tensor([[1, 0, 1, 1]]), "row 0 has a gap"),
        (torch.ones(1, 3), r"padding_mask must be \(1, 4\)"),
        (torch.ones(2, 4), r"padding_mask must be \(1, 4\)"),
        (torch.ones(4), r"padding_mask must be \[batch, samples\]"),
    ],
)
def test_bad_masks(mask, sentence):
    with pytest.raises(ValueError, match=sentence):
        MODEL.encode(torch.zeros(1, 1, 4), padding_mask=mask)


def test_codes_of_padding_are_refused_without_the_mask():
    audio, mask = batch(MODEL, [100, 20], "right", fill=0.0)
    codes = MODEL.encode(audio, padding_mask=mask)
    with pytest.raises(ValueError, match=r"got -1; -1 marks no frame: pass padding_mask"):
        MODEL.decode(codes)
