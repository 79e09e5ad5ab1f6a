/** Conversations as files: out as JSON, markdown or the API's messages, and in again from each. */
import {
  addMessage,
  apiMessages,
  newConversation,
  readConversation,
  setRegister,
  titleOf,
  toKeep,
} from "./conversation.js";
import { h } from "./dom.js";
import { parse } from "./store.js";

const FORMAT = "rorqual-chat";
const HEADINGS = { system: "System", user: "You", assistant: "Answer" };
const MARK = /^#{1,2} (.*) <!-- rorqual (chat|system|user|assistant) -->$/m;

/** form -> [ending of the file, its text for some conversations] */
const FORMS = {
  json: ["json", (chats) => `${JSON.stringify(whole(chats), null, 2)}\n`],
  markdown: ["md", (chats) => chats.map(toMarkdown).join("\n")],
  // A line a conversation, as OpenAI takes them for fine-tuning and `rorqual train` does.
  messages: ["jsonl", (chats) => chats.map((chat) => `${JSON.stringify(shown(chat))}\n`).join("")],
};

/**
 * Downloads conversations: of JSON, all branches, which is what keeps everything; else what is shown.
 * @param {import("./conversation.js").Conversation[]} chats
 * @param {"json"|"markdown"|"messages"} form
 */
export function download(chats, form) {
  const [ending, write] = FORMS[form];
  const title = chats.length === 1 ? titleOf(chats[0]) : "chats";
  const name = title
    .toLowerCase()
    .replace(/[^\p{L}\p{N}]+/gu, "-")
    .replace(/^-|-$/g, "")
    .slice(0, 48);
  const url = URL.createObjectURL(new Blob([write(chats)], { type: "text/plain" }));
  const link = h("a", { href: url, download: `rorqual-${name || "chat"}.${ending}`, hidden: true });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

const shown = (chat) => ({ messages: apiMessages(chat, toKeep(chat).leaf.value) });

function whole(chats) {
  const exportedAt = new Date().toISOString();
  const all = chats.map((chat) => ({ title: titleOf(chat), ...shown(chat), conversation: toKeep(chat) }));
  const [one] = all;
  return { format: FORMAT, version: 1, exportedAt, ...(all.length === 1 ? one : { chats: all }) };
}

/** A mark within a text gets a backslash, of which reading takes one away. */
function toMarkdown(chat) {
  const parts = shown(chat).messages.map(({ role, content }) => {
    const text = content.replace(/<!-- (\\*)rorqual/g, "<!-- \\$1rorqual");
    return `## ${HEADINGS[role]} <!-- rorqual ${role} -->\n\n${text}\n`;
  });
  return [`# ${titleOf(chat)} <!-- rorqual chat -->\n`, ...parts].join("\n");
}

/**
 * @param {string} text of a file that this page exported, or of the API's messages
 * @returns {import("./conversation.js").Conversation[]} none if it has no chat
 */
export function readImport(text) {
  const raw = parse(text);
  if (raw?.format === FORMAT)
    return [raw.chats ?? raw].flat().map((one) => readConversation(one?.conversation)).filter(Boolean);
  if (MARK.test(text)) return fromMarkdown(text);
  const lists = raw ? (Array.isArray(raw) && raw[0]?.role ? [raw] : [raw].flat()) : lines(text);
  return lists.map((one) => fromMessages(one?.messages ?? one)).filter(Boolean);
}

const lines = (text) => text.split("\n").map(parse).filter(Boolean);

function fromMarkdown(text) {
  const pieces = text.split(new RegExp(MARK, "gm")).slice(1); // title, role, text, title, role, ...
  const chats = [];
  for (let at = 0; at < pieces.length; at += 3) {
    const content = pieces[at + 2].trim().replace(/<!-- \\(\\*)rorqual/g, "<!-- $1rorqual");
    if (pieces[at + 1] === "chat") chats.push({ title: pieces[at], messages: [] });
    else chats.at(-1)?.messages.push({ role: pieces[at + 1], content });
  }
  return chats.map(({ title, messages }) => fromMessages(messages, title)).filter(Boolean);
}

function fromMessages(messages, title = "") {
  if (!Array.isArray(messages)) return null;
  const textOf = ({ content }) =>
    Array.isArray(content) ? content.map((part) => part?.text ?? "").join("") : String(content ?? "");
  const known = messages.filter((message) => Object.hasOwn(HEADINGS, message?.role));
  const systems = known.filter(({ role }) => role === "system").map(textOf);
  const conversation = newConversation(systems.join("\n\n"));
  for (const message of known.filter(({ role }) => role !== "system")) {
    const finish = message.role === "assistant" ? "stop" : null;
    const fields = { content: textOf(message), finish };
    addMessage(conversation, message.role, conversation.leaf.value, fields);
  }
  const chat = readConversation(conversation);
  if (!chat?.leaf.value) return null;
  if (title && title !== titleOf(chat)) setRegister(chat, "title", title);
  return chat;
}
