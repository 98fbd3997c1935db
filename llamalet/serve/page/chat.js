// The chat, where the model has a template for one: send, stop, edit, regenerate.

import { stream } from "./api.js";
import { $, make, problem, say } from "./dom.js";

export class Chat {
  constructor(facts, settings) {
    this.facts = facts;
    this.settings = settings;
    this.messages = [];
    this.abort = null;
    $("chat-form").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.abort) this.stop();
      else this.send();
    });
    $("ask").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        if (!this.abort) this.send();
      }
    });
  }

  stop() {
    this.abort?.abort();
  }

  send() {
    const content = $("ask").value.trim();
    if (!content) return;
    $("ask").value = "";
    this.messages.push({ role: "user", content });
    this.answer();
  }

  /** Let the model answer the messages so far. */
  async answer() {
    const answer = { role: "assistant", content: "", note: "" };
    const system = $("system").value.trim();
    const sent = [...(system ? [{ role: "system", content: system }] : []), ...this.messages.map(({ role, content }) => ({ role, content }))];
    this.messages.push(answer);
    this.abort = new AbortController();
    this.render();
    const paragraph = $("messages").lastElementChild.querySelector(".content");
    $("messages").setAttribute("aria-busy", "true");
    $("send").textContent = "Stop";
    problem(null);
    say("The model answers.");
    const asked = performance.now();
    let first = null, usage = null, hasFailed = false;
    try {
      const body = { model: this.facts.name, messages: sent, ...this.settings.sampling(), stream_options: { include_usage: true } };
      for await (const chunks of stream("/v1/chat/completions", body, this.abort.signal)) {
        for (const chunk of chunks) {
          usage = chunk.usage ?? usage;
          const text = chunk.choices[0]?.delta?.content;
          if (text) {
            first ??= performance.now();
            answer.content += text;
          }
        }
        paragraph.textContent = answer.content;
      }
      say("The answer is complete.");
    } catch (error) {
      hasFailed = true;
      if (error.name === "AbortError") say("Stopped.");
      else {
        problem(error.message);
        say("");
        if (error.status === 401) dispatchEvent(new CustomEvent("needs-key"));
      }
    }
    this.abort = null;
    const seconds = (performance.now() - asked) / 1000; // nobody knows how many tokens the first text was
    if (first !== null) {
      answer.note = `first token after ${Math.round(first - asked)} ms`;
      if (usage?.completion_tokens > 1) answer.note = `${usage.completion_tokens} tokens \u00b7 ${Math.round(usage.completion_tokens / seconds).toLocaleString("en")} tokens/s \u00b7 ${answer.note}`;
    } else if (!answer.content) {
      this.messages.pop();
      if (hasFailed) $("ask").value = [this.messages.pop().content, $("ask").value].filter(Boolean).join("\n");
    }
    $("messages").setAttribute("aria-busy", "false");
    $("send").textContent = "Send";
    this.render();
  }

  /** Take a message back into the field, with all that followed dropped. */
  edit(i) {
    this.stop();
    $("ask").value = this.messages[i].content;
    this.messages.length = i;
    this.render();
    $("ask").focus();
  }

  regenerate(i) {
    this.settings.seed = String(Number(this.settings.seed) + 1);
    this.settings.changed();
    this.messages.length = i;
    this.answer();
  }

  render() {
    $("messages").replaceChildren(...this.messages.map(({ role, content, note }, i) => {
      const act = make("button", { type: "button", className: "quiet", textContent: role === "user" ? "Edit" : "Regenerate", disabled: this.abort !== null });
      act.addEventListener("click", () => (role === "user" ? this.edit(i) : this.regenerate(i)));
      return make(
        "li", { className: role }, make("h3", { textContent: role === "user" ? "You" : this.facts.name }),
        make("div", { className: "content", textContent: content }),
        make("p", { className: "help" }, note ? make("span", { textContent: note }) : "", act),
      );
    }));
    $("messages").lastElementChild?.scrollIntoView({ block: "nearest" });
  }
}
