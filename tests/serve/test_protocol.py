"""Messages: there and back, and what is none."""

import re
from pathlib import Path
from typing import get_args

import msgspec
import pytest
import torch

from fastmimi import InputError
from fastmimi.devtools.testing import noise
from fastmimi.serve import protocol

READY = protocol.Ready(1, "demo", 48_000, 24_000, 12.5, 1920, 1, 8, 16, 2048, 4.0)


@pytest.mark.parametrize("message", [
    protocol.Init(), protocol.Init(num_codebooks=8, directions=("encode",), sample_rate=48_000, format="s16"),
    protocol.Audio(b"\x00" * 8), protocol.Codes(b"\x01\x00", 1), protocol.Flush(), protocol.Reset(),
    protocol.Reset(num_codebooks=4),
])  # fmt: skip
def test_messages_of_clients(message):
    assert protocol.from_client(protocol.pack(message)) == message


@pytest.mark.parametrize("message", [
    READY, protocol.Audio(b""), protocol.Codes(b"", 3, first_frame=7), protocol.Flushed(),
    protocol.Error("pool_full", "all 4 slots are in use"),
])  # fmt: skip
def test_messages_of_servers(message):
    assert protocol.from_server(protocol.pack(message)) == message


@pytest.mark.parametrize("data, sentence", [
    (b"", "truncated"), (b"\x80", "missing required field `type`"), (b"\xc1", "malformed"),
    (msgspec.msgpack.encode({"type": "Nonsense"}), "Invalid value 'Nonsense'"),
    (msgspec.msgpack.encode({"type": "Audio", "samples": "text"}), r"Expected `bytes`, got `str` - at `\$.samples`"),
    (msgspec.msgpack.encode({"type": "Audio", "samples": b"", "more": 1}), "unknown field `more`"),
    (msgspec.msgpack.encode({"type": "Init", "directions": ["up"]}), r"Invalid enum value 'up'"),
    (msgspec.msgpack.encode({"type": "Init", "format": "mp3"}), r"Invalid enum value 'mp3'"),
    (protocol.pack(READY), "Invalid value 'Ready'"), (b"\x91" * 5000, "not a message"),
])  # fmt: skip
def test_what_is_no_message_is_one_sentence(data, sentence):
    with pytest.raises(InputError, match=f"not a message of this protocol: .*{sentence}|{sentence}") as caught:
        protocol.from_client(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind, least", [("f32", 0), ("s16", 2**-16)])
@pytest.mark.parametrize("channels", [1, 2])
def test_samples(kind, least, channels):
    x = noise(channels, 100).clamp(-0.99, 0.99)
    back = protocol.samples_of_bytes(protocol.samples_to_bytes(x, kind), kind, channels)
    assert (back - x).abs().max() <= least
    loud = protocol.samples_of_bytes(protocol.samples_to_bytes(x * 100, "s16"), "s16", channels)
    assert loud.abs().max() <= 1.0


def test_codes():
    codes = torch.randint(0, 2048, (8, 5))
    data = protocol.codes_to_bytes(codes)
    assert torch.equal(protocol.codes_of_bytes(data, 8), codes)
    assert data[:16] == codes[:, 0].numpy().astype("<i2").tobytes(), "frame by frame"


@pytest.mark.parametrize("call, sentence", [
    (lambda: protocol.samples_of_bytes(b"abc", "f32", 1), "samples must be 1 x 4 bytes each, got 3 bytes"),
    (lambda: protocol.samples_of_bytes(b"abcd", "s16", 4), "samples must be 4 x 2 bytes each, got 4 bytes"),
    (lambda: protocol.codes_of_bytes(b"abc", 1), "codes must be 2 x num_codebooks bytes a frame, got 3 bytes for 1"),
    (lambda: protocol.codes_of_bytes(b"", 0), "got 0 bytes for 0"),
])  # fmt: skip
def test_bytes_that_do_not_fit(call, sentence):
    with pytest.raises(InputError, match=sentence):
        call()


def test_the_documentation_lists_every_message_and_field():
    page = (Path(__file__).resolve().parents[2] / "docs" / "protocol.md").read_text(encoding="utf-8")
    tables = dict(
        zip(("client", "server"), re.split(r"^## From the (?:client|server)$", page, flags=re.M)[1:], strict=True)
    )
    for side, union in (("client", protocol.FromClient), ("server", protocol.FromServer)):
        documented, name = {}, ""
        for message, fields in re.findall(r"^\| (?:`(\w+)` )?\| ((?:`\w+`(?:, )?)*) ?\|", tables[side], re.M):
            name = message or name
            documented.setdefault(name, []).extend(re.findall(r"`(\w+)`", fields))
        actual = {kind.__name__: list(kind.__struct_fields__) for kind in get_args(union)}
        documented = {name: fields for name, fields in documented.items() if name[0].isupper()}
        assert documented == actual
    codes = re.findall(r"^\| `(\w+)` \| \d+ \|", page, re.M)
    assert codes == list(get_args(protocol.ErrorCode))
