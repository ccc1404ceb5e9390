/* The pictures with their axes: two spectrograms and the codes, on one axis of time. */

import { CodeMatrix } from "./codes.js";
import { Spectrogram, height } from "./spectrogram.js";
import { SPAN_S, still } from "./strip.js";

const FREQUENCIES = [500, 1000, 2000, 4000, 8000, 16000, 32000]; // Hz

export class Pictures {
  #figures;
  #made = null; // for which codec and rate
  #original = null;
  #decoded = null;
  #codes = null;

  /** figures: elements {original, decoded, codes}, each with a canvas and an axis. time: the element of its labels. */
  constructor(figures, time) {
    this.#figures = figures;
    const ages = Array.from({ length: SPAN_S / 2 + 1 }, (_, i) => SPAN_S - 2 * i); // every two seconds
    time.replaceChildren(...ages.map((age) => label(age ? `−${age} s` : "now", "left", 1 - age / SPAN_S)));
    const show = () => (time.hidden = still.matches); // where the pictures do not move, "now" does
    still.addEventListener("change", show);
    show();
  }

  /** For a codec (see stream.js) and the rate of the samples; the same ones leave the pictures as they are. */
  prepare(codec, sampleRate) {
    const made = JSON.stringify([codec, sampleRate]);
    if (made === this.#made) return;
    this.#made = made;
    const highest = Math.min(codec.codecRate, sampleRate) / 2;
    const canvas = (name) => this.#figures[name].querySelector("canvas");
    this.#original = new Spectrogram(canvas("original"), sampleRate, highest);
    this.#decoded = new Spectrogram(canvas("decoded"), sampleRate, highest);
    this.#codes = new CodeMatrix(canvas("codes"), codec);
    const shown = FREQUENCIES.filter((hz) => height(hz, highest) < 0.97);
    const unit = (hz) => (hz === shown.at(-1) ? " kHz" : "");
    const kilohertz = shown.map((hz) => [`${hz / 1000}${unit(hz)}`, height(hz, highest)]);
    this.#axis("original", kilohertz);
    this.#axis("decoded", kilohertz);
    const rows = codec.numCodebooks;
    const numbers = rows > 2 ? [1, Math.ceil(rows / 2), rows] : [1];
    this.#axis("codes", numbers.map((n) => [`${n}`, 1 - (n - 0.5) / rows]));
  }

  samples(original, decoded) {
    this.#original.push(original);
    this.#decoded.push(decoded);
  }

  codes(column, frame, used) {
    this.#codes.put(column, frame, used);
  }

  /** now: seconds of what is played */
  draw(now) {
    for (const picture of this.#all) picture.draw(now);
  }

  clear() {
    for (const picture of this.#all) picture.clear();
  }

  get #all() {
    return [this.#original, this.#decoded, this.#codes].filter((picture) => picture !== null);
  }

  /** marks: [text, place from 0 (bottom) to 1 (top)] */
  #axis(name, marks) {
    const labels = marks.map(([text, place]) => label(text, "bottom", place));
    this.#figures[name].querySelector(".axis").replaceChildren(...labels);
  }
}

/** A text at a place, from 0 to 1, from an edge of its axis. */
function label(text, edge, place) {
  const span = document.createElement("span");
  span.textContent = text;
  span.style[edge] = `${100 * place}%`;
  return span;
}
