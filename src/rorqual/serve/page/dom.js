/**
 * The only way this page makes elements: tag, attributes, children. Strings become text nodes, so
 * nothing that a model, a user or a server wrote is ever read as markup.
 */

/**
 * @param {string} tag
 * @param {Record<string, unknown>} [attributes] `on: {event: handler}` adds listeners; `true` gives
 *   an empty attribute; `false`, `null` and `undefined` give none.
 * @param {...(Node|string|null|undefined|false)} children
 * @returns {HTMLElement}
 */
export function h(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") {
      for (const [event, handler] of Object.entries(value)) node.addEventListener(event, handler);
    } else if (value !== false && value !== null && value !== undefined) {
      node.setAttribute(name, value === true ? "" : String(value));
    }
  }
  node.append(
    ...children.filter((child) => child !== null && child !== undefined && child !== false),
  );
  return node;
}

/**
 * @param {string} name of a `<symbol id="icon-NAME">` in index.html
 * @returns {SVGSVGElement}
 */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

/**
 * A button that shows an icon and tells its name to screen readers and on hover.
 * @param {string} iconName
 * @param {string} label
 * @param {(event: MouseEvent) => void} onClick
 * @param {Record<string, unknown>} [attributes]
 */
export function iconButton(iconName, label, onClick, attributes = {}) {
  const { class: extra = "", ...others } = attributes;
  return h(
    "button",
    {
      type: "button",
      class: `icon-button ${extra}`.trim(),
      "aria-label": label,
      title: label,
      on: { click: onClick },
      ...others,
    },
    icon(iconName),
  );
}

/**
 * @param {string} label
 * @param {string} className "button", "button primary" or "link"
 * @param {(event: MouseEvent) => void} onClick
 */
export function textButton(label, className, onClick) {
  return h("button", { type: "button", class: className, on: { click: onClick } }, label);
}

/**
 * The element of index.html with this id; an error names a missing one at once.
 * @param {string} id
 */
export function byId(id) {
  const node = document.getElementById(id);
  if (!node) throw new Error(`index.html has no element #${id}`);
  return node;
}

/**
 * Copies text, also where the clipboard API is missing (a page over plain http in a local network).
 * @param {string} text
 * @returns {Promise<boolean>} whether it worked
 */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = h("textarea", { class: "visually-hidden", readonly: true });
    area.value = text;
    document.body.append(area);
    area.select();
    const isCopied = document.execCommand("copy");
    area.remove();
    return isCopied;
  }
}

/**
 * A copy button that turns into a tick for a moment.
 * @param {string} label
 * @param {() => string} read what to copy, asked when clicked
 */
export function copyButton(label, read) {
  const button = iconButton(
    "copy",
    label,
    async () => {
      const isCopied = await copyText(read());
      button.replaceChildren(icon(isCopied ? "check" : "warning"));
      button.setAttribute("aria-label", isCopied ? "Copied" : "Copying is not allowed here");
      setTimeout(() => {
        button.replaceChildren(icon("copy"));
        button.setAttribute("aria-label", label);
      }, 1500);
    },
    { class: "copy-button" },
  );
  return button;
}
