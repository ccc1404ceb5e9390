"""Kernels as PyTorch ops: opcheck on each, offline and in a step of a stream; weights packed once; errors that help."""

import pytest
import torch

from fastmimi import dispatch, library
from fastmimi.ops import OPS, SCHEMAS
from fastmimi.testing import noise

pytestmark = pytest.mark.kernels
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def history(channels, length):
    flags = {"first": torch.tensor([True, False]), "active": torch.tensor([True, False])}
    return {"history": noise(2, channels, length, seed=9), **flags}


def cases():
    """(op, tensors, options, state): what a model calls the op with."""
    x, q = noise(2, 6, 11), noise(2, 2, 5, 8)
    weights = (noise(3, 6, 3), noise(3), noise(6, 3, 1), noise(6))
    ring = {
        "cache_k": noise(2, 2, 4, 8, seed=1),
        "cache_v": noise(2, 2, 4, 8, seed=2),
        "active": torch.tensor([True] * 2),
    }
    overlap = {"overlap": noise(2, 5, 2), "active": torch.tensor([True, False])}
    codebooks, codes = noise(3, 16, 6), torch.randint(0, 16, (3, 7))
    pad = {"pad": [2, 0], "pad_mode": "replicate"}
    return [
        (
            "causal_conv1d",
            (x, noise(4, 6, 3), noise(4), noise(2, 4, 11)),
            {**pad, "pre": "elu", "post": "silu"},
            history(6, 2),
        ),
        ("causal_conv1d", (x, noise(4, 6, 4), None, None), {"stride": 2, "pad": [2, 1]}, history(6, 2)),
        ("causal_conv_transpose1d", (x, noise(6, 5, 4), noise(5)), {"stride": 2, "trim": [1, 1]}, overlap),
        ("causal_conv_transpose1d", (noise(2, 5, 4), noise(5, 1, 4), None), {"stride": 2, "groups": 5}, overlap),
        ("resblock", (x, *weights), pad, history(6, 2)),
        ("window_attention", (q, q, q, noise(4)), {"window": 4}, {"offset": torch.tensor([3, 0]), **ring}),
        ("rvq_encode", (noise(7, 6), codebooks), {}, {}),
        ("rvq_decode", (codes, codebooks), {}, {}),
    ]


@pytest.mark.parametrize("name, tensors, options, state", cases(), ids=lambda v: v if isinstance(v, str) else "")
def test_opcheck(name, tensors, options, state):
    dispatch.implementation(name, "triton")
    tensors = tuple(t if t is None else t.to(DEVICE) for t in tensors)
    state = {key: t.to(DEVICE) for key, t in state.items()}
    trained = [t.clone().requires_grad_(t.is_floating_point()) if t is not None else None for t in tensors]
    torch.library.opcheck(library.op(f"{name}_triton").default, tuple(trained), options)
    if state:
        torch.library.opcheck(library.op(f"{name}_triton_step").default, tensors, {**state, **options})


def test_every_op_is_checked():
    assert {name for name, *_ in cases()} == set(OPS) == set(SCHEMAS)


def test_a_step_without_its_state_is_refused():
    conv = dispatch.implementation("causal_conv1d", "triton")
    with pytest.raises((RuntimeError, TypeError)):
        conv(*(noise(*shape).to(DEVICE) for shape in ((1, 2, 3), (2, 2, 3))), history=noise(1, 2, 2).to(DEVICE))


def test_weights_are_packed_once():
    from fastmimi.kernels.triton import _launch

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
    layer = torch.nn.Linear(64, 64)  # a round trip that loses digits, perhaps to the same address
    memory.packed(layer.weight, "form", pack)
    layer.half().float()
    assert torch.equal(memory.packed(layer.weight, "form", pack), layer.weight)
    with torch.inference_mode():
        fresh = noise(3, 3)
        memory.packed(fresh, "form", pack)
        fresh.mul_(2)
        assert torch.equal(memory.packed(fresh, "form", pack), fresh)


def test_a_kernel_that_cannot_be_built_says_so(monkeypatch):
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


@pytest.mark.parametrize("device, dtype, sentence", [
    ("cpu", torch.float64, "not in float64"), ("mps", torch.float32, "not on mps"),
])  # fmt: skip
def test_what_is_not_supported(device, dtype, sentence):
    for row in dispatch.explain(device, dtype):
        assert sentence in dict(row.passed_over)["triton"]


def test_the_interpreter_runs_only_if_asked_for():
    if torch.cuda.is_available():
        pytest.skip("the kernels run on the GPU, not in the interpreter")
    assert all("if asked for" in dict(row.passed_over)["triton"] for row in dispatch.explain())
    assert {row.chosen for row in dispatch.explain(impl="triton")} == {"triton"}
