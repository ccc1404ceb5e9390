/* The page of a server: the codec runs there. */

import { pollHealth } from "./health.js";
import { begin } from "./main.js";
import { ServerCodec } from "./stream.js";

const element = (id) => document.getElementById(id);

begin({
  opening: "Connecting to the server…",
  audio: {},
  codec: (sampleRate) => new ServerCodec(sampleRate),
  watch: (onreach) =>
    pollHealth((health) => {
      element("factor").textContent = health?.real_time_factor ? Math.round(health.real_time_factor) : "–";
      element("streams").textContent = health?.open ?? "–";
      element("capacity").textContent = health ? `open, of ${health.capacity} on this server` : "open on the server";
      onreach(health === null ? "The server does not answer. Trying again…" : null);
    }),
});
