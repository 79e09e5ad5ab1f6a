/** The page's dialogs: who opens them, what closes them, and the one that tells of the model. */
import { byId, h } from "./dom.js";

/** A press beside a dialog, or on its cross, closes it; `data-opens` names the one to open. */
export function startDialogs() {
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.addEventListener("click", ({ target }) => {
      if (target === dialog || target.closest(".close-dialog")) dialog.close();
    });
  }
  for (const button of document.querySelectorAll("[data-opens]"))
    button.addEventListener("click", () => byId(button.dataset.opens).showModal());
}

/** @returns {boolean} */
export const isDialogOpen = () => document.querySelector("dialog[open]") !== null;

/**
 * What the server says of its model: in its dialog, and on the first screen.
 * @param {{facts: string[][], opening: string|null, examples: string[], limits: string|null}} model
 * @param {(question: string) => void} ask
 */
export function showModel({ facts, opening, examples, limits }, ask) {
  const rows = facts.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]);
  byId("model-facts").replaceChildren(...rows);
  byId("opening").textContent = opening ?? "";
  byId("limits").textContent = limits ?? "";
  const buttons = examples.map((question) => {
    const on = { click: () => ask(question) };
    return h("button", { type: "button", class: "suggestion", on }, question);
  });
  byId("suggestions").replaceChildren(...buttons);
}
