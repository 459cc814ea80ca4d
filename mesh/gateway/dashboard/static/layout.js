// Where each part of the picture stands: coordinators, then a column for each layer range with its replicas one under the other.
// On a narrow page the same, turned: ranges from top to bottom, replicas side by side. Pure: numbers in, numbers out.

const TURN_BELOW = 720;
const MOST_SLOTS = 24;
const SIDE = 20; // room at both sides for the way back

/** Columns of the picture: ranges that are held, and those that nobody holds, from the first layer on. */
export function columns(model) {
  const found = new Map();
  for (const shard of model.shards) {
    const key = `${shard.start}-${shard.stop}`;
    if (!found.has(key)) found.set(key, { key, start: shard.start, stop: shard.stop, shards: [] });
    found.get(key).shards.push(shard);
  }
  for (const { start, stop } of model.missing) {
    const key = `${start}-${stop}`;
    if (!found.has(key)) found.set(key, { key, start, stop, shards: [] });
    found.get(key).missing = true;
  }
  for (const { shards } of found.values()) shards.sort((a, b) => a.name.localeCompare(b.name, "en", { numeric: true }));
  return [...found.values()].sort((a, b) => a.start - b.start || a.stop - b.stop);
}

/** {width, height, turned, coordinators, columns: [{..., label, cards: [{shard, x, y, w, h}]}], backY | backX} */
export function arrange(model, width) {
  const cols = columns(model);
  return width < TURN_BELOW ? downwards(model, cols, width) : across(model, cols, width);
}

function across(model, cols, width) {
  const gap = cols.length > 6 ? 26 : cols.length > 4 ? 40 : 64;
  const headW = 128;
  const cardH = 84, rowGap = 16, top = 52;
  const most = Math.max(1, ...cols.map((column) => column.shards.length + (column.missing && !column.shards.length ? 1 : 0)));
  const room = (width - 2 * SIDE - headW - gap * cols.length) / Math.max(cols.length, 1);
  const cardW = Math.max(92, Math.min(220, room));
  const real = Math.max(width, 2 * SIDE + headW + cols.length * (cardW + gap));
  const spread = cols.length ? Math.min((real - 2 * SIDE - headW - cols.length * cardW) / cols.length, 150) : gap;
  const body = most * cardH + (most - 1) * rowGap;
  const left = Math.max(SIDE, (real - headW - cols.length * (cardW + spread)) / 2);
  const placed = cols.map((column, index) => {
    const x = left + headW + spread * (index + 1) + cardW * index;
    const count = Math.max(column.shards.length, 1);
    const own = count * cardH + (count - 1) * rowGap;
    const y0 = top + (body - own) / 2;
    const cards = column.shards.map((shard, row) => ({ shard, x, y: y0 + row * (cardH + rowGap), w: cardW, h: cardH }));
    const hole = cards.length ? null : { x, y: y0, w: cardW, h: cardH };
    return { ...column, cards, hole, label: { x, y: 18, w: cardW } };
  });
  const heads = model.coordinators.length || 1;
  const headH = 58, headGap = 12;
  const y0 = top + (body - heads * headH - (heads - 1) * headGap) / 2;
  const coordinators = model.coordinators.map((coordinator, index) => ({ coordinator, x: left, y: y0 + index * (headH + headGap), w: headW, h: headH }));
  return { width: real, height: top + body + 46, turned: false, coordinators, columns: placed, back: top + body + 26 };
}

function downwards(model, cols, width) {
  const headH = 54, cardH = 78, gap = 10, between = 50, side = 26, top = 14;
  const usable = width - side - 2;
  const headCount = Math.max(model.coordinators.length, 1);
  const headW = Math.min(150, (usable - gap * (headCount - 1)) / headCount);
  const headLeft = 1 + (usable - headCount * headW - (headCount - 1) * gap) / 2;
  const coordinators = model.coordinators.map((coordinator, index) => ({ coordinator, x: headLeft + index * (headW + gap), y: top, w: headW, h: headH }));
  let y = top + headH + between;
  const placed = cols.map((column) => {
    const count = Math.max(column.shards.length, 1);
    const perRow = Math.min(count, usable >= 520 ? 4 : 2);
    const w = Math.min(190, (usable - gap * (perRow - 1)) / perRow);
    const left = 1 + (usable - perRow * w - (perRow - 1) * gap) / 2;
    const cards = column.shards.map((shard, index) => ({ shard, x: left + (index % perRow) * (w + gap), y: y + Math.floor(index / perRow) * (cardH + gap), w, h: cardH }));
    const hole = cards.length ? null : { x: left, y, w, h: cardH };
    const label = { x: left, y: y - 16, w };
    y += Math.ceil(count / perRow) * (cardH + gap) - gap + between;
    return { ...column, cards, hole, label };
  });
  return { width, height: y - between + 18, turned: true, coordinators, columns: placed, back: width - 8 };
}

/** Squares for the rows of a shard: as many as fit; each stands for `each` rows. */
export function slots(rows, width) {
  const fit = Math.max(4, Math.min(MOST_SLOTS, Math.floor((width - 20) / 10)));
  const each = Math.ceil(rows / fit);
  return { count: Math.ceil(rows / each), each };
}

const mid = (box) => [box.x + box.w / 2, box.y + box.h / 2];

/** The curve from one box to the next. */
export function link(from, to, turned) {
  if (turned) {
    const [x1] = mid(from), [x2] = mid(to), y1 = from.y + from.h, y2 = to.y, bend = (y2 - y1) / 2;
    return `M${x1} ${y1}C${x1} ${y1 + bend} ${x2} ${y2 - bend} ${x2} ${y2}`;
  }
  const [, y1] = mid(from), [, y2] = mid(to), x1 = from.x + from.w, x2 = to.x, bend = Math.max((x2 - x1) / 2, 12);
  return `M${x1} ${y1}C${x1 + bend} ${y1} ${x2 - bend} ${y2} ${x2} ${y2}`;
}

/** Through a box, in the middle. */
export function through(box, turned) {
  const [x, y] = mid(box);
  return turned ? `L${x} ${box.y + box.h}` : `L${box.x + box.w} ${y}`;
}

/** From the last stage back to the coordinator, outside of everything. */
export function homeward(from, to, layout) {
  const r = 12;
  if (layout.turned) {
    const x = layout.back, y1 = from.y + from.h / 2, y2 = to.y + to.h / 2;
    return `M${from.x + from.w} ${y1}H${x - r}Q${x} ${y1} ${x} ${y1 - r}V${y2 + r}Q${x} ${y2} ${x - r} ${y2}H${to.x + to.w}`;
  }
  const y = layout.back, [, y1] = mid(from), [, y2] = mid(to), x1 = from.x + from.w, out = x1 + 16, x2 = to.x - 16;
  return `M${x1} ${y1}H${out - r}Q${out} ${y1} ${out} ${y1 + r}V${y - r}Q${out} ${y} ${out - r} ${y}H${x2 + r}Q${x2} ${y} ${x2} ${y - r}V${y2 + r}Q${x2} ${y2} ${x2 + r} ${y2}H${to.x}`;
}
