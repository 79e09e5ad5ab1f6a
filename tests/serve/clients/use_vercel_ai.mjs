// Vercel's `ai` with its provider for OpenAI-compatible servers.
import { load, QUESTION, run, WEATHER, weather } from "./ask.mjs";

const { generateObject, generateText, stepCountIs, streamText, tool } = await load("ai");
const { createOpenAICompatible } = await load("@ai-sdk/openai-compatible");
const { createOpenAI } = await load("@ai-sdk/openai");
const { z } = await load("zod");

const served = (url, model) =>
  createOpenAICompatible({
    name: "rorqual",
    baseURL: url + "/v1",
    apiKey: "none",
    supportsStructuredOutputs: true,
  })(model);
const once = { prompt: QUESTION, maxRetries: 0 };

async function text(url, model) {
  return (await generateText({ model: served(url, model), ...once })).text;
}

async function stream(url, model) {
  const parts = [];
  for await (const part of streamText({ model: served(url, model), ...once }).textStream) {
    parts.push(part);
  }
  return parts;
}

const weatherTool = () =>
  tool({
    description: "The weather of a city now.",
    inputSchema: z.object({ city: z.string() }),
    execute: weather,
  });

async function tools(url, model) {
  const reply = await generateText({
    model: served(url, model),
    prompt: WEATHER,
    maxRetries: 0,
    tools: { weather: weatherTool() },
    stopWhen: stepCountIs(3),
  });
  return reply.text;
}

async function json(url, model) {
  const schema = z.object({ kind: z.enum(["sea", "lake"]), is_deep: z.boolean() });
  const asked = { model: served(url, model), ...once, schema, maxOutputTokens: 64 };
  return (await generateObject(asked)).object;
}

// Its provider for OpenAI itself, which speaks /v1/responses.
async function responses(url, model) {
  const openai = createOpenAI({ baseURL: url + "/v1", apiKey: "none" });
  return (await generateText({ model: openai(model), ...once })).text;
}

await run({ text, stream, tools, json, responses });
