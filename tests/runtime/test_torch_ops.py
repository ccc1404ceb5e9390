"""Kernels as PyTorch ops: opcheck of each, offline and in a step of a stream, and errors."""

import pytest
import torch

from fastmimi.devtools.testing import noise
from fastmimi.runtime import dispatch
from fastmimi.runtime.ops import OPS

BACKENDS = ["cpu", "onednn", pytest.param("triton", marks=pytest.mark.kernels)]


def device(backend):
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def history_state(channels, length):
    flags = {"first": torch.tensor([True, False]), "active": torch.tensor([True, False])}
    return {"history": noise(2, length, channels, seed=9), **flags}


def layer_tensors():
    """x and the weights of a layer of width 6 with 2 heads of 8, and their biases."""
    shapes = [
        (2, 5, 6),
        (6,),
        (6,),
        *[(16, 6)] * 3,
        (6, 16),
        (6,),
        (6,),
        (6,),
        (9, 6),
        (6, 9),
        (6,),
        (4,),
        *[(16,)] * 3,
        (6,),
    ]
    return tuple(noise(*shape, seed=i) for i, shape in enumerate(shapes))


def cases():
    """(op, tensors, options, state), as a model passes them."""
    x, q = noise(2, 6, 11), noise(2, 2, 5, 8)
    weights = (noise(3, 6, 3), noise(3), noise(6, 3, 1), noise(6))
    ring = {
        "cache_k": noise(2, 2, 4, 8, seed=1),
        "cache_v": noise(2, 2, 4, 8, seed=2),
        "active": torch.tensor([True] * 2),
    }
    codebooks, codes = noise(3, 16, 6), torch.randint(0, 16, (3, 7))
    pad = {"pad": [2, 0], "pad_mode": "replicate"}
    return [
        (
            "causal_conv1d",
            (x, noise(4, 6, 3), noise(4), noise(2, 4, 11)),
            {**pad, "pre": "elu", "post": "silu"},
            history_state(6, 2),
        ),
        ("causal_conv1d", (x, noise(4, 6, 4), None, None), {"stride": 2, "pad": [2, 1]}, history_state(6, 2)),
        ("causal_conv_transpose1d", (x, noise(6, 5, 4), noise(5)), {"stride": 2, "trim": [1, 1]}, history_state(6, 1)),
        (
            "causal_conv_transpose1d",
            (noise(2, 5, 4), noise(5, 1, 4), None),
            {"stride": 2, "groups": 5},
            history_state(5, 1),
        ),
        ("resblock", (x, *weights), pad, history_state(6, 2)),
        ("audio_resblock", (x, *weights, noise(1, 6, 5), noise(1)), {"after": True, "post": "elu"}, {}),
        ("audio_resblock", (x[:, :1], *weights, noise(6, 1, 5), noise(6)), {"dilation": 2}, {}),
        ("window_attention", (q, q, q, noise(4)), {"window": 4}, {"offset": torch.tensor([3, 0]), **ring}),
        ("transformer_layer", layer_tensors(), {"window": 4, "eps": 1e-5}, {"offset": torch.tensor([3, 0]), **ring}),
        ("rvq_encode", (noise(7, 6), codebooks), {}, {}),
        ("rvq_decode", (codes, codebooks), {}, {}),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name, tensors, options, state", cases(), ids=lambda v: v if isinstance(v, str) else "")
def test_opcheck(backend, name, tensors, options, state):
    if dispatch.is_absent(name, backend):
        pytest.skip(f"there is no {backend} kernel of {name}")
    dispatch.implementation(name, backend)
    tensors = tuple(t if t is None else t.to(device(backend)) for t in tensors)
    state = {key: t.to(device(backend)) for key, t in state.items()}
    trained = [t.clone().requires_grad_(t.is_floating_point()) if t is not None else None for t in tensors]
    torch.library.opcheck(getattr(torch.ops.fastmimi, f"{name}_{backend}").default, tuple(trained), options)
    if state:
        step = getattr(torch.ops.fastmimi, f"{name}_{backend}_step").default
        torch.library.opcheck(step, tensors, {**state, **options})


def test_every_op_is_checked():
    assert {name for name, *_ in cases()} == set(OPS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_without_its_state_is_refused(backend):
    conv = dispatch.implementation("causal_conv1d", backend)
    x, weight, history = (noise(*shape).to(device(backend)) for shape in ((1, 2, 3), (2, 2, 3), (1, 2, 2)))
    with pytest.raises((RuntimeError, TypeError)):
        conv(x, weight, history=history)


@pytest.mark.kernels
def test_the_error_of_a_kernel_that_cannot_be_built():
    from fastmimi.kernels.triton import _launch

    class Unbuildable:
        def __getitem__(self, grid):
            def run(*args, **options):
                raise _launch.OutOfResources(300_000, 232_448, "shared memory")

            return run

    with pytest.raises(
        RuntimeError, match=r'of resblock cannot be built .*shared memory.*impl={"resblock": "reference"}'
    ):
        _launch.launch("resblock", Unbuildable(), (1,), noise(1))


@pytest.mark.kernels
@pytest.mark.parametrize("target, dtype, sentence", [
    ("cpu", torch.float64, "not in float64"), ("mps", torch.float32, "not on mps"),
])  # fmt: skip
def test_the_reason_says_what_triton_does_not_support(target, dtype, sentence):
    for row in dispatch.explain(target, dtype):
        assert sentence in dict(row.passed_over)["triton"]


@pytest.mark.kernels
def test_the_interpreter_runs_only_if_asked_for():
    if torch.cuda.is_available():
        pytest.skip("the kernels run on the GPU, not in the interpreter")
    assert all("if asked for" in dict(row.passed_over)["triton"] for row in dispatch.explain())
    assert {row.chosen for row in dispatch.explain(impl="triton")} == {"triton"}
