// The one way in which the console makes elements. Whatever comes from a message, a key or an error becomes a text node
// or a plain attribute and is never parsed: there is no innerHTML here and nowhere else.

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

// What a reader would not see, or what would have him read other than it is: control characters, and those that turn
// the direction of text.
const invisible = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;

/** visible shows such characters by their numbers. */
function visible(text: string): string {
  return text.replace(invisible, (character) => `\\u${character.charCodeAt(0).toString(16).padStart(4, "0")}`);
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
  for (const child of children) {
    if (child !== null && child !== undefined && child !== false) element.append(child instanceof Node ? child : visible(String(child)));
  }
  return element;
}

/** fill replaces what is in an element. */
export function fill(element: Element, ...children: Child[]): void {
  element.replaceChildren(...h("div", {}, ...children).childNodes);
}

/** setText changes a text only if it is another: a page that changes each second should not lay itself out for nothing. */
export function setText(element: Element, text: string): void {
  const shown = visible(text);
  if (element.textContent !== shown) element.textContent = shown;
}
