/**
 * The messages of the shown conversation, and where the reader is in them.
 *
 * @typedef {import("./conversation.js").Message} Message
 * @typedef {import("./message_view.js").State} State
 */
import { h, textButton } from "./dom.js";
import { MessageView } from "./message_view.js";

const NEAR_END_PIXELS = 96;

export class ChatView {
  /** @type {Map<string, MessageView>} */
  #views = new Map();
  #isFollowing = true;
  #isScheduled = false;

  /**
   * @param {{scroller: HTMLElement, list: HTMLElement, jump: HTMLElement}} elements
   * @param {import("./message_view.js").Actions & {answer(): void}} actions
   * @param {import("./markdown.js").Renderer} renderer
   */
  constructor({ scroller, list, jump }, actions, renderer) {
    this.scroller = scroller;
    this.list = list;
    this.jump = jump;
    this.actions = actions;
    this.renderer = renderer;
    this.unanswered = h(
      "p",
      { class: "note unanswered" },
      "This message has no answer yet. ",
      textButton("Get an answer", "link", () => actions.answer()),
    );
    scroller.addEventListener(
      "scroll",
      () => {
        this.#isFollowing = this.#isNearEnd();
        jump.hidden = this.#isFollowing;
      },
      { passive: true },
    );
    jump.addEventListener("click", () => this.follow());
    // A notice, a keyboard, a turned phone or a finished block changes the height.
    const observer = new ResizeObserver(() => this.#keepEnd());
    for (const node of [scroller, list]) observer.observe(node);
  }

  /**
   * Shows a path of messages; views of messages that stay are kept.
   * @param {Message[]} path
   * @param {(message: Message) => State} stateOf
   * @param {boolean} hasUnanswered whether to offer an answer to the last message
   */
  render(path, stateOf, hasUnanswered) {
    const wanted = new Set(path.map(({ id }) => id));
    for (const [id, view] of this.#views) {
      if (!wanted.has(id)) {
        view.node.remove();
        this.#views.delete(id);
      }
    }
    path.forEach((message, index) => {
      let view = this.#views.get(message.id);
      if (!view) {
        view = new MessageView(message, this.actions, this.renderer);
        this.#views.set(message.id, view);
      }
      if (this.list.children[index] !== view.node)
        this.list.insertBefore(view.node, this.list.children[index] ?? null);
      view.update(message, stateOf(message));
    });
    if (hasUnanswered) this.list.append(this.unanswered);
    else this.unanswered.remove();
    this.#keepEnd();
  }

  /** Forgets all views: another conversation follows. */
  clear() {
    this.#views.clear();
    this.list.replaceChildren();
  }

  /**
   * Redraws one message before the next frame, however many pieces arrive until then.
   * @param {Message} message
   * @param {(message: Message) => State} stateOf
   *   asked when it is drawn: the answer may be complete by then
   */
  updateSoon(message, stateOf) {
    this.next = message;
    if (this.#isScheduled) return;
    this.#isScheduled = true;
    const draw = () => {
      this.#isScheduled = false;
      const startedAt = performance.now();
      this.#views.get(this.next.id)?.update(this.next, stateOf(this.next));
      this.#keepEnd();
      this.lastCost = performance.now() - startedAt;
    };
    // A very long answer takes longer to draw: the browser keeps most of the time for the rest.
    if ((this.lastCost ?? 0) > 12) setTimeout(() => requestAnimationFrame(draw), 4 * this.lastCost);
    else requestAnimationFrame(draw);
  }

  /** @param {string} id of the message to change */
  edit(id) {
    this.#views.get(id)?.edit();
  }

  /** Goes to the end and stays there while text arrives. */
  follow() {
    this.#isFollowing = true;
    this.#keepEnd();
  }

  #isNearEnd() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroller;
    return scrollHeight - scrollTop - clientHeight < NEAR_END_PIXELS;
  }

  #keepEnd() {
    if (this.#isFollowing) this.scroller.scrollTop = this.scroller.scrollHeight;
    this.jump.hidden = this.#isFollowing || this.#isNearEnd();
  }
}
