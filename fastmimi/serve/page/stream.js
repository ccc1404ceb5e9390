/* The codec on the server: /v1/stream, MessagePack over WebSocket (docs/protocol.md).

   A codec, as the rest of the page knows it, is an EventTarget with

     open(), close()        it goes on after lost connections until it is closed
     push(samples)          mono Float32Array at `sampleRate`; dropped while there is no connection
     numCodebooks           how many codebooks are decoded, of frames that are encoded from now on; null: all

   and the events, with their `detail`,

     ready   a new stream begins: {model, sampleRate, codecRate, frameRate, numCodebooks, codebookSize}
     codes   {codes, rows, used, firstFrame}: Int16Array of frames of `rows` codes each, the first `used` are decoded
     audio   Float32Array, mono at `sampleRate`, sample by sample what was pushed
     lost    {message, delay}: the stream has ended, the next begins in `delay` ms at the earliest; null: none does

   so that a codec that runs in the browser can take this one's place. */

import { decode, encode } from "./msgpack.js";

const VERSION = 1;
const DELAYS = [250, 500, 1000, 2000, 4000, 5000]; // ms before each attempt to connect again; the last one repeats

/** The page's address of a path of the server, with the page's token. */
export function address(path, protocol = location.protocol) {
  const url = new URL(path, location.href);
  const token = new URLSearchParams(location.search).get("token");
  url.protocol = protocol;
  if (token !== null) url.searchParams.set("token", token);
  return url.href;
}

export class ServerCodec extends EventTarget {
  numCodebooks = null;
  #sampleRate;
  #socket = null;
  #ready = null;
  #wanted = false;
  #attempts = 0;
  #timer = null;
  #said = null; // the server's last error

  /** sampleRate: of audio in both directions, in Hz; null for the codec's own. */
  constructor(sampleRate = null) {
    super();
    this.#sampleRate = sampleRate;
  }

  open() {
    this.#wanted = true;
    this.#connect();
  }

  close() {
    this.#wanted = false;
    clearTimeout(this.#timer);
    this.#socket?.close();
    this.#socket = this.#ready = null;
  }

  push(samples) {
    if (this.#ready === null) return;
    const channels = Array(this.#ready.channels).fill(bytesOf(samples));
    this.#send({ type: "Audio", samples: joined(channels) });
  }

  #connect() {
    const socket = new WebSocket(address("v1/stream", location.protocol === "https:" ? "wss:" : "ws:"));
    socket.binaryType = "arraybuffer";
    this.#socket = socket;
    this.#said = null;
    let opened = false;
    socket.onopen = () => {
      opened = true;
      this.#send({ type: "Init", version: VERSION, sample_rate: this.#sampleRate });
    };
    socket.onmessage = ({ data }) => {
      if (socket === this.#socket) this.#take(decode(new Uint8Array(data)));
    };
    socket.onclose = () => {
      if (socket === this.#socket) this.#lost(opened);
    };
  }

  #send(message) {
    if (this.#socket.readyState === WebSocket.OPEN) this.#socket.send(encode(message));
  }

  #take(message) {
    switch (message.type) {
      case "Ready": return this.#begin(message);
      case "Codes": return this.#decode(message);
      case "Audio": return this.#emit("audio", this.#firstChannel(message.samples));
      case "Error": this.#said = message.message;
    }
  }

  #begin(ready) {
    this.#ready = ready;
    this.#emit("ready", {
      model: ready.model, sampleRate: ready.sample_rate, codecRate: ready.codec_sample_rate,
      frameRate: ready.frame_rate, numCodebooks: ready.num_codebooks, codebookSize: ready.codebook_size,
    });
  }

  /** Send codes back, cut to the codebooks that are wanted. */
  #decode(message) {
    this.#attempts = 0;
    const rows = message.num_codebooks;
    const used = Math.min(this.numCodebooks ?? rows, rows);
    const codes = new Int16Array(message.codes.slice().buffer);
    const cut = codes.filter((_, i) => i % rows < used);
    this.#send({ type: "Codes", codes: bytesOf(cut), num_codebooks: used });
    this.#emit("codes", { codes, rows, used, firstFrame: message.first_frame });
  }

  /** The protocol puts all samples of the first channel first. */
  #firstChannel(bytes) {
    const samples = new Float32Array(bytes.slice().buffer);
    return samples.subarray(0, samples.length / this.#ready.channels);
  }

  async #lost(opened) {
    const socket = this.#socket;
    this.#ready = null;
    const delay = DELAYS[Math.min(this.#attempts++, DELAYS.length - 1)];
    const message = this.#said ?? (opened ? "the connection was lost" : await refusal());
    if (!this.#wanted || socket !== this.#socket) return;
    this.#emit("lost", { message, delay });
    this.#timer = setTimeout(() => this.#connect(), delay);
  }

  #emit(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}

/** Why the server takes no connection: a browser does not tell, but other routes refuse with the same sentence. */
async function refusal() {
  try {
    const answer = await fetch(address("metrics"));
    return answer.ok ? "the server closed the connection" : (await answer.json()).error;
  } catch {
    return "the server does not answer";
  }
}

function bytesOf(array) {
  return new Uint8Array(array.buffer, array.byteOffset, array.byteLength);
}

function joined(parts) {
  if (parts.length === 1) return parts[0];
  const whole = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  parts.forEach((part, i) => whole.set(part, i * part.length));
  return whole;
}
