// The little that is needed to draw: elements, and lists that keep their elements while their data change.
const SVG = "http://www.w3.org/2000/svg";

function fill(element, properties, children) {
  for (const [name, value] of Object.entries(properties || {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}
export const h = (tag, properties, ...children) => fill(document.createElement(tag), properties, children);
export const s = (tag, properties, ...children) => fill(document.createElementNS(SVG, tag), properties, children);
export const $ = (id) => document.getElementById(id);

/** Text, written only where it differs, so that nothing is announced or selected anew for nothing. */
export function text(element, value) {
  const wanted = String(value);
  if (element.textContent !== wanted) element.textContent = wanted;
}
export function attributes(element, values) {
  for (const [name, value] of Object.entries(values)) {
    if (value === null || value === undefined || value === false) element.removeAttribute(name);
    else if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value);
  }
}

/** Children of `parent`, one for each item, in their order: made once by `make(item)`, then `update(element, item)` each time. */
export function list(parent, items, key, make, update) {
  const known = parent.meshItems || (parent.meshItems = new Map());
  const seen = new Set();
  let place = parent.firstElementChild;
  for (const item of items) {
    const name = key(item);
    seen.add(name);
    let element = known.get(name);
    if (!element) known.set(name, (element = make(item)));
    if (element !== place) parent.insertBefore(element, place);
    else place = place.nextElementSibling;
    update(element, item);
  }
  for (const [name, element] of known) {
    if (!seen.has(name)) { element.remove(); known.delete(name); }
  }
}
export const calm = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

/** What of the page could not be drawn lately: its name -> why. */
export const faults = new Map();

/** Draw one part of the page. If that fails, the other parts and the feed go on; the console says it once. */
export function part(name, draw) {
  try {
    draw();
    faults.delete(name);
  } catch (error) {
    if (faults.get(name) !== error.message) console.error(`the ${name} could not be drawn:`, error);
    faults.set(name, error.message);
  }
}
