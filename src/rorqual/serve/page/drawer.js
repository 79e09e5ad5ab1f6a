/** On a narrow screen the list of chats is a drawer: what is behind it can then not be reached. */
import { byId } from "./dom.js";

const NARROW = "(max-width: 56rem)"; // as in screens.css

export class Drawer {
  #narrow = window.matchMedia(NARROW);

  constructor() {
    byId("open-sidebar").addEventListener("click", () => this.show(true));
    byId("close-sidebar").addEventListener("click", () => this.show(false));
    byId("backdrop").addEventListener("click", () => this.show(false));
    this.#narrow.addEventListener("change", () => this.show(false));
    this.show(false);
  }

  get isOpen() {
    return document.body.classList.contains("sidebar-open");
  }

  /** @param {boolean} isWanted without effect on a wide screen, where the list is always there */
  show(isWanted) {
    const isNarrow = this.#narrow.matches;
    const isOpen = isWanted && isNarrow;
    const wasOpen = this.isOpen;
    document.body.classList.toggle("sidebar-open", isOpen);
    byId("sidebar").inert = isNarrow && !isOpen;
    byId("main").inert = isOpen;
    byId("backdrop").hidden = !isOpen;
    byId("open-sidebar").setAttribute("aria-expanded", String(isOpen));
    if (isOpen) byId("close-sidebar").focus();
    else if (wasOpen) byId("open-sidebar").focus();
  }
}
