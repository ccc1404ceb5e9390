"""The native library: every variant that this processor runs, threads, alignment, scratch memory, its absence."""

import ctypes
import platform
import threading

import pytest
import torch

import fastmimi
from fastmimi.devtools import workloads
from fastmimi.devtools.testing import assert_as_exact, assert_nearest, noise, small_model
from fastmimi.kernels.cpu import _abi, _native
from fastmimi.kernels.cpu._variants import compiler_options
from fastmimi.runtime import dispatch, quantized
from fastmimi.runtime.ops import OPS

pytestmark = pytest.mark.skipif(not _native.variants(), reason="the native library is not built here")
NATIVE = [op for op in OPS if op != "audio_resblock"]  # on a CPU models call the two ops
ROWS = {"rvq_encode": [1, 37], "rvq_decode": [5]}  # in tests of the models' shapes; other ops have 3 and 61


@pytest.fixture(params=compiler_options(platform.machine()))
def variant(request):
    if request.param not in _native.variants():
        pytest.skip(f"this processor, or the compiler that built the library, has no {request.param}")
    with _native.using(request.param):
        yield request.param


def small_workloads():
    """(workload, rows) of the models' shapes: a few rows, and a number that is no multiple of a tile."""
    return [(w, rows) for w in workloads.distinct() if w.op in NATIVE for rows in ROWS.get(w.op, [3, 61])]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("workload, rows", small_workloads(), ids=str)
@torch.inference_mode()
def test_variants_are_as_exact_as_pytorch(variant, workload, rows, dtype):
    rows = rows * workload.options.get("stride", 1) if workload.op == "causal_conv1d" else rows
    workload.check("cpu", dtype, rows)


@pytest.mark.parametrize("function", ["elu", "silu", "gelu", "gelu_tanh", "tanh", "relu"])
def test_variants_compute_accurate_activations(variant, function):
    """The activation of a 1 x 1 convolution with weight 1, for arguments of all magnitudes; NaN stays NaN."""
    truths = {"gelu": torch.nn.functional.gelu, "tanh": torch.tanh, "relu": torch.relu}
    truths |= {"elu": torch.nn.functional.elu, "silu": torch.nn.functional.silu}
    truths["gelu_tanh"] = lambda x: torch.nn.functional.gelu(x, approximate="tanh")
    size = torch.logspace(-30, 2, 5000)
    x = torch.cat([-size, torch.zeros(1), size, torch.tensor([torch.nan])])
    one = torch.ones(1, 1, 1)
    call = dispatch.implementation("causal_conv1d", "cpu")
    mine = call(x[None, None], one, post=function)[0, 0]
    truth = truths[function](x.double())
    assert mine[-1].isnan() and mine[:-1].isfinite().all()
    assert ((mine - truth).abs() <= 2e-7 * x.abs().clamp(min=1))[:-1].all()
    if function == "elu":  # small arguments keep their relative precision
        near = x.abs() < 1e-3
        assert ((mine - truth).abs() <= 1.3e-7 * truth.abs())[near].all()


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("int8", [False, True])
def test_results_do_not_depend_on_the_number_of_threads(variant, threads, int8, monkeypatch):
    model = small_model(num_hidden_layers=1)
    monkeypatch.setattr(quantized, "LEAST_WEIGHTS", 1)
    if int8:
        quantized.round_weights(model)
    audio = noise(2, 1, 3 * model.frame_size + 11)
    codes = model.encode(audio)
    sound, before = model.decode(codes), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        state = model.new_state(2)
        streamed = torch.cat([model.encode(chunk, state=state) for chunk in audio.split(700, dim=-1)], dim=-1)
        assert torch.equal(model.encode(audio), codes)
        assert torch.equal(streamed, codes[..., :3])
        assert torch.equal(model.decode(codes), sound)
    finally:
        torch.set_num_threads(before)


def test_streams_in_threads_are_independent():
    model = small_model(num_hidden_layers=1)
    audio = noise(6, 1, 20 * model.frame_size)
    whole = model.encode(audio)
    results = {}

    def stream(i):
        state = model.new_state(1)
        chunks = audio[i : i + 1].split(model.frame_size // 2, dim=-1)
        results[i] = torch.cat([model.encode(chunk, state=state) for chunk in chunks], dim=-1)

    threads = [threading.Thread(target=stream, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(torch.cat([results[i] for i in range(6)]), whole)


def test_unaligned_tensors(variant):
    """Tensors whose addresses are not multiples of the vector size."""
    conv, reference = (dispatch.implementation("causal_conv1d", name) for name in ("cpu", "reference"))
    buffer, weight, bias = noise(1, 2000), noise(33, 7, 3), noise(33)
    for begin in (1, 2, 3):
        x = buffer[:, begin : begin + 7 * 50].view(1, 50, 7).transpose(1, 2)
        residual = buffer[:, begin : begin + 33 * 50].view(1, 33, 50)
        calls = (
            lambda x, weight, bias, residual, f=f: f(x, weight, bias, residual=residual, pad=(2, 0), pre="elu")
            for f in (conv, reference)
        )
        assert_as_exact(*calls, (x, weight, bias, residual), longest=7 * 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [16, 24, 64])
def test_reads_wrap_around_the_end_of_a_ring(variant, dim, dtype):
    """Steps of several lengths equal one call, also for heads of whole vectors, which are read in place."""
    attention, window, sizes = (
        dispatch.implementation("window_attention", "cpu"),
        10,
        [1, 3, 2, 7, 1, 15, 2, 9, 1, 1, 4],
    )
    q, k, v = (noise(2, 4, sum(sizes), dim, seed=i, scale=1.0).to(dtype) for i in range(3))
    inv_freq = 1.0 / (10_000.0 ** (torch.arange(0, dim, 2) / dim))
    rings = {f"cache_{kind}": torch.zeros(2, 4, window, dim, dtype=dtype) for kind in "kv"}
    offset, outputs = torch.zeros(2, dtype=torch.int64), []
    for chunk in zip(*(x.split(sizes, dim=2) for x in (q, k, v)), strict=True):
        active = torch.ones(2, dtype=torch.bool)
        outputs.append(attention(*chunk, inv_freq, window=window, offset=offset, active=active, **rings))
        offset = offset + chunk[0].shape[2]
    assert torch.equal(torch.cat(outputs, dim=2), attention(q, k, v, inv_freq, window=window))


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_old_contents_of_scratch_memory_are_ignored(variant, kind, monkeypatch):
    """Odd widths: the last group of channels is padded with weights of 0, and 0 times a NaN left there would be NaN."""
    odd = {"hidden_size": 34, "intermediate_size": 51, "num_filters": 6, "upsample_groups": 34}
    model = small_model(num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, **odd)
    if kind == "int8":
        monkeypatch.setattr(quantized, "LEAST_WEIGHTS", 1)
        quantized.round_weights(model)
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    model = model.to(dtype)
    for frames in (1, 7):
        audio, latents = noise(1, 1, frames * model.frame_size).to(dtype), noise(1, 34, frames).to(dtype)
        first = model.encode_to_latent(audio), model.decode_latent(latents)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fastmimi.models.checks.finite", lambda x: (x, None))
            for longer in (0, 1, 2, 5):  # which changes the layout of the scratch memory
                nans = torch.full((1, 1, (frames + longer) * model.frame_size), torch.nan, dtype=dtype)
                assert model.encode_to_latent(nans).isnan().all()
                model.decode_latent(torch.full((1, 34, frames + longer), torch.nan, dtype=dtype))
        again = model.encode_to_latent(audio), model.decode_latent(latents)
        assert all(map(torch.equal, first, again))


def test_searches_of_rows_with_a_stride(variant):
    wide, codebooks = noise(20, 40, seed=1), noise(3, 64, 16, seed=2)
    search = dispatch.implementation("rvq_encode", "cpu")
    assert torch.equal(search(wide[:, 5:21], codebooks), search(wide[:, 5:21].contiguous(), codebooks))


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("size, dim", [(1, 3), (37, 5), (2048, 256)])
def test_searches_of_any_size(variant, rows, size, dim):
    x, codebooks = noise(rows, dim, scale=1.0), noise(3, size, dim, scale=1.0)
    assert_nearest(dispatch.implementation("rvq_encode", "cpu")(x, codebooks), x, codebooks)


def test_ties_go_to_the_first_entry(variant):
    codebooks = noise(1, 100, 8).repeat(1, 3, 1)  # each entry three times, in different panels
    x = noise(64, 8, seed=3)
    codes = dispatch.implementation("rvq_encode", "cpu")(x, codebooks)
    assert (codes < 100).all()
    assert torch.equal(codes, dispatch.implementation("rvq_encode", "cpu")(x, codebooks[:, :100]))


@pytest.mark.parametrize("seed", range(3))
def test_near_ties_are_decided_in_fp64(variant, seed):
    """Two entries whose distances fp32 cannot tell apart: the nearer in fp64 is found, whichever comes first."""
    x = noise(50, 16, seed=seed, scale=1.0)
    codebooks = (x + 3.0 + 1e-6 * noise(50, 16, seed=seed + 9, scale=1.0)).repeat(1, 2).view(1, 100, 16)
    codebooks[0, ::2, 0] += 3e-7
    distances = torch.cdist(x.double(), codebooks[0].double())
    codes = dispatch.implementation("rvq_encode", "cpu")(x, codebooks)[0]
    assert torch.equal(distances.gather(1, codes[:, None])[:, 0], distances.amin(dim=1))


def test_explain_says_that_the_library_is_missing(monkeypatch):
    monkeypatch.setattr(_native, "variants", lambda: ())
    monkeypatch.setattr(_native, "_load", lambda: (None, "its native library is not built"))
    for row in fastmimi.explain("cpu", torch.float32):
        if row.op not in NATIVE:
            continue
        assert row.chosen == "onednn"
        assert dict(row.passed_over)["cpu"] == "its native library is not built"


@pytest.mark.parametrize("device, dtype, sentence", [
    ("cpu", torch.float64, "not in float64"), ("cpu", torch.float16, "not in float16"),
    ("cuda", torch.float32, "not on cuda"),
])  # fmt: skip
def test_the_error_says_what_is_not_supported(device, dtype, sentence):
    for op in NATIVE:
        with pytest.raises(fastmimi.InputError, match=sentence):
            dispatch.explain(device, dtype, {op: "cpu"})


def test_every_op_has_a_cpu_kernel():
    chosen = {row.op: row.chosen for row in fastmimi.explain("cpu", torch.float32)}
    assert chosen == {**dict.fromkeys(NATIVE, "cpu"), "audio_resblock": "reference"}


def test_the_openmp_runtime_is_that_of_pytorch():
    """Where PyTorch does not make its symbols visible to other libraries (AArch64), it is found and made visible."""
    runtime = _native.openmp_of_pytorch()
    assert runtime is None or hasattr(ctypes.CDLL(runtime), "GOMP_parallel")
    assert (runtime is None) == ("ATen parallel backend: OpenMP" not in torch.__config__.parallel_info())


def test_variants_of_other_machines_are_not_compiled():
    assert list(compiler_options("x86_64")) == ["avx512bf16", "avx512", "avx2", "portable"]
    assert list(compiler_options("aarch64")) == ["neon", "portable"]
    assert list(compiler_options("riscv64")) == ["portable"]


def test_the_library_declares_what_python_declares(variant):
    assert _abi.differences(_native.declarations(_native._load()[0], variant)) == []


@pytest.mark.parametrize("text, other, found", [
    ("CONSTANT, REPLICATE", "REPLICATE, CONSTANT", ["PadMode.CONSTANT", "PadMode.REPLICATE"]),
    ("long outputs, taps;", "long taps, outputs;", ["Weights.outputs", "Weights.taps"]),
    ("long outputs, taps;", "long outputs, kernel;", ["Weights.kernel", "Weights.taps"]),
    ("long outputs, taps;", "long outputs; float taps;", ["Weights.taps"]),
    ("long bytes_per_weight;", "long *bytes_per_weight;", ["Weights.bytes_per_weight"]),
    ("int kind, threads; }", "int kind, threads; bool last; }", ["LayerCall.last"]),
    ("struct Linear", "struct Affine", [f"{name}{field}" for name in ("Affine", "Linear")
                                        for field in ("", ".bias", ".dequantize", ".outputs", ".packed", ".scale")]),
])  # fmt: skip
def test_a_library_of_other_sources_is_refused(monkeypatch, text, other, found):
    rows = _native.declarations(_native._load()[0], "portable")
    changed = [(row.replace(text, other), size) for row, size in rows]
    monkeypatch.setattr(_native, "declarations", lambda *_: changed)
    library, why = _native._load.__wrapped__()
    assert library is None
    assert f"was built from other sources ({found[0]} differs)" in why
    assert _abi.differences(changed) == found


def test_a_structure_of_another_size_is_refused():
    rows = _native.declarations(_native._load()[0], "portable")
    assert _abi.differences((text, size + 8 * ("struct Output" in text)) for text, size in rows) == ["Output"]


def test_a_library_that_declares_nothing_is_refused():
    assert _native.declarations(ctypes.CDLL(None), "portable") == []
    assert "Input" in _abi.differences([])


def test_a_call_with_too_few_arguments_is_refused(variant):
    with pytest.raises(TypeError, match="AttentionCall has 2 fields, got 1"):
        _native.native().attention(_abi.Attention())


def test_mixed_dtypes_are_refused():
    model = small_model(num_hidden_layers=1)
    model.encoder_transformer.bfloat16()
    with pytest.raises(TypeError, match="must all be float32 or all bfloat16"):
        model.encode(noise(1, 1, model.frame_size))


def test_a_residual_may_be_shared_by_the_rows():
    x, weight, residual = noise(3, 4, 6), noise(5, 4, 1), noise(1, 5, 6, seed=4)
    conv = dispatch.implementation("causal_conv1d", "cpu")
    assert torch.equal(conv(x, weight, residual=residual), conv(x, weight, residual=residual.expand(3, 5, 6).clone()))


def test_codebooks_cast_from_fp64_are_searched_in_fp32():
    model = small_model().double().bfloat16()
    assert model.quantizer.semantic_residual_vector_quantizer.layers[0].codebook.embed_sum.dtype == torch.float32
    model.encode(noise(1, 1, model.frame_size).bfloat16())
