// Formats of numbers and times.
import { type Timestamp, timestampDate } from "@bufbuild/protobuf/wkt";

/** count formats a number with thousands separators. */
export function count(n: number | bigint): string {
  return n.toLocaleString("en");
}

/** plural formats a number with its noun. */
export function plural(n: number | bigint, singular: string, plural = singular + "s"): string {
  return `${count(n)} ${Number(n) === 1 ? singular : plural}`;
}

/** rate formats a rate per second, short enough for a card. */
export function rate(n: number): string {
  if (n >= 10_000) return `${(n / 1000).toFixed(0)}k`;
  if (n >= 1000) return `${(n / 1000).toFixed(1)}k`;
  return n >= 100 || Number.isInteger(n) ? n.toFixed(0) : n.toFixed(1);
}

/** age formats a duration in seconds. */
export function age(seconds: number): string {
  if (seconds < 0.9995) return `${Math.max(0, Math.round(seconds * 1000))} ms`;
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 90 * 60) return `${Math.round(seconds / 60)} min`;
  if (seconds < 48 * 3600) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86400)} d`;
}

const two = (n: number) => String(n).padStart(2, "0");

/** clock formats a time of day, with the date unless it is today. */
export function clock(at: Timestamp | undefined, milliseconds = false): string {
  if (!at) return "–";
  const date = timestampDate(at);
  const day = `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())} `;
  const time = `${two(date.getHours())}:${two(date.getMinutes())}:${two(date.getSeconds())}`;
  const today = date.toDateString() === new Date().toDateString();
  return (today ? "" : day) + time + (milliseconds ? `.${String(date.getMilliseconds()).padStart(3, "0")}` : "");
}

/** since formats how long ago a time was. */
export function since(at: Timestamp | undefined): string {
  return at ? age((Date.now() - timestampDate(at).getTime()) / 1000) : "–";
}

/** shortType returns a type without its package. */
export function shortType(type: string): string {
  return type.slice(type.lastIndexOf(".") + 1);
}
