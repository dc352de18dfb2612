// The flow of messages as a diagram, with live numbers for each station and a sentence for each problem.
import { type Station, StationKind, StationState } from "../../src/gen/ops/v1/ops_pb.js";
import { charts } from "./chart.js";
import { fill, h, setText } from "./dom.js";
import { age, count, plural, rate } from "./format.js";
import { follow, type Live } from "./live.js";
import type { Context } from "./parts.js";

const kinds: Record<StationKind, { label: string; page: `#/${string}` }> = {
  [StationKind.UNSPECIFIED]: { label: "", page: "#/flow" },
  [StationKind.API]: { label: "accepts calls", page: "#/messages" },
  [StationKind.OUTBOX]: { label: "log in Postgres", page: "#/messages" },
  [StationKind.RELAY]: { label: "publishes", page: "#/relays" },
  [StationKind.EXCHANGE]: { label: "exchange", page: "#/relays" },
  [StationKind.QUEUE]: { label: "queue", page: "#/consumers" },
  [StationKind.GROUP]: { label: "group", page: "#/consumers" },
  [StationKind.EFFECT]: { label: "in Postgres", page: "#/messages" },
  [StationKind.DEAD_LETTERS]: { label: "failed messages", page: "#/dead" },
};

const states: Record<StationState, string> = {
  [StationState.UNSPECIFIED]: "unknown",
  [StationState.OK]: "ok",
  [StationState.ATTENTION]: "attention",
  [StationState.FAULT]: "fault",
  [StationState.UNKNOWN]: "unknown",
};

/** Labels of the numbers, for the stations that have them. */
const waitingName: Partial<Record<StationKind, string>> = {
  [StationKind.OUTBOX]: "waiting",
  [StationKind.QUEUE]: "ready",
  [StationKind.GROUP]: "retrying",
  [StationKind.DEAD_LETTERS]: "open",
};
const lagName: Partial<Record<StationKind, string>> = {
  [StationKind.OUTBOX]: "oldest",
  [StationKind.GROUP]: "oldest",
  [StationKind.EFFECT]: "after insert",
};

/** Card displays a station. Its elements are created once, and updates change their texts. */
class Card {
  readonly element: HTMLElement;
  private readonly big = h("b");
  private readonly unit = h("span", { class: "unit" });
  private readonly lines = h("span", { class: "lines" });
  private readonly sentence = h("span", { class: "sentence" });
  private readonly state = h("span", { class: "hidden" });

  constructor(station: Station) {
    const kind = kinds[station.kind];
    const name = station.kind === StationKind.QUEUE ? station.group : station.name;
    this.element = h(
      "a",
      { class: "station", href: kind.page, "data-kind": StationKind[station.kind]!.toLowerCase() },
      h("span", { class: "label" }, kind.label),
      h("span", { class: "name", title: station.name }, name),
      this.state,
      h("span", { class: "number" }, this.big, this.unit),
      this.lines,
      this.sentence,
    );
  }

  show(station: Station): void {
    const state = states[station.state];
    this.element.dataset["state"] = state;
    this.element.classList.toggle("moves", (station.rate ?? 0) > 0);
    setText(this.state, state === "ok" ? "" : `, ${state}`);
    const byWaiting = station.kind === StationKind.QUEUE || station.kind === StationKind.DEAD_LETTERS;
    setText(this.big, byWaiting ? number(station.waiting) : station.rate === undefined ? "–" : rate(station.rate));
    setText(this.unit, byWaiting ? waitingName[station.kind]! : "/s");
    setText(this.lines, describe(station, byWaiting));
    setText(this.sentence, station.sentence);
  }
}

function number(n: bigint | undefined): string {
  return n === undefined ? "–" : count(n);
}

/** describe returns the numbers besides the large one. */
function describe(station: Station, byWaiting: boolean): string {
  const parts: string[] = [];
  if (byWaiting && station.rate !== undefined) parts.push(`${rate(station.rate)}/s consumed`);
  if (!byWaiting && station.waiting !== undefined && (station.waiting > 0n || station.kind !== StationKind.GROUP)) {
    parts.push(`${count(station.waiting)} ${waitingName[station.kind] ?? "waiting"}`);
  }
  if (station.lag !== undefined && station.lag > 0) parts.push(`${age(station.lag)} ${lagName[station.kind] ?? ""}`);
  if (station.processes !== undefined) parts.push(plural(station.processes, "process", "processes"));
  return parts.join(" · ");
}

/** headline summarizes the state in one sentence, and lists the problems. */
function headline(live: Live): Node[] {
  const isWrong = (s: Station) => s.state === StationState.FAULT || s.state === StationState.ATTENTION;
  const wrong = live.stations.filter((s) => s.sentence && isWrong(s));
  wrong.sort((a, b) => b.state - a.state); // faults first
  const faults = wrong.filter((s) => s.state === StationState.FAULT);
  const effects = live.stations.filter((s) => s.kind === StationKind.EFFECT);
  const applied = effects.reduce((sum, s) => sum + (s.rate ?? 0), 0);
  const moving = applied > 0 ? `${rate(applied)} effects per second.` : "No effects at the moment.";
  const title =
    faults.length === 1
      ? `${nameOf(faults[0]!)} does not work.`
      : faults.length > 0
        ? `${faults.length} stations do not work.`
        : wrong.length > 0
          ? `The service works; ${plural(wrong.length, "station needs", "stations need")} attention.`
          : `All stations work. ${moving}`;
  const list = wrong.map((s) =>
    h("li", { "data-state": states[s.state] }, h("a", { href: kinds[s.kind].page }, nameOf(s)), ` ${s.sentence}`),
  );
  return [h("h1", {}, title), ...(list.length > 0 ? [h("ul", {}, ...list)] : [])];
}

function nameOf(station: Station): string {
  return station.kind === StationKind.GROUP
    ? `Group ${station.group}`
    : station.name.replace(/^[a-z]/, (letter) => letter.toUpperCase());
}

/** flow is the first page. */
export function flow({ signal }: Context): Node {
  const head = h("section", { class: "headline", role: "status", "aria-live": "polite" });
  const picture = h("section", { class: "picture", "aria-label": "Flow of messages" });
  const graphs = h("section", { class: "charts", "aria-label": "The last 15 minutes" });
  const cards = new Map<string, Card>();
  let drawn = "";
  let shown = "";
  const draw = charts(graphs, signal);

  follow((live) => {
    if (live.stations.length === 0) {
      const connecting = live.problem === "connecting";
      const title = h("h1", {}, connecting ? "Connecting …" : "There are no samples.");
      fill(head, title, h("p", {}, connecting ? "" : live.problem));
      return;
    }
    const shape = live.stations.map(id).join();
    if (shape !== drawn) {
      cards.clear();
      for (const station of live.stations) cards.set(id(station), new Card(station));
      fill(picture, ...arrange(live.stations, cards));
      drawn = shape;
    }
    for (const station of live.stations) cards.get(id(station))!.show(station);
    picture.classList.toggle("stale", live.problem !== "");
    const now = headline(live);
    const text = now.map((node) => node.textContent).join();
    if (text !== shown) {
      fill(head, ...now);
      head.dataset["state"] = worst(live.stations);
      shown = text;
    }
    draw(live.series);
  }, signal);
  return h("div", { class: "page flow" }, head, picture, graphs);
}

function id(station: Station): string {
  return `${station.kind}/${station.name}/${station.group}`;
}

function worst(stations: Station[]): string {
  const has = (state: StationState) => stations.some((s) => s.state === state);
  return has(StationState.FAULT) ? "fault" : has(StationState.ATTENTION) ? "attention" : "ok";
}

/** arrange lays out the trunk from left to right, and a lane for each group that branches off it. */
function arrange(stations: Station[], cards: Map<string, Card>): Node[] {
  const card = (station: Station) => cards.get(id(station))!.element;
  const groups = [...new Set(stations.map((s) => s.group).filter((g) => g))];
  const alone = stations.filter((s) => !s.group);
  return [
    h(
      "div",
      { class: "left" },
      h("div", { class: "trunk" }, ...alone.filter((s) => s.kind !== StationKind.DEAD_LETTERS).map(card)),
      h("div", { class: "aside" }, ...alone.filter((s) => s.kind === StationKind.DEAD_LETTERS).map(card)),
    ),
    h(
      "div",
      { class: "lanes" },
      ...groups.map((g) => h("div", { class: "lane" }, ...stations.filter((s) => s.group === g).map(card))),
    ),
  ];
}
