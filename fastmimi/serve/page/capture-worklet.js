/* Hands what flows in to the page, in chunks of about 20 ms. */

const QUANTA = 8; // of 128 samples each

class Capture extends AudioWorkletProcessor {
  #chunk = null;
  #filled = 0;
  #stopped = false;

  constructor() {
    super();
    this.port.onmessage = () => (this.#stopped = true); // the page has one message
  }

  process([[input]]) {
    if (!input) return !this.#stopped; // nothing is connected
    this.#chunk ??= new Float32Array(QUANTA * input.length);
    this.#chunk.set(input, this.#filled);
    this.#filled += input.length;
    if (this.#filled === this.#chunk.length) {
      this.port.postMessage(this.#chunk, [this.#chunk.buffer]);
      this.#chunk = null;
      this.#filled = 0;
    }
    return !this.#stopped;
  }
}

registerProcessor("capture", Capture);
