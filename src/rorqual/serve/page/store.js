/**
 * Conversations in the browser: IndexedDB, one record each.
 *
 * A write first merges what another tab wrote meanwhile, in the same transaction, and tells the other
 * tabs. What an earlier version kept in localStorage is moved here. Records that cannot be read, or
 * that a newer version wrote, are left as they are.
 */
import { mergeInto, readConversation, toKeep } from "./conversation.js";

const DATABASE = "rorqual";
const CHATS = "chats";
const OLD_PREFIX = "rorqual.chat.v1.";

/** @typedef {import("./conversation.js").Conversation} Conversation */

export class Store {
  /** @type {Map<string, Conversation>} */
  conversations = new Map();
  /** How many records could not be read. */
  numUnreadable = 0;
  /** Ids of records that this tab read or wrote: one that is gone was deleted by another. */
  #kept = new Set();
  #unsaved = new Set();
  #database = null;
  #channel = new BroadcastChannel("rorqual.chats");

  /**
   * @param {{onChange: (id: string, isRemoved: boolean) => void,
   *   onProblem: (text: string|null) => void}} hooks
   *   onChange: another tab changed or removed a conversation; onProblem: a write failed (null: all
   *   is saved again)
   */
  constructor(hooks) {
    Object.assign(this, hooks);
  }

  /** Reads what is kept; to be awaited before anything else. */
  async open() {
    try {
      this.#database = await opened();
      for (const raw of await this.#run("readonly", (chats) => chats.getAll())) {
        const conversation = this.#take(raw);
        if (conversation) this.#kept.add(conversation.id);
      }
      await this.#moveOld();
    } catch (error) {
      this.onProblem(explain(error));
    }
    this.#channel.addEventListener("message", ({ data }) => this.#onOther(data));
  }

  /**
   * Keeps a conversation. A write that fails is told through `onProblem`; it stays here then.
   * @param {Conversation} conversation
   */
  async save(conversation) {
    const { id } = conversation;
    let isGone = false;
    this.conversations.set(id, conversation);
    try {
      await this.#run("readwrite", (chats) => {
        chats.get(id).onsuccess = ({ target }) => {
          isGone = target.result === undefined && this.#kept.has(id);
          if (isGone) return;
          const stored = readConversation(target.result);
          if (stored) mergeInto(conversation, stored);
          chats.put(toKeep(conversation), id);
        };
      });
      this.#unsaved.delete(id);
      if (isGone) {
        this.#forget(id);
        return this.onChange(id, true);
      }
      this.#kept.add(id);
      this.#channel.postMessage({ id });
      if (this.#unsaved.size === 0) this.onProblem(null);
    } catch (error) {
      this.#unsaved.add(id);
      this.onProblem(explain(error));
    }
  }

  /** As the page ends nothing can be waited for, so not for what other tabs wrote either. */
  saveLast(conversation) {
    const transaction = this.#database?.transaction(CHATS, "readwrite");
    transaction?.objectStore(CHATS).put(toKeep(conversation), conversation.id);
    transaction?.commit();
  }

  /** @param {string} id */
  async remove(id) {
    this.#forget(id);
    try {
      await this.#run("readwrite", (chats) => chats.delete(id));
      this.#channel.postMessage({ id, isRemoved: true });
    } catch (error) {
      this.onProblem(explain(error));
      return;
    }
    for (const waiting of [...this.#unsaved]) {
      const conversation = this.conversations.get(waiting);
      if (conversation) this.save(conversation); // there may be room now
    }
  }

  #forget(id) {
    for (const known of [this.conversations, this.#kept, this.#unsaved]) known.delete(id);
  }

  /** What `work` asked for, when its transaction is complete. */
  #run(mode, work) {
    return new Promise((resolve, reject) => {
      const transaction = this.#database.transaction(CHATS, mode);
      const request = work(transaction.objectStore(CHATS));
      transaction.oncomplete = () => resolve(request?.result);
      transaction.onabort = () => reject(transaction.error);
    });
  }

  #take(raw) {
    const conversation = readConversation(raw);
    if (conversation) this.conversations.set(conversation.id, conversation);
    else this.numUnreadable += 1;
    return conversation;
  }

  async #moveOld() {
    const area = storageArea("localStorage");
    const keys = Array.from({ length: area?.length ?? 0 }, (_, index) => area.key(index) ?? "");
    for (const key of keys.filter((name) => name.startsWith(OLD_PREFIX))) {
      const conversation = this.#take(parse(area.getItem(key)));
      if (!conversation) continue;
      await this.save(conversation);
      if (!this.#unsaved.has(conversation.id)) area.removeItem(key);
    }
  }

  async #onOther({ id, isRemoved }) {
    const ours = this.conversations.get(id);
    if (isRemoved) {
      this.#forget(id);
    } else {
      const theirs = readConversation(await this.#run("readonly", (chats) => chats.get(id)));
      if (!theirs) return;
      this.#kept.add(id);
      if (ours) mergeInto(ours, theirs);
      else this.conversations.set(id, theirs);
    }
    this.onChange(id, Boolean(isRemoved));
  }
}

/** @returns {Promise<IDBDatabase>} */
function opened() {
  return new Promise((resolve, reject) => {
    const request = window.indexedDB.open(DATABASE, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(CHATS);
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
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

/** Writes such a value; an empty one is removed. Where that cannot be, it is gone with the tab. */
export function writeText(area, key, value) {
  try {
    if (value) area.setItem(key, value);
    else area.removeItem(key);
  } catch {
    // Chats tell it: they matter more.
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

/** JSON, or null if it is none. */
export function parse(text) {
  try {
    return JSON.parse(text);
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

const explain = (error) => (/quota/i.test(error?.name ?? "") ? FULL : CLOSED);
