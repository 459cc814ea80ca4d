// The page: which view, which model, which theme, the token, the keyboard.
import { $, attributes, faults, h, list, part, text } from "./dom.js";
import * as feed from "./feed.js";
import * as meshView from "./mesh-view.js";
import { hasToken, setToken } from "./net.js";
import * as playground from "./playground.js";
import * as requests from "./requests.js";

const VIEWS = ["mesh", "playground", "requests"];
const TITLES = { mesh: "Mesh", playground: "Playground", requests: "Requests" };
const THEMES = ["auto", "light", "dark"];
let view = "mesh";
let chosenModel = null;
let asked = false;

function model() {
  const models = feed.state.snapshot ? feed.state.snapshot.models : [];
  return models.find((one) => one.name === chosenModel) || models[0] || null;
}

function draw() {
  const now = model();
  part("choice of models", drawModels);
  if (view === "mesh") part("mesh", () => meshView.draw(feed.state, now));
  if (view === "requests") part("list of requests", () => requests.draw(now));
  part("playground", () => playground.draw(now));
  part("notice", () => drawNotice(now));
  const kind = meshView.standing(feed.state, now)[0];
  document.documentElement.dataset.standing = kind;
  document.title = `${kind === "down" ? "○ " : ""}${TITLES[view]} · stagemesh`;
}

function drawModels() {
  const models = feed.state.snapshot ? feed.state.snapshot.models : [];
  $("model-choice").hidden = models.length < 2;
  if (models.length > 1) list($("model"), models, (one) => one.name, (one) => h("option", { value: one.name }, one.name), () => {});
}

/** On the other views the state of the mesh is a line at the top, where it is not well; on every view, a part that could not be drawn. */
function drawNotice(now) {
  const [kind, words, more] = meshView.standing(feed.state, now);
  const unwell = view !== "mesh" && kind !== "ready" && feed.state.link !== "connecting";
  const [broken] = faults.keys();
  $("notice").hidden = !unwell && !broken;
  if (unwell) { attributes($("notice"), { class: `notice is-${kind}` }); text($("notice"), [words, more].filter(Boolean).join(". ")); }
  else if (broken) { attributes($("notice"), { class: "notice is-degraded" }); text($("notice"), `A part of this page could not be drawn: the ${broken} (${faults.get(broken)}). The rest goes on.`); }
}

function route() {
  const [name, detail] = location.hash.slice(1).split("/");
  if (name === "main") return;
  const before = view;
  view = VIEWS.includes(name) ? name : "mesh";
  for (const each of VIEWS) {
    $(`view-${each}`).hidden = each !== view;
    const link = document.querySelector(`nav [data-view="${each}"]`);
    attributes(link, { "aria-current": each === view ? "page" : null });
  }
  if (view === "requests") requests.choose(detail ? decodeURIComponent(detail) : null);
  else requests.leave();
  if (before !== view) scrollTo(0, 0);
  if (detail && matchMedia("(max-width: 1000px)").matches) $("trace").scrollIntoView();
  draw();
}

// -- theme, token, dialogs ---------------------------------------------------------------------------------------------

function nextTheme() {
  const root = document.documentElement;
  const next = THEMES[(THEMES.indexOf(root.dataset.theme) + 1) % THEMES.length];
  root.dataset.theme = next;
  try { localStorage.setItem("mesh-theme", next); } catch { /* for this page only */ }
  nameTheme();
}
function nameTheme() {
  const words = { auto: "Theme: as the system", light: "Theme: light", dark: "Theme: dark" }[document.documentElement.dataset.theme];
  attributes($("theme-button"), { "aria-label": words, title: `${words} (T)` });
}

function askToken(why) {
  $("token-button").hidden = false;
  if (why) text($("token-why"), why);
  if (!$("token-dialog").open) { $("token").value = ""; $("token-dialog").showModal(); }
}

function useToken(event) {
  event.preventDefault();
  setToken($("token").value);
  $("token-dialog").close();
  asked = false;
  feed.reconnect();
}

// -- keyboard ----------------------------------------------------------------------------------------------------------

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  const writing = event.target.closest("input, textarea, select");
  if (event.key === "Escape") { playground.stop(); if (writing) writing.blur(); return; }
  if (writing) return;
  const key = event.key.toLowerCase();
  if (VIEWS[Number(key) - 1]) location.hash = `#${VIEWS[Number(key) - 1]}`;
  else if (key === "/") { location.hash = "#playground"; setTimeout(() => $("prompt").focus()); }
  else if (key === "t") nextTheme();
  else if (key === "?") $("help-dialog").showModal();
  else if (view === "requests" && (key === "j" || key === "k")) requests.move(key === "j" ? 1 : -1);
  else return;
  event.preventDefault();
}

function start() {
  meshView.start();
  playground.start((error) => askToken(error.message));
  nameTheme();
  $("theme-button").addEventListener("click", nextTheme);
  $("help-button").addEventListener("click", () => $("help-dialog").showModal());
  $("token-button").addEventListener("click", () => askToken());
  $("token-button").hidden = !hasToken();
  $("token-form").addEventListener("submit", useToken);
  $("token-forget").addEventListener("click", () => { $("token").value = ""; setToken(""); $("token-dialog").close(); feed.reconnect(); });
  for (const button of document.querySelectorAll("[data-close]")) button.addEventListener("click", () => button.closest("dialog").close());
  $("model").addEventListener("change", () => { chosenModel = $("model").value; draw(); });
  $("skip").addEventListener("click", (event) => { event.preventDefault(); $("main").focus(); });
  addEventListener("hashchange", route);
  addEventListener("keydown", onKey);
  feed.on((what) => {
    if (what === "link" && feed.state.link === "denied") {
      $("token-button").hidden = false;
      if (!asked) { asked = true; askToken(feed.state.problem); }
    }
    draw();
  });
  route();
  feed.start();
}

start();
