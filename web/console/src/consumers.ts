// Consumer groups, blocked keys, and the latest actions of operators.
import type { AuditEntry, BlockedKey, Group } from "../../src/gen/ops/v1/ops_pb.js";
import { api } from "./api.js";
import { fill, h } from "./dom.js";
import { age, clock, count, plural, rate, shortType, since } from "./format.js";
import { ask, button, type Context, empty, link, loaded, pageOf, table } from "./parts.js";

export function consumers(context: Context): Node {
  const { signal } = context;
  const box = h("div");
  const load = () => api.listGroups({}, { signal });
  const show = (): void =>
    fill(
      box,
      loaded(
        load,
        (all) => h("div", {}, groups(context, all.groups, show), keys(context, all.blockedKeys, show), log(all.audit)),
        signal,
      ),
    );
  show();
  const title = h("div", { class: "title" }, h("h1", {}, "Consumers"), button("Refresh", show, "quiet"));
  return h("div", { class: "page" }, title, box);
}

function groups({ mayAct }: Context, all: Group[], renew: () => void): Node {
  const toggle = async (group: Group) => {
    const pause = group.pausedBy === "";
    const done = await ask({
      title: pause ? `Pause ${group.name}` : `Resume ${group.name}`,
      text: pause
        ? "Its consumers finish their current messages and take no more. " +
          "Messages wait in the queue until the group is resumed."
        : "Its consumers continue with the waiting messages.",
      verb: pause ? "Pause" : "Resume",
      danger: pause,
      act: async (reason) => {
        if (pause) await api.pauseGroup({ group: group.name, reason });
        else await api.resumeGroup({ group: group.name, reason });
        return pause ? `Group ${group.name} is paused.` : `Group ${group.name} is resumed.`;
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
      { name: "Handles", cell: (g) => h("span", { title: g.types.join(", ") }, g.types.map(shortType).join(", ")) },
      ...(mayAct
        ? [
            {
              name: "",
              class: "acts",
              cell: (g: Group) => button(g.pausedBy ? "Resume" : "Pause", () => void toggle(g)),
            },
          ]
        : []),
    ],
    all,
  );
}

function state(group: Group): Node {
  if (group.pausedBy) {
    const title = `${group.pausedBy}, ${clock(group.pauseTime)}: ${group.pauseReason}`;
    return h("span", { class: "tag attention", title }, `paused by ${group.pausedBy}`);
  }
  if (group.processes === 0) return h("span", { class: "tag fault" }, "no process");
  return h("span", { class: "tag ok" }, plural(group.processes, "process", "processes"));
}

function keys({ mayAct }: Context, all: BlockedKey[], renew: () => void): Node {
  if (all.length === 0) {
    const hint =
      "A key is blocked while its first message is retried: the messages behind it wait, and other keys continue.";
    return h("section", {}, h("h2", {}, "Blocked keys"), empty("No key is blocked.", hint));
  }
  const bury = async (key: BlockedKey, whole: boolean) => {
    const done = await ask({
      title: whole ? `Park key ${key.key}` : `Skip the first message of ${key.key}`,
      text: whole
        ? `Moves all ${plural(key.waiting, "message")} of the key to the dead letters. You can redrive them in order.`
        : "Moves the failing message to the dead letters; the next message of the key continues. " +
          "If you redrive it later, it comes last of its key.",
      verb: whole ? "Park" : "Skip",
      danger: true,
      act: async (reason) => {
        const { moved } = await api.buryKey({ group: key.group, key: key.key, whole, reason });
        return `${plural(moved, "message is now a dead letter", "messages are now dead letters")}.`;
      },
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
        { name: "Blocked for", class: "number", cell: (k) => since(k.since) },
        { name: "Attempts", class: "number", cell: (k) => count(k.attempts) },
        { name: "Next attempt", class: "time", cell: (k) => clock(k.dueTime) },
        {
          name: "First message",
          class: "mono",
          cell: (k) => link(`${k.messageId.slice(0, 8)}…`, pageOf("messages", k.messageId)),
        },
        { name: "Last error", class: "long", cell: (k) => k.lastError },
        ...(mayAct
          ? [
              {
                name: "",
                class: "acts",
                cell: (k: BlockedKey) =>
                  h("span", {}, button("Skip", () => void bury(k, false)), button("Park", () => void bury(k, true))),
              },
            ]
          : []),
      ],
      all,
    ),
    all.length >= 200 && h("p", { class: "hint" }, "Only the 200 keys that have been blocked longest are shown."),
  );
}

function log(all: AuditEntry[]): Node | false {
  return (
    all.length > 0 &&
    h(
      "section",
      {},
      h("h2", {}, "Actions of operators"),
      table<AuditEntry>(
        "Audit log",
        [
          { name: "Time", class: "time", cell: (e) => clock(e.at) },
          { name: "Operator", cell: (e) => e.actor },
          { name: "Action", cell: (e) => h("strong", { class: "clip", title: e.action }, e.action) },
          { name: "Target", class: "mono", cell: (e) => e.target },
          { name: "Reason", class: "long", cell: (e) => e.reason },
          { name: "Effect", cell: (e) => e.detail },
        ],
        all,
      ),
    )
  );
}
