// Numbers as they are written, and round ones for scales.

export const MINUS = "−";

/** A number with so many decimals; a dash where there is none. */
export function fixed(number, digits) {
  if (!Number.isFinite(number)) return "–";
  const options = { minimumFractionDigits: digits, maximumFractionDigits: digits };
  const text = Math.abs(number).toLocaleString("en", options);
  return number < 0 && /[1-9]/.test(text) ? MINUS + text : text;
}

/** The same with a sign in front. */
export function signed(number, digits) {
  const text = fixed(number, digits);
  return number > 0 && /[1-9]/.test(text) ? `+${text}` : text;
}

/** Decimals that show a hundredth of `unit`. */
export function decimals(unit) {
  return Math.max(0, 2 - Math.floor(Math.log10(unit) + 1e-9));
}

/** A number with as many decimals as it needs, up to three significant digits. */
export function short(number) {
  return number ? fixed(number, decimals(Math.abs(number))).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "") : "0";
}

/** A probability: two digits where it is ordinary, less than a thousandth as such. */
export function probability(p) {
  if (p === null || p === undefined) return "–";
  return p > 0 && p < 0.001 ? "<.001" : p.toFixed(3).replace(/^0/, "");
}

/** The smallest of 1, 2 and 5 times a power of ten that is not below `number`. */
export function roundUp(number) {
  const power = 10 ** Math.floor(Math.log10(number));
  return [1, 2, 5, 10].map((times) => times * power).find((round) => round >= number * (1 - 1e-9));
}

/** Round numbers from `low` to `high`, about `count` of them. */
export function ticks(low, high, count) {
  const step = roundUp((high - low) / count || 1);
  const first = Math.ceil(low / step - 1e-9);
  const last = Math.floor(high / step + 1e-9);
  return Array.from({ length: last - first + 1 }, (_, i) => (first + i) * step);
}

/** The q-th part of sorted numbers. */
export function quantile(numbers, q) {
  const sorted = [...numbers].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))];
}
