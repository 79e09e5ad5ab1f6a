/** Conversations as files: out as JSON, and in again. */
import { apiMessages, readConversation, titleOf, toKeep } from "./conversation.js";
import { h } from "./dom.js";

const FORMAT = "rorqual-chat";

/**
 * Downloads a conversation. `messages` is the shown branch in the API's own form, ready for a
 * request; `conversation` holds all branches and is what `readExport` takes.
 * @param {import("./conversation.js").Conversation} conversation
 */
export function downloadChat(conversation) {
  const title = titleOf(conversation);
  const kept = toKeep(conversation);
  const content = {
    format: FORMAT,
    version: 1,
    exportedAt: new Date().toISOString(),
    title,
    messages: apiMessages(kept, kept.leaf.value),
    conversation: kept,
  };
  const name =
    title
      .toLowerCase()
      .replace(/[^\p{L}\p{N}]+/gu, "-")
      .replace(/^-|-$/g, "")
      .slice(0, 48) || "chat";
  const url = URL.createObjectURL(
    new Blob([`${JSON.stringify(content, null, 2)}\n`], { type: "application/json" }),
  );
  const link = h("a", { href: url, download: `rorqual-${name}.json`, hidden: true });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/**
 * @param {string} text of an exported file
 * @returns {import("./conversation.js").Conversation|null} null if it is no chat of this page
 */
export function readExport(text) {
  try {
    const raw = JSON.parse(text);
    return raw?.format === FORMAT ? readConversation(raw.conversation) : null;
  } catch {
    return null;
  }
}
