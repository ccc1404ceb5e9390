/* One listening session: samples of a source go to the codec; what comes back is paired with them and played.

   `views` draw it: {samples(original, decoded), codes(column, frame, used)}. A column is a frame's place on the time
   axis of what is played, in frames; `frame` has one code of each codebook. */

import { Fifo } from "./fifo.js";
import { Latency } from "./latency.js";

const MOST_S = 3; // that may be under way: a codec slower than real time loses samples, not time
const PATIENCE_MS = 2000; // for the codec's last frames after the end of the source

export class Session {
  #codec;
  #player;
  #views;
  #sent = new Fifo(); // samples that were pushed and have not come back
  #live = false;
  #ended = false;
  #gaveUp = false;
  #frame = 0; // samples
  #paired = 0; // samples
  #firstColumn = 0; // of the codec's present stream
  #latency = null;
  dropped = 0; // samples

  constructor(codec, player, views) {
    this.#codec = codec;
    this.#player = player;
    this.#views = views;
    codec.addEventListener("ready", ({ detail }) => this.#begin(detail));
    codec.addEventListener("codes", ({ detail }) => this.#coded(detail));
    codec.addEventListener("audio", ({ detail }) => this.#decoded(detail));
    codec.addEventListener("lost", () => this.#lost());
  }

  /** Samples of the source, as they come. */
  push(samples) {
    if (!this.#live) return;
    if (this.#sent.length > MOST_S * this.#player.context.sampleRate) {
      this.dropped += samples.length;
      return;
    }
    this.#sent.push(samples);
    this.#codec.push(samples);
    this.#latency.sent(samples.length);
  }

  /** The source has ended; what is under way is still played. */
  end() {
    this.#ended = true;
    setTimeout(() => (this.#gaveUp = true), PATIENCE_MS);
    this.#endIfDone();
  }

  /** Whether everything of a source that has ended was heard. */
  get finished() {
    return this.#ended && this.#nothingUnderWay && this.#player.stats.queued === 0;
  }

  /** ms, or null */
  get latency() {
    return this.#latency?.median() ?? null;
  }

  get #nothingUnderWay() {
    // An incomplete frame stays in the codec, and its resamplers keep a little.
    return this.#gaveUp || !this.#live || this.#sent.length < 2 * this.#frame;
  }

  #begin({ sampleRate, frameRate }) {
    this.#live = true;
    this.#frame = sampleRate / frameRate;
    this.#sent.clear();
    this.#latency = new Latency(this.#frame);
    this.#firstColumn = Math.round(this.#paired / this.#frame);
  }

  #coded({ codes, rows, used, firstFrame }) {
    for (let i = 0; i < codes.length / rows; i++) {
      this.#views.codes(this.#firstColumn + firstFrame + i, codes.subarray(i * rows, (i + 1) * rows), used);
    }
  }

  #decoded(samples) {
    this.#latency.received(samples.length);
    const original = this.#sent.take(samples.length);
    const decoded = samples.subarray(0, original.length);
    this.#paired += original.length;
    this.#player.push(original, decoded);
    this.#views.samples(original, decoded);
    this.#endIfDone();
  }

  #lost() {
    this.#live = false;
    this.#sent.clear();
    this.#player.end();
  }

  #endIfDone() {
    if (this.#ended && this.#nothingUnderWay) this.#player.end();
  }
}
