// OpenAI's SDK for JavaScript.
import { load, PARAMETERS, QUESTION, run, WEATHER, weather } from "./ask.mjs";

const { default: OpenAI } = await load("openai");
const { zodResponseFormat } = await load("openai/helpers/zod");
const { z } = await load("zod");
const client = (url) => new OpenAI({ baseURL: url + "/v1", apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: QUESTION }];

async function text(url, model) {
  const reply = await client(url).chat.completions.create({ model, messages });
  return reply.choices[0].message.content;
}

async function stream(url, model) {
  const chunks = await client(url).chat.completions.create({ model, messages, stream: true });
  const parts = [];
  for await (const chunk of chunks) parts.push(chunk.choices[0]?.delta?.content ?? "");
  return parts;
}

async function tools(url, model) {
  const runner = client(url).chat.completions.runTools({
    model,
    messages: [{ role: "user", content: WEATHER }],
    tools: [
      {
        type: "function",
        function: {
          name: "weather",
          description: "The weather of a city now.",
          parameters: PARAMETERS,
          parse: JSON.parse,
          function: weather,
        },
      },
    ],
  });
  return runner.finalContent();
}

async function json(url, model) {
  const Depth = z.object({ kind: z.enum(["sea", "lake"]), is_deep: z.boolean() });
  const reply = await client(url).chat.completions.parse({
    model,
    messages,
    max_tokens: 64,
    response_format: zodResponseFormat(Depth, "depth"),
  });
  return reply.choices[0].message.parsed;
}

async function responses(url, model) {
  const events = client(url).responses.stream({ model, input: QUESTION });
  return (await events.finalResponse()).output_text;
}

await run({ text, stream, tools, json, responses });
