// The story: its tokens and what the model thought of them, undo and redo, and the requests that make it longer.

import { post, stream } from "./api.js";

const N_TOP = 10;

/**
 * One token: id; logprob (nats), rank (0: the likeliest), entropy (nats), top: [[id, logprob], ...], all of them null
 * while unknown; run: the seed and settings that drew it and its coin's number, or null if a person wrote it.
 */
const token = (id, details = null, run = null) => ({
  id, logprob: details?.logprob ?? null, rank: details?.rank ?? null, entropy: details?.entropy ?? null,
  top: details?.top ?? null, run,
});

/** Return the tokens of a choice's logprobs, as [id, details]; details are null where nothing comes before. */
export function entries(logprobs) {
  if (!logprobs) return [];
  const idOf = (name) => Number(name.slice(name.indexOf(":") + 1));
  return logprobs.tokens.map((name, i) => {
    const id = idOf(name);
    const logprob = logprobs.token_logprobs[i];
    if (logprob === null || logprob === undefined) return [id, null];
    const named = Object.entries(logprobs.top_logprobs?.[i] ?? {}).map(([key, value]) => [idOf(key), value]);
    const top = named.sort((a, b) => b[1] - a[1]).slice(0, N_TOP);
    const found = top.findIndex(([other]) => other === id);
    return [id, { logprob, rank: logprobs.ranks?.[i] ?? (found < 0 ? null : found), entropy: logprobs.entropies?.[i] ?? null, top }];
  });
}

export class Story extends EventTarget {
  constructor(facts, vocabulary, settings) {
    super();
    this.facts = facts;
    this.vocabulary = vocabulary;
    this.settings = settings;
    this.tokens = [];
    this.own = 0; // so many tokens a person chose, or wrote
    this.start = 0; // the present run of coins begins here: the seed's first coin draws the token at this place
    this.past = [];
    this.future = [];
    this.abort = null;
    this.writing = null; // the promise of the present or last request
    this.times = null;
  }

  get isWriting() {
    return this.abort !== null;
  }

  get hasEnded() {
    return this.tokens.length > 0 && this.vocabulary.stops.has(this.tokens.at(-1).id);
  }

  /** The ids before a position, with what begins every text. */
  ids(end = this.tokens.length) {
    return [...this.facts.begins, ...this.tokens.slice(0, end).map(({ id }) => id)];
  }

  text(end = this.tokens.length) {
    return this.vocabulary.text(this.tokens.slice(0, end).map(({ id }) => id));
  }

  /** Whether the text still begins with these ids. */
  startsWith(ids) {
    const now = this.ids();
    return ids.every((id, i) => id === now[i]);
  }

  /** What undo brings back: the story, and what its address says of it. */
  snapshot() {
    const { seed, length, text } = this.settings;
    return { tokens: this.tokens.slice(), start: this.start, own: this.own, seed, length, text };
  }

  /** Note the present story for undo. */
  mark() {
    this.past.push(this.snapshot());
    this.future = [];
  }

  undo(from = this.past, to = this.future) {
    if (!from.length || this.isWriting) return;
    to.push(this.snapshot());
    const { tokens, start, own, seed, length, text } = from.pop();
    Object.assign(this, { tokens, start, own });
    Object.assign(this.settings, { seed, length });
    this.settings.remember(text);
    this.changed();
  }

  redo() {
    this.undo(this.future, this.past);
  }

  changed(detail = null) {
    this.dispatchEvent(new CustomEvent("change", { detail }));
  }

  /** Replace the story by a text, and find out what the model thinks of it. */
  async setText(text) {
    const { tokens } = await post("/tokenize", { prompt: text, add_special_tokens: false });
    await this.stop();
    this.mark();
    this.tokens = tokens.map((id) => token(id));
    this.own = tokens.length;
    this.begin();
    this.changed();
  }

  /** Let a new run of coins begin at the end. */
  begin() {
    this.start = this.tokens.length;
    this.settings.remember(this.text());
  }

  /** How many of the tokens the model's context holds. */
  get nInContext() {
    return Math.min(this.tokens.length, this.facts.context - this.facts.begins.length);
  }

  /** Let the model think about what it has not seen, and write up to n tokens, unless it is writing. */
  async write(n) {
    if (this.isWriting) return;
    this.writing = this.request(n);
    await this.writing;
  }

  async request(n) {
    const abort = new AbortController();
    this.abort = abort;
    const asked = performance.now();
    this.times = { asked, first: null, last: asked, n: 0, nFirst: 0 };
    this.changed("begin");
    try {
      const sampling = this.settings.sampling();
      if (n && this.tokens.length > this.start) sampling.seed += 1; // a request draws with its seed's first coins
      const run = { ...sampling, start: this.tokens.length };
      const prompt = this.ids(n ? this.tokens.length : this.nInContext);
      const unseen = this.tokens.slice(0, this.nInContext).some(({ top }, i) => top === null && (i > 0 || this.facts.begins.length > 0));
      if (!n && !unseen) return;
      const body = {
        model: this.facts.name, prompt, max_tokens: n, logprobs: N_TOP, echo: unseen, ...sampling,
        return_token_ids: true, return_tokens_as_token_ids: true,
      };
      let at = unseen ? 0 : prompt.length;
      for await (const chunks of stream("/v1/completions", body, abort.signal)) {
        if (abort.signal.aborted) return;
        const { n: nTokens } = this.times;
        for (const { choices } of chunks) {
          for (const [id, details] of entries(choices[0]?.logprobs)) {
            const place = at - this.facts.begins.length;
            if (at < prompt.length) {
              if (place >= 0 && details) this.tokens[place] = { ...token(id, details), run: this.tokens[place].run };
            } else {
              if (!this.times.n) { // undo and the address know nothing of a request that is refused
                this.mark();
                this.settings.seed = String(run.seed);
                this.begin();
              }
              this.tokens.push(token(id, details, { ...run, step: place - run.start }));
              this.times.n += 1;
            }
            at += 1;
          }
        }
        if (this.times.n > nTokens) {
          this.times.last = performance.now();
          if (!nTokens) Object.assign(this.times, { first: this.times.last, nFirst: this.times.n });
        }
        this.changed(unseen && at <= prompt.length ? "seen" : "more");
      }
    } catch (error) {
      if (error.name !== "AbortError") throw error;
    } finally {
      this.abort = null;
      this.changed(abort.signal.aborted ? "stopped" : this.times.n ? "end" : "seen");
    }
  }

  /** Stop what is being written, and wait until it has stopped. */
  async stop() {
    this.abort?.abort();
    await this.writing?.catch(() => {}); // whoever began to write shows the error
  }

  /** Put another token in a place, drop what follows. */
  branch(place, id) {
    this.mark();
    const old = this.tokens[place];
    const rank = old?.top?.findIndex(([other]) => other === id) ?? -1;
    const details = rank < 0 ? null : { logprob: old.top[rank][1], rank, entropy: old.entropy, top: old.top };
    this.tokens = [...this.tokens.slice(0, place), token(id, details)];
    this.own = this.tokens.length;
    this.begin();
    this.changed();
  }

  /** Append a token that one coin of the run drew. */
  add(id, details) {
    this.mark();
    this.tokens = [...this.tokens, token(id, details, this.runAt(this.tokens.length))];
    this.changed();
  }

  /** Append tokens that were made elsewhere after the first `place` tokens. */
  graft(place, found, run) {
    if (this.isWriting) return;
    this.mark();
    const start = place;
    this.tokens = [...this.tokens.slice(0, place), ...found.map(([id, details], step) => token(id, details, { ...run, start, step }))];
    this.start = start;
    this.own = Math.min(this.own, place);
    this.settings.seed = String(run.seed);
    this.settings.remember(this.text(start));
    this.changed();
  }

  /** Drop everything from a place on. */
  cut(place) {
    this.mark();
    this.tokens = this.tokens.slice(0, Math.max(0, place));
    this.own = Math.min(this.own, this.tokens.length);
    if (this.start > this.tokens.length) this.begin();
    this.changed();
  }

  /** The settings and the number of the coin for the token at a place. */
  runAt(place) {
    const run = this.tokens[place]?.run;
    if (run) return run;
    return { ...this.settings.sampling(), start: this.start, step: Math.max(0, place - this.start) };
  }

  /** What the tokens cost whose probabilities are known: { n, bits, bytes }. */
  cost() {
    const bytesOf = this.vocabulary.byteReader();
    const sum = { n: 0, bits: 0, bytes: 0 };
    for (const { id, logprob } of this.tokens) {
      const { length } = bytesOf(id);
      if (logprob === null || this.vocabulary.stops.has(id)) continue;
      sum.n += 1;
      sum.bits -= logprob / Math.LN2;
      sum.bytes += length;
    }
    return sum;
  }
}
