// What the user sets: between the form, the address and a profile's YAML.

import { byId, element } from "./elements.js";
import { decimals, short, signed } from "./numbers.js";

const STRONGEST = 16; // nats per standard deviation at the ends of a slider
const SHARED = { prompt: "prompt", temperature: "temperature", tokens: "max-tokens", seed: "seed" };
const WEIGHT = "weight.";

/** One slider per value, in nats per standard deviation of its reward, beside the weight that requests name. */
export class Weights {
  /**
   * @param {string[]} names of the values
   * @param {object} scales what the server knows of them: {name: {std, interval}}, as far as it goes
   * @param {() => void} moved called when a weight has changed
   */
  constructor(names, scales, moved) {
    this.rows = new Map(names.map((name, i) => [name, row(name, i, scales[name], moved)]));
    byId("sliders").replaceChildren(...[...this.rows.values()].map((made) => made.root));
  }

  get names() {
    return [...this.rows.keys()];
  }

  /** {name: weight}, the zeros as well. */
  read() {
    return Object.fromEntries([...this.rows].map(([name, made]) => [name, made.weight]));
  }

  /** Sets the weights that are named and are values here, the others to 0. */
  write(weights) {
    for (const [name, made] of this.rows) made.set(Number(weights[name]) || 0);
  }

  /** The values: {name, unit: a standard deviation of the reward, digits: decimals to show of V}. */
  get values() {
    return [...this.rows].map(([name, { unit }]) => ({ name, unit, digits: decimals(unit) }));
  }
}

function row(name, index, scale, moved) {
  const unit = unitOf(scale);
  const measure = scale?.std ? `standard deviation (${short(unit)})` : unit === 1 ? "unit" : short(unit);
  const slider = element("input", {
    id: `slider-${index}`, type: "range", min: -STRONGEST, max: STRONGEST, step: 0.5, value: 0,
  });
  const number = element("input", { type: "number", step: "any", value: 0, "aria-label": `Weight of ${name}` });
  const hint = element("small");
  const label = element("label", { for: slider.id }, name);
  const made = { unit, root: element("div", { class: "slider" }, label, number, slider, hint), weight: 0 };

  const show = () => {
    const strength = made.weight * unit;
    hint.textContent = strength ? `${signed(strength, 1)} nats per ${measure}` : "watched, does not steer";
    slider.value = strength;
    slider.setAttribute("aria-valuetext", `weight ${short(made.weight)}, ${hint.textContent}`);
    const place = (Math.max(-1, Math.min(1, strength / STRONGEST)) + 1) / 2;
    slider.style.setProperty("--from", `${Math.min(place, 0.5) * 100}%`);
    slider.style.setProperty("--to", `${Math.max(place, 0.5) * 100}%`);
    made.root.classList.toggle("off", made.weight === 0);
  };
  made.set = (weight) => {
    made.weight = weight;
    number.value = weight;
    show();
  };
  slider.addEventListener("input", () => made.set(Number((slider.value / unit).toPrecision(3))));
  number.addEventListener("input", () => {
    made.weight = Number.isFinite(number.valueAsNumber) ? number.valueAsNumber : 0;
    show();
  });
  for (const input of [slider, number]) input.addEventListener("change", moved);
  show();
  return made;
}

/** A standard deviation of a reward; of one that is only known by its interval, a quarter of that. */
function unitOf(scale) {
  if (scale?.std) return Math.abs(scale.std);
  if (scale?.interval) return (scale.interval[1] - scale.interval[0]) / 4;
  return 1;
}

/** The settings of a run. */
export function read(weights) {
  return {
    prompt: byId("prompt").value,
    chat: byId("chat").checked,
    temperature: byId("temperature").valueAsNumber,
    maxTokens: byId("max-tokens").valueAsNumber,
    seed: byId("seed").valueAsNumber,
    weights: weights.read(),
  };
}

/** The settings as the fragment of an address. Keys are never in it. */
export function toFragment(weights) {
  const found = new URLSearchParams();
  for (const [name, id] of Object.entries(SHARED)) found.set(name, byId(id).value);
  if (byId("chat").checked) found.set("chat", "1");
  for (const [name, weight] of Object.entries(weights.read())) found.set(WEIGHT + name, weight);
  return found.toString();
}

/** Takes over what a fragment names; the rest stays as it is. */
export function fromFragment(fragment, weights) {
  const found = new URLSearchParams(fragment.replace(/^#/, ""));
  for (const [name, id] of Object.entries(SHARED)) {
    if (found.has(name)) byId(id).value = found.get(name);
  }
  if (found.has("prompt")) byId("chat").checked = found.get("chat") === "1";
  const named = [...found].filter(([name]) => name.startsWith(WEIGHT));
  if (named.length) weights.write(Object.fromEntries(named.map(([name, w]) => [name.slice(WEIGHT.length), w])));
}

/** A profile as the server's file of profiles has it. */
export function toYaml(name, weights) {
  const entries = Object.entries(weights).map(([value, weight]) => `${quoted(value)}: ${weight}`);
  return `profiles:\n  ${quoted(name)}:\n    weights: {${entries.join(", ")}}\n`;
}

/** A YAML key; in quotes (JSON's are YAML's) unless it is a plain word that cannot be anything else. */
function quoted(key) {
  const special = /^(y|n|yes|no|on|off|true|false|null|none)$/i.test(key);
  return /^[A-Za-z_][\w-]*$/.test(key) && !special ? key : JSON.stringify(key);
}
