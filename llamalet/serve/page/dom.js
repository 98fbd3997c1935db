// Small helpers for the page's elements. Text from the model only ever becomes the text of a node.

/** Return the element with an id. */
export const $ = (id) => document.getElementById(id);

const SVG = "http://www.w3.org/2000/svg";

/** Make an element: properties by name, attributes where the name has a dash or is a role; then its children. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role" || name === "scope") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

/** Make an SVG element with attributes. */
export function draw(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** A probability in words: 34 %, 0.12 %, below 0.01 %. */
export function percent(share) {
  if (share >= 0.995) return share > 0.99995 ? "100 %" : `${(100 * share).toFixed(2)} %`;
  if (share >= 0.1) return `${(100 * share).toFixed(0)} %`;
  if (share >= 0.01) return `${(100 * share).toFixed(1)} %`;
  if (share >= 0.0001) return `${(100 * share).toFixed(2)} %`;
  return share > 0 ? "< 0.01 %" : "0 %";
}

/** A bar whose length is a share. */
export function bar(share, kind) {
  const inner = make("span", { className: `fill ${kind}` });
  inner.style.setProperty("--share", Math.max(0, Math.min(1, share)));
  inner.hidden = !share;
  return make("span", { className: "track", "aria-hidden": "true" }, inner);
}

/** The one polite status line: it speaks at a start and an end, never for a token. */
export function say(text) {
  $("status").textContent = text;
}

/** Show what went wrong, or nothing. */
export function problem(text) {
  $("problem").textContent = text ?? "";
  $("problem").hidden = !text;
}
