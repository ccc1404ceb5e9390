"""Packed weights are made once, made again after every edit that PyTorch counts, and freed with their tensors."""

import gc
import warnings

import pytest
import torch
import transformers

import fastmimi
from fastmimi.compat.moshi import get_mimi
from fastmimi.devtools.testing import SMALL, noise, small_model
from fastmimi.models.config import MimiCodecConfig
from fastmimi.runtime import layout, packing
from fastmimi.runtime.dispatch import Target, implementation, why_not


def test_weights_are_packed_once():
    count = []

    def pack(tensor):
        count.append(tensor)
        return tensor.clone()

    weight = torch.nn.Parameter(noise(3, 3))
    for _ in range(3):
        packing.packed(weight, "layout", pack)
    assert len(count) == 1
    with torch.no_grad():
        weight.mul_(2)
    assert torch.equal(packing.packed(weight, "layout", pack), weight)
    weight.data = noise(3, 3, seed=5)
    assert torch.equal(packing.packed(weight, "layout", pack), weight)
    assert len(count) == 3
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], lr=0.1, fused=True).step()  # does not increment the version
    assert torch.equal(packing.packed(weight, "layout", pack), weight)


def test_weights_cast_to_half_and_back_are_packed_again():
    layer = torch.nn.Linear(64, 64)
    packing.packed(layer.weight, "layout", torch.clone)
    layer.half().float()  # loses digits; the new storage may have the old address
    assert torch.equal(packing.packed(layer.weight, "layout", torch.clone), layer.weight)


def test_tensors_of_inference_mode_are_packed_each_time():
    with torch.inference_mode():
        fresh = noise(3, 3)
        packing.packed(fresh, "layout", torch.clone)
        fresh.mul_(2)
        assert torch.equal(packing.packed(fresh, "layout", torch.clone), fresh)


def loaded(folder):
    return fastmimi.load(folder)


def constructed(folder):
    return fastmimi.Mimi(MimiCodecConfig.from_dict(SMALL)).eval()


def cast(folder):
    return small_model().bfloat16()


def moved(folder):
    return small_model().to("cpu", torch.float64).float()


def state_dict_loaded(folder):
    model = small_model()
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
    return model


def state_dict_assigned(folder):
    model = small_model()
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    return model


def jodio(folder):
    return fastmimi.JodioModel(fastmimi.JodioConfig.small()).eval()


def as_transformers(folder):
    return fastmimi.MimiModel.from_pretrained(folder)


def as_transformers_constructed(folder):
    return fastmimi.MimiModel(fastmimi.MimiConfig(**SMALL)).double().float()


def replaced(folder):
    model = torch.nn.ModuleList([transformers.MimiModel(fastmimi.MimiConfig(**SMALL))])
    return fastmimi.replace_mimi(model).double().float()[0]


def as_moshi(folder):
    return get_mimi(None).double().float()


WAYS = [
    loaded, constructed, cast, moved, state_dict_loaded, state_dict_assigned, jodio, as_transformers,
    as_transformers_constructed, replaced, as_moshi,
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["auto", "onednn"])
@pytest.mark.parametrize("make", WAYS)
def test_models_made_or_moved_in_inference_mode_pack_once(make, impl, tmp_path):
    fastmimi.save_pretrained(small_model(), tmp_path)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = make(tmp_path)
        assert not any(t.is_inference() for t in (*model.parameters(), *model.buffers()))
        dtype = next(model.parameters()).dtype
        if impl == "onednn" and (why := why_not(impl, "causal_conv1d", Target("cpu", dtype))) is not None:
            pytest.skip(why)
        getattr(model, "core", model).impl = impl
        frame = noise(1, 1, 1920)
        for _ in range(2):
            before = packing.preparations()
            codes = model.encode(frame)
            model.decode(codes if isinstance(codes, torch.Tensor) else codes.audio_codes)
        assert packing.preparations() == before


@pytest.mark.parametrize("candidate", ["cpu", "onednn"])
@pytest.mark.parametrize("op", ["causal_conv1d", "causal_conv_transpose1d"])
def test_grouped_convolutions_pack_once(op, candidate):
    if (why := why_not(candidate, op, Target("cpu", torch.float32))) is not None:
        pytest.skip(why)
    x, weight, bias = noise(1, 6, 9), noise(6, 2, 3, seed=1), noise(6, seed=2)
    for _ in range(2):
        before = packing.preparations()
        implementation(op, candidate)(x, weight, bias, groups=3)
    assert packing.preparations() == before


def test_one_warning_about_tensors_of_inference_mode():
    packing._warn_of_inference_tensors.cache_clear()
    with torch.inference_mode():
        weight = noise(3, 3)
        with pytest.warns(UserWarning, match="made inside torch.inference_mode"):
            packing.packed(weight, "layout", torch.clone)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            packing.packed(weight, "layout", torch.clone)


def test_an_edit_of_any_of_several_tensors_is_noticed():
    first, second = noise(3), noise(3, seed=1)
    packing.packed((first, second), "sum", torch.add)
    second.mul_(2)
    assert torch.equal(packing.packed((first, second), "sum", torch.add), first + second)
    assert torch.equal(packing.packed((first, noise(3, seed=2)), "sum", torch.add), first + noise(3, seed=2))


@pytest.mark.slow
def test_an_entry_is_freed_with_its_first_tensor():
    gc.collect()
    before = len(packing._entries)
    weight = noise(3)
    packing.packed(weight, "layout", torch.clone)
    assert len(packing._entries) == before + 1
    del weight
    gc.collect()
    assert len(packing._entries) == before


def test_channels_last():
    x = noise(2, 3, 5)
    y = layout.channels_last(x)
    assert torch.equal(x, y) and y.stride() == (15, 1, 3) and layout.channels_last(y) is y
    assert layout.empty_channels_last(x, 4, 7).stride() == (28, 1, 4)


def test_the_report_lists_what_is_packed():
    weight, bias = noise(6, 4), noise(6)
    before = set(packing.packing_report())
    packing.packed((weight, bias), "a test's layout", lambda w, b: (w.double(), [b]))
    [row] = set(packing.packing_report()) - before
    assert (row.layout, row.shape, row.dtype, row.nbytes) == ("a test's layout", (6, 4), torch.float32, 6 * 4 * 8 + 24)
    assert 0 < row.seconds < 10
    del weight
    assert row not in packing.packing_report()


def test_the_log_names_what_was_loaded_packed_and_recorded(caplog):
    with caplog.at_level("DEBUG", "fastmimi"):
        mimi = fastmimi.load("demo")
        mimi.warm_up(mimi.new_state())
    log = "\n".join(f"{record.levelname} {record.getMessage()}" for record in caplog.records)
    assert "INFO loaded a Mimi from demo: torch.float32 on cpu" in log
    assert "DEBUG packed PackedWeight(" in log
    if mimi.explain()[0].chosen == "cpu":
        assert "DEBUG recorded a step: encode, 16, input (1, 1, 1920)" in log
