// Attention: what each head looked at to predict one token. Computed on demand, by the server's slow reference.

import { post } from "./api.js";
import { $, draw, make, percent } from "./dom.js";

const AT_ONCE = 48; // more heads than this are shown one layer at a time
const N_NAMED = 3;

export class Attention {
  /** `shade(weights)`: shade the story by these, or as before. */
  constructor(story, vocabulary, { shade }) {
    Object.assign(this, { story, vocabulary, shade });
    this.layers = null;
    this.chosen = null;
  }

  /** Ask for the weights with which the token at a place was predicted, and show them. */
  async look(place) {
    const tokens = this.story.ids(place);
    $("look").disabled = true;
    $("heads").setAttribute("aria-busy", "true");
    try {
      const { layers } = await post("/page/attention", { tokens });
      if (!this.story.startsWith(tokens)) return;
      this.layers = layers;
      this.tokens = tokens;
      this.place = place;
      this.render(layers.length * layers[0].length <= AT_ONCE ? null : 0);
    } finally {
      $("look").disabled = false;
      $("heads").setAttribute("aria-busy", "false");
    }
  }

  /** Forget what was shown: the story has changed. */
  clear() {
    if (!this.layers) return;
    this.layers = this.chosen = null;
    $("heads").replaceChildren();
    $("head-text").hidden = true;
    this.shade(null);
  }

  render(layer) {
    const { layers } = this;
    const name = this.story.tokens[this.place] ? this.vocabulary.label(this.story.tokens[this.place].id) : "the next token";
    const shown = make("p", { className: "help" }, "To predict ", make("b", { className: "piece", textContent: name }), `, from ${this.tokens.length} tokens:`);
    const parts = [shown];
    if (layer !== null) {
      const select = make("select", { "aria-label": "Layer" }, ...layers.map((_, i) => make("option", { value: i, textContent: `Layer ${i + 1}`, selected: i === layer })));
      select.addEventListener("change", () => {
        this.render(Number(select.value));
        $("heads").querySelector("select").focus();
      });
      parts.push(select);
    }
    layers.forEach((heads, i) => {
      if (layer !== null && i !== layer) return;
      const group = make("div", { className: "layer", role: "group", "aria-label": `Layer ${i + 1}` });
      if (layer === null) group.append(make("span", { className: "name", textContent: `Layer ${i + 1}` }));
      group.append(...heads.map((weights, j) => this.head(weights, i, j)));
      parts.push(group);
    });
    $("heads").replaceChildren(...parts);
  }

  /** One head: a button with a bar for each token. */
  head(weights, layer, number) {
    const n = weights.length, width = 120 / n;
    const outline = weights.map((weight, i) => `M${(i * width).toFixed(2)} 30v${(-28 * Math.sqrt(weight)).toFixed(2)}h${(width * 0.86).toFixed(2)}V30z`).join("");
    const button = make("button", {
      type: "button", className: "head", "aria-pressed": "false", "aria-label": `Layer ${layer + 1}, head ${number + 1}: ${this.describe(weights)}`,
    }, draw("svg", { viewBox: "0 0 120 30", preserveAspectRatio: "none", "aria-hidden": "true" }, draw("path", { d: outline })),
    make("span", { textContent: `head ${number + 1}` }));
    button.addEventListener("click", () => this.choose(button, weights, layer, number));
    return button;
  }

  choose(button, weights, layer, number) {
    const again = this.chosen === button;
    this.chosen?.setAttribute("aria-pressed", "false");
    this.chosen = again ? null : button;
    $("head-text").hidden = again;
    if (again) return this.shade(null);
    button.setAttribute("aria-pressed", "true");
    $("head-text").textContent = `Layer ${layer + 1}, head ${number + 1}: ${this.describe(weights)}.`;
    return this.shade(weights.slice(this.story.facts.begins.length));
  }

  /** The tokens that a head looks at most, in words. */
  describe(weights) {
    const most = weights.map((weight, i) => [weight, i]).sort((a, b) => b[0] - a[0]).slice(0, N_NAMED);
    const begins = this.story.facts.begins.length;
    const name = (i) => (i < begins ? "the start of the text" : `\u201c${this.vocabulary.spoken(this.tokens[i])}\u201d`);
    return most.map(([weight, i]) => `${percent(weight)} on ${name(i)}`).join(", ");
  }
}
