// What the mesh says, for as long as the page is looked at. `state` is what is known; `on` is called after every change.
import { ask, events, Refused } from "./net.js";

const HIDDEN_MS = 10_000;
const POINTS = 180;
const EVENTS = 100;
const WAITS_S = [1, 2, 4, 8];

export const state = {
  link: "connecting", // connecting, live, lost, denied
  problem: "",
  snapshot: null,
  series: {},
  events: [],
};

const listeners = new Set();
let abort = null;
let hidden = 0;
let again = 0;
let tries = 0;

export const on = (call) => { listeners.add(call); };
/** A listener that fails ends neither the feed nor the other listeners. */
function tell(what, detail) {
  for (const call of listeners) {
    try { call(what, detail); } catch (error) { console.error("what the mesh says could not be shown:", error); }
  }
}

export function start() {
  document.addEventListener("visibilitychange", () => {
    clearTimeout(hidden);
    if (document.hidden) hidden = setTimeout(stop, HIDDEN_MS);
    else if (!abort) connect();
  });
  // A page that is left may be kept by the browser, with its connection, of which there are six to one address.
  addEventListener("pagehide", stop);
  addEventListener("pageshow", (event) => { if (event.persisted) reconnect(); });
  connect();
}

export function reconnect() {
  stop();
  tries = 0;
  connect();
}

function stop() {
  clearTimeout(again);
  if (abort) abort.abort();
  abort = null;
}

async function connect() {
  clearTimeout(again);
  const mine = (abort = new AbortController());
  try {
    const response = await ask("/dashboard/events", { signal: mine.signal });
    for await (const { event, data } of events(response)) {
      tries = 0;
      state.link = "live";
      take(event, JSON.parse(data));
    }
    throw new Refused(0, "The connection was closed.");
  } catch (error) {
    if (mine.signal.aborted) return;
    abort = null;
    const status = error instanceof Refused ? error.status : 0;
    state.problem = error.message;
    if (status === 401 || status === 403) {
      state.link = "denied";
      state.denied = status;
    } else {
      state.link = "lost";
      const wait = error.retryAfter || WAITS_S[Math.min(tries, WAITS_S.length - 1)];
      tries += 1;
      if (!document.hidden) again = setTimeout(connect, wait * 1000);
    }
    tell("link");
  }
}

function take(event, data) {
  if (event === "history") {
    state.series = data.series;
    state.events = data.events;
  } else if (event === "snapshot") {
    state.snapshot = data;
    for (const model of data.models) {
      if (!model.point || data.error) continue;
      const points = state.series[model.name] || (state.series[model.name] = []);
      if (!points.length || points[points.length - 1][0] < model.point[0]) points.push(model.point);
      if (points.length > POINTS) points.shift();
    }
  } else if (event === "event") {
    state.events.push(data);
    if (state.events.length > EVENTS) state.events.shift();
  }
  tell(event, data);
}
