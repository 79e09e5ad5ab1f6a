/** What the user may set: sampling, the system prompt of new chats, JSON, thinking, the API key. */
import { parse, readText, storageArea, writeText } from "./store.js";

const KEY = "rorqual.settings.v1";
const API_KEY = "rorqual.api-key";

/**
 * @typedef {{name: string, label: string, hint: string, kind: "number"|"whole"|"text",
 *   min: number|null, is_open: boolean, max: number|null, default: string}} Field
 *   as the server describes it; `is_open` leaves `min` itself out
 * @param {Field} field
 * @param {string} text what was typed
 * @returns {{value: number|string|null, problem: string|null}} value null for an empty field
 */
export function readField(field, text) {
  if (field.kind === "text") return { value: text || null, problem: null };
  const trimmed = text.trim().replace(",", ".");
  if (trimmed === "") return { value: null, problem: null };
  const { min, max = null } = field;
  const value = Number(trimmed);
  const isWhole = field.kind === "whole";
  const isInside = value >= min && (max === null || value <= max) && !(field.is_open && value === min);
  if (isInside && (!isWhole || Number.isSafeInteger(value))) return { value, problem: null };
  const from = field.is_open ? `above ${min}` : `from ${min}`;
  const range = max === null ? `of ${min} or more` : `${from} to ${max}`;
  const kind = isWhole ? "a whole number" : "a number";
  return { value: null, problem: `${field.label} is ${kind} ${range}, or empty.` };
}

export class Settings {
  constructor() {
    this.reload();
  }

  /** Reads what is stored, which another tab may have changed. */
  reload() {
    const raw = parse(readText(storageArea("localStorage"), KEY, "{}")) ?? {};
    const entries = Object.entries(raw.sampling ?? {});
    /** Only what is set. @type {Record<string, number|string>} */
    this.sampling = Object.fromEntries(
      entries.filter(([, value]) => ["number", "string"].includes(typeof value)),
    );
    /** The system prompt that new chats begin with. */
    this.system = typeof raw.system === "string" ? raw.system : "";
    /** The model chosen last; null for the server's first. */
    this.model = typeof raw.model === "string" ? raw.model : null;
    this.wantsJson = raw.wantsJson === true;
    this.wantsThinking = raw.wantsThinking === true;
  }

  save() {
    const { sampling, system, model, wantsJson, wantsThinking } = this;
    const kept = JSON.stringify({ sampling, system, model, wantsJson, wantsThinking });
    writeText(storageArea("localStorage"), KEY, kept);
  }

  /** The fields of a request, but for its messages. @param {boolean} hasThinkingSwitch */
  body(model, hasThinkingSwitch) {
    return {
      ...(model && { model }),
      ...this.sampling,
      ...(this.wantsJson && { response_format: { type: "json_object" } }),
      ...(hasThinkingSwitch && { thinking: { type: this.wantsThinking ? "enabled" : "disabled" } }),
    };
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
