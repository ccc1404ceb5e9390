"""Pocket TTS with its own Mimi and with ours, the same random weights of the published shapes, taken in turn.

A frame of 80 ms, at the start of a generation and 10 s into it, where the two take turns at each frame and displace
each other's weights from the caches, as a language model does; whole generations, one after the other; a voice prompt;
`generate_audio` with one thread, which is what the package sets, where the decoder and the language model run beside
each other. `silence` in the place of Mimi shows how long the language model alone takes, which is the least that any
Mimi can reach.
"""

import time

import pocket
import pytest
import torch

from fastmimi.devtools.testing import noise, relative_error

pytest.importorskip("pocket_tts", reason="the benchmark of Pocket TTS needs pocket-tts")

ENGLISH, MEDIUM, SMALLEST = "english_2026-10", "english_18m_2026-10", "english_2m_2026-10"
FRAMES, WINDOW = 140, 13  # of a generation; 13 frames are a second


@pytest.fixture(autouse=True)
def threads(request):
    """PyTorch's threads as the parameter says; importing pocket_tts sets them to one."""
    before = torch.get_num_threads()
    torch.set_num_threads(getattr(request, "param", 1))
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


class Silence(torch.nn.Module):
    """A decoder that takes no time."""

    frame_rate, encoder_frame_rate = 12.5, 200.0

    def decode_from_latent(self, latent, mimi_state):
        return torch.zeros(1, 1, pocket.FRAME * latent.shape[1])


def pair_of(name):
    from fastmimi.compat.pocket_tts import AcceleratedMimi, codec_config

    config = pocket.published()[name].mimi
    peer = pocket.random_mimi(config)
    return {"pocket_tts": peer, "fastmimi": AcceleratedMimi(peer, codec_config(config.model_dump()))}


@pytest.mark.parametrize("threads", [1, 2], indirect=True, ids="threads{}".format)
@pytest.mark.parametrize("name", [ENGLISH, MEDIUM, SMALLEST])
def bench_frame(benchmark, record, name):
    from pocket_tts.modules.stateful_module import increment_steps, init_states

    mimis = pair_of(name)
    states = {key: init_states(mimi, 1, FRAMES * pocket.POSITIONS) for key, mimi in mimis.items()}
    audio, times = {key: [] for key in mimis}, {key: [] for key in mimis}
    frames = iter(noise(FRAMES, 1, 1, 32, scale=1.0))

    def step(key, latent):
        start = time.perf_counter()
        audio[key].append(mimis[key].decode_from_latent(latent, states[key]))
        increment_steps(mimis[key], states[key], pocket.POSITIONS)
        times[key].append(time.perf_counter() - start)

    def other():
        latent = next(frames)
        step("pocket_tts", latent)
        return ("fastmimi", latent), {}

    benchmark.group = f"{name}, frame, {torch.get_num_threads()} threads"
    benchmark.pedantic(step, setup=other, rounds=FRAMES)
    assert relative_error(*(torch.cat(audio[key], dim=-1) for key in ("fastmimi", "pocket_tts"))) < 1e-5
    for place, window in (("start", slice(2, 2 + WINDOW)), ("after 10 s", slice(-WINDOW, None))):
        medians = {key: sorted(taken[window])[WINDOW // 2] for key, taken in times.items()}
        benchmark.extra_info[place] = medians
        taken = ", ".join(f"{key} {median * 1e3:.2f} ms" for key, median in medians.items())
        print(f"\n{benchmark.group}, {place}: {taken}", end="")
    record({"pocket_tts": times["pocket_tts"]})


@pytest.mark.parametrize("threads", [1, 2], indirect=True, ids="threads{}".format)
@pytest.mark.parametrize("name", [ENGLISH, MEDIUM, SMALLEST])
def bench_generation(in_turn, name):
    mimis, latents = pair_of(name), noise(1, FRAMES, 32, scale=1.0)
    calls = {key: lambda mimi=mimi: pocket.decode(mimi, latents, [1] * FRAMES) for key, mimi in mimis.items()}
    calls["fastmimi"]()  # records steps for these threads
    results = in_turn(f"{name}, {FRAMES} frames, {torch.get_num_threads()} threads", calls, 2)
    assert relative_error(results["fastmimi"], results["pocket_tts"]) < 1e-5


@pytest.mark.parametrize("threads", [1, 2], indirect=True, ids="threads{}".format)
def bench_voice_prompt(in_turn, threads):
    mimis, audio = pair_of(ENGLISH), noise(1, 1, 240_000, scale=0.1)
    calls = {key: lambda mimi=mimi: mimi.encode_to_latent(audio) for key, mimi in mimis.items()}
    calls["fastmimi"]()  # packs weights
    results = in_turn(f"{ENGLISH}, voice prompt of 10 s, {torch.get_num_threads()} threads", calls, 3)
    assert relative_error(results["fastmimi"], results["pocket_tts"]) < 1e-5


@pytest.mark.parametrize("quantize", [False, True], ids=["fp32", "int8"])
@pytest.mark.parametrize("name", [ENGLISH, MEDIUM, SMALLEST])
def bench_generate_audio(in_turn, tmp_path, name, quantize):
    from fastmimi.compat.pocket_tts import accelerate

    tts = pocket.random_tts(name, tmp_path, quantize=quantize)
    mimis = {"pocket_tts": tts.mimi, "fastmimi": accelerate(tts).mimi, "silence": Silence()}
    voice = tts.get_state_for_audio_prompt(noise(1, 72_000, scale=0.1))

    def generate(key):
        tts.mimi = mimis[key]
        torch.manual_seed(0)
        return tts.generate_audio(voice, pocket.text(6))  # 4 s

    calls = {key: lambda key=key: generate(key) for key in mimis}
    for call in calls.values():
        call()
    results = in_turn(f"{name}, generate_audio, language model in {'int8' if quantize else 'fp32'}", calls, 3)
    assert relative_error(results["fastmimi"], results["pocket_tts"]) < 1e-5
