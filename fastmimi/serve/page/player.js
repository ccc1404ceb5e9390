/* Audio out of the page: the original and the decoded samples side by side, of which one is heard. */

const TARGET_S = 0.2; // that wait before playing begins
const MOST_S = 0.8; // that may wait; more is skipped down to the target
const FADE_S = 0.01;
const NOTHING = {
  frame: 0, position: 0, played: 0, queued: 0, skipped: 0, underruns: 0, energy: 0, playing: false,
};

export class Player {
  #node;
  #gains;
  #report = NOTHING;
  #heard = "decoded";
  #muted = false;
  onreport = null; // called about 50 times a second

  static async create(context) {
    await context.audioWorklet.addModule(new URL("player-worklet.js", import.meta.url));
    return new Player(context);
  }

  constructor(context) {
    this.context = context;
    this.output = new GainNode(context);
    this.output.connect(context.destination);
    this.#gains = { original: new GainNode(context), decoded: new GainNode(context) };
    for (const gain of Object.values(this.#gains)) gain.connect(this.output);
    this.#mix();
    this.reset();
  }

  /** Begin anew: what waits is dropped, all counts are zero. */
  reset() {
    const rate = this.context.sampleRate;
    this.#retire();
    this.#node = new AudioWorkletNode(this.context, "player", {
      numberOfInputs: 0, numberOfOutputs: 2, outputChannelCount: [1, 1],
      processorOptions: { target: Math.round(TARGET_S * rate), most: Math.round(MOST_S * rate) },
    });
    this.#node.connect(this.#gains.original, 0);
    this.#node.connect(this.#gains.decoded, 1);
    this.#report = NOTHING;
    this.#node.port.onmessage = ({ data }) => {
      this.#report = data;
      this.onreport?.(data);
    };
  }

  #retire() {
    if (!this.#node) return;
    this.#node.port.onmessage = null;
    this.#node.port.postMessage({ type: "stop" });
    this.#node.disconnect();
  }

  /** Samples of both, as many of the one as of the other. */
  push(original, decoded) {
    this.#node.port.postMessage({ type: "push", tracks: [original, decoded] });
  }

  /** No more will come for now: play what waits, and count no underrun. */
  end() {
    this.#node.port.postMessage({ type: "end" });
  }

  /** "original" or "decoded" */
  set heard(name) {
    this.#heard = name;
    this.#mix();
  }

  set muted(muted) {
    this.#muted = muted;
    this.#mix();
  }

  #mix() {
    for (const [name, gain] of Object.entries(this.#gains)) {
      const level = name === this.#heard && !this.#muted ? 1 : 0;
      gain.gain.setTargetAtTime(level, this.context.currentTime, FADE_S);
    }
  }

  get stats() {
    return this.#report;
  }

  /** Seconds of what was pushed that have been heard. */
  get time() {
    const { position, queued, frame, playing } = this.#report;
    const rate = this.context.sampleRate;
    const since = playing ? this.context.currentTime * rate - frame : 0; // since the report
    return (position + Math.min(Math.max(since, 0), queued)) / rate;
  }
}
