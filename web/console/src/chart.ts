// Line charts of the last 15 minutes.
import uPlot from "uplot";
import { h, setText } from "./dom.js";
import { age, count, rate } from "./format.js";
import { keepSeconds, names, type Series } from "./series.js";

interface Line {
  name: (typeof names)[number];
  label: string;
  color: string;
}

interface Chart {
  title: string;
  lines: Line[];
  value: (n: number) => string;
  /** Aggregates a few seconds into one point: the mean of rates, the maximum of counts. */
  of: (values: number[]) => number;
  /** Minimum span of the y axis, so that noise does not look like a peak. */
  span: number;
}

const mean = (values: number[]) => values.reduce((sum, n) => sum + n, 0) / values.length;
const maximum = (values: number[]) => Math.max(...values);

const all: Chart[] = [
  {
    title: "Messages per second",
    lines: [
      { name: "inserted", label: "inserted", color: "--line-1" },
      { name: "published", label: "published", color: "--line-2" },
      { name: "applied", label: "applied", color: "--line-3" },
    ],
    value: rate,
    of: mean,
    span: 5,
  },
  {
    title: "Waiting messages",
    lines: [
      { name: "backlog", label: "outbox", color: "--line-1" },
      { name: "queued", label: "queues", color: "--line-2" },
      { name: "retrying", label: "retries", color: "--line-3" },
      { name: "dead", label: "dead letters", color: "--line-4" },
    ],
    value: count,
    of: maximum,
    span: 10,
  },
  {
    title: "Age of the oldest message in the outbox",
    lines: [{ name: "lag", label: "oldest", color: "--line-1" }],
    value: age,
    of: maximum,
    span: 1,
  },
];

const height = 150;

/** charts adds the charts to a box, and returns a function that draws them. */
export function charts(box: HTMLElement, signal: AbortSignal): (series: Series) => void {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let made: { chart: Chart; plot: uPlot; values: HTMLElement[] }[] = [];
  let last: Series | undefined;

  const make = () => {
    for (const { plot } of made) plot.destroy();
    box.replaceChildren();
    made = all.map((chart) => {
      const values = chart.lines.map(() => h("b"));
      const keys = chart.lines.map((line, i) =>
        h("span", { class: `key ${line.color.slice(2)}` }, line.label, " ", values[i]),
      );
      const canvas = h("div", { class: "plot" });
      const caption = h("figcaption", {}, h("strong", {}, chart.title), h("span", { class: "keys" }, ...keys));
      box.append(h("figure", {}, caption, canvas));
      const plot = new uPlot(options(chart, canvas.clientWidth), [[], ...chart.lines.map(() => [])], canvas);
      return { chart, values, plot };
    });
    if (last) draw(last);
  };

  const draw = (series: Series) => {
    last = series;
    if (made.length === 0) make();
    box.dataset["points"] = String(series.length);
    for (const { chart, plot, values } of made) {
      const columns = chart.lines.map((line) => series.columns[names.indexOf(line.name) + 1]!);
      plot.setData(condense(series.columns[0]!, columns, chart.of));
      columns.forEach((column, i) => setText(values[i]!, chart.value(column[column.length - 1] ?? 0)));
    }
  };

  const resize = new ResizeObserver(() => {
    for (const { plot } of made) {
      const width = (plot.root.parentElement as HTMLElement).clientWidth;
      if (width > 0 && width !== plot.width) plot.setSize({ width, height });
    }
  });
  resize.observe(box);
  dark.addEventListener("change", make, { signal });
  signal.addEventListener("abort", () => {
    resize.disconnect();
    for (const { plot } of made) plot.destroy();
  });
  return draw;
}

/** minSeconds is the minimum time range of a chart. */
const minSeconds = 120;
const bucketSeconds = 5;

/**
 * condense aggregates five seconds into one point: 900 points on 300 pixels would be unreadable. Buckets are aligned to
 * the clock, so a complete point no longer changes.
 */
function condense(times: number[], columns: number[][], of: Chart["of"]): uPlot.AlignedData {
  const condensed: [number[], ...number[][]] = [[], ...columns.map(() => [])];
  for (let from = 0; from < times.length; ) {
    const bucket = Math.floor(times[from]! / bucketSeconds);
    let to = from + 1;
    while (to < times.length && Math.floor(times[to]! / bucketSeconds) === bucket) to++;
    condensed[0].push(times[to - 1]!);
    columns.forEach((column, i) => condensed[i + 1]!.push(of(column.slice(from, to))));
    from = to;
  }
  return condensed;
}

function options(chart: Chart, width: number): uPlot.Options {
  const style = getComputedStyle(document.documentElement);
  const color = (name: string) => style.getPropertyValue(name).trim();
  const axis = {
    stroke: color("--muted"),
    grid: { stroke: color("--grid"), width: 1 },
    ticks: { show: false },
    font: "11px system-ui, sans-serif",
  };
  const two = (n: number) => String(n).padStart(2, "0");
  const time = (t: number) => ((d) => `${two(d.getHours())}:${two(d.getMinutes())}`)(new Date(t * 1000));
  return {
    width: Math.max(width, 200),
    height,
    padding: [8, 18, 0, 0],
    legend: { show: false },
    cursor: { show: false },
    scales: {
      // The range grows with the data, so that the charts of a service that has just started are not almost empty.
      x: { time: true, range: (_, min, max) => [Math.max(Math.min(min, max - minSeconds), max - keepSeconds), max] },
      y: { range: (_, __, max) => [0, Math.max(chart.span, (max ?? 0) * 1.1)] },
    },
    axes: [
      { ...axis, space: 60, size: 24, values: (_, at) => at.map(time) },
      { ...axis, size: 50, space: 32, values: (_, at) => at.map((n) => chart.value(n)) },
    ],
    series: [{}, ...chart.lines.map((line) => ({ stroke: color(line.color), width: 1.75, points: { show: false } }))],
  };
}
