"""Muon: what it orthogonalizes, which parameters it updates, and that a resumed run goes on alike."""

import accelerate
import pytest
import torch
from torch import nn

from fastmimi.train import muon
from fastmimi.train.muon import Muon, orthogonalized
from fastmimi.train.step import TrainingStep


@pytest.mark.parametrize("shape", [(16, 16), (40, 200), (200, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_values_become_one(monkeypatch, shape, dtype):
    monkeypatch.setattr(muon, "_fast_dtype", lambda device: dtype)
    torch.manual_seed(0)
    left, values, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.logspace(0, -1.5, len(values))
    found = orthogonalized(left @ values.diag() @ right)
    assert found.dtype == torch.float32 and found.shape == shape
    assert torch.linalg.svdvals(found).min() > 0.6 and torch.linalg.svdvals(found).max() < 1.3
    aligned = left.t() @ found @ right.t()  # the same singular vectors: diagonal
    assert (aligned - aligned.diagonal().diag()).abs().max() < (1e-3 if dtype == torch.float32 else 0.1)


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(1, 16, 3), nn.ConvTranspose1d(16, 20, 4), nn.Conv1d(20, 2, 5))


def trained(model, optimizer, steps):
    for seed in steps:
        torch.manual_seed(seed)
        model(torch.randn(2, 1, 40)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_matrices_are_updated_by_muon_and_the_rest_as_by_adamw():
    mine, peer = layers(), layers()
    first = trained(mine, Muon(mine.parameters(), lr=1e-3, weight_decay=0.1), [1])
    second = trained(peer, torch.optim.AdamW(peer.parameters(), lr=1e-3, weight_decay=0.1), [1])
    differing = [name for name in first if not torch.equal(first[name], second[name])]
    assert differing == ["1.weight"]  # [16, 20, 4]: the first has too few inputs, the last too few outputs
    start = layers().state_dict()["1.weight"]
    update = (first["1.weight"] - start * (1 - 1e-4)).flatten(1)
    assert 0.6 < torch.linalg.svdvals(update / (1e-3 * 0.2 * 80**0.5)).max() < 1.3


def test_the_configuration_chooses_it_for_the_codec_only(tiny_training):
    step = TrainingStep(tiny_training(kind="muon"), accelerate.Accelerator(cpu=True))
    assert type(step.optimizer.optimizer) is Muon
    assert type(step.discriminator_optimizer.optimizer) is torch.optim.AdamW


def test_a_saved_optimizer_goes_on_alike(tmp_path):
    model = layers()
    optimizer = Muon(model.parameters(), lr=1e-3)
    whole = trained(model, optimizer, [1, 2, 3])
    model = layers()
    optimizer = Muon(model.parameters(), lr=1e-3)
    trained(model, optimizer, [1, 2])
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.bin")
    again = Muon(model.parameters(), lr=1e-3)
    again.load_state_dict(torch.load(tmp_path / "optimizer.bin"))
    resumed = trained(model, again, [3])
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
