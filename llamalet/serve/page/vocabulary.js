// From ids to text, as the model's tokenizer does it.

const bytesOf = new TextEncoder();

export class Vocabulary {
  constructor(facts) {
    this.pieces = facts.vocabulary;
    this.names = facts.names;
    this.addsSpace = facts.adds_space;
    this.stops = new Set(facts.stops);
  }

  /** Return a function that turns one token after the other into its bytes in the text. */
  byteReader() {
    let atStart = this.addsSpace;
    return (id) => {
      const piece = this.pieces[id];
      if (piece === null || piece === undefined) return new Uint8Array();
      const bytes = typeof piece === "string" ? bytesOf.encode(piece) : Uint8Array.from(piece);
      const isDropped = atStart && bytes[0] === 0x20;
      atStart = false;
      return isDropped ? bytes.subarray(1) : bytes;
    };
  }

  /** Return a function that turns one token after the other into the text that it completes. */
  reader() {
    const utf8 = new TextDecoder("utf-8"), read = this.byteReader();
    return (id) => utf8.decode(read(id), { stream: true });
  }

  text(ids) {
    return ids.map(this.reader()).join("");
  }

  /** A token on its own, with what cannot be seen made visible. */
  label(id) {
    const piece = this.pieces[id];
    if (typeof piece === "string") {
      return piece.replace(/ /g, "\u00b7").replace(/\n/g, "\u21b5").replace(/\t/g, "\u21e5")
        .replace(/[\u0000-\u001f\u007f-\u009f]/g, (c) => `\\x${c.charCodeAt(0).toString(16).padStart(2, "0")}`);
    }
    if (piece) return piece.map((byte) => `<${byte.toString(16).toUpperCase().padStart(2, "0")}>`).join("");
    if (this.stops.has(id)) return "end of text";
    return this.names[id] ?? `token ${id}`;
  }

  /** A token in a sentence that is read aloud. */
  spoken(id) {
    const piece = this.pieces[id];
    if (piece === "\n") return "line break";
    if (piece === " ") return "space";
    return typeof piece === "string" ? piece.trim() : this.label(id);
  }
}
