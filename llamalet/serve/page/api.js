// The server's endpoints: JSON out, JSON or a stream of events in. The key lives in sessionStorage alone.

const KEY = "llamalet-key";

/** What the server refused, in its own words. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const setKey = (key) => sessionStorage.setItem(KEY, key);
export const hasKey = () => sessionStorage.getItem(KEY) !== null;

/** Ask for something; a body makes it a POST. */
async function ask(path, body, signal) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.authorization = `Bearer ${key}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: body === undefined ? "GET" : "POST", headers, signal, cache: "no-store",
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The server does not answer. Is it still running?");
  }
  if (!response.ok) {
    const found = await response.json().catch(() => null);
    throw new Refused(response.status, found?.error?.message ?? `The server answered ${response.status}.`);
  }
  return response;
}

export const get = async (path) => (await ask(path)).json();
export const post = async (path, body, signal) => (await ask(path, body, signal)).json();

/** Yield lists of the objects of an event stream: those that arrived together, so that they are shown together. */
export async function* stream(path, body, signal) {
  const response = await ask(path, { ...body, stream: true }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  const read = () => reader.read().catch((error) => {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The server stopped in the middle of the text.");
  });
  let rest = "";
  while (true) {
    const { done, value } = await read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    const found = [];
    for (const event of events) {
      const data = event.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5)).join("\n").trim();
      if (!data || data === "[DONE]") continue;
      const object = JSON.parse(data);
      if (object.error) throw new Refused(500, object.error.message);
      found.push(object);
    }
    if (found.length) yield found;
  }
}
