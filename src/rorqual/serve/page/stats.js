/** The line under an answer: how fast it was, and what cache and drafts saved. All from `usage`. */

/**
 * @typedef {{text: string, detail: string}} Figure
 * @param {import("./conversation.js").Message} message
 * @returns {Figure[]}
 */
export function figures(message) {
  const { usage, timing } = message;
  return [speedOf(usage, timing), firstToken(timing), cached(usage), drafts(usage)].filter(Boolean);
}

/** @param {number} speed */
export const rate = (speed) => (speed < 10 ? speed.toFixed(1) : whole(Math.round(speed)));

// Pieces that arrive together have no speed: a clock's tick between them would make it thousands.
const LEAST_SECONDS = 0.02;

/**
 * Tokens a second behind the first piece; null where too little time passed to tell.
 * @param {number} numTokens
 * @param {number} seconds
 */
export const speedBehind = (numTokens, seconds) =>
  numTokens > 0 && seconds >= LEAST_SECONDS ? numTokens / seconds : null;

function speedOf(usage, timing) {
  const numTokens = usage?.completion_tokens;
  if (!numTokens || !timing) return null;
  const seconds = timing.totalSeconds - timing.firstTokenSeconds;
  // The first token's time is the prompt's; one token alone has no speed.
  const speed = speedBehind(numTokens - 1, seconds);
  const amount = `${whole(numTokens)} ${numTokens === 1 ? "token" : "tokens"}`;
  const total = timing.totalSeconds.toFixed(2);
  const detail = `${amount} in ${total} s, the wait for the first included`;
  return {
    text: speed === null ? amount : `${rate(speed)} tokens/s`,
    detail,
  };
}

function firstToken(timing) {
  if (!timing || timing.firstTokenSeconds === null) return null;
  const seconds = timing.firstTokenSeconds;
  const text = seconds < 1 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toFixed(1)} s`;
  return {
    text: `first token ${text}`,
    detail: "From sending to the first piece of text, network and queue included",
  };
}

function cached(usage) {
  const total = usage?.prompt_tokens;
  const hits = usage?.prompt_cache_hit_tokens ?? usage?.prompt_tokens_details?.cached_tokens;
  if (!total || typeof hits !== "number") return null;
  return {
    text: `${percent(hits, total)} of prompt cached`,
    detail: `${whole(hits)} of ${whole(total)} prompt tokens came from the prefix cache`,
  };
}

function drafts(usage) {
  const details = usage?.completion_tokens_details;
  const accepted = details?.accepted_prediction_tokens ?? 0;
  const drafted = accepted + (details?.rejected_prediction_tokens ?? 0);
  if (!drafted) return null; // no speculation
  const shares = details.acceptance_by_position ?? [];
  const byPosition = shares
    .map((share, index) => `position ${index + 1}: ${percent(share, 1)}`)
    .join(", ");
  return {
    text: `${percent(accepted, drafted)} of drafts accepted`,
    detail:
      `${whole(accepted)} of ${whole(drafted)} drafted tokens` + (byPosition && ` (${byPosition})`),
  };
}

const percent = (part, all) => `${Math.round((100 * part) / all)} %`;
const whole = (number) => number.toLocaleString("en-GB");
