/** What went wrong, in words, with a way on: above the message box. */
import { h, icon, textButton } from "./dom.js";

/**
 * @typedef {{title: string, text: string, kind?: "error"|"warning", retry?: () => void,
 *   retryAfterSeconds?: number|null, askKey?: (key: string) => void, dismiss?: () => void}} Notice
 */

/**
 * @param {import("./api.js").ApiError} error
 * @param {() => void} retry
 * @param {(key: string) => void} askKey
 * @param {boolean} hasKey whether a key was sent
 * @returns {Notice}
 */
export function noticeOf(error, retry, askKey, hasKey) {
  const { status, retryAfterSeconds } = error;
  const text = sentence(error.message);
  if (status === 401) {
    return {
      kind: hasKey ? "error" : "warning",
      title: hasKey ? "The server does not know this API key" : "This server asks for an API key",
      text: "It is kept in this tab only and forgotten when you close it.",
      askKey,
    };
  }
  if (status === 429 || status === 503) {
    return {
      kind: "warning",
      title: status === 429 ? "The server is busy" : "The server takes no requests just now",
      text,
      retry,
      retryAfterSeconds,
    };
  }
  if (status === 0) return { title: "No connection", text, retry };
  if (status >= 400 && status < 500) {
    return { title: "The server refused the request", text, retry };
  }
  return { title: "The server failed", text, retry };
}

/**
 * @param {Notice} notice
 * @returns {HTMLElement}
 */
export function renderNotice(notice) {
  const actions = h("div", { class: "notice-actions" });
  const node = h(
    "section",
    { class: `notice ${notice.kind ?? "error"}`, role: "alert" },
    icon("warning"),
    h("div", { class: "notice-text" }, h("strong", {}, notice.title), h("p", {}, notice.text)),
    actions,
  );
  if (notice.askKey) actions.append(keyForm(notice.askKey));
  if (notice.retry) {
    if (notice.retryAfterSeconds) actions.append(countdown(notice.retryAfterSeconds));
    actions.append(textButton("Try again", "button primary", notice.retry));
  }
  if (notice.dismiss) {
    actions.append(textButton("Dismiss", "button", notice.dismiss));
  }
  return node;
}

/** Servers begin their messages in small letters and end them without a full stop. */
function sentence(message) {
  const text = message.charAt(0).toUpperCase() + message.slice(1);
  return /[.!?]$/.test(text) ? text : `${text}.`;
}

function keyForm(askKey) {
  const box = h("input", {
    type: "password",
    autocomplete: "off",
    required: true,
    placeholder: "API key",
    "aria-label": "API key",
    spellcheck: "false",
  });
  const form = h(
    "form",
    { class: "key-form" },
    box,
    h("button", { type: "submit", class: "button primary" }, "Use this key"),
  );
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (box.value.trim()) askKey(box.value.trim());
  });
  return form;
}

/** The server's Retry-After, counted down; trying earlier is not forbidden. */
function countdown(seconds) {
  const readyAt = performance.now() + seconds * 1000;
  const node = h("span", { class: "countdown", "aria-live": "off" });
  const tick = () => {
    const left = Math.ceil((readyAt - performance.now()) / 1000);
    node.textContent =
      left > 0 ? `The server asks for ${left} s of patience` : "Ready to try again";
    if (left <= 0 || (node.isConnected === false && left < seconds - 1)) clearInterval(timer);
  };
  const timer = setInterval(tick, 500);
  tick();
  return node;
}
