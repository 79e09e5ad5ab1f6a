/** The message box: its height, its drafts, its two buttons. */
import { byId } from "./dom.js";
import { fitHeight, isSendKey } from "./message_view.js";
import { readText, storageArea, writeText } from "./store.js";

export class Composer {
  #draftKey = "";

  /** @param {{send(text: string): void, stop(): void}} actions */
  constructor(actions) {
    this.form = byId("composer");
    this.area = byId("composer-text");
    this.sendButton = byId("send");
    this.stopButton = byId("stop");
    const submit = () => {
      const text = this.area.value.trim();
      if (!text || this.isBusy) return;
      this.#set("");
      actions.send(text);
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
    this.sendButton.disabled = !this.area.value.trim();
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
    this.sendButton.disabled = !this.area.value.trim();
  }
}
