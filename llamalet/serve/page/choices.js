// The distribution at one place: as the model has it, as the sampler leaves it, and as the grammar has it; and the coin.

import { post } from "./api.js";
import { $, bar, draw, make, percent } from "./dom.js";

const N_ROWS = 12;
const N_LEAST = 6; // and as many more as make up ENOUGH of the model's probability
const ENOUGH = 0.995;
const LN2 = Math.LN2;
const CUTS = { top_k: "top-k", top_p: "top-p", min_p: "min-p", temperature: "temperature", vocabulary: "never drawn" };

export class Choices {
  /** `take(place, id, details)`: put a token there. */
  constructor(story, vocabulary, settings, { take }) {
    Object.assign(this, { story, vocabulary, settings, take });
    this.abort = null;
    this.timer = 0;
    this.place = 0;
    this.found = null;
    this.hasTruth = story.facts.speaks_grammar;
    $("table").classList.toggle("with-truth", this.hasTruth);
  }

  /** Show the distribution at a place, once nothing has changed for a moment. */
  show(place) {
    this.place = place;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.load().catch((error) => this.fail(error)), 60);
  }

  async load() {
    this.abort?.abort();
    this.abort = new AbortController();
    const { signal } = this.abort;
    const place = this.place, tokens = this.story.ids(place), run = this.story.runAt(place);
    if (!tokens.length || this.story.isWriting) return;
    const [found, truth] = await Promise.all([
      this.ask(place, signal),
      this.hasTruth ? post("/page/truth", { tokens, n: 100 }, signal).catch(() => null) : null,
    ]);
    this.found = { ...found, place, tokens };
    this.render(found, truth, place, run);
  }

  /**
   * Ask what may stand at a place, and what the coin there falls on. A token that is there keeps the seed and the coin
   * that drew it; the sliders show what they would do to it.
   */
  ask(place, signal) {
    const { seed, step } = this.story.runAt(place);
    return post("/page/distribution", { tokens: this.story.ids(place), n: N_ROWS, seed, step, ...this.settings.values }, signal);
  }

  /** Draw the next token with the next coin, and put it at the end. */
  async drawOne() {
    const place = this.story.tokens.length, tokens = this.story.ids(), found = await this.ask(place);
    if (this.story.tokens.length === place && this.story.startsWith(tokens)) this.take(place, found.token, this.details(found.token, found));
  }

  /** Whether what is shown is of the present place and story. */
  isCurrent() {
    return this.found.place === this.place && this.story.startsWith(this.found.tokens);
  }

  fail(error) {
    if (error.name === "AbortError") return;
    this.found = null;
    $("table").tBodies[0].replaceChildren();
    $("strip").replaceChildren();
    $("coin").textContent = $("choices-help").textContent = "";
    this.settings.showCounts(null);
    $("table-note").textContent = error.message;
  }

  /** What is known of a token of the distribution that is shown, for the story. */
  details(id, { rows, entropy } = this.found) {
    const { raw: share, rank } = rows.find(({ token }) => token === id);
    const top = rows.map(({ token, raw }) => [token, Math.log(raw)]).slice(0, 10);
    return { logprob: Math.log(share), rank, entropy, top };
  }

  render(found, truth, place, run) {
    const here = this.story.tokens[place]?.id ?? null;
    const label = (id) => this.vocabulary.label(id);
    $("choices-title").textContent = here === null ? "What can come next" : "What could stand here";
    $("choices-help").replaceChildren(
      ...(here === null ? ["At the end of the story."] : ["In place of ", make("b", { className: "piece", textContent: label(here) }), "."]),
      ` Entropy ${(found.entropy / LN2).toFixed(2)} bits, after the settings ${(found.entropy_drawn / LN2).toFixed(2)}.`,
    );
    this.settings.showCounts(found.kept);
    const shares = new Map(truth?.rows ?? []);
    const rows = this.worthShowing(found, here);
    const divergence = this.divergence(found, truth);
    $("table").tBodies[0].replaceChildren(...rows.map((row) => this.row(row, here, place, shares, truth)));
    $("table-note").replaceChildren(...this.notes(found, truth, divergence));
    this.strip(found, place, run, here);
  }

  /** The likeliest tokens as far as they matter, what stands here, and what the coin falls on. */
  worthShowing({ rows, token }, here) {
    let sum = 0;
    return rows.filter((row, i) => {
      const isShown = i < N_LEAST || sum < ENOUGH || row.token === here || row.token === token;
      sum += row.raw;
      return isShown;
    });
  }

  row(row, here, place, shares, truth) {
    const { token, raw, drawn, cut_by: cut } = row;
    const button = make("button", {
      type: "button", className: "take", title: "Put it here",
      "aria-label": `${this.vocabulary.spoken(token)}: ${token === here ? "stands here" : "put it here"}${token === this.found.token ? "; the coin falls on it" : ""}`,
    }, make("span", { className: "piece", textContent: this.vocabulary.label(token) }));
    button.addEventListener("click", () => this.isCurrent() && this.take(place, token, this.details(token)));
    const cell = (share, kind, text = percent(share)) => make("td", {}, bar(share, kind), make("span", { className: "share", textContent: text }));
    const cells = [
      make("th", { scope: "row" }, button), cell(raw, "model"),
      cell(drawn, "drawn", cut ? `\u2715 ${CUTS[cut]}` : percent(drawn)),
    ];
    const share = shares.get(token) ?? 0;
    cells.push(truth?.problem === null ? cell(share, "grammar") : make("td", { textContent: "\u2013" }));
    cells.at(-1).classList.add("truth");
    const line = make("tr", {}, ...cells);
    line.classList.toggle("cut", Boolean(cut));
    line.classList.toggle("here", token === here);
    line.classList.toggle("falls", token === this.found.token);
    return line;
  }

  /** The extra bits a token that the model pays for not knowing the grammar, as far as the listed tokens tell. */
  divergence(found, truth) {
    if (!truth?.rows?.length) return null;
    const raw = new Map(found.rows.map((row) => [row.token, row.raw]));
    const bits = truth.rows.reduce((sum, [id, share]) => (raw.has(id) ? sum + share * Math.log2(share / raw.get(id)) : sum), 0);
    const covered = truth.rows.reduce((sum, [id, share]) => (raw.has(id) ? sum + share : sum), 0);
    return covered > 0.999 ? bits : null;
  }

  notes(found, truth, divergence) {
    const notes = [`All other tokens: ${percent(found.rest.raw)} in the model, ${percent(found.rest.drawn)} after the settings.`];
    if (truth?.problem) notes.push(` The grammar: ${truth.problem}.`);
    else if (truth) {
      notes.push(` The grammar that wrote the training stories allows ${truth.n_possible.toLocaleString("en")} here (entropy ${(truth.entropy / LN2).toFixed(2)} bits).`);
      if (divergence !== null) notes.push(` Not knowing it exactly costs the model ${Math.max(0, divergence).toFixed(3)} bits.`);
    }
    return notes;
  }

  /** The numbers from 0 to 1, cut into the tokens that can be drawn, and where the coin falls. */
  strip(found, place, run, here) {
    const strip = $("strip"), { coin } = found;
    const drawn = found.rows.filter(({ interval }) => interval);
    const parts = drawn.map(({ token, interval: [from, to] }, i) => draw("rect", {
      x: 1000 * from, y: 12, width: Math.max(1, 1000 * (to - from) - 2), height: 24, rx: 2,
      class: `part p${i % 2}${token === found.token ? " hit" : ""}`,
    }));
    parts.unshift(draw("rect", { x: 0, y: 12, width: 1000, height: 24, rx: 2, class: "rest" }));
    if (coin !== null) parts.push(draw("path", { d: `M${1000 * coin} 9V40`, class: "coin" }), draw("path", { d: `M${1000 * coin - 9} 0h18l-9 11z`, class: "coin-tip" }));
    strip.replaceChildren(...parts);
    const name = this.vocabulary.label(found.token);
    if (coin === null) {
      strip.setAttribute("aria-label", `Temperature 0 takes the likeliest token, ${name}`);
      $("coin").replaceChildren("Temperature 0 takes the likeliest: ", make("b", { className: "piece", textContent: name }), ".");
      return;
    }
    strip.setAttribute("aria-label", `The coin ${coin.toFixed(4)} falls on ${name}`);
    const which = `Seed ${run.seed}, coin ${run.step + 1}: `;
    const now = here !== null && here !== found.token && this.story.tokens[place].run ? " With other settings it fell on what stands here." : "";
    $("coin").replaceChildren(which, make("b", { textContent: coin.toFixed(4) }), " falls on ", make("b", { className: "piece", textContent: name }), `.${now}`);
  }
}
