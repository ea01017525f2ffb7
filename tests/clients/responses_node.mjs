// OpenAI's own client for Node under `/v1/responses` of `dim-host serve`: a text, a tool that must be called, whole and streamed, what
// came of it, what is wrong. run.py starts the server with a template that has a place for tools.
import assert from "node:assert/strict";
import OpenAI from "openai";
import { VERSION } from "openai/version";

const client = new OpenAI({ baseURL: process.env.DIM_URL + "/v1", apiKey: process.env.DIM_KEY, maxRetries: 0 });
const asked = { model: "any", input: "What is the weather like in Paris today?", temperature: 0, max_output_tokens: 96 };
const city = { type: "string", enum: ["Paris", "Oslo"] };
const parameters = { type: "object", properties: { city }, required: ["city"], additionalProperties: false };
const tools = [{ type: "function", name: "weather", description: "The weather", parameters, strict: true }];
const must = { tools, tool_choice: "required", parallel_tool_calls: false };

const text = (await client.responses.create(asked)).output_text;
assert(text.length > 10, text);

const whole = await client.responses.create({ ...asked, ...must });
const [call] = whole.output;
assert.equal(whole.output.length, 1);
assert.deepEqual([call.type, call.name, call.status], ["function_call", "weather", "completed"]);
const args = JSON.parse(call.arguments);
assert(city.enum.includes(args.city), call.arguments);

// its own collector of streams, which checks their order
const stream = client.responses.stream({ ...asked, ...must });
let deltas = "";
stream.on("response.function_call_arguments.delta", (event) => (deltas += event.delta));
const final = await stream.finalResponse();
assert.equal(deltas, call.arguments);
assert.deepEqual([final.output[0].name, final.output[0].arguments], ["weather", call.arguments]);
assert.deepEqual(final.output[0].parsed_arguments, args);

const output = { type: "function_call_output", call_id: call.call_id, output: "It is warm." };
const history = [{ role: "user", content: asked.input }, ...whole.output, output];
const answer = await client.responses.create({ ...asked, input: history, tools, tool_choice: "none" });
assert(answer.output_text.length > 0 && answer.output.every((item) => item.type === "message"), JSON.stringify(answer.output));

const wrong = client.responses.create({ ...asked, tools: [{ type: "web_search" }] });
await assert.rejects(wrong, (e) => e instanceof OpenAI.BadRequestError && e.param === "tools[0].type");
console.log(`openai (node) ${VERSION}: responses: a tool that must be called, whole and streamed, what came of it, errors`);
