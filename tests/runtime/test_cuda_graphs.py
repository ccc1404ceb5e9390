"""Steps of streams as graphs, with a graph that records PyTorch's operations on the CPU in place of a CUDA graph."""

import copy
import gc
import logging

import pytest
import torch
from torch.utils._pytree import tree_leaves

from fastmimi.devtools.recorded_graph import RecordedGraph
from fastmimi.devtools.testing import noise, small_model
from fastmimi.runtime import packing
from fastmimi.runtime.cuda_graphs import CudaGraphs

BATCH = 3


@pytest.fixture(params=["reference", "onednn"])
def models(request):
    """Two equal models, of which the first captures its steps."""
    models = [small_model(impl=request.param) for _ in range(2)]
    models[0].graphs = {name: CudaGraphs(name, RecordedGraph) for name in ("encode", "decode")}
    RecordedGraph.replays = 0
    return models


def audio_of(model, frames, seed=0):
    return noise(BATCH, 1, frames * model.frame_size, seed=seed)


def assert_equal_streams(models, states, steps=4, frames=1):
    for i in range(steps):
        chunk = audio_of(models[0], frames, seed=i)
        codes = [model.encode(chunk, state=state) for model, state in zip(models, states, strict=True)]
        assert torch.equal(*codes)
        audio = [model.decode(codes[0], state=state) for model, state in zip(models, states, strict=True)]
        assert torch.equal(*audio)
    mine, theirs = (state.state_dict() for state in states)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_replays_equal_eager_steps_bit_for_bit(models):
    states = [model.new_state(BATCH) for model in models]
    before = {name: tensor.clone() for name, tensor in states[0].state_dict().items()}
    models[0].warm_up(states[0])
    assert all(torch.equal(tensor, before[name]) for name, tensor in states[0].state_dict().items())
    captured = RecordedGraph.replays
    assert_equal_streams(models, states)
    assert RecordedGraph.replays == captured + 8, "four steps each way"
    for state in states:
        state.exec_mask = torch.tensor([True, False, True])
    assert_equal_streams(models, states)
    for state in states:
        state.reset(torch.tensor([False, False, True]))
    assert_equal_streams(models, states)


def test_only_the_captured_shapes_of_the_captured_state_are_replayed(models):
    states = [model.new_state(BATCH) for model in models]
    models[0].warm_up(states[0], frames=2)
    captured = RecordedGraph.replays
    assert_equal_streams(models, states, frames=1)
    assert RecordedGraph.replays == captured
    assert_equal_streams(models, states, frames=2)
    assert RecordedGraph.replays == captured + 8
    assert_equal_streams(models, [model.new_state(BATCH) for model in models], frames=2)
    assert RecordedGraph.replays == captured + 8, "another state has no graph"


def test_the_report_has_a_row_for_each_graph(models):
    state = models[0].new_state(BATCH)
    models[0].warm_up(state)
    models[0].warm_up(state)
    models[0].warm_up(state, latents=True)
    rows = models[0].graph_report()
    assert [(row.direction, row.step) for row in rows] == [
        ("encode", str(models[0].num_codebooks)), ("encode", "latents"), ("decode", "codes"), ("decode", "latents"),
    ]  # fmt: skip
    assert all(row.nbytes == 12345 and row.seconds > 0 and row.input[0] == BATCH for row in rows)


def test_changed_weights_are_not_replayed(models):
    states = [model.new_state(BATCH) for model in models]
    models[0].warm_up(states[0])
    for model in models:
        with torch.no_grad():
            model.encoder.layers["0"].conv.weight.mul_(1.5)
            model.decoder.layers["0"].conv.weight.mul_(1.5)
    captured = RecordedGraph.replays
    assert_equal_streams(models, states)
    assert RecordedGraph.replays == captured and not models[0].graph_report()


def test_a_graph_goes_with_its_state(models):
    state = models[0].new_state(BATCH)
    models[0].warm_up(state)
    assert len(models[0].graphs["encode"]._steps) == 1
    del state
    gc.collect()
    assert len(models[0].graphs["encode"]._steps) == 0
    assert not models[0].graph_report()


def test_graphs_are_of_one_autocast(models):
    states = [model.new_state(BATCH) for model in models]
    models[0].warm_up(states[0])
    captured = RecordedGraph.replays
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal_streams(models, states, steps=1)
    assert RecordedGraph.replays == captured


def test_captures_of_users_contain_no_replay(models, monkeypatch):
    states = [model.new_state(BATCH) for model in models]
    models[0].warm_up(states[0])
    captured = RecordedGraph.replays
    monkeypatch.setattr(packing, "is_capturing", lambda device: True)
    assert_equal_streams(models, states, steps=1)
    assert RecordedGraph.replays == captured


def test_a_model_made_on_a_gpu_has_cuda_graphs(monkeypatch):
    monkeypatch.setattr(torch, "get_default_device", lambda: torch.device("cuda"))
    assert isinstance(small_model().graphs["encode"], CudaGraphs)


def test_hooks_are_called(models):
    states, calls = [model.new_state(BATCH) for model in models], []
    models[0].warm_up(states[0])
    models[0].encoder.register_forward_hook(lambda *_: calls.append(1))
    assert_equal_streams(models, states, steps=2)
    assert calls == [1, 1]


def test_a_graph_that_differs_is_not_used(models, monkeypatch, caplog):
    def replay(self):
        for *_, result in self.calls:
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                    tensor.add_(1)

    monkeypatch.setattr(RecordedGraph, "replay", replay)
    states = [model.new_state(BATCH) for model in models]
    with caplog.at_level(logging.WARNING):
        models[0].warm_up(states[0])
    assert "differs from the model's own step" in caplog.text and not models[0].graph_report()
    assert_equal_streams(models, states)


def test_a_copied_model_has_no_graphs(models):
    models[0].warm_up(models[0].new_state(BATCH))
    assert not copy.deepcopy(models[0]).graph_report()


def test_nothing_is_packed_during_a_replay(models):
    state = models[0].new_state(BATCH)
    models[0].warm_up(state)
    before = packing.preparations()
    models[0].encode(audio_of(models[0], 1), state=state)
    assert packing.preparations() == before
