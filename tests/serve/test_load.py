"""The load test: its arithmetic without a server, its options, and four clients of a server with the demo model."""

import asyncio
import json
from array import array

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import fastmimi
from fastmimi import InputError
from fastmimi.serve import load as command
from fastmimi.serve import load_client, protocol
from fastmimi.serve import server as serving
from fastmimi.serve.app import Settings
from fastmimi.serve.load_client import Load, LoadClient, audio_plans, codes_plans, figures, made_clients, run_clients
from fastmimi.serve.load_figures import Frames, Playback, most_clients, quantiles_ms
from fastmimi.serve.pool import StreamPool

READY = protocol.Ready(
    version=1, model="demo", sample_rate=24_000, codec_sample_rate=24_000, frame_rate=12.5, frame_size=1920, channels=1,
    num_codebooks=8, total_codebooks=8, codebook_size=64, max_queued_s=4.0,
)  # fmt: skip
BOTH = ("encode", "decode")


def of_load(url="http://127.0.0.1:1", **changes):
    values = {
        "token": None, "directions": BOTH, "num_codebooks": None, "seconds": 1.0, "chunk_s": (0.01, 0.2),
        "playout_s": 0.08, "seed": 0,
    }  # fmt: skip
    return Load(url, **{**values, **changes})


# Arithmetic


def test_a_frame_is_sent_with_the_chunk_that_has_its_last_sample():
    frames = Frames(10)
    frames.sent(9, now=1.0)
    assert frames.count == 0
    frames.sent(1, now=2.0)  # sample 9, the last of frame 0
    frames.sent(25, now=3.0)  # frames 1 and 2
    assert frames.count == 3
    frames.codes_came(2, now=3.5)
    frames.codes_came(1, now=5.0)
    assert list(frames.codes) == [1.5, 0.5, 2.0]


def test_audio_of_a_frame_has_come_with_its_last_sample():
    frames = Frames(10)
    frames.sent(30, now=1.0)
    frames.audio_came(9, now=2.0)
    assert list(frames.audio) == []
    frames.audio_came(11, now=3.0)
    frames.audio_came(10, now=4.0)
    assert list(frames.audio) == [2.0, 2.0, 3.0]


def test_more_results_than_frames_are_an_error():
    frames = Frames(10)
    frames.sent(19, now=1.0)
    with pytest.raises(ValueError, match="2 frames came back, and 1 were sent"):
        frames.codes_came(2, now=1.0)


def test_playback_runs_dry_where_it_has_played_all_that_came():
    play = Playback(rate=100, buffer_s=0.5)
    play.received(100, now=10.0)  # plays from 10.5 to 11.5
    play.received(100, now=11.5)  # to 12.5, just in time
    assert (play.underruns, play.halted_s) == (0, 0.0)
    play.received(50, now=13.0)  # half a second late; plays from 13.0 to 13.5
    assert (play.underruns, play.halted_s) == (1, 0.5)
    play.received(100, now=13.25)
    play.received(100, now=14.75)  # it had played until 14.5
    assert (play.underruns, play.halted_s) == (2, 0.75)


def test_quantiles_are_values_that_occurred():
    seconds = array("d", [i / 1000 for i in range(1, 101)])
    assert quantiles_ms(seconds) == {"p50": 50.0, "p95": 95.0, "p99": 99.0, "max": 100.0}
    assert quantiles_ms(array("d")) == {"p50": None, "p95": None, "p99": None, "max": None}


@pytest.mark.parametrize("bears, most, tried", [
    (25, 4096, [1, 2, 4, 8, 16, 32, 24, 28, 26, 25]), (0, 4096, [1]), (4096, 4, [1, 2, 4]), (5, 6, [1, 2, 4, 6, 5]),
    (1, 1, [1]),
])  # fmt: skip
def test_the_search_doubles_and_then_bisects(bears, most, tried):
    seen = []

    async def passes(number):
        seen.append(number)
        return number <= bears

    assert asyncio.run(most_clients(passes, most)) == min(bears, most)
    assert seen == tried


def level(**changes):
    times = {"p50": 5.0, "p95": 8.0, "p99": 10.0, "max": 20.0}
    return {"failed": 0, "underruns": 0, "codes_ms": times, "audio_ms": {**times, "p99": 60.0}, **changes}


def test_a_level_passes_with_its_slower_result_and_without_failures():
    assert command.passed(level(), 61) and not command.passed(level(), 60)
    assert not command.passed(level(failed=1), 61) and not command.passed(level(underruns=1), 61)
    nothing = quantiles_ms(array("d"))
    assert command.passed(level(audio_ms=nothing), 11)
    assert not command.passed(level(audio_ms=nothing, codes_ms=nothing), 11)


# Plans


def test_chunks_of_audio_are_the_whole_file_in_a_circle():
    load = of_load(chunk_s=(0.02, 0.05))
    one, other = audio_plans(command.SPEECH, READY, load, 2)
    sounds = [np.concatenate([samples_of(message) for message in plan.messages]) for plan in (one, other)]
    assert len(sounds[0]) == round(222561 * 1.5) == sum(one.samples)
    assert [len(samples_of(message)) for message in one.messages] == one.samples
    assert all(0.02 * 24_000 <= count <= 0.05 * 24_000 for count in one.samples[:-1])
    twice, begin = np.tile(sounds[0], 2), sounds[1][:500]
    same = np.flatnonzero(twice[: len(sounds[0])] == begin[0])
    start = next(i for i in same if np.array_equal(twice[i : i + 500], begin))
    assert start and np.array_equal(np.roll(sounds[0], -start), sounds[1])
    assert one.samples != other.samples


def samples_of(message):
    return np.frombuffer(protocol.from_client(message).samples, "<i2")


def test_clients_that_decode_send_codes_in_range():
    (plan,) = codes_plans(READY, of_load(directions=("decode",), num_codebooks=4), 1)
    messages = [protocol.from_client(message) for message in plan.messages]
    codes = torch.cat([protocol.codes_of_bytes(m.codes, m.num_codebooks) for m in messages], dim=1)
    assert codes.shape == (4, 100) and int(codes.min()) >= 0 and 32 < int(codes.max()) < 64
    assert plan.samples == [1920] * 100


def test_phases_lie_within_a_frame_and_levels_differ():
    plans = codes_plans(READY, of_load(), 3)
    clients = made_clients(50, plans, READY, of_load())
    phases = [client.phase_s for client in clients]
    assert 0 <= min(phases) < 0.02 and 0.06 < max(phases) < 0.08
    assert len({client.first for client in clients}) > 25
    assert phases[0] != made_clients(51, plans, READY, of_load())[0].phase_s


# Options


@pytest.mark.parametrize("options, sentence", [
    (["--clients", "4097"], "--clients must be from 1 to 4096, got 4097"),
    (["--seconds", "nan"], "--seconds must be from 0.1 to 3600, got nan"),
    (["--chunk-ms", "20:10"], "--chunk-ms must be SHORTEST:LONGEST, from 1 to 10000, got '20:10'"),
    (["--chunk-ms", "20"], "--chunk-ms must be SHORTEST:LONGEST, from 1 to 10000, got '20'"),
    (["--url", "127.0.0.1"], "the server's url must begin with http:// or https://, got '127.0.0.1'"),
    (["--seed", "-1"], "--seed must be from 0 to"),
])  # fmt: skip
def test_wrong_options_are_one_sentence(options, sentence):
    error = CliRunner().invoke(command.app, options).exception
    assert isinstance(error, InputError) and sentence in str(error)


def test_a_server_that_is_not_there_is_one_sentence_and_exit_code_1(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["load", "--url", "http://127.0.0.1:1"])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 1 and capsys.readouterr().err.startswith("error: ")


# Against a server


def test_clients_that_are_refused_and_frames_that_never_come_are_failures(model, monkeypatch):
    """Frames of the model are 2 ms; the pool's thread ends in the middle."""
    monkeypatch.setattr(load_client, "AFTER_S", 0.2)
    pool = StreamPool(model, 2, warm_up=False)
    with serving.in_thread(pool, Settings()) as server:
        ready = protocol.Ready(**{**{name: getattr(READY, name) for name in READY.__struct_fields__}, "frame_size": 48})
        load = of_load(server.address, directions=("encode",), seconds=0.4)
        options = ["--url", server.address, "--clients", "3", "--seconds", "0.2", "--directions", "encode"]
        result = CliRunner().invoke(command.app, options)
        assert result.exit_code == 1 and "refused: 1 x pool_full: all 2 slots are in use" in result.output
        clients = made_clients(3, audio_plans(command.SPEECH, ready, load, 2), ready, load)
        pool.stop()
        asyncio.run(run_clients(clients))
        found = figures(clients, 0.5, 2.0)
    assert found["failed"] == 3 and found["generator_cpu"] == 0.25
    assert found["refused"] == {"pool_full: all 2 slots are in use: try again later": 1} and not found["errors"]
    assert found["frames_lost"] == found["frames_sent"] >= 2 * 0.4 * 500


@pytest.mark.slow
def test_clients_of_a_real_server_get_all_frames_back(tmp_path):
    codec, report = fastmimi.load("demo"), tmp_path / "load.json"
    with serving.in_thread(StreamPool(codec, 4), Settings()) as server:
        options = ["--url", server.address, "--clients", "4", "--seconds", "3", "--json", str(report)]
        result = CliRunner().invoke(command.app, options)
        assert result.exit_code == 0, result.output

        load = of_load(server.address, seconds=0.5)
        ready = protocol.Ready(**{name: getattr(READY, name) for name in READY.__struct_fields__})
        (plan,) = audio_plans(command.SPEECH, ready, load, 1)
        client = LoadClient(plan, ready, load, 0.01, len(plan.messages) - 1, keep_codes=True)
        asyncio.run(run_clients([client]))
    found = json.loads(report.read_text())
    (one,) = found["levels"]
    assert (one["clients"], one["failed"], one["frames_lost"], one["errors"], one["refused"]) == (4, 0, 0, {}, {})
    assert one["frames_sent"] >= 4 * 3 * 12.5 - 4 and one["audio_ms"]["p50"] >= one["codes_ms"]["p50"] > 0
    assert found["server"]["before"]["encoded_frames"] == 0
    assert (
        found["server"]["after"]["encoded_frames"] == found["server"]["after"]["decoded_frames"] == one["frames_sent"]
    )
    assert found["machine"]["processor"] and found["versions"]["fastmimi"] == fastmimi.__version__

    assert not client.refused and not client.error and client.lost == 0
    order = [(client.first + i) % len(plan.messages) for i in range(client.chunks_sent)]
    sent = torch.from_numpy(np.concatenate([samples_of(plan.messages[i]) for i in order]).astype(np.float32) / 32768)
    codes = torch.cat([protocol.codes_of_bytes(c, codec.num_codebooks) for c in client.codes], dim=1)
    assert torch.equal(codes, codec.encode(sent[None, None, : len(sent) // 1920 * 1920])[0])
