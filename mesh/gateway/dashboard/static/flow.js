// Sessions on their way: a dot each, round its own route, at a pace that is calm whatever the mesh does. Still where motion is not wanted.
import { attributes, calm, list, s } from "./dom.js";

const ROUND_MS = 3600;
const THERE = 0.76; // of a round; the way back carries a token, not a hidden state, and is quick
const MOST = 32;

export class Flow {
  constructor(parent) {
    this.parent = parent;
    this.items = [];
    this.running = false;
    this.halted = false;
    this.frame = (now) => this.step(now);
    document.addEventListener("visibilitychange", () => this.wake());
    matchMedia("(prefers-reduced-motion: reduce)").addEventListener("change", () => this.wake());
  }

  update(paths) {
    const moving = paths.slice(0, MOST);
    list(this.parent, moving, (p) => p.id, make, (element, item) => {
      attributes(element, { class: `session is-${item.state}` });
      if (item.state === "queued") place(element, item);
      else if (element.track.getAttribute("d") !== item.d) {
        attributes(element.track, { d: item.forward });
        element.forward = element.track.getTotalLength();
        attributes(element.track, { d: item.d });
        element.length = element.track.getTotalLength();
      }
      element.item = item;
    });
    this.items = [...this.parent.children].filter((element) => element.item && element.item.state !== "queued");
    this.wake();
  }

  /** What is known is old: nothing moves. */
  halt(yes) {
    this.halted = yes;
    this.wake();
  }

  wake() {
    if (this.halted || this.running || !this.items.length || document.hidden) return;
    this.running = true;
    requestAnimationFrame(this.frame);
  }

  step(now) {
    if (this.halted || !this.items.length || document.hidden) { this.running = false; return; }
    const still = calm();
    for (const element of this.items) {
      if (!element.length) continue;
      const share = still ? element.phase : (now / ROUND_MS + element.phase) % 1;
      const at = share < THERE ? (share / THERE) * element.forward : element.forward + ((share - THERE) / (1 - THERE)) * (element.length - element.forward);
      const point = element.track.getPointAtLength(at);
      element.dot.setAttribute("cx", point.x.toFixed(1));
      element.dot.setAttribute("cy", point.y.toFixed(1));
    }
    if (still) { this.running = false; return; }
    requestAnimationFrame(this.frame);
  }
}

let made = 0;
function make(item) {
  const track = s("path", { class: "track" });
  const dot = s("circle", { r: 4.5 });
  const element = s("g", {}, track, dot);
  Object.assign(element, { track, dot, forward: 0, length: 0, phase: (made++ * 0.381966) % 1, item });
  return element;
}

/** Those that wait stand in a row at their coordinator. */
function place(element, { head, place: index }) {
  const fit = Math.max(1, Math.floor((head.w - 20) / 9));
  attributes(element.dot, { cx: head.x + 13 + (index % fit) * 9, cy: head.y - 8 - Math.floor(index / fit) * 9 });
}
