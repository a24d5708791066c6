// What a program in JavaScript does with the `openai` package; prints what it got as JSON.

import OpenAI from "openai";

const [baseURL, apiKey, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const messages = [{ role: "user", content: "Tell me of Elizabeth." }];
const greedy = { model, temperature: 0, max_tokens: 30 };
const chat = client.chat.completions;
const found = {};

async function refusal(asked) {
  try {
    await asked;
  } catch (error) {
    const { status, code, param, message } = error;
    return { class: error.constructor.name, status, code, param, message };
  }
  return null;
}

found.models = (await client.models.list()).data.map(({ id }) => id);
found.plain = await chat.create({ ...greedy, messages });

let streamed = "", usage = null, chunks = 0;
const options = { stream: true, stream_options: { include_usage: true } };
for await (const chunk of await chat.create({ ...greedy, ...options, messages })) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
  chunks += 1;
}
found.streamed = { text: streamed, usage, chunks };

// The package's own helper gathers a stream to what an answer in one piece would be.
const gathered = chat.stream({ ...greedy, messages, logprobs: true, top_logprobs: 2 });
found.gathered = (await gathered.finalChatCompletion()).choices[0];

let text = "";
const prompt = { ...greedy, prompt: "It is a truth", stream: true };
for await (const chunk of await client.completions.create(prompt)) text += chunk.choices[0].text;
found.completion = text;

const headers = { "x-session-id": "javascript" };
found.turns = [];
for (const content of ["Tell me of Elizabeth.", "And of Jane?"]) {
  const turn = { ...greedy, messages: [{ role: "user", content }] };
  found.turns.push((await chat.create(turn, { headers })).choices[0].message.content);
}

const endless = await chat.create({ ...greedy, max_tokens: 200000, messages, stream: true });
for await (const chunk of endless) if (chunk.choices[0]?.delta?.content) break; // hangs up

found.refusals = {
  model: await refusal(chat.create({ ...greedy, model: "gpt-4", messages })),
  format: await refusal(
    chat.create({ ...greedy, messages, response_format: { type: "json_object" } }),
  ),
  key: await refusal(client.withOptions({ apiKey: "wrong" }).models.list()),
  streamed: await refusal(chat.create({ ...greedy, temperature: 9, messages, stream: true })),
};

console.log(JSON.stringify(found));
