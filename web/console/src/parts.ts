// Building blocks of the pages.
import { isUnauthenticated, reason } from "./api.js";
import { fill, h } from "./dom.js";

/** Context is the input of a page. */
export interface Context {
  /** The rest of the address, split at slashes, such as the ID of a message. */
  path: string[];
  query: URLSearchParams;
  /** Aborted when the user leaves the page. */
  signal: AbortSignal;
  mayAct: boolean;
  groups: string[];
  causes: string[];
}

/** loaded shows the result of a promise, after a placeholder, or its error with a button to try again. */
export function loaded<T>(load: () => Promise<T>, show: (value: T) => Node, signal: AbortSignal): HTMLElement {
  const box = h("div", { class: "loaded", "aria-busy": "true" }, skeleton());
  const run = async () => {
    try {
      const value = await load();
      if (!signal.aborted) fill(box, show(value));
    } catch (error) {
      if (!signal.aborted) fill(box, failed(error, () => void run()));
    }
    box.setAttribute("aria-busy", "false");
  };
  void run();
  return box;
}

function skeleton(): HTMLElement {
  return h("div", { class: "skeleton", role: "status", "aria-label": "Loading" }, h("i"), h("i"), h("i"));
}

export function failed(error: unknown, again: () => void): HTMLElement {
  if (isUnauthenticated(error)) dispatchEvent(new Event("unauthenticated"));
  return h(
    "div",
    { class: "state bad", role: "alert" },
    h("strong", {}, "This could not be loaded."),
    h("p", {}, reason(error)),
    button("Try again", again),
  );
}

export function empty(title: string, hint: string): HTMLElement {
  return h("div", { class: "state" }, h("strong", {}, title), h("p", {}, hint));
}

export function button(text: string, onclick: () => void, kind = ""): HTMLButtonElement {
  return h("button", { type: "button", class: kind, onclick }, text);
}

export interface Column<T> {
  name: string;
  class?: string;
  cell: (row: T) => Node | string;
}

/** table shows rows. On a narrow screen each row becomes a card whose lines are labelled with the column names. */
export function table<T>(caption: string, columns: Column<T>[], rows: T[]): HTMLElement {
  const cell = (column: Column<T>, row: T) =>
    h("td", { class: column.class ?? "", "data-label": column.name }, clip(column.cell(row)));
  return h(
    "div",
    { class: "table" },
    h(
      "table",
      {},
      h("caption", {}, caption),
      h("thead", {}, h("tr", {}, ...columns.map((column) => h("th", { class: column.class ?? "" }, column.name)))),
      h(
        "tbody",
        {},
        ...rows.map((row) => h("tr", {}, ...columns.map((column) => cell(column, row)))),
      ),
    ),
  );
}

/** clip shortens a long text in a table. The whole text is in its title and on the page of the row. */
function clip(cell: Node | string): Node {
  return typeof cell === "string" ? h("span", { class: "clip", title: cell }, cell || "–") : cell;
}

/** facts is a list of names and values. */
export function facts(...pairs: [string, Node | string][]): HTMLElement {
  const fact = ([name, value]: [string, Node | string]) => h("div", {}, h("dt", {}, name), h("dd", {}, value || "–"));
  return h("dl", { class: "facts" }, ...pairs.map(fact));
}

/** field is an input with its label. */
export function field(label: string, input: HTMLElement): HTMLElement {
  return h("label", { class: "field" }, h("span", {}, label), input);
}

export function select(name: string, value: string, options: [string, string][]): HTMLSelectElement {
  const element = h("select", { name }, ...options.map(([key, text]) => h("option", { value: key }, text)));
  element.value = value;
  return element;
}

export function link(text: string, href: `#${string}`, cls = ""): HTMLElement {
  return h("a", { href, class: cls }, text);
}

export function pageOf(kind: string, id: string): `#${string}` {
  return `#/${kind}/${encodeURIComponent(id)}`;
}

/** search opens a page with the values of a form in its address. */
export function search(page: string, form: HTMLFormElement): void {
  const query = new URLSearchParams();
  for (const [name, value] of new FormData(form)) if (String(value).trim()) query.set(name, String(value).trim());
  location.hash = `#/${page}${query.size ? `?${query}` : ""}`;
}

/** toast shows a text for six seconds. */
export function toast(text: string): void {
  const line = h("p", { class: "toast" }, text);
  const all = document.getElementById("toasts")!;
  all.append(line);
  if (all.childElementCount > 2) all.firstElementChild!.remove();
  setTimeout(() => line.remove(), 6000);
}

export interface Act {
  title: string;
  /** The effect, in a sentence or two. */
  text: string;
  /** The label of the button. */
  verb: string;
  danger?: boolean;
  more?: Node;
  /** act does it, and returns what it has done. It may report its progress. */
  act: (reason: string, progress: (text: string) => void, signal: AbortSignal) => Promise<string>;
}

/** ask asks for a reason, acts, and shows the result. It returns true if act succeeded. */
export function ask(act: Act): Promise<boolean> {
  const why = h("textarea", { name: "reason", rows: 2, required: true, placeholder: "Recorded in the audit log" });
  const status = h("p", { class: "progress", role: "status" });
  const confirm = h("button", { type: "submit", class: act.danger ? "danger" : "primary" }, act.verb);
  const leave = new AbortController();
  const form = h(
    "form",
    { class: "ask" },
    h("h2", {}, act.title),
    h("p", {}, act.text),
    act.more,
    field("Reason", why),
    status,
    h("div", { class: "buttons" }, button("Cancel", () => dialog.close()), confirm),
  );
  const dialog = h("dialog", { "aria-label": act.title }, form);
  let done = false;
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    void (async () => {
      confirm.disabled = true;
      status.className = "progress";
      try {
        const result = await act.act(why.value.trim(), (text) => (status.textContent = text), leave.signal);
        done = true;
        toast(result);
        dialog.close();
      } catch (error) {
        status.className = "progress bad";
        status.textContent = reason(error);
        confirm.disabled = false;
      }
    })();
  });
  document.body.append(dialog);
  dialog.showModal();
  return new Promise((resolve) =>
    dialog.addEventListener("close", () => {
      leave.abort();
      dialog.remove();
      resolve(done);
    }),
  );
}
