// One of the texts side by side: tokens coloured by their advantage, and a line of figures below.

import { element, visible } from "./elements.js";
import { fixed, short, signed } from "./numbers.js";

export const SHADES = 4; // on either side of none

export class Column {
  /**
   * @param {HTMLElement} root
   * @param {(column: Column, index: ?number) => void} looked called when a token is pointed at or left
   */
  constructor(root, looked) {
    this.root = root;
    this.completion = null;
    [this.prompt, this.list, this.summary] = [".prompt", ".tokens", ".summary"].map((part) => root.querySelector(part));
    this.list.addEventListener("pointerover", (event) => looked(this, this.indexOf(event.target)));
    this.list.addEventListener("focusin", (event) => looked(this, this.indexOf(event.target)));
    this.list.addEventListener("keydown", (event) => this.#walk(event));
  }

  /** Begins anew with a completion that will grow. */
  begin(prompt, completion) {
    this.completion = completion;
    this.prompt.textContent = prompt;
    this.list.replaceChildren();
    this.summary.replaceChildren();
  }

  /** Shows the tokens that were added. */
  grow(fresh) {
    const first = this.list.childElementCount;
    const made = fresh.map(({ text }) => {
      // The space before a word stays without colour: words are easier to see that way.
      const space = text.length - text.trimStart().length;
      const line = text.includes("\n") && !text.trim() ? "line" : null;
      const ink = element("span", { class: "ink" }, text.slice(space));
      return element("span", { role: "option", tabindex: -1, class: line }, text.slice(0, space), ink);
    });
    if (first === 0 && made.length) made[0].tabIndex = 0;
    this.list.append(...made);
    // The end of sequence adds no text, but its value is the reward's own: it has a mark.
    const last = this.completion.tokens.at(-1);
    if (this.completion.finish === "stop" && last && !last.text) {
      this.span(this.completion.tokens.length - 1).replaceChildren(element("span", { class: "ink end" }, "end"));
    }
  }

  span(index) {
    return this.list.children[index];
  }

  /** The place of the token that an element belongs to; null where it is none. */
  indexOf(target) {
    const span = target.closest("[role=option]");
    return span ? [...this.list.children].indexOf(span) : null;
  }

  /** Colours the tokens; `scale` is the advantage of the darkest shade, `name` a value or null for all. */
  colour(name, scale) {
    this.completion?.tokens.forEach((token, i) => {
      const advantage = this.completion.advantage(token, name);
      const shade = advantage === null ? 0 : Math.round(Math.max(-1, Math.min(1, advantage / scale)) * SHADES);
      this.span(i).dataset.shade = shade;
    });
  }

  /** Marks the token that is looked at in another place. */
  mark(index) {
    this.list.querySelector(".here")?.classList.remove("here");
    if (index !== null) this.span(index)?.classList.add("here");
  }

  /** Marks the first token that the other text does not share; null for none. */
  markFork(index) {
    this.list.querySelector(".fork")?.classList.remove("fork");
    if (index !== null) this.span(index)?.classList.add("fork");
  }

  /** The figures of the completion; `values` are {name, digits}. */
  summarise(values) {
    const { tokens, kl, evaluations, speed, finish } = this.completion;
    if (!tokens.length) return;
    const figures = [[fixed(tokens.length, 0), "tokens"]];
    for (const { name, digits } of values) {
      figures.push([signed(this.completion.meanAdvantage(name), digits), `mean advantage in ${name}`]);
    }
    if (kl !== null) figures.push([fixed(kl, 2), "nats of KL spent"]);
    if (evaluations !== null) figures.push([fixed(evaluations, 0), "value evaluations"]);
    if (speed !== null) figures.push([short(Math.round(speed)), "tokens/s"]);
    if (finish !== null) figures.push(["", { stop: "ended by the model", length: "ended by the limit" }[finish] ?? finish]);
    this.summary.replaceChildren(...figures.map(([figure, what]) => element("li", {}, element("b", {}, figure), ` ${what}`)));
  }

  /** Arrow keys, Home and End go from token to token. */
  #walk(event) {
    const here = this.indexOf(event.target);
    const last = this.list.childElementCount - 1;
    const next = { ArrowRight: here + 1, ArrowDown: here + 1, ArrowLeft: here - 1, ArrowUp: here - 1, Home: 0, End: last };
    if (here === null || !(event.key in next)) return;
    event.preventDefault();
    const there = Math.max(0, Math.min(last, next[event.key]));
    this.span(here).tabIndex = -1;
    this.span(there).tabIndex = 0;
    this.span(there).focus();
  }
}

/** A token's text for a caption. */
export const quote = (token) => `“${visible(token.text || token.piece)}”`;
