// Small line charts over the last minutes. A pause in looking is a gap in the line, not a slope.
import { attributes, s } from "./dom.js";

const SPAN_S = 120;
const GAP_S = 6;
const HEIGHT = 44;

export class Spark {
  constructor(label) {
    this.area = s("path", { class: "spark-area" });
    this.line = s("path", { class: "spark-line" });
    this.dot = s("circle", { class: "spark-dot", r: 2.5 });
    this.element = s("svg", { class: "spark", role: "img", "aria-label": label, preserveAspectRatio: "none" }, this.area, this.line, this.dot);
  }

  /** points: [unix seconds, value or null]. `floor`: what the scale reaches at least. */
  draw(points, { floor = 0 } = {}) {
    const width = this.element.clientWidth || 200;
    attributes(this.element, { viewBox: `0 0 ${width} ${HEIGHT}` });
    const end = points.length ? points[points.length - 1][0] : 0;
    const known = points.filter(([at, value]) => value !== null && value !== undefined && at >= end - SPAN_S - GAP_S);
    if (known.length < 2) {
      for (const part of [this.area, this.line]) part.removeAttribute("d");
      this.dot.setAttribute("visibility", "hidden");
      return;
    }
    const top = Math.max(floor, ...known.filter((p) => p[0] > end - SPAN_S).map((p) => p[1])) || 1;
    const x = (at) => ((at - (end - SPAN_S)) / SPAN_S) * (width - 4);
    const y = (value) => HEIGHT - 2 - (value / top) * (HEIGHT - 8);
    const runs = [];
    let before = null;
    for (const [at, value] of known) {
      if (before === null || at - before > GAP_S) runs.push([]);
      runs[runs.length - 1].push([x(at), y(value)]);
      before = at;
    }
    const path = (run) => run.map(([px, py], index) => `${index ? "L" : "M"}${px.toFixed(1)} ${py.toFixed(1)}`).join("");
    this.line.setAttribute("d", runs.map(path).join(""));
    this.area.setAttribute("d", runs.map((run) => `${path(run)}L${run[run.length - 1][0].toFixed(1)} ${HEIGHT}L${run[0][0].toFixed(1)} ${HEIGHT}Z`).join(""));
    const last = runs[runs.length - 1];
    const [cx, cy] = last[last.length - 1];
    attributes(this.dot, { cx: cx.toFixed(1), cy: cy.toFixed(1), visibility: "visible" });
  }
}
