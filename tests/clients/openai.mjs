// OpenAI's clients for Node, unchanged: `node openai.mjs http://127.0.0.1:7860/v1 KEY`. Writes a JSON object: what each call gave.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateImage } from "ai";
import OpenAI, { toFile } from "openai";

const [baseURL, apiKey] = process.argv.slice(2);
const found = {};

const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
found.models = [];
for await (const model of client.models.list()) found.models.push(model.id);
const made = await client.images.generate({ prompt: "a cat", n: 2, size: "64x48", seed: 7, steps: 5 });
found.generated = made.data.map((one) => one.b64_json);
found.events = [];
const stream = await client.images.generate({ prompt: "a cat", stream: true, partial_images: 2, seed: 8 });
for await (const event of stream) found.events.push([event.type, event.b64_json]);
const file = await toFile(Buffer.from(made.data[0].b64_json, "base64"), "image.png", { type: "image/png" });
found.edited = [];
for (const image of [file, [file]]) {
  const edited = await client.images.edit({ image, prompt: "a cat", seed: 9 });
  found.edited.push(edited.data[0].b64_json);
}
found.refused = [];
for (const wrong of [{ model: "dall-e-3" }, { size: "huge" }]) {
  try {
    await client.images.generate({ prompt: "a cat", ...wrong });
  } catch (error) {
    found.refused.push([error.constructor.name, error.status, error.param, error.type]);
  }
}
try {
  await new OpenAI({ baseURL, apiKey: "wrong", maxRetries: 0 }).models.list();
} catch (error) {
  found.refused.push([error.constructor.name, error.status, error.param, error.type]);
}

const provider = createOpenAICompatible({ name: "fastsd", baseURL, apiKey });
const model = provider.imageModel("digits");
const providerOptions = { fastsd: { seed: 11, steps: 5 } };
const many = await generateImage({ model, prompt: "a cat", n: 2, size: "64x48", providerOptions });
found.sdk = many.images.map((one) => one.base64);
const start = Buffer.from(many.images[0].uint8Array);
const changed = await generateImage({ model, prompt: { text: "a cat", images: [start] }, size: "64x48", providerOptions });
found.sdkEdited = changed.images.map((one) => one.base64);
found.warnings = [...many.warnings, ...changed.warnings];

console.log(JSON.stringify(found));
