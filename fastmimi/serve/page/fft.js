/* The discrete Fourier transform of real windows: radix 2, in place. */

export class Fft {
  #size;
  #cos;
  #sin;
  #order; // bit-reversed indices

  /** size: a power of two */
  constructor(size) {
    const bits = Math.log2(size);
    this.#size = size;
    this.#cos = Float32Array.from({ length: size / 2 }, (_, i) => Math.cos((2 * Math.PI * i) / size));
    this.#sin = Float32Array.from({ length: size / 2 }, (_, i) => -Math.sin((2 * Math.PI * i) / size));
    this.#order = Uint32Array.from({ length: size }, (_, i) => {
      let reversed = 0;
      for (let bit = 0; bit < bits; bit++) reversed |= ((i >> bit) & 1) << (bits - 1 - bit);
      return reversed;
    });
    this.re = new Float32Array(size);
    this.im = new Float32Array(size);
  }

  /** Squared magnitudes of the first size / 2 + 1 bins of `size` real samples. */
  power(samples) {
    const { re, im } = this;
    for (let i = 0; i < this.#size; i++) re[i] = samples[this.#order[i]];
    im.fill(0);
    for (let half = 1; half < this.#size; half *= 2) this.#stage(half);
    return Float32Array.from({ length: this.#size / 2 + 1 }, (_, i) => re[i] ** 2 + im[i] ** 2);
  }

  /** Joins transforms of `half` samples to those of twice as many. */
  #stage(half) {
    const { re, im } = this;
    const step = this.#size / (2 * half);
    for (let start = 0; start < this.#size; start += 2 * half) {
      for (let i = 0; i < half; i++) {
        const [c, s] = [this.#cos[i * step], this.#sin[i * step]];
        const [a, b] = [start + i, start + i + half];
        const [x, y] = [re[b] * c - im[b] * s, re[b] * s + im[b] * c];
        re[b] = re[a] - x;
        im[b] = im[a] - y;
        re[a] += x;
        im[a] += y;
      }
    }
  }
}
