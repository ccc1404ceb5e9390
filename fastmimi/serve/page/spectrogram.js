/* A spectrogram on a mel axis, drawn in step with what is played. */

import { Fft } from "./fft.js";
import { sound } from "./palette.js";
import { Strip } from "./strip.js";

const ROWS = 128;
const COLUMN_S = 0.01;
const WINDOW_S = 0.04; // at most half as long or one and a half times, since it is a power of two
const QUIET_DB = -85; // of a full-scale sine: the darkest colour
const LOUD_DB = -20;

const mel = (hz) => 2595 * Math.log10(1 + hz / 700);
const hertz = (mels) => 700 * (10 ** (mels / 2595) - 1);

export class Spectrogram {
  #strip;
  #hop; // samples, not always a whole number
  #size; // samples of a window
  #fft;
  #window;
  #bands;
  #recent; // the last samples, those of a window and a hop at least
  #seen = 0; // samples
  #column = 0;

  /** sampleRate of the samples; highest: the frequency at the top, in Hz. */
  constructor(canvas, sampleRate, highest) {
    this.#strip = new Strip(canvas, ROWS, COLUMN_S, true);
    this.#hop = COLUMN_S * sampleRate;
    this.#size = 2 ** Math.round(Math.log2(WINDOW_S * sampleRate));
    this.#fft = new Fft(this.#size);
    this.#window = Float32Array.from({ length: this.#size }, (_, i) => hann(i / this.#size) * (4 / this.#size));
    this.#bands = bands(highest, this.#size / sampleRate, this.#size / 2);
    this.#recent = new Float32Array(2 * this.#size);
  }

  push(samples) {
    for (let at = 0; at < samples.length; at += this.#size / 2) this.#append(samples.subarray(at, at + this.#size / 2));
  }

  draw(now) {
    this.#strip.draw(now);
  }

  clear() {
    this.#seen = this.#column = 0;
    this.#recent.fill(0);
    this.#strip.clear();
  }

  /** At most half a window of samples. */
  #append(samples) {
    this.#recent.copyWithin(0, samples.length);
    this.#recent.set(samples, this.#recent.length - samples.length);
    this.#seen += samples.length;
    for (let end; (end = this.#windowEnd()) <= this.#seen; this.#column++) {
      const stop = this.#recent.length - (this.#seen - end);
      const windowed = this.#window.map((w, i) => w * this.#recent[stop - this.#size + i]);
      this.#strip.put(this.#column, pixels(this.#fft.power(windowed), this.#bands));
    }
  }

  /** Of the next column: its window's middle is the column's. */
  #windowEnd() {
    return Math.floor((this.#column + 0.5) * this.#hop + this.#size / 2);
  }
}

/** Where a frequency lies between 0 (bottom) and 1 (top). */
export function height(hz, highest) {
  return mel(hz) / mel(highest);
}

function hann(x) {
  return 0.5 - 0.5 * Math.cos(2 * Math.PI * x);
}

/** Of each row, from the top, the bins [first, last] at its edges, not whole numbers. */
function bands(highest, binsPerHertz, bins) {
  const edge = (row) => Math.min(hertz((mel(highest) * row) / ROWS) * binsPerHertz, bins);
  return Array.from({ length: ROWS }, (_, i) => [edge(ROWS - 1 - i), edge(ROWS - i)]);
}

function pixels(power, bands) {
  const column = new Uint8ClampedArray(4 * bands.length);
  bands.forEach((band, row) => {
    const db = 10 * Math.log10(loudest(power, band) + 1e-12);
    const shade = Math.round((255 * (db - QUIET_DB)) / (LOUD_DB - QUIET_DB));
    column.set([...sound[Math.min(Math.max(shade, 0), 255)], 255], 4 * row);
  });
  return column;
}

/** The most power in a band; of bands narrower than a bin, between its neighbours. */
function loudest(power, [first, last]) {
  if (last - first >= 1) {
    let most = 0;
    for (let bin = Math.round(first); bin < Math.round(last); bin++) most = Math.max(most, power[bin]);
    return most;
  }
  const middle = (first + last) / 2;
  const below = Math.min(Math.floor(middle), power.length - 2);
  return power[below] + (middle - below) * (power[below + 1] - power[below]);
}
