// The pad: the story's tokens as things that can be looked at one by one, their shades, and the alternatives to each.

import { $, bar, make, percent } from "./dom.js";

const LN2 = Math.LN2;

// Bounds of five shades, and how the legend names them. Each shade also has a line of its own under the token.
const SHADES = {
  surprise: { bounds: [1, 3, 6, 10], names: ["< 1 bit", "1 to 3", "3 to 6", "6 to 10", "> 10 bits"], of: ({ logprob }) => -logprob / LN2 },
  rank: { bounds: [1, 10, 100, 1000], names: ["likeliest", "top 10", "top 100", "top 1000", "beyond"], of: ({ rank }) => rank ?? 10 },
  entropy: { bounds: [0.5, 1.5, 3, 5], names: ["sure (< 0.5 bit)", "0.5 to 1.5", "1.5 to 3", "3 to 5", "open (> 5 bits)"], of: ({ entropy }) => (entropy ?? 0) / LN2 },
  attention: { bounds: [0.02, 0.05, 0.15, 0.4], names: ["< 2 %", "2 to 5 %", "5 to 15 %", "15 to 40 %", "> 40 %"] },
};

const level = (bounds, value) => bounds.filter((bound) => value >= bound).length;

const SHOW_AFTER_MS = 220;
const HIDE_AFTER_MS = 220;

export class Pad {
  /** `choose(place, id)`: put a token there. `select(place)`: the place that is looked at has changed. */
  constructor(story, vocabulary, { choose, select }) {
    Object.assign(this, { story, vocabulary, choose, select });
    this.element = $("pad");
    this.popover = $("alternatives");
    this.spans = [];
    this.shown = []; // the token of each span
    this.selected = 0;
    this.shade = "surprise";
    this.weights = null; // of attention, by place
    this.timer = 0;
    this.next = make("span", { className: "token next", role: "button", tabIndex: -1, "aria-label": "The next token", "aria-haspopup": "dialog" });
    this.element.append(this.next);
    this.listen();
    this.showLegend();
  }

  listen() {
    const { element, popover } = this;
    element.addEventListener("click", (event) => {
      const place = this.placeOf(event.target);
      if (place !== null) {
        this.go(place, false);
        this.open(place);
      }
    });
    element.addEventListener("pointerover", (event) => {
      const place = event.pointerType === "mouse" ? this.placeOf(event.target) : null;
      if (place !== null && !this.isInside()) this.later(() => this.open(place), SHOW_AFTER_MS);
    });
    element.addEventListener("pointerleave", () => this.later(() => this.close(), HIDE_AFTER_MS));
    popover.addEventListener("pointerenter", () => clearTimeout(this.timer));
    popover.addEventListener("pointerleave", () => {
      if (!this.isInside()) this.later(() => this.close(), HIDE_AFTER_MS);
    });
    element.addEventListener("focusin", (event) => {
      const place = this.placeOf(event.target);
      if (place === null) return;
      if (place !== this.selected) this.go(place, false);
      if (event.target.matches(":focus-visible")) this.open(place);
    });
    element.addEventListener("focusout", (event) => {
      if (!popover.contains(event.relatedTarget) && !element.contains(event.relatedTarget)) this.close();
    });
    popover.addEventListener("focusout", (event) => {
      if (!popover.contains(event.relatedTarget) && !element.contains(event.relatedTarget)) this.close();
    });
    element.addEventListener("keydown", (event) => this.onKey(event));
    popover.addEventListener("keydown", (event) => this.onAlternativesKey(event));
    addEventListener("scroll", () => this.close(), { passive: true });
    addEventListener("resize", () => this.close());
  }

  placeOf(node) {
    const span = node.closest?.(".token");
    return span ? Number(span.dataset.place) : null;
  }

  later(act, ms) {
    clearTimeout(this.timer);
    this.timer = setTimeout(act, ms);
  }

  isInside() {
    return this.popover.contains(document.activeElement);
  }

  // --- tokens ---

  /** Show the story as it is now; spans whose tokens are the same stay. */
  render() {
    const { tokens } = this.story;
    let same = 0;
    while (same < tokens.length && this.shown[same]?.id === tokens[same].id) same += 1;
    for (const span of this.spans.splice(same)) span.parentNode.remove();
    if (same < this.shown.length || !this.read) {
      this.read = this.vocabulary.reader(); // it has to see the bytes of all tokens, in order
      for (const { id } of tokens.slice(0, same)) this.read(id);
    }
    const fresh = document.createDocumentFragment();
    tokens.forEach((token, place) => {
      if (place >= same) {
        this.spans.push(this.span(token, this.read(token.id), place));
        fresh.append(this.spans[place].parentNode);
      } else if (this.shown[place] === token) return;
      this.shadeOne(place);
    });
    this.next.before(fresh);
    if (!this.popover.hidden && this.shown[this.openAt] !== tokens[this.openAt]) this.close();
    const wasAtEnd = this.selected === this.shown.length;
    this.shown = tokens.slice();
    this.next.dataset.place = tokens.length;
    this.next.hidden = this.story.hasEnded;
    this.point(wasAtEnd ? this.last : Math.min(this.selected, this.last));
  }

  /** The last place that can be looked at. */
  get last() {
    return this.story.hasEnded ? this.story.tokens.length - 1 : this.story.tokens.length;
  }

  span({ id }, text, place) {
    const isStop = this.vocabulary.stops.has(id);
    const isBreak = /^\n+$/.test(text);
    // The space before a word is not shaded with it: it may stand at the end of a line.
    const [, space, rest] = /^( *)([^]*)$/.exec(text);
    const span = make("span", {
      className: `token${isStop ? " stop" : ""}${isBreak ? " break" : ""}${text || isStop ? "" : " part"}`, role: "button", tabIndex: -1, "aria-haspopup": "dialog",
      textContent: isStop ? "end" : rest || space,
    });
    span.dataset.place = place;
    make("span", {}, rest ? space : "", span);
    return span;
  }

  shadeOne(place) {
    const span = this.spans[place], token = this.story.tokens[place];
    const { bounds, of } = SHADES[this.shade] ?? {};
    let found = 0;
    if (this.shade === "attention") found = level(bounds, this.weights?.[place] ?? 0);
    else if (bounds && token.logprob !== null) found = level(bounds, of(token));
    if (span.dataset.level !== String(found)) span.dataset.level = found;
    const spoken = this.vocabulary.spoken(token.id);
    const known = token.logprob === null ? "" : `, ${percent(Math.exp(token.logprob))}`;
    span.setAttribute("aria-label", `${spoken || "space"}${known}${token.rank === null ? "" : `, rank ${token.rank + 1}`}`);
  }

  /** Shade by surprise, rank, entropy, attention (with weights by place) or none. */
  shadeBy(shade, weights = null) {
    this.shade = shade;
    this.weights = weights;
    this.spans.forEach((_, place) => this.shadeOne(place));
    this.showLegend();
  }

  showLegend() {
    const names = SHADES[this.shade]?.names ?? [];
    const about = this.shade === "attention" ? [make("li", { textContent: "Attention of this head:" })] : [];
    $("legend").replaceChildren(...about, ...names.map((name, i) => {
      const sample = make("span", { className: "token sample", textContent: "abc", "aria-hidden": "true" });
      sample.dataset.level = i;
      return make("li", {}, sample, make("span", { textContent: name }));
    }));
  }

  // --- the place that is looked at ---

  point(place) {
    const old = this.at(this.selected), now = this.at(place);
    if (old && old !== now) {
      old.tabIndex = -1;
      old.removeAttribute("aria-current");
    }
    this.selected = place;
    now.tabIndex = 0;
    now.setAttribute("aria-current", "true");
  }

  at(place) {
    return place >= this.spans.length ? this.next : this.spans[place];
  }

  go(place, focus = true) {
    this.point(Math.max(0, Math.min(place, this.last)));
    if (focus) this.at(this.selected).focus();
    this.select(this.selected);
  }

  onKey(event) {
    const { key } = event;
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const by = { ArrowRight: 1, ArrowLeft: -1, PageDown: 20, PageUp: -20 }[key];
    if (by) this.go(this.selected + by);
    else if (key === "Home") this.go(0);
    else if (key === "End") this.go(this.last);
    else if (key === "ArrowUp" || key === "ArrowDown") this.goLine(key === "ArrowDown" ? 1 : -1);
    else if (key === "Enter" || key === " ") {
      this.open(this.selected);
      this.popover.querySelector("button")?.focus();
    } else if (key === "Escape" && !this.popover.hidden) {
      this.close();
      event.stopPropagation();
    } else return;
    event.preventDefault();
  }

  /** Go to the token above or below. */
  goLine(direction) {
    const from = this.at(this.selected).getClientRects()[0];
    let best = null, distance = Infinity;
    for (let place = this.selected + direction; place >= 0 && place <= this.last; place += direction) {
      const box = this.at(place).getClientRects()[0];
      if (!box || Math.abs(box.top - from.top) < 4) continue;
      if (best !== null && Math.abs(box.top - best) > 4) break;
      best = box.top;
      if (Math.abs(box.left - from.left) < distance) {
        distance = Math.abs(box.left - from.left);
        this.goal = place;
      }
    }
    if (best !== null) this.go(this.goal);
  }

  // --- alternatives ---

  /** Show what else could stand at a place. */
  open(place) {
    clearTimeout(this.timer);
    const token = this.story.tokens[place];
    if (!token?.top) return this.close();
    const { popover } = this;
    const bits = (-token.logprob / LN2).toFixed(1);
    $("alternatives-title").replaceChildren(
      make("b", { textContent: this.vocabulary.label(token.id) }),
      ` ${percent(Math.exp(token.logprob))} \u00b7 ${bits} bits${token.rank === null ? "" : ` \u00b7 rank ${token.rank + 1}`}`,
    );
    $("alternatives-list").replaceChildren(...token.top.map(([id, logprob]) => {
      const share = Math.exp(logprob);
      const button = make(
        "button", { type: "button", "aria-label": `${this.vocabulary.spoken(id)}, ${percent(share)}${id === token.id ? ", stands here" : ""}` },
        make("span", { className: "piece", textContent: this.vocabulary.label(id) }), bar(share, "model"),
        make("span", { className: "share", textContent: percent(share) }),
      );
      if (id === token.id) button.classList.add("here");
      button.addEventListener("click", () => {
        this.close();
        this.choose(place, id);
      });
      return make("li", {}, button);
    }));
    popover.hidden = false;
    this.openAt = place;
    this.element.querySelectorAll("[aria-expanded]").forEach((span) => span.removeAttribute("aria-expanded"));
    this.at(place).setAttribute("aria-expanded", "true");
    const box = [...this.at(place).getClientRects()].at(-1), { offsetWidth: width, offsetHeight: height } = popover;
    const below = box.bottom + 6 + height <= innerHeight || box.top < height + 12;
    popover.style.left = `${Math.max(8, Math.min(box.left, document.documentElement.clientWidth - width - 8))}px`;
    popover.style.top = `${Math.max(8, below ? Math.min(box.bottom + 6, innerHeight - height - 8) : box.top - height - 6)}px`;
    return undefined;
  }

  close(back = false) {
    clearTimeout(this.timer);
    if (this.popover.hidden) return;
    const wasInside = this.isInside();
    this.popover.hidden = true;
    this.at(this.openAt)?.removeAttribute("aria-expanded");
    if (back && wasInside) this.at(this.selected).focus();
  }

  onAlternativesKey(event) {
    const buttons = [...this.popover.querySelectorAll("button")], at = buttons.indexOf(document.activeElement);
    if (event.key === "ArrowDown") buttons[(at + 1) % buttons.length].focus();
    else if (event.key === "ArrowUp") buttons[(at + buttons.length - 1) % buttons.length].focus();
    else if (event.key === "Escape") {
      this.close(true);
      this.popover.hidden = true;
    } else return;
    event.preventDefault();
    event.stopPropagation();
  }
}
