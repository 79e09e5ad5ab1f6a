/** The page's one controller: it owns what is shown, and lets the other modules show it. */
import { Answering } from "./answering.js";
import { describeModel, listModels, renderTexts } from "./api.js";
import { ChatView } from "./chat_view.js";
import { Composer } from "./composer.js";
import {
  addMessage,
  change,
  mergeInto,
  newConversation,
  pathTo,
  removeFrom,
  setRegister,
  showBranch,
  siblings,
  titleOf,
} from "./conversation.js";
import { isDialogOpen, showModel, startDialogs } from "./dialogs.js";
import { byId, h } from "./dom.js";
import { Drawer } from "./drawer.js";
import { download, readFiles } from "./export.js";
import { Renderer } from "./markdown.js";
import { noticeOf, renderNotice } from "./notices.js";
import { Settings } from "./settings.js";
import { SettingsPanel } from "./settings_panel.js";
import { Sidebar } from "./sidebar.js";
import { rate } from "./stats.js";
import { Store } from "./store.js";
import { startThemeSwitch } from "./theme_switch.js";
import { toast } from "./toast.js";

class Page {
  /** @type {Map<string, import("./notices.js").Notice>} by conversation, "models" or "storage" */
  notices = new Map();
  models = [];
  /** What the server says of its model; nothing before it has. */
  model = {};

  constructor() {
    this.settings = new Settings();
    this.ready = new Promise((resolve) => { this.begin = resolve; });
    this.store = new Store({
      onChange: (id, isRemoved) => this.onOtherTab(id, isRemoved),
      onProblem: (text) => {
        const dismiss = () => this.setNotice("storage", null);
        this.setNotice("storage", text && { kind: "warning", title: "Not saved", text, dismiss });
      },
    });
    this.answering = new Answering(this.store, {
      request: () => this.request(),
      written: (run) => this.onPiece(run),
      changed: (conversation, notice, text) => {
        if (notice) this.notices.set(conversation.id, notice);
        else this.notices.delete(conversation.id);
        byId("announcer").textContent = text;
        this.render();
      },
      isShown: (notice) => [...this.notices.values()].includes(notice),
      useKey: (key) => this.useKey(key),
      edit: (conversation, id) => {
        this.open(conversation.id);
        this.chat.edit(id);
      },
    });
    this.chat = new ChatView(
      { scroller: byId("scroller"), list: byId("messages"), jump: byId("jump") },
      {
        regenerate: (id) => this.answer(this.current.messages[id].parent),
        edit: (id, text) => {
          const { parent, files } = this.current.messages[id];
          this.ask(text, parent, files);
        },
        save: (id, content) => {
          const message = this.current.messages[id];
          // What was measured is true of the model's own words alone.
          const figures = { finish: "edited", usage: null, timing: null };
          const isAnswer = message.role === "assistant";
          this.change(() => change(message, { content, ...(isAnswer && figures) }));
        },
        goOn: (id) => {
          const message = this.current.messages[id];
          this.answering.answer(this.current, message.parent, message);
        },
        remove: (id) => this.removeMessage(id),
        show: (id) => this.change(() => showBranch(this.current, id)),
        answer: () => this.answer(this.current.leaf.value),
      },
      new Renderer((texts) => renderTexts(texts, this.settings.apiKey)),
    );
    this.sidebar = new Sidebar({
      open: (id) => this.open(id),
      rename: (id, title) => this.rename(id, title),
      exportChat: (id, form) => download([this.store.conversations.get(id)], form),
      remove: (id) => this.remove(id),
      refresh: () => this.renderSidebar(),
    });
    this.composer = new Composer({
      // Before the chats are there a message would go to none of them.
      send: (text, files) =>
        this.ready.then(() => this.ask(text, this.current.leaf.value, files)),
      stop: () => this.answering.stop(this.current.id),
    });
    this.panel = new SettingsPanel(this.settings, {
      getSystem: () => this.current.system.value ?? "",
      setSystem: (text) => this.setSystem(text),
      changed: () => this.saveSettings(),
      keyChanged: () => this.loadModels(),
      importFiles: (files) => this.importFiles(files),
      exportAll: (form) => download([...this.store.conversations.values()], form),
    });
  }

  async start() {
    startThemeSwitch(byId("theme"));
    await this.store.open();
    this.listen();
    this.openFromAddress();
    this.begin();
    this.saveSettings();
    this.loadModels();
    const { numUnreadable } = this.store;
    if (numUnreadable > 0)
      toast(`${numUnreadable} stored chats cannot be read by this version and are left alone.`);
  }

  listen() {
    byId("new-chat").addEventListener("click", () => this.open(null));
    byId("new-chat-bar").addEventListener("click", () => this.open(null));
    byId("open-settings").addEventListener("click", () => this.panel.open());
    byId("open-model").addEventListener("click", () => this.loadModels()); // its speed may be new
    byId("model").addEventListener("change", (event) => {
      this.settings.model = event.target.value;
      this.saveSettings();
    });
    for (const [id, name] of [["json-mode", "wantsJson"], ["think", "wantsThinking"]]) {
      byId(id).addEventListener("click", () => {
        this.settings[name] = !this.settings[name];
        this.saveSettings();
      });
    }
    this.drawer = new Drawer();
    startDialogs();
    window.addEventListener("popstate", () => this.openFromAddress());
    window.addEventListener("storage", (event) => {
      if (Settings.concerns(event)) this.settings.reload();
    });
    document.addEventListener("keydown", (event) => this.onKey(event));
  }

  onKey(event) {
    const isTyping = event.target.closest?.("input, textarea, select");
    const hasModifier = event.ctrlKey || event.metaKey || event.altKey;
    if ((event.ctrlKey || event.metaKey) && !event.shiftKey && event.key.toLowerCase() === "k") {
      event.preventDefault();
      document.querySelector("dialog[open]")?.close();
      this.open(null);
    } else if (isDialogOpen() || event.defaultPrevented) {
      return;
    } else if (event.key === "Escape") {
      if (this.drawer.isOpen) this.drawer.show(false);
      else this.answering.stop(this.current.id);
    } else if (event.key === "?" && !isTyping && !hasModifier) {
      byId("keys").showModal();
    } else if (event.key === "/" && !isTyping && !hasModifier) {
      event.preventDefault();
      this.drawer.show(true);
      byId("search").focus();
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
    const last = path[path.length - 1];
    const run = this.answering.runs.get(this.current.id);
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
    this.renderGauge(last, run);
  }

  /** How much of the context the chat takes, and how fast the answer comes. */
  renderGauge(last, run) {
    const { usage } = last ?? {};
    const used = run?.totalTokens ?? usage?.total_tokens ?? 0;
    const { context = 0 } = this.model;
    byId("gauge").hidden = !used || !context;
    Object.assign(byId("gauge-meter"), { max: context, high: 0.8 * context, value: used });
    const speed = run?.speed ? ` · ${rate(run.speed)} tokens/s` : "";
    byId("gauge-text").textContent =
      `${used.toLocaleString("en-GB")} of ${context.toLocaleString("en-GB")} tokens${speed}`;
  }

  renderSidebar() {
    const live = new Set(this.answering.runs.keys());
    this.sidebar.render(this.store.conversations.values(), this.current.id, live);
  }

  stateOf(message) {
    const run = this.answering.runs.get(this.current.id);
    return {
      isLive: run?.message.id === message.id,
      isQueued: run?.isQueued ?? false,
      canChange: !run,
      isLast: this.current.leaf.value === message.id,
      siblings: siblings(this.current, message),
    };
  }

  onPiece(run) {
    if (run.conversation !== this.current) return;
    this.chat.updateSoon(run.message, (message) => this.stateOf(message));
    this.renderGauge(run.message, run);
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
    const { shownNotices: before = [] } = this;
    if (shown.length === before.length && shown.every((notice, k) => notice === before[k])) return;
    this.shownNotices = shown;
    byId("notices").replaceChildren(...shown.map(renderNotice));
  }

  // Asking

  request() {
    const { model } = this.settings;
    const isServed = this.models.length === 0 || this.models.includes(model);
    const used = (isServed ? model : null) ?? this.models[0] ?? null;
    const body = this.settings.body(used, this.model.has_thinking_switch);
    return { body, apiKey: this.settings.apiKey };
  }

  /** @param {string} text @param {string|null} parent the message that it follows */
  ask(text, parent, files = []) {
    if (this.answering.runs.has(this.current.id)) return;
    if (this.isNew()) {
      history.replaceState(null, "", `#${this.current.id}`);
      this.composer.open(this.current.id);
    }
    const message = addMessage(this.current, "user", parent, { content: text, files });
    this.store.save(this.current);
    this.answer(message.id);
  }

  answer(parent) {
    this.answering.answer(this.current, parent);
    this.chat.follow();
  }

  useKey(key) {
    this.settings.apiKey = key;
    this.loadModels();
  }

  async loadModels() {
    const { apiKey } = this.settings;
    try {
      this.models = await listModels(apiKey);
      this.model = await describeModel(apiKey);
      this.setNotice("models", null);
      this.panel.describe(this.model.sampling);
      showModel(this.model, (question) => this.ask(question, null));
    } catch (error) {
      const ways = { retry: () => this.loadModels(), askKey: (key) => this.useKey(key) };
      this.setNotice("models", noticeOf(error, ways, Boolean(apiKey)));
    }
    const select = byId("model");
    select.replaceChildren(...this.models.map((name) => h("option", { value: name }, name)));
    if (this.models.includes(this.settings.model)) select.value = this.settings.model;
    select.disabled = this.models.length < 2;
    byId("model-box").hidden = this.models.length === 0;
    byId("think").hidden = !this.model.has_thinking_switch;
    byId("empty-model").textContent = select.value || "this server";
    this.render();
  }

  // Keeping

  /** A change of the shown conversation by the user. */
  change(edit) {
    edit();
    this.setNotice(this.current.id, null);
    if (!this.isNew()) this.store.save(this.current);
    this.render();
  }

  removeMessage(id) {
    const { messages, leaf } = structuredClone(this.current);
    const conversation = this.current;
    this.change(() => removeFrom(conversation, id));
    toast("The message and what followed it are deleted.", "Undo", () => {
      for (const [each, { content, reasoning, files, isDeleted }] of Object.entries(messages))
        change(conversation.messages[each], { content, reasoning, files, isDeleted });
      setRegister(conversation, "leaf", leaf.value);
      this.store.save(conversation);
      this.render();
    });
  }

  setSystem(text) {
    this.settings.system = text;
    this.saveSettings();
    this.change(() => setRegister(this.current, "system", text));
  }

  saveSettings() {
    const { sampling, system, wantsJson, wantsThinking } = this.settings;
    this.settings.save();
    const isChanged = Object.keys(sampling).length > 0 || system.trim() !== "";
    byId("open-settings").classList.toggle("is-changed", isChanged);
    byId("json-mode").setAttribute("aria-pressed", String(wantsJson));
    byId("think").setAttribute("aria-pressed", String(wantsThinking));
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
    this.answering.drop(id);
    this.store.remove(id);
    if (this.current.id === id) this.open(null);
    this.render();
    toast(`“${titleOf(conversation)}” is deleted.`, "Undo", () => {
      this.store.save(conversation);
      this.open(id);
      this.render();
    });
  }

  onOtherTab(id, isRemoved) {
    if (isRemoved) {
      this.answering.drop(id);
      if (this.current.id === id) {
        this.open(null);
        toast("This chat was deleted in another tab.");
      }
    }
    if (this.current.id === id || isRemoved) this.render();
    else this.renderSidebar();
  }

  async importFiles(files) {
    const { chats, told } = await readFiles(files);
    if (told) toast(told);
    if (chats.length === 0) return;
    for (const chat of chats) {
      const ours = this.store.conversations.get(chat.id);
      if (ours) mergeInto(ours, chat);
      await this.store.save(ours ?? chat);
    }
    byId("settings").close();
    this.open(chats[0].id);
    this.render();
  }
}

await new Page().start();
