/**
 * Conversations in the browser: one localStorage entry each, so that two tabs never write over each
 * other's list. There is no index; the list is whatever entries there are.
 *
 * Each write first merges what another tab wrote meanwhile (`conversation.mergeInto`), and a
 * `storage` event brings the other tab's changes in. Entries that cannot be read, or that a newer
 * version wrote, are left as they are.
 */
import { mergeInto, readConversation, toKeep } from "./conversation.js";

const PREFIX = "rorqual.chat.v1.";

/** @typedef {import("./conversation.js").Conversation} Conversation */

export class Store {
  /** @type {Map<string, Conversation>} */
  conversations = new Map();
  /** How many entries could not be read. */
  numUnreadable = 0;
  #unsaved = new Set();

  /**
   * @param {{onChange: (id: string, isRemoved: boolean) => void,
   *   onProblem: (text: string|null) => void}} hooks
   *   onChange: another tab changed or removed a conversation; onProblem: a write failed (null: all
   *   is saved again)
   */
  constructor({ onChange, onProblem }) {
    this.onChange = onChange;
    this.onProblem = onProblem;
    for (const key of keys()) {
      if (!key.startsWith(PREFIX)) continue;
      const conversation = read(key);
      if (conversation) this.conversations.set(conversation.id, conversation);
      else this.numUnreadable += 1;
    }
    window.addEventListener("storage", (event) => this.#onStorage(event));
  }

  /**
   * Keeps a conversation. A write that fails is told through `onProblem`; it stays here then.
   * @param {Conversation} conversation
   */
  save(conversation) {
    this.conversations.set(conversation.id, conversation);
    const key = PREFIX + conversation.id;
    try {
      const stored = read(key);
      if (stored) mergeInto(conversation, stored);
      localStorage.setItem(key, JSON.stringify(toKeep(conversation)));
      this.#unsaved.delete(conversation.id);
      if (this.#unsaved.size === 0) this.onProblem(null);
    } catch (error) {
      this.#unsaved.add(conversation.id);
      this.onProblem(explain(error));
    }
  }

  /** @param {string} id */
  remove(id) {
    this.conversations.delete(id);
    this.#unsaved.delete(id);
    try {
      localStorage.removeItem(PREFIX + id);
    } catch (error) {
      this.onProblem(explain(error));
      return;
    }
    for (const waiting of [...this.#unsaved]) {
      const conversation = this.conversations.get(waiting);
      if (conversation) this.save(conversation); // there may be room now
    }
  }

  #onStorage(event) {
    if (event.storageArea !== localStorage) return;
    if (event.key === null) {
      for (const id of [...this.conversations.keys()]) this.#forget(id);
    } else if (event.key.startsWith(PREFIX)) {
      const id = event.key.slice(PREFIX.length);
      if (event.newValue === null) this.#forget(id);
      else this.#take(parse(event.newValue));
    }
  }

  #take(theirs) {
    if (!theirs) return;
    const ours = this.conversations.get(theirs.id);
    if (!ours) {
      this.conversations.set(theirs.id, theirs);
    } else {
      mergeInto(ours, theirs);
      // Two writes that crossed: ours may hold messages that the other tab's entry lost.
      if (Object.keys(toKeep(ours).messages).some((id) => !(id in theirs.messages)))
        this.save(ours);
    }
    this.onChange(theirs.id, false);
  }

  #forget(id) {
    this.conversations.delete(id);
    this.onChange(id, true);
  }
}

/**
 * A small value of its own (settings, theme); the fallback if there is none or storage is closed.
 * @param {Storage|null} area `localStorage` or `sessionStorage`; null where the browser refuses
 * @param {string} key
 * @param {string} fallback
 */
export function readText(area, key, fallback) {
  try {
    return area?.getItem(key) ?? fallback;
  } catch {
    return fallback;
  }
}

/**
 * Writes such a value; an empty one is removed.
 * @returns {boolean} whether it is kept
 */
export function writeText(area, key, value) {
  try {
    if (value) area.setItem(key, value);
    else area.removeItem(key);
    return true;
  } catch {
    return false;
  }
}

/** @param {"localStorage"|"sessionStorage"} name @returns {Storage|null} */
export function storageArea(name) {
  try {
    return window[name]; // throws where cookies are blocked
  } catch {
    return null;
  }
}

function keys() {
  const area = storageArea("localStorage");
  return area ? Array.from({ length: area.length }, (_, index) => area.key(index) ?? "") : [];
}

const read = (key) => parse(localStorage.getItem(key) ?? "null");

function parse(text) {
  try {
    return readConversation(JSON.parse(text));
  } catch {
    return null;
  }
}

const FULL =
  "The browser's storage for this page is full: this chat is kept only until the tab closes. " +
  "Export it, or delete chats that you no longer need.";
const CLOSED =
  "The browser does not let this page keep anything: chats are lost when the tab closes. " +
  "Export those that you need.";

function explain(error) {
  return error instanceof DOMException && /quota/i.test(error.name) ? FULL : CLOSED;
}
