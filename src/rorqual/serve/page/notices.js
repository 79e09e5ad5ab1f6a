/** What went wrong, in words, with a way on: above the message box. */
import { h, icon, textButton } from "./dom.js";

/**
 * @typedef {{title: string, text: string, kind?: "error"|"warning", retry?: () => void,
 *   retryLabel?: string, retryAfterSeconds?: number|null, askKey?: (key: string) => void,
 *   edit?: () => void, dismiss?: () => void}} Notice
 */

/**
 * @param {import("./api.js").ApiError} error
 * @param {{retry(): void, retryLabel?: string, askKey(key: string): void, edit?: () => void,
 *   dismiss?: () => void}} ways on, of which the notice has those that can help
 * @param {boolean} hasKey whether a key was sent
 * @returns {Notice}
 */
export function noticeOf(error, { retry, retryLabel, askKey, edit, dismiss }, hasKey) {
  const { status, retryAfterSeconds } = error;
  const text = sentence(error.message);
  const again = error.mayPass ? { text, retry, retryLabel } : { text, dismiss };
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
      retryAfterSeconds,
      ...again,
    };
  }
  if (status === 0) return { title: "No connection", ...again };
  if (error.code === "context_length_exceeded")
    return { title: "This is too long for the model", ...again, edit };
  const isRefusal = status >= 400 && status < 500;
  return { title: isRefusal ? "The server refused the request" : "The server failed", ...again };
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
    actions.append(textButton(notice.retryLabel ?? "Try again", "button primary", notice.retry));
  }
  if (notice.edit) actions.append(textButton("Edit the message", "button primary", notice.edit));
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
