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
const MAX_IMPORT_BYTES = 100_000_000;
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
 * @param {File[]} files
 * @returns {Promise<{chats: import("./conversation.js").Conversation[], told: string}>} told: what
 *   the user is to know of it
 */
export async function readFiles(files) {
  const nothing = (told) => ({ chats: [], told });
  if (files.some(({ size }) => size > MAX_IMPORT_BYTES))
    return nothing(`A file of more than ${MAX_IMPORT_BYTES / 1e6} MB is not read.`);
  let texts;
  try {
    texts = await Promise.all(files.map((file) => file.text()));
  } catch {
    return nothing("The file cannot be read. It may have been moved or changed.");
  }
  const read = texts.map(readImport);
  const chats = read.flatMap((one) => one.chats);
  if (chats.length === 0) return nothing("There is no chat in this file that this page can read.");
  const numLeftOut = read.reduce((sum, one) => sum + one.numLeftOut, 0);
  const told = chats.length > 1 ? [`${chats.length} chats are imported.`] : [];
  if (numLeftOut > 0)
    told.push(`${numLeftOut} things in it that this page cannot show are left out.`);
  return { chats, told: told.join(" ") };
}

/**
 * @param {string} text of a file that this page exported, or of the API's messages
 * @returns {{chats: import("./conversation.js").Conversation[], numLeftOut: number}} no chats if
 *   it has none; of what it has, chats, messages and parts that cannot be shown are left out
 */
function readImport(text) {
  const raw = parse(text);
  if (raw?.format === FORMAT)
    return gathered([raw.chats ?? raw].flat().map((one) => [readConversation(one?.conversation), 0]));
  if (MARK.test(text)) return gathered(fromMarkdown(text));
  const lists = raw ? (Array.isArray(raw) && raw[0]?.role ? [raw] : [raw].flat()) : lines(text);
  return gathered(lists.map((one) => fromMessages(one?.messages ?? one)));
}

function gathered(found) {
  const chats = found.map(([chat]) => chat).filter(Boolean);
  const numInside = found.reduce((sum, [, number]) => sum + number, 0);
  return { chats, numLeftOut: found.length - chats.length + numInside };
}

const lines = (text) => text.split("\n").filter((line) => line.trim()).map(parse);

function fromMarkdown(text) {
  const pieces = text.split(new RegExp(MARK, "gm")).slice(1); // title, role, text, title, role, ...
  const chats = [];
  for (let at = 0; at < pieces.length; at += 3) {
    const content = pieces[at + 2].trim().replace(/<!-- \\(\\*)rorqual/g, "<!-- $1rorqual");
    if (pieces[at + 1] === "chat") chats.push({ title: pieces[at], messages: [] });
    else chats.at(-1)?.messages.push({ role: pieces[at + 1], content });
  }
  return chats.map(({ title, messages }) => fromMessages(messages, title));
}

/** @returns {[import("./conversation.js").Conversation|null, number]} the number: what it leaves out */
function fromMessages(messages, title = "") {
  if (!Array.isArray(messages)) return [null, 0];
  let numLeftOut = 0;
  const systems = [];
  const conversation = newConversation("");
  for (const message of messages) {
    const role = message?.role === "developer" ? "system" : message?.role;
    const parts = [message?.content ?? []].flat();
    const texts = parts.map((part) => part?.text ?? part).filter((part) => typeof part === "string");
    const isKnown = Object.hasOwn(HEADINGS, role) && (texts.length > 0 || role === "assistant");
    numLeftOut += isKnown ? parts.length - texts.length + (message.tool_calls?.length ?? 0) : 1;
    if (!isKnown) continue;
    const content = texts.join("");
    if (role === "system") {
      systems.push(content);
      continue;
    }
    const reasoning = role === "assistant" ? message.reasoning_content : "";
    const finish = role === "assistant" ? "stop" : null;
    addMessage(conversation, role, conversation.leaf.value, { content, reasoning, finish });
  }
  conversation.system.value = systems.join("\n\n");
  const chat = readConversation(conversation);
  if (!chat?.leaf.value) return [null, 0];
  if (title && title !== titleOf(chat)) setRegister(chat, "title", title);
  return [chat, numLeftOut];
}
