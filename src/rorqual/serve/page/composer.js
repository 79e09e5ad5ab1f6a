/** The message box: its height, its drafts, what is attached, its switches, its two buttons. */
import { byId, h, iconButton } from "./dom.js";
import { fitHeight, isSendKey } from "./message_view.js";
import { readText, storageArea, writeText } from "./store.js";
import { toast } from "./toast.js";

const MAX_FILE_BYTES = 200_000; // as the button's title says
const MAX_FILES = 10;

export class Composer {
  #draftKey = "";
  /** @type {{name: string, text: string}[]} */
  files = [];

  /** @param {{send(text: string, files: object[]): void, stop(): void}} actions */
  constructor(actions) {
    this.form = byId("composer");
    this.area = byId("composer-text");
    this.sendButton = byId("send");
    this.stopButton = byId("stop");
    const submit = () => {
      const text = this.area.value.trim();
      const { files } = this;
      if (!(text || files.length > 0) || this.isBusy) return;
      this.#attach([]);
      this.#set("");
      actions.send(text, files);
    };
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      submit();
    });
    this.area.addEventListener("keydown", (event) => {
      if (!isSendKey(event)) return;
      event.preventDefault();
      submit();
    });
    this.area.addEventListener("input", () => {
      writeText(storageArea("sessionStorage"), this.#draftKey, this.area.value);
      this.#fit();
    });
    this.stopButton.addEventListener("click", () => actions.stop());
    window.addEventListener("resize", () => fitHeight(this.area));
    this.#listenForFiles();
  }

  #listenForFiles() {
    const input = byId("attach-file");
    byId("attach").addEventListener("click", () => input.click());
    input.addEventListener("change", () => {
      this.#add([...input.files]);
      input.value = "";
    });
    this.area.addEventListener("paste", (event) => {
      if (event.clipboardData.files.length === 0) return;
      event.preventDefault();
      this.#add([...event.clipboardData.files]);
    });
    for (const name of ["dragover", "drop"]) {
      document.addEventListener(name, (event) => {
        if (!event.dataTransfer?.types.includes("Files")) return;
        event.preventDefault(); // else the browser would leave the page for the file
        this.#add([...event.dataTransfer.files]);
      });
    }
  }

  async #add(given) {
    for (const file of given) {
      const text = file.size > MAX_FILE_BYTES ? null : await textOf(file);
      if (file.size > MAX_FILE_BYTES) toast(`${file.name} is larger than 200 kB.`);
      else if (text === null) toast(`${file.name} is no text file.`);
      else if (this.files.length >= MAX_FILES) toast(`At most ${MAX_FILES} files go with a message.`);
      else this.#attach([...this.files, { name: file.name, text }]);
    }
  }

  #attach(files) {
    this.files = files;
    byId("attached").replaceChildren(
      ...files.map((file) =>
        h(
          "li",
          {},
          h("span", {}, file.name),
          iconButton("close", `Remove ${file.name}`, () => {
            this.#attach(this.files.filter((other) => other !== file));
            this.focus();
          }),
        ),
      ),
    );
    this.#fit();
  }

  /**
   * Shows the draft of a conversation; a reload keeps it.
   * @param {string} id
   */
  open(id) {
    this.#draftKey = `rorqual.draft.${id}`;
    this.area.value = readText(storageArea("sessionStorage"), this.#draftKey, "");
    this.#fit();
  }

  /** @param {boolean} isBusy an answer is being written */
  setBusy(isBusy) {
    const hadFocus = document.activeElement === (isBusy ? this.sendButton : this.stopButton);
    this.isBusy = isBusy;
    this.stopButton.hidden = !isBusy;
    this.sendButton.hidden = isBusy;
    this.#fit();
    if (hadFocus) this.focus(); // the button is gone
  }

  /** Not on phones, where the keyboard would cover the page. */
  focus() {
    if (!window.matchMedia("(hover: none) and (pointer: coarse)").matches) this.area.focus();
  }

  #set(text) {
    this.area.value = text;
    writeText(storageArea("sessionStorage"), this.#draftKey, text);
    this.#fit();
  }

  #fit() {
    fitHeight(this.area);
    this.sendButton.disabled = !this.area.value.trim() && this.files.length === 0;
  }
}

/** null for what is no text in UTF-8. */
async function textOf(file) {
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
    return text.includes("\0") ? null : text;
  } catch {
    return null;
  }
}
