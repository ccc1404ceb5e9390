"""The cost model, compared with PyTorch's FLOP counter on a run of the reference."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastmimi import JodioConfig, MimiCodecConfig
from fastmimi.checkpoints.weights import random
from fastmimi.devtools import costs
from fastmimi.devtools.testing import CONFIGS, noise


@pytest.mark.parametrize("config", [
    MimiCodecConfig.from_dict(CONFIGS["small"]), MimiCodecConfig.from_dict(CONFIGS["shortcut"]),
    MimiCodecConfig.from_dict(CONFIGS["attention"]), JodioConfig.small(),
])  # fmt: skip
@torch.no_grad()
def test_total_flops_agree_with_pytorchs_counter(config):
    """Except for attention, of which PyTorch counts whole blocks, and for sums of decoded entries, which it ignores."""
    found = costs.stages(config)
    model = random(config).eval()
    model.impl = "reference"
    frames = 10
    with FlopCounterMode(display=False) as counter:
        model.decode(model.encode(noise(1, config.audio_channels, frames * config.frame_size)))
    counted = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counted.items() if "attention" not in str(op)) / (frames / config.frame_rate)
    assert costs.total(found).flops == pytest.approx(products, rel=0.05)
    assert costs.total(found).parameters == sum(t.numel() for t in model.state_dict().values())


def test_jodios_cost_is_dominated_by_its_first_convolutions():
    """896 x 896 x 3 multiply-adds for each of 24,000 samples, three times, and for each of 6,000 in the strided one."""
    stages = {stage.name: stage for stage in costs.stages(JodioConfig())}
    assert stages["encoder.conv_blocks.0"].flops == 2 * 896 * 896 * 3 * (3 * 24_000 + 6_000)
    assert stages["encoder.conv_blocks.0"].bytes == 4 * 896 * (3 * 2 * 24_000 + 24_000 + 6_000)
    assert [stages[f"encoder.conv_blocks.{i}"].rate for i in range(4)] == [6000, 1200, 200, 25]
    assert sum(s.flops for s in stages.values()) > 980e9


def test_the_lower_bound_is_that_of_the_binding_rate():
    ceilings = {"fp32 GFLOP/s": 100.0, "copy GB/s": 10.0}
    assert costs.Stage("", flops=5e9, bytes=1e7).seconds(ceilings) == 0.05
    assert costs.Stage("", flops=5e9, bytes=1e9).seconds(ceilings) == 0.1


@pytest.mark.slow
def test_peak_rates_are_measured():
    found = costs.ceilings()
    assert found.keys() == {"fp32 GFLOP/s", "bf16 GFLOP/s", "copy GB/s", "read GB/s"}
    assert all(0.01 < value < 1e6 for value in found.values())
