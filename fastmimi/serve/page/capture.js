/* Audio into the page: the microphone, or an audio file in real time. */

const TAIL_S = 0.25; // silence after a file, in which its last frame comes back from the codec

/** A source of mono audio. `begin` and `pause` are for files; a microphone runs on. */
class Source {
  #capture;
  #stop;

  /** node: where the audio comes from. onsamples: called with each Float32Array. stop: ends the node. */
  constructor(context, node, onsamples, stop) {
    this.#capture = new AudioWorkletNode(context, "capture", { channelCount: 1, channelCountMode: "explicit" });
    this.#capture.port.onmessage = ({ data }) => onsamples(data);
    this.#stop = stop;
    // The worklet's output is silent; a node that leads nowhere would not run in every browser.
    node.connect(this.#capture).connect(context.destination);
  }

  begin() {}
  pause() {}

  stop() {
    this.#capture.port.onmessage = null;
    this.#capture.port.postMessage("stop");
    this.#capture.disconnect();
    this.#stop();
  }
}

class FileSource extends Source {
  #rate;

  constructor(context, buffer, onsamples, onended) {
    const node = new AudioBufferSourceNode(context, { buffer, playbackRate: 0 });
    super(context, node, onsamples, () => {
      node.onended = null;
      node.stop();
    });
    node.onended = onended;
    node.start();
    this.#rate = node.playbackRate;
  }

  begin() {
    this.#rate.value = 1;
  }

  pause() {
    this.#rate.value = 0;
  }
}

/** Adds the worklet of all sources to a context. */
export function prepareCapture(context) {
  return context.audioWorklet.addModule(new URL("capture-worklet.js", import.meta.url));
}

/** Raises Error with a sentence for the user. */
export async function openMicrophone(context, onsamples) {
  // The browser's processing is for calls; here the codec should hear what the microphone does.
  const audio = { echoCancellation: false, noiseSuppression: false, autoGainControl: false };
  const media = await navigator.mediaDevices.getUserMedia({ audio }).catch((error) => {
    throw new Error(MICROPHONE[error.name] ?? `The microphone cannot be used: ${error.message}`);
  });
  const node = new MediaStreamAudioSourceNode(context, { mediaStream: media });
  return new Source(context, node, onsamples, () => {
    node.disconnect();
    for (const track of media.getTracks()) track.stop();
  });
}

const MICROPHONE = {
  NotAllowedError: "The browser does not let this page use the microphone. Allow it there, then try again.",
  NotFoundError: "No microphone was found.",
  NotReadableError: "The microphone cannot be used: another program may have it.",
};

/** bytes: an ArrayBuffer of a file that the browser can decode. Raises Error with a sentence for the user. */
export async function openFile(context, bytes, onsamples, onended) {
  const audio = await context.decodeAudioData(bytes).catch(() => {
    throw new Error("This browser cannot decode that file. WAV, MP3, FLAC, Ogg and M4A mostly work.");
  });
  const tail = Math.ceil(TAIL_S * audio.sampleRate);
  const buffer = new AudioBuffer({ length: audio.length + tail, sampleRate: audio.sampleRate });
  const mono = buffer.getChannelData(0);
  for (let c = 0; c < audio.numberOfChannels; c++) {
    audio.getChannelData(c).forEach((x, i) => (mono[i] += x / audio.numberOfChannels));
  }
  return new FileSource(context, buffer, onsamples, onended);
}
