// The mesh as a picture. Elements are kept while the data change, so that what moves, moves, and what stays is not drawn anew.
import { attributes, list, s, text } from "./dom.js";
import { Flow } from "./flow.js";
import { bytes, duration, plural, range } from "./format.js";
import { arrange, homeward, link, slots, through } from "./layout.js";

const SLOT = 7, SLOT_GAP = 3;

export class Picture {
  constructor(element) {
    this.parent = element;
    this.links = s("g", { class: "links" });
    this.backs = s("g", { class: "links" });
    this.labels = s("g", {});
    this.holes = s("g", {});
    this.heads = s("g", {});
    this.cards = s("g", {});
    this.dots = s("g", { class: "dots" });
    this.svg = s("svg", { role: "img" }, this.links, this.backs, this.dots, this.labels, this.holes, this.heads, this.cards);
    element.append(this.svg);
    this.flow = new Flow(this.dots);
    this.width = 0;
    this.model = null;
    new ResizeObserver(([entry]) => {
      const width = Math.round(entry.contentRect.width);
      if (width && width !== this.width) { this.width = width; if (this.model) this.draw(this.model); }
    }).observe(element);
  }

  draw(model) {
    this.model = model;
    if (!this.width) return;
    const layout = arrange(model, this.width);
    attributes(this.svg, { viewBox: `0 0 ${layout.width} ${layout.height}`, width: layout.width, height: layout.height, "aria-label": describe(model, layout) });
    this.svg.classList.toggle("turned", layout.turned);
    const boxes = new Map();
    for (const head of layout.coordinators) boxes.set(`c ${head.coordinator.name}`, head);
    for (const column of layout.columns) for (const card of column.cards) boxes.set(card.shard.name, card);
    this.drawLinks(model, layout);
    list(this.labels, layout.columns, (c) => c.key, makeLabel, updateLabel);
    list(this.holes, layout.columns.filter((c) => c.hole), (c) => c.key, makeHole, updateHole);
    list(this.heads, layout.coordinators, (c) => c.coordinator.name, makeHead, updateHead);
    list(this.cards, layout.columns.flatMap((c) => c.cards), (c) => c.shard.name, makeCard, updateCard);
    this.flow.update(paths(model, layout, boxes));
  }

  drawLinks(model, layout) {
    const busy = new Map();
    for (const session of model.sessions) {
      const stops = [`c ${session.coordinator}`, ...session.route];
      for (let at = 1; at < stops.length; at += 1) {
        const key = `${stops[at - 1]}>${stops[at]}`;
        busy.set(key, (busy.get(key) || 0) + 1);
      }
    }
    const items = [];
    const ready = (card) => card.shard.state === "ready" || card.shard.state === "draining";
    const join = (from, name, to) => {
      const key = `${name}>${to.shard.name}`;
      items.push({ key, d: link(from, to, layout.turned), busy: busy.get(key) || 0, dead: !ready(to) || (from.shard && !ready(from)) });
    };
    for (const column of layout.columns) {
      for (const to of column.cards) {
        if (column.start === 0) for (const head of layout.coordinators) join(head, `c ${head.coordinator.name}`, to);
        for (const before of layout.columns) {
          if (before.stop === column.start) for (const from of before.cards) join(from, from.shard.name, to);
        }
      }
    }
    items.sort((a, b) => a.busy - b.busy);
    list(this.links, items, (i) => i.key, () => s("path", {}), (element, item) => {
      attributes(element, { d: item.d, class: `link${item.busy ? " busy" : ""}${item.dead ? " dead" : ""}` });
      element.style.strokeWidth = item.busy ? `${Math.min(1.5 + item.busy * 0.4, 4)}px` : "";
    });
    const backs = [];
    for (const column of layout.columns.filter((c) => c.stop === model.layers)) {
      for (const card of column.cards.filter(ready)) for (const head of layout.coordinators) {
        backs.push({ key: `${card.shard.name}>${head.coordinator.name}`, d: homeward(card, head, layout) });
      }
    }
    list(this.backs, backs, (b) => b.key, () => s("path", { class: "link back" }), (element, item) => attributes(element, { d: item.d }));
  }
}

/** For each session its way through the picture, as one path. */
function paths(model, layout, boxes) {
  const found = [];
  const waiting = new Map();
  for (const session of model.sessions) {
    const head = boxes.get(`c ${session.coordinator}`);
    if (!head) continue;
    const stops = session.route.map((name) => boxes.get(name));
    if (session.state === "queued" || session.state === "opening" || !stops.length || stops.some((box) => !box)) {
      const place = waiting.get(head) || 0;
      waiting.set(head, place + 1);
      found.push({ id: session.request, state: "queued", head, place });
      continue;
    }
    let d = link(head, stops[0], layout.turned);
    stops.forEach((box, index) => {
      d += through(box, layout.turned);
      if (index + 1 < stops.length) d += link(box, stops[index + 1], layout.turned).replace(/^M[^C]*/, "");
    });
    const forward = d;
    const home = homeward(stops[stops.length - 1], head, layout);
    d += layout.turned ? home : home.replace(/^M\S+ [^H]*/, ""); // turned, it leaves from the side of the box
    found.push({ id: session.request, state: session.state, d, forward });
  }
  return found;
}

const makeLabel = () => s("g", { class: "label" }, s("text", { class: "label-main" }), s("text", { class: "label-sub" }));
function updateLabel(element, { label, start, stop }) {
  const [main, sub] = element.children;
  attributes(main, { x: label.x, y: label.y });
  attributes(sub, { x: label.x + label.w, y: label.y });
  text(main, label.w < 104 ? range(start, stop) : `Layers ${range(start, stop)}`);
  text(sub, label.w < 175 ? "" : plural(stop - start, "layer"));
}

const makeHole = () => s("g", { class: "hole" }, s("rect", { rx: 10 }), s("text", {}, "nobody"), s("text", {}, ""));
function updateHole(element, { hole, missing }) {
  const [rect, main, sub] = element.children;
  attributes(rect, { x: hole.x, y: hole.y, width: hole.w, height: hole.h });
  attributes(main, { x: hole.x + hole.w / 2, y: hole.y + hole.h / 2 + 4 });
  attributes(sub, { x: hole.x + hole.w / 2, y: hole.y + hole.h / 2 + 20 });
  text(main, missing ? "no shard" : "");
}

const makeHead = () => s("g", { class: "head" }, s("rect", { rx: 10 }), s("text", { class: "card-name" }), s("text", { class: "card-line" }));
function updateHead(element, { coordinator, x, y, w, h }) {
  element.style.transform = `translate(${x}px, ${y}px)`;
  const [rect, name, line] = element.children;
  attributes(rect, { width: w, height: h });
  attributes(name, { x: 12, y: 24 });
  attributes(line, { x: 12, y: 43 });
  text(name, clip(coordinator.name, w - 24));
  text(line, coordinator.queued ? `${coordinator.live - coordinator.queued} live, ${coordinator.queued} wait` : `${coordinator.live} live`);
}

function makeCard() {
  return s("g", { class: "card" },
    s("rect", { class: "card-box", rx: 10 }),
    s("circle", { class: "card-dot", r: 3.5 }),
    s("text", { class: "card-name" }),
    s("text", { class: "card-line" }),
    s("g", { class: "slots" }),
    s("rect", { class: "load-back", rx: 1.5, height: 3 }),
    s("rect", { class: "load", rx: 1.5, height: 3 }),
  );
}

function updateCard(element, { shard, x, y, w, h }) {
  element.style.transform = `translate(${x}px, ${y}px)`;
  attributes(element, { class: `card is-${shard.state}` });
  const [box, dot, name, line, squares, back, load] = element.children;
  attributes(box, { width: w, height: h });
  attributes(dot, { cx: w - 14, cy: 19 });
  attributes(name, { x: 12, y: 23 });
  text(name, clip(shard.name, w - 40));
  attributes(line, { x: 12, y: 41 });
  text(line, clip(lineOf(shard), w - 20));
  const { count, each } = slots(shard.rows, w);
  const used = Math.ceil(shard.used / each);
  list(squares, Array.from({ length: count }, (_, index) => index), (i) => i, () => s("rect", { width: SLOT, height: SLOT, rx: 2, y: h - 29 }), (square, index) => {
    attributes(square, { x: 12 + index * (SLOT + SLOT_GAP), y: h - 29, class: index < used ? "slot used" : "slot" });
  });
  attributes(back, { x: 12, y: h - 13, width: w - 24 });
  attributes(load, { x: 12, y: h - 13, width: w - 24 });
  load.style.transform = `scaleX(${Math.min(shard.load, 1)})`;
  load.style.transformOrigin = "12px 0";
}

function lineOf(shard) {
  if (shard.state === "lost" || shard.state === "left") return `${shard.state} ${Math.round(shard.gone_s)} s ago`;
  if (shard.state === "suspected") return "does not answer";
  if (shard.state !== "ready") return shard.state;
  return [bytes(shard.memory_bytes), shard.step_s ? duration(shard.step_s) : null].filter(Boolean).join(" · ");
}

const clip = (words, width) => {
  const most = Math.max(4, Math.floor(width / 7));
  return words.length > most ? `${words.slice(0, most - 1)}…` : words;
};

function describe(model, layout) {
  const parts = layout.columns.map((c) => `layers ${range(c.start, c.stop)}: ${c.cards.length ? c.cards.map((card) => `${card.shard.name} ${card.shard.state}, ${card.shard.used} of ${card.shard.rows} rows`).join("; ") : "no shard"}`);
  return `${plural(model.coordinators.length, "coordinator")}, ${plural(layout.columns.length, "layer range")}. ${parts.join(". ")}. ${plural(model.sessions.length, "session")}.`;
}
