// Numbers for people. A dash stands for what is not known.
export const NONE = "–";

const round = (value, digits) => value.toLocaleString("en", { maximumFractionDigits: digits, minimumFractionDigits: digits });

/** Three significant digits, no exponent. */
export function number(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return NONE;
  if (value === 0) return "0";
  const size = Math.abs(value);
  return round(value, size >= 100 ? 0 : size >= 10 ? 1 : 2);
}

/** [figure, unit] of a number of seconds. */
export function durationParts(seconds) {
  if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return [NONE, ""];
  if (seconds <= 0) return ["0", "ms"];
  if (seconds < 0.9995e-3) return [round(seconds * 1e6, 0), "µs"];
  if (seconds < 0.9995) return [number(seconds * 1e3), "ms"];
  if (seconds < 90) return [number(seconds), "s"];
  if (seconds < 5400) return [round(seconds / 60, 0), "min"];
  return [round(seconds / 3600, 1), "h"];
}
export const duration = (seconds) => durationParts(seconds).join(" ").trim();

export function bytes(value) {
  if (value === null || value === undefined) return NONE;
  const units = ["B", "KB", "MB", "GB", "TB"];
  let at = 0;
  while (value >= 999.5 && at < units.length - 1) { value /= 1000; at += 1; }
  return `${at ? number(value) : round(value, 0)} ${units[at]}`;
}

export const percent = (share) => `${Math.round(share * 100)}%`;
export const plural = (count, one, many = `${one}s`) => `${count.toLocaleString("en")} ${count === 1 ? one : many}`;
export const range = (start, stop) => `${start}–${stop}`;
export const shortId = (id) => (id.length > 12 ? `${id.slice(0, 8)}…` : id);
export const clock = (unix) => new Date(unix * 1000).toLocaleTimeString("en-GB");
