"""Stream a WAV file through an exported codec, 80 ms at a time, with nothing but NumPy and ONNX Runtime.

fastmimi export demo exported
python examples/stream_onnx.py exported speech.wav decoded.wav    # 16 bits, mono, at the codec's rate (24 kHz)
"""

import json
import sys
import wave
from pathlib import Path

import numpy as np
import onnxruntime

folder, source, target = map(Path, sys.argv[1:])
codec = json.loads((folder / "codec.json").read_text())


def stream(name: str):
    """A function from the next input of one stream to its output; the state, zeros at first, is kept here."""
    file = codec["files"][name]
    session = onnxruntime.InferenceSession(folder / file["file"])
    state = {port["name"]: np.zeros([1, *port["shape"][1:]], port["dtype"]) for port in file["state"]}

    def step(x: np.ndarray) -> np.ndarray:
        y, *new = session.run(None, {file["input"]["name"]: x, **state})
        state.update(zip(state, new, strict=True))
        return y

    return step


with wave.open(str(source)) as wav, wave.open(str(target), "wb") as out:
    assert (wav.getframerate(), wav.getnchannels(), wav.getsampwidth()) == (codec["sample_rate"], 1, 2), "see above"
    out.setparams(wav.getparams())
    encode, decode = stream("encoder_step"), stream("decoder_step")
    while chunk := wav.readframes(codec["frame_size"]):
        audio = np.frombuffer(chunk, "<i2").astype("f4") / 32768  # the last may be shorter: zeros complete it
        decoded = decode(encode(audio[None, None]))[0, 0]
        out.writeframes((decoded.clip(-1, 1) * 32767).astype("<i2").tobytes())
