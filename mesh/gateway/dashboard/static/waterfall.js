// Where the time of a request went: its life in phases, one step through the stages as a staircase, and the last steps side by side.
import { h, s } from "./dom.js";
import { duration, number, plural } from "./format.js";

const STEPS_HEIGHT = 96;
const SMALL = 0.2; // of the life: too narrow for its own words
const KINDS = [
  ["compute", "computing"],
  ["queue", "waiting for other work"],
  ["codec", "reading and writing frames"],
  ["hop", "on the way"],
];

export function waterfall(trace) {
  if (!trace.legs.length) return h("p", { class: "empty" }, "No step has come back yet.");
  const root = h("div", { class: "waterfall" });
  const stairs = h("div", { class: "stairs-holder" });
  const choices = stairChoices(trace);
  const buttons = choices.map((choice) => h("button", { type: "button", class: "choice", onclick: () => show(choice) }, choice.label));
  const bars = stepBars(trace, (choice) => show(choice));
  function show(choice) {
    buttons.forEach((button, index) => button.setAttribute("aria-pressed", choices[index] === choice));
    bars.mark(choice.index);
    stairs.replaceChildren(staircase(choice));
  }
  root.append(life(trace), h("div", { class: "choices", role: "group", "aria-label": "Which step" }, ...buttons), stairs, legend(), bars.element);
  show(choices.find((choice) => choice.phase === "decode") || choices[0]);
  return root;
}

// -- the life of the request -------------------------------------------------------------------------------------------

function life(trace) {
  const total = trace.total_s || 1e-9;
  const first = trace.first_token_s;
  const parts = [["waiting", "wait", 0, Math.min(trace.queue_s, total)]];
  parts.push(["prompt", "prefill", trace.queue_s, first ?? total]);
  if (first !== null && total > first) parts.push(["tokens", "decode", first, total]);
  const shown = parts.filter(([, , from, to]) => to > from);
  const bar = h("div", { class: "life", role: "img", "aria-label": shown.map(([name, , from, to]) => `${name} ${duration(to - from)}`).join(", ") });
  for (const [name, kind, from, to] of shown) {
    const part = h("div", { class: `life-part is-${kind}` }, h("span", {}, `${name} ${duration(to - from)}`));
    part.style.left = `${(from / total) * 100}%`;
    part.style.width = `${((to - from) / total) * 100}%`;
    if ((to - from) / total < SMALL) part.classList.add("small");
    bar.append(part);
  }
  const marks = trace.legs.slice(1).map((leg) => {
    const mark = h("div", { class: "life-mark" }, h("span", {}, "moved"));
    mark.style.left = `${Math.min((leg.at_s / total) * 100, 99.5)}%`;
    return mark;
  });
  bar.append(...marks);
  const facts = [
    `${plural(trace.prompt_tokens, "prompt token")}`,
    first === null ? null : `first token after ${duration(first)}`,
    `${plural(trace.tokens, "token")}${rate(trace)}`,
    `${duration(total)} in all`,
    trace.restarts ? `moved ${trace.restarts === 1 ? "once" : `${trace.restarts} times`}` : null,
  ];
  const small = shown.filter(([, , from, to]) => (to - from) / total < SMALL).map(([name, , from, to]) => `${name} ${duration(to - from)}`);
  return h("div", {}, h("p", { class: "life-facts" }, facts.filter(Boolean).join(" · ")), bar, small.length ? h("p", { class: "life-small" }, small.join(" · ")) : null);
}

function rate(trace) {
  const spent = trace.total_s - (trace.first_token_s ?? trace.total_s);
  return trace.tokens > 1 && spent > 0 ? `, ${number((trace.tokens - 1) / spent)} a second` : "";
}

// -- one step ----------------------------------------------------------------------------------------------------------

/** Mean steps of each kind over the last route they took. */
function stairChoices(trace) {
  const choices = [];
  for (const [phase, label] of [["prefill", "A prompt chunk"], ["decode", "A token"]]) {
    const leg = [...trace.legs].reverse().find((one) => one[phase].steps);
    if (!leg) continue;
    const sum = leg[phase], n = sum.steps;
    choices.push({
      phase,
      index: -1,
      label: `${label}, mean of ${n.toLocaleString("en")}`,
      wall: sum.wall_s / n,
      hops: sum.hops_s / n,
      stages: leg.stages.map((stage, at) => ({ ...stage, queue: sum.stages[at].queue_s / n, compute: sum.stages[at].compute_s / n, codec: sum.stages[at].codec_s / n })),
    });
  }
  return choices;
}

function ofStep(trace, step, index) {
  const stages = trace.legs[step.leg].stages.map((stage, at) => {
    const [queue, compute, codec] = (step.stages[at] || [0, 0, 0]).map((us) => us / 1e6);
    return { ...stage, queue, compute, codec };
  });
  const inside = stages.reduce((sum, stage) => sum + stage.queue + stage.compute + stage.codec, 0);
  return { phase: step.phase, index, wall: step.wall_s, hops: Math.max(step.wall_s - inside, 0), stages, at: step.at_s, tokens: step.tokens };
}

function staircase(step) {
  const hop = step.hops / (step.stages.length + 1);
  const wall = step.wall || 1e-9;
  let at = 0;
  const rows = [];
  const bar = (kind, length) => {
    const element = h("i", { class: `bar is-${kind}` });
    element.style.left = `${(at / wall) * 100}%`;
    element.style.width = `max(${((length / wall) * 100).toFixed(3)}%, 1px)`;
    at += length;
    return length > 0 ? element : null;
  };
  for (const stage of step.stages) {
    const bars = [bar("hop", hop), bar("queue", stage.queue), bar("compute", stage.compute), bar("codec", stage.codec)];
    rows.push(h("tr", {},
      h("th", { scope: "row" }, h("span", { class: "stage-name" }, stage.shard), h("span", { class: "stage-layers" }, stage.layers.replace("-", "–"))),
      h("td", { class: "lane" }, h("div", { class: "lane-in" }, ...bars)),
      h("td", { class: "n" }, duration(stage.compute)),
      h("td", { class: "n muted" }, stage.queue + stage.codec > 5e-6 ? `+ ${duration(stage.queue + stage.codec)}` : ""),
    ));
  }
  rows.push(h("tr", { class: "back-row" }, h("th", { scope: "row" }, "back"), h("td", { class: "lane" }, h("div", { class: "lane-in" }, bar("hop", hop))), h("td", { class: "n" }, duration(hop)), h("td", { class: "n muted" }, "a hop")));
  const title = step.index < 0
    ? `${duration(wall)} from the coordinator through ${plural(step.stages.length, "stage")} and back`
    : `${step.phase === "prefill" ? `A chunk of ${plural(step.tokens, "token")}` : `A step of ${plural(step.tokens, "row")}`}, ${duration(step.at)} after the request came: ${duration(wall)}`;
  return h("table", { class: "stairs" }, h("caption", {}, title), h("colgroup", {}, h("col", { class: "col-name" }), h("col", {}), h("col", { class: "col-main" }), h("col", { class: "col-more" })),
    h("thead", { class: "sr" }, h("tr", {}, ...["Stage", "When", "Computing", "Waiting and frames"].map((name) => h("th", { scope: "col" }, name)))), h("tbody", {}, ...rows));
}

function legend() {
  return h("p", { class: "legend" }, ...KINDS.map(([kind, words]) => h("span", {}, h("i", { class: `key bar is-${kind}` }), words)));
}

// -- the last steps ----------------------------------------------------------------------------------------------------

function stepBars(trace, choose) {
  const steps = trace.steps.map((step, index) => ofStep(trace, step, index));
  const decodes = steps.filter((step) => step.phase === "decode");
  const none = { element: h("div", {}), mark: () => {} };
  if (decodes.length < 2) return none;
  const sorted = decodes.map((step) => step.wall).sort((a, b) => a - b);
  const top = Math.max(sorted[Math.floor(sorted.length * 0.98)] || 0, sorted[sorted.length - 1] / 3);
  const holder = h("div", { class: "steps", role: "group", "aria-label": "The last steps; arrow keys go from one to the next" });
  const buttons = decodes.map((step, place) => {
    const svg = s("svg", { viewBox: `0 0 10 ${STEPS_HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true" });
    let y = STEPS_HEIGHT;
    const scale = (STEPS_HEIGHT - 4) / top;
    const sums = { compute: 0, queue: 0, codec: 0, hop: step.hops };
    for (const stage of step.stages) { sums.compute += stage.compute; sums.queue += stage.queue; sums.codec += stage.codec; }
    for (const [kind] of KINDS) {
      const height = Math.min(sums[kind] * scale, y);
      y -= height;
      svg.append(s("rect", { class: `bar is-${kind}`, x: 1, width: 8, y: y.toFixed(2), height: height.toFixed(2) }));
    }
    const words = `step ${place + 1} of ${decodes.length}: ${duration(step.wall)}`;
    return h("button", { type: "button", class: "step", title: words, "aria-label": words, tabindex: place === decodes.length - 1 ? 0 : -1, onclick: () => choose(step) }, svg);
  });
  holder.append(...buttons);
  holder.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move) return;
    const at = buttons.indexOf(document.activeElement);
    const next = buttons[Math.min(Math.max(at + move, 0), buttons.length - 1)];
    event.preventDefault();
    for (const button of buttons) button.tabIndex = button === next ? 0 : -1;
    next.focus();
    next.click();
  });
  const median = sorted[Math.floor(sorted.length / 2)];
  const p95 = sorted[Math.min(Math.floor(sorted.length * 0.95), sorted.length - 1)];
  const element = h("div", { class: "steps-holder" }, h("p", { class: "steps-title" }, h("span", {}, `The last ${decodes.length} tokens`), h("span", { class: "muted" }, `median ${duration(median)}, 95 % within ${duration(p95)}`)), holder);
  return {
    element,
    mark: (index) => buttons.forEach((button, place) => button.classList.toggle("chosen", decodes[place].index === index)),
  };
}
