// The page of `lminf serve`: what is on the screen, and what its controls do.
// Texts of users, models and the server become text nodes, never markup.

import { request } from "./api.js";
import { Conversation } from "./conversation.js";
import { Meter } from "./metrics.js";

const POLL_MS = 2000;
const FIELDS = "lminf-fields";
const at = (id) => document.getElementById(id);
const fields = Array.from(at("fields").elements);
const meter = new Meter();
let conversation = Conversation.restored() ?? new Conversation("chat", "");
let running = null; // the AbortController of the answer that is being written

const key = () => at("key").value.trim();

function say(note, error = "") {
  at("note").textContent = note;
  at("error").textContent = error;
}

// ---- settings, which stay in this tab ----------------------------------------------------------

function sampling() {
  const found = {};
  for (const { name, value, type } of fields) {
    if (name && value) {
      found[name] = type === "number" ? Number(value) : value.split("\n").filter(Boolean);
    }
  }
  return found;
}

function remember() {
  sessionStorage.setItem(FIELDS, JSON.stringify(fields.map(({ value }) => value)));
}

function recall() {
  const values = JSON.parse(sessionStorage.getItem(FIELDS) ?? "[]");
  fields.forEach((field, place) => { field.value = values[place] ?? ""; });
}

async function loadModels() {
  const before = at("model").value || conversation.model;
  try {
    const { data } = await (await request("v1/models", { key: key() })).json();
    const options = data.map(({ id, chat }) => {
      const option = new Option(id, id);
      option.dataset.chat = chat ?? true;
      return option;
    });
    at("model").replaceChildren(...options);
    if (data.some(({ id }) => id === before)) at("model").value = before;
    say("");
    chooseMode();
  } catch (error) {
    if (error.status === 401) at("settings").open = true;
    say("", error.message);
  }
}

// A model without a chat template goes on with raw text.
function chooseMode() {
  const canChat = at("model").selectedOptions[0]?.dataset.chat !== "false";
  at("mode").options[0].disabled = !canChat;
  if (canChat || at("mode").value === "text") return;
  at("mode").value = "text";
  begin();
}

// ---- conversation ------------------------------------------------------------------------------

function show(role, content) {
  const item = document.createElement("li");
  item.className = role;
  item.dir = "auto";
  item.append(content);
  at("log").append(item);
  at("log").scrollTop = at("log").scrollHeight;
  return item;
}

function redraw() {
  at("log").replaceChildren();
  for (const { role, content } of conversation.messages) show(role, content);
  at("mode").value = conversation.mode;
  at("position").textContent = conversation.position || "–";
}

function begin() {
  running?.abort();
  conversation.end(key());
  conversation = new Conversation(at("mode").value, at("model").value);
  conversation.store();
  redraw();
  say("");
  at("input").focus();
}

// Returns what appends to an item once a frame, however fast text comes, and does so at once.
function writer(item) {
  const log = at("log");
  let waiting = "", frame = 0;
  const flush = () => {
    cancelAnimationFrame(frame);
    frame = 0;
    const follows = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
    item.firstChild.appendData(waiting);
    waiting = "";
    if (follows) log.scrollTop = log.scrollHeight;
  };
  const write = (text) => {
    waiting += text;
    frame ||= requestAnimationFrame(flush);
  };
  return { write, flush };
}

function setRunning(controller, item) {
  running = controller;
  item.classList.toggle("busy", controller !== null);
  at("log").setAttribute("aria-busy", String(controller !== null));
  at("send").hidden = controller !== null;
  at("stop").hidden = controller === null;
}

async function send(text) {
  const told = conversation, controller = new AbortController();
  const before = told.messages.length, system = at("system").value;
  if (!before && told.mode === "chat" && system) show("system", system);
  show("user", text);
  const item = show("assistant", "");
  const { write, flush } = writer(item);
  setRunning(controller, item);
  say("");
  at("input").value = "";
  const settings = { system, model: at("model").value, sampling: sampling(), key: key() };
  let note = "", failure = "";
  try {
    const asked = told.ask(text, { ...settings, signal: controller.signal, write });
    if ((await asked) === "length") note = "The answer has reached its number of tokens.";
  } catch (error) {
    note = error.name === "AbortError" ? "Stopped." : "";
    failure = note ? "" : error.message;
  }
  flush();
  if (running === controller) setRunning(null, item);
  if (told !== conversation) return; // a new one was begun meanwhile
  if (told.messages.length === before) {
    redraw(); // nothing came back, so the text does
    at("input").value ||= text;
  }
  at("position").textContent = told.position || "–";
  told.store();
  say(note, failure);
}

// ---- metrics -----------------------------------------------------------------------------------

async function poll() {
  if (!document.hidden) {
    try {
      const text = await (await request("metrics", { key: key() })).text();
      const found = meter.read(text, at("model").value, performance.now());
      for (const [id, shown] of Object.entries(found)) at(id).textContent = shown;
    } catch {
      for (const id of ["rate", "first", "slots", "queue", "cache"]) at(id).textContent = "–";
    }
  }
  setTimeout(poll, POLL_MS);
}

// ---- controls ----------------------------------------------------------------------------------

at("compose").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running || !at("input").value) return;
  if (at("fields").reportValidity()) send(at("input").value);
  else at("settings").open = true;
});
at("input").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  at("compose").requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
at("stop").addEventListener("click", () => running?.abort());
at("new").addEventListener("click", begin);
at("mode").addEventListener("change", begin);
at("model").addEventListener("change", chooseMode);
at("fields").addEventListener("submit", (event) => event.preventDefault());
at("fields").addEventListener("change", remember);
at("key").addEventListener("change", loadModels);

recall();
redraw();
await loadModels();
poll();
