// Try it: send a chat to this gateway, show its answer while it comes, and show the same request for other programs.
"use strict";
const byId = (id) => document.getElementById(id);
const url = location.origin + "/v1/chat/completions";
let stopper = null;

function body() {
  const messages = [{ role: "user", content: byId("message").value }];
  if (byId("system").value) messages.unshift({ role: "system", content: byId("system").value });
  const made = { model: byId("model").value, stream: true, messages };
  if (byId("max").value) made.max_tokens = Number(byId("max").value);
  if (byId("temperature").value) made.temperature = Number(byId("temperature").value);
  return made;
}

const quoted = (text) => "'" + text.replaceAll("'", "'\\''") + "'";

// A Python literal: JSON's strings and numbers are Python's, too.
function literal(value) {
  if (value === true) return "True";
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (typeof value === "object") return `{${Object.entries(value).map(([name, it]) => `${JSON.stringify(name)}: ${literal(it)}`).join(", ")}}`;
  return JSON.stringify(value);
}

function examples() {
  const made = body();
  byId("curl").textContent =
    `curl -N ${quoted(url)} \\\n  -H "Authorization: Bearer $STACK_KEY" -H 'Content-Type: application/json' \\\n  -d ${quoted(JSON.stringify(made))}`;
  const fields = Object.entries(made).map(([name, it]) => `    ${name}=${literal(it)},\n`).join("");
  byId("python").textContent =
    `import os\nfrom openai import OpenAI\n\nclient = OpenAI(base_url="${location.origin}/v1", api_key=os.environ["STACK_KEY"])\n` +
    `for chunk in client.chat.completions.create(\n${fields}):\n    if chunk.choices:\n        print(chunk.choices[0].delta.content or "", end="", flush=True)\n`;
  byId("javascript").textContent =
    `import OpenAI from "openai";\n\nconst client = new OpenAI({ baseURL: "${location.origin}/v1", apiKey: process.env.STACK_KEY });\n` +
    `const stream = await client.chat.completions.create(${JSON.stringify(made, null, 2)});\n` +
    `for await (const chunk of stream) process.stdout.write(chunk.choices[0]?.delta?.content ?? "");\n`;
}

function take(event) {
  const data = event.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("\n");
  if (!data || data === "[DONE]") return;
  const told = JSON.parse(data);
  if (told.error) throw new Error(told.error.message);
  for (const choice of told.choices ?? []) {
    // llama.cpp and older versions of vLLM say reasoning_content; Ollama and vLLM say reasoning.
    const { reasoning_content, reasoning, content } = choice.delta ?? {};
    byId("answer").append(reasoning_content || reasoning || "", content || "");
  }
}

async function read(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return take(held);
    const events = (held + value).split(/\r?\n\r?\n/);
    held = events.pop();
    events.forEach(take);
  }
}

async function send() {
  const since = performance.now();
  const answer = await fetch(url, {
    method: "POST",
    headers: { authorization: `Bearer ${byId("key").value}`, "content-type": "application/json" },
    body: JSON.stringify(body()),
    signal: stopper.signal,
  });
  byId("headers").textContent = `${answer.status}\n` + [...answer.headers].map(([name, value]) => `${name}: ${value}`).join("\n");
  if (!answer.ok) throw new Error((await answer.json()).error.message);
  await read(answer);
  byId("status").textContent = `Finished after ${((performance.now() - since) / 1000).toFixed(1)} s.`;
}

byId("try").addEventListener("submit", async (event) => {
  event.preventDefault();
  stopper = new AbortController();
  byId("answer").textContent = "";
  byId("headers").textContent = "–";
  byId("status").textContent = "Waiting for the answer.";
  byId("send").disabled = true;
  byId("stop").disabled = false;
  try {
    await send();
  } catch (error) {
    byId("status").textContent = error.name === "AbortError" ? "Stopped." : `Failed: ${error.message}`;
  }
  byId("send").disabled = false;
  byId("stop").disabled = true;
});
byId("stop").addEventListener("click", () => stopper?.abort());
byId("try").addEventListener("input", examples);
examples();
