// The one way in which the console makes elements. Whatever comes from a message, a key or an error becomes a text node or a plain attribute and is
// never parsed: there is no innerHTML here and nowhere else.

type Child = Node | string | number | null | undefined | false;

/** Attributes that may be set: none of them runs a script, and a link leads to a page of the console only. */
interface Attributes {
  class?: string;
  href?: `#${string}`;
  title?: string;
  id?: string;
  for?: string;
  type?: "button" | "submit" | "text" | "search" | "password" | "checkbox" | "datetime-local";
  name?: string;
  value?: string;
  placeholder?: string;
  rows?: number;
  colspan?: number;
  autocomplete?: "off" | "current-password";
  role?: string;
  disabled?: boolean;
  checked?: boolean;
  required?: boolean;
  open?: boolean;
  tabindex?: number;
  [aria: `aria-${string}`]: string;
  [data: `data-${string}`]: string | number;
  onclick?: (event: MouseEvent) => void;
  onchange?: (event: Event) => void;
  onsubmit?: (event: SubmitEvent) => void;
}

/** h makes an element. */
export function h<K extends keyof HTMLElementTagNameMap>(tag: K, attributes: Attributes = {}, ...children: Child[]): HTMLElementTagNameMap[K] {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") {
      element.addEventListener(name.slice(2), value as EventListener);
    } else if (name === "href" && !String(value).startsWith("#")) {
      throw new Error("links lead to pages of the console");
    } else if (value === true) {
      element.setAttribute(name, "");
    } else if (value !== false && value !== undefined) {
      element.setAttribute(name, String(value));
    }
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== false).map((child) => (typeof child === "number" ? String(child) : child)));
  return element;
}

/** fill replaces what is in an element. */
export function fill(element: Element, ...children: Child[]): void {
  element.replaceChildren(...h("div", {}, ...children).childNodes);
}

/** setText changes a text only if it is another: a page that changes each second should not lay itself out for nothing. */
export function setText(element: Element, text: string): void {
  if (element.textContent !== text) element.textContent = text;
}
