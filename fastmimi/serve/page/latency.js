/* The codec's latency: from the last sample of a frame, sent, to that frame's audio, received. */

const KEPT_S = 5; // the median is of so many last seconds

export class Latency {
  #frame; // samples, not always a whole number
  #sent = 0;
  #received = 0; // samples
  #waiting = []; // ms: when the last sample of each frame that has not come back was sent
  #framesSent = 0;
  #framesReceived = 0;
  #found = []; // {at, ms}

  constructor(frame) {
    this.#frame = frame;
  }

  sent(samples, now = performance.now()) {
    this.#sent += samples;
    while (this.#sent >= (this.#framesSent + 1) * this.#frame) {
      this.#waiting.push(now);
      this.#framesSent++;
    }
  }

  received(samples, now = performance.now()) {
    this.#received += samples;
    // Rounded, since a resampler holds a few milliseconds of a frame back until the next comes.
    while (this.#waiting.length && Math.round(this.#received / this.#frame) > this.#framesReceived) {
      this.#found.push({ at: now, ms: now - this.#waiting.shift() });
      this.#framesReceived++;
    }
  }

  /** ms; null if nothing came in the last seconds. */
  median(now = performance.now()) {
    this.#found = this.#found.filter(({ at }) => now - at < 1000 * KEPT_S);
    const sorted = this.#found.map(({ ms }) => ms).sort((a, b) => a - b);
    return sorted.length ? sorted[sorted.length >> 1] : null;
  }
}
