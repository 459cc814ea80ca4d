// Requests: those that run, the last that ended, and the trace of the one that is chosen.
import { $, attributes, h, list, text } from "./dom.js";
import { NONE, duration, number, shortId } from "./format.js";
import { ask, Refused } from "./net.js";
import { waterfall } from "./waterfall.js";

const STATES = { stop: "done", length: "done", error: "failed", cancelled: "cancelled", queued: "waiting", opening: "waiting", prefilling: "reading", decoding: "writing" };
const LIVE = new Set(["queued", "opening", "prefilling", "decoding"]);
const AGAIN_MS = 1000;

let chosen = null;
let shown = [];
let timer = 0;
let drawn = "";

export async function fetchTrace(id, signal) {
  const response = await ask(`/dashboard/trace/${encodeURIComponent(id)}`, { signal });
  return response.json();
}

export function draw(model) {
  shown = model ? [...model.sessions, ...model.recent] : [];
  $("requests-empty").hidden = shown.length > 0;
  $("requests").closest("table").hidden = shown.length === 0;
  list($("requests"), shown, (one) => one.request, makeRow, (row, one) => {
    const live = LIVE.has(one.state);
    attributes(row, { class: `is-${STATES[one.state]}${live ? " live" : ""}`, "aria-selected": one.request === chosen ? "true" : null });
    const spent = one.total_s - (one.first_token_s ?? one.total_s);
    const values = [null, STATES[one.state] || one.state, one.prompt_tokens, live && one.max_tokens ? `${one.tokens} of ${one.max_tokens}` : one.tokens, duration(one.first_token_s), one.tokens > 1 && spent > 0 ? `${number((one.tokens - 1) / spent)} /s` : NONE, one.restarts || ""];
    values.forEach((value, index) => { if (value !== null) text(row.children[index], value); });
  });
}

function makeRow(one) {
  const link = h("a", { href: `#requests/${one.request}`, title: one.request }, shortId(one.request));
  const names = ["State", "Prompt", "Tokens", "First token", "Rate", "Moves"];
  const row = h("tr", {}, h("th", { scope: "row" }, link), ...names.map((name, index) => h("td", { "data-label": name, class: index ? "n" : null })));
  row.addEventListener("click", (event) => { if (!event.target.closest("a")) location.hash = `#requests/${one.request}`; });
  return row;
}

/** Show the trace of `id`, and again while it runs. */
export async function choose(id) {
  clearTimeout(timer);
  if (id !== chosen) drawn = "";
  chosen = id;
  for (const row of $("requests").children) row.removeAttribute("aria-selected");
  $("trace").parentElement.classList.toggle("has-choice", Boolean(id));
  if (!id) { $("trace").replaceChildren(h("p", { class: "empty" }, "Choose a request.")); return; }
  try {
    const trace = await fetchTrace(id);
    if (chosen !== id) return;
    const print = JSON.stringify([trace.state, trace.tokens, trace.legs.length, (trace.spans || []).length]);
    if (print !== drawn) {
      drawn = print;
      $("trace").replaceChildren(h("h2", {}, "Where the time went ", h("span", { class: "id" }, id)), waterfall(trace), trace.error ? h("p", { class: "problem" }, trace.error) : h("span", {}));
    }
    if (LIVE.has(trace.state)) timer = setTimeout(() => choose(id), AGAIN_MS);
  } catch (error) {
    if (chosen !== id) return;
    const again = error instanceof Refused && error.status === 0;
    $("trace").replaceChildren(h("p", { class: "empty" }, error.message));
    if (again) timer = setTimeout(() => choose(id), 2 * AGAIN_MS);
  }
}

export function leave() {
  clearTimeout(timer);
}

/** The request before or after the chosen one. */
export function move(by) {
  if (!shown.length) return;
  const at = shown.findIndex((one) => one.request === chosen);
  const next = shown[Math.min(Math.max(at + by, 0), shown.length - 1)];
  location.hash = `#requests/${next.request}`;
}
