"""SlotPool: streams by number. Results equal the streams alone; slots are reset, quarantined, and checked."""

import pytest
import torch

from fastmimi import InputError
from fastmimi.devtools.recorded_graph import RecordedGraph
from fastmimi.devtools.testing import noise, relative_error, small_model
from fastmimi.runtime.cuda_graphs import CudaGraphs
from fastmimi.serve.slots import PoolFull, SlotPool, batch_sizes

FAST = {"upsampling_ratios": [4, 3, 2]}  # frames of 48 samples


def feed(pool, audio, order, frames=1):
    """Codes and audio of each slot, fed a step at a time; `order` names the slots of each step."""
    size, at = pool.codec.frame_size * frames, dict.fromkeys(range(len(audio)), 0)
    codes, sound = ({slot: [] for slot in at} for _ in range(2))
    for slots in order:
        chunk = torch.stack([audio[slot, :, at[slot] : at[slot] + size] for slot in slots])
        for slot in slots:
            at[slot] += size
        coded = pool.step_encode(chunk, slots)
        for slot, one, decoded in zip(slots, coded, pool.step_decode(coded, slots), strict=True):
            codes[slot].append(one)
            sound[slot].append(decoded)
    return [[torch.cat(parts[slot], dim=-1) for slot in at] for parts in (codes, sound)]


ORDER = [[0, 1, 2], [2, 0], [1], [2, 1, 3], [3], [0, 3], [3, 2, 1, 0]] * 3


@pytest.mark.parametrize("warm", [False, True])
def test_slots_equal_streams_alone(model, warm):
    pool = SlotPool(model, 4)
    if warm:
        pool.warm_up()
    audio = noise(4, 1, model.frame_size * 20)
    codes, sound = feed(pool, audio, ORDER)
    for slot in range(4):
        alone = audio[slot : slot + 1, :, : codes[slot].shape[-1] * model.frame_size]
        assert torch.equal(codes[slot], model.encode(alone)[0])
        state = model.new_state(1)
        frames = [model.decode(frame, state=state) for frame in codes[slot][None].split(1, dim=-1)]
        assert relative_error(sound[slot], torch.cat(frames, dim=-1)[0]) < 1e-5  # in batches of other sizes


def test_what_others_do_does_not_matter(model):
    """Bit for bit, in batches of the same size."""
    audio, pools = noise(2, 1, model.frame_size * 20), [SlotPool(model, 4), SlotPool(model, 4)]
    order = [[0, 1]] * 9
    results = [feed(pools[0], audio, order), feed(pools[1], torch.cat([audio[:1], 1e3 * audio[1:]]), order)]
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine[0], theirs[0]) and not torch.equal(mine[1], theirs[1])


def test_padded_batches_of_a_gpu(model, monkeypatch):
    """As on a GPU: batches are filled up with the slot that never advances, and steps are graphs."""
    monkeypatch.setattr("fastmimi.serve.slots.batch_sizes", lambda capacity, device: (1, 4))
    captured = small_model(impl="onednn", **FAST)
    captured.graphs = {name: CudaGraphs(name, RecordedGraph) for name in ("encode", "decode")}
    pool = SlotPool(captured, 4)
    pool.warm_up()
    assert len(captured.graph_report()) == 2 * (2 + 3)  # both sizes, and on this device 2 to 4 frames
    replays = RecordedGraph.replays
    audio = noise(4, 1, model.frame_size * 20)
    codes, _ = feed(pool, audio, ORDER)
    assert RecordedGraph.replays == replays + 2 * len(ORDER)
    for slot in range(4):
        assert torch.equal(codes[slot], model.encode(audio[slot : slot + 1])[0, :, : codes[slot].shape[-1]])
    for state in pool._states.values():
        assert not state.offset[4] and not any(buffer[4].any() for buffer in state.buffers.values())


def test_more_streams_than_the_largest_batch(model, monkeypatch):
    monkeypatch.setattr("fastmimi.serve.slots.LARGEST_RECORDED", 2)
    pool = SlotPool(model, 5)
    assert pool.batch_sizes == (1, 2)
    audio = noise(5, 1, model.frame_size)
    assert torch.equal(pool.step_encode(audio, range(5)), model.encode(audio))


def test_a_step_of_several_frames_and_of_fewer_codebooks(model):
    pool = SlotPool(model, 2)
    audio = noise(2, 1, model.frame_size * 6)
    codes, _ = feed(pool, audio, [[0, 1], [1, 0]], frames=3)
    assert torch.equal(torch.stack(codes), model.encode(audio))
    pool.reset([0, 1])
    assert torch.equal(pool.step_encode(audio, [0, 1], num_codebooks=3), model.encode(audio)[:, :3])


def test_latents_decode_as_codes_do(model):
    pools = [SlotPool(model, 2, directions=["decode"]) for _ in range(2)]
    codes = torch.randint(0, 64, (2, 6, 3))
    assert torch.equal(
        pools[0].step_decode_latents(model.dequantize(codes), [1, 0]), pools[1].step_decode(codes, [1, 0])
    )


def test_acquired_slots_are_fresh_and_released_ones_come_back(model):
    pool = SlotPool(model, 2)
    slots = [pool.acquire(), pool.acquire()]
    with pytest.raises(PoolFull, match="all 2 slots are in use"):
        pool.acquire()
    audio = noise(2, 1, model.frame_size)
    first = pool.step_encode(audio, slots)
    pool.release(slots[0])
    assert (pool.free, pool.acquire()) == (1, slots[0])
    again = pool.step_encode(audio, slots)
    assert torch.equal(again[0], first[0]) and not torch.equal(again[1], first[1])
    pool.release(slots[1])
    with pytest.raises(InputError, match=f"slot {slots[1]} is not in use"):
        pool.release(slots[1])


def test_a_slot_whose_reset_fails_is_quarantined(model, monkeypatch):
    pool = SlotPool(model, 2)
    slot = pool.acquire()

    def fail(*_):
        raise RuntimeError("device lost")

    with monkeypatch.context() as patch:
        patch.setattr(pool, "reset", fail)
        with pytest.raises(RuntimeError, match="device lost"):
            pool.release(slot)
    assert (pool.free, pool.quarantined) == (1, 1)
    assert pool.acquire() != slot
    with pytest.raises(PoolFull):
        pool.acquire()


def test_the_memory_of_a_slot(model):
    both, one = SlotPool(model, 3), SlotPool(model, 7, directions=["encode"])
    state = model.new_direction("encode", 1)
    assert one.bytes_per_slot == sum(buffer.nbytes for buffer in state.buffers.values()) < both.bytes_per_slot


@pytest.mark.parametrize("capacity, sizes", [
    (1, (1,)), (3, (1, 2, 3)), (64, (1, 2, 4, 8, 16, 32, 64)), (100, (1, 2, 4, 8, 16, 32, 64, 100)[1:]),
    (512, (1, 16, 32, 64, 128, 256, 512)),
])  # fmt: skip
def test_sizes_of_batches_on_a_gpu(capacity, sizes):
    found = batch_sizes(capacity, torch.device("cuda"))
    assert found[-1] == capacity and found[0] == 1 and len(found) <= 7
    assert set(sizes) - {2} <= set(found) | {2}


@pytest.mark.parametrize("change, sentence", [
    (lambda pool, x: pool.step_encode(x[..., :-1], [0, 1]), "audio must be whole frames of 48 samples, got 47"),
    (lambda pool, x: pool.step_encode(x, [0]), "2 rows need as many slots, got 1"),
    (lambda pool, x: pool.step_encode(x, [1, 1]), r"slots must be different integers in \[0, 3\), got \[1, 1\]"),
    (lambda pool, x: pool.step_encode(x, [0, 3]), r"slots must be different integers in \[0, 3\), got \[0, 3\]"),
    (lambda pool, x: pool.step_encode(x, [0, 1.0]), "slots must be different integers"),
    (lambda pool, x: pool.step_encode(x * torch.nan, [0, 1]), "audio must be finite"),
    (lambda pool, x: pool.step_decode(torch.full((2, 6, 1), 64), [0, 1]), r"codes must lie in \[0, 64\), got 64"),
    (lambda pool, x: pool.step_decode(torch.zeros(2, 6, 0, dtype=torch.int64), [0, 1]), "at least one frame"),
    (lambda pool, x: SlotPool(pool.codec, 0), "batch_size must be an integer from 1"),
    (lambda pool, x: SlotPool(pool.codec, 1, directions=["up"]), "directions must be among encode, decode, got"),
    (lambda pool, x: SlotPool(pool.codec, 1, directions=["encode"]).step_decode(x.long(), [0, 1]), "does not decode"),
    (lambda pool, x: SlotPool(pool.codec, 1, num_codebooks=7), "the number of codebooks must be from 1 to 6, got 7"),
    (lambda pool, x: SlotPool(small_model("not_causal"), 1), "causal"),
    (lambda pool, x: (pool.acquire(), pool.warm_up()), "warmed up before its first stream, slots in use: 1"),
])  # fmt: skip
def test_mistakes_are_named_before_anything_changes(model, change, sentence):
    pool = SlotPool(model, 3)
    with pytest.raises(InputError, match=sentence):
        change(pool, noise(2, 1, model.frame_size))
    assert not any(tensor.any() for state in pool._states.values() for tensor in state.buffers.values())
