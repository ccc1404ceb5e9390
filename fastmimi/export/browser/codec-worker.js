/* The codec itself, by ONNX Runtime: audio of a stream comes in, each frame is encoded and decoded again.

   encoder_step.onnx and decoder_step.onnx take the state of a stream, zeros at first, and return the new one. */

import { Fifo } from "./fifo.js";
import * as ort from "./ort.wasm.bundle.min.mjs";

ort.env.wasm.wasmPaths = { wasm: new URL("ort-wasm-simd-threaded.wasm", import.meta.url).href };
ort.env.wasm.numThreads = 1; // more need headers that a static host does not send
const ARRAYS = { float32: Float32Array, int64: BigInt64Array };

let loading = null; // a promise of {encode, decode, description}
let stream = null; // of the page
let numCodebooks = null; // that are decoded; null: all
let samples = new Fifo();
let frames = 0;
let busy = false;

self.onmessage = ({ data }) => {
  if (data.type === "open") open(data).catch(({ message }) => postMessage({ type: "failed", text: message }));
  else if (data.type === "codebooks") numCodebooks = data.count;
  else if (data.type === "push" && data.stream === stream) {
    samples.push(data.samples);
    work().catch(({ message }) => postMessage({ type: "failed", text: message }));
  }
};

async function open(opened) {
  loading ??= load(opened.description).catch((error) => {
    loading = null;
    throw error;
  });
  const { encode, decode } = await loading;
  samples = new Fifo();
  frames = 0;
  stream = opened.stream;
  encode.reset();
  decode.reset();
  postMessage({ type: "ready", stream });
}

async function load(description) {
  const { encoder_step, decoder_step } = description.files;
  const [encode, decode] = [await Step.load(encoder_step), await Step.load(decoder_step)];
  return { encode, decode, description };
}

/** Whole frames, one after another. */
async function work() {
  if (busy) return;
  busy = true;
  try {
    const { encode, decode, description } = await loading;
    while (samples.length >= description.frame_size) {
      const mine = stream;
      const before = performance.now();
      const audio = samples.take(description.frame_size);
      const channels = description.channels;
      const whole = new Float32Array(channels * audio.length);
      for (let c = 0; c < channels; c++) whole.set(audio, c * audio.length);
      const codes = await encode.run(whole, [1, channels, audio.length]);
      const used = Math.min(numCodebooks ?? codes.length, codes.length);
      const decoded = await decode.run(codes.slice(0, used), [1, used, 1]);
      if (mine !== stream) continue; // another was opened meanwhile
      const message = {
        type: "frame", stream, codes: Int16Array.from(codes, Number), used, firstFrame: frames++,
        audio: decoded.slice(0, audio.length), ms: performance.now() - before, // the first channel
      };
      postMessage(message, [message.codes.buffer, message.audio.buffer]);
    }
  } finally {
    busy = false;
  }
}

/** A file that computes the next frame of a stream. */
class Step {
  #session;
  #file;
  #state;

  static async load(file) {
    const step = new Step();
    step.#file = file;
    step.#session = await ort.InferenceSession.create(new URL(file.file, import.meta.url).href);
    step.reset();
    return step;
  }

  /** The start of a stream. */
  reset() {
    this.#state = {};
    for (const { name, dtype, shape } of this.#file.state) {
      const dims = [1, ...shape.slice(1)];
      const length = dims.reduce((product, size) => product * size, 1);
      this.#state[name] = new ort.Tensor(dtype, new ARRAYS[dtype](length), dims);
    }
  }

  /** values, dims: of the input; returns the values of the output. */
  async run(values, dims) {
    const { input, output, state } = this.#file;
    const before = this.#state;
    const results = await this.#session.run({ [input.name]: new ort.Tensor(input.dtype, values, dims), ...before });
    if (this.#state === before) for (const port of state) before[port.name] = results[port.output];
    return results[output.name].data;
  }
}
