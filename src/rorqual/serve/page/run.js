/** One answer being written: from the request to the last piece. */
import { ApiError, fitMessages, streamAnswer } from "./api.js";
import { addMessage, apiMessages, change, isUnbegun, removeUnbegun } from "./conversation.js";
import { speedBehind } from "./stats.js";

/** @typedef {import("./conversation.js").Conversation} Conversation */

export class Run {
  /** Whether the server keeps the request in its queue. */
  isQueued = false;
  /** Of prompt and answer so far. */
  totalTokens = 0;
  #abort = new AbortController();
  #startedAt = performance.now();

  /**
   * @param {Conversation} conversation gets the answer as a new message
   * @param {string} parent the user's message to answer
   * @param {{body: object, apiKey: string}} request
   * @param {() => void} onChange something to show is new
   * @param {import("./conversation.js").Message} [begun] an answer that goes on
   */
  constructor(conversation, parent, request, onChange, begun) {
    Object.assign(this, { conversation, request, onChange, leafBefore: conversation.leaf.value });
    this.messages = apiMessages(conversation, parent);
    if (begun) {
      const { content, reasoning } = begun;
      const prefix = { role: "assistant", content, prefix: true };
      this.messages.push(reasoning ? { ...prefix, reasoning_content: reasoning } : prefix);
      change(begun, { finish: null, usage: null });
    }
    const { model = null } = request.body;
    this.message = begun ?? addMessage(conversation, "assistant", parent, { model });
  }

  /** Ends the answer; what is written stays. */
  stop() {
    this.#abort.abort();
  }

  /** Tokens a second behind the first piece; null before there are two pieces. */
  get speed() {
    const numTokens = this.totalTokens - (this.firstTokens ?? Infinity);
    return speedBehind(numTokens, (this.lastAt - this.firstAt) / 1000);
  }

  /**
   * Runs to the end.
   * @returns {Promise<ApiError|null>} what went wrong; null for a whole or a stopped answer
   */
  async finish() {
    const { signal } = this.#abort;
    const { body, apiKey } = this.request;
    try {
      const fit = await fitMessages({ ...body, messages: this.messages }, apiKey, signal);
      this.totalTokens = fit.prompt_tokens;
      this.#set({ skipped: fit.skipped });
      const begin = this.messages[0].role === "system" ? 1 : 0;
      this.messages.splice(begin, fit.skipped);
      for await (const event of streamAnswer({ ...body, messages: this.messages }, apiKey, signal)) {
        this.#take(event);
        this.onChange();
      }
      this.#set({ finish: this.finishReason ?? "stop" });
      return null;
    } catch (problem) {
      if (isUnbegun(this.message)) removeUnbegun(this.conversation, this.message, this.leafBefore);
      else this.#set({ finish: signal.aborted ? "stopped" : "error" });
      if (signal.aborted) return null;
      return problem instanceof ApiError
        ? problem
        : new ApiError(0, `The page failed: ${problem.message}`);
    }
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
      this.totalTokens = event.usage.total_tokens;
      if (this.firstAt !== undefined) this.firstTokens ??= this.totalTokens;
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
        ? ((this.contentAt ?? end) - (this.firstAt ?? end)) / 1000
        : null,
    };
    change(this.message, { ...fields, timing });
  }
}
