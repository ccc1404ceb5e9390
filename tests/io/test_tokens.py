"""The token file: bit packing, its contents, and errors for invalid files."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch_file

from fastmimi.io.tokens import Tokens, bits_for, is_tokens, pack, read_metadata, smallest_type, unpack

SHAPES = npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=17)


@st.composite
def bits_and_codes(draw: st.DrawFn) -> tuple[int, np.ndarray]:
    bits = draw(st.integers(1, 16))
    kind = draw(st.sampled_from([np.int32, np.int64, np.uint16]))
    return bits, draw(npst.arrays(kind, SHAPES, elements=st.integers(0, 2**bits - 1)))


def tokens(codebooks: int = 8, frames: int = 7, size: int = 2048, *, packed: bool = False) -> Tokens:
    codes = np.random.default_rng(0).integers(0, size, (codebooks, frames))
    return Tokens(
        codes,
        codebook_size=size,
        sample_rate=24_000,
        frame_rate=12.5,
        frame_size=1920,
        length=frames * 1920 - 5,
        fingerprint="0123456789abcdef",
        model="random:0",
        packed=packed,
    )


# Packing


@given(bits_and_codes())
def test_unpack_is_the_inverse_of_pack(case: tuple[int, np.ndarray]) -> None:
    bits, codes = case
    packed = pack(codes, bits)
    assert packed.dtype == np.uint8
    assert packed.shape == (-(-codes.size * bits // 8),)
    np.testing.assert_array_equal(unpack(packed, bits, codes.shape), codes)


@given(bits_and_codes())
def test_packed_bits_are_least_significant_first(case: tuple[int, np.ndarray]) -> None:
    bits, codes = case
    number = sum(int(code) << (i * bits) for i, code in enumerate(codes.ravel()))
    assert pack(codes, bits).tobytes() == number.to_bytes(-(-codes.size * bits // 8), "little")


def test_codes_out_of_range_are_not_packed() -> None:
    for codes, bits in (([2048], 11), ([-1], 11), ([2], 1)):
        with pytest.raises(ValueError, match="must lie in"):
            pack(np.array(codes), bits)
    for bits in (0, 17):
        with pytest.raises(ValueError, match=f"bits must be from 1 to 16, got {bits}"):
            pack(np.zeros(3, int), bits)


def test_a_wrong_number_of_bytes_is_not_unpacked() -> None:
    packed = pack(np.arange(8), 11)  # 11 bytes
    for wrong in (packed[:-1], np.append(packed, np.uint8(0)), packed.astype(np.int16)):
        with pytest.raises(ValueError, match="must be uint8"):
            unpack(wrong, 11, (8,))


@pytest.mark.parametrize(
    ("size", "kind", "bits"),
    [
        (1, "uint8", 1),
        (2, "uint8", 1),
        (256, "uint8", 8),
        (257, "int16", 9),
        (2048, "int16", 11),
        (2049, "int16", 12),
        (32_768, "int16", 15),
        (32_769, "uint16", 16),
        (65_536, "uint16", 16),
        (65_537, "int32", 17),
    ],
)
def test_the_smallest_type_and_number_of_bits(size: int, kind: str, bits: int) -> None:
    assert smallest_type(size) == kind
    assert bits_for(size) == bits
    assert np.iinfo(kind).max >= size - 1


# The file


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("size", [2, 256, 2048, 65_536])
def test_save_and_load_round_trip(tmp_path: Path, size: int, packed: bool) -> None:
    path, written = tmp_path / "a.safetensors", tokens(size=size, packed=packed)
    written.save(path)
    found = Tokens.load(path)
    np.testing.assert_array_equal(found.codes, written.codes)
    assert replace(found, codes=written.codes).__dict__ == written.__dict__
    assert is_tokens(path)
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_safetensors_reads_a_plain_file(tmp_path: Path) -> None:
    path, written = tmp_path / "a.safetensors", tokens()
    written.save(path)
    with safe_open(path, framework="np") as file:
        np.testing.assert_array_equal(file.get_tensor("codes"), written.codes)
        assert file.get_tensor("codes").dtype == np.int16
        assert file.metadata() == {
            "format": "fastmimi.tokens",
            "version": "1",
            "codebook_size": "2048",
            "sample_rate": "24000",
            "frame_rate": "12.5",
            "frame_size": "1920",
            "num_codebooks": "8",
            "num_frames": "7",
            "length": "13435",
            "fingerprint": "0123456789abcdef",
            "model": "random:0",
            "packed": "false",
        }


def test_eight_packed_codebooks_take_1_1_kbps(tmp_path: Path) -> None:
    seconds = 60
    path, written = tmp_path / "a.safetensors", tokens(frames=round(12.5 * seconds), packed=True)
    written.save(path)
    assert written.kbps == pytest.approx(1.1)
    assert replace(written, packed=False).kbps == pytest.approx(1.6)
    stored = load_file(path)["codes"]
    assert stored.nbytes * 8 / seconds / 1000 == pytest.approx(1.1, rel=1e-3)


def test_first_keeps_the_first_codebooks() -> None:
    whole = tokens()
    np.testing.assert_array_equal(whole.first(3).codes, whole.codes[:3])
    assert whole.first(None) is whole
    for count in (0, 9, -1):
        with pytest.raises(ValueError, match=f"must be from 1 to 8, got {count}"):
            whole.first(count)


def test_an_existing_file_survives_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    tokens().save(path)
    before = path.read_bytes()

    def partial_write(self: Path, data: bytes) -> None:
        self.write_text("half")
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", partial_write)
    with pytest.raises(OSError, match="no space"):
        tokens(frames=3).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.safetensors"]


# Tokens and files that are refused


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"codes": np.zeros((2, 7))}, "codes must be integers"),
        ({"codes": np.zeros((2, 3, 7), int)}, "codes must be integers"),
        ({"codes": np.full((2, 7), 2048)}, r"codes must lie in \[0, 2048\), got 2048"),
        ({"codes": np.full((2, 7), -1)}, r"codes must lie in \[0, 2048\), got -1"),
        ({"codes": np.zeros((2, 8), int)}, r"codes \(2, 8\) do not fit 13435 samples"),
        ({"codes": np.zeros((0, 7), int)}, "do not fit"),
        ({"length": 7 * 1920 + 1}, "do not fit 13441 samples"),
        ({"length": 0}, "length must be greater than or equal to 1, got 0"),
        ({"frame_size": 960}, "do not fit"),
        ({"frame_rate": float("nan")}, "frame_rate must be a finite number, got nan"),
        ({"sample_rate": -1}, "sample_rate must be greater than or equal to 1, got -1"),
    ],
)
def test_invalid_fields_are_refused(change: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        replace(tokens(), **change)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format": "other"}, "not a token file"),
        ({"format": None}, "not a token file"),
        ({"version": "2"}, "of version 2; only 1 can be read"),
        ({"length": None}, "its metadata lacks length"),
        ({"length": "many"}, "length must be of type int, got 'many'"),
        ({"length": "1"}, "do not fit 1 samples"),
        ({"packed": "1"}, "packed must be of type bool, got '1'"),
        ({"num_frames": "8"}, r"\(8, 8\)"),
        ({"num_frames": "-7", "num_codebooks": "-8"}, "must be positive, got"),
        ({"codebook_size": "3"}, r"codes must lie in \[0, 3\)|must be uint8"),
        ({"codebook_size": "99999999"}, "bits must be from 1 to 16, got 27"),
        ({"frame_rate": "NaN"}, "frame_rate must be a finite number, got nan"),
    ],
)
def test_invalid_metadata_is_refused(tmp_path: Path, change: dict, sentence: str, packed: bool) -> None:
    path = tmp_path / "a.safetensors"
    tokens(packed=packed).save(path)
    metadata = {name: value for name, value in {**read_metadata(path), **change}.items() if value is not None}
    save_file(load_file(path), path, metadata)
    if not packed and change == {"codebook_size": "99999999"}:
        assert Tokens.load(path).codebook_size == 99_999_999  # larger than needed, but valid
        return
    with pytest.raises(ValueError, match=sentence) as error:
        Tokens.load(path)
    assert str(path) in str(error.value)


def test_other_tensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tokens().save(path)
    save_file({**load_file(path), "more": np.zeros(1)}, path, read_metadata(path))
    with pytest.raises(ValueError, match=r"one tensor, named codes, got \['codes', 'more'\]"):
        Tokens.load(path)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.bool])
def test_tensors_of_other_types_are_refused(tmp_path: Path, kind: torch.dtype) -> None:
    path = tmp_path / "a.safetensors"
    tokens().save(path)
    save_torch_file({"codes": torch.zeros(8, 7, dtype=kind)}, path, read_metadata(path))
    with pytest.raises(ValueError, match="codes must be integers"):
        Tokens.load(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match="does not exist"):
        Tokens.load(path)
    for content in (b"text", b"\xff" * 100, (100).to_bytes(8, "little") + b"[]", (2).to_bytes(8, "little") + b"{}"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"not a safetensors file|not a token file"):
            Tokens.load(path)


@pytest.mark.parametrize("packed", [False, True])
def test_a_file_truncated_anywhere_is_refused(tmp_path: Path, packed: bool) -> None:
    path = tmp_path / "a.safetensors"
    data = tokens(packed=packed).to_bytes()
    for length in [*range(1, 40), *range(40, len(data), 37), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match="truncated"):
            Tokens.load(path)


@given(data=st.data(), packed=st.booleans())
def test_a_damaged_file_raises_at_most_an_input_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, packed: bool
) -> None:
    whole = bytearray(tokens(codebooks=2, frames=3, packed=packed).to_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "a.safetensors"
    path.write_bytes(whole)
    try:
        found = Tokens.load(path)
    except ValueError as error:
        assert str(path) in str(error)  # noqa: PT017 (not all damage can be detected)
    else:
        assert found.codes.min() >= 0
        assert found.codes.max() < found.codebook_size


def test_metadata_keeps_any_text_and_stores_numbers_as_json(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    replace(tokens(), model='a "model" of é').save(path)
    assert Tokens.load(path).model == 'a "model" of é'
    assert json.loads(read_metadata(path)["frame_rate"]) == 12.5
