/**
 * Markdown on the page: the server makes HTML of finished blocks, what is being written is plain text.
 *
 * A text is cut where no block can go on. Each cut block has one element: what the server made of
 * its beginning, and the rest as it was written. So it can be read without a server too, and what
 * is finished keeps its nodes: a selection, a scrolled table, a copy button.
 */
import { copyButton, h } from "./dom.js";

const BATCH_CHARACTERS = 20_000;
const KEPT_CHARACTERS = 4_000_000;
const PATIENCE_MILLISECONDS = 5000;
const FENCE = /^\s*(?:>\s*)*(?:(?:[-*+]|\d+[.)])\s+)*(`{3,}|~{3,})(.*)$/;
const LIST = /^([-*+]|\d{1,9}[.)])(\s|$)/;
const DEFINITION = /^ {0,3}\[[^\]\n]+\]:/m; // a footnote's or a link's: the whole text may need it

/** Asks for HTML in batches, in the order of wishing, and keeps what came by its text. */
export class Renderer {
  #kept = new Map();
  #size = 0;
  #wanted = new Map();
  #isAsking = false;

  /** @param {(texts: string[]) => Promise<(string|null)[]>} ask */
  constructor(ask) {
    this.ask = ask;
  }

  /**
   * @param {string} text
   * @param {MarkdownView} view redrawn when it is there
   * @param {string} [before] what the view wished for in its place
   * @returns {string|null|undefined} null: it stays plain; undefined: not known yet
   */
  html(text, view, before) {
    if (before !== text) this.#wanted.get(before)?.delete(view);
    if (this.#kept.has(text)) return this.#kept.get(text);
    if (!this.#wanted.has(text)) this.#wanted.set(text, new Set());
    this.#wanted.get(text).add(view);
    if (!this.#isAsking) this.#next(0);
    return undefined;
  }

  #next(wait) {
    this.#isAsking = this.#wanted.size > 0;
    if (this.#isAsking) setTimeout(() => this.#batch(), wait);
  }

  async #batch() {
    const texts = [];
    let size = 0;
    for (const [text, views] of this.#wanted) {
      if (![...views].some((view) => view.root.isConnected)) {
        this.#wanted.delete(text);
      } else if (texts.length === 0 || (size + text.length < BATCH_CHARACTERS && texts.length < 100)) {
        size += text.length;
        texts.push(text);
      }
    }
    let htmls = [];
    const askedAt = performance.now();
    try {
      if (texts.length > 0) htmls = await this.ask(texts);
    } catch (error) {
      if (error.mayPass || error.status === 401) return this.#next(PATIENCE_MILLISECONDS);
    }
    const views = new Set();
    texts.forEach((text, index) => {
      const html = htmls[index] ?? null;
      this.#kept.set(text, html);
      this.#size += text.length + (html?.length ?? 0);
      for (const view of this.#wanted.get(text)) views.add(view);
      this.#wanted.delete(text);
    });
    for (const [text, html] of this.#kept) {
      if (this.#size < KEPT_CHARACTERS) break;
      this.#kept.delete(text);
      this.#size -= text.length + (html?.length ?? 0);
    }
    for (const view of views) view.redraw();
    // A list that grows is asked for as a whole, so the server has most of its time for others.
    this.#next(Math.min(500, 30 + performance.now() - askedAt));
  }
}

/** Shows one text in one element and follows it as it grows. */
export class MarkdownView {
  /**
   * @param {HTMLElement} root emptied; its children belong to this view
   * @param {Renderer} renderer
   */
  constructor(root, renderer) {
    this.root = root;
    this.renderer = renderer;
    this.#reset();
  }

  /**
   * @param {string} text the whole text, not only what is new
   * @param {boolean} isDone nothing more is coming
   */
  update(text, isDone) {
    if (text === this.text && isDone === this.isDone) return;
    if (!text.startsWith(this.text)) this.#reset();
    else if (this.isDone) this.#rescan(); // it goes on
    this.text = text;
    this.isDone = isDone;
    this.#cut();
    this.redraw();
  }

  redraw() {
    const { text, isDone, starts } = this;
    if (isDone && starts.length > 1 && DEFINITION.test(text)) {
      if (typeof this.renderer.html(text.trimEnd(), this) === "string") {
        starts.length = 1;
        this.scannedTo = text.length;
      }
    }
    for (const extra of this.blocks.splice(starts.length)) extra.node.remove();
    starts.forEach((start, index) => {
      const isLast = index === starts.length - 1;
      const end = isLast ? text.length : starts[index + 1];
      const stable = isLast && !isDone ? this.blankAt : end;
      this.#draw(index, text.slice(start, end), text.slice(start, stable).trimEnd());
    });
  }

  #reset() {
    Object.assign(this, { text: "", isDone: false, blocks: [] });
    this.#rescan();
    this.root.replaceChildren();
  }

  #rescan() {
    Object.assign(this, { starts: [0], scannedTo: 0, blankAt: 0, fence: null, isMath: false });
  }

  /** Looks through the lines that are new and whole. */
  #cut() {
    const { text, isDone } = this;
    while (this.scannedTo < text.length) {
      const at = this.scannedTo;
      const found = text.indexOf("\n", at);
      if (found < 0 && !isDone) break;
      const end = found < 0 ? text.length : found;
      const line = text.slice(at, end);
      this.scannedTo = end + 1;
      const [, marks, info] = FENCE.exec(line) ?? [];
      if (this.fence) {
        if (marks?.startsWith(this.fence) && !info.trim()) this.fence = null;
      } else if (this.isMath) {
        this.isMath = !/(\$\$|\\\])\s*$/.test(line);
      } else if (!line.trim()) {
        this.blankAt = end + 1;
      } else {
        if (this.blankAt === at && at > 0 && /^\S/.test(line) && !LIST.test(line))
          this.starts.splice(this.#hasText(at) ? this.starts.length : -1, 1, at);
        if (marks && !(marks[0] === "`" && info.includes("`"))) this.fence = marks;
        this.isMath = /^\s*(\$\$|\\\[)/.test(line) && !/.(\$\$|\\\])/.test(line.trim().slice(1));
      }
    }
  }

  #hasText(end) {
    return this.text.slice(this.starts[this.starts.length - 1], end).trim() !== "";
  }

  /** Of a block's text its `stable` beginning is the server's, as soon as it is known. */
  #draw(index, text, stable) {
    let block = this.blocks[index];
    if (!block) {
      const [rich, plain] = [h("div", { class: "rich" }), h("div", { class: "plain" })];
      block = { rich, plain, node: h("div", { class: "block" }, rich, plain), drawn: "", rest: "" };
      this.blocks[index] = block;
      this.root.append(block.node);
    }
    if (stable !== block.drawn) {
      const html = stable && this.renderer.html(stable, this, block.asked);
      block.asked = stable;
      if (typeof html === "string") {
        fill(block.rich, html);
        block.drawn = stable;
      }
    }
    if (!text.startsWith(block.drawn)) {
      block.rich.replaceChildren(); // another text
      block.drawn = "";
    }
    const rest = text.slice(block.drawn.length).trimEnd().replace(/^\n+/, "");
    if (rest === block.rest) return;
    if (block.rest && rest.startsWith(block.rest)) {
      block.plain.firstChild.appendData(rest.slice(block.rest.length));
    } else block.plain.textContent = rest;
    block.rest = rest;
    block.plain.classList.toggle("is-code", FENCE.test(rest.split("\n", 1)[0]));
  }
}

/** The server has cleaned it, and the page's policy lets no script or style of it act. */
function fill(root, html) {
  adopt(root, new DOMParser().parseFromString(html, "text/html").body);
  for (const caption of root.querySelectorAll(".code > figcaption:not(:has(button))")) {
    const code = caption.nextElementSibling;
    caption.append(copyButton("Copy code", () => code.textContent));
  }
}

/** What is the same stays, also of a list: it grows by items. */
function adopt(root, fresh) {
  const before = [...root.childNodes];
  [...fresh.childNodes].forEach((node) => {
    const old = before.shift();
    if (!old) root.append(node);
    else if (old.isEqualNode(node)) return;
    else if (/^[UO]L$/.test(node.nodeName) && old.nodeName === node.nodeName) adopt(old, node);
    else old.replaceWith(node);
  });
  for (const extra of before) extra.remove();
}
