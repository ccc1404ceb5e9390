"""Exports of a codec to ONNX and `torch.export`: whole audio, and steps of streams with explicit state.

`frozen` prepares a codec, `modules` are what is traced, `programs` trace them, `formats` write them to files, `check`
compares the files with the model, and `write` is the public function.
"""
