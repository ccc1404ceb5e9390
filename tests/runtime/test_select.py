"""Steps of some streams of a pool: `DirectionState.select`, eager, recorded on the CPU and captured as graphs."""

import pytest
import torch

from fastmimi.devtools.recorded_graph import RecordedGraph
from fastmimi.devtools.testing import noise, relative_error, small_model
from fastmimi.kernels.cpu import _native
from fastmimi.runtime.cuda_graphs import CudaGraphs

POOL, TICKS, FAST = 6, 14, {"upsampling_ratios": [4, 3, 2]}  # frames of 48 samples


def ticks(seed=0):
    """Random sets of streams, in random order."""
    draw = torch.Generator().manual_seed(seed)
    for _ in range(TICKS):
        count = int(torch.randint(1, POOL + 1, (), generator=draw))
        yield torch.randperm(POOL, generator=draw)[:count]


def run_in_ticks(run, x, unit, state):
    """Feed x [POOL, C, T * unit] a frame at a time to the streams of each tick: the results of each, concatenated."""
    fed, results = [0] * POOL, [[] for _ in range(POOL)]
    for rows in ticks():
        chunk = torch.stack([x[row, :, fed[row] * unit : (fed[row] + 1) * unit] for row in rows.tolist()])
        for row, y in zip(rows.tolist(), run.in_tiles(chunk, state.select(rows)), strict=True):
            results[row].append(y)
            fed[row] += 1
    return fed, [torch.cat(parts, dim=-1) for parts in results]


@pytest.mark.parametrize("impl", ["reference", "cpu", "onednn", pytest.param("triton", marks=pytest.mark.kernels)])
@pytest.mark.parametrize("pad_mode", ["constant", "replicate"])
@torch.no_grad()
def test_streams_of_a_pool_equal_the_whole(impl, pad_mode):
    if impl == "cpu" and not _native.variants():
        pytest.skip("the native library is not built here")
    on_gpu = impl == "triton" and torch.cuda.is_available()
    with torch.device("cuda" if on_gpu else "cpu"):
        model = small_model(impl=impl, pad_mode=pad_mode, **FAST)
        audio = noise(POOL, 1, TICKS * model.frame_size)
    encode, decode = model.encode_pass(6), model.decode_pass()
    whole = model.encode(audio)
    fed, codes = run_in_ticks(encode, audio, model.frame_size, model.new_direction("encode", POOL))
    assert min(fed) > 0 and len(set(fed)) > 1, "streams drift apart"
    for row, frames in enumerate(fed):
        assert torch.equal(codes[row], whole[row, :, :frames])
    sound = model.decode(whole)
    fed, parts = run_in_ticks(decode, whole, 1, model.new_direction("decode", POOL))
    for row, frames in enumerate(fed):
        assert relative_error(parts[row], sound[row, :, : frames * model.frame_size]) < 1e-5


@pytest.mark.skipif(not _native.variants(), reason="the native library is not built here")
@torch.no_grad()
def test_one_program_serves_pools_of_any_size():
    recorded, eager = small_model(**FAST), small_model(**FAST)
    audio, rows = noise(3, 1, recorded.frame_size), torch.tensor([5, 1, 2])
    state = recorded.new_direction("encode", POOL)
    recorded.encode_pass(6).warm_up(1, 1, state.select(rows), threads=1)
    assert not state.offset.any() and not any(buffer.any() for buffer in state.buffers.values())
    graphs = recorded.graphs["encode"]
    assert sum(map(len, graphs._idle.values())) == 1
    for pool in (POOL, 9):
        mine, theirs = (model.new_direction("encode", pool) for model in (recorded, eager))
        for step in range(3):
            named = torch.tensor([step, 5, 4])
            found = graphs.run(recorded.ops, audio, mine.select(named), 6)
            assert found is not None, "the program runs"
            assert torch.equal(torch.cat(found, dim=1), eager.encode_pass(6).in_tiles(audio, theirs.select(named)))
        assert all(map(torch.equal, mine.tensors(), theirs.tensors()))
        assert graphs.run(recorded.ops, audio[:2], mine.select(named[:2]), 6) is None, "two streams are another step"


@pytest.mark.parametrize("impl", ["reference", "onednn"])
@torch.no_grad()
def test_a_graph_runs_any_rows_of_its_pool(impl):
    captured, eager = small_model(impl=impl, **FAST), small_model(impl=impl, **FAST)
    captured.graphs = {name: CudaGraphs(name, RecordedGraph) for name in ("encode", "decode")}
    mine, theirs = (model.new_direction("encode", POOL) for model in (captured, eager))
    captured.encode_pass(6).warm_up(1, 1, mine.select(torch.tensor([0, 1])), threads=1)
    assert not mine.offset.any() and not any(buffer.any() for buffer in mine.buffers.values())
    assert len(captured.graph_report()) == 1
    replays = RecordedGraph.replays
    for step, rows in enumerate(torch.tensor([[0, 1], [5, 2], [2, 5], [0, 3]])):
        audio = noise(2, 1, captured.frame_size, seed=step)
        codes = [
            model.encode_pass(6).in_tiles(audio, state.select(rows))
            for model, state in ((captured, mine), (eager, theirs))
        ]
        assert torch.equal(*codes)
    assert RecordedGraph.replays == replays + 4
    assert all(map(torch.equal, mine.tensors(), theirs.tensors()))


def test_rows_that_are_not_active_stay_and_may_repeat():
    model = small_model(**FAST)
    state = model.new_direction("decode", POOL)
    state.active[4] = False
    codes = torch.zeros(3, 6, 1, dtype=torch.int64)
    with torch.no_grad():
        model.decode_pass().in_tiles(codes, state.select(torch.tensor([2, 4, 4])))
    assert state.offset.tolist() == [0, 0, 2, 0, 0, 0]
    assert all((buffer[[0, 1, 3, 4, 5]] == 0).all() for buffer in state.buffers.values())


def test_a_copy_of_selected_rows_holds_them_alone():
    model = small_model(**FAST)
    state = model.new_direction("decode", POOL)
    for tensor in state.tensors():
        tensor.copy_(torch.randn(tensor.shape) * 9)
    copy = state.select(torch.tensor([3, 1])).clone()
    assert copy.batch_size == 2 and copy.rows.tolist() == [0, 1]
    assert all(torch.equal(mine, theirs[[3, 1]]) for mine, theirs in zip(copy.tensors(), state.tensors(), strict=True))
    copy.offset.fill_(7)
    state.select(torch.tensor([3, 1])).copy_(copy)
    assert state.offset[[3, 1]].tolist() == [7, 7] and (state.offset[[0, 2]] != 7).any()
