// The table of a token's candidates, beside the token.

import { quote } from "./column.js";
import { byId, element, visible } from "./elements.js";
import { fixed, probability, signed } from "./numbers.js";

/** Shows the candidates of a column's token at its place; `values` are {name, digits}. */
export function show(column, index, values) {
  const token = column.completion.tokens[index];
  const panel = byId("candidates");
  panel.replaceChildren(caption(column.completion, token, index, values), table(token, values));
  panel.hidden = false;
  place(panel, column.span(index).getClientRects()[0] ?? column.span(index).getBoundingClientRect());
}

export function hide() {
  byId("candidates").hidden = true;
}

function caption(completion, token, index, values) {
  const gains = values.map(({ name, digits }) => `${name} ${signed(completion.advantage(token, name), digits)}`);
  return element("p", {}, element("b", {}, quote(token)), ` token ${index + 1}`,
    values.length ? element("span", {}, `advantage: ${gains.join(", ")}`) : "");
}

function table(token, values) {
  const [drawn] = token.candidates;
  const ranked = [...token.candidates].sort((one, other) => other.tilted_logprob - one.tilted_logprob);
  const longest = Math.exp(Math.max(...ranked.flatMap((candidate) => [candidate.logprob, candidate.tilted_logprob])));
  const titles = ["Candidate", "Base", ...values.map(({ name }) => `V ${name}`), "Tilted"];
  const rows = ranked.map((candidate) => element("tr", { class: candidate === drawn ? "drawn" : null },
    element("th", { scope: "row" }, visible(candidate.token ?? `token ${candidate.id}`)),
    bar("base", candidate.logprob, longest),
    ...values.map(({ name, digits }) => element("td", {}, fixed(candidate.values[name], digits))),
    bar("tilted", candidate.tilted_logprob, longest)));
  return element("table", {},
    element("thead", {}, element("tr", {}, ...titles.map((title) => element("th", { scope: "col" }, title)))),
    element("tbody", {}, ...rows));
}

/** A probability as a number and as a bar, the longest of the table being full. */
function bar(kind, logprob, longest) {
  const p = logprob === null ? null : Math.exp(logprob);
  const length = element("span", { class: "bar" });
  length.style.setProperty("--part", (p ?? 0) / longest);
  return element("td", { class: kind }, length, element("span", {}, probability(p)));
}

/**
 * Below the token, above it where there is no room, within the window. In a narrow window the style sheet has the table
 * at the foot; then the token is moved above it.
 */
function place(panel, token) {
  const gap = 6;
  if (getComputedStyle(panel).position === "fixed") {
    scrollBy(0, Math.max(0, token.bottom + gap - panel.getBoundingClientRect().top));
    return;
  }
  const left = Math.min(token.left, innerWidth - panel.offsetWidth - gap);
  const below = token.bottom + gap + panel.offsetHeight < innerHeight || token.top < panel.offsetHeight + gap;
  const top = below ? token.bottom + gap : token.top - gap - panel.offsetHeight;
  panel.style.setProperty("--left", `${Math.max(gap, left) + scrollX}px`);
  panel.style.setProperty("--top", `${top + scrollY}px`);
}
