// The official Node clients: cases as JSON on standard input, what became of each on standard output.
// tests/compat/clients.py has both shapes.

import { File, Buffer } from "node:buffer";
import { text } from "node:stream/consumers";
import Anthropic from "@anthropic-ai/sdk";
import OpenAI, { toFile } from "openai";

globalThis.File ??= File; // Node 18 has it, but not there

const [base, key] = process.argv.slice(2);
const options = { apiKey: key, maxRetries: 0, timeout: 30_000 };
const clients = {
  openai: new OpenAI({ baseURL: `${base}/v1`, ...options }),
  anthropic: new Anthropic({ baseURL: base, ...options }),
};

async function outcome({ client, call, params, headers, sound }) {
  const path = call.split(".");
  const method = path.pop();
  const resource = path.reduce((at, name) => at[name], clients[client]);
  if (sound) params.file = await toFile(Buffer.from(sound, "base64"), "sound.wav");
  const events = [];
  try {
    const result = await resource[method](params, { headers });
    if (!result?.[Symbol.asyncIterator] || Array.isArray(result.data)) return { result };
    for await (const event of result) events.push(event);
    return { events };
  } catch (error) {
    return { events, error: described(error) };
  }
}

function described(error) {
  const { status, message, code, param, type, error: body } = error;
  const retryAfter = error.headers?.get("retry-after");
  return { class: error.constructor.name, status, message, code, param, type, body, retryAfter };
}

const outcomes = [];
for (const each of JSON.parse(await text(process.stdin))) outcomes.push(await outcome(each));
process.stdout.write(JSON.stringify(outcomes));
