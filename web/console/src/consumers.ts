// Consumer groups, the keys that are blocked, and what operators did.
import type { AuditEntry, BlockedKey, Group } from "../../src/gen/ops/v1/ops_pb.js";
import { api } from "./api.js";
import { fill, h } from "./dom.js";
import { age, clock, count, plural, rate, shortType, since } from "./format.js";
import { ask, button, type Context, empty, link, loaded, pageOf, table } from "./parts.js";

export function consumers(context: Context): Node {
  const box = h("div");
  const show = () =>
    fill(box, loaded(() => api.listGroups({}, { signal: context.signal }), (all) => h("div", {}, groups(context, all.groups, show), keys(context, all.blockedKeys, show), log(all.audit)), context.signal));
  show();
  return h("div", { class: "page" }, h("div", { class: "title" }, h("h1", {}, "Consumers"), button("Refresh", show, "quiet")), box);
}

function groups({ mayAct }: Context, all: Group[], renew: () => void): Node {
  const toggle = async (group: Group) => {
    const pause = group.pausedBy === "";
    const done = await ask({
      title: pause ? `Pause ${group.name}` : `Resume ${group.name}`,
      text: pause ? "Its consumers finish what they have taken and take no more. Messages wait in the queue until it is resumed." : "Its consumers go on with what waits.",
      verb: pause ? "Pause" : "Resume",
      danger: pause,
      act: async (reason) => {
        if (pause) await api.pauseGroup({ group: group.name, reason });
        else await api.resumeGroup({ group: group.name, reason });
        return pause ? `Group ${group.name} is paused.` : `Group ${group.name} goes on.`;
      },
    });
    if (done) renew();
  };
  return table<Group>(
    "Consumer groups",
    [
      { name: "Group", cell: (g) => h("strong", {}, g.name) },
      { name: "State", cell: (g) => state(g) },
      { name: "Rate", class: "number", cell: (g) => `${rate(g.rate)}/s` },
      { name: "Age at effect", class: "number", cell: (g) => (g.lag === undefined ? "–" : age(g.lag)) },
      { name: "Ready", class: "number", cell: (g) => (g.queued === undefined ? "–" : count(g.queued)) },
      { name: "Retrying", class: "number", cell: (g) => count(g.retrying) },
      { name: "Oldest", class: "number", cell: (g) => (g.retrying > 0n ? age(g.oldest) : "–") },
      { name: "Wants", cell: (g) => h("span", { title: g.types.join(", ") }, g.types.map(shortType).join(", ")) },
      ...(mayAct ? [{ name: "", class: "acts", cell: (g: Group) => button(g.pausedBy ? "Resume" : "Pause", () => void toggle(g)) }] : []),
    ],
    all,
  );
}

function state(group: Group): Node {
  if (group.pausedBy) return h("span", { class: "tag attention", title: `${group.pausedBy}, ${clock(group.pauseTime)}: ${group.pauseReason}` }, `paused by ${group.pausedBy}`);
  if (group.processes === 0) return h("span", { class: "tag fault" }, "no process");
  return h("span", { class: "tag ok" }, plural(group.processes, "process", "processes"));
}

function keys({ mayAct }: Context, all: BlockedKey[], renew: () => void): Node {
  if (all.length === 0) return h("section", {}, h("h2", {}, "Blocked keys"), empty("No key is blocked.", "A key is blocked while its first message is tried again; those behind it wait, and other keys go on."));
  const bury = async (key: BlockedKey, whole: boolean) => {
    const done = await ask({
      title: whole ? `Park key ${key.key}` : `Skip the first message of ${key.key}`,
      text: whole
        ? `Moves all ${plural(key.waiting, "message")} of the key to the dead letters. They can be redriven from there, in their order.`
        : "Moves the message that fails to the dead letters; the next one of the key goes on. Redriven later, it comes last of its key.",
      verb: whole ? "Park" : "Skip",
      danger: true,
      act: async (reason) => `${plural((await api.buryKey({ group: key.group, key: key.key, whole, reason })).moved, "message is a dead letter", "messages are dead letters")} now.`,
    });
    if (done) renew();
  };
  return h(
    "section",
    {},
    h("h2", {}, "Blocked keys"),
    table<BlockedKey>(
      "Blocked keys",
      [
        { name: "Key", class: "mono", cell: (k) => k.key },
        { name: "Group", cell: (k) => k.group },
        { name: "Waiting", class: "number", cell: (k) => count(k.waiting) },
        { name: "For", class: "number", cell: (k) => since(k.since) },
        { name: "Attempts", class: "number", cell: (k) => count(k.attempts) },
        { name: "Next try", class: "time", cell: (k) => clock(k.dueTime) },
        { name: "First message", class: "mono", cell: (k) => link(`${k.messageId.slice(0, 8)}…`, pageOf("messages", k.messageId)) },
        { name: "Last error", class: "long", cell: (k) => k.lastError },
        ...(mayAct
          ? [{ name: "", class: "acts", cell: (k: BlockedKey) => h("span", {}, button("Skip", () => void bury(k, false)), button("Park", () => void bury(k, true))) }]
          : []),
      ],
      all,
    ),
    all.length >= 200 && h("p", { class: "hint" }, "Only the 200 that have waited longest are shown."),
  );
}

function log(all: AuditEntry[]): Node | false {
  return (
    all.length > 0 &&
    h(
      "section",
      {},
      h("h2", {}, "What operators did"),
      table<AuditEntry>(
        "Audit log",
        [
          { name: "When", class: "time", cell: (e) => clock(e.at) },
          { name: "Who", cell: (e) => e.actor },
          { name: "What", cell: (e) => h("strong", { class: "clip", title: e.action }, e.action) },
          { name: "To", class: "mono", cell: (e) => e.target },
          { name: "Why", class: "long", cell: (e) => e.reason },
          { name: "Effect", cell: (e) => e.detail },
        ],
        all,
      ),
    )
  );
}
