/* A picture of columns along the time of what is played, of which a canvas shows the last seconds.

   It scrolls; for those who prefer reduced motion it stands still, and new columns overwrite the oldest from left to
   right. The columns lie in a ring, an image one pixel wide for each, which is scaled to the canvas. */

export const SPAN_S = 8; // that the canvas shows
const AHEAD_S = 4; // that may have been put before they are heard
const GAP_S = 0.3; // between the newest and the oldest column, where the picture stands still

export const still = matchMedia("(prefers-reduced-motion: reduce)");

export class Strip {
  #context;
  #ring;
  #next = 0; // the first column that was not put

  /** rows: of a column. columnS: seconds of a column. smooth: whether pixels are blended when scaled. */
  constructor(canvas, rows, columnS, smooth) {
    this.canvas = canvas;
    this.rows = rows;
    this.columnS = columnS;
    this.smooth = smooth;
    this.columns = Math.ceil((SPAN_S + AHEAD_S) / columnS);
    this.#context = canvas.getContext("2d");
    const ring = document.createElement("canvas");
    ring.width = this.columns;
    ring.height = rows;
    this.#ring = ring.getContext("2d", { willReadFrequently: true }); // written by pixels, column by column
  }

  /** pixels: RGBA of a column, from the top. Columns that were left out are empty. */
  put(column, pixels) {
    for (let i = Math.max(this.#next, column - this.columns); i < column; i++) {
      this.#ring.clearRect(i % this.columns, 0, 1, this.rows);
    }
    this.#ring.putImageData(new ImageData(pixels, 1, this.rows), column % this.columns, 0);
    this.#next = Math.max(this.#next, column + 1);
  }

  clear() {
    this.#next = 0;
    this.draw(0);
  }

  /** now: seconds of what is played */
  draw(now) {
    this.#resize();
    this.#context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    this.#context.imageSmoothingEnabled = this.smooth;
    if (still.matches) {
      const turn = Math.floor(now / SPAN_S) * SPAN_S;
      this.#drawFrom(turn, now, turn);
      this.#drawFrom(now - SPAN_S + GAP_S, turn, turn - SPAN_S);
    } else {
      this.#drawFrom(now - SPAN_S, now, now - SPAN_S);
    }
  }

  #resize() {
    const width = Math.round(this.canvas.clientWidth * devicePixelRatio);
    const height = Math.round(this.canvas.clientHeight * devicePixelRatio);
    if (this.canvas.width !== width) this.canvas.width = width;
    if (this.canvas.height !== height) this.canvas.height = height;
  }

  /** Draw the columns from `start` to `end` seconds; `left` is the time at the left edge. */
  #drawFrom(start, end, left) {
    const { width, height } = this.canvas;
    const scale = (width * this.columnS) / SPAN_S; // pixels of a column
    const last = Math.min(Math.ceil(end / this.columnS), this.#next);
    let column = Math.max(Math.floor(start / this.columnS), 0, this.#next - this.columns);
    while (column < last) {
      const slot = column % this.columns;
      const count = Math.min(last - column, this.columns - slot);
      const x = column * scale - (left / SPAN_S) * width;
      this.#context.drawImage(this.#ring.canvas, slot, 0, count, this.rows, x, 0, count * scale, height);
      column += count;
    }
  }
}
