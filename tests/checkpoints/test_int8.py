"""Weights stored as int8 and scales."""

import pytest
import torch

from fastmimi.checkpoints.int8 import dequantize, quantize
from fastmimi.devtools.testing import noise
from fastmimi.errors import InputError
from fastmimi.runtime.quantized import round_to_grid


@pytest.mark.parametrize("channel", [0, 1])
def test_what_is_stored_are_the_values_on_the_grid_to_the_bit(channel):
    weight = noise(5, 7, 3)
    weight.select(channel, 2).zero_()
    stored = quantize({"weight": weight, "bias": noise(5)}, {"weight": channel})
    assert stored["weight"].dtype == torch.int8 and stored["bias"].dtype == torch.float16
    assert stored["weight.scale"].numel() == weight.shape[channel]
    loaded = dequantize(stored)
    assert loaded.keys() == {"weight", "bias"} and loaded["bias"] is stored["bias"]
    assert torch.equal(loaded["weight"], round_to_grid(weight, channel)[0])
    again = quantize(loaded, {"weight": channel})
    assert all(torch.equal(again[name], tensor) for name, tensor in stored.items()), "storing again changes nothing"


@pytest.mark.parametrize("scale", [torch.ones(4, 1), torch.ones(5), torch.ones(5, 1, dtype=torch.float16)])
def test_scales_that_do_not_fit_are_named(scale):
    with pytest.raises(InputError, match=r"weight\.scale must be float32 and broadcast to \(5, 7\), got"):
        dequantize({"weight": torch.ones(5, 7, dtype=torch.int8), "weight.scale": scale})
