/** The server's routes that this page uses, and what can go wrong with them. */
import { readEvents } from "./stream.js";

// Beside the page, so that a proxy may serve all of it under a path of its own.
const BASE = new URL("../v1/", import.meta.url);

/**
 * A request that failed. `status` 0: no answer came, or it broke off.
 */
export class ApiError extends Error {
  /**
   * @param {number} status
   * @param {string} message
   * @param {{param?: string|null, code?: string|null, retryAfterSeconds?: number|null}} [details]
   */
  constructor(status, message, { param = null, code = null, retryAfterSeconds = null } = {}) {
    super(message);
    this.name = "ApiError";
    this.status = status;
    this.param = param;
    this.code = code;
    this.retryAfterSeconds = retryAfterSeconds;
  }
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
 * @param {{model: string|null, messages: object[], sampling: Record<string, number>}} request
 * @param {string} apiKey
 * @param {AbortSignal} signal its abort ends the request on the server too
 * @returns {AsyncGenerator<AnswerEvent>}
 * @throws {ApiError} or the signal's AbortError
 */
export async function* streamAnswer({ model, messages, sampling }, apiKey, signal) {
  const body = {
    ...(model && { model }),
    messages,
    stream: true,
    stream_options: { include_usage: true },
    ...sampling,
  };
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
  throw errorOf(response.status, parse(text), response.headers.get("retry-after"));
}

function errorOf(status, body, retryAfter) {
  const { message, param, code } = body?.error ?? {};
  const text =
    typeof message === "string" && message ? message : `The server answered with status ${status}.`;
  return new ApiError(status, text, { param, code, retryAfterSeconds: secondsUntil(retryAfter) });
}

/** Retry-After is seconds or a date (RFC 9110 §10.2.3). */
function secondsUntil(retryAfter) {
  if (!retryAfter) return null;
  const seconds = /^\d+$/.test(retryAfter.trim())
    ? Number(retryAfter)
    : Math.ceil((Date.parse(retryAfter) - Date.now()) / 1000);
  return Number.isFinite(seconds) ? Math.max(0, seconds) : null;
}

/** JSON, or null if it is none. */
function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}
