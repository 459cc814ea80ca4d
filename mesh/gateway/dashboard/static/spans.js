// The spans of a trace document as the waterfall needs them. Times are seconds since the request came.

const LANES = { "read frame": "codec", "write frame": "codec", wait: "queue", compute: "compute", sampling: "compute" };
const STEPS = { "prefill chunk": "prefill", "decode step": "decode" };

/** {steps, runs, failovers}, each in the order of time. */
export function readSpans(trace) {
  const spans = trace.spans || [];
  const zero = Math.min(...spans.filter((span) => span.service === "coordinator").map((span) => span.start_ns));
  const seconds = (ns) => (ns - zero) / 1e9;
  const children = new Map();
  for (const span of spans) {
    if (!children.has(span.parent)) children.set(span.parent, []);
    children.get(span.parent).push(span);
  }
  const below = (span) => (children.get(span.span) || []).sort((a, b) => a.start_ns - b.start_ns || a.end_ns - b.end_ns);
  const has = (span, name) => (span.attributes || {})[name];
  const during = (span) => ({ at: seconds(span.start_ns), wall: (span.end_ns - span.start_ns) / 1e9 });
  const runs = spans.filter((span) => span.name === "decode steps");
  const inRun = new Set(runs.map((run) => run.span));
  const steps = spans.filter((span) => STEPS[span.name]).map((span) => readStep(span));
  const inOrder = (list) => list.sort((a, b) => a.at - b.at);
  return {
    steps: inOrder(steps),
    runs: inOrder(runs.map((span) => ({ ...during(span), count: has(span, "mesh.steps") || 1, number: has(span, "mesh.step"), compute: has(span, "mesh.compute_s") || 0, queue: has(span, "mesh.wait_s") || 0, codec: has(span, "mesh.codec_s") || 0, hop: has(span, "mesh.network_s") || 0 }))),
    failovers: inOrder(spans.filter((span) => span.name === "failover").map((span) => ({ ...during(span), from: has(span, "mesh.from"), to: has(span, "mesh.to"), how: has(span, "mesh.replay") }))),
  };

  /** parts: [kind, where the part begins, its length, what it is] of each row, in seconds of the step. */
  function readStep(span) {
    const start = span.start_ns;
    const part = (kind, one, words) => ({ kind, at: (one.start_ns - start) / 1e9, length: (one.end_ns - one.start_ns) / 1e9, words });
    const stages = [];
    const hops = [];
    for (const child of below(span)) {
      if (child.name === "frame") {
        const words = `from ${has(child, "mesh.from")} to ${has(child, "mesh.to")}`;
        hops.push({ to: has(child, "mesh.to"), parts: [part("hop", child, words), ...below(child).filter((one) => one.name === "nats-server").map((one) => part("server", one, one.instance || ""))] });
      } else if (child.name === "stage") {
        const parts = below(child).filter((one) => LANES[one.name]).map((one) => part(LANES[one.name], one, one.name));
        const sum = (kind) => parts.filter((one) => one.kind === kind).reduce((total, one) => total + one.length, 0);
        stages.push({ shard: has(child, "mesh.shard") || child.instance, layers: has(child, "mesh.range") || "", compute: sum("compute"), queue: sum("queue"), codec: sum("codec"), parts });
      }
    }
    const sums = { compute: has(span, "mesh.compute_s") || 0, queue: has(span, "mesh.wait_s") || 0, codec: has(span, "mesh.codec_s") || 0 };
    const hop = has(span, "mesh.network_s") ?? hops.reduce((total, one) => total + one.parts[0].length, 0);
    return { ...during(span), phase: STEPS[span.name], number: has(span, "mesh.step"), tokens: has(span, "mesh.tokens") ?? has(span, "mesh.rows") ?? 1, epoch: has(span, "mesh.epoch"), running: has(span, "mesh.unfinished") === true, slow: inRun.has(span.parent), stages, hops, hop, sums };
  }
}
