// The shell of the console: sign-in, navigation, and the state of the connection.
import "uplot/dist/uPlot.min.css";
import "./style.css";
import type { GetSessionResponse } from "../../src/gen/ops/v1/ops_pb.js";
import { StationKind } from "../../src/gen/ops/v1/ops_pb.js";
import { api, isSignedIn, isUnauthenticated, reason, signIn } from "./api.js";
import { consumers } from "./consumers.js";
import { deadLetters } from "./letters.js";
import { fill, h, setText } from "./dom.js";
import { flow } from "./flow.js";
import { count } from "./format.js";
import { follow, watch } from "./live.js";
import { messages } from "./messages.js";
// durable-calls
import { operations } from "./operations.js";
// /durable-calls
import { button, type Context, field } from "./parts.js";
import { relays } from "./relays.js";

const pages: Record<string, { name: string; show: (context: Context) => Node }> = {
  flow: { name: "Flow", show: flow },
  messages: { name: "Messages", show: messages },
  dead: { name: "Dead letters", show: deadLetters },
  consumers: { name: "Consumers", show: consumers },
  // durable-calls
  operations: { name: "Operations", show: operations },
  // /durable-calls
  relays: { name: "Relays", show: relays },
};

let session = new AbortController();

/** begin gets the session, and shows the console or the sign-in form. */
async function begin(): Promise<void> {
  session.abort();
  session = new AbortController();
  try {
    const who = await api.getSession({});
    if (who.mayLook) shell(who, session.signal);
    else signInForm("This credential has neither the role observer nor the role operator.");
  } catch (error) {
    if (isUnauthenticated(error)) {
      signInForm(isSignedIn() ? "This credential is not accepted, or has expired." : "");
      return;
    }
    const retry = button("Try again", () => void begin());
    const problem = h("p", { class: "bad" }, reason(error));
    fill(document.body, h("main", { class: "alone" }, h("h1", {}, "Console"), problem, retry));
  }
}

function signInForm(problem: string): void {
  session.abort();
  const input = h("input", { type: "password", name: "credential", autocomplete: "current-password", required: true });
  const form = h(
    "form",
    { class: "alone" },
    h("h1", {}, "Console"),
    h("p", {}, "Paste an API key or a token with the role observer or operator. It is stored only in this tab."),
    field("API key or token", input),
    problem && h("p", { class: "bad", role: "alert" }, problem),
    h("button", { type: "submit", class: "primary" }, "Sign in"),
  );
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    signIn(input.value.trim());
    void begin();
  });
  fill(document.body, h("main", {}, form));
  input.focus();
}

function shell(who: GetSessionResponse, signal: AbortSignal): void {
  document.title = `${who.service} console`;
  const live = h("span", { class: "live", role: "status" });
  const dead = h("b", { class: "badge" });
  const links = Object.entries(pages).map(([key, page]) =>
    h("a", { href: `#/${key}`, "data-page": key }, page.name, key === "dead" && dead),
  );
  const main = h("main", { id: "main", tabindex: -1 });
  const leave = isSignedIn() && button("Sign out", () => (signIn(""), void begin()), "quiet");
  const name = who.actor + (who.mayAct ? "" : " (read only)");
  fill(
    document.body,
    h(
      "a",
      { href: "#main", class: "skip", onclick: (event) => (event.preventDefault(), main.focus()) },
      "Skip to content",
    ),
    h(
      "header",
      {},
      h("div", { class: "brand" }, h("strong", {}, who.service), h("span", {}, "console")),
      h("nav", { "aria-label": "Pages" }, ...links),
      h("div", { class: "who" }, live, h("span", { class: "actor", title: `version ${who.version}` }, name), leave),
    ),
    main,
    h("div", { id: "toasts", role: "status", "aria-live": "polite" }),
  );
  follow(({ stations, problem }) => {
    setText(live, problem ? "not live" : "live");
    live.title = problem;
    live.classList.toggle("lost", problem !== "");
    const open = stations.find((station) => station.kind === StationKind.DEAD_LETTERS)?.waiting ?? 0n;
    setText(dead, open > 0n ? count(open) : "");
  }, signal);
  void watch(signal, () => signInForm("Your credential has expired."));
  route(who, main, links, signal);
}

/** route shows the page in the address, now and after each change. */
function route(who: GetSessionResponse, main: HTMLElement, links: HTMLElement[], signal: AbortSignal): void {
  let shown = new AbortController();
  const show = () => {
    shown.abort();
    shown = new AbortController();
    const [address = "", query = ""] = location.hash.replace(/^#\/?/, "").split("?");
    const [key = "", ...path] = address.split("/").map(decode);
    const page = pages[key] ?? pages["flow"]!;
    for (const link of links) {
      if (pages[link.dataset["page"]!] === page) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    const context = {
      path,
      query: new URLSearchParams(query),
      signal: shown.signal,
      mayAct: who.mayAct,
      groups: who.groups,
      causes: who.causes,
    };
    fill(main, page.show(context));
    scrollTo(0, 0);
  };
  const turn = () => {
    show();
    main.focus(); // keyboard and screen reader continue in the page
  };
  addEventListener("hashchange", turn, { signal });
  signal.addEventListener("abort", () => shown.abort());
  show();
}

function decode(text: string): string {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

addEventListener("unauthenticated", () => signInForm("Your credential has expired."));
void begin();
