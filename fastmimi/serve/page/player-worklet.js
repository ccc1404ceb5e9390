/* Plays pairs of original and decoded samples, each on its own output, behind a jitter buffer.

   It begins when `target` samples wait. Where it runs dry, that is counted, and it waits for as many again. What comes
   late makes the buffer longer; beyond `most` samples the oldest are skipped. */

const REPORT_QUANTA = 8; // a report about every 20 ms

class Player extends AudioWorkletProcessor {
  #target;
  #most;
  #size;
  #rings;
  #written = 0; // since the start, as are all counts of samples
  #position = 0; // of what is heard next
  #played = 0;
  #skipped = 0;
  #underruns = 0;
  #energy = 0; // of what was played of the decoded samples
  #playing = false;
  #ending = false; // no more will come for now, so running dry is no underrun
  #stopped = false;
  #quanta = 0;

  constructor({ processorOptions: { target, most } }) {
    super();
    this.#target = target;
    this.#most = most;
    this.#size = most + 4 * sampleRate; // what may wait, and seconds that arrive at once
    this.#rings = [new Float32Array(this.#size), new Float32Array(this.#size)];
    this.port.onmessage = ({ data }) => this.#message(data);
  }

  #message({ type, tracks }) {
    if (type === "push") this.#push(tracks);
    else if (type === "end") this.#ending = true;
    else if (type === "stop") this.#stopped = true;
  }

  #push(tracks) {
    const length = tracks[0].length;
    for (let i = 0; i < length; i++) {
      const at = (this.#written + i) % this.#size;
      this.#rings[0][at] = tracks[0][i];
      this.#rings[1][at] = tracks[1][i];
    }
    this.#written += length;
    this.#ending = false;
    if (this.#written - this.#position > this.#most) {
      const position = this.#written - this.#target;
      this.#skipped += position - this.#position;
      this.#position = position;
    }
  }

  process(_, outputs) {
    const length = outputs[0][0].length;
    const queued = this.#written - this.#position;
    if (!this.#playing && (queued >= this.#target || (this.#ending && queued > 0))) this.#playing = true;
    if (this.#playing) this.#play(outputs, Math.min(length, queued));
    if (this.#playing && queued < length) {
      this.#playing = false;
      if (!this.#ending) this.#underruns++;
    }
    if (++this.#quanta % REPORT_QUANTA === 0) this.#report(length);
    return !this.#stopped;
  }

  #play(outputs, length) {
    for (let i = 0; i < length; i++) {
      const at = (this.#position + i) % this.#size;
      outputs[0][0][i] = this.#rings[0][at];
      outputs[1][0][i] = this.#rings[1][at];
      this.#energy += this.#rings[1][at] ** 2;
    }
    this.#position += length;
    this.#played += length;
  }

  #report(length) {
    this.port.postMessage({
      frame: currentFrame + length, position: this.#position, queued: this.#written - this.#position,
      played: this.#played, skipped: this.#skipped, underruns: this.#underruns, energy: this.#energy,
      playing: this.#playing,
    });
  }
}

registerProcessor("player", Player);
