// Live relays, and the shards with their leases.
import type { Relay, Shard } from "../../src/gen/ops/v1/ops_pb.js";
import { api } from "./api.js";
import { fill, h } from "./dom.js";
import { age, count, since } from "./format.js";
import { button, type Context, empty, loaded, table } from "./parts.js";

export function relays({ signal }: Context): Node {
  const box = h("div");
  const load = () => api.listRelays({}, { signal });
  const show = () =>
    fill(box, loaded(load, ({ shards, relays }) => h("div", {}, alive(relays, shards), held(shards)), signal));
  show();
  const title = h("div", { class: "title" }, h("h1", {}, "Relays"), button("Refresh", show, "quiet"));
  return h("div", { class: "page" }, title, box);
}

function alive(all: Relay[], shards: Shard[]): Node {
  if (all.length === 0) return empty("No relay is alive.", "Messages wait in the outbox until one runs; none is lost.");
  return table<Relay>(
    "Live relays",
    [
      { name: "Relay", class: "mono", cell: (r) => r.owner },
      { name: "Shards", class: "number", cell: (r) => count(shards.filter((s) => s.owner === r.owner).length) },
      {
        name: "State",
        cell: (r) =>
          h("span", { class: `tag ${r.problem ? "fault" : "ok"}` }, r.problem ? "cannot publish" : "publishes"),
      },
      { name: "Problem", class: "long", cell: (r) => r.problem },
    ],
    all,
  );
}

function held(all: Shard[]): Node {
  return h(
    "section",
    {},
    h("h2", {}, "Shards"),
    table<Shard>(
      "Shards of the outbox",
      [
        { name: "Shard", class: "number", cell: (s) => String(s.shard) },
        { name: "Lease", class: "mono", cell: (s) => (s.owner ? s.owner : h("span", { class: "tag fault" }, "free")) },
        { name: "Epoch", class: "number", cell: (s) => count(s.epoch) },
        { name: "Backlog", class: "number", cell: (s) => count(s.backlog) },
        { name: "Oldest", class: "number", cell: (s) => (s.backlog > 0n ? age(s.lag) : "–") },
        { name: "Published", class: "number", cell: (s) => count(s.published) },
        { name: "Parked", class: "number", cell: (s) => count(s.parked) },
        { name: "Last move", class: "number", cell: (s) => `${since(s.moveTime)} ago` },
        { name: "Generation", class: "number", cell: (s) => `${s.generation}${s.retired ? ", retired" : ""}` },
      ],
      all,
    ),
  );
}
