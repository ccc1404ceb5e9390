/* The page: its controls, and what they start and stop. The codec behind it is a server (server.js) or runs in the
   browser (fastmimi/export/browser). */

import { openFile, openMicrophone, prepareCapture } from "./capture.js";
import { Pictures } from "./pictures.js";
import { Player } from "./player.js";
import { Session } from "./session.js";

const SAMPLE = "sample.ogg";
const element = (id) => document.getElementById(id);
const pictures = new Pictures(
  { original: element("original"), decoded: element("decoded"), codes: element("codes") },
  document.querySelector(".time"),
);
const sources = ["microphone", "sample", "file"];

let backend = null; // see `begin`
let context = null; // AudioContext, made at the first click: browsers allow it no earlier
let worklets = null; // a promise: they are loaded once
let player = null;
let running = null; // {button, doing, session, codec, source}
let asking = null; // a codec that was opened only to learn what it is
let starts = 0; // to know whether another source was started meanwhile
let info = null; // of the codec, when it was ready
let chosen = null; // codebooks; null: all
let away = false; // whether the codec was out of reach when last heard of

// Sources

/** open(onsamples, onended) -> Source, see capture.js. doing: what is said while it runs. */
async function start(button, doing, open) {
  stop();
  const mine = ++starts;
  try {
    await prepareAudio();
    if (mine !== starts) return;
    player.reset();
    pictures.clear();
    const codec = listen(backend.codec(context.sampleRate));
    const session = new Session(codec, player, pictures);
    const source = await open((samples) => session.push(samples), () => session.end());
    if (mine !== starts) return source.stop();
    running = { button, doing, session, codec, source };
    codec.open();
    say("busy", backend.opening);
    show();
  } catch (error) {
    if (mine === starts) say("bad", error.message);
  }
}

function stop() {
  starts++;
  asking?.close();
  running?.source.stop();
  running?.codec.close();
  player?.reset();
  context?.suspend();
  asking = running = null;
  say("good", "Ready. Choose a source.");
  show();
}

async function prepareAudio() {
  context ??= new AudioContext({ latencyHint: "interactive", ...backend.audio });
  await context.resume();
  worklets ??= loadWorklets().catch((error) => {
    worklets = null;
    throw error;
  });
  await worklets;
}

async function loadWorklets() {
  await prepareCapture(context);
  player = await Player.create(context);
  mix();
}

const startMicrophone = () => {
  choose("decoded");
  return start("microphone", "Listening to the microphone.", (onsamples) => openMicrophone(context, onsamples));
};

const startFile = (button, doing, bytes) =>
  start(button, doing, async (onsamples, onended) => openFile(context, await bytes(), onsamples, onended));

const startSample = () => startFile("sample", "Playing the sample.", fetchSample);

async function fetchSample() {
  const answer = await fetch(SAMPLE).catch(() => null);
  if (!answer?.ok) throw new Error("The sample cannot be fetched.");
  return answer.arrayBuffer();
}

const startPicked = ([file]) => file && startFile("file", `Playing ${file.name}.`, () => file.arrayBuffer());

// The codec

/** A codec that tells the page what happens to it. */
function listen(codec) {
  codec.numCodebooks = chosen;
  codec.addEventListener("ready", ({ detail }) => {
    describe(detail);
    pictures.prepare(detail, context?.sampleRate ?? detail.codecRate);
    if (codec === asking) return stop();
    running.source.begin();
    say("good", running.doing);
  });
  codec.addEventListener("lost", ({ detail: { message, delay } }) => {
    running?.source.pause();
    say("bad", delay === null ? `${message}.` : `Reconnecting in ${delay / 1000} s: ${message}.`);
  });
  return codec;
}

/** Connect for a moment, to learn what the codec is. */
function ask() {
  asking = listen(backend.codec(null));
  asking.open();
}

function describe(codec) {
  info = codec;
  const { model, codecRate, frameRate, numCodebooks } = codec;
  const name = document.createElement("strong");
  name.textContent = model;
  element("model").replaceChildren(
    "Model ", name, ` · ${codecRate / 1000} kHz · ${frameRate} frames/s · ${numCodebooks} codebooks`,
  );
  element("demo-note").hidden = model !== "demo";
  const slider = element("codebooks");
  slider.max = numCodebooks;
  slider.value = Math.min(chosen ?? numCodebooks, numCodebooks);
  slider.disabled = false;
  showRate();
}

// What is shown

/** kind: good, busy or bad */
function say(kind, text) {
  const status = element("status");
  status.dataset.kind = kind;
  if (status.textContent !== text) status.textContent = text;
}

/** Which source runs. */
function show() {
  for (const id of sources) element(id).setAttribute("aria-pressed", String(running?.button === id));
  element("stop").setAttribute("aria-disabled", String(running === null));
  element("headphones").hidden = running?.button !== "microphone";
}

function showRate() {
  const count = Number(element("codebooks").value);
  const bits = Math.log2(info.codebookSize);
  const rate = (count * bits * info.frameRate) / 1000;
  const kbps = rate.toFixed(rate < 1 ? 2 : 1);
  element("codebooks").ariaValueText = `${count} of ${info.numCodebooks}, ${kbps} kilobits per second`;
  element("count").textContent = `${count} of ${info.numCodebooks}`;
  element("kbps").textContent = kbps;
  element("bits").textContent = `${count} × ${+bits.toFixed(1)} bits × ${info.frameRate} frames/s`;
}

function showNumbers() {
  if (running === null) return;
  const { session } = running;
  const { queued, underruns, skipped } = player.stats;
  const seconds = (samples) => (samples / context.sampleRate).toFixed(1);
  const missing = skipped + session.dropped;
  element("latency").textContent = session.latency === null ? "–" : Math.round(session.latency);
  element("buffer").textContent = `+ ${Math.round((1000 * queued) / context.sampleRate)} ms of playback buffer`;
  element("underruns").textContent = underruns;
  element("skipped").textContent = missing ? `gaps in playback, ${seconds(missing)} s skipped` : "gaps in playback";
  if (session.finished) stop();
}

/** unreachable: a sentence, or null when the codec can be reached. */
function onReach(unreachable) {
  if (running === null && asking === null) {
    if (unreachable !== null) say("bad", unreachable);
    else if (away) ask();
  }
  away = unreachable !== null;
}

function draw() {
  if (running !== null) pictures.draw(player.time);
  requestAnimationFrame(draw);
}

// What is heard

function choose(name) {
  document.querySelector(`input[name="heard"][value="${name}"]`).checked = true;
  mix();
}

function mix() {
  const heard = document.querySelector('input[name="heard"]:checked').value;
  const muted = element("mute").getAttribute("aria-pressed") === "true";
  for (const name of ["original", "decoded"]) {
    element(name).querySelector("figcaption").dataset.heard = name === heard ? (muted ? "muted" : "heard") : "";
  }
  if (player) Object.assign(player, { heard, muted });
}

// Controls

element("microphone").onclick = startMicrophone;
element("sample").onclick = startSample;
element("file").onclick = () => element("picker").click();
element("stop").onclick = () => running && stop();
element("picker").onchange = ({ target }) => {
  startPicked(target.files);
  target.value = ""; // so that the same file can be chosen again
};
element("codebooks").oninput = ({ target }) => {
  chosen = Number(target.value);
  if (running) running.codec.numCodebooks = chosen;
  showRate();
};
for (const radio of document.querySelectorAll('input[name="heard"]')) radio.onchange = mix;
element("mute").onclick = ({ target }) => {
  target.setAttribute("aria-pressed", String(target.getAttribute("aria-pressed") === "false"));
  mix();
};
document.ondragover = (event) => {
  event.preventDefault();
  document.body.classList.add("drop");
};
document.ondragleave = (event) => {
  if (event.relatedTarget === null) document.body.classList.remove("drop"); // it has left the window
};
document.ondrop = (event) => {
  event.preventDefault();
  document.body.classList.remove("drop");
  startPicked(event.dataTransfer.files);
};

/** For tests and for curious people: the player's counts, its sound, and the session. */
window.fastmimi = {
  get player() { return player; },
  get session() { return running?.session ?? null; },
};

/** backend:

     codec(sampleRate)  a codec, see stream.js; null: for audio of its own rate
     watch(onreach)     show the backend's numbers, and say whether it can be reached (`onReach`)
     audio              options of AudioContext
     opening            what is said while a codec opens */
export function begin(chosenBackend) {
  backend = chosenBackend;
  mix();
  if (window.isSecureContext) {
    say("busy", backend.opening);
    ask();
    backend.watch(onReach);
    requestAnimationFrame(draw);
    setInterval(showNumbers, 200);
  } else {
    for (const id of sources) element(id).disabled = true;
    say("bad", "Browsers let pages process audio only on https or localhost: open this page there.");
  }
}
