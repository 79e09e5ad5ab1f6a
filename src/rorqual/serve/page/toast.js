/** A short message, with at most one action, that goes away by itself. */
import { byId, h, textButton } from "./dom.js";

const SHOWN_MILLISECONDS = 8000;

/**
 * @param {string} text
 * @param {string} [label] of the action
 * @param {() => void} [action]
 */
export function toast(text, label, action) {
  const node = h("div", { class: "toast" }, h("span", {}, text));
  const timer = setTimeout(() => node.remove(), SHOWN_MILLISECONDS);
  if (action) {
    const run = () => {
      clearTimeout(timer);
      node.remove();
      action();
    };
    node.append(textButton(label, "link", run));
  }
  byId("toasts").replaceChildren(node);
}
