// Search for messages, and the history of one.
import { timestampFromDate } from "@bufbuild/protobuf/wkt";
import type { GetMessageResponse, Message, Payload, Step } from "../../src/gen/ops/v1/ops_pb.js";
import { api } from "./api.js";
import { h } from "./dom.js";
import { clock, count, plural, shortType } from "./format.js";
import { button, type Context, empty, facts, field, link, loaded, pageOf, search, table } from "./parts.js";

export function messages(context: Context): Node {
  const id = context.path[0];
  return h("div", { class: "page" }, id ? inspect(context, id) : list(context));
}

function list(context: Context): Node {
  const { query, signal } = context;
  const value = (name: string) => query.get(name) ?? "";
  const form = h(
    "form",
    { class: "filter", role: "search" },
    field("Message ID", h("input", { type: "search", name: "id", autocomplete: "off" })),
    field("Key", h("input", { type: "search", name: "key", value: value("key"), autocomplete: "off" })),
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
    field("From", h("input", { type: "datetime-local", name: "since", value: value("since") })),
    field("Until", h("input", { type: "datetime-local", name: "until", value: value("until") })),
    h("button", { type: "submit", class: "primary" }, "Search"),
  );
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const id = String(new FormData(form).get("id")).trim();
    if (id) location.hash = pageOf("messages", id);
    else search("messages", form);
  });
  const token = BigInt(query.get("page") ?? 0);
  const time = (name: string) => (value(name) ? timestampFromDate(new Date(value(name))) : undefined);
  const request = {
    key: value("key"),
    type: value("type"),
    since: time("since"),
    until: time("until"),
    pageToken: token,
  };
  const load = () => api.searchMessages(request, { signal });
  const lead = "The messages in the outbox, newest first. An ID also finds messages that are no longer in the outbox.";
  return h(
    "div",
    {},
    h("h1", {}, "Messages"),
    h("p", { class: "lead" }, lead),
    form,
    loaded(load, (page) => results(page.messages, page.nextPageToken, query), signal),
  );
}

function results(found: Message[], next: bigint, query: URLSearchParams): Node {
  if (found.length === 0) {
    const hint =
      "The outbox keeps delivered messages for about a day. The inboxes of the groups keep them longer: search by ID.";
    return empty("No message found.", hint);
  }
  const more = new URLSearchParams(query);
  more.set("page", String(next));
  return h(
    "div",
    {},
    table<Message>(
      "Messages",
      [
        { name: "Inserted", class: "time", cell: (m) => clock(m.insertTime, true) },
        { name: "Type", cell: (m) => h("span", { class: "clip", title: m.type }, shortType(m.type)) },
        { name: "Key", class: "mono", cell: (m) => m.key },
        { name: "Message", class: "mono", cell: (m) => link(m.messageId, pageOf("messages", m.messageId)) },
        {
          name: "State",
          cell: (m) =>
            h("span", { class: `tag ${m.delivered ? "ok" : "attention"}` }, m.delivered ? "delivered" : "waiting"),
        },
      ],
      found,
    ),
    next > 0n && h("p", { class: "pager" }, link("Older", `#/messages?${more}`)),
  );
}

function inspect({ signal }: Context, id: string): Node {
  return h(
    "div",
    {},
    link("← Messages", "#/messages", "back"),
    h("h1", { class: "id" }, id),
    loaded(() => api.getMessage({ messageId: id }, { signal }), details, signal),
  );
}

function details(message: GetMessageResponse): Node {
  const first = message.copies[0];
  const letters = message.letterIds.map((letter) => link(`dead letter ${letter}`, pageOf("dead", String(letter))));
  return h(
    "div",
    {},
    facts(
      ["Type", message.type],
      ["Key", h("span", { class: "mono" }, message.key)],
      ["Transaction", first ? `${first.transactionId}, shard ${first.shard}` : "not in the outbox"],
      ["Copies in the outbox", count(message.copies.length)],
      ["Dead letters", letters.length ? h("span", {}, ...letters) : "none"],
    ),
    h("h2", {}, "History"),
    h("ol", { class: "timeline" }, ...message.steps.map(step)),
    message.payload && payload(message.payload),
    headers(message.headers),
  );
}

function step({ at, where, what }: Step): Node {
  return h(
    "li",
    { class: at ? "" : "open" },
    h("time", {}, at ? clock(at, true) : ""),
    h("span", { class: "where" }, where),
    h("span", {}, what),
  );
}

/** payload shows the payload of a message. */
export function payload(p: Payload): Node {
  const copy = button("Copy", () => void navigator.clipboard?.writeText(p.text), "quiet");
  const format = p.decoded ? "decoded" : "hex, since the type is unknown or the payload cannot be decoded";
  return h(
    "section",
    {},
    h("h2", {}, "Payload ", h("small", {}, `${plural(p.size, "byte")}, ${format}${p.cut ? ", truncated" : ""}`), copy),
    h("pre", { class: "payload", tabindex: 0 }, p.text || "(empty)"),
  );
}

export function headers(all: Record<string, string>): Node | false {
  const pairs = Object.keys(all)
    .sort()
    .map((name): [string, string] => [name, all[name]!]);
  return pairs.length > 0 && h("section", {}, h("h2", {}, "Headers"), facts(...pairs));
}
