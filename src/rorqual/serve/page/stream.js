/**
 * Server-sent events from a `fetch` body (HTML standard §9.2.6, as far as the API uses it).
 */

/**
 * Splits text into events however the network cut it.
 * A comment line (`: keep-alive`) is handed on too: the server lives, the request waits.
 */
export class EventDecoder {
  #rest = "";
  #data = [];
  #hadReturn = false;

  /**
   * @param {string} chunk
   * @returns {({data: string}|{comment: string})[]} the events that this chunk completed
   */
  push(chunk) {
    const events = [];
    let text = chunk;
    // "\r\n" may be cut in two.
    if (this.#hadReturn && text.startsWith("\n")) text = text.slice(1);
    if (text !== "") this.#hadReturn = text.endsWith("\r");
    this.#rest += text;
    const lines = this.#rest.split(/\r\n|\n|\r/);
    this.#rest = lines.pop() ?? "";
    for (const line of lines) {
      if (line === "") {
        if (this.#data.length > 0) events.push({ data: this.#data.join("\n") });
        this.#data = [];
      } else if (line.startsWith(":")) {
        events.push({ comment: line.slice(1).trim() });
      } else if (line.startsWith("data:")) {
        this.#data.push(line.slice(line[5] === " " ? 6 : 5));
      }
    }
    return events;
  }
}

/**
 * @param {ReadableStream<Uint8Array>} body
 * @returns {AsyncGenerator<{data: string}|{comment: string}>} ends with the body
 */
export async function* readEvents(body) {
  const reader = body.getReader();
  const utf8 = new TextDecoder();
  const decoder = new EventDecoder();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      yield* decoder.push(done ? utf8.decode() : utf8.decode(value, { stream: true }));
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {}); // for a caller that left early; an aborted body refuses it
  }
}
