// One conversation: what was said, how much of it the server's session holds, how it goes on.

import { events, request } from "./api.js";

const STORED = "lminf-conversation";
// A session whose answer was stopped is in use a little longer.
const BUSY_TRIES = 20;
const BUSY_MS = 100;

function newId() {
  // crypto.randomUUID is there only where the page came over TLS or from this machine.
  const parts = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(parts, (part) => part.toString(16).padStart(2, "0")).join("");
}

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

export class Conversation {
  constructor(mode, model) {
    Object.assign(this, { id: newId(), mode, model, messages: [], position: 0 });
    // Whether the session stands behind the last answer, so that only what is new need be sent.
    this.settled = true;
  }

  // Returns the conversation that this tab had before the page was loaded again, or null.
  static restored() {
    try {
      const found = JSON.parse(sessionStorage.getItem(STORED));
      // Another tab may be a copy of this one, and its session have gone on.
      return found && Object.assign(new Conversation(), found, { settled: false });
    } catch {
      return null;
    }
  }

  // Keeps it for a reload of this tab.
  store() {
    try {
      sessionStorage.setItem(STORED, JSON.stringify(this));
    } catch {
      sessionStorage.removeItem(STORED); // too long for the tab's storage
    }
  }

  // Asks the model to go on behind a new text; `write` gets the answer's pieces as they come.
  //
  // Returns why the answer ended. Throws the error that ended it; what had come stays.
  async ask(text, { system, model, sampling, key, signal, write }) {
    const before = this.messages.length;
    if (!before && this.mode === "chat" && system) {
      this.messages.push({ role: "system", content: system });
    }
    this.messages.push({ role: "user", content: text });
    if (model !== this.model) [this.model, this.settled] = [model, false];
    const answer = { role: "assistant", content: "" };
    let usage = null, reason = null;
    try {
      const fields = { ...sampling, model };
      const response = await this.#request(fields, { key, session: this.id, signal });
      this.settled = false;
      for await (const chunk of events(response)) {
        const choice = chunk.choices[0];
        const piece = choice?.delta?.content ?? choice?.text ?? "";
        usage = chunk.usage ?? usage;
        reason = choice?.finish_reason ?? reason;
        answer.content += piece;
        if (piece) write(piece);
      }
      this.messages.push(answer);
    } catch (error) {
      // With no answer it is as if nothing had been sent.
      if (answer.content) this.messages.push(answer);
      else this.messages.length = before;
      if (!this.messages.length) this.id = newId();
      throw error;
    }
    this.settled = true;
    this.position = usage?.total_tokens ?? this.position;
    return reason;
  }

  // Lets the server forget the session.
  end(key) {
    const path = `v1/sessions/${this.id}`;
    if (this.messages.length) request(path, { key, method: "DELETE" }).catch(() => {});
  }

  // Sends what is new; where the session is kept no longer, or may stand elsewhere, everything,
  // of which it reads what it has not read.
  async #request(fields, options) {
    const ending = { stream: true, stream_options: { include_usage: true } };
    for (let left = BUSY_TRIES; ; left--) {
      const last = this.messages.findLastIndex(({ role }) => role === "assistant");
      const goesOn = this.settled && last >= 0;
      const [path, prompt] = this.#prompt(goesOn ? this.messages.slice(last + 1) : this.messages);
      const body = { ...fields, ...prompt, ...ending };
      try {
        return await request(path, { ...options, body, mustExist: goesOn });
      } catch (error) {
        if (error.code === "session_not_found" && goesOn) this.settled = false;
        else if (error.code === "session_busy" && left > 0) await pause(BUSY_MS);
        else throw error;
      }
    }
  }

  #prompt(messages) {
    const sent = messages.map(({ role, content }) => ({ role, content: content.toWellFormed() }));
    if (this.mode === "chat") return ["v1/chat/completions", { messages: sent }];
    return ["v1/completions", { prompt: sent.map(({ content }) => content).join("") }];
  }
}
