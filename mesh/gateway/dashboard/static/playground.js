// A conversation through the public API, each token drawn when it comes.
import { $, h } from "./dom.js";
import { duration, number, plural } from "./format.js";
import { ask, events, Refused } from "./net.js";
import { fetchTrace } from "./requests.js";
import { waterfall } from "./waterfall.js";

const PATH = "/api/v1/inference";
const STARTERS = ["What is artificial intelligence?", "Write a haiku about rain.", "Explain a message queue to a child."];
let history = [];
let running = null;
let modelName = "";
let needToken = () => {};

export function start(onDenied) {
  needToken = onDenied;
  $("composer").addEventListener("submit", (event) => { event.preventDefault(); if (running) stop(); else send(); });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); if (!running) send(); }
  });
  $("prompt").addEventListener("input", grow);
  $("new-chat").addEventListener("click", () => { stop(); history = []; $("messages").replaceChildren(); begun(false); $("prompt").focus(); });
  $("copy-curl").addEventListener("click", copyCurl);
  for (const words of STARTERS) $("starters").append(h("button", { type: "button", onclick: () => { $("prompt").value = words; send(); } }, words));
  if (matchMedia("(max-width: 900px)").matches) $("settings").open = false;
}

export function draw(model) {
  modelName = model ? model.name : "";
}

export function stop() {
  if (running) running.abort();
}

function grow() {
  const area = $("prompt");
  area.style.height = "auto";
  area.style.height = `${Math.min(area.scrollHeight + 2, 220)}px`;
}

const value = (id) => $(id).value.trim();

function body(messages, stream) {
  const system = value("set-system");
  const request = {
    model: modelName,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...messages],
    max_tokens: Number(value("set-max")) || 200,
    temperature: Number(value("set-temperature")) || 0,
  };
  const topP = Number(value("set-top-p"));
  if (topP && topP < 1) request.top_p = topP;
  if (value("set-seed") !== "") request.seed = Number(value("set-seed"));
  if (stream) request.stream = true;
  return request;
}

function begun(yes) {
  $("starters").hidden = yes;
  $("prompt").placeholder = yes ? "Ask on" : STARTERS[0];
}

async function send() {
  const words = value("prompt") || (history.length ? "" : STARTERS[0]);
  if (!words) return;
  const wrong = $("settings").querySelector(":invalid");
  if (wrong) { $("settings").open = true; wrong.reportValidity(); return; } // the field says itself what is wrong
  $("prompt").value = "";
  grow();
  history.push({ role: "user", content: words });
  begun(true);
  $("messages").append(h("li", { class: "message from-user" }, h("p", {}, words)));
  const answer = new Answer();
  $("messages").append(answer.element);
  answer.element.scrollIntoView({ block: "end", behavior: "auto" });
  running = new AbortController();
  $("send").textContent = "Stop";
  $("send").classList.add("stopping");
  try {
    const response = await ask(PATH, { method: "POST", body: body(history, true), signal: running.signal });
    for await (const { data } of events(response)) {
      const document = JSON.parse(data);
      if (document.error) throw new Refused(500, document.error.message);
      answer.take(document);
    }
    answer.end("");
  } catch (error) {
    if (error.name === "AbortError") answer.end("stopped");
    else { answer.fail(error.message); if (error.status === 401) needToken(error); }
  } finally {
    running = null;
    $("send").textContent = "Send";
    $("send").classList.remove("stopping");
  }
  if (answer.text) history.push({ role: "assistant", content: answer.text });
  else history.pop();
  $("said").textContent = answer.text ? `The answer: ${answer.text}` : "";
  await answer.trace();
}

class Answer {
  constructor() {
    this.text = "";
    this.id = "";
    this.tokens = 0;
    this.count = null;
    this.began = performance.now();
    this.first = 0;
    this.last = 0;
    this.words = h("p", { class: "words" });
    this.note = h("p", { class: "note" }, "waiting for the first token");
    this.more = h("div", {});
    this.element = h("li", { class: "message from-model writing" }, this.words, this.note, this.more);
  }

  take(document) {
    if (document.done) {
      this.id = document.id;
      this.count = document.usage.completion_tokens;
      this.finish = document.finish_reason;
    } else {
      this.tokens += 1;
    }
    const piece = document.done ? document.rest : document.text;
    if (!piece) return;
    this.last = performance.now();
    if (!this.first) this.first = this.last;
    this.text += piece;
    this.words.append(piece);
    this.say("");
    const below = innerHeight - this.element.getBoundingClientRect().bottom;
    if (below > -260 && below < 0) this.element.scrollIntoView({ block: "end" });
  }

  say(ending) {
    const count = this.count ?? this.tokens;
    const spent = (this.last - this.first) / 1000;
    const parts = [plural(count, "token")];
    if (this.first) parts.push(`first after ${duration((this.first - this.began) / 1000)}`);
    if (this.tokens > 1 && spent > 0) parts.push(`${number((this.tokens - 1) / spent)} a second`);
    if (ending) parts.push(ending);
    this.note.textContent = parts.join(" · ");
  }

  end(how) {
    this.element.classList.remove("writing");
    this.say(how || (this.finish === "length" ? "reached the most tokens" : ""));
  }

  fail(message) {
    this.element.classList.remove("writing");
    this.element.classList.add("failed");
    this.note.textContent = message;
  }

  /** Where its time went; nothing where that is not known, which is no failure of the answer. */
  async trace() {
    if (!this.id || !this.text) return;
    try {
      const trace = await fetchTrace(this.id);
      this.more.replaceChildren(h("details", { class: "where" }, h("summary", {}, "Where the time went"), waterfall(trace)));
    } catch { /* another coordinator's, or no right to see it */ }
  }
}

async function copyCurl() {
  const words = value("prompt") || STARTERS[0];
  const json = JSON.stringify(body([...history, { role: "user", content: words }], false));
  const command = `curl -s ${location.origin}${PATH} -H 'Content-Type: application/json' -d '${json.replaceAll("'", "'\\''")}'`;
  try {
    await navigator.clipboard.writeText(command);
    $("copy-curl").textContent = "Copied";
  } catch {
    $("copy-curl").textContent = "Not allowed here";
  }
  setTimeout(() => { $("copy-curl").textContent = "Copy as curl"; }, 1600);
}
