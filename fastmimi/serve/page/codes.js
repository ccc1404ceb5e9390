/* Codes as a moving matrix: a row for each codebook, the first on top, a column for each frame. */

import { code } from "./palette.js";
import { Strip } from "./strip.js";

const UNUSED = 40; // opacity, of 255, of codes that were not decoded

export class CodeMatrix {
  #strip;
  #codebookSize;

  constructor(canvas, { numCodebooks, codebookSize, frameRate }) {
    this.#strip = new Strip(canvas, numCodebooks, 1 / frameRate, false);
    this.#codebookSize = codebookSize;
  }

  /** A frame's codes; the first `used` were decoded. */
  put(column, codes, used) {
    const pixels = new Uint8ClampedArray(4 * codes.length);
    codes.forEach((index, row) => {
      const colour = code[Math.floor((256 * index) / this.#codebookSize)];
      pixels.set([...colour, row < used ? 255 : UNUSED], 4 * row);
    });
    this.#strip.put(column, pixels);
  }

  draw(now) {
    this.#strip.draw(now);
  }

  clear() {
    this.#strip.clear();
  }
}
