/** The server's routes that this page uses, and what can go wrong with them. */
import { parse } from "./store.js";
import { readEvents } from "./stream.js";

// Beside the page, so that a proxy may serve all of it under a path of its own.
const OPTIONS = { include_usage: true, continuous_usage_stats: true };
const BASE = new URL("../v1/", import.meta.url);

/**
 * A request that failed. `status` 0: no answer came, or it broke off.
 */
export class ApiError extends Error {
  /**
   * @param {number} status
   * @param {string} message
   * @param {{code?: string|null, retryAfterSeconds?: number|null, isFinal?: boolean}} [details]
   *   isFinal: the server says that the same request will fail again
   */
  constructor(status, message, { code = null, retryAfterSeconds = null, isFinal = false } = {}) {
    super(message);
    Object.assign(this, { name: "ApiError", status, code, retryAfterSeconds });
    /** Whether the same request may succeed another time. */
    this.mayPass = !isFinal && (status === 0 || status >= 500 || [408, 409, 429].includes(status));
  }
}

/** @returns {Promise<boolean>} whether the server takes requests */
export async function isReady() {
  return send("../ready", {}).then(
    () => true,
    () => false,
  );
}

/** @returns {Promise<object>} what the server says of its model: see page_api.py */
export async function describeModel(apiKey) {
  return (await send("../page/api/model", { headers: headersOf(apiKey) })).json();
}

/** @returns {Promise<{skipped: number, prompt_tokens: number, context: number}>} */
export async function fitMessages(body, apiKey, signal) {
  return (await post("../page/api/fit", body, apiKey, signal)).json();
}

/**
 * @param {string} apiKey empty for none
 * @returns {Promise<string[]>} the names of the served models
 */
export async function listModels(apiKey) {
  const response = await send("models", { headers: headersOf(apiKey) });
  const { data } = await response.json().catch(() => ({}));
  return Array.isArray(data) ? data.map((model) => String(model.id)) : [];
}

/**
 * @param {string[]} texts of markdown
 * @param {string} apiKey
 * @returns {Promise<(string|null)[]>} HTML that may stand in the page; null: shown as it is
 */
export async function renderTexts(texts, apiKey) {
  const { htmls } = await (await post("../page/api/render", { texts }, apiKey)).json();
  return htmls;
}

/**
 * One answer as it is written.
 *
 * @typedef {{type: "waiting"} | {type: "text", content: string, reasoning: string}
 *   | {type: "finish", reason: string} | {type: "usage", usage: object}} AnswerEvent
 * @param {object} request the chat route's, without `stream`
 * @param {string} apiKey
 * @param {AbortSignal} signal its abort ends the request on the server too
 * @returns {AsyncGenerator<AnswerEvent>}
 * @throws {ApiError} or the signal's AbortError
 */
export async function* streamAnswer(request, apiKey, signal) {
  const body = { ...request, stream: true, stream_options: OPTIONS };
  const response = await post("chat/completions", body, apiKey, signal);
  let isComplete = false;
  try {
    for await (const event of readEvents(response.body)) {
      if ("comment" in event) {
        yield { type: "waiting" };
      } else if (event.data === "[DONE]") {
        isComplete = true;
        break;
      } else {
        yield* answerEvents(event.data);
      }
    }
  } catch (error) {
    if (error instanceof ApiError || signal.aborted) throw error;
    throw new ApiError(0, "The connection broke off before the answer was complete.");
  }
  if (!isComplete)
    throw new ApiError(0, "The server closed the connection before the answer was complete.");
}

/** @returns {Generator<AnswerEvent>} */
function* answerEvents(data) {
  const chunk = parse(data);
  if (chunk === null) throw new ApiError(0, "The server sent something that is not JSON.");
  if (chunk.error) throw errorOf(Number(chunk.error.status) || 500, chunk, null);
  const choice = chunk.choices?.[0];
  const content = choice?.delta?.content ?? "";
  const reasoning = choice?.delta?.reasoning_content ?? "";
  if (content || reasoning) yield { type: "text", content, reasoning };
  if (choice?.finish_reason) yield { type: "finish", reason: choice.finish_reason };
  if (chunk.usage) yield { type: "usage", usage: chunk.usage };
}

function headersOf(apiKey) {
  return apiKey ? { authorization: `Bearer ${apiKey}` } : {};
}

function post(path, body, apiKey, signal) {
  const headers = { ...headersOf(apiKey), "content-type": "application/json" };
  return send(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

/** `fetch` whose every failure is an ApiError (an abort stays an abort). */
async function send(path, options) {
  let response;
  try {
    response = await fetch(new URL(path, BASE), { cache: "no-store", ...options });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new ApiError(
      0,
      "The server cannot be reached. It may have stopped, or the network is down.",
    );
  }
  if (response.ok) return response;
  const text = await response.text().catch(() => "");
  throw errorOf(response.status, parse(text), response.headers);
}

function errorOf(status, body, headers) {
  const { message, code } = body?.error ?? {};
  const text =
    typeof message === "string" && message ? message : `The server answered with status ${status}.`;
  const retryAfterSeconds = secondsUntil(headers?.get("retry-after"));
  const isFinal = headers?.get("x-should-retry") === "false";
  return new ApiError(status, text, { code, retryAfterSeconds, isFinal });
}

/** Retry-After is seconds or a date (RFC 9110 §10.2.3). */
function secondsUntil(retryAfter) {
  if (!retryAfter) return null;
  const seconds = /^\d+$/.test(retryAfter.trim())
    ? Number(retryAfter)
    : Math.ceil((Date.parse(retryAfter) - Date.now()) / 1000);
  return Number.isFinite(seconds) ? Math.max(0, seconds) : null;
}
