// The page: asks what the model is, then puts its parts together.

import { get, hasKey, post, setKey } from "./api.js";
import { Attention } from "./attention.js";
import { Chat } from "./chat.js";
import { Choices } from "./choices.js";
import { $, make, problem, say } from "./dom.js";
import { Pad } from "./pad.js";
import { newSeed, Settings } from "./settings.js";
import { entries, Story } from "./story.js";
import { Vocabulary } from "./vocabulary.js";

const BEGINNING = "Once upon a time";
const PATH_TOKENS = 24;
const PATHS_HELP = $("paths-help").textContent;
const SHORTEST_TIME = 0.05; // seconds: over less, a rate is noise
const THEMES = ["auto", "light", "dark"];

/** Run what a button starts; show what goes wrong. */
async function attempt(act) {
  problem(null);
  try {
    await act();
  } catch (error) {
    if (error.name === "AbortError") return say("Stopped.");
    if (error.status === 401) askForKey();
    else problem(error.message);
    say("");
  }
  return undefined;
}

/** Ask for a key; without a message, say so if there is one that the server has just refused. */
function askForKey(message = hasKey() ? "The server does not know this key." : "") {
  $("key-problem").textContent = message;
  $("key-problem").hidden = !message;
  $("key-dialog").returnValue = "";
  if (!$("key-dialog").open) $("key-dialog").showModal();
}

function listenToTheme() {
  let theme = localStorage.getItem("llamalet-theme") ?? "auto";
  const show = () => {
    document.documentElement.dataset.theme = theme;
    $("theme").lastElementChild.textContent = { auto: "Auto", light: "Light", dark: "Dark" }[theme];
    $("theme").setAttribute("aria-label", `Colours: ${{ auto: "as the system", light: "light", dark: "dark" }[theme]}`);
  };
  show();
  $("theme").addEventListener("click", () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    localStorage.setItem("llamalet-theme", theme);
    show();
  });
}

function showTab(name) {
  for (const tab of ["story", "chat"]) {
    const on = tab === name;
    $(`tab-${tab}`).setAttribute("aria-selected", String(on));
    $(`tab-${tab}`).tabIndex = on ? 0 : -1;
    $(`view-${tab}`).hidden = !on;
  }
}

function listenToTabs() {
  $("tabs").hidden = false;
  for (const name of ["story", "chat"]) $(`tab-${name}`).addEventListener("click", () => showTab(name));
  $("tabs").addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    showTab($("view-story").hidden ? "story" : "chat");
    $("tabs").querySelector("[aria-selected=true]").focus();
  });
}

/** 829 thousand, 15.2 million, 1.24 billion. */
function count(n) {
  const [value, unit] = n >= 1e9 ? [n / 1e9, " billion"] : n >= 1e6 ? [n / 1e6, " million"] : [n / 1e3, " thousand"];
  return `${value >= 100 ? Math.round(value) : value.toPrecision(3)}${unit}`;
}

function showFacts(facts) {
  document.title = `${facts.name} \u00b7 llamalet`;
  const parts = [facts.name, `${count(facts.n_parameters)} weights`, `${facts.n_layers} layers of ${facts.n_heads} heads`, `context ${facts.context.toLocaleString("en")}`, facts.dtype];
  $("facts").replaceChildren(...parts.map((text) => make("span", { textContent: text })));
}

function start(facts) {
  const vocabulary = new Vocabulary(facts), settings = new Settings();
  const story = new Story(facts, vocabulary, settings);
  showFacts(facts);

  const write = (n = settings.length) => attempt(async () => {
    if (!story.hasEnded) await story.write(n);
  });
  const see = () => attempt(() => story.write(0)); // what the model thinks of a text
  const choices = new Choices(story, vocabulary, settings, {
    take: (place, id, details) => {
      if (story.isWriting || isEditing()) return;
      if (place === story.tokens.length) story.add(id, details);
      else {
        story.branch(place, id);
        see();
      }
      pad.go(story.tokens.length, false);
    },
  });
  const pad = new Pad(story, vocabulary, {
    choose: async (place, id) => {
      await story.stop();
      story.branch(place, id);
      pad.go(place, false);
      pad.at(place).focus();
      pad.close();
      if (!vocabulary.stops.has(id)) write();
    },
    select: (place) => choices.show(place),
  });
  let shade = "surprise";
  const attention = new Attention(story, vocabulary, { shade: (weights) => (weights ? pad.shadeBy("attention", weights) : pad.shadeBy(shade)) });

  story.addEventListener("change", ({ detail }) => {
    pad.render();
    attention.clear();
    $("paths").replaceChildren();
    $("paths-help").textContent = PATHS_HELP;
    if (detail === "begin") {
      say("The model writes.");
      $("pad").setAttribute("aria-busy", "true");
    }
    if (!story.isWriting) {
      $("pad").setAttribute("aria-busy", "false");
      if (detail === "end") say(story.hasEnded ? "The story has ended." : `${story.times.n} tokens were written.`);
      else if (detail === "stopped") say("Stopped.");
      else if (detail === "seen") say(story.nInContext < story.tokens.length ? `The first ${story.nInContext} tokens fit into the context.` : "");
      pad.point(Math.min(pad.selected, pad.last));
      choices.show(pad.selected);
    }
    showButtons();
    if (detail !== "more") showNumbers();
  });
  settings.addEventListener("change", () => choices.show(pad.selected));

  function isEditing() {
    return !$("editor").hidden;
  }

  function showButtons() {
    const busy = story.isWriting || isEditing();
    $("write").textContent = story.isWriting ? "Stop" : "Write on";
    $("write").disabled = !story.isWriting && (story.hasEnded || isEditing());
    $("undo").disabled = busy || !story.past.length;
    $("redo").disabled = busy || !story.future.length;
    $("again").disabled = busy;
    $("step").disabled = busy || story.hasEnded;
    $("rewind").disabled = busy || !story.tokens.length;
    $("show-paths").disabled = $("look").disabled = busy;
  }

  function showNumbers() {
    const { n, bits, bytes } = story.cost(), { times } = story;
    const isLonger = story.nInContext < story.tokens.length;
    const facts_ = [["tokens", `${story.tokens.length}${isLonger ? `, of which the context holds the first ${story.nInContext}` : ""}`]];
    if (n) facts_.push(["bits per byte", (bits / Math.max(1, bytes)).toFixed(3)], ["bits per token", (bits / n).toFixed(2)]);
    if (times?.n && !story.isWriting) {
      const seconds = (times.last - times.first) / 1000; // the first chunk's tokens were made before
      if (seconds >= SHORTEST_TIME) facts_.push(["tokens/s", Math.round((times.n - times.nFirst) / seconds).toLocaleString("en")]);
      facts_.push(["first token after", `${Math.round(times.first - times.asked)} ms`]);
    }
    $("numbers").replaceChildren(...facts_.map(([name, value]) => make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: value }))));
  }

  // --- the story's buttons ---

  $("write").addEventListener("click", () => (story.isWriting ? story.stop() : write()));
  $("again").addEventListener("click", () => {
    if (story.tokens.length > story.own) story.cut(story.own);
    settings.seed = String(newSeed());
    story.begin();
    write();
  });
  $("undo").addEventListener("click", () => story.undo());
  $("redo").addEventListener("click", () => story.redo());
  $("edit").addEventListener("click", () => edit(!isEditing()));
  $("step").addEventListener("click", () => attempt(async () => {
    $("step").disabled = true;
    try {
      await choices.drawOne();
    } finally {
      showButtons();
    }
  }));
  $("rewind").addEventListener("click", () => {
    story.cut(story.tokens.length - 1);
    pad.go(story.tokens.length, false);
  });

  /** Change between the tokens and the plain text. */
  function edit(on) {
    const editor = $("editor");
    if (on) {
      story.stop();
      editor.value = story.text();
      editor.rows = Math.min(24, Math.max(6, 2 + Math.ceil(editor.value.length / 60)));
    }
    $("pad").hidden = on;
    editor.hidden = !on;
    $("edit").textContent = on ? "Done" : "Edit text";
    $("edit").setAttribute("aria-pressed", String(on));
    showButtons();
    if (on) return editor.focus();
    if (editor.value === story.text()) return undefined;
    return attempt(async () => {
      await story.setText(editor.value);
      pad.go(story.tokens.length, false);
      await story.write(0);
    });
  }

  for (const input of $("shades").querySelectorAll("input")) {
    input.addEventListener("change", () => {
      shade = input.value;
      pad.shadeBy(shade);
    });
  }

  // --- paths not taken, attention ---

  $("show-paths").addEventListener("click", () => attempt(async () => {
    const place = pad.selected, prompt = story.ids(place), n = Math.max(2, Math.min(8, Number($("n-paths").value) || 4));
    const { seed, ...rest } = settings.sampling();
    const first = seed + 1;
    say("The model looks for other paths.");
    const answer = await post("/v1/completions", {
      model: facts.name, prompt, n, max_tokens: PATH_TOKENS, logprobs: 10, seed: first, ...rest,
      return_token_ids: true, return_tokens_as_token_ids: true,
    });
    if (story.isWriting || !story.startsWith(prompt)) return;
    showPaths(place, answer.choices, first, rest);
    say(`${n} paths.`);
  }));

  function showPaths(place, found, first, rest) {
    const before = story.text(place).slice(-60);
    $("paths-help").textContent = "After \u201c\u2026" + before + "\u201d. The number is how likely the model thinks the path is.";
    $("paths").replaceChildren(...found.map((choice) => {
      const tokens = entries(choice.logprobs);
      const bits = tokens.reduce((sum, [, details]) => sum - details.logprob / Math.LN2, 0);
      const button = make("button", { type: "button", textContent: "Take it" });
      button.addEventListener("click", () => {
        story.graft(place, tokens, { ...rest, seed: first + choice.index });
        pad.go(story.tokens.length, false);
        $("pad").scrollIntoView({ block: "nearest" });
      });
      return make("li", {}, make("p", { className: "words", textContent: choice.text.trimStart() + (choice.finish_reason === "stop" ? " \u220e" : " \u2026") }),
        make("p", { className: "bar" }, make("span", { className: "help", textContent: `${(bits / Math.max(1, tokens.length)).toFixed(2)} bits per token, seed ${first + choice.index}` }), make("span", { className: "gap" }), button));
    }));
  }

  $("look").addEventListener("click", () => attempt(() => attention.look(pad.selected)));

  // --- keys ---

  addEventListener("keydown", (event) => {
    const isText = event.target.matches?.("textarea, input:not([type=range]):not([type=radio])");
    const control = (event.ctrlKey || event.metaKey) && !$("view-story").hidden;
    if (event.key === "Escape") {
      story.stop();
      chat?.stop();
      pad.close(true);
    } else if (control && event.key === "Enter") {
      if (isEditing()) edit(false);
      else write();
    } else if (control && !isText && !isEditing() && event.key.toLowerCase() === "z") {
      if (event.shiftKey) story.redo();
      else story.undo();
      event.preventDefault();
    }
  });

  let chat = null;
  if (facts.is_chat) {
    chat = new Chat(facts, settings);
    listenToTabs();
    showTab("chat");
  }

  // --- the beginning ---

  showButtons();
  attempt(async () => {
    await story.setText(settings.text ?? BEGINNING);
    story.past = [];
    pad.go(story.tokens.length, false);
    await story.write(facts.is_chat ? 0 : settings.length);
  });
}

async function begin() {
  try {
    const facts = await get("/page/model");
    problem(null);
    start(facts);
  } catch (error) {
    if (error.status === 401) askForKey();
    else problem(error.message);
  }
}

listenToTheme();
$("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const key = $("key").value.trim();
  $("key").value = "";
  if (!/^[!-~]+$/.test(key)) return askForKey("A key has letters, digits and signs of ASCII, and no spaces.");
  setKey(key);
  $("key-dialog").close("given");
  if (!$("facts").childElementCount) await begin();
  return undefined;
});
$("key-dialog").addEventListener("close", () => {
  if ($("key-dialog").returnValue === "" && !$("facts").childElementCount) problem("This server asks for a key. Reload the page to enter it.");
});
addEventListener("needs-key", () => askForKey());
addEventListener("hashchange", () => location.reload()); // another link was put into the address
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address holds the story
  $("main").focus();
});
begin();
