// A text as it arrives: its tokens, with their log-probabilities, values and candidates.

/**
 * @typedef {object} Token
 * @property {string} text what it adds to the text
 * @property {string} piece its own text, also where it adds none
 * @property {?number} base log-probability under the model
 * @property {?number} tilted log-probability under the distribution it was drawn from
 * @property {Object<string, number>} before V before it, by value
 * @property {Object<string, number>} after V after it, by value
 * @property {object[]} candidates as the server tells them, the drawn one first
 */

export class Completion {
  /** @param {Object<string, number>} weights that the tilt of its tokens is counted with */
  constructor(weights) {
    this.weights = weights;
    /** @type {Token[]} */
    this.tokens = [];
    this.start = null;
    this.kl = this.evaluations = this.finish = null;
    this.times = [];
  }

  /** Takes in a chunk of the stream; returns the tokens that are new. */
  add(chunk) {
    if (chunk.vas) this.evaluations = chunk.vas.value_evaluations;
    if (!chunk.choices.length) return [];
    const [choice] = chunk.choices;
    const told = choice.vas;
    const candidates = told.candidates ?? [];
    this.start ??= told.prompt_values ?? {};
    const texts = share(choice.text ?? choice.delta.content, candidates.map(([drawn]) => drawn.token ?? ""));
    const fresh = candidates.map(([drawn, ...others], i) => ({
      text: texts[i],
      piece: drawn.token ?? `token ${drawn.id}`,
      base: drawn.logprob,
      tilted: drawn.tilted_logprob,
      after: drawn.values,
      candidates: [drawn, ...others],
    }));
    for (const token of fresh) {
      token.before = this.tokens.at(-1)?.after ?? this.start;
      this.tokens.push(token);
    }
    if (fresh.length) this.times.push(performance.now());
    // Text that was held back and belongs to tokens told before.
    if (!fresh.length && this.tokens.length) this.tokens.at(-1).text += texts.rest;
    this.kl = told.kl ?? this.kl;
    this.finish = choice.finish_reason ?? this.finish;
    return fresh;
  }

  get text() {
    return this.tokens.map((token) => token.text).join("");
  }

  /** Tokens a second, from the first chunk on; null before there are two. */
  get speed() {
    const seconds = (this.times.at(-1) - this.times[0]) / 1000;
    return seconds > 0 ? (this.tokens.length - 1) / seconds : null;
  }

  /** V of a value along the text: before its first token, then after each. */
  series(name) {
    const first = this.start?.[name];
    return first === undefined ? [] : [first, ...this.tokens.map((token) => token.after[name] ?? null)];
  }

  /** A(token) of one value, or with `name` null of all by their weights: the tilt, in nats. Null where not known. */
  advantage(token, name) {
    if (name !== null) return difference(token.after[name], token.before[name]);
    const parts = Object.entries(this.weights).map(([value, weight]) => weight * this.advantage(token, value));
    return parts.length && parts.every(Number.isFinite) ? parts.reduce((sum, part) => sum + part, 0) : null;
  }

  /** Mean of the known advantages; null without any. */
  meanAdvantage(name) {
    const known = this.tokens.map((token) => this.advantage(token, name)).filter((a) => a !== null);
    return known.length ? known.reduce((sum, a) => sum + a, 0) / known.length : null;
  }
}

/** How many tokens two texts have in common at their start. */
export function common(one, other) {
  const shorter = Math.min(one.tokens.length, other.tokens.length);
  for (let i = 0; i < shorter; i++) {
    if (identity(one.tokens[i]) !== identity(other.tokens[i])) return i;
  }
  return shorter;
}

/** A token's id; its text where the server knows no ids. */
function identity({ candidates: [drawn] }) {
  return drawn.id ?? drawn.token;
}

function difference(after, before) {
  return Number.isFinite(after) && Number.isFinite(before) ? after - before : null;
}

/** A chunk's text among its tokens: to each its own piece while that fits, what is left to the last. */
function share(text, pieces) {
  let rest = text;
  const shares = pieces.map((piece, i) => {
    const own = i === pieces.length - 1 ? rest : rest.startsWith(piece) ? piece : "";
    rest = rest.slice(own.length);
    return own;
  });
  shares.rest = rest;
  return shares;
}
