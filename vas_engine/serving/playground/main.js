// The page: what happens when.

import { ApiError, modelCard, savedProfiles, saveProfile, stream } from "./api.js";
import * as candidates from "./candidates.js";
import { Column, SHADES } from "./column.js";
import { Completion, common } from "./completion.js";
import { byId, element } from "./elements.js";
import { MINUS, quantile, roundUp, short } from "./numbers.js";
import { Plot } from "./plot.js";
import * as settings from "./settings.js";

const EXAMPLES = ["Once upon a time", "One day, a little dog", "The old king", "Dear neighbour,"];
const CANDIDATES = 10; // shown of each token
const FIRST_STRENGTH = 4; // of the first value when the page opens, in nats per standard deviation
const FAINTEST = 0.05; // full shade never stands for less: in standard deviations; of the tilt, in nats, five times it
const KEY = "vas-api-key";

const page = document.documentElement;
const columns = { plain: new Column(byId("plain"), look), guided: new Column(byId("guided"), look) };
const shown = () => Object.values(columns).filter((column) => column.completion);

let card = null; // the model's
let weights = null; // the sliders
let plots = [];
let run = null; // the settings of the texts that are shown, and how to stop them
let frame = 0;

// -- the server ----------------------------------------------------------------------------------------------

async function connect() {
  let profiles;
  try {
    const key = sessionStorage.getItem(KEY);
    [card, profiles] = await Promise.all([modelCard(key), savedProfiles(key)]);
  } catch (error) {
    byId("model").textContent = "not connected";
    page.dataset.state = "failed";
    report(error);
    return;
  }
  say();
  const context = card.max_model_len && `${card.max_model_len.toLocaleString("en")} tokens of context`;
  byId("model").textContent = [card.id, context].filter(Boolean).join(", ");
  byId("access").open = false;
  const before = weights?.read();
  const names = card.vas_values;
  weights = new settings.Weights(names, card.vas_scales ?? {}, steered);
  if (before) weights.write(before);
  else weights.write(Object.fromEntries(weights.values.slice(0, 1).map(({ name, unit }) => (
    [name, Number((FIRST_STRENGTH / unit).toPrecision(3))]))));
  byId("max-tokens").max = card.max_model_len ?? "";
  byId("no-values").hidden = names.length > 0;
  for (const id of ["guided", "key-to-colours", "share"]) byId(id).hidden = names.length === 0;
  offerProfiles(profiles);
  offerColours(names);
  plots = weights.values.map((value) => new Plot(value, point));
  byId("plots").replaceChildren(...plots.map((plot) => plot.root));
  settings.fromFragment(location.hash, weights);
  share();
  page.dataset.state = "ready";
}

function offerProfiles(profiles) {
  const names = Object.keys(profiles);
  byId("profile-row").hidden = !names.length;
  byId("profile").replaceChildren(new Option("–", ""), ...names.map((name) => new Option(name, name)));
  byId("profile").onchange = (event) => {
    if (!event.target.value) return;
    weights.write(profiles[event.target.value].weights);
    steered();
  };
}

function offerColours(names) {
  const chosen = colouredBy();
  const choices = [["", "tilt"], ...names.map((name) => [name, name])];
  byId("colour-by").replaceChildren(element("legend", {}, "Coloured by"), ...choices.map(([value, text]) => {
    const radio = element("input", { type: "radio", name: "colour", value });
    radio.checked = value === (chosen ?? "");
    return element("label", {}, radio, text);
  }));
}

// -- running -------------------------------------------------------------------------------------------------

/** Runs the columns that are named, stopping what runs. */
async function generate(names) {
  run?.controller.abort();
  const asked = settings.read(weights);
  const mine = { settings: asked, controller: new AbortController() };
  run = mine;
  say();
  candidates.hide();
  history.replaceState(null, "", `#${settings.toFragment(weights)}`);
  page.dataset.runs = Number(page.dataset.runs ?? 0) + 1;
  running(true);
  const ends = await Promise.allSettled(names.map((name) => fill(columns[name], name, mine)));
  if (run !== mine) return;
  const failed = ends.find((end) => end.status === "rejected" && end.reason.name !== "AbortError");
  const stopped = ends.some((end) => end.status === "rejected");
  mine.controller.abort();
  running(false, failed ? "failed" : stopped ? "stopped" : "done");
  if (failed) report(failed.reason);
  refresh();
}

async function fill(column, name, { settings: asked, controller }) {
  const steering = name === "guided" ? asked.weights : Object.fromEntries(weights.names.map((value) => [value, 0]));
  const completion = new Completion(asked.weights);
  column.begin(asked.chat ? "" : asked.prompt, completion);
  const body = {
    model: card.id,
    temperature: asked.temperature,
    max_tokens: asked.maxTokens,
    seed: asked.seed,
    vas_weights: steering,
    vas_return_values: true,
    vas_return_kl: true,
    vas_return_candidates: Math.min(CANDIDATES, card.vas_limits?.logprobs ?? CANDIDATES),
    ...(asked.chat ? { messages: [{ role: "user", content: asked.prompt }] } : { prompt: asked.prompt }),
  };
  const path = asked.chat ? "v1/chat/completions" : "v1/completions";
  for await (const chunk of stream(path, body, sessionStorage.getItem(KEY), controller.signal)) {
    column.grow(completion.add(chunk));
    frame ||= requestAnimationFrame(refresh);
  }
}

function running(is, state = "running") {
  page.dataset.state = state;
  byId("stop").disabled = !is;
  for (const { list } of Object.values(columns)) list.setAttribute("aria-busy", is);
  byId("status").textContent = is ? "Generating." : `${shown().map(({ root, completion }) => (
    `${root.querySelector("h2").textContent}: ${completion.tokens.length} tokens`)).join(", ")}. ${state}.`;
}

function stop() {
  run?.controller.abort();
}

/** A weight was moved: the guided text follows at once; plain text too if something else was changed as well. */
function steered() {
  share();
  if (!run || !byId("controls").reportValidity()) return;
  const now = settings.read(weights);
  if (JSON.stringify(now) === JSON.stringify(run.settings)) return;
  const rest = JSON.stringify({ ...now, weights: run.settings.weights });
  const same = rest === JSON.stringify(run.settings) && columns.plain.completion?.finish;
  generate(same ? ["guided"] : ["plain", "guided"]);
}

// -- what is seen --------------------------------------------------------------------------------------------

function refresh() {
  cancelAnimationFrame(frame);
  frame = 0;
  for (const column of shown()) column.summarise(weights.values);
  colour();
  fork();
  const lines = Object.entries(columns).filter(([, { completion }]) => completion)
    .map(([label, { completion }]) => ({ label, completion }));
  for (const plot of plots) plot.draw(lines);
}

const colouredBy = () => byId("colour-by").querySelector(":checked")?.value;

function colour() {
  const name = colouredBy() || null;
  const sizes = shown().flatMap(({ completion }) => completion.tokens.map((t) => completion.advantage(t, name)))
    .filter((advantage) => advantage !== null).map(Math.abs);
  const least = FAINTEST * (name === null ? 5 : weights.values.find((value) => value.name === name).unit);
  const scale = roundUp(Math.max(least, sizes.length ? quantile(sizes, 0.95) : 0));
  for (const column of shown()) column.colour(name, scale);
  byId("lowest").textContent = `${MINUS}${short(scale)}`;
  byId("highest").textContent = `+${short(scale)}`;
  const idle = name === null && run && Object.values(run.settings.weights).every((weight) => !weight);
  byId("unit").textContent = name !== null ? `advantage in ${name}` : idle ? "nats: all weights are 0" : "nats of weighted advantage";
}

function fork() {
  const [one, other] = [columns.plain.completion, columns.guided.completion];
  if (!one || !other) return;
  const at = common(one, other);
  for (const column of shown()) column.markFork(at < column.completion.tokens.length ? at : null);
}

/** Shows what is known of a token, in its table and in the plots; null shows nothing. */
function look(column, index) {
  if (index === null) return;
  candidates.show(column, index, weights.values);
  for (const plot of plots) plot.point(index);
  for (const other of shown()) other.mark(index);
}

function leave() {
  candidates.hide();
  point(null);
}

function point(index) {
  for (const plot of plots) plot.point(index);
  for (const column of shown()) column.mark(index);
}

function report(error) {
  byId("error").hidden = false;
  const status = error instanceof ApiError && error.status ? `${error.status}: ` : "";
  byId("error").textContent = `${status}${error.message}`;
  if (error.status === 401) {
    byId("access").open = true;
    byId("key").focus();
  }
}

function say() {
  byId("error").hidden = true;
  byId("error").textContent = "";
}

// -- sharing -------------------------------------------------------------------------------------------------

function share() {
  byId("yaml").textContent = settings.toYaml(byId("profile-name").value || "mine", weights.read());
  byId("shared").textContent = "";
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    byId("shared").textContent = "Copied.";
  } catch {
    // Not allowed, or a page that did not come over a safe connection.
    byId("shared").textContent = `The browser does not let this page copy. Here it is: ${text}`;
  }
}

async function save(event) {
  event.preventDefault();
  const name = byId("profile-name").value || "mine";
  try {
    offerProfiles(await saveProfile(name, weights.read(), byId("admin-key").value));
    byId("admin-key").value = "";
    byId("shared").textContent = `Saved as “${name}”.`;
  } catch (error) {
    byId("shared").textContent = `Not saved. ${error.status ? `${error.status}: ` : ""}${error.message}`;
  }
}

// -- the page ------------------------------------------------------------------------------------------------

function newSeed() {
  byId("seed").value = crypto.getRandomValues(new Uint32Array(1))[0] % 100000;
}

byId("controls").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!card) return;
  generate(card.vas_values.length ? ["plain", "guided"] : ["plain"]);
  // In one column the texts are below the button.
  if (matchMedia("(max-width: 56rem)").matches) byId("results").scrollIntoView();
});
byId("stop").addEventListener("click", stop);
byId("new-seed").addEventListener("click", newSeed);
byId("colour-by").addEventListener("change", colour);
byId("profile-name").addEventListener("input", share);
byId("copy-yaml").addEventListener("click", () => copy(byId("yaml").textContent));
byId("copy-link").addEventListener("click", () => {
  copy(`${location.origin}${location.pathname}#${settings.toFragment(weights)}`);
});
byId("save").addEventListener("submit", save);
byId("access").querySelector("form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, byId("key").value.trim());
  connect();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    byId("controls").requestSubmit();
  } else if (event.key === "Escape") {
    stop();
    leave();
  }
});
document.addEventListener("pointerover", (event) => {
  if (!event.target.closest("[role=option], #candidates, svg")) leave();
});
document.addEventListener("focusout", (event) => {
  if (!event.relatedTarget?.closest("[role=option]")) leave();
});
addEventListener("hashchange", () => weights && (settings.fromFragment(location.hash, weights), share()));
new ResizeObserver(() => run && refresh()).observe(byId("plots"));

byId("examples").replaceChildren(...EXAMPLES.map((text) => {
  const button = element("button", { type: "button" }, text);
  button.addEventListener("click", () => {
    byId("prompt").value = text;
    byId("prompt").focus();
  });
  return button;
}));
byId("swatches").replaceChildren(...Array.from({ length: 2 * SHADES + 1 }, (_, i) => (
  element("span", { "data-shade": i - SHADES }))));
byId("prompt").value = EXAMPLES[0];
byId("key").value = sessionStorage.getItem(KEY) ?? "";
connect();
