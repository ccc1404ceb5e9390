/* Colours of the pictures. */

const SOUND = ["#0e1220", "#1d2050", "#472878", "#86307c", "#c8466a", "#ee7a52", "#fbb960", "#fdf3c3"];
const CODES = ["#2b3270", "#36589c", "#3f86b0", "#56afad", "#97cba6", "#e8dca6"];

/** 256 colours [r, g, b] between stops at equal distances. */
function ramp(stops) {
  const colours = stops.map((stop) => [1, 3, 5].map((at) => parseInt(stop.slice(at, at + 2), 16)));
  return Array.from({ length: 256 }, (_, i) => {
    const place = (i / 255) * (colours.length - 1);
    const left = Math.min(Math.floor(place), colours.length - 2);
    return colours[left].map((c, k) => Math.round(c + (place - left) * (colours[left + 1][k] - c)));
  });
}

/** From silent to loud. */
export const sound = ramp(SOUND);

/** Codes have no order that means anything: the colours only tell them apart. */
export const code = ramp(CODES);
