/** The page's one controller: it owns what is shown, and lets the other modules show it. */
import { listModels, renderTexts } from "./api.js";
import { ChatView } from "./chat_view.js";
import { Composer } from "./composer.js";
import {
  addMessage,
  mergeInto,
  newConversation,
  pathTo,
  setRegister,
  showBranch,
  siblings,
  titleOf,
} from "./conversation.js";
import { byId, h } from "./dom.js";
import { Drawer } from "./drawer.js";
import { downloadChat, readExport } from "./export.js";
import { Renderer } from "./markdown.js";
import { noticeOf, renderNotice } from "./notices.js";
import { Run } from "./run.js";
import { Settings } from "./settings.js";
import { SettingsPanel } from "./settings_panel.js";
import { Sidebar } from "./sidebar.js";
import { Store } from "./store.js";
import { startThemeSwitch } from "./theme_switch.js";
import { toast } from "./toast.js";

const SAVE_EVERY_MILLISECONDS = 1000;

class Page {
  /** @type {Map<string, Run>} by conversation: several may be answered at once */
  runs = new Map();
  /** @type {Map<string, import("./notices.js").Notice>} by conversation, "models" or "storage" */
  notices = new Map();
  models = [];

  constructor() {
    this.settings = new Settings();
    this.store = new Store({
      onChange: (id, isRemoved) => this.onOtherTab(id, isRemoved),
      onProblem: (text) =>
        this.setNotice(
          "storage",
          text && {
            kind: "warning",
            title: "Not saved",
            text,
            dismiss: () => this.setNotice("storage", null),
          },
        ),
    });
    this.chat = new ChatView(
      { scroller: byId("scroller"), list: byId("messages"), jump: byId("jump") },
      {
        regenerate: (id) => this.answer(this.current.messages[id].parent),
        edit: (id, text) => this.ask(text, this.current.messages[id].parent),
        show: (id) => this.change(() => showBranch(this.current, id)),
        answer: () => this.answer(this.current.leaf.value),
      },
      new Renderer((texts) => renderTexts(texts, this.settings.apiKey)),
    );
    this.sidebar = new Sidebar({
      open: (id) => this.open(id),
      rename: (id, title) => this.rename(id, title),
      exportChat: (id) => downloadChat(this.store.conversations.get(id)),
      remove: (id) => this.remove(id),
      refresh: () => this.renderSidebar(),
    });
    this.composer = new Composer({
      send: (text) => this.ask(text, this.current.leaf.value),
      stop: () => this.stop(),
    });
    this.panel = new SettingsPanel(this.settings, {
      getSystem: () => this.current.system.value ?? "",
      setSystem: (text) => this.setSystem(text),
      changed: () => this.saveSettings(),
      keyChanged: () => this.loadModels(),
      importChat: (file) => this.importChat(file),
    });
    startThemeSwitch(byId("theme"));
    this.listen();
    this.openFromAddress();
    this.saveSettings();
    this.loadModels();
    if (this.store.numUnreadable > 0) {
      toast(
        `${this.store.numUnreadable} stored chats cannot be read by this version and are left alone.`,
      );
    }
  }

  listen() {
    byId("new-chat").addEventListener("click", () => this.open(null));
    byId("new-chat-bar").addEventListener("click", () => this.open(null));
    byId("open-settings").addEventListener("click", () => this.panel.open());
    byId("model").addEventListener("change", (event) => {
      this.settings.model = event.target.value;
      this.saveSettings();
    });
    for (const button of document.querySelectorAll(".suggestion")) {
      button.addEventListener("click", () => this.ask(button.textContent, null));
    }
    this.drawer = new Drawer();
    window.addEventListener("popstate", () => this.openFromAddress());
    window.addEventListener("pagehide", () => {
      for (const { conversation } of this.runs.values()) this.store.save(conversation);
      this.isLeaving = true; // the requests that break off now did not fail
    });
    window.addEventListener("pageshow", () => {
      this.isLeaving = false;
    });
    window.addEventListener("storage", (event) => {
      if (Settings.concerns(event)) this.settings.reload();
    });
    document.addEventListener("keydown", (event) => this.onKey(event));
  }

  onKey(event) {
    if (
      (event.ctrlKey || event.metaKey) &&
      !event.shiftKey &&
      !event.altKey &&
      event.key.toLowerCase() === "k"
    ) {
      event.preventDefault();
      if (byId("settings").open) byId("settings").close();
      this.open(null);
    } else if (event.key === "Escape" && !event.defaultPrevented && !byId("settings").open) {
      if (this.drawer.isOpen) this.drawer.show(false);
      else this.stop();
    }
  }

  // What is shown

  openFromAddress() {
    const id = location.hash.slice(1);
    this.show(this.store.conversations.get(id) ?? newConversation(this.settings.system));
    if (id && this.current.id !== id) history.replaceState(null, "", location.pathname);
  }

  /** @param {string|null} id null for a new chat */
  open(id) {
    const conversation =
      id === null ? newConversation(this.settings.system) : this.store.conversations.get(id);
    if (!conversation) return;
    const isThere = id === null ? this.isNew() && location.hash === "" : id === this.current.id;
    if (!isThere) {
      history.pushState(null, "", id === null ? location.pathname : `#${id}`);
      this.show(conversation);
    }
    this.drawer.show(false);
    this.composer.focus();
  }

  show(conversation) {
    this.current = conversation;
    this.chat.clear();
    this.composer.open(this.isNew() ? "new" : conversation.id);
    this.render();
    this.chat.follow();
    this.composer.focus();
  }

  isNew() {
    return !this.store.conversations.has(this.current.id);
  }

  render() {
    const path = pathTo(this.current);
    const run = this.runs.get(this.current.id);
    const last = path[path.length - 1];
    const hasNotice = this.notices.has(this.current.id);
    document.body.classList.toggle("is-empty", path.length === 0);
    byId("empty").hidden = path.length > 0;
    this.chat.render(
      path,
      (message) => this.stateOf(message),
      last?.role === "user" && !run && !hasNotice,
    );
    this.composer.setBusy(Boolean(run));
    const title = path.length > 0 ? titleOf(this.current) : "New chat";
    byId("chat-title").textContent = title;
    document.title = path.length > 0 ? `${title} · Rorqual` : "Rorqual";
    this.renderNotices();
    this.renderSidebar();
  }

  renderSidebar() {
    this.sidebar.render(
      this.store.conversations.values(),
      this.current.id,
      new Set(this.runs.keys()),
    );
  }

  stateOf(message) {
    const run = this.runs.get(this.current.id);
    return {
      isLive: run?.message.id === message.id,
      isQueued: run?.isQueued ?? false,
      canChange: !run,
      siblings: siblings(this.current, message),
    };
  }

  /** @param {string} key @param {import("./notices.js").Notice|null} notice */
  setNotice(key, notice) {
    if (notice) this.notices.set(key, notice);
    else if (!this.notices.delete(key)) return;
    this.renderNotices();
  }

  renderNotices() {
    if (!this.current) return;
    const own = this.notices.get(this.current.id);
    // One question for the key is enough.
    const models = own?.askKey ? null : this.notices.get("models");
    const shown = [this.notices.get("storage"), models, own].filter(Boolean);
    if (
      shown.length === this.shownNotices?.length &&
      shown.every((notice, k) => notice === this.shownNotices[k])
    )
      return;
    this.shownNotices = shown;
    byId("notices").replaceChildren(...shown.map(renderNotice));
  }

  announce(text) {
    byId("announcer").textContent = text;
  }

  // Asking and answering

  /** @param {string} text @param {string|null} parent the message that it follows */
  ask(text, parent) {
    if (this.runs.has(this.current.id)) return;
    if (this.isNew()) {
      history.replaceState(null, "", `#${this.current.id}`);
      this.composer.open(this.current.id);
    }
    const message = addMessage(this.current, "user", parent, { content: text });
    this.store.save(this.current);
    this.answer(message.id);
  }

  /** Writes an answer to a user's message, beside those that it has. */
  async answer(parent) {
    const conversation = this.current;
    if (this.runs.has(conversation.id) || !conversation.messages[parent ?? ""]) return;
    this.setNotice(conversation.id, null);
    const { model, sampling, apiKey } = this.settings;
    const isServed = this.models.length === 0 || this.models.includes(model);
    const used = (isServed ? model : null) ?? this.models[0] ?? null;
    let savedAt = performance.now();
    const run = new Run(
      conversation,
      parent,
      { model: used, sampling: { ...sampling }, apiKey },
      () => {
        if (conversation === this.current)
          this.chat.updateSoon(run.message, (message) => this.stateOf(message));
        if (performance.now() - savedAt < SAVE_EVERY_MILLISECONDS) return;
        savedAt = performance.now();
        this.store.save(conversation);
      },
    );
    this.runs.set(conversation.id, run);
    this.render();
    this.chat.follow();
    this.announce("The answer is being written.");
    const error = await run.finish();
    this.runs.delete(conversation.id);
    if (!run.isDropped && !(error && this.isLeaving)) this.store.save(conversation);
    if (error) this.notices.set(conversation.id, this.failure(error, conversation, parent));
    this.announce(
      error
        ? "The answer failed."
        : run.message.finish === "stopped"
          ? "Stopped."
          : "The answer is complete.",
    );
    this.render();
  }

  failure(error, conversation, parent) {
    const retry = () => {
      if (conversation !== this.current) return;
      this.answer(parent);
    };
    return noticeOf(
      error,
      retry,
      (key) => {
        this.settings.apiKey = key;
        this.loadModels();
        retry();
      },
      Boolean(this.settings.apiKey),
    );
  }

  stop() {
    this.runs.get(this.current.id)?.stop();
  }

  async loadModels() {
    try {
      this.models = await listModels(this.settings.apiKey);
      this.setNotice("models", null);
    } catch (error) {
      this.models = [];
      this.setNotice(
        "models",
        noticeOf(
          error,
          () => this.loadModels(),
          (key) => {
            this.settings.apiKey = key;
            this.loadModels();
          },
          Boolean(this.settings.apiKey),
        ),
      );
    }
    const select = byId("model");
    select.replaceChildren(...this.models.map((name) => h("option", { value: name }, name)));
    if (this.models.includes(this.settings.model)) select.value = this.settings.model;
    select.disabled = this.models.length < 2;
    byId("model-box").hidden = this.models.length === 0;
    byId("empty-model").textContent = select.value || "this server";
  }

  // Keeping

  /** A change of the shown conversation by the user. */
  change(edit) {
    edit();
    this.setNotice(this.current.id, null);
    if (!this.isNew()) this.store.save(this.current);
    this.render();
  }

  setSystem(text) {
    this.settings.system = text;
    this.saveSettings();
    this.change(() => setRegister(this.current, "system", text));
  }

  saveSettings() {
    this.settings.save();
    const isChanged =
      Object.keys(this.settings.sampling).length > 0 || this.settings.system.trim() !== "";
    byId("open-settings").classList.toggle("is-changed", isChanged);
  }

  rename(id, title) {
    const conversation = this.store.conversations.get(id);
    if (!conversation) return;
    setRegister(conversation, "title", title);
    this.store.save(conversation);
    this.render();
  }

  remove(id) {
    const conversation = this.store.conversations.get(id);
    this.drop(id);
    this.store.remove(id);
    if (this.current.id === id) this.open(null);
    this.render();
    toast(`“${titleOf(conversation)}” is deleted.`, "Undo", () => {
      this.store.save(conversation);
      this.open(id);
      this.render();
    });
  }

  /** Ends a conversation's answer without keeping it. */
  drop(id) {
    const run = this.runs.get(id);
    if (!run) return;
    run.isDropped = true;
    run.stop();
  }

  onOtherTab(id, isRemoved) {
    if (isRemoved) {
      this.drop(id);
      if (this.current.id === id) {
        this.open(null);
        toast("This chat was deleted in another tab.");
      }
    }
    if (this.current.id === id || isRemoved) this.render();
    else this.renderSidebar();
  }

  async importChat(file) {
    const conversation = readExport(await file.text());
    if (!conversation) {
      toast("This file is no chat that this page has exported.");
      return;
    }
    const ours = this.store.conversations.get(conversation.id);
    if (ours) mergeInto(ours, conversation);
    this.store.save(ours ?? conversation);
    byId("settings").close();
    this.open(conversation.id);
    this.render();
  }
}

new Page();
