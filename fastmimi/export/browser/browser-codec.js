/* A codec in a worker of this page, with the interface that fastmimi/serve/page/stream.js describes. */

const KEPT = 60; // frames, 5 s: how fast the last ones were

let worker = null; // loads the model once; the page's codecs follow one another
let current = null; // the codec whose results the worker's are
let streams = 0;
let times = []; // ms of the last frames, encoded and decoded
let frameMs = null;

/** How many times faster than real time the last frames were; null if there were none. */
export function speed() {
  const sorted = [...times].sort((a, b) => a - b);
  return sorted.length ? frameMs / sorted[sorted.length >> 1] : null;
}

export class BrowserCodec extends EventTarget {
  #description;
  #stream = null;
  #numCodebooks = null;
  #ready = false;

  /** description: codec.json; audio has the codec's rate. */
  constructor(description) {
    super();
    this.#description = description;
    frameMs = 1000 / description.frame_rate;
  }

  open() {
    this.#stream = ++streams;
    current = this;
    worker ??= start();
    worker.postMessage({ type: "open", stream: this.#stream, description: this.#description });
    this.numCodebooks = this.#numCodebooks;
  }

  close() {
    this.#stream = null;
    this.#ready = false;
  }

  push(samples) {
    if (this.#ready) worker.postMessage({ type: "push", stream: this.#stream, samples });
  }

  get numCodebooks() {
    return this.#numCodebooks;
  }

  set numCodebooks(count) {
    this.#numCodebooks = count;
    if (this.#stream !== null) worker.postMessage({ type: "codebooks", count });
  }

  /** A message of the worker. */
  take(message) {
    if (message.type === "failed") return this.#emit("lost", { message: message.text, delay: null });
    if (message.stream !== this.#stream) return; // of a codec that was closed since
    if (message.type === "ready") this.#begin();
    else this.#frame(message);
  }

  #begin() {
    const { model, sample_rate, frame_rate, codebooks, codebook_size } = this.#description;
    this.#ready = true;
    times = [];
    this.#emit("ready", {
      model, sampleRate: sample_rate, codecRate: sample_rate, frameRate: frame_rate, numCodebooks: codebooks,
      codebookSize: codebook_size,
    });
  }

  #frame({ codes, used, firstFrame, audio, ms }) {
    times = [...times.slice(1 - KEPT), ms];
    this.#emit("codes", { codes, rows: codes.length, used, firstFrame });
    this.#emit("audio", audio);
  }

  #emit(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}

function start() {
  const started = new Worker(new URL("codec-worker.js", import.meta.url), { type: "module" });
  started.onmessage = ({ data }) => current.take(data);
  started.onerror = ({ message }) => current.take({ type: "failed", text: message ?? "The codec cannot be loaded" });
  return started;
}
