// The mesh's page: state, figures, picture, shards, events.
import { Spark } from "./charts.js";
import { $, attributes, h, list, part, text } from "./dom.js";
import { NONE, bytes, clock, duration, durationParts, number, percent, plural, range } from "./format.js";
import { Picture } from "./picture.js";

const STATES = { ready: "Serving", degraded: "Serving, with a loss", starting: "Getting ready", down: "Not serving" };
const LINKS = { connecting: "Looking for the mesh", lost: "The gateway does not answer", denied: "A token is needed" };
const TELLS = {
  joined: "joined", ready: "is ready", left: "left", lost: "is lost", suspected: "is suspected", failed_over: "failed over", drained: "drained",
  plan_changed: "placement changed", rejected: "was refused", forgotten: "was forgotten", coordinator_joined: "joined",
  coordinator_left: "left", resumed: "took over",
};
const GRAVE = new Set(["suspected", "failed_over", "rejected", "lost"]);
const SHOWN_EVENTS = 40;

let picture = null;
const figures = [];

export function start() {
  picture = new Picture($("picture"));
  figures.push(
    figure("Tokens a second", "tokens", (point) => point[1], 10),
    figure("First token", "first", (point) => point[2], 0.2),
    figure("A step", "step", (point) => point[3], 0.02),
    figure("Sessions", "sessions", (point) => point[4] + point[5], 4),
  );
  $("figures").append(...figures.map((one) => one.element));
}

function figure(label, name, value, floor) {
  const spark = new Spark(`${label}, the last two minutes`);
  const main = h("span", { class: "figure-main" }, NONE), unit = h("span", { class: "figure-unit" });
  const note = h("p", { class: "figure-note" });
  const element = h("div", { class: `figure figure-${name}` }, h("p", { class: "figure-label" }, label), h("p", { class: "figure-value" }, main, unit), note, spark.element);
  return { element, spark, main, unit, note, value, floor, name };
}

export function draw(state, model) {
  part("state of the mesh", () => drawState(state, model));
  const known = model || { shards: [], coordinators: [], sessions: [], missing: [], layers: 0 };
  const old = state.link !== "live" || Boolean(state.snapshot && state.snapshot.error);
  $("view-mesh").classList.toggle("old", old && Boolean(model));
  part("figures", () => drawFigures(known, (model && state.series[model.name]) || []));
  $("picture").parentElement.hidden = !model || (!known.shards.length && !known.coordinators.length);
  part("picture", () => { if (model) picture.draw(model); picture.flow.halt(old); });
  part("table of shards", () => drawShards(known.shards));
  part("list of events", () => drawEvents(state.events, model));
}

/** [kind, words, more] of how it stands. */
export function standing(state, model) {
  if (state.link === "denied") return ["down", LINKS.denied, state.problem];
  if (state.link === "lost") return ["down", LINKS.lost, "Trying again. What is shown was seen before."];
  if (!state.snapshot) return ["starting", LINKS.connecting, ""];
  if (state.snapshot.error) return ["down", "The mesh does not answer", state.snapshot.error];
  if (!model) return ["down", "Nothing is here yet", "No coordinator and no shard has announced itself. `mesh up MODEL_DIR` starts a mesh on one machine."];
  return [model.state, STATES[model.state] || model.state, model.reason];
}

function drawState(state, model) {
  const [kind, words, more] = standing(state, model);
  attributes($("state"), { class: `state is-${kind}` });
  text($("state").querySelector(".state-text"), [words, more].filter(Boolean).join(". "));
  text($("mesh-title"), model ? model.name : "The mesh");
  const facts = model ? [plural(model.layers, "layer"), model.context ? `${model.context.toLocaleString("en")} positions` : null].filter(Boolean) : [];
  text($("facts"), facts.join(" · "));
}

function drawFigures(model, series) {
  const point = model.point;
  for (const one of figures) {
    let parts = [NONE, ""], note = "";
    if (one.name === "tokens") {
      parts = [point ? number(point[1]) : NONE, ""];
      note = plural(model.coordinators.reduce((sum, c) => sum + c.tokens, 0), "token") + " since the start";
    } else if (one.name === "first") {
      parts = durationParts(model.latency ? model.latency.first_token_s : null);
      note = model.latency ? `median of ${model.latency.requests}, longest ${duration(model.latency.worst_s)}` : "no request of late";
      if (model.reused) note += `; ${percent(model.reused)} of prompts reused`;
    } else if (one.name === "step") {
      parts = durationParts(point ? point[3] : null);
      note = model.step ? shares(model.step) : "nothing is being generated";
    } else {
      parts = [point ? String((model.live || 0) - (model.queued || 0)) : NONE, model.capacity ? `of ${model.capacity}` : ""];
      note = model.queued ? `${plural(model.queued, "request")} waiting` : "nobody waits";
    }
    text(one.main, parts[0]);
    text(one.unit, parts[1]);
    text(one.note, note);
    one.spark.draw(series.map((p) => [p[0], one.value(p)]), { floor: one.floor });
  }
}

function shares(step) {
  const all = step.step_s || 1;
  return `computing ${percent(step.compute_s / all)}, waiting ${percent((step.queue_s + step.codec_s) / all)}, hops ${percent(step.hops_s / all)}`;
}

const COLUMNS = ["Shard", "Layers", "State", "Rows", "Load", "Step", "Memory", "Sends", "Host"];
const NUMBERS = new Set(["Rows", "Load", "Step", "Memory", "Sends"]);

function drawShards(shards) {
  $("shards-empty").hidden = shards.length > 0;
  $("shards").closest("table").hidden = shards.length === 0;
  const rows = [...shards].sort((a, b) => a.start - b.start || a.stop - b.stop || a.name.localeCompare(b.name, "en", { numeric: true }));
  list($("shards"), rows, (one) => one.name, () => h("tr", {}, ...COLUMNS.map((name) => h(name === "Shard" ? "th" : "td", { "data-label": name, class: NUMBERS.has(name) ? "n" : null, scope: name === "Shard" ? "row" : null }))), (row, one) => {
    attributes(row, { class: `is-${one.state}` });
    const gone = one.state === "lost" || one.state === "left";
    const values = [
      one.name, range(one.start, one.stop), gone ? `${one.state} ${Math.round(one.gone_s)} s ago` : one.state,
      gone ? NONE : `${one.used} of ${one.rows}`, gone ? NONE : percent(one.load), one.step_s ? duration(one.step_s) : NONE,
      gone ? NONE : bytes(one.memory_bytes), gone ? NONE : `${bytes(one.out_bytes_per_s)}/s`, one.host || NONE,
    ];
    values.forEach((value, index) => text(row.children[index], value));
  });
}

function when(unix, today) {
  const at = new Date(unix * 1000);
  return at.toDateString() === today ? clock(unix) : at.toLocaleDateString("en-GB", { day: "numeric", month: "short" });
}

function drawEvents(events, model) {
  const shown = events.filter((event) => !model || !event.model || event.model === model.name).slice(-SHOWN_EVENTS).reverse();
  $("events-empty").hidden = shown.length > 0;
  const today = new Date().toDateString();
  list($("events"), shown, (event) => event.number, (event) => h("li", { class: GRAVE.has(event.kind) ? "grave" : `is-${event.kind}` },
    h("time", { datetime: new Date(event.at_unix_s * 1000).toISOString() }, when(event.at_unix_s, today)),
    h("p", {}, h("strong", {}, event.who), ` ${TELLS[event.kind] || event.kind.replaceAll("_", " ")}`, event.data.layers && !event.detail ? h("span", { class: "muted" }, ` layers ${String(event.data.layers).replace("-", "–")}`) : null, event.detail ? h("span", { class: "event-detail" }, event.detail) : null),
  ), () => {});
  if (shown.length) setTimeout(() => attributes($("events"), { "aria-live": "polite" }), 1000); // what was there before is not news
}
