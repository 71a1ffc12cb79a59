// V along the text, one small plot for each value: plain against guided.

import { quote } from "./column.js";
import { drawn, element } from "./elements.js";
import { fixed, short, ticks } from "./numbers.js";

const HEIGHT = 150;
const EDGE = { left: 44, right: 58, top: 10, bottom: 24 };

export class Plot {
  /**
   * @param {{name: string, digits: number}} value
   * @param {(index: ?number) => void} looked called with the place of the token that is pointed at
   */
  constructor({ name, digits }, looked) {
    [this.name, this.digits] = [name, digits];
    this.readout = element("p", { class: "readout" });
    this.svg = drawn("svg", { role: "img", height: HEIGHT });
    this.root = element("figure", {}, element("figcaption", {}, `V of ${name}`, this.readout), this.svg);
    this.svg.addEventListener("pointermove", (event) => looked(this.#nearest(event.offsetX)));
    this.svg.addEventListener("pointerleave", () => looked(null));
  }

  /** Draws the completions: [{label, completion}], plain first. */
  draw(lines) {
    this.lines = lines.map(({ label, completion }) => ({ label, completion, ys: completion.series(this.name) }));
    const known = this.lines.flatMap(({ ys }) => ys).filter((y) => y !== null);
    this.root.hidden = known.length < 2;
    if (this.root.hidden) return;
    this.width = this.root.clientWidth;
    this.count = Math.max(2, ...this.lines.map(({ ys }) => ys.length));
    [this.low, this.high] = padded(Math.min(...known), Math.max(...known));
    this.svg.setAttribute("viewBox", `0 0 ${this.width} ${HEIGHT}`);
    this.svg.setAttribute("aria-label", this.#words());
    this.cursor = drawn("g", { class: "cursor" });
    this.svg.replaceChildren(...this.#axes(), ...this.lines.flatMap((line) => this.#line(line)), this.cursor);
    this.#label();
  }

  /** Shows the token at `index` in both lines; null shows none. */
  point(index) {
    if (this.root.hidden || !this.cursor) return;
    this.cursor.replaceChildren();
    this.readout.textContent = "";
    if (index === null) return;
    const x = this.#x(index + 1);
    this.cursor.append(drawn("line", { x1: x, x2: x, y1: EDGE.top, y2: HEIGHT - EDGE.bottom }));
    const parts = [];
    for (const { label, completion, ys } of this.lines) {
      const y = ys[index + 1];
      if (y === undefined || y === null) continue;
      this.cursor.append(drawn("circle", { class: label, cx: x, cy: this.#y(y), r: 3.5 }));
      parts.push(`${label} ${quote(completion.tokens[index])} ${fixed(y, this.digits)}`);
    }
    this.readout.textContent = `token ${index + 1}: ${parts.join(", ")}`;
  }

  #x(step) {
    return EDGE.left + (step / (this.count - 1)) * (this.width - EDGE.left - EDGE.right);
  }

  #y(value) {
    return HEIGHT - EDGE.bottom - ((value - this.low) / (this.high - this.low)) * (HEIGHT - EDGE.top - EDGE.bottom);
  }

  #nearest(x) {
    const step = Math.round(((x - EDGE.left) / (this.width - EDGE.left - EDGE.right)) * (this.count - 1));
    return Math.max(1, Math.min(this.count - 1, step)) - 1;
  }

  #axes() {
    const right = this.width - EDGE.right;
    const horizontal = ticks(this.low, this.high, 3).flatMap((value) => [
      drawn("line", { class: "grid", x1: EDGE.left, x2: right, y1: this.#y(value), y2: this.#y(value) }),
      drawn("text", { x: EDGE.left - 8, y: this.#y(value) + 4, "text-anchor": "end" }, short(value)),
    ]);
    const steps = ticks(0, this.count - 1, this.width < 500 ? 3 : 6).filter(Number.isInteger);
    return [...horizontal, ...steps.map((step) => (
      drawn("text", { x: this.#x(step), y: HEIGHT - 6, "text-anchor": "middle" }, step ? `${step}${step === steps.at(-1) ? " tokens" : ""}` : "prompt")))];
  }

  #line({ label, ys }) {
    let pen = "M";
    const path = ys.map((y, step) => {
      const part = y === null ? "" : `${pen}${this.#x(step).toFixed(1)} ${this.#y(y).toFixed(1)}`;
      pen = y === null ? "M" : "L";
      return part;
    });
    return [drawn("path", { class: label, d: path.join("") })];
  }

  /** Names the lines at their right ends, apart from each other. */
  #label() {
    const ends = this.lines.filter(({ ys }) => ys.length).map(({ label, ys }) => {
      const last = ys.findLastIndex((y) => y !== null);
      return { label, x: this.#x(last), y: this.#y(ys[last]) };
    }).sort((one, other) => one.y - other.y);
    if (ends.length === 2 && ends[1].y - ends[0].y < 14) {
      const middle = (ends[0].y + ends[1].y) / 2;
      [ends[0].y, ends[1].y] = [middle - 7, middle + 7];
    }
    for (const { label, x, y } of ends) this.svg.append(drawn("text", { class: label, x: x + 7, y: y + 4 }, label));
  }

  #words() {
    const said = this.lines.filter(({ ys }) => ys.length)
      .map(({ label, ys }) => `${label} from ${fixed(ys[0], this.digits)} to ${fixed(ys.at(-1), this.digits)}`);
    return `V of ${this.name} along the text: ${said.join("; ")}`;
  }
}

function padded(low, high) {
  const room = (high - low || Math.abs(high) || 1) * 0.06;
  return [low - room, high + room];
}
