// The only code of the console that creates elements. Texts of messages, keys and errors become text nodes or plain
// attributes and are never parsed: the console does not use innerHTML.

type Child = Node | string | number | null | undefined | false;

/** The allowed attributes: none of them runs a script, and links lead only to pages of the console. */
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

// Characters that are invisible or disguise a text: control characters, and those that change the direction of text.
const invisible = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;

/** visible escapes such characters. */
function visible(text: string): string {
  return text.replace(invisible, (character) => `\\u${character.charCodeAt(0).toString(16).padStart(4, "0")}`);
}

/** h creates an element. */
export function h<K extends keyof HTMLElementTagNameMap>(
  tag: K,
  attributes: Attributes = {},
  ...children: Child[]
): HTMLElementTagNameMap[K] {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") {
      element.addEventListener(name.slice(2), value as EventListener);
    } else if (name === "href" && !String(value).startsWith("#")) {
      throw new Error("links must lead to pages of the console");
    } else if (value === true) {
      element.setAttribute(name, "");
    } else if (value !== false && value !== undefined) {
      element.setAttribute(name, String(value));
    }
  }
  for (const child of children) {
    if (child !== null && child !== undefined && child !== false) {
      element.append(child instanceof Node ? child : visible(String(child)));
    }
  }
  return element;
}

/** fill replaces the content of an element. */
export function fill(element: Element, ...children: Child[]): void {
  element.replaceChildren(...h("div", {}, ...children).childNodes);
}

/** setText changes a text only if it differs, so that updates every second cause no needless layout. */
export function setText(element: Element, text: string): void {
  const shown = visible(text);
  if (element.textContent !== shown) element.textContent = shown;
}
