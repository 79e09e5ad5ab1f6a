/** The list of conversations, with rename, export and delete. */
import { lastUsed, titleOf } from "./conversation.js";
import { byId, h, iconButton } from "./dom.js";

const DAY_MILLISECONDS = 24 * 3600 * 1000;

export class Sidebar {
  #menuFor = null;
  #renaming = null;

  /**
   * @param {{open(id: string): void, rename(id: string, title: string): void,
   *   exportChat(id: string, form: string): void, remove(id: string): void,
   *   refresh(): void}} actions
   */
  constructor(actions) {
    this.actions = actions;
    this.list = byId("chat-list");
    this.search = byId("search");
    this.search.addEventListener("input", () => actions.refresh());
    this.menu = byId("chat-menu");
    for (const action of ["rename", "json", "markdown", "messages", "delete"])
      byId(`menu-${action}`).addEventListener("click", () => this.#choose(action));
    this.menu.addEventListener("keydown", (event) => this.#onMenuKey(event));
    this.menu.addEventListener("toggle", (event) => {
      if (event.newState === "closed") this.#menuButton()?.setAttribute("aria-expanded", "false");
    });
  }

  /**
   * @param {Iterable<import("./conversation.js").Conversation>} conversations
   * @param {string|null} current
   * @param {Set<string>} live ids of those that get an answer now
   */
  render(conversations, current, live) {
    const wanted = this.search.value.trim().toLowerCase();
    const entries = [...conversations]
      .map((conversation) => ({ conversation, at: lastUsed(conversation) }))
      .map((entry) => ({ ...entry, found: wanted && found(entry.conversation, wanted) }))
      .filter((entry) => entry.found !== null)
      .sort((a, b) => b.at - a.at);
    const rows = [];
    let group = "";
    for (const { conversation, at, found: snippet } of entries) {
      const name = groupOf(at);
      if (name !== group) rows.push({ key: `#${name}`, text: name });
      group = name;
      rows.push({
        key: conversation.id,
        text: titleOf(conversation),
        snippet,
        isCurrent: conversation.id === current,
        isLive: live.has(conversation.id),
        isRenaming: this.#renaming === conversation.id,
      });
    }
    const mark = JSON.stringify(rows);
    if (mark === this.shown) return;
    this.shown = mark;
    const focused = document.activeElement?.closest?.("[data-chat]")?.dataset.chat;
    const focusedClass = document.activeElement?.className;
    this.list.replaceChildren(
      ...rows.map((row) =>
        row.key.startsWith("#") ? h("li", { class: "chat-group" }, row.text) : this.#row(row),
      ),
    );
    if (rows.length === 0)
      this.list.append(
        h(
          "li",
          { class: "chat-none" },
          wanted
            ? "No chat has this text."
            : "Your chats will be listed here. They stay in this browser.",
        ),
      );
    if (focused && !this.#renaming) {
      const again = [...(this.#rowOf(focused)?.querySelectorAll("button") ?? [])].find(
        (node) => node.className === focusedClass,
      );
      again?.focus();
    }
  }

  #row({ key, text, snippet, isCurrent, isLive, isRenaming }) {
    if (isRenaming)
      return h("li", { class: "chat-row", "data-chat": key }, this.#renameBox(key, text));
    const open = h(
      "button",
      {
        type: "button",
        class: "chat-open",
        title: text,
        "aria-current": isCurrent ? "page" : null,
        on: { click: () => this.actions.open(key), dblclick: () => this.#startRename(key) },
      },
      h("span", { class: "chat-name" }, text),
      snippet && h("span", { class: "snippet" }, snippet),
      isLive && h("span", { class: "live-dot", role: "img", "aria-label": "Answering" }),
    );
    const more = iconButton(
      "more",
      `Actions for ${text}`,
      (event) => this.#openMenu(key, event.currentTarget),
      { class: "chat-more", "aria-haspopup": "menu", "aria-expanded": "false" },
    );
    return h("li", { class: "chat-row", "data-chat": key }, open, more);
  }

  #renameBox(id, text) {
    const box = h("input", {
      class: "rename",
      type: "text",
      maxlength: 120,
      "aria-label": "New name",
      value: text,
    });
    let isDone = false;
    const finish = (title) => {
      if (isDone) return;
      isDone = true;
      this.#renaming = null;
      if (title !== null && title.trim()) this.actions.rename(id, title.trim());
      this.shown = null;
      this.actions.refresh();
      this.#rowOf(id)?.querySelector(".chat-open")?.focus();
    };
    box.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== "Escape") return;
      event.preventDefault();
      event.stopPropagation();
      finish(event.key === "Enter" ? box.value : null);
    });
    box.addEventListener("blur", () => finish(box.value));
    return box;
  }

  #startRename(id) {
    this.#renaming = id;
    this.shown = null;
    this.actions.refresh();
    const box = this.#rowOf(id)?.querySelector("input");
    box?.focus();
    box?.select();
  }

  #openMenu(id, button) {
    this.#menuFor = id;
    this.menu.showPopover();
    const { right, bottom, top } = button.getBoundingClientRect();
    const { offsetWidth, offsetHeight } = this.menu;
    const isBelow = bottom + offsetHeight + 8 < window.innerHeight;
    this.menu.style.left = `${Math.max(8, right - offsetWidth)}px`;
    this.menu.style.top = `${isBelow ? bottom + 4 : top - offsetHeight - 4}px`;
    button.setAttribute("aria-expanded", "true");
    this.menu.querySelector("button").focus();
  }

  #choose(action) {
    const id = this.#menuFor;
    this.menu.hidePopover();
    if (action === "rename") this.#startRename(id);
    else if (action === "delete") this.actions.remove(id);
    else this.actions.exportChat(id, action);
  }

  #onMenuKey(event) {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (event.key === "Escape") {
      event.preventDefault();
      event.stopPropagation();
      const button = this.#menuButton();
      this.menu.hidePopover();
      button?.focus();
    } else if (step) {
      event.preventDefault();
      const buttons = [...this.menu.querySelectorAll("button")];
      const next =
        (buttons.indexOf(document.activeElement) + step + buttons.length) % buttons.length;
      buttons[next].focus();
    }
  }

  #menuButton() {
    return this.#rowOf(this.#menuFor)?.querySelector(".chat-more");
  }

  #rowOf(id) {
    return [...this.list.children].find((row) => row.dataset.chat === id);
  }
}

/** Where a chat has a text: the words around it, "" for its title, null for nowhere. */
function found(conversation, wanted) {
  if (titleOf(conversation).toLowerCase().includes(wanted)) return "";
  for (const { content } of Object.values(conversation.messages)) {
    const at = content.toLowerCase().indexOf(wanted);
    if (at >= 0) return `… ${content.slice(Math.max(0, at - 12), at + 60).replace(/\s+/g, " ")}`;
  }
  return null;
}

function groupOf(at) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  if (at >= midnight) return "Today";
  if (at >= midnight - DAY_MILLISECONDS) return "Yesterday";
  return at >= midnight - 7 * DAY_MILLISECONDS ? "Last week" : "Earlier";
}
