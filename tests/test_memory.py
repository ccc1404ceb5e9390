"""memory: packed forms are made once, follow every edit that PyTorch counts, and die with their weights."""

import gc

import torch

import fastmimi
from fastmimi import memory
from fastmimi.testing import noise


def test_weights_are_packed_once():
    count = []

    def pack(tensor):
        count.append(tensor)
        return tensor.clone()

    weight = torch.nn.Parameter(noise(3, 3))
    for _ in range(3):
        memory.packed(weight, "form", pack)
    assert len(count) == 1
    with torch.no_grad():
        weight.mul_(2)
    assert torch.equal(memory.packed(weight, "form", pack), weight)
    weight.data = noise(3, 3, seed=5)
    assert torch.equal(memory.packed(weight, "form", pack), weight)
    assert len(count) == 3
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], lr=0.1, fused=True).step()  # counts no version
    assert torch.equal(memory.packed(weight, "form", pack), weight)


def test_a_round_trip_that_loses_digits_is_seen():
    layer = torch.nn.Linear(64, 64)  # a round trip that loses digits, perhaps to the same address
    memory.packed(layer.weight, "form", torch.clone)
    layer.half().float()
    assert torch.equal(memory.packed(layer.weight, "form", torch.clone), layer.weight)


def test_tensors_of_inference_mode_are_packed_each_time():
    with torch.inference_mode():
        fresh = noise(3, 3)
        memory.packed(fresh, "form", torch.clone)
        fresh.mul_(2)
        assert torch.equal(memory.packed(fresh, "form", torch.clone), fresh)


def test_a_model_loaded_in_inference_mode_is_packed_once():
    with torch.inference_mode():
        model = fastmimi.load("random:0")
    assert not any(t.is_inference() for t in (*model.parameters(), *model.buffers()))


def test_any_of_several_tensors_counts():
    first, second = noise(3), noise(3, seed=1)
    memory.packed((first, second), "sum", torch.add)
    second.mul_(2)
    assert torch.equal(memory.packed((first, second), "sum", torch.add), first + second)
    assert torch.equal(memory.packed((first, noise(3, seed=2)), "sum", torch.add), first + noise(3, seed=2))


def test_a_form_dies_with_its_first_tensor():
    before = len(memory._forms)
    weight = noise(3)
    memory.packed(weight, "form", torch.clone)
    assert len(memory._forms) == before + 1
    del weight
    gc.collect()
    assert len(memory._forms) == before


def test_time_major():
    x = noise(2, 3, 5)
    y = memory.time_major(x)
    assert torch.equal(x, y) and y.stride() == (15, 1, 3) and memory.time_major(y) is y
    assert memory.empty_time_major(x, 4, 7).stride() == (28, 1, 4)
