/** The drawer with system prompt, sampling, API key, import and export. */
import { byId, h } from "./dom.js";
import { readField } from "./settings.js";

export class SettingsPanel {
  fields = [];

  /**
   * @param {import("./settings.js").Settings} settings
   * @param {{getSystem(): string, setSystem(text: string): void, changed(): void,
   *   keyChanged(): void, importFiles(files: FileList): void, exportAll(form: string): void}} actions
   */
  constructor(settings, actions) {
    Object.assign(this, { settings, actions, system: byId("system-prompt"), key: byId("api-key") });
    this.system.addEventListener("change", () => actions.setSystem(this.system.value));
    this.key.addEventListener("change", () => {
      settings.apiKey = this.key.value.trim();
      actions.keyChanged();
    });
    byId("reset-sampling").addEventListener("click", () => {
      settings.sampling = {};
      this.#show();
      actions.changed();
    });
    byId("import-chat").addEventListener("click", () => byId("import-file").click());
    byId("import-file").addEventListener("change", ({ target }) => {
      if (target.files.length > 0) actions.importFiles([...target.files]);
      target.value = "";
    });
    for (const form of ["json", "markdown", "messages"])
      byId(`export-${form}`).addEventListener("click", () => actions.exportAll(form));
  }

  /** @param {import("./settings.js").Field[]} fields as the server describes them */
  describe(fields) {
    this.fields = fields.map((field) => this.#makeField(field));
    byId("sampling").replaceChildren(...this.fields.map(({ row }) => row));
    this.#show();
  }

  open() {
    this.system.value = this.actions.getSystem();
    this.key.value = this.settings.apiKey;
    this.#show();
    byId("settings").showModal();
  }

  #makeField(field) {
    const id = `sampling-${field.name}`;
    const input = h("input", {
      id,
      name: field.name,
      type: "text",
      inputmode: { whole: "numeric", number: "decimal" }[field.kind],
      placeholder: field.default,
      autocomplete: "off",
      "aria-describedby": `${id}-hint`,
    });
    const said = `${field.hint} Default: ${field.default}.`;
    const hint = h("p", { id: `${id}-hint`, class: "hint" }, said);
    const row = h("div", { class: "field" }, h("label", { for: id }, field.label), input, hint);
    const check = () => {
      const { value, problem } = readField(field, input.value);
      input.setAttribute("aria-invalid", String(problem !== null));
      hint.textContent = problem ?? said;
      row.classList.toggle("invalid", problem !== null);
      if (problem !== null) return;
      if (value === null) delete this.settings.sampling[field.name];
      else this.settings.sampling[field.name] = value;
    };
    input.addEventListener("input", () => {
      check();
      this.actions.changed();
    });
    return { field, input, check, row };
  }

  #show() {
    for (const { field, input, check } of this.fields) {
      input.value = this.settings.sampling[field.name] ?? "";
      check();
    }
  }
}
