/** The answers that are being written, one a conversation, and what is done when one fails. */
import { isReady } from "./api.js";
import { noticeOf } from "./notices.js";
import { Run } from "./run.js";

const SAVE_EVERY_MILLISECONDS = 1000;
const LOOK_EVERY_MILLISECONDS = 900;

export class Answering {
  /** @type {Map<string, Run>} by conversation: several may be answered at once */
  runs = new Map();

  /**
   * @param {import("./store.js").Store} store
   * @param {{request(): {body: object, apiKey: string}, written(run: Run): void,
   *   changed(conversation: object, notice: object|null, text: string): void,
   *   useKey(key: string): void, edit(conversation: object, id: string): void}} page
   *   what it does: gives the request's settings, shows a piece, shows another state
   */
  constructor(store, page) {
    this.store = store;
    this.page = page;
    window.addEventListener("pagehide", () => {
      for (const { conversation, isDropped } of this.runs.values())
        if (!isDropped) store.saveLast(conversation);
      this.isLeaving = true; // the requests that break off now did not fail
    });
    window.addEventListener("pageshow", () => {
      this.isLeaving = false;
    });
  }

  /**
   * Writes an answer to a user's message, beside those that it has.
   * @param {import("./conversation.js").Conversation} conversation
   * @param {string|null} parent
   * @param {import("./conversation.js").Message} [begun] an answer that goes on where it ended
   */
  async answer(conversation, parent, begun) {
    if (this.runs.has(conversation.id) || !conversation.messages[parent ?? ""]) return;
    let savedAt = performance.now();
    const show = () => {
      if (run.isDropped) return;
      this.page.written(run);
      if (performance.now() - savedAt < SAVE_EVERY_MILLISECONDS) return;
      savedAt = performance.now();
      this.store.save(conversation);
    };
    const run = new Run(conversation, parent, this.page.request(), show, begun);
    this.runs.set(conversation.id, run);
    this.page.changed(conversation, null, "The answer is being written.");
    const error = await run.finish();
    this.runs.delete(conversation.id);
    if (!run.isDropped && !(error && this.isLeaving)) this.store.save(conversation);
    const notice = error && this.#failure(error, conversation, parent, run.message);
    const isStopped = run.message.finish === "stopped";
    const text = isStopped ? "Stopped." : "The answer is complete.";
    this.page.changed(conversation, notice, error ? "The answer failed." : text);
  }

  /** @param {string} id of the conversation */
  stop(id) {
    this.runs.get(id)?.stop();
  }

  /** Ends a conversation's answer without keeping it. */
  drop(id) {
    const run = this.runs.get(id);
    if (!run) return;
    run.isDropped = true;
    run.stop();
  }

  #failure(error, conversation, parent, message) {
    const begun = conversation.messages[message.id]; // gone where nothing was written
    const retry = () => this.answer(conversation, parent, begun);
    const ways = {
      retry,
      retryLabel: begun && "Go on",
      askKey: (key) => {
        this.page.useKey(key);
        retry();
      },
      edit: () => this.page.edit(conversation, parent),
      dismiss: () => this.page.changed(conversation, null, ""),
    };
    const notice = noticeOf(error, ways, Boolean(this.page.request().apiKey));
    if (error.status === 0) this.#waitForServer(conversation, notice);
    return notice;
  }

  /** Goes on by itself when a server that was gone is there again. */
  async #waitForServer(conversation, notice) {
    const wait = () => new Promise((resolve) => setTimeout(resolve, LOOK_EVERY_MILLISECONDS));
    if (await isReady()) return; // it never was away: the user says when
    do await wait();
    while (this.page.isShown(notice) && !(await isReady()));
    if (this.page.isShown(notice)) notice.retry();
  }
}
