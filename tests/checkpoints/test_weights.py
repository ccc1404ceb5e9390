"""Checkpoints are loaded and saved in every layout; one error lists all mismatches; nothing is unpickled."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastmimi
from fastmimi.checkpoints import kyutai, weights
from fastmimi.devtools.testing import CONFIGS, noise, relative_error, small_model

FAST = {"upsampling_ratios": [4, 3, 2]}  # short frames, of 48 samples


@pytest.fixture(scope="module")
def model():
    model = small_model(**FAST)
    for codebook in (m for m in model.modules() if hasattr(m, "embed_sum")):
        codebook.cluster_usage.uniform_(0.5, 2.0)
    return model


@pytest.fixture
def directory(model, tmp_path):
    fastmimi.save_pretrained(model, tmp_path / "model")
    return tmp_path / "model"


def assert_same_results(mine, theirs):
    audio = noise(1, mine.config.audio_channels, 500)
    codes = theirs.encode(audio)
    assert torch.equal(mine.encode(audio), codes)
    assert relative_error(mine.decode(codes), theirs.decode(codes)) < 1e-6


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "mimi"])
def test_save_and_load_a_directory(name, tmp_path):
    model = small_model(name, **FAST)
    fastmimi.save_pretrained(model, tmp_path)
    again = fastmimi.load(tmp_path)
    assert again.config == model.config
    assert_same_results(again, model)
    assert not any(p.requires_grad for p in again.parameters()) and not again.training
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1  # also of model.safetensors, to which safetensors gives its own


@pytest.mark.parametrize("name", ["small", "ratios", "residual_layers", "shortcut", "semantic", "stereo"])
def test_save_and_load_kyutais_layout(name, tmp_path):
    """The layout has no configuration: it comes from config.json, since shapes do not determine the number of heads."""
    model = small_model(name, **FAST)
    fastmimi.save_kyutai(model, tmp_path / "tokenizer-test.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    assert_same_results(fastmimi.load(tmp_path / "tokenizer-test.safetensors"), model)
    assert_same_results(fastmimi.load(tmp_path), model)


@pytest.mark.slow
def test_the_configuration_is_inferred_from_shapes(tmp_path):
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = fastmimi.MimiCodecConfig(num_filters=8, hidden_size=128, upsample_groups=128, num_quantizers=9, **heads)
    model = weights.random(config)
    model.eval().requires_grad_(False)
    fastmimi.save_kyutai(model, tmp_path / "a.safetensors")
    fastmimi.save_pretrained(model, tmp_path / "b")
    for file in ("a.safetensors", "b/model.safetensors"):
        (tmp_path / "b" / "config.json").unlink(missing_ok=True)
        again = fastmimi.load(tmp_path / file)
        assert again.config == model.config
        assert_same_results(again, model)


def test_kyutai_round_trip_is_exact(model):
    flat = model.state_dict()
    back = kyutai.to_flat(kyutai.from_flat(flat, model.config), model.config)
    assert back.keys() == flat.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in flat.items())


SPELLINGS = [
    {"self_attn.in_proj_weight": "self_attn.in_projs.0.weight", "self_attn.out_proj.": "self_attn.out_projs.0."},
    {"self_attn.in_proj_weight": "self_attn.in_proj.weight"},
    {"embedding_sum": "embed_sum", "cluster_usage": "cluster_size", "_initialized": "inited"},
    {"embedding_sum": "embed_avg"},
]


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: next(iter(s.values())))
def test_other_names_in_kyutais_layout(model, spelling, tmp_path):
    state = kyutai.from_flat(model.state_dict(), model.config)
    respelled = {}
    for name, tensor in state.items():
        for old, new in spelling.items():
            name = name.replace(old, new)
        respelled[name] = tensor.contiguous()
    assert respelled.keys() != state.keys()
    save_file(respelled, tmp_path / "tokenizer-x.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    assert_same_results(fastmimi.load(tmp_path), model)


@pytest.mark.parametrize("spelling", ["weight_norm", "parametrizations"])
@pytest.mark.parametrize("layout", ["flat", "kyutai"])
def test_weight_norm_is_folded(model, spelling, layout, tmp_path):
    state = model.state_dict()
    if layout == "kyutai":
        state = kyutai.from_flat(state, model.config)
    g_name, v_name = "weight_g", "weight_v"
    if spelling == "parametrizations":
        g_name, v_name = (f"parametrizations.weight.original{i}" for i in (0, 1))
    for name in [n for n in state if n.endswith(("conv.weight", "convtr.weight"))]:
        weight = state.pop(name)
        base = name.removesuffix("weight")
        state[base + g_name] = weight.flatten(1).norm(dim=1).reshape(-1, 1, 1)
        state[base + v_name] = weight * 3.0
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    assert_same_results(fastmimi.load(tmp_path / "model.safetensors"), model)


def test_nested_names_and_shards(model, directory):
    """A checkpoint in the nested layout of transformers >= 5.20, in two files with an index."""
    state = load_file(directory / "model.safetensors")
    nested = {}
    for name, tensor in state.items():
        for half in ("encoder", "decoder"):
            name = (
                name.replace(f"{half}.layers.", f"{half}.{half}_seanet.layers.")
                if name.startswith(half + ".")
                else name
            )
        for prefix, home in (("encoder_transformer", "encoder"), ("downsample", "encoder"),
                             ("decoder_transformer", "decoder"), ("upsample", "decoder")):  # fmt: skip
            name = f"{home}.{name}" if name.startswith(prefix) else name
        nested[name] = tensor
    names = sorted(nested)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, shard in shards.items():
        save_file({name: nested[name] for name in shard}, directory / file)
    (directory / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, shard in shards.items() for name in shard}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same_results(fastmimi.load(directory), model)


def test_one_error_lists_all_tensors_that_do_not_fit(directory):
    state = load_file(directory / "model.safetensors")
    del state["decoder.layers.0.conv.bias"]
    state["extra.weight"] = torch.zeros(1)
    state["upsample.conv.weight"] = torch.zeros(3, 1, 4)
    save_file(state, directory / "model.safetensors")
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole message is compared)
        fastmimi.load(directory)
    assert str(error.value) == (
        "the checkpoint does not fit the model: missing decoder.layers.0.conv.bias; unknown extra.weight; "
        "upsample.conv.weight must be (32, 1, 4), got (3, 1, 4)"
    )


def test_the_error_counts_the_tensors_that_it_omits(directory):
    state = load_file(directory / "model.safetensors")
    save_file({k: v for k, v in state.items() if not k.startswith("decoder")}, directory / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing decoder_transformer.*; and \d+ more$"):
        fastmimi.load(directory)


def test_half_precision_files_and_models(directory):
    half = {k: v.bfloat16() for k, v in load_file(directory / "model.safetensors").items()}
    save_file(half, directory / "model.safetensors")
    again = fastmimi.load(directory, dtype=torch.bfloat16)
    assert again.dtype == torch.bfloat16
    assert {t.dtype for n, t in again.state_dict().items() if "codebook" in n} == {torch.float32}
    assert fastmimi.load(directory).dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 7])
def test_random_models_are_reproducible(seed):
    a, b = (fastmimi.load(f"random:{seed}", num_codebooks=8) for _ in range(2))
    assert weights.fingerprint(a) == weights.fingerprint(b)
    assert a.num_codebooks == 8 and a.total_codebooks == 32
    assert weights.fingerprint(a) != weights.fingerprint(fastmimi.load("random:1"))


def test_the_fingerprint_depends_only_on_the_quantizer(model):
    mine = weights.random(model.config)
    mine.load_state_dict(model.state_dict())
    before = weights.fingerprint(mine)
    with torch.no_grad():
        next(mine.decoder.parameters()).add_(1)
    assert weights.fingerprint(mine) == weights.fingerprint(mine.bfloat16()) == before
    mine.quantizer.acoustic_residual_vector_quantizer.layers[2].codebook.embed_sum[3, 4] += 1e-3
    assert weights.fingerprint(mine) != before


def test_only_the_encoder_of_a_full_checkpoint(model, directory):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "decoder_config": None}))
    half = fastmimi.load(directory)
    assert half.decoder is None and half.upsample is None
    assert torch.equal(half.encode(noise(1, 1, 500)), model.encode(noise(1, 1, 500)))


def test_bad_sources(directory, tmp_path):
    whole = (directory / "model.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "weights.pt").write_bytes(b"\x80\x04")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name, sentence in {
        "cut.safetensors": "cut.safetensors is not a complete safetensors file",
        "empty.safetensors": "empty.safetensors is not a complete safetensors file",
        "weights.pt": "weights.pt is not a .safetensors file; pickled checkpoints can run code and are not read",
        "other.safetensors": "this is not a Mimi checkpoint: it has no encoder.layers.0.conv.weight",
        "missing.safetensors": "no model at .*missing.safetensors",
        "missing": "no model at .*missing': pass a directory",
    }.items():
        with pytest.raises(ValueError, match=sentence):
            fastmimi.load(tmp_path / name)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"holds no model\.safetensors of a Mimi and 0 tokenizer-\*\.safetensors"):
        fastmimi.load(tmp_path / "none")
    (directory / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"holds no model\.safetensors of a Mimi"):
        fastmimi.load(directory)
    (directory / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        fastmimi.load(directory)


def test_the_error_without_network_says_what_to_pass_instead(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"cannot fetch 'nobody/mimi' from the hub .*pass a local directory"):
        fastmimi.load("nobody/mimi")


def test_a_failed_write_leaves_the_target_as_it_was(model, tmp_path, monkeypatch):
    target = tmp_path / "k.safetensors"
    target.write_text("before")

    def full_disk(tensors, path, metadata):
        path.write_text("half")
        raise OSError("No space left on device")

    monkeypatch.setattr(weights, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        fastmimi.save_kyutai(model, target)
    assert target.read_text() == "before" and list(tmp_path.iterdir()) == [target]


def test_configurations_that_kyutais_layout_cannot_represent(tmp_path):
    with pytest.raises(ValueError, match="requires attention without biases"):
        fastmimi.save_kyutai(small_model("attention"), tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_config_without_a_model_type(directory):
    config = json.loads((directory / "config.json").read_text())
    del config["model_type"]
    (directory / "config.json").write_text(json.dumps({**config, "sliding_window": 7}))
    assert fastmimi.load(directory).config.sliding_window == 7
    assert fastmimi.load(directory / "model.safetensors").config.sliding_window == 7


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda t: t.int(), "decoder.layers.0.conv.weight must be floating-point, got torch.int32"),
        (lambda t: t > 0, "decoder.layers.0.conv.weight must be floating-point, got torch.bool"),
        (lambda t: t.flatten(), r"decoder.layers.0.conv.weight must be \(\d+, 32, 7\), got \(\d+,\)"),
    ],
)
def test_tensors_of_a_wrong_dtype_or_rank(directory, change, sentence):
    state = load_file(directory / "model.safetensors")
    state["decoder.layers.0.conv.weight"] = change(state["decoder.layers.0.conv.weight"])
    save_file(state, directory / "model.safetensors")
    with pytest.raises(fastmimi.InputError, match=sentence):
        fastmimi.load(directory)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["flat", "kyutai"])
def test_shapes_that_determine_no_configuration(model, tmp_path, layout):
    """Without a config.json, a tensor that is missing, empty or of a wrong rank raises InputError."""
    state = model.state_dict() if layout == "flat" else kyutai.from_flat(model.state_dict(), model.config)
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    for name in (name for name in state if ".1." not in name):
        for change in (None, state[name].sum(-1), torch.zeros(()), state[name][:0], state[name][None]):
            changed = {**state, name: change}
            if change is None:
                del changed[name]
            save_file(changed, tmp_path / "tokenizer-x.safetensors")
            with pytest.raises(fastmimi.InputError):
                fastmimi.load(tmp_path / "tokenizer-x.safetensors")
            (tmp_path / "tokenizer-x.safetensors").unlink()


@pytest.mark.parametrize("listed", [None, [], {}, {"a": 3}, {"a": "../model.safetensors"}, {"a": "/etc/passwd"}])
def test_an_index_names_files_beside_it(directory, listed):
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    with pytest.raises(fastmimi.InputError, match="must map names of weights to names of files, got weight_map"):
        fastmimi.load(directory)


@pytest.mark.parametrize("name, sentence", [("a\nb", r"unknown 'a\\nb'$"), ("x" * 9000, r"unknown 'x+\.\.\.x+'$")])
def test_tensor_names_in_errors_are_quoted_and_shortened(directory, name, sentence):
    state = load_file(directory / "model.safetensors")
    save_file({**state, name: torch.zeros(1)}, directory / "model.safetensors")
    with pytest.raises(fastmimi.InputError, match=sentence):
        fastmimi.load(directory)
