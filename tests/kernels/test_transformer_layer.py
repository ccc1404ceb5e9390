"""transformer_layer, each implementation, against an explicit computation in fp64."""

import pytest
import torch
import torch.nn.functional as F

from fastmimi.devtools.testing import assert_as_exact, noise, relative_error
from fastmimi.reference.transformer_layer import transformer_layer as reference
from fastmimi.reference.window_attention import window_attention as attention
from fastmimi.runtime import arrivals, packing

WIDTH, HIDDEN = 24, 50
FREQUENCIES = 13  # their index among the op's tensors; they are fp32 in every precision


def frequencies(dim=8):
    return 1.0 / (10_000.0 ** (torch.arange(0, dim, 2) / dim))


def case(width=WIDTH, hidden=HIDDEN, heads=4, kv_heads=2, dim=8, biases=False, dtype=torch.float32):
    """The op's tensors after x: weights, frequencies, and biases if asked for."""
    wide, narrow = heads * dim, kv_heads * dim
    shapes = [
        (width,), (width,), (wide, width), (narrow, width), (narrow, width), (width, wide), (width,),
        (width,), (width,), (hidden, width), (width, hidden), (width,),
    ]  # fmt: skip
    weights = [noise(*shape, seed=i, scale=shape[-1] ** -0.5 if len(shape) == 2 else 0.5).to(dtype)
               for i, shape in enumerate(shapes)]  # fmt: skip
    extra = [noise(n, seed=20 + i).to(dtype) for i, n in enumerate((wide, narrow, narrow, width))] if biases else []
    return [*weights, frequencies(dim), *extra]


def double(tensors):
    return [t if i == FREQUENCIES - 1 else t.double() for i, t in enumerate(tensors)]


def rings(batch, window, kv_heads=2, dim=8, dtype=torch.float32):
    return {f"cache_{kind}": torch.zeros(batch, kv_heads, window, dim, dtype=dtype) for kind in "kv"}


def explicit_layer(x, weights, window):
    """The layer, one position at a time: 4 query heads and 2 key heads of 8, no biases, GELU."""
    n1w, n1b, q, k, v, o, s1, n2w, n2b, fc1, fc2, s2, inv_freq = double(weights)
    x = x.double()

    def norm(x, weight, bias):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias

    def rotated(heads, t):
        angle = torch.polar(torch.ones(4).double(), t * inv_freq.double())
        pair = torch.complex(heads[..., :4].contiguous(), heads[..., 4:].contiguous()) * angle
        return torch.cat([pair.real, pair.imag], dim=-1)

    n, rows = norm(x, n1w, n1b), []
    for t in range(x.shape[1]):
        query = rotated((n[:, t] @ q.t()).unflatten(-1, (4, 8)), t)
        visible = range(max(0, t - window + 1), t + 1)
        keys = torch.stack([rotated((n[:, j] @ k.t()).unflatten(-1, (2, 8)), j) for j in visible], dim=2)
        values = torch.stack([(n[:, j] @ v.t()).unflatten(-1, (2, 8)) for j in visible], dim=2)
        keys, values = (y.repeat_interleave(2, dim=1) for y in (keys, values))  # [B, 4, visible, 8]
        weight = ((keys @ query[..., None]).squeeze(-1) / 8**0.5).softmax(-1)
        rows.append((weight[..., None] * values).sum(2).flatten(-2))
    x = x + s1 * (torch.stack(rows, dim=1) @ o.t())
    hidden = norm(x, n2w, n2b) @ fc1.t()
    gelu = hidden * torch.special.ndtr(hidden)
    return x + s2 * (gelu @ fc2.t())


@pytest.mark.parametrize("length, window", [(1, 5), (7, 100), (13, 5)])
def test_whole(op, length, window):
    x, weights = noise(2, length, WIDTH, scale=1.0), case()
    mine = op(x, *weights, window=window, eps=1e-5)
    assert relative_error(mine, explicit_layer(x, weights, window)) < 1e-6


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu", "tanh"])
@pytest.mark.parametrize("biases", [False, True])
def test_activations_and_biases(op, activation, biases):
    x, weights = noise(2, 9, WIDTH, scale=1.0), case(biases=biases)
    options = {"window": 5, "eps": 1e-3, "activation": activation, "rope_scale": 1.1}
    assert_as_exact(op, reference, (x, *weights), longest=HIDDEN, fixed=(FREQUENCIES,), **options)


@pytest.mark.parametrize("function", [F.gelu, F.softplus])
def test_an_activation_may_be_a_function(op, function):
    x, weights = noise(1, 3, WIDTH), case()
    mine = op(x, *weights, window=5, eps=1e-5, activation=function)
    assert torch.equal(mine, reference(x, *weights, window=5, eps=1e-5, activation=function))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch, length", [(1, 2), (1, 70), (3, 40)])
def test_the_models_shape(op, dtype, batch, length):
    weights = case(512, 2048, 8, 8, 64, dtype=dtype)
    x, options = noise(batch, length, 512, scale=1.0).to(dtype), {"window": 250, "eps": 1e-5}
    assert_as_exact(op, reference, (x, *weights), longest=2048, fixed=(FREQUENCIES,), **options)


@pytest.mark.parametrize("norm, missing", [  # norms' biases and scales
    ("layer", [1, 6, 8, 11]), ("layer", [1]), ("layer", [6]), ("layer", [11]),
    ("rms", [1, 6, 8, 11]), ("rms", [1, 8]), ("rms", [1, 6, 8]), ("rms", [1, 8, 11]),
])  # fmt: skip
def test_norms_with_optional_tensors_missing(op, norm, missing):
    x, weights = noise(2, 9, WIDTH, scale=1.0) + 0.5, case(biases=True)
    wide = double(weights)
    n1b, s1, n2b, s2 = ((0.0 if i < 9 and i != 6 else 1.0) if i in missing else wide[i] for i in (1, 6, 8, 11))

    def normal(x, weight, bias):
        x = x if norm == "rms" else x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias

    n = normal(x.double(), wide[0], n1b)
    heads = [
        F.linear(n, w, b).unflatten(-1, (-1, 8)).transpose(1, 2) for w, b in zip(wide[2:5], wide[13:16], strict=True)
    ]
    attended = attention(*heads, weights[12], window=5).transpose(1, 2).flatten(-2)
    y = x.double() + s1 * F.linear(attended, wide[5], wide[16])
    truth = y + s2 * F.linear(F.gelu(F.linear(normal(y, wide[7], n2b), wide[9])), wide[10])
    given = [None if i in missing else w for i, w in enumerate(weights)]
    assert relative_error(op(x, *given, norm=norm, window=5, eps=1e-5), truth) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [35, 150, 300])
def test_many_rows(op, length, dtype):
    """The Triton kernels' tiles grow with the number of rows, here 70, 300 and 600."""
    x, weights = noise(2, length, WIDTH, scale=1.0).to(dtype), case(biases=True, dtype=dtype)
    options = {"window": 5, "eps": 1e-5, "activation": "silu"}
    assert_as_exact(op, reference, (x, *weights), longest=HIDDEN, fixed=(FREQUENCIES,), **options)


def test_rms_norm_has_no_bias(op):
    with pytest.raises(ValueError, match="an RMSNorm has no bias"):
        op(noise(1, 2, WIDTH), *case(), window=5, eps=1e-5, norm="rms")


def test_rms_norm_at_jodios_width(op):
    """1028 channels, no multiple of a vector."""
    weights = case(1028, 4112, 16, 16, 64)
    for i in (1, 6, 8, 11):
        weights[i] = None
    x, options = noise(1, 20, 1028, scale=1.0), {"window": 250, "eps": 1e-6, "norm": "rms"}
    assert_as_exact(op, reference, (x, *weights), longest=4112, fixed=(FREQUENCIES,), **options)


def test_residual_dropout(op):
    torch.manual_seed(0)
    x, weights = noise(1, 9, WIDTH, scale=1.0), case()
    options = {"window": 5, "eps": 1e-5}
    kept = op(x, *weights, **options)
    assert torch.equal(op(x, *weights, residual_dropout=0.0, **options), kept)
    dropped = op(x, *weights, residual_dropout=1.0, **options)
    assert torch.equal(dropped, x)


def test_some_biases_only(op):
    x, weights = noise(2, 5, WIDTH), case(biases=True)
    some = [*weights[:13], weights[13], None, weights[15], None]
    options = {"window": 3, "eps": 1e-5}
    assert relative_error(op(x, *some, **options), reference(x, *some, **options)) < 1e-6
    entries = set(packing._entries.values())
    op(x, *some, **options)
    assert set(packing._entries.values()) <= entries, "weights are packed once"


def test_widths_that_are_no_multiple_of_a_vector(op):
    weights = case(width=13, hidden=7, heads=2, kv_heads=1, dim=6)
    x, options = noise(2, 5, 13), {"window": 3, "eps": 1e-5}
    assert relative_error(op(x, *weights, **options), reference(x.double(), *double(weights), **options)) < 1e-6


@pytest.mark.parametrize("window", [1, 5, 30])
@pytest.mark.parametrize("sizes", [[1] * 20, [3, 1, 7, 9], [20]])
def test_chunks_equal_the_whole_and_masked_rows_stay(op, window, sizes):
    x, weights, options = noise(3, 20, WIDTH, scale=1.0), case(), {"window": window, "eps": 1e-5}
    whole = op(x, *weights, **options)
    offset, active, state, outputs = (
        torch.zeros(3, dtype=torch.int64),
        torch.tensor([True, False, True]),
        rings(3, window),
        [],
    )
    state["cache_k"][1] = state["cache_v"][1] = 7.0
    for chunk in x.split(sizes, dim=1):
        outputs.append(op(chunk, *weights, **options, offset=offset, active=active, **state))
        offset = offset + chunk.shape[1] * active
    assert relative_error(torch.cat(outputs, dim=1)[::2], whole[::2]) < 1e-6
    assert (state["cache_k"][1] == 7.0).all() and (state["cache_v"][1] == 7.0).all()


def test_non_contiguous_input(op):
    x, weights = noise(2, WIDTH, 6).transpose(1, 2), case()
    options = {"window": 5, "eps": 1e-5}
    assert relative_error(op(x, *weights, **options), op(x.contiguous(), *weights, **options)) < 1e-6


def test_edited_weights_are_used(op):
    x, weights, options = noise(1, 4, WIDTH), case(biases=True), {"window": 5, "eps": 1e-5}
    op(x, *weights, **options)
    for i in (2, 7, 11, 15):
        weights[i].mul_(0.5)
        assert relative_error(op(x, *weights, **options), reference(x, *weights, **options)) < 1e-6


def test_gradients_match_the_reference(op):
    inputs = [t.requires_grad_(i != 13) for i, t in enumerate((noise(1, 4, WIDTH), *case(biases=True)))]
    grads = []
    for f in (op, reference):
        y = f(*inputs, window=3, eps=1e-5)
        grads.append(torch.autograd.grad(y, [t for t in inputs if t.requires_grad], noise(*y.shape, seed=9)))
    for mine, theirs in zip(*grads, strict=True):
        assert relative_error(mine, theirs) < 1e-5


def test_gradients_of_the_reference():
    inputs = [t.requires_grad_(i != 13) for i, t in enumerate((noise(1, 3, 4).double(), *double(case(4, 6, 2, 1, 4))))]
    assert torch.autograd.gradcheck(lambda *a: reference(*a, window=2, eps=1e-5), inputs)


# Triton's kernel of a whole layer


def frames(batch=3, length=2, window=5, kv_heads=2, pool=None, dtype=torch.float32, ring=None, **options):
    """A frame of streams that are beyond their window, of which the third is not active: x, options and state."""
    x, count = noise(batch, length, WIDTH, seed=30, scale=1.0).to(dtype), pool or batch
    empty = rings(count, window, kv_heads, dtype=ring or dtype)
    state = {name: noise(*tensor.shape, seed=i).to(tensor.dtype) for i, (name, tensor) in enumerate(empty.items())}
    state |= {"offset": 3 + 4 * torch.arange(count), "active": torch.arange(count) != 2}
    if pool:
        state["rows"] = torch.tensor([(2 * i + 3) % pool for i in range(batch)])
    return x, {"window": window, "eps": 1e-5, **options}, state


def without(weights, *indices):
    return [None if i in indices else weight for i, weight in enumerate(weights)]


HALF = torch.bfloat16
WHOLE = {
    "plain": (case(), frames()),
    "one position": (case(), frames(batch=1, length=1)),
    "one key head, RMSNorm": (
        without(case(kv_heads=1), 1, 6, 8, 11), frames(kv_heads=1, norm="rms", activation="silu"),
    ),
    "biases, as many heads": (case(heads=2, biases=True), frames(activation="gelu_tanh", rope_scale=1.1)),
    "some biases, one scale": (without(case(biases=True), 6, 14), frames(activation="tanh")),
    "bf16": (case(biases=True, dtype=HALF), frames(batch=8, dtype=HALF, activation="relu")),
    "fp16": (case(dtype=torch.float16), frames(dtype=torch.float16)),
    "a pool": (case(), frames(pool=7)),
    "rings of a wider dtype": (case(dtype=HALF), frames(dtype=HALF, ring=torch.float32)),
    "no stream": (case(), (*frames(length=5)[:2], {})),
    "longer than the window": (case(), frames(length=4, window=3)),
    "odd widths": (case(13, 7, dim=6), (noise(2, 3, 13), {"window": 3, "eps": 1e-5}, {})),
}  # fmt: skip


@pytest.fixture
def kernel():
    """The module of Triton's kernel."""
    from fastmimi.kernels.triton import transformer_layer

    return transformer_layer


def run(kernel, name):
    """The output of a case, and its state, on the GPU if there is one; the names and grids of what is launched."""
    launched, launch = [], kernel._launch.launch

    def noted(op, function, grid, *args, **options):
        launched.append((function.__name__, grid))
        launch(op, function, grid, *args, **options)

    on = "cuda" if torch.cuda.is_available() else "cpu"
    weights, (x, options, state) = WHOLE[name]
    weights = [None if t is None else t.to(on) for t in weights]
    state = {key: t.to(on, copy=True) for key, t in state.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel._launch, "launch", noted)
        y = kernel.transformer_layer(x.to(on), *weights, **options, **state)
    return [y, *state.values()], launched


@pytest.mark.kernels
@pytest.mark.parametrize("name", WHOLE)
def test_one_launch_equals_five(kernel, monkeypatch, name):
    """Bit for bit: phase by phase among programs, all phases in one launch of a single program, and five kernels."""
    with monkeypatch.context() as patch:
        patch.setattr(kernel, "_whole", kernel._in_parts)
        parts, launched = run(kernel, name)
    assert [kind for kind, _ in launched].count("transformer_layer_linear_kernel") == 4 and len(launched) == 5
    assert parts[0].isfinite().all()
    for programs in (1, 2, 64):
        monkeypatch.setattr(kernel._launch, "programs", lambda x, programs=programs: programs)
        whole, launched = run(kernel, name)
        assert {kind for kind, _ in launched} == {"transformer_layer_kernel"}
        assert all(grid[0] <= programs for _, grid in launched)
        assert all(map(torch.equal, whole, parts)), programs
    monkeypatch.setattr(kernel._launch, "programs", lambda x: 1)
    monkeypatch.setattr(kernel._launch, "may_wait", lambda x: True)
    whole, launched = run(kernel, name)
    assert launched == [("transformer_layer_kernel", (1,))]
    assert all(map(torch.equal, whole, parts))


@pytest.mark.kernels
@pytest.mark.parametrize("programs", [1, 3])
def test_counters_are_set_back(kernel, monkeypatch, programs):
    """A state's counters are those of all its launches."""
    counters = torch.zeros(8, dtype=torch.int32, device="cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(kernel._launch, "programs", lambda x: programs)
    with arrivals.owned(counters):
        first = run(kernel, "plain")[0]
        assert not counters.any()
        assert all(map(torch.equal, run(kernel, "plain")[0], first))
    assert not counters.any()


@pytest.mark.kernels
@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "a pool", "bf16"])
def test_programs_wait_for_each_other(kernel, monkeypatch, programs_at_once, name):
    with monkeypatch.context() as patch:
        patch.setattr(kernel, "_whole", kernel._in_parts)
        parts, _ = run(kernel, name)
    launched = programs_at_once(3)
    counters = torch.zeros(8, dtype=torch.int32)
    with arrivals.owned(counters):
        whole, _ = run(kernel, name)
    assert launched == [(3,)] and not counters.any()
    assert all(map(torch.equal, whole, parts))


@pytest.mark.kernels
def test_what_takes_one_launch(kernel, monkeypatch):
    """One tile of rows whose queries fit in one tile too; on AMD GPUs, programs may not wait."""

    def launches(batch, length, heads=2, amd=False):
        names = []
        monkeypatch.setattr(kernel._launch, "launch", lambda op, function, *_, **__: names.append(function.__name__))
        monkeypatch.setattr(kernel._launch, "may_wait", lambda x: True)
        monkeypatch.setattr(kernel._launch, "is_amd", lambda x: amd)
        kernel.transformer_layer(noise(batch, length, WIDTH), *case(heads=heads), window=5, eps=1e-5)
        return names

    assert launches(8, 2) == launches(1, 16) == launches(2, 8, heads=4) == ["transformer_layer_kernel"]
    assert len(launches(17, 1)) == len(launches(1, 2, amd=True)) == 5
    assert "transformer_layer_kernel" not in launches(1, 9, heads=4)
