/* The page without a server: the codec runs in the browser. */

import { BrowserCodec, speed } from "./browser-codec.js";
import { begin } from "./main.js";

const EVERY_MS = 1000;
const element = (id) => document.getElementById(id);
const description = await (await fetch("codec.json")).json();

element("of").textContent = "real time, encoding and decoding in this browser";
element("streams").closest("div").hidden = true;
begin({
  opening: "Loading the codec…",
  audio: { sampleRate: description.sample_rate }, // the browser resamples
  codec: () => new BrowserCodec(description),
  watch: () => setInterval(() => (element("factor").textContent = speed()?.toFixed(1) ?? "–"), EVERY_MS),
});
