/**
 * Markdown text -> blocks. Lines are read once, top to bottom; a block depends on its own lines
 * only, which is what lets `markdown.js` keep the finished ones while the last is being written.
 *
 * Choices, where a chat differs from a document: no indented code and no underlined headings (models
 * mean neither, and both would change the look of a text already shown); two spaces nest a list.
 *
 * @typedef {{type: "paragraph"|"heading", text: string, level?: number}
 *   | {type: "code", info: string, text: string}
 *   | {type: "list", isOrdered: boolean, start: number, isTight: boolean, items: Item[]}
 *   | {type: "quote", blocks: Block[]}
 *   | {type: "table", align: string[], rows: string[][]}
 *   | {type: "rule"}} Block  with `raw`, the lines it came from
 * @typedef {{blocks: Block[], isDone: boolean|null}} Item  isDone: of a task list, else null
 */

const MAX_DEPTH = 10; // of lists and quotes in each other; deeper ones are read as text
const FENCE = /^ *(`{3,}|~{3,})[ ]*([^`]*)$/;
const HEADING = /^ *(#{1,6})(?:[ ]+(.*?))?(?:[ ]+#+)?[ ]*$/;
const RULE = /^ *(?:(?:\*[ ]*){3,}|(?:-[ ]*){3,}|(?:_[ ]*){3,})$/;
const QUOTE = /^ *> ?/;
const MARKER = /^( *)([-*+]|\d{1,9}[.)])(?:( +)(.*)|)$/;
const TASK = /^\[([ xX])\] +/;
const DELIMITER_ROW = /^ *\|?[ ]*:?-+:?[ ]*(?:\|[ ]*:?-+:?[ ]*)*\|?[ ]*$/;

/**
 * @param {string} text
 * @returns {Block[]}
 */
export function parseBlocks(text) {
  const lines = text.replace(/\r\n?/g, "\n").split("\n").map(expandTabs);
  return blocksOf(lines, 0);
}

const expandTabs = (line) => line.replace(/^[ \t]+/, (space) => space.replaceAll("\t", "    "));
const isBlank = (line) => line.trim() === "";
const indentOf = (line) => line.length - line.trimStart().length;

/** @returns {Block[]} */
function blocksOf(lines, depth) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (isBlank(lines[at])) {
      at += 1;
      continue;
    }
    const [block, end] = blockAt(lines, at, depth);
    block.raw = lines.slice(at, end).join("\n");
    blocks.push(block);
    at = end;
  }
  return blocks;
}

/** @returns {[Block, number]} the block that starts at a line, and the line after it */
function blockAt(lines, at, depth) {
  const line = lines[at];
  if (FENCE.test(line)) return codeAt(lines, at);
  const heading = HEADING.exec(line);
  if (heading)
    return [{ type: "heading", level: heading[1].length, text: heading[2] ?? "" }, at + 1];
  if (RULE.test(line)) return [{ type: "rule" }, at + 1];
  if (depth < MAX_DEPTH && QUOTE.test(line)) return quoteAt(lines, at, depth);
  if (depth < MAX_DEPTH && MARKER.test(line)) return listAt(lines, at, depth);
  if (isTableAt(lines, at)) return tableAt(lines, at);
  return paragraphAt(lines, at, depth);
}

function codeAt(lines, at) {
  const [, fence, info] = FENCE.exec(lines[at]);
  const indent = indentOf(lines[at]);
  const closing = new RegExp(`^ *${fence[0]}{${fence.length},}[ ]*$`);
  const body = [];
  let end = at + 1;
  while (end < lines.length && !closing.test(lines[end])) {
    body.push(lines[end].slice(Math.min(indent, indentOf(lines[end]))));
    end += 1;
  }
  const block = { type: "code", info: info.trim(), text: body.join("\n") };
  return [block, Math.min(end + 1, lines.length)];
}

function quoteAt(lines, at, depth) {
  const body = [];
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) {
    body.push(lines[end].replace(QUOTE, ""));
    end += 1;
  }
  return [{ type: "quote", blocks: blocksOf(body, depth + 1) }, end];
}

/** Whether a line begins something that ends the paragraph before it. */
function endsParagraph(lines, at, depth) {
  const line = lines[at];
  if (isBlank(line) || FENCE.test(line) || HEADING.test(line) || RULE.test(line)) return true;
  if (depth < MAX_DEPTH && QUOTE.test(line)) return true;
  const marker = depth < MAX_DEPTH ? MARKER.exec(line) : null;
  // A number in running text ("... in\n1986. It was") is no list, unless it could be the first.
  if (marker?.[4] && (!/^\d/.test(marker[2]) || parseInt(marker[2], 10) === 1)) return true;
  return isTableAt(lines, at);
}

function paragraphAt(lines, at, depth) {
  let end = at + 1;
  while (end < lines.length && !endsParagraph(lines, end, depth)) end += 1;
  const text = lines
    .slice(at, end)
    .map((line) => line.trim())
    .join("\n");
  return [{ type: "paragraph", text }, end];
}

function isTableAt(lines, at) {
  return (
    lines[at].includes("|") &&
    at + 1 < lines.length &&
    lines[at + 1].includes("-") &&
    DELIMITER_ROW.test(lines[at + 1]) &&
    cells(lines[at]).length === cells(lines[at + 1]).length
  );
}

function tableAt(lines, at) {
  const align = cells(lines[at + 1]).map((cell) => {
    const [isLeft, isRight] = [cell.startsWith(":"), cell.endsWith(":")];
    return isLeft && isRight ? "center" : isRight ? "right" : isLeft ? "left" : "";
  });
  const rows = [cells(lines[at])];
  let end = at + 2;
  while (end < lines.length && !isBlank(lines[end]) && lines[end].includes("|")) {
    const row = cells(lines[end]);
    rows.push(align.map((_, column) => row[column] ?? ""));
    end += 1;
  }
  return [{ type: "table", align, rows }, end];
}

/** The cells of a row: parted by `|`, unless escaped. */
function cells(line) {
  let row = line.trim();
  if (row.startsWith("|")) row = row.slice(1);
  if (row.endsWith("|") && !row.endsWith("\\|")) row = row.slice(0, -1);
  return row.split(/(?<!\\)\|/).map((cell) => cell.replaceAll("\\|", "|").trim());
}

const kindOf = (marker) => (/^\d/.test(marker) ? marker.slice(-1) : marker);

function listAt(lines, at, depth) {
  const first = MARKER.exec(lines[at]);
  const kind = kindOf(first[2]);
  const isOrdered = /^\d/.test(first[2]);
  const items = [];
  let isTight = true;
  let end = at;
  while (end < lines.length) {
    const marker = RULE.test(lines[end]) ? null : MARKER.exec(lines[end]);
    if (!marker || kindOf(marker[2]) !== kind) break;
    const [item, next, hasGap] = itemAt(lines, end, marker, depth);
    items.push(item);
    // A blank line between two items, or between two blocks of one, sets the whole list wide.
    const following = skipBlank(lines, next);
    const isContinued =
      following < lines.length && isSameList(lines[following], kind, marker[1].length);
    if (hasGap || (isContinued && following > next)) isTight = false;
    end = next;
    if (!isContinued) break;
    end = following;
  }
  const start = isOrdered ? parseInt(first[2], 10) : 1;
  return [{ type: "list", isOrdered, start, isTight, items }, end];
}

function skipBlank(lines, at) {
  let next = at;
  while (next < lines.length && isBlank(lines[next])) next += 1;
  return next;
}

function isSameList(line, kind, indent) {
  const marker = RULE.test(line) ? null : MARKER.exec(line);
  return marker !== null && kindOf(marker[2]) === kind && marker[1].length < indent + 2;
}

/** @returns {[Item, number, boolean]} the item, the line after it, whether blanks part its blocks */
function itemAt(lines, at, marker, depth) {
  const [, space, sign, gap = " ", content = ""] = marker;
  const width = space.length + sign.length + (gap.length > 4 ? 1 : gap.length);
  const threshold = Math.min(width, space.length + 2); // Choice: two spaces are enough to nest
  const body = [content];
  let end = at + 1;
  while (end < lines.length) {
    const line = lines[end];
    if (isBlank(line)) {
      const next = skipBlank(lines, end);
      if (next === lines.length || indentOf(lines[next]) < threshold) break;
      body.push(...lines.slice(end, next).map(() => ""));
      end = next;
    } else if (indentOf(line) >= threshold) {
      body.push(line.slice(Math.min(indentOf(line), width)));
      end += 1;
    } else if (
      !isBlank(body[body.length - 1]) &&
      !endsParagraph(lines, end, depth) &&
      !outsideCode(body).isOpen &&
      !MARKER.test(line)
    ) {
      body.push(line.trimStart()); // the paragraph goes on without indent
      end += 1;
    } else {
      break;
    }
  }
  const task = TASK.exec(body[0]);
  if (task) body[0] = body[0].slice(task[0].length);
  const blocks = blocksOf(body, depth + 1);
  const hasGap = blocks.length > 1 && outsideCode(body.slice(1)).outside.some(isBlank);
  return [{ blocks, isDone: task ? task[1] !== " " : null }, end, hasGap];
}

/** The lines outside fences, and whether the last fence is still open. */
function outsideCode(body) {
  const outside = [];
  let fence = null;
  for (const line of body) {
    const match = FENCE.exec(line);
    if (fence === null) {
      if (match) fence = match[1];
      else outside.push(line);
    } else if (match && match[1].startsWith(fence) && !match[2].trim()) fence = null;
  }
  return { outside, isOpen: fence !== null };
}
