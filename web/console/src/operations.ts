// Durable calls: states, errors and cancellation.
import { createClient } from "@connectrpc/connect";
import { type Operation, OperationsService } from "../../src/gen/ops/v1/operations_pb.js";
import { transport } from "./api.js";
import { fill, h } from "./dom.js";
import { clock, count, shortType } from "./format.js";
import { ask, button, type Context, empty, field, link, loaded, pageOf, search, select, table } from "./parts.js";

const api = createClient(OperationsService, transport);

const tags: Record<string, string> = {
  pending: "",
  running: "attention",
  succeeded: "ok",
  failed: "fault",
  cancelled: "",
};

export function operations(context: Context): Node {
  const { query, signal } = context;
  const state = query.get("state") ?? "";
  const states = Object.keys(tags).map((name): [string, string] => [name, name]);
  const form = h(
    "form",
    { class: "filter one", role: "search" },
    field("State", select("state", state, [["", "any"], ...states])),
    h("button", { type: "submit", class: "primary" }, "Filter"),
  );
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    search("operations", form);
  });
  const box = h("div");
  const load = () => api.listOperations({ state, pageToken: query.get("page") ?? "" }, { signal });
  const show = (): void =>
    fill(box, loaded(load, (page) => results(context, page.operations, page.nextPageToken, show), signal));
  show();
  return h(
    "div",
    { class: "page" },
    h("div", { class: "title" }, h("h1", {}, "Operations"), button("Refresh", show, "quiet")),
    h("p", { class: "lead" }, "Durable calls: accepted at once, executed later. Only their callers get the responses."),
    form,
    box,
  );
}

function results({ mayAct, query }: Context, all: Operation[], next: string, renew: () => void): Node {
  if (all.length === 0) {
    const hint =
      "A call with the header Prefer: respond-async becomes an operation, which is kept for seven days after its end.";
    return empty("No operations.", hint);
  }
  const cancel = async ({ id, method, caller }: Operation) => {
    const name = caller || "an unnamed caller";
    const done = await ask({
      title: "Cancel operation",
      text: `Cancels ${method} of ${name}, if no worker has begun it. The caller can read the reason.`,
      verb: "Cancel operation",
      danger: true,
      act: async (reason) => (await api.cancelOperation({ id, reason }), "The operation is cancelled."),
    });
    if (done) renew();
  };
  const more = new URLSearchParams(query);
  more.set("page", next);
  return h(
    "div",
    {},
    table<Operation>(
      "Operations",
      [
        { name: "Accepted", class: "time", cell: (o) => clock(o.createTime) },
        { name: "Method", cell: (o) => h("span", { class: "clip", title: o.method }, shortType(o.method)) },
        { name: "Caller", cell: (o) => o.caller },
        { name: "State", cell: (o) => h("span", { class: `tag ${tags[o.state] ?? ""}` }, o.state) },
        { name: "Attempts", class: "number", cell: (o) => count(o.attempts) },
        { name: "Ended", class: "time", cell: (o) => clock(o.endTime) },
        { name: "Error", class: "long", cell: (o) => o.error },
        { name: "Message", class: "mono", cell: (o) => link(`${o.id.slice(0, 8)}…`, pageOf("messages", o.id)) },
        ...(mayAct
          ? [
              {
                name: "",
                class: "acts",
                cell: (o: Operation) => (o.state === "pending" ? button("Cancel", () => void cancel(o)) : "\u00a0"),
              },
            ]
          : []),
      ],
      all,
    ),
    next !== "" && h("p", { class: "pager" }, link("Older", `#/operations?${more}`)),
  );
}
