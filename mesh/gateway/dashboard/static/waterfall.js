// Where the time of a request went: what bounds it, its life in phases, one step through the stages as a staircase, and its steps side by side.
import { h, s } from "./dom.js";
import { duration, number, plural } from "./format.js";
import { readSpans } from "./spans.js";

const STEPS_HEIGHT = 96;
const SMALL = 0.2; // of the life: too narrow for its own words
const KINDS = [
  ["compute", "computing"],
  ["queue", "waiting for other work"],
  ["codec", "reading and writing frames"],
  ["hop", "on the way"],
  ["server", "of it inside the NATS server"],
];
const STACKED = KINDS.filter(([kind]) => kind !== "server");
const WORDS = Object.fromEntries(KINDS);
const HOW = { replay: "the history was computed again", mirror: "a mirror stepped in", resend: "the step was sent again" };

export function waterfall(trace) {
  if (!trace.legs.length) return h("p", { class: "empty" }, "No step has come back yet.");
  const read = readSpans(trace);
  const root = h("div", { class: "waterfall" });
  const stairs = h("div", { class: "stairs-holder" });
  const choices = stairChoices(trace, read);
  const buttons = choices.map((choice) => h("button", { type: "button", class: "choice", onclick: () => show(choice) }, choice.label));
  const bars = stepBars(read, (choice) => show(choice));
  function show(choice) {
    buttons.forEach((button, index) => button.setAttribute("aria-pressed", choices[index] === choice));
    bars.mark(choice);
    stairs.replaceChildren(staircase(choice));
  }
  const notes = [...(trace.clocks || []).map((line) => h("p", { class: "life-small" }, line))];
  root.append(
    trace.bound ? h("p", { class: "bound" }, trace.bound.sentence.replaceAll(" %", "\u00a0%")) : h("span", {}),
    life(trace, read), ...notes,
    h("div", { class: "choices", role: "group", "aria-label": "Which step" }, ...buttons), stairs, legend(read), bars.element,
  );
  show(choices.find((choice) => choice.phase === "decode") || choices[0]);
  return root;
}

// -- the life of the request -------------------------------------------------------------------------------------------

function life(trace, read) {
  const total = trace.total_s || 1e-9;
  const first = trace.first_token_s;
  const parts = [["waiting", "wait", 0, Math.min(trace.queue_s, total)]];
  const gaps = lossesOf(read);
  const split = (name, kind, from, to) => { // what is left of a part between the losses
    let at = from;
    for (const [, , begin, end] of gaps) {
      if (begin >= to || end <= at) continue;
      parts.push([name, kind, at, begin]);
      at = end;
    }
    parts.push([name, kind, at, to]);
  };
  split("prompt", "prefill", trace.queue_s, first ?? total);
  if (first !== null && total > first) split("tokens", "decode", first, total);
  parts.push(...gaps);
  const shown = parts.map(([name, kind, from, to]) => [name, kind, Math.max(from, 0), Math.min(to, total)]).filter(([, , from, to]) => to > from);
  const bar = h("div", { class: "life", role: "img", "aria-label": shown.map(([name, , from, to]) => `${name} ${duration(to - from)}`).join(", ") });
  for (const [name, kind, from, to] of shown) {
    const part = h("div", { class: `life-part is-${kind}` }, h("span", {}, `${name} ${duration(to - from)}`));
    part.style.left = `${(from / total) * 100}%`;
    part.style.width = `${((to - from) / total) * 100}%`;
    if ((to - from) / total < SMALL) part.classList.add("small");
    bar.append(part);
  }
  if (!read.failovers.length) {
    bar.append(...trace.legs.slice(1).map((leg) => {
      const mark = h("div", { class: "life-mark" }, h("span", {}, "moved"));
      mark.style.left = `${Math.min((leg.at_s / total) * 100, 99.5)}%`;
      return mark;
    }));
  }
  const facts = [
    `${plural(trace.prompt_tokens, "prompt token")}`,
    first === null ? null : `first token after ${duration(first)}`,
    `${plural(trace.tokens, "token")}${rate(trace)}`,
    `${duration(total)} in all`,
    trace.restarts ? `moved ${trace.restarts === 1 ? "once" : `${trace.restarts} times`}` : null,
  ];
  const small = shown.filter(([, , from, to]) => (to - from) / total < SMALL).map(([name, , from, to]) => `${name} ${duration(to - from)}`);
  const moves = read.failovers.map((lost) => h("p", { class: "life-move" }, `Moved ${lost.from && lost.to ? `from ${lost.from} to ${lost.to} ` : ""}after ${duration(lost.at)}: ${duration(lost.wall)} without a route${HOW[lost.how] ? `, then ${HOW[lost.how]}` : ""}.`));
  return h("div", {}, h("p", { class: "life-facts" }, facts.filter(Boolean).join(" · ")), bar, small.length ? h("p", { class: "life-small" }, small.join(" · ")) : null, ...moves);
}

/** The times without a route, and the replays that follow them, in the order of time. */
function lossesOf(read) {
  const gaps = [];
  for (const lost of read.failovers) {
    const end = lost.at + lost.wall;
    gaps.push(["no route", "failover", lost.at, end]);
    const again = read.steps.filter((step) => step.phase === "prefill" && step.at >= end - 1e-6 && !read.failovers.some((other) => other.at > lost.at && other.at < step.at));
    const last = again[again.length - 1];
    if (last) gaps.push(["replay", "prefill", end, last.at + last.wall]);
  }
  return gaps;
}

function rate(trace) {
  const spent = trace.total_s - (trace.first_token_s ?? trace.total_s);
  return trace.tokens > 1 && spent > 0 ? `, ${number((trace.tokens - 1) / spent)} a second` : "";
}

// -- one step ----------------------------------------------------------------------------------------------------------

/** Mean steps of each kind over the last route they took, and the slowest token. */
function stairChoices(trace, read) {
  const choices = [];
  for (const [phase, label] of [["prefill", "A prompt chunk"], ["decode", "A token"]]) {
    const leg = [...trace.legs].reverse().find((one) => one[phase].steps);
    if (leg) choices.push(meanStep(leg, phase, label));
  }
  const decodes = read.steps.filter((step) => step.phase === "decode" && step.stages.length && !step.running);
  const slowest = decodes.reduce((most, step) => (most && most.wall >= step.wall ? most : step), null);
  if (decodes.length > 1) { slowest.label = "The slowest token"; choices.push(slowest); }
  return choices;
}

function meanStep(leg, phase, label) {
  const sum = leg[phase], n = sum.steps, count = leg.stages.length;
  const way = (index) => ((sum.hops && sum.hops.length === count + 1 ? sum.hops[index] : sum.hops_s / (count + 1)) || 0) / n;
  let at = 0;
  const part = (kind, length, words) => { const made = { kind, at, length, words }; at += length; return made; };
  const hops = [], stages = [];
  leg.stages.forEach((stage, index) => {
    const [queue, compute, codec] = ["queue_s", "compute_s", "codec_s"].map((name) => sum.stages[index][name] / n);
    hops.push({ to: stage.shard, parts: [part("hop", way(index), `to ${stage.shard}`)] });
    stages.push({ ...stage, queue, compute, codec, parts: [part("queue", queue, "wait"), part("compute", compute, "compute"), part("codec", codec, "frames")] });
  });
  hops.push({ to: "", parts: [part("hop", way(count), "back")] });
  return { phase, mean: n, label: `${label}, mean of ${n.toLocaleString("en")}`, wall: sum.wall_s / n, stages, hops };
}

function staircase(step) {
  const wall = step.wall || 1e-9;
  const bar = (part) => {
    const element = h("i", { class: `bar is-${part.kind}`, title: `${WORDS[part.kind]}${part.words ? ` (${part.words})` : ""}: ${duration(part.length)}` });
    element.style.left = `${(part.at / wall) * 100}%`;
    element.style.width = `max(${((part.length / wall) * 100).toFixed(3)}%, 1px)`;
    return part.length > 0 ? element : null;
  };
  const lane = (...parts) => h("td", { class: "lane" }, h("div", { class: "lane-in" }, ...parts.flat().map(bar)));
  const row = (stage, index) => {
    const hop = step.hops[index];
    return h("tr", {},
      h("th", { scope: "row" }, h("span", { class: "stage-name" }, stage.shard), h("span", { class: "stage-layers" }, stage.layers.replace("-", "–"))),
      lane(hop ? hop.parts : [], stage.parts),
      h("td", { class: "n" }, duration(stage.compute)),
      h("td", { class: "n muted" }, stage.queue + stage.codec > 5e-6 ? `+ ${duration(stage.queue + stage.codec)}` : ""),
    );
  };
  const rows = step.stages.map(row);
  const back = step.hops[step.stages.length];
  if (back) rows.push(h("tr", { class: "back-row" }, h("th", { scope: "row" }, "back"), lane(back.parts), h("td", { class: "n" }, duration(back.parts[0].length)), h("td", { class: "n muted" }, "on the way")));
  const what = step.mean ? "" : step.phase === "prefill" ? `A chunk of ${plural(step.tokens, "token")}` : `Step ${step.number ?? ""} with ${plural(step.tokens, "row")}`;
  const title = step.mean
    ? `${duration(wall)} from the coordinator through ${plural(step.stages.length, "stage")} and back`
    : `${what}, ${duration(step.at)} after the request came: ${duration(wall)}${step.stages.length ? "" : ". Its parts are not kept."}`;
  return h("table", { class: "stairs" }, h("caption", {}, title), h("colgroup", {}, h("col", { class: "col-name" }), h("col", {}), h("col", { class: "col-main" }), h("col", { class: "col-more" })),
    h("thead", { class: "sr" }, h("tr", {}, ...["Stage", "When", "Computing", "Waiting and frames"].map((name) => h("th", { scope: "col" }, name)))), h("tbody", {}, ...rows));
}

function legend(read) {
  const server = read.steps.some((step) => step.hops.some((hop) => hop.parts.length > 1));
  return h("p", { class: "legend" }, ...(server ? KINDS : STACKED).map(([kind, words]) => h("span", {}, h("i", { class: `key bar is-${kind}` }), words)));
}

// -- the steps side by side --------------------------------------------------------------------------------------------

function stepBars(read, choose) {
  const decodes = read.steps.filter((step) => step.phase === "decode" && !step.slow);
  const none = { element: h("div", {}), mark: () => {} };
  if (decodes.length < 2) return none;
  const sorted = decodes.map((step) => step.wall).sort((a, b) => a - b);
  const top = Math.max(sorted[Math.floor(sorted.length * 0.98)] || 0, sorted[sorted.length - 1] / 3);
  const holder = h("div", { class: "steps", role: "group", "aria-label": "The steps; arrow keys go from one to the next" });
  const stacked = (sums) => {
    const svg = s("svg", { viewBox: `0 0 10 ${STEPS_HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true" });
    let y = STEPS_HEIGHT;
    const scale = (STEPS_HEIGHT - 4) / top;
    for (const [kind] of STACKED) {
      const height = Math.min(sums[kind] * scale, y);
      y -= height;
      svg.append(s("rect", { class: `bar is-${kind}`, x: 1, width: 8, y: y.toFixed(2), height: height.toFixed(2) }));
    }
    return svg;
  };
  const buttons = decodes.map((step, place) => {
    const sums = { ...step.sums, hop: step.hop };
    const words = `step ${step.number ?? place}: ${duration(step.wall)}`;
    return h("button", { type: "button", class: "step", title: words, "aria-label": words, tabindex: place === decodes.length - 1 ? 0 : -1, onclick: () => choose(step) }, stacked(sums));
  });
  const gaps = read.runs.map((run) => {
    const mean = Object.fromEntries(STACKED.map(([kind]) => [kind, run[kind] / run.count]));
    const words = `${plural(run.count, "step")} from step ${run.number ?? ""} on, ${duration(STACKED.reduce((sum, [kind]) => sum + mean[kind], 0))} each in the mean`;
    return h("div", { class: "step-run", role: "img", title: words, "aria-label": words }, stacked(mean), h("span", {}, `× ${run.count.toLocaleString("en")}`));
  });
  const lost = read.failovers.map((one) => h("div", { class: "step-lost", role: "img", title: `no route for ${duration(one.wall)}`, "aria-label": `no route for ${duration(one.wall)}` }));
  const placed = [...decodes.map((one, at) => [one.at, buttons[at]]), ...read.runs.map((one, at) => [one.at, gaps[at]]), ...read.failovers.map((one, at) => [one.at, lost[at]])];
  holder.append(...placed.sort((a, b) => a[0] - b[0]).map(([, element]) => element));
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
  const summed = read.runs.reduce((sum, run) => sum + run.count, 0);
  const title = summed ? `${plural(decodes.length, "token")} one by one, ${summed.toLocaleString("en")} in sums` : `${plural(decodes.length, "token")}, one by one`;
  const element = h("div", { class: "steps-holder" }, h("p", { class: "steps-title" }, h("span", {}, title), h("span", { class: "muted" }, `median ${duration(median)}, 95 % within ${duration(p95)}`)), holder);
  return { element, mark: (chosen) => buttons.forEach((button, place) => button.classList.toggle("chosen", decodes[place] === chosen)) };
}
