/**
 * Inline markdown -> a small tree. Emphasis follows CommonMark's delimiter algorithm.
 *
 * Choices, where a chat differs from a document:
 * - a single line break stays a break (`breaks` of GitHub comments);
 * - images become links, so that reading an answer never makes a request;
 * - `<br>` is a line break (models write it in table cells); every other tag is plain text;
 * - a link that is not http(s) stays the text that the model wrote, so that nothing is hidden;
 * - beside Chinese, Japanese and Korean letters `**` may open and close (CommonMark forbids it after
 *   full-width punctuation, which leaves stars in such answers);
 * - entities such as `&lt;` stay as they are written.
 *
 * @typedef {{type: "text", value: string} | {type: "code", value: string} | {type: "break"}
 *   | {type: "em"|"strong"|"del", children: Inline[], depth?: number}
 *   | {type: "link", href: string, children: Inline[]}} Inline
 */

const MAX_DEPTH = 16; // of emphasis in emphasis: a hostile answer must not overflow the stack
const MAX_LOOK_BACK = 64; // openers tried for one closer, which keeps a pathological line linear
const ESCAPABLE = /[!-/:-@[-`{-~]/;
const SPECIAL = /[\\`*_~[\]!<\n]|https?:\/\//g;
const PUNCTUATION = /[\p{P}\p{S}]/u;
const WIDE = /[\p{sc=Han}\p{sc=Hiragana}\p{sc=Katakana}\p{sc=Hangul}]/u;
// `(address)`, `(<address>)` or `(address "title")`; lengths are bounded against endless searches.
const ADDRESS =
  /<([^<>\n]{0,2000})>|([^\s()<>]{1,2000}(?:\([^\s()<>]{0,500}\)[^\s()<>]{0,500}){0,8})/;
const TITLE = /"[^"]{0,300}"|'[^']{0,300}'/;
const TARGET = new RegExp(`\\(\\s*(?:${ADDRESS.source})(?:\\s+(?:${TITLE.source}))?\\s*\\)`, "y");
const BARE_URL = /https?:\/\/[^\s<>"'`\\|\u3000-\u303f\uff00-\uffef]+/y;
const ANGLE_URL = /<(https?:\/\/[^\s<>]+)>/iy;
const LINE_BREAK_TAG = /<br ?\/?>/iy;

/**
 * @param {string} url
 * @returns {string|null} the address if it may be linked, else null
 */
export function safeUrl(url) {
  if (!/^https?:\/\//i.test(url)) return null;
  try {
    const { protocol } = new URL(url);
    return protocol === "http:" || protocol === "https:" ? url : null;
  } catch {
    return null;
  }
}

/**
 * @param {string} source one paragraph's, heading's or cell's text
 * @returns {Inline[]}
 */
export function parseInline(source) {
  const items = []; // inline nodes; between them {type: "run"} of delimiters, {type: "bracket"}
  const brackets = []; // indices into items
  const fences = codeFences(source);
  let at = 0;

  const text = (value) => {
    if (value) items.push({ type: "text", value });
  };

  while (at < source.length) {
    SPECIAL.lastIndex = at;
    const next = SPECIAL.exec(source);
    text(source.slice(at, next ? next.index : source.length));
    if (!next) break;
    at = next.index;
    const char = source[at];
    if (char === "\n") {
      trimEnd(items);
      items.push({ type: "break" });
      at += 1;
      while (source[at] === " ") at += 1;
    } else if (char === "\\") {
      const following = source[at + 1] ?? "";
      if (following === "\n")
        at += 1; // a hard break: the newline that follows gives it
      else if (ESCAPABLE.test(following)) {
        text(following);
        at += 2;
      } else {
        text("\\");
        at += 1;
      }
    } else if (char === "`") {
      at = takeCode(source, at, fences, items);
    } else if (char === "*" || char === "_" || char === "~") {
      const run = delimiterRun(source, at);
      items.push(run);
      at += run.count;
    } else if (char === "[" || (char === "!" && source[at + 1] === "[")) {
      const mark = char === "!" ? "![" : "[";
      brackets.push(items.length);
      items.push({ type: "bracket", value: mark });
      at += mark.length;
    } else if (char === "]") {
      at = takeLink(source, at, items, brackets);
    } else if (char === "<") {
      at = takeAngle(source, at, items);
    } else if (char === "h") {
      at = takeBareUrl(source, at, items);
    } else {
      text(char);
      at += 1;
    }
  }
  return emphasise(items);
}

/** Closing back-quote runs by length, positions in order: a search never rescans the text. */
function codeFences(source) {
  const fences = new Map();
  for (const match of source.matchAll(/`+/g)) {
    const count = match[0].length;
    if (!fences.has(count)) fences.set(count, { positions: [], next: 0 });
    fences.get(count).positions.push(match.index);
  }
  return fences;
}

function takeCode(source, at, fences, items) {
  let count = 1;
  while (source[at + count] === "`") count += 1;
  const known = fences.get(count) ?? { positions: [], next: 0 }; // none after an escaped back quote
  while (known.next < known.positions.length && known.positions[known.next] <= at) known.next += 1;
  if (known.next === known.positions.length) {
    items.push({ type: "text", value: "`".repeat(count) });
    return at + count;
  }
  const end = known.positions[known.next];
  let value = source.slice(at + count, end).replaceAll("\n", " ");
  if (value.startsWith(" ") && value.endsWith(" ") && value.trim()) value = value.slice(1, -1);
  items.push({ type: "code", value });
  return end + count;
}

function delimiterRun(source, at) {
  const char = source[at];
  let count = 1;
  while (source[at + count] === char) count += 1;
  const before = at === 0 ? "\n" : lastCharacter(source.slice(Math.max(0, at - 2), at));
  const after =
    at + count >= source.length ? "\n" : String.fromCodePoint(source.codePointAt(at + count));
  const isSpaceBefore = /\s/.test(before);
  const isSpaceAfter = /\s/.test(after);
  const isMarkBefore = PUNCTUATION.test(before);
  const isMarkAfter = PUNCTUATION.test(after);
  const isOpenBefore = isSpaceBefore || isMarkBefore || WIDE.test(before);
  const isOpenAfter = isSpaceAfter || isMarkAfter || WIDE.test(after);
  const isLeft = !isSpaceAfter && (!isMarkAfter || isOpenBefore);
  const isRight = !isSpaceBefore && (!isMarkBefore || isOpenAfter);
  const isUnderscore = char === "_";
  return {
    type: "run",
    char,
    count,
    length: count,
    canOpen: isLeft && (!isUnderscore || !isRight || isMarkBefore) && (char !== "~" || count === 2),
    canClose: isRight && (!isUnderscore || !isLeft || isMarkAfter) && (char !== "~" || count === 2),
  };
}

function lastCharacter(text) {
  const characters = [...text];
  return characters[characters.length - 1];
}

function takeLink(source, at, items, brackets) {
  const start = brackets.pop();
  TARGET.lastIndex = at + 1;
  const target = start === undefined ? null : TARGET.exec(source);
  const href = target && safeUrl(target[1] ?? target[2]);
  if (href === null) {
    // No link, or not a safe one: everything stays as it was written.
    const end = target ? TARGET.lastIndex : at + 1;
    items.push({ type: "text", value: source.slice(at, end) });
    return end;
  }
  const children = withoutLinks(emphasise(items.splice(start).slice(1)));
  items.push({
    type: "link",
    href,
    children: children.length ? children : [{ type: "text", value: href }],
  });
  return TARGET.lastIndex;
}

function takeAngle(source, at, items) {
  LINE_BREAK_TAG.lastIndex = at;
  const tag = LINE_BREAK_TAG.exec(source);
  if (tag) {
    items.push({ type: "break" });
    return at + tag[0].length;
  }
  ANGLE_URL.lastIndex = at;
  const url = ANGLE_URL.exec(source);
  if (url && safeUrl(url[1])) {
    items.push({ type: "link", href: url[1], children: [{ type: "text", value: url[1] }] });
    return at + url[0].length;
  }
  items.push({ type: "text", value: "<" });
  return at + 1;
}

function takeBareUrl(source, at, items) {
  BARE_URL.lastIndex = at;
  const isInWord = at > 0 && /[\p{L}\p{N}]/u.test(source[at - 1]);
  const found = isInWord ? null : BARE_URL.exec(source);
  const url = found ? withoutTail(found[0]) : "";
  if (!url || !safeUrl(url)) {
    items.push({ type: "text", value: "http" });
    return at + 4;
  }
  items.push({ type: "link", href: url, children: [{ type: "text", value: url }] });
  return at + url.length;
}

/** A bare address without the punctuation of the sentence around it. */
function withoutTail(found) {
  let url = found;
  for (;;) {
    const last = url[url.length - 1];
    const isUnbalanced =
      (last === ")" && count(url, ")") > count(url, "(")) ||
      (last === "]" && count(url, "]") > count(url, "["));
    if (!isUnbalanced && !/[.,;:!?*_~]/.test(last ?? "")) return url;
    url = url.slice(0, -1);
  }
}

const count = (text, char) => text.split(char).length - 1;

function withoutLinks(nodes) {
  return nodes.flatMap((node) => {
    if (node.type === "link") return node.children;
    return node.children ? [{ ...node, children: withoutLinks(node.children) }] : [node];
  });
}

function trimEnd(items) {
  const last = items[items.length - 1];
  if (last?.type === "text") last.value = last.value.trimEnd();
}

/**
 * CommonMark's "process emphasis": pairs closers with the nearest opener of their kind.
 * @returns {Inline[]}
 */
function emphasise(items) {
  const out = [];
  const openers = { "*": [], _: [], "~": [] }; // indices into out
  for (const item of items) {
    if (item.type !== "run") {
      out.push(item);
      continue;
    }
    const closer = { ...item };
    while (closer.canClose && closer.count > 0 && pair(closer, out, openers));
    if (closer.count > 0) {
      if (closer.canOpen) openers[closer.char].push(out.length);
      out.push(closer);
    }
  }
  return settle(out);
}

/** Wraps what lies between the closer and its opener; false if there is no opener. */
function pair(closer, out, openers) {
  const stack = openers[closer.char];
  for (let k = stack.length - 1; k >= Math.max(0, stack.length - MAX_LOOK_BACK); k -= 1) {
    const opener = out[stack[k]];
    // CommonMark's "multiple of 3" rule, which keeps `*a**b*` one emphasis.
    const isOdd =
      (opener.canClose || closer.canOpen) &&
      (opener.length + closer.length) % 3 === 0 &&
      (opener.length % 3 !== 0 || closer.length % 3 !== 0);
    if (isOdd && closer.char !== "~") continue;
    const index = stack[k];
    const children = settle(out.slice(index + 1));
    const depth = 1 + Math.max(0, ...children.map((child) => child.depth ?? 0));
    if (depth > MAX_DEPTH) {
      for (const other of Object.values(openers)) other.length = 0; // too deep: all before is text
      return false;
    }
    const used = closer.char === "~" || (opener.count >= 2 && closer.count >= 2) ? 2 : 1;
    const type = closer.char === "~" ? "del" : used === 2 ? "strong" : "em";
    out.length = index + 1;
    for (const other of Object.values(openers)) {
      while (other.length && other[other.length - 1] > index) other.pop();
    }
    opener.count -= used;
    closer.count -= used;
    if (opener.count === 0) {
      out.pop();
      stack.pop();
    }
    out.push({ type, children, depth });
    return true;
  }
  return false;
}

/** Delimiters and brackets that paired with nothing become text; neighbouring texts join. */
function settle(items) {
  const nodes = [];
  for (const item of items) {
    const value = item.type === "run" ? item.char.repeat(item.count) : item.value;
    const isText = item.type === "text" || item.type === "run" || item.type === "bracket";
    const last = nodes[nodes.length - 1];
    if (isText && last?.type === "text")
      nodes[nodes.length - 1] = { type: "text", value: last.value + value };
    else nodes.push(isText ? { type: "text", value } : item);
  }
  return nodes;
}
