/* Samples in the order in which they came. */

export class Fifo {
  #chunks = [];
  length = 0; // samples

  push(samples) {
    this.#chunks.push(samples);
    this.length += samples.length;
  }

  /** The oldest `count` samples; fewer if there are no more. */
  take(count) {
    const taken = new Float32Array(Math.min(count, this.length));
    let filled = 0;
    while (filled < taken.length) {
      const first = this.#chunks[0];
      const part = first.subarray(0, taken.length - filled);
      taken.set(part, filled);
      filled += part.length;
      if (part.length === first.length) this.#chunks.shift();
      else this.#chunks[0] = first.subarray(part.length);
    }
    this.length -= taken.length;
    return taken;
  }

  clear() {
    this.#chunks = [];
    this.length = 0;
  }
}
