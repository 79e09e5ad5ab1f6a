/** One message on the page: a question that can be edited, or an answer that may still grow. */
import { copyButton, h, icon, iconButton, textButton } from "./dom.js";
import { MarkdownView } from "./markdown.js";
import { figures } from "./stats.js";

/**
 * @typedef {import("./conversation.js").Message} Message
 * @typedef {{isLive: boolean, isQueued: boolean, siblings: Message[], canChange: boolean,
 *   isLast: boolean}} State
 *   canChange: no answer is being written in this conversation; isLast: nothing follows
 * @typedef {{regenerate(id: string): void, edit(id: string, text: string): void,
 *   save(id: string, text: string): void, goOn(id: string): void, remove(id: string): void,
 *   show(id: string): void}} Actions
 */

const MOST_SHOWN = 1_000_000;
const ENDINGS = {
  stopped: "Stopped.",
  length: "Cut off: the longest answer, or the context, was reached.",
  error: "Broken off before its end.",
  edited: "Edited by you.",
  content_filter: "Ended by the server's filter.",
};

export class MessageView {
  /**
   * @param {Message} message
   * @param {Actions} actions
   * @param {import("./markdown.js").Renderer} renderer
   */
  constructor(message, actions, renderer) {
    this.message = message;
    this.actions = actions;
    this.renderer = renderer;
    this.footer = h("footer", { class: "message-foot" });
    const isUser = message.role === "user";
    this.body = isUser ? h("div", { class: "bubble" }) : h("div", { class: "markdown" });
    this.node = h(
      "article",
      { class: `message ${message.role}`, "data-id": message.id },
      h("h2", { class: "visually-hidden" }, isUser ? "You" : "Answer"),
    );
    if (!isUser) {
      this.#makeReasoning();
      this.markdown = new MarkdownView(this.body, renderer);
      this.note = h("p", { class: "note", hidden: true });
      this.skipped = h("p", { class: "skipped", hidden: true });
      this.node.append(this.skipped, this.reasoning, this.body, this.note, this.footer);
    } else {
      this.files = h("div", { class: "message-files" });
      this.node.append(h("div", { class: "question" }, this.files, this.body), this.footer);
    }
  }

  /**
   * @param {Message} message
   * @param {State} state
   */
  update(message, state) {
    this.message = message;
    this.state = state;
    if (message.role === "user") {
      if (this.shownText !== message.content) this.#updateQuestion();
    } else {
      this.#updateAnswer();
    }
    this.#updateFooter();
  }

  #updateQuestion() {
    const { content, files } = this.message;
    this.shownText = content;
    this.body.textContent = beginningOf(content);
    this.body.hidden = !content;
    this.files.replaceChildren(
      ...files.map(({ name, text }) =>
        h("details", {}, h("summary", {}, `${name} · ${sizeOf(text)}`), h("pre", { tabindex: "0" }, beginningOf(text))),
      ),
    );
  }

  #makeReasoning() {
    this.reasoningTitle = h("span", {}, "Thinking");
    const text = h("div", { class: "markdown reasoning-text" });
    this.reasoningMarkdown = new MarkdownView(text, this.renderer);
    this.reasoning = h(
      "details",
      { class: "reasoning", hidden: true },
      h(
        "summary",
        {
          on: {
            click: () => {
              this.isFoldChosen = true;
            },
          },
        },
        icon("chevron"),
        this.reasoningTitle,
      ),
      text,
    );
  }

  #updateAnswer() {
    const { message, state } = this;
    const isThinking = state.isLive && !message.content;
    const shown = (text) => (state.isLive ? text : beginningOf(text));
    this.node.setAttribute("aria-busy", String(state.isLive));
    this.node.classList.toggle("live", state.isLive);
    this.reasoning.hidden = !message.reasoning;
    if (message.reasoning) {
      this.reasoningMarkdown.update(shown(message.reasoning), !isThinking);
      // Open while there is nothing else to read, unless the reader chose otherwise.
      if (!this.isFoldChosen) this.reasoning.open = isThinking;
      this.reasoning.classList.toggle("live", isThinking);
      const seconds = message.timing?.reasoningSeconds;
      this.reasoningTitle.textContent = isThinking
        ? "Thinking"
        : typeof seconds === "number"
          ? `Thought for ${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} s`
          : "Thoughts";
    }
    if (!this.isEditing) this.markdown.update(shown(message.content), !state.isLive);
    this.skipped.hidden = !(message.skipped && state.isLast);
    this.skipped.textContent =
      `The ${message.skipped} oldest messages were left out: the model's context has no room for them.`;
    const note = this.#noteText();
    this.note.hidden = note === "";
    this.note.classList.toggle("waiting", state.isLive);
    if (this.note.textContent !== note) this.note.textContent = note;
  }

  #noteText() {
    const { message, state } = this;
    if (state.isLive) {
      if (message.content || message.reasoning) return "";
      return state.isQueued ? "Waiting in the server's queue" : "Reading";
    }
    if (message.finish === null)
      return "Unfinished: the page was closed, or another tab is still writing.";
    if (message.finish === "stop" && !message.content && !message.reasoning)
      return "The model gave an empty answer.";
    return ENDINGS[message.finish] ?? "";
  }

  #updateFooter() {
    const { message, state } = this;
    // Rebuilt only when it would look different, so that the keyboard's focus stays in it.
    const mark = JSON.stringify([
      state.isLive,
      state.isLast,
      state.canChange,
      message.usage,
      message.finish,
      this.isEditing,
      state.siblings.map(({ id }) => id),
      message.timing && !state.isLive ? message.timing : null,
    ]);
    if (mark === this.footerMark) return;
    this.footerMark = mark;
    this.footer.hidden = state.isLive || Boolean(this.isEditing);
    if (this.footer.hidden) {
      this.footer.replaceChildren();
      return;
    }
    const buttons = h("div", { class: "message-actions" });
    buttons.append(copyButton("Copy message", () => this.message.content));
    const isUser = message.role === "user";
    const add = (name, label, action) =>
      buttons.append(iconButton(name, label, action, { disabled: !state.canChange }));
    add("pencil", isUser ? "Edit message" : "Edit answer", () => this.edit());
    if (!isUser) add("refresh", "Write another answer", () => this.actions.regenerate(message.id));
    if (!isUser && state.isLast && message.finish !== "stop")
      add("forward", "Continue the answer", () => this.actions.goOn(message.id));
    add("trash", "Delete from here", () => this.actions.remove(message.id));
    if (state.siblings.length > 1) buttons.append(this.#branches());
    const items = message.role === "assistant" ? figures(message) : [];
    this.footer.replaceChildren(buttons);
    if (items.length > 0) {
      this.footer.append(
        h(
          "ul",
          { class: "figures", "aria-label": "Figures of this answer" },
          ...items.map(({ text, detail }) => h("li", { title: detail }, text)),
        ),
      );
    }
  }

  #branches() {
    const { siblings, canChange } = this.state;
    const index = siblings.findIndex(({ id }) => id === this.message.id);
    const step = (by, name, label) =>
      iconButton(name, label, () => this.actions.show(siblings[index + by].id), {
        disabled: !canChange || !siblings[index + by],
      });
    return h(
      "span",
      { class: "branches" },
      step(-1, "left", "Earlier version"),
      h(
        "span",
        { "aria-label": `Version ${index + 1} of ${siblings.length}` },
        `${index + 1}/${siblings.length}`,
      ),
      step(1, "right", "Later version"),
    );
  }

  /** Lets the user change it in place. */
  edit() {
    const isUser = this.message.role === "user";
    const label = isUser ? "Edit message" : "Edit answer";
    const area = h("textarea", { "aria-label": label, rows: 1 });
    area.value = this.message.content;
    const end = () => {
      this.isEditing = false;
      this.shownText = null;
      this.node.classList.remove("editing");
      if (!isUser) this.markdown = new MarkdownView(this.body, this.renderer);
    };
    const close = () => {
      end();
      this.update(this.message, this.state);
      this.footer.querySelector(`[aria-label='${label}']`)?.focus();
    };
    const take = (action) => {
      const text = isUser ? area.value.trim() : area.value;
      if (!text.trim() || !this.state.canChange) return;
      end();
      action(this.message.id, text);
    };
    const [save, send] = ["save", "edit"].map((name) => () => take(this.actions[name]));
    const onKey = (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        close();
      } else if (isUser && isSendKey(event)) {
        event.preventDefault();
        send();
      }
    };
    area.addEventListener("keydown", onKey);
    area.addEventListener("input", () => fitHeight(area));
    this.isEditing = true;
    this.body.hidden = false;
    this.node.classList.add("editing");
    this.body.replaceChildren(
      area,
      h(
        "div",
        { class: "edit-actions" },
        textButton("Cancel", "button", close),
        textButton("Save", isUser ? "button" : "button primary", save),
        isUser && textButton("Send", "button primary", send),
      ),
    );
    this.#updateFooter();
    fitHeight(area);
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
  }
}

/** A browser stands still for a minute where it lays out tens of millions of characters. */
function beginningOf(text) {
  const numLeft = text.length - MOST_SHOWN;
  const told = `\n\n[${numLeft.toLocaleString("en-GB")} more characters are not shown]`;
  return numLeft > 0 ? text.slice(0, MOST_SHOWN) + told : text;
}

const sizeOf = (text) =>
  text.length < 1000 ? `${text.length} characters` : `${Math.round(text.length / 1000)} kB`;

/**
 * Whether a key press sends: Enter without Shift, outside an input method's composition. A phone's
 * Enter makes a new line, for it has no Shift+Enter.
 * @param {KeyboardEvent} event
 */
export function isSendKey(event) {
  const isComposing = event.isComposing || event.keyCode === 229;
  const isPhone = window.matchMedia("(hover: none) and (pointer: coarse)").matches;
  return event.key === "Enter" && !event.shiftKey && !isComposing && !isPhone;
}

/**
 * Makes a text box as high as its text; the style sheet limits it.
 * @param {HTMLTextAreaElement} area
 */
export function fitHeight(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + area.offsetHeight - area.clientHeight}px`;
}
