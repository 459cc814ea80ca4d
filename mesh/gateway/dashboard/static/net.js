// Requests to this address: the token of this tab, errors with their words, server-sent events.
let token = "";
try { token = sessionStorage.getItem("mesh-token") || ""; } catch { /* storage may be off: kept in memory */ }

export const hasToken = () => token !== "";
export function setToken(value) {
  token = value.trim();
  try {
    if (token) sessionStorage.setItem("mesh-token", token);
    else sessionStorage.removeItem("mesh-token");
  } catch { /* in memory only */ }
}

/** status 0: nobody answered. */
export class Refused extends Error {
  constructor(status, message, retryAfter) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

export async function ask(path, { method = "GET", body, signal } = {}) {
  const headers = {};
  if (token) headers.Authorization = `Bearer ${token}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body), cache: "no-store", credentials: "same-origin" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The gateway does not answer.");
  }
  if (response.ok) return response;
  let message = `${response.status} ${response.statusText}`;
  try { message = (await response.json()).error.message || message; } catch { /* not ours */ }
  throw new Refused(response.status, message, Number(response.headers.get("Retry-After")) || null);
}

/** Events of a response as {event, data}; data is text. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      let read;
      try {
        read = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new Refused(0, "The connection was lost.");
      }
      if (read.done) return;
      rest += read.value;
      const blocks = rest.replaceAll("\r\n", "\n").split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        let event = "message";
        const data = [];
        for (const line of block.split("\n")) {
          if (line.startsWith("event:")) event = line.slice(6).trim();
          else if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        }
        if (data.length) yield { event, data: data.join("\n") };
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
