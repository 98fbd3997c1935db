// The sampler's settings, in the order in which they act. They live in the address, so that a link tells the same story.

import { $, make } from "./dom.js";

const off = (value, text) => (value === text ? "off" : null);

// top-k has steps of its own: few tokens are told apart finely, many are not.
const TOP_K = [0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 60, 80, 100, 150, 200, 300, 500, 1000];

const SLIDERS = [
  {
    name: "temperature", label: "Temperature", short: "t", initial: 0.8, min: 0, max: 2, step: 0.05,
    says: "divides the logits; 0 takes the likeliest", show: (value) => value.toFixed(2),
  },
  {
    name: "top_k", label: "Top-k", short: "k", initial: 0, steps: TOP_K,
    says: "keeps this many of the likeliest", show: (value) => off(value, 0) ?? String(value),
  },
  {
    name: "top_p", label: "Top-p", short: "p", initial: 0.9, min: 0.01, max: 1, step: 0.01,
    says: "keeps the fewest whose sum exceeds this", show: (value) => off(value, 1) ?? value.toFixed(2),
  },
  {
    name: "min_p", label: "Min-p", short: "m", initial: 0, min: 0, max: 0.5, step: 0.01,
    says: "drops those below this share of the likeliest", show: (value) => off(value, 0) ?? value.toFixed(2),
  },
];

const LENGTH = 256;
const MAX_TEXT = 2000;

/** A seed that can be typed again. */
export const newSeed = () => 1 + Math.floor(Math.random() * 9999);

export class Settings extends EventTarget {
  constructor() {
    super();
    this.values = {};
    this.inputs = {};
    this.counts = {};
    const found = new URLSearchParams(location.hash.slice(1));
    this.text = found.get("text")?.slice(0, MAX_TEXT) ?? null; // null: the page's own beginning
    for (const slider of SLIDERS) this.addSlider(slider, found);
    const seed = found.get("s");
    this.seed = /^\d{1,15}$/.test(seed ?? "") ? seed : String(newSeed());
    const length = Number.parseInt(found.get("n") ?? "", 10);
    $("length").value = length >= 1 && length <= 4096 ? length : LENGTH;
    $("seed").addEventListener("change", () => {
      if (!/^\d{1,15}$/.test($("seed").value)) this.seed = String(newSeed());
      this.changed();
    });
    $("dice").addEventListener("click", () => {
      this.seed = String(newSeed());
      this.changed();
    });
    $("length").addEventListener("change", () => this.changed());
  }

  addSlider({ name, label, short, initial, min, max, step, steps, says, show }, found) {
    const given = Number.parseFloat(found.get(short) ?? "");
    const least = steps ? steps[0] : min, most = steps ? steps.at(-1) : max;
    let value = given >= least && given <= most ? given : initial;
    if (steps) value = steps.reduce((best, one) => (Math.abs(one - value) < Math.abs(best - value) ? one : best));
    const input = make("input", {
      type: "range", id: `slider-${name}`, min: steps ? 0 : min, max: steps ? steps.length - 1 : max,
      step: steps ? 1 : step, autocomplete: "off", "aria-describedby": `says-${name}`,
    });
    input.value = steps ? steps.indexOf(value) : value;
    const output = make("output", { htmlFor: input.id });
    const count = make("span", { className: "count" });
    const read = () => {
      const now = steps ? steps[Number(input.value)] : Number(input.value);
      this.values[name] = now;
      output.textContent = show(now);
      input.setAttribute("aria-valuetext", show(now));
    };
    input.addEventListener("input", () => {
      read();
      this.dispatchEvent(new Event("change"));
    });
    input.addEventListener("change", () => this.remember());
    read();
    this.inputs[name] = input;
    this.counts[name] = count;
    $("sliders").append(make(
      "li", {}, make("label", { htmlFor: input.id, textContent: label }), output, input,
      make("span", { id: `says-${name}`, className: "says", textContent: says }), count,
    ));
  }

  get seed() {
    return $("seed").value;
  }

  set seed(value) {
    $("seed").value = value;
  }

  get length() {
    return Math.max(1, Math.min(4096, Number.parseInt($("length").value, 10) || LENGTH));
  }

  set length(value) {
    $("length").value = value;
  }

  /** What the server's endpoints take. Seeds have at most 15 digits, because JavaScript's numbers hold no more. */
  sampling() {
    return { ...this.values, seed: Number(this.seed) };
  }

  /** Show how many tokens each step leaves. */
  showCounts(kept) {
    const shown = { temperature: kept?.vocabulary, top_k: kept?.top_k, top_p: kept?.top_p, min_p: kept?.min_p };
    for (const [name, count] of Object.entries(this.counts)) {
      const n = shown[name];
      count.textContent = n === undefined ? "" : `${n.toLocaleString("en")} ${n === 1 ? "token" : "tokens"}`;
    }
  }

  changed() {
    this.remember();
    this.dispatchEvent(new Event("change"));
  }

  /** Put the settings into the part of the address that browsers do not send. */
  remember(text = this.text) {
    this.text = text;
    const found = new URLSearchParams();
    for (const { name, short } of SLIDERS) found.set(short, this.values[name]);
    found.set("s", this.seed);
    found.set("n", this.length);
    if (text !== null) found.set("text", text.slice(0, MAX_TEXT));
    try {
      history.replaceState(null, "", `#${found}`);
    } catch {
      // Browsers limit how often an address may change; the next change brings it up to date.
    }
  }
}
