/** One answer being written: from the request to the last piece. */
import { ApiError, streamAnswer } from "./api.js";
import { addMessage, apiMessages, isUnbegun, removeUnbegun } from "./conversation.js";

/** @typedef {import("./conversation.js").Conversation} Conversation */

export class Run {
  /** Whether the server keeps the request in its queue. */
  isQueued = false;
  #abort = new AbortController();
  #startedAt = performance.now();

  /**
   * @param {Conversation} conversation gets the answer as a new message
   * @param {string} parent the user's message to answer
   * @param {{model: string|null, sampling: Record<string, number>, apiKey: string}} settings
   * @param {() => void} onChange something to show is new
   */
  constructor(conversation, parent, settings, onChange) {
    this.conversation = conversation;
    this.settings = settings;
    this.onChange = onChange;
    this.leafBefore = conversation.leaf.value;
    this.request = {
      model: settings.model,
      sampling: settings.sampling,
      messages: apiMessages(conversation, parent),
    };
    this.message = addMessage(conversation, "assistant", parent, { model: settings.model });
  }

  /** Ends the answer; what is written stays. */
  stop() {
    this.#abort.abort();
  }

  /**
   * Runs to the end.
   * @returns {Promise<ApiError|null>} what went wrong; null for a whole or a stopped answer
   */
  async finish() {
    let error = null;
    try {
      for await (const event of streamAnswer(
        this.request,
        this.settings.apiKey,
        this.#abort.signal,
      )) {
        this.#take(event);
        this.onChange();
      }
      this.#set({ finish: this.finishReason ?? "stop" });
    } catch (problem) {
      const isStopped = this.#abort.signal.aborted;
      if (!isStopped)
        error =
          problem instanceof ApiError
            ? problem
            : new ApiError(0, `The page failed: ${problem.message}`);
      if (isUnbegun(this.message)) removeUnbegun(this.conversation, this.message, this.leafBefore);
      else this.#set({ finish: isStopped ? "stopped" : "error" });
    }
    return error;
  }

  #take(event) {
    if (event.type === "waiting") {
      this.isQueued = this.firstAt === undefined;
    } else if (event.type === "text") {
      this.isQueued = false;
      this.lastAt = performance.now();
      this.firstAt ??= this.lastAt;
      if (event.content) this.contentAt ??= this.lastAt;
      this.#set({
        content: this.message.content + event.content,
        reasoning: this.message.reasoning + event.reasoning,
      });
    } else if (event.type === "finish") {
      this.finishReason = event.reason;
    } else if (event.type === "usage") {
      this.#set({ usage: event.usage });
    }
  }

  #set(fields) {
    const seconds = (at) => (at === undefined ? null : (at - this.#startedAt) / 1000);
    const end = this.lastAt ?? performance.now();
    const timing = {
      firstTokenSeconds: seconds(this.firstAt),
      totalSeconds: seconds(end),
      reasoningSeconds: this.message.reasoning
        ? ((this.contentAt ?? end) - this.firstAt) / 1000
        : null,
    };
    Object.assign(this.message, fields, {
      timing,
      updatedAt: Math.max(Date.now(), this.message.updatedAt + 1),
    });
  }
}
