"""The dispatcher: what it chooses, what it says, what it refuses."""

import importlib
import inspect
import typing

import pytest
import torch

import fastmimi
from fastmimi.devtools.testing import noise, small_model
from fastmimi.runtime import dispatch
from fastmimi.runtime.ops import OPS, Ops


def test_table_has_a_row_per_op_with_reasons():
    rows = fastmimi.explain("cpu", torch.float32)
    assert [row.op for row in rows] == list(OPS) == list(Ops._fields)
    for row in rows:
        assert row.chosen in dispatch.CANDIDATES and row.reason
        assert all(sentence for _, sentence in row.passed_over)


def test_reference_can_be_asked_for():
    rows = fastmimi.explain(impl="reference")
    assert {row.chosen for row in rows} == {"reference"}
    rows = fastmimi.explain(impl={"resblock": "reference"})
    assert {row.reason for row in rows if row.op == "resblock"} == {"asked for by impl="}


def test_a_requested_kernel_that_cannot_run_is_an_error_with_its_reason(monkeypatch):
    def why_not(candidate, op, target):
        return None if candidate == "reference" else "it is Sunday"

    monkeypatch.setattr(dispatch, "why_not", why_not)
    with pytest.raises(fastmimi.InputError, match="asked to run as 'triton', which it cannot: it is Sun"):
        dispatch.explain("cpu", torch.float32, {"rvq_encode": "triton"})


def test_auto_takes_the_first_that_can_run_and_lists_the_others(monkeypatch):
    def why_not(candidate, op, target):
        return "not today" if candidate == "triton" else None

    monkeypatch.setattr(dispatch, "why_not", why_not)
    row = dispatch.explain("cpu", torch.float32)[0]
    assert row.chosen == "cpu" and row.passed_over == (("triton", "not today"),)


def test_the_reason_is_speed_or_that_nothing_else_runs(monkeypatch):
    able = {"cpu", "reference"}
    monkeypatch.setattr(dispatch, "why_not", lambda candidate, *_: None if candidate in able else "it is Sunday")
    assert {(row.chosen, row.reason) for row in dispatch.explain()} == {
        ("cpu", "first of triton, cpu, onednn, reference that can run here")
    }
    able.remove("cpu")
    assert {(row.chosen, row.reason) for row in dispatch.explain()} == {("reference", "no kernel can run here")}


def test_a_composed_op_names_the_kernel_inside(monkeypatch):
    """As if Triton had no kernel of the transformer layer: its reference runs, around the kernel of attention."""
    absent = "this version of fastmimi has no triton kernel for transformer_layer"
    kernels = set(OPS) - {"transformer_layer"}
    monkeypatch.setattr(dispatch, "why_not", lambda _, op, __: None if op in kernels else absent)
    monkeypatch.setattr(dispatch, "is_absent", lambda op, _: op not in kernels)
    rows = {row.op: row for row in dispatch.explain(impl="triton")}
    layer = rows["transformer_layer"]
    assert (layer.chosen, layer.inside) == ("reference", (("window_attention", "triton"),))
    assert "composed of window_attention" in layer.reason and layer.passed_over == (("triton", absent),)
    assert {row.reason for op, row in rows.items() if op in kernels} == {"asked for by impl="}
    with pytest.raises(fastmimi.InputError, match="transformer_layer was asked to run as 'triton', which it cannot"):
        dispatch.explain(impl={"transformer_layer": "triton"})


def test_a_kernel_of_a_composed_op_has_no_other_kernel_inside():
    rows = {impl: dispatch.explain(impl=impl) for impl in ("onednn", "reference")}
    inside = {impl: {pair for row in rows[impl] for pair in row.inside} for impl in rows}
    assert inside == {
        "onednn": {("causal_conv1d", "onednn"), ("resblock", "onednn")},
        "reference": {(op, "reference") for op in ("causal_conv1d", "resblock", "window_attention")},
    }


def test_models_call_the_ops_that_a_missing_one_stands_for(monkeypatch):
    assert dispatch.bind("cpu", torch.float32, "reference").audio_resblock is None
    kernel = dispatch.implementation("audio_resblock", "reference")
    monkeypatch.setattr(dispatch, "why_not", lambda candidate, *_: None)
    monkeypatch.setattr(dispatch, "implementation", lambda op, candidate: kernel)
    monkeypatch.setattr(dispatch, "_tables", {})
    assert dispatch.bind("cpu", torch.float32).audio_resblock is kernel


def test_a_pytorch_without_onednn_says_so(monkeypatch):
    from fastmimi.kernels.onednn import _prepacked

    monkeypatch.setattr(_prepacked, "onednn", object())  # has none of the operations
    monkeypatch.setattr(_prepacked, "refusal", _prepacked.refusal.__wrapped__)
    sentence = _prepacked.unsupported(dispatch.Target("cpu", torch.float32))
    assert sentence is not None and "refuses oneDNN's operations" in sentence


def test_an_import_error_of_our_own_is_not_hidden(monkeypatch):
    def broken(name):
        raise ImportError("a bug")

    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(dispatch.importlib, "import_module", broken)
    with pytest.raises(ImportError, match="a bug"):
        dispatch.explain("cpu", torch.float32)


@pytest.mark.parametrize("impl, sentence", [("fast", "got 'fast'"), ({"softmax": "cpu"}, "unknown op 'softmax'")])
def test_bad_impl(impl, sentence):
    with pytest.raises(ValueError, match=sentence):
        fastmimi.load("random:0", impl=impl)


def test_impl_reaches_the_model():
    model = small_model(upsampling_ratios=[4, 3, 2])
    audio = noise(1, 1, 480)
    auto = model.encode(audio)
    model.impl = "reference"
    assert torch.equal(model.encode(audio), auto)
    assert {row.chosen for row in model.explain()} == {"reference"}


def arguments(function):
    """{name: (kind, default)} of a function's arguments, without `self`."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: (p.kind, p.default) for p in parameters if p.name != "self"}


@pytest.mark.parametrize("op", OPS)
def test_every_backend_has_the_arguments_of_the_signature(op):
    hint = typing.get_type_hints(Ops)[op]
    wanted = arguments((typing.get_args(hint) or [hint])[0].__call__)  # the first of `X | None`
    schema = OPS[op]
    assert {*schema.names, *schema.state_names} <= wanted.keys()
    for backend, path in dispatch.CANDIDATES.items():
        if dispatch.why_not(backend, op, dispatch.Target("cpu", torch.float32)) and backend != "reference":
            continue
        mine = arguments(getattr(importlib.import_module(f"{path}.{op}"), op))
        if backend == "reference":  # takes the inner op of a composed one, and passes its state on
            mine = {name: what for name, what in mine.items() if name not in ("attention", "state")}
            mine |= {name: wanted[name] for name in schema.state_names}
        left_to_the_reference = {"dropout", "residual_dropout"} if backend != "reference" else set()
        assert mine == {name: what for name, what in wanted.items() if name not in left_to_the_reference}


def test_a_backend_may_lack_an_op(monkeypatch):
    """Asked for as a whole, the backend runs what it has, and the reference the rest; asked for by name, it refuses."""
    before = dispatch.is_absent
    monkeypatch.setattr(
        dispatch, "is_absent", lambda op, name: (op, name) == ("resblock", "onednn") or before(op, name)
    )
    rows = {row.op: row for row in dispatch.explain(impl="onednn")}
    absent = {"resblock": "reference", "audio_resblock": "reference"}
    assert {op: row.chosen for op, row in rows.items()} == dict.fromkeys(OPS, "onednn") | absent
    assert rows["resblock"].reason == "composed of PyTorch's own ops"
    assert rows["resblock"].passed_over == (("onednn", "this version of fastmimi has no onednn kernel for resblock"),)
    with pytest.raises(fastmimi.InputError, match="resblock was asked to run as 'onednn', which it cannot"):
        dispatch.explain(impl={"resblock": "onednn"})
