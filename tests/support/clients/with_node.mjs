// OpenAI's library for Node and Vercel's AI SDK: text, calls and objects, whole and streamed.

import assert from "node:assert/strict";

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, stepCountIs, streamText, tool } from "ai";
import OpenAI from "openai";
import { z } from "zod";

const [url, model] = process.argv.slice(2);
const QUESTION = "What is the weather in Paris?";
const City = z.object({ name: z.string(), country: z.string() });

const client = new OpenAI({ baseURL: url, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: QUESTION }];
const whole = await client.chat.completions.create({ model, messages, temperature: 0, max_tokens: 10 });
let streamed = "";
for await (const chunk of await client.chat.completions.create({
  model, messages, temperature: 0, max_tokens: 10, stream: true,
})) {
  streamed += chunk.choices[0].delta.content ?? "";
}
assert.equal(streamed, whole.choices[0].message.content);

const chat = createOpenAICompatible({ name: "ours", baseURL: url, supportsStructuredOutputs: true }).chatModel(model);
const weather = tool({
  description: "The weather in a city.",
  inputSchema: z.object({ city: z.string() }),
  execute: async () => "22 degrees and sunny",
});
const settings = { model: chat, temperature: 0, maxRetries: 0 };
const text = await generateText({ ...settings, prompt: QUESTION, maxOutputTokens: 10 });
assert.equal(text.text, streamed);

const running = streamText({
  ...settings, prompt: QUESTION, tools: { weather }, toolChoice: "required", stopWhen: stepCountIs(1),
});
const parts = [];
for await (const part of running.fullStream) parts.push(part.type);
assert(parts.includes("tool-input-delta") && parts.includes("tool-result") && !parts.includes("error"), parts);

const { object } = await generateObject({ ...settings, schema: City, prompt: "Where is Paris?" });
City.parse(object);
