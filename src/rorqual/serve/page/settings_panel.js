/** The drawer with system prompt, sampling, API key and import. */
import { byId, h } from "./dom.js";
import { readNumber, SAMPLING } from "./settings.js";

export class SettingsPanel {
  /**
   * @param {import("./settings.js").Settings} settings
   * @param {{getSystem(): string, setSystem(text: string): void, changed(): void,
   *   keyChanged(): void, importChat(file: File): void}} actions
   */
  constructor(settings, actions) {
    this.settings = settings;
    this.actions = actions;
    this.dialog = byId("settings");
    this.system = byId("system-prompt");
    this.key = byId("api-key");
    this.system.addEventListener("change", () => actions.setSystem(this.system.value));
    this.key.addEventListener("change", () => {
      settings.apiKey = this.key.value.trim();
      actions.keyChanged();
    });
    byId("close-settings").addEventListener("click", () => this.dialog.close());
    byId("reset-sampling").addEventListener("click", () => this.#reset());
    byId("import-chat").addEventListener("click", () => byId("import-file").click());
    byId("import-file").addEventListener("change", (event) => {
      const [file] = event.target.files;
      event.target.value = "";
      if (file) actions.importChat(file);
    });
    this.dialog.addEventListener("click", (event) => {
      if (event.target === this.dialog) this.dialog.close(); // beside the drawer
    });
    this.fields = SAMPLING.map((field) => this.#makeField(field));
    byId("sampling").append(...this.fields.map(({ row }) => row));
  }

  open() {
    this.system.value = this.actions.getSystem();
    this.key.value = this.settings.apiKey;
    this.#show();
    this.dialog.showModal();
  }

  #makeField(field) {
    const id = `sampling-${field.name}`;
    const input = h("input", {
      id,
      name: field.name,
      type: "text",
      inputmode: field.isInteger ? "numeric" : "decimal",
      placeholder: "default",
      autocomplete: "off",
      "aria-describedby": `${id}-hint`,
    });
    const hint = h("p", { id: `${id}-hint`, class: "hint" }, field.hint);
    const row = h("div", { class: "field" }, h("label", { for: id }, field.label), input, hint);
    const check = () => {
      const { value, problem } = readNumber(field, input.value);
      input.setAttribute("aria-invalid", String(problem !== null));
      hint.textContent = problem ?? field.hint;
      row.classList.toggle("invalid", problem !== null);
      if (problem !== null) return;
      if (value === null) delete this.settings.sampling[field.name];
      else this.settings.sampling[field.name] = value;
      this.actions.changed();
    };
    input.addEventListener("input", check);
    return { field, input, check, row };
  }

  #show() {
    for (const { field, input, check } of this.fields) {
      input.value = this.settings.sampling[field.name] ?? "";
      check();
    }
  }

  #reset() {
    this.settings.sampling = {};
    this.#show();
    this.actions.changed();
  }
}
