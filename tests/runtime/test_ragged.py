"""Batches with a padding mask: each item's codes and audio are those of the item alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmimi.devtools.testing import CONFIGS, noise, relative_error, small_model

FAST = {"upsampling_ratios": [4, 3, 2]}  # frames of 48 samples


@pytest.fixture(scope="module", params=[name for name in CONFIGS if name != "mimi"])
def model(request):
    return small_model(request.param, **FAST)


def batch(model, items, side, fill):
    """Items of these lengths in one tensor, padded with `fill`, and the mask."""
    total = max(items)
    audio = torch.full((len(items), model.config.audio_channels, total), fill)
    mask = torch.zeros(len(items), total, dtype=torch.bool)
    for row, length in enumerate(items):
        where = slice(total - length, total) if side == "left" else slice(0, length)
        audio[row, :, where] = noise(model.config.audio_channels, length, seed=row)
        mask[row, where] = True
    return audio, mask


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("last_frame", ["waveform", "layers"])
def test_each_item_as_if_alone(model, side, last_frame):
    items = [1, 47, 48, 49, 1000, 480, 999]
    audio, mask = batch(model, items, side, fill=3.0)
    codes = model.encode(audio, padding_mask=mask, last_frame=last_frame)
    frames = model.frame_mask(mask)
    assert torch.equal(codes[:, 0] >= 0, frames)
    decoded = model.decode(codes, padding_mask=frames)
    latents = model.encode_to_latent(audio, padding_mask=mask, last_frame=last_frame)
    for row, length in enumerate(items):
        alone = audio[row : row + 1, :, mask[row]]
        assert alone.shape[-1] == length
        codes_alone = model.encode(alone, last_frame=last_frame)
        assert torch.equal(codes[row, :, frames[row]], codes_alone[0])
        samples = frames[row].repeat_interleave(model.frame_size)
        assert relative_error(decoded[row, :, samples], model.decode(codes_alone)[0]) < 1e-5
        assert (decoded[row, :, ~samples] == 0).all()
        latents_alone = model.encode_to_latent(alone, last_frame=last_frame)[0]
        assert relative_error(latents[row, :, frames[row]], latents_alone) < 1e-5
        assert (latents[row, :, ~frames[row]] == 0).all()


MODEL = small_model(**FAST)


@settings(max_examples=20)
@given(
    items=st.lists(st.integers(0, 700), min_size=1, max_size=5).filter(any),
    side=st.sampled_from(["left", "right"]),
    tile=st.sampled_from([1, 3, 10_000]),
)
def test_any_lengths_also_in_tiles(items, side, tile):
    audio, mask = batch(MODEL, items, side, fill=float("nan"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastmimi.runtime.tiles.TILE_SAMPLES", tile * 48 * len(items))
        for last_frame in ("waveform", "layers"):
            codes = MODEL.encode(audio, padding_mask=mask, last_frame=last_frame)
            for row, length in enumerate(items):
                if length:
                    alone = MODEL.encode(audio[row : row + 1, :, mask[row]], last_frame=last_frame)
                    assert torch.equal(codes[row, :, codes[row, 0] >= 0], alone[0])
                else:
                    assert (codes[row] == -1).all()


def test_masks_of_other_shapes_and_types():
    audio, mask = batch(MODEL, [100, 60], "right", fill=1.0)
    expected = MODEL.encode(audio, padding_mask=mask)
    for form in (mask[:, None], mask.long(), mask.float()):
        assert torch.equal(MODEL.encode(audio, padding_mask=form), expected)


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


def test_codes_that_mark_no_frame_ask_for_their_mask():
    audio, mask = batch(MODEL, [100, 20], "right", fill=0.0)
    codes = MODEL.encode(audio, padding_mask=mask)
    with pytest.raises(ValueError, match=r"got -1; -1 marks no frame: pass padding_mask"):
        MODEL.decode(codes)
