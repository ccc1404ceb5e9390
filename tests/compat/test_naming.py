"""The transformers drop-in has the argument names and output fields of the installed version of transformers."""

import inspect
import subprocess
import sys
import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers")

import fastmimi  # noqa: E402
from fastmimi.compat import transformers as drop_in  # noqa: E402
from fastmimi.devtools.testing import SMALL, noise  # noqa: E402


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    peer = transformers.MimiModel(transformers.MimiConfig(**SMALL, use_cache=True)).eval()
    mine = fastmimi.MimiModel(peer.config).eval()
    mine.load_state_dict(peer.state_dict())
    return mine, peer


def methods(module):
    models = [module.MimiModel, *([module.MimiEncoderModel, module.MimiDecoderModel] if drop_in.HALVES else [])]
    return [getattr(m, name) for m in models for name in ("forward", "encode", "decode") if hasattr(m, name)]


def test_signatures_equal_the_peers():
    assert [inspect.signature(m) for m in methods(fastmimi)] == [inspect.signature(m) for m in methods(transformers)]


def outcome(call):
    """The deprecation warnings and the result of a call, or (TypeError, None) if it raises that."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = call()
        except TypeError as error:
            return type(error), None
    return [str(w.message) for w in caught if issubclass(w.category, FutureWarning)], result


CALLS = {
    "all by keyword": lambda m: m.encode(
        padding_mask=None, use_streaming=True, padding_cache=None, num_quantizers=2, input_values=noise(1, 1, 1920)
    ),
    "all by position": lambda m: m.encode(noise(1, 1, 1920), None, 2, None, None, True),
    "unknown keyword": lambda m: m.decode(torch.zeros(1, 6, 2, dtype=torch.int64), nonsense=1),
    "the drop-in's own name": lambda m: m.encode(noise(1, 1, 1920), past=None),
    "no arguments": lambda m: m(),
    "the same argument twice": lambda m: m.decode(torch.zeros(1, 6, 2, dtype=torch.int64), audio_codes=None),
    "too many arguments": lambda m: m.decode(torch.zeros(1, 6, 2, dtype=torch.int64), None, None, None, None),
    "old name, encoder": lambda m: m.encoder(
        noise(1, 1, 1920), past_key_values=transformers.DynamicCache(), use_streaming=True
    ),
    "old name, decoder": lambda m: m.decoder(noise(1, 32, 3), past_key_values=transformers.DynamicCache()),
    "old name, transformers 5.24": lambda m: m.decode(
        torch.zeros(1, 6, 2, dtype=torch.int64), decoder_past_key_values=transformers.DynamicCache()
    ),
    "new name": lambda m: m.decode(torch.zeros(1, 6, 2, dtype=torch.int64), decoder_cache=None),
}


@pytest.mark.parametrize("name", CALLS)
@torch.no_grad()
def test_calls_succeed_or_fail_as_the_peers(models, name):
    if not drop_in.HALVES and name in ("old name, encoder", "old name, decoder"):
        pytest.skip("this transformers has no MimiEncoderModel")
    (mine, result), (theirs, expected) = (outcome(lambda m=m: CALLS[name](m)) for m in models)
    assert mine == theirs
    if expected is not None:
        assert type(result) is type(expected) and list(result.keys()) == list(expected.keys())
        for field, value in expected.items():
            if isinstance(value, torch.Tensor):
                assert result[field].shape == value.shape
            elif isinstance(value, transformers.Cache):
                assert result[field].get_seq_length() == value.get_seq_length()


WITH_OTHER_NAMES = """
import inspect, sys
from importlib.util import module_from_spec, find_spec
import transformers
name = "transformers.models.mimi.modeling_mimi"
spec = find_spec(name)
source = spec.loader.get_source(name)
for old in ("past_key_values", "cache"):
    for half in ("encoder", "decoder"):
        source = source.replace(f"{half}_{old}", f"{half}_memory")
module = sys.modules[name] = module_from_spec(spec)
exec(compile(source, spec.origin, "exec"), module.__dict__)

import torch, fastmimi
from fastmimi.devtools.testing import SMALL, noise
mine = fastmimi.MimiModel(fastmimi.MimiConfig(**SMALL, use_cache=True)).eval()
assert isinstance(mine, module.MimiModel) and "encoder_memory" in inspect.signature(mine.encode).parameters
audio, memory, cache, codes = noise(1, 1, 3840), None, None, []
with torch.no_grad():
    for chunk in audio.split(1920, -1):
        out = mine.encode(chunk, encoder_memory=memory, padding_cache=cache, use_streaming=True)
        memory, cache = out.encoder_memory, out.padding_cache
        codes.append(out.audio_codes)
    assert memory.get_seq_length() == 4
    assert torch.equal(torch.cat(codes, -1), mine.encode(audio).audio_codes)
    out = mine(audio)
    again = mine.decode(out.audio_codes, decoder_memory=out.decoder_memory)
assert again.decoder_memory.get_seq_length() == 8
"""


@pytest.mark.slow
def test_names_are_taken_from_the_installed_peer():
    """A version of transformers with other names for its caches works without changes to the drop-in."""
    done = subprocess.run([sys.executable, "-c", WITH_OTHER_NAMES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
