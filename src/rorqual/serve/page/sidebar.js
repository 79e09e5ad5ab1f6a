/** The list of conversations, with rename, export and delete. */
import { lastUsed, titleOf } from "./conversation.js";
import { byId, h, iconButton } from "./dom.js";

const DAY_MILLISECONDS = 24 * 3600 * 1000;

export class Sidebar {
  #menuFor = null;
  #renaming = null;

  /**
   * @param {{open(id: string): void, rename(id: string, title: string): void,
   *   exportChat(id: string): void, remove(id: string): void, refresh(): void}} actions
   */
  constructor(actions) {
    this.actions = actions;
    this.list = byId("chat-list");
    this.menu = byId("chat-menu");
    const items = { "menu-rename": "rename", "menu-export": "export", "menu-delete": "delete" };
    for (const [id, action] of Object.entries(items)) {
      byId(id).addEventListener("click", () => this.#choose(action));
    }
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
    const entries = [...conversations]
      .map((conversation) => ({ conversation, at: lastUsed(conversation) }))
      .sort((a, b) => b.at - a.at);
    const rows = [];
    let group = "";
    for (const { conversation, at } of entries) {
      const name = groupOf(at);
      if (name !== group) rows.push({ key: `#${name}`, text: name });
      group = name;
      rows.push({
        key: conversation.id,
        text: titleOf(conversation),
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
          "Your chats will be listed here. They stay in this browser.",
        ),
      );
    if (focused && !this.#renaming) {
      const again = [...(this.#rowOf(focused)?.querySelectorAll("button") ?? [])].find(
        (node) => node.className === focusedClass,
      );
      again?.focus();
    }
  }

  #row({ key, text, isCurrent, isLive, isRenaming }) {
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
    else if (action === "export") this.actions.exportChat(id);
    else this.actions.remove(id);
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

function groupOf(at) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  if (at >= midnight) return "Today";
  if (at >= midnight - DAY_MILLISECONDS) return "Yesterday";
  return at >= midnight - 7 * DAY_MILLISECONDS ? "Last week" : "Earlier";
}
