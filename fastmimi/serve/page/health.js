/* The server's numbers, asked for every two seconds while the page is visible. */

import { address } from "./stream.js";

const EVERY_MS = 2000;

/** onhealth: called with what /health answers, or null where it does not. */
export function pollHealth(onhealth) {
  const poll = async () => {
    if (!document.hidden) onhealth(await health());
    setTimeout(poll, EVERY_MS);
  };
  poll();
}

async function health() {
  try {
    const answer = await fetch(address("health"), { signal: AbortSignal.timeout(EVERY_MS) });
    return answer.ok ? await answer.json() : null;
  } catch {
    return null;
  }
}
