/**
 * A conversation as data: a tree of messages and a pointer to the leaf that is shown.
 *
 * Regenerating an answer or sending a changed question adds a branch. Messages are only ever added (a
 * deleted one stays, empty), and each, like title, system prompt and leaf, carries the time of its last
 * change, so that two copies (two tabs, an export) always merge: the union of the messages, the later
 * state of each, the later of each register (of the leaf only where it leads on).
 *
 * @typedef {{value: string|null, at: number}} Register
 * @typedef {{id: string, parent: string|null, role: "user"|"assistant", content: string,
 *   reasoning: string, createdAt: number, updatedAt: number, model: string|null,
 *   finish: string|null, usage: object|null, timing: object|null, skipped: number,
 *   files: {name: string, text: string}[], isDeleted: boolean}} Message
 *   finish: null while it is written (or where the page was closed meanwhile), "stop", "length",
 *   "stopped" or "edited" by the user, "error"; skipped: of the messages before it, so many did not
 *   fit; timing: {firstTokenSeconds, totalSeconds, reasoningSeconds}
 * @typedef {{version: 1, id: string, createdAt: number, title: Register, system: Register,
 *   leaf: Register, messages: Record<string, Message>}} Conversation
 */

export const VERSION = 1;
const MAX_TITLE = 60;

/** Messages by id, where no id is known from the start, as `constructor` is in other objects. */
const byId = () => Object.create(null);

/** Ids work without a secure context, where `crypto.randomUUID` is missing. */
export function newId() {
  return [...crypto.getRandomValues(new Uint8Array(9))]
    .map((byte) => byte.toString(36).padStart(2, "0"))
    .join("");
}

/**
 * @param {string} system the system prompt; empty for none
 * @returns {Conversation}
 */
export function newConversation(system) {
  const now = Date.now();
  return {
    version: VERSION,
    id: newId(),
    createdAt: now,
    title: { value: "", at: 0 },
    system: { value: system, at: now },
    leaf: { value: null, at: now },
    messages: byId(),
  };
}

/**
 * Sets a register; time never stands still, so that the last change of one tab is the later one.
 * @param {Conversation} conversation
 * @param {"title"|"system"|"leaf"} name
 * @param {string|null} value
 */
export function setRegister(conversation, name, value) {
  conversation[name] = { value, at: Math.max(Date.now(), conversation[name].at + 1) };
}

/**
 * Adds a message below `parent` and shows its branch.
 * @param {Conversation} conversation
 * @param {"user"|"assistant"} role
 * @param {string|null} parent
 * @param {Partial<Message>} [fields]
 * @returns {Message}
 */
export function addMessage(conversation, role, parent, fields = {}) {
  const now = Date.now();
  const message = {
    id: newId(),
    parent,
    role,
    content: "",
    reasoning: "",
    createdAt: now,
    updatedAt: now,
    model: null,
    finish: null,
    usage: null,
    timing: null,
    skipped: 0,
    files: [],
    isDeleted: false,
    ...fields,
  };
  conversation.messages[message.id] = message;
  setRegister(conversation, "leaf", message.id);
  return message;
}

/** Changes a message; time never stands still for it either. */
export function change(message, fields) {
  Object.assign(message, fields, { updatedAt: Math.max(Date.now(), message.updatedAt + 1) });
}

/** Deletes a message and all that follows it, in every branch. */
export function removeFrom(conversation, id) {
  const { parent } = conversation.messages[id];
  const gone = [id];
  for (const at of gone) gone.push(...childrenOf(conversation, at).map((child) => child.id));
  for (const at of gone)
    change(conversation.messages[at], { content: "", reasoning: "", files: [], isDeleted: true });
  const other = childrenOf(conversation, parent).pop();
  if (other) showBranch(conversation, other.id);
  else setRegister(conversation, "leaf", parent);
}

/** An answer that has not begun: it is shown, but neither kept nor exported. */
export function isUnbegun(message) {
  return (
    message.role === "assistant" &&
    !message.content &&
    !message.reasoning &&
    message.finish === null
  );
}

/**
 * Takes back an answer that never began.
 * @param {Conversation} conversation
 * @param {Message} message
 * @param {string|null} leaf what is shown instead
 */
export function removeUnbegun(conversation, message, leaf) {
  delete conversation.messages[message.id];
  if (conversation.leaf.value === message.id) setRegister(conversation, "leaf", leaf);
}

/**
 * The conversation as it is kept.
 * @param {Conversation} conversation
 * @returns {Conversation}
 */
export function toKeep(conversation) {
  const entries = Object.entries(conversation.messages);
  const messages = Object.fromEntries(entries.filter(([, message]) => !isUnbegun(message)));
  const leaf = conversation.messages[conversation.leaf.value ?? ""];
  const isLeafKept = !leaf || leaf.id in messages;
  return {
    ...conversation,
    messages,
    leaf: isLeafKept ? conversation.leaf : { ...conversation.leaf, value: leaf.parent },
  };
}

/** @returns {Message[]} from the first message to the given one (default: the shown leaf) */
export function pathTo(conversation, id = conversation.leaf.value) {
  const path = [];
  const seen = new Set(); // a damaged file may hold a circle
  for (
    let at = conversation.messages[id ?? ""];
    at && !seen.has(at.id);
    at = conversation.messages[at.parent ?? ""]
  ) {
    seen.add(at.id);
    if (!at.isDeleted) path.push(at);
  }
  return path.reverse();
}

/** @returns {Message[]} the message and its alternatives, oldest first */
export function siblings(conversation, message) {
  return childrenOf(conversation, message.parent).filter((other) => other.role === message.role);
}

function childrenOf(conversation, parent) {
  return Object.values(conversation.messages)
    .filter((message) => message.parent === parent && !message.isDeleted)
    .sort((a, b) => a.createdAt - b.createdAt || (a.id < b.id ? -1 : 1));
}

/** Shows the branch that holds a message, down to its newest leaf. */
export function showBranch(conversation, id) {
  let at = id;
  for (const seen = new Set(); !seen.has(at);) {
    seen.add(at);
    const children = childrenOf(conversation, at);
    if (children.length > 0) at = children[children.length - 1].id;
  }
  setRegister(conversation, "leaf", at);
}

/**
 * What the API gets. Reasoning is never sent back (DeepSeek's API refuses it).
 * @param {Conversation} conversation
 * @param {string|null} id the last message to send
 */
export function apiMessages(conversation, id) {
  const system = (conversation.system.value ?? "").trim();
  const turns = pathTo(conversation, id).map((message) => ({
    role: message.role,
    content: written(message),
  }));
  return system ? [{ role: "system", content: system }, ...turns] : turns;
}

/** What was attached stands before what was written, each file in a fence that it does not hold. */
function written({ content, files }) {
  const texts = files.map(({ name, text }) => {
    const fence = "`".repeat(1 + Math.max(2, ...(text.match(/`+/g) ?? []).map((run) => run.length)));
    return `${name}:\n${fence}\n${text}\n${fence}`;
  });
  return [...texts, content].filter(Boolean).join("\n\n");
}

/** @returns {string} the given title, else the beginning of the first question */
export function titleOf(conversation) {
  if (conversation.title.value) return conversation.title.value;
  const [first] = pathTo(conversation);
  const text = (first?.content || first?.files[0]?.name || "").replace(/\s+/g, " ").trim();
  return text.length > MAX_TITLE
    ? `${text.slice(0, MAX_TITLE - 1).trimEnd()}…`
    : text || "New chat";
}

/** @returns {number} milliseconds since 1970 of the last message, or of its beginning */
export function lastUsed(conversation) {
  return Object.values(conversation.messages).reduce(
    (last, { createdAt }) => Math.max(last, createdAt),
    conversation.createdAt,
  );
}

/**
 * Brings what another copy knows into ours.
 * @param {Conversation} ours changed in place
 * @param {Conversation} theirs
 */
export function mergeInto(ours, theirs) {
  for (const name of ["title", "system"]) {
    if (theirs[name].at > ours[name].at) ours[name] = { ...theirs[name] };
  }
  for (const [id, message] of Object.entries(theirs.messages)) {
    const mine = ours.messages[id];
    if (!mine) ours.messages[id] = { ...message };
    else if (message.updatedAt > mine.updatedAt) Object.assign(mine, message);
  }
  // What goes on below the shown message is followed; another branch is no reason to leave ours.
  if (theirs.leaf.at > ours.leaf.at) {
    const shown = ours.leaf.value;
    const isBelow =
      shown === null || pathTo(ours, theirs.leaf.value).some(({ id }) => id === shown);
    ours.leaf = { value: isBelow ? theirs.leaf.value : shown, at: theirs.leaf.at };
  }
}

/**
 * Checks what came from storage or a file, field by field; unknown fields are dropped.
 * @param {unknown} raw
 * @returns {Conversation|null} null if it is none that this version can read
 */
export function readConversation(raw) {
  if (
    !isObject(raw) ||
    raw.version !== VERSION ||
    typeof raw.id !== "string" ||
    !isObject(raw.messages)
  )
    return null;
  if (!/^[\w-]{1,64}$/.test(raw.id)) return null;
  const messages = byId();
  for (const value of Object.values(raw.messages)) {
    const message = readMessage(value);
    if (!message) return null;
    messages[message.id] = message;
  }
  const conversation = {
    version: VERSION,
    id: raw.id,
    createdAt: timeOf(raw.createdAt),
    title: readRegister(raw.title),
    system: readRegister(raw.system),
    leaf: readRegister(raw.leaf),
    messages,
  };
  if (!messages[conversation.leaf.value ?? ""])
    conversation.leaf.value = Object.keys(messages).pop() ?? null;
  return conversation;
}

function readMessage(raw) {
  if (!isObject(raw) || typeof raw.id !== "string" || typeof raw.content !== "string") return null;
  if (!/^[\w-]{1,64}$/.test(raw.id) || (raw.role !== "user" && raw.role !== "assistant"))
    return null;
  return {
    id: raw.id,
    parent: textOr(raw.parent, null),
    role: raw.role,
    content: raw.content,
    reasoning: textOr(raw.reasoning, ""),
    createdAt: timeOf(raw.createdAt),
    updatedAt: timeOf(raw.updatedAt),
    model: textOr(raw.model, null),
    finish: textOr(raw.finish, null),
    usage: readUsage(raw.usage),
    timing: readTiming(raw.timing),
    skipped: numberOr(raw.skipped, 0),
    files: (Array.isArray(raw.files) ? raw.files : [])
      .filter((file) => typeof file?.name === "string" && typeof file.text === "string")
      .map(({ name, text }) => ({ name, text })),
    isDeleted: raw.isDeleted === true,
  };
}

/** Numbers alone: what is shown of them is reckoned with. */
function readUsage(raw) {
  if (!isObject(raw)) return null;
  const usage = numbersOf(raw);
  for (const name of ["prompt_tokens_details", "completion_tokens_details"]) {
    if (!isObject(raw[name])) continue;
    const shares = raw[name].acceptance_by_position;
    const byPosition = Array.isArray(shares) && {
      acceptance_by_position: shares.filter(Number.isFinite),
    };
    usage[name] = { ...numbersOf(raw[name]), ...byPosition };
  }
  return usage;
}

function readTiming(raw) {
  if (!isObject(raw) || !Number.isFinite(raw.totalSeconds)) return null;
  const { firstTokenSeconds = null, reasoningSeconds = null } = numbersOf(raw);
  return { firstTokenSeconds, totalSeconds: raw.totalSeconds, reasoningSeconds };
}

const numbersOf = (raw) =>
  Object.fromEntries(Object.entries(raw).filter(([, value]) => Number.isFinite(value)));

function readRegister(raw) {
  return isObject(raw)
    ? { value: textOr(raw.value, null), at: timeOf(raw.at) }
    : { value: null, at: 0 };
}

/** Of which there is always a later one. */
const timeOf = (value) => Math.max(0, Math.min(numberOr(value, 0), 2 ** 52));

const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const textOr = (value, other) => (typeof value === "string" ? value : other);
const numberOr = (value, other) =>
  typeof value === "number" && Number.isFinite(value) ? value : other;
