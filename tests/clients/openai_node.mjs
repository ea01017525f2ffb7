// OpenAI's own client for Node against `dim-host serve`: chat, streaming, leaving a stream, logprobs, what is wrong.
// run.py starts the server.
import assert from "node:assert/strict";
import OpenAI from "openai";
import { VERSION } from "openai/version";

const client = new OpenAI({ baseURL: process.env.DIM_URL + "/v1", apiKey: process.env.DIM_KEY, maxRetries: 0 });
const asked = { model: "any", messages: [{ role: "user", content: "What is the capital of France?" }], temperature: 0, max_tokens: 24 };

const whole = await client.chat.completions.create(asked);
const text = whole.choices[0].message.content;
assert(text.length > 10, text);
assert.equal(whole.usage.total_tokens, whole.usage.prompt_tokens + whole.usage.completion_tokens);

let streamed = "";
let usage = null;
for await (const part of await client.chat.completions.create({ ...asked, stream: true, stream_options: { include_usage: true } })) {
  streamed += part.choices[0]?.delta.content ?? "";
  usage = part.usage ?? usage;
}
assert.equal(streamed, text);
assert.equal(usage.completion_tokens, whole.usage.completion_tokens);

// its own collector of streams, which checks their form
const collected = await client.chat.completions.stream(asked).finalChatCompletion();
assert.equal(collected.choices[0].message.content, text);

const left = await client.chat.completions.create({ ...asked, max_tokens: 900, stream: true });
for await (const _ of left) break;

const told = (await client.chat.completions.create({ ...asked, logprobs: true, top_logprobs: 2 })).choices[0].logprobs.content;
assert(told.every((t) => t.top_logprobs.length === 2 && t.top_logprobs[0].token === t.token));

const completion = await client.completions.create({ model: "any", prompt: "The capital of France is", temperature: 0, max_tokens: 4 });
assert.equal(completion.choices[0].finish_reason, "length");
const models = [];
for await (const model of client.models.list()) models.push(model.id);
assert.deepEqual(models, ["smol"]);

await assert.rejects(client.chat.completions.create({ ...asked, top_p: 7 }), (e) => e instanceof OpenAI.BadRequestError && e.param === "top_p");
const stranger = new OpenAI({ baseURL: process.env.DIM_URL + "/v1", apiKey: "not-the-key", maxRetries: 0 });
await assert.rejects(stranger.models.list(), (e) => e instanceof OpenAI.AuthenticationError && e.code === "invalid_api_key");
console.log(`openai (node) ${VERSION}: chat, streaming, leaving, logprobs, errors`);
