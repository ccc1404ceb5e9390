"""`replace_mimi` and `restore_mimi`: transformers' Mimi in a larger model becomes ours and back, sharing parameters."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

import fastmimi  # noqa: E402
from fastmimi.devtools.testing import SMALL, noise, relative_error  # noqa: E402

Codebook = transformers.models.mimi.modeling_mimi.MimiEuclideanCodebook


def fill_codebooks(codec):
    for key, buffer in codec.named_buffers():
        if key.endswith("embed_sum"):
            buffer.normal_(std=0.3)


def assert_same_output(mine, theirs):
    assert type(mine) is type(theirs)
    assert torch.equal(mine.audio_codes, theirs.audio_codes)
    assert relative_error(mine.audio_values, theirs.audio_values) < 1e-5


def tiny_moshi():
    config = transformers.MoshiConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, ffn_dim=32, vocab_size=32,
        audio_vocab_size=64, num_codebooks=4, audio_encoder_config=transformers.MimiConfig(**SMALL).to_dict(),
        depth_decoder_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 32,
                              "audio_vocab_size": 64, "num_codebooks": 4, "vocab_size": 32, "input_size": 16},
    )  # fmt: skip
    return transformers.MoshiForConditionalGeneration(config).eval(), "audio_encoder"


def tiny_csm():
    config = transformers.CsmConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, intermediate_size=32,
        num_codebooks=4, vocab_size=67, text_vocab_size=32, codec_config=transformers.MimiConfig(**SMALL).to_dict(),
        depth_decoder_config={"hidden_size": 16, "backbone_hidden_size": 16, "num_hidden_layers": 1,
                              "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32,
                              "num_codebooks": 4, "vocab_size": 67},
    )  # fmt: skip
    return transformers.CsmForConditionalGeneration(config).eval(), "codec_model"


@pytest.mark.parametrize("make", [tiny_moshi, tiny_csm])
@torch.no_grad()
def test_codecs_inside_larger_models(make):
    torch.manual_seed(0)
    model, name = make()
    codec = getattr(model, name)
    fill_codebooks(codec)
    audio = noise(1, 1, 4000)
    before, keys = codec(audio), list(model.state_dict())
    addresses = [p.data_ptr() for p in model.parameters()]
    assert fastmimi.replace_mimi(model) is model
    assert getattr(model, name) is codec and isinstance(codec, fastmimi.MimiModel)
    assert isinstance(codec, transformers.MimiModel) and type(codec).__name__ == "MimiModel"
    assert_same_output(codec(audio), before)
    assert "_binding" in codec.__dict__, "our core did the computation"
    assert list(model.state_dict()) == keys and [p.data_ptr() for p in model.parameters()] == addresses
    fastmimi.restore_mimi(model)
    assert type(codec) is transformers.MimiModel and not isinstance(codec, fastmimi.MimiModel)
    assert_same_output(codec(audio), before)
    assert {type(m) for m in codec.modules() if hasattr(m, "embed_sum")} == {Codebook}


@torch.no_grad()
def test_replacing_a_subclass_keeps_what_it_overrides():
    class Tokenizer(transformers.MimiModel):
        def encode(self, *args, **kwargs):
            return super().encode(*args, **kwargs).audio_codes + 1

    torch.manual_seed(0)
    peer = transformers.MimiModel(transformers.MimiConfig(**SMALL)).eval()
    fill_codebooks(peer)
    mine = Tokenizer(peer.config).eval()
    mine.load_state_dict(peer.state_dict())
    fastmimi.replace_mimi(mine)
    assert isinstance(mine, Tokenizer) and isinstance(mine, fastmimi.MimiModel)
    assert torch.equal(mine.encode(noise(1, 1, 4000)), peer.encode(noise(1, 1, 4000)).audio_codes + 1)
    assert type(fastmimi.restore_mimi(mine)) is Tokenizer
    ours = fastmimi.MimiModel(peer.config)
    assert type(fastmimi.restore_mimi(fastmimi.replace_mimi(ours))) is fastmimi.MimiModel


@torch.no_grad()
def test_a_model_restored_after_a_cast_runs():
    torch.manual_seed(0)
    model = transformers.MimiModel(transformers.MimiConfig(**SMALL)).eval()
    fill_codebooks(model)
    fastmimi.replace_mimi(model).bfloat16()
    assert {b.dtype for n, b in model.named_buffers() if "codebook" in n} == {torch.float32}
    fastmimi.restore_mimi(model)
    assert model(noise(1, 1, 4000).bfloat16()).audio_values.dtype == torch.bfloat16
