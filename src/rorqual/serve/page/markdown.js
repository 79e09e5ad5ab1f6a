/**
 * Markdown on the page: blocks become DOM nodes, and an answer that grows keeps its finished ones.
 *
 * A block is replaced only when its own lines changed, so that a selection, a scrolled table or a
 * copy button above the writing stays as it is. A prefix never leaves a trace: after the last update
 * the DOM equals that of the whole text rendered at once.
 */
import { copyButton, h } from "./dom.js";
import { parseBlocks } from "./markdown_blocks.js";
import { parseInline } from "./markdown_inline.js";

/** Shows one text in one element and follows it as it grows. */
export class MarkdownView {
  /** @param {HTMLElement} root emptied; its children belong to this view */
  constructor(root) {
    this.root = root;
    this.shown = []; // {type, raw, node}
    root.replaceChildren();
  }

  /** @param {string} text the whole text, not only what is new */
  update(text) {
    const blocks = parseBlocks(text);
    blocks.forEach((block, index) => {
      const old = this.shown[index];
      if (old?.type === block.type && old.raw === block.raw) return;
      if (old?.type === "code" && block.type === "code" && old.info === block.info) {
        old.node.querySelector("code").textContent = block.text; // keeps its scroll and its button
        Object.assign(old, { raw: block.raw });
        return;
      }
      const node = renderBlock(block);
      if (old) old.node.replaceWith(node);
      else this.root.append(node);
      this.shown[index] = { type: block.type, raw: block.raw, info: block.info, node };
    });
    for (const extra of this.shown.splice(blocks.length)) extra.node.remove();
  }
}

/**
 * @param {HTMLElement} root
 * @param {string} text
 */
export function renderMarkdown(root, text) {
  new MarkdownView(root).update(text);
}

/** @returns {HTMLElement} */
function renderBlock(block) {
  switch (block.type) {
    case "heading":
      // The page's own title is level 1 and each message level 2.
      return h(
        `h${Math.min(6, block.level + 2)}`,
        { "data-level": block.level },
        ...inline(block.text),
      );
    case "code":
      return renderCode(block);
    case "rule":
      return h("hr");
    case "quote":
      return h("blockquote", {}, ...block.blocks.map(renderBlock));
    case "list":
      return renderList(block);
    case "table":
      return renderTable(block);
    default:
      return h("p", {}, ...inline(block.text));
  }
}

function renderCode(block) {
  const code = h("code", {}, block.text);
  const language = /^[\w+#.-]{1,24}/.exec(block.info)?.[0] ?? "";
  return h(
    "figure",
    { class: "code" },
    h(
      "figcaption",
      {},
      h("span", {}, language || "text"),
      copyButton("Copy code", () => code.textContent),
    ),
    h("pre", { tabindex: "0", "aria-label": language ? `Code, ${language}` : "Code" }, code),
  );
}

function renderList(block) {
  const items = block.items.map((item) => {
    const children = item.blocks.flatMap((inner) =>
      block.isTight && inner.type === "paragraph" ? inline(inner.text) : [renderBlock(inner)],
    );
    if (item.isDone === null) return h("li", {}, ...children);
    const box = h("input", {
      type: "checkbox",
      disabled: true,
      checked: item.isDone,
      "aria-label": item.isDone ? "Done" : "Not done",
    });
    return h("li", { class: "task" }, box, ...children);
  });
  if (!block.isOrdered) return h("ul", {}, ...items);
  return h("ol", { start: block.start === 1 ? null : block.start }, ...items);
}

function renderTable(block) {
  const row = (texts, tag) =>
    h(
      "tr",
      {},
      ...texts.map((text, column) =>
        h(
          tag,
          { "data-align": block.align[column] || null, scope: tag === "th" ? "col" : null },
          ...inline(text),
        ),
      ),
    );
  const [header, ...body] = block.rows;
  const table = h(
    "table",
    {},
    h("thead", {}, row(header, "th")),
    body.length > 0 && h("tbody", {}, ...body.map((texts) => row(texts, "td"))),
  );
  return h("div", { class: "table", tabindex: "0", role: "group", "aria-label": "Table" }, table);
}

const inline = (text) => renderInline(parseInline(text));

/** @returns {Node[]} */
function renderInline(nodes) {
  return nodes.map((node) => {
    switch (node.type) {
      case "text":
        return document.createTextNode(node.value);
      case "break":
        return h("br");
      case "code":
        return h("code", {}, node.value);
      case "link":
        return h(
          "a",
          {
            href: node.href,
            title: node.href,
            target: "_blank",
            rel: "noopener noreferrer nofollow",
          },
          ...renderInline(node.children),
        );
      default:
        return h(node.type, {}, ...renderInline(node.children));
    }
  });
}
