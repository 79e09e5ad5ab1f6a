/** What the user may set: sampling, the system prompt of new chats, the API key, the theme. */
import { readText, storageArea, writeText } from "./store.js";

const KEY = "rorqual.settings.v1";
const API_KEY = "rorqual.api-key";

/**
 * The sampling fields of the API. An empty field is not sent, so that the server's default holds.
 * `min` and `max` are what the server takes; `isOpen` leaves `min` itself out.
 */
export const SAMPLING = [
  {
    name: "temperature",
    label: "Temperature",
    min: 0,
    max: 2,
    hint: "0 always takes the likeliest word; higher is freer.",
  },
  {
    name: "top_p",
    label: "Top-p",
    min: 0,
    max: 1,
    isOpen: true,
    hint: "Only the likeliest tokens that together reach this share.",
  },
  {
    name: "top_k",
    label: "Top-k",
    min: 1,
    max: 1_000_000,
    isInteger: true,
    hint: "Only the k likeliest tokens.",
  },
  {
    name: "min_p",
    label: "Min-p",
    min: 0,
    max: 1,
    hint: "Only tokens at least this share as likely as the first.",
  },
  {
    name: "max_tokens",
    label: "Longest answer",
    min: 1,
    max: 1_000_000,
    isInteger: true,
    hint: "In tokens.",
  },
  {
    name: "seed",
    label: "Seed",
    min: 0,
    max: Number.MAX_SAFE_INTEGER,
    isInteger: true,
    hint: "The same seed gives the same answer.",
  },
];

/**
 * @param {typeof SAMPLING[number]} field
 * @param {string} text what was typed
 * @returns {{value: number|null, problem: string|null}} value null for an empty field
 */
export function readNumber(field, text) {
  const trimmed = text.trim().replace(",", ".");
  if (trimmed === "") return { value: null, problem: null };
  const value = Number(trimmed);
  const isInside =
    value >= field.min && value <= field.max && !(field.isOpen && value === field.min);
  if (isInside && (!field.isInteger || Number.isInteger(value))) return { value, problem: null };
  const kind = field.isInteger ? "a whole number" : "a number";
  const from = field.isOpen ? `above ${field.min}` : `from ${field.min}`;
  const range = field.max >= 1_000_000 ? `of ${field.min} or more` : `${from} to ${field.max}`;
  return { value: null, problem: `${field.label} is ${kind} ${range}, or empty.` };
}

export class Settings {
  /** @type {Record<string, number>} only what is set */
  sampling = {};
  /** The system prompt that new chats begin with. */
  system = "";
  /** The model chosen last; null for the server's first. */
  model = null;

  constructor() {
    this.reload();
  }

  /** Reads what is stored, which another tab may have changed. */
  reload() {
    let raw = {};
    try {
      raw = JSON.parse(readText(storageArea("localStorage"), KEY, "{}")) ?? {};
    } catch {
      // Not ours to mend: the next change writes a whole value.
    }
    this.sampling = {};
    for (const field of SAMPLING) {
      const given = raw.sampling?.[field.name];
      const { value } = readNumber(field, typeof given === "number" ? String(given) : "");
      if (value !== null) this.sampling[field.name] = value;
    }
    this.system = typeof raw.system === "string" ? raw.system : "";
    this.model = typeof raw.model === "string" ? raw.model : null;
  }

  /** @returns {boolean} whether it is kept */
  save() {
    const { sampling, system, model } = this;
    return writeText(storageArea("localStorage"), KEY, JSON.stringify({ sampling, system, model }));
  }

  /** The key stays in this tab only and is gone when it closes. */
  get apiKey() {
    return readText(storageArea("sessionStorage"), API_KEY, "") || this.keyInMemory;
  }

  set apiKey(value) {
    this.keyInMemory = value;
    writeText(storageArea("sessionStorage"), API_KEY, value);
  }

  keyInMemory = "";

  /** @param {StorageEvent} event */
  static concerns(event) {
    return event.key === KEY || event.key === null;
  }
}
