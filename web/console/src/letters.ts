// Dead letters: filter, inspect, redrive, discard and reopen.
import { timestampFromDate } from "@bufbuild/protobuf/wkt";
import { type DeadLetter, Resolution } from "../../src/gen/ops/v1/ops_pb.js";
import { api } from "./api.js";
import { fill, h } from "./dom.js";
import { clock, count, plural, shortType } from "./format.js";
import { headers, payload } from "./messages.js";
import {
  ask,
  button,
  type Context,
  empty,
  facts,
  field,
  link,
  loaded,
  pageOf,
  search,
  select,
  table,
} from "./parts.js";

export function deadLetters(context: Context): Node {
  const id = context.path[0];
  return h("div", { class: "page" }, id && /^\d+$/.test(id) ? inspect(context, BigInt(id)) : list(context));
}

/** filterOf returns the filter in the address. */
function filterOf(query: URLSearchParams) {
  const value = (name: string) => query.get(name) ?? "";
  const time = (name: string) => (value(name) ? timestampFromDate(new Date(value(name))) : undefined);
  return {
    group: value("group"),
    messageId: value("message"),
    type: value("type"),
    key: value("key"),
    cause: value("cause"),
    since: time("since"),
    until: time("until"),
    resolved: value("show") === "all",
  };
}

function list(context: Context): Node {
  const { query, signal } = context;
  const value = (name: string) => query.get(name) ?? "";
  const any: [string, string] = ["", "any"];
  const same = (text: string): [string, string] => [text, text];
  const form = h(
    "form",
    { class: "filter four", role: "search" },
    field("Group", select("group", value("group"), [any, same("relay"), ...context.groups.map(same)])),
    field("Cause", select("cause", value("cause"), [any, ...context.causes.map(same)])),
    field(
      "Type",
      h("input", {
        type: "search",
        name: "type",
        value: value("type"),
        placeholder: "full name",
        autocomplete: "off",
      }),
    ),
    field("Key", h("input", { type: "search", name: "key", value: value("key"), autocomplete: "off" })),
    field("Died from", h("input", { type: "datetime-local", name: "since", value: value("since") })),
    field("Until", h("input", { type: "datetime-local", name: "until", value: value("until") })),
    field("Show", select("show", value("show"), [["", "open"], ["all", "open and resolved"]])),
    h("button", { type: "submit", class: "primary" }, "Filter"),
  );
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    search("dead", form);
  });
  const token = BigInt(query.get("page") ?? 0);
  const box = h("div");
  const show = () =>
    fill(
      box,
      loaded(
        () => api.listDeadLetters({ filter: filterOf(query), pageToken: token, count: true }, { signal }),
        (page) => results(context, page.letters, page.nextPageToken, page.count, show),
        signal,
      ),
    );
  show();
  const lead =
    "Messages that could not be published or applied. The audit log records every message that leaves this list.";
  return h("div", {}, h("h1", {}, "Dead letters"), h("p", { class: "lead" }, lead), form, box);
}

function results(context: Context, letters: DeadLetter[], next: bigint, total: bigint, renew: () => void): Node {
  if (letters.length === 0) {
    return [...context.query.keys()].length > 0
      ? empty("No dead letter matches.", "To include resolved dead letters, set Show to “open and resolved”.")
      : empty("No dead letters.", "Every message was published and applied, or is being retried.");
  }
  const picked = new Set<bigint>();
  const bar = h("div", { class: "bar", "aria-live": "polite" });
  const more = new URLSearchParams(context.query);
  more.set("page", String(next));
  const showBar = () => fill(bar, ...actions(context, picked, total, renew));
  const box = (letter: DeadLetter) =>
    letter.resolution
      ? ""
      : h("input", {
          type: "checkbox",
          "aria-label": `Select dead letter ${letter.id}`,
          onchange: (event) => {
            if ((event.target as HTMLInputElement).checked) picked.add(letter.id);
            else picked.delete(letter.id);
            showBar();
          },
        });
  showBar();
  return h(
    "div",
    {},
    bar,
    table<DeadLetter>(
      "Dead letters",
      [
        ...(context.mayAct ? [{ name: "Select", class: "check", cell: box }] : []),
        { name: "ID", class: "number", cell: (l: DeadLetter) => link(String(l.id), pageOf("dead", String(l.id))) },
        { name: "Died", class: "time", cell: (l: DeadLetter) => clock(l.deadTime) },
        { name: "Group", cell: (l: DeadLetter) => l.group },
        { name: "Cause", cell: (l: DeadLetter) => h("span", { class: "tag" }, l.cause) },
        { name: "Type", cell: (l: DeadLetter) => h("span", { class: "clip", title: l.type }, shortType(l.type)) },
        { name: "Key", class: "mono", cell: (l: DeadLetter) => l.key },
        { name: "Error", class: "long", cell: (l: DeadLetter) => l.error },
        { name: "State", cell: (l: DeadLetter) => state(l) },
      ],
      letters,
    ),
    next > 0n && h("p", { class: "pager" }, link("Older", `#/dead?${more}`)),
  );
}

function state(letter: DeadLetter): Node {
  return h("span", { class: `tag ${letter.resolution ? "" : "attention"}` }, letter.resolution || "open");
}

function actions(context: Context, picked: Set<bigint>, total: bigint, renew: () => void): Node[] {
  const some = picked.size > 0;
  const scope = context.query.get("show") === "all" ? "in total" : "open";
  const text = some ? `${plural(picked.size, "dead letter")} selected` : `${plural(total, "dead letter")} ${scope}`;
  const status = h("span", {}, text);
  if (!context.mayAct) return [status];
  const shown = filterOf(context.query);
  const filter = some ? { ids: [...picked] } : { ...shown, until: shown.until ?? timestampFromDate(new Date()) };
  const what = some ? plural(picked.size, "selected dead letter") : "all dead letters that match the filter";
  const start = (resolution: Resolution) => async () => {
    if (await resolve(filter, what, resolution)) renew();
  };
  return [
    status,
    button(some ? "Redrive" : "Redrive all …", start(Resolution.REDRIVE), "primary"),
    button(some ? "Discard" : "Discard all …", start(Resolution.DISCARD), "danger"),
  ];
}

/** resolve asks for a reason, offers a dry run, and resolves the dead letters. */
export function resolve(filter: object, what: string, resolution: Resolution): Promise<boolean> {
  const redrive = resolution === Resolution.REDRIVE;
  const force = h("input", { type: "checkbox" });
  const outcome = h("p", { class: "progress", role: "status" });
  const run = async (reason: string, dryRun: boolean, progress: (text: string) => void, signal?: AbortSignal) => {
    let text = "";
    const request = { filter, resolution, reason, dryRun, force: force.checked };
    for await (const at of api.resolveDeadLetters(request, { signal })) {
      const done = at.redriven + at.duplicate + at.discarded + at.unresolved;
      const parts = redrive
        ? [`${count(at.redriven)} redriven`, `${count(at.duplicate)} duplicates`]
        : [`${count(at.discarded)} discarded`];
      if (at.unresolved > 0n) parts.push(`${count(at.unresolved)} not resolved (${at.problem})`);
      text = parts.join(", ");
      progress(at.done ? text : `${count(done)} of ${count(at.total)}: ${text}`);
    }
    return text;
  };
  const tryOut = () => {
    const dryRun = run("dry run", true, (text) => (outcome.textContent = `Dry run: ${text}`));
    void dryRun.catch((error: unknown) => (outcome.textContent = String(error)));
  };
  const dry = button("Dry run", tryOut);
  return ask({
    title: redrive ? "Redrive" : "Discard",
    text: redrive
      ? `Sends ${what} again. A message whose effect is committed already is not applied again: it becomes a duplicate.`
      : `Discards ${what}. You can undo a discard later.`,
    verb: redrive ? "Redrive" : "Discard",
    danger: !redrive,
    more: h(
      "div",
      { class: "dry" },
      dry,
      outcome,
      redrive &&
        h(
          "label",
          { class: "check" },
          force,
          " also messages that may have been applied already, because their copies can no longer be detected",
        ),
    ),
    act: (reason, progress, signal) => run(reason, false, progress, signal),
  });
}

function inspect(context: Context, id: bigint): Node {
  const { signal, mayAct } = context;
  const box = h("div");
  const load = () => api.getDeadLetter({ id }, { signal });
  const show = (): void => fill(box, loaded(load, (found) => details(found.letter!, found), signal));
  const details = (letter: DeadLetter, found: Awaited<ReturnType<typeof api.getDeadLetter>>) => {
    const start = (resolution: Resolution) => async () => {
      if (await resolve({ ids: [id] }, `dead letter ${id}`, resolution)) show();
    };
    const reopen = async () => {
      const done = await ask({
        title: "Reopen",
        text: `Reopens dead letter ${id}, which was discarded.`,
        verb: "Reopen",
        act: async (reason) => (await api.reopenDeadLetter({ id, reason }), `Dead letter ${id} is open again.`),
      });
      if (done) show();
    };
    const buttons = !mayAct
      ? []
      : letter.resolution === ""
        ? [
            button("Redrive", start(Resolution.REDRIVE), "primary"),
            button("Discard", start(Resolution.DISCARD), "danger"),
          ]
        : letter.resolution === "discarded"
          ? [button("Reopen", () => void reopen())]
          : [h("span", { class: "hint" }, "Its message is on its way, which cannot be undone.")];
    return h(
      "div",
      {},
      h("div", { class: "bar below" }, state(letter), ...buttons),
      h("p", { class: "error" }, letter.error),
      facts(
        ["Group", letter.group],
        ["Cause", letter.cause],
        ["Attempts", count(letter.attempts)],
        ["Died", clock(letter.deadTime, true)],
        ["Message", letter.messageId ? link(letter.messageId, pageOf("messages", letter.messageId), "mono") : "–"],
        ["Type", letter.type],
        ["Key", h("span", { class: "mono" }, letter.key)],
      ),
      found.audit.length > 0 && h("h2", {}, "Audit log"),
      found.audit.length > 0 &&
        h(
          "ol",
          { class: "timeline" },
          ...found.audit.map((entry) =>
            h(
              "li",
              {},
              h("time", {}, clock(entry.at)),
              h("span", { class: "where" }, entry.action),
              h("span", {}, `${entry.actor}: ${entry.reason}${entry.detail ? ` (${entry.detail})` : ""}`),
            ),
          ),
        ),
      found.payload && payload(found.payload),
      headers(found.headers),
    );
  };
  show();
  return h("div", {}, link("← Dead letters", "#/dead", "back"), h("h1", {}, `Dead letter ${id}`), box);
}
