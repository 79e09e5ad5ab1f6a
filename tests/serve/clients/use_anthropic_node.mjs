// Anthropic's SDK for JavaScript.
import { load, PARAMETERS, QUESTION, run, WEATHER, weather } from "./ask.mjs";

const { default: Anthropic } = await load("@anthropic-ai/sdk");
const client = (url) => new Anthropic({ baseURL: url, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: QUESTION }];

async function text(url, model) {
  const reply = await client(url).messages.create({ model, max_tokens: 100, messages });
  return reply.content[0].text;
}

async function stream(url, model) {
  const parts = [];
  const events = client(url).messages.stream({ model, max_tokens: 100, messages });
  events.on("text", (part) => parts.push(part));
  await events.finalMessage();
  return parts;
}

async function tools(url, model) {
  const history = [{ role: "user", content: WEATHER }];
  const tool = { name: "weather", description: "The weather now.", input_schema: PARAMETERS };
  let reply;
  for (let round = 0; round < 2; round++) {
    const asked = { model, max_tokens: 100, messages: history, tools: [tool] };
    reply = await client(url).messages.create(asked);
    history.push({ role: "assistant", content: reply.content });
    const calls = reply.content.filter((block) => block.type === "tool_use");
    const outputs = calls.map((call) => ({
      type: "tool_result",
      tool_use_id: call.id,
      content: weather(call.input),
    }));
    history.push({ role: "user", content: outputs });
  }
  return reply.content[0].text;
}

await run({ text, stream, tools });
