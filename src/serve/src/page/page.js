// The page: a conversation, streamed, and the split beside it. Replies are shown as plain text: nothing of them is ever read as
// HTML, so there is nothing to sanitise.
"use strict";

const at = (id) => document.getElementById(id);
const turns = []; // {role, content}
let under_way = null; // AbortController of the reply that streams

const headers = () => {
  const key = at("key").value.trim();
  return key ? { "Content-Type": "application/json", Authorization: "Bearer " + key } : { "Content-Type": "application/json" };
};

function element(tag, text, name) {
  const made = document.createElement(tag);
  if (text) made.textContent = text;
  if (name) made.className = name;
  return made;
}

function show() {
  at("talk").replaceChildren(...turns.map((turn, i) => {
    const item = element("li", "", turn.role);
    const who = element("div", "", "who");
    who.append(element("span", turn.role === "user" ? "You" : "Assistant"));
    if (turn.role === "user") {
      const edit = element("button", "Edit");
      edit.type = "button";
      edit.disabled = under_way !== null;
      edit.addEventListener("click", () => {
        at("text").value = turn.content;
        turns.length = i;
        show();
        at("text").focus();
      });
      who.append(edit);
    }
    item.append(who, element("div", turn.content, "text"));
    return item;
  }));
  at("stop").disabled = under_way === null;
  at("send").disabled = at("clear").disabled = under_way !== null;
  at("again").disabled = under_way !== null || !turns.some((turn) => turn.role === "user");
}

function request() {
  const system = at("system").value.trim();
  const body = { messages: (system ? [{ role: "system", content: system }] : []).concat(turns), stream: true };
  for (const name of ["temperature", "top_p", "max_tokens"]) {
    if (at(name).value !== "") body[name] = Number(at(name).value);
  }
  return JSON.stringify(body);
}

// The events of a stream, as they come.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith(":") && line.length > 3) at("said").textContent = line.slice(2) + " ...";
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

async function answer() {
  const body = request();
  const turn = { role: "assistant", content: "" };
  turns.push(turn);
  under_way = new AbortController();
  at("said").textContent = "";
  show();
  const shown = at("talk").lastElementChild.querySelector(".text");
  try {
    const response = await fetch("v1/chat/completions", { method: "POST", headers: headers(), body, signal: under_way.signal });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const text = event.choices[0]?.delta?.content;
      if (text) {
        at("said").textContent = "";
        turn.content += text;
        shown.textContent = turn.content;
      }
    }
    at("said").textContent = "The reply is complete.";
  } catch (error) {
    at("said").textContent = error.name === "AbortError" ? "Stopped." : "Error: " + error.message;
    if (turn.content === "") turns.pop();
  }
  under_way = null;
  show();
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const content = at("text").value;
  if (under_way || content.trim() === "") return;
  turns.push({ role: "user", content });
  at("text").value = "";
  answer();
});
at("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("ask").requestSubmit();
  }
});
at("stop").addEventListener("click", () => under_way?.abort());
at("again").addEventListener("click", () => {
  while (turns.length && turns.at(-1).role !== "user") turns.pop();
  answer();
});
at("clear").addEventListener("click", () => {
  turns.length = 0;
  at("said").textContent = "";
  show();
  at("text").focus();
});

async function look() {
  try {
    const response = await fetch("split", { headers: headers() });
    const split = await response.json();
    if (!response.ok) throw new Error(split.error.message);
    at("model").textContent = split.model ?? "";
    const away = split.health.away;
    const why = away.map((a) => `${a.stage}: ${a.state} for ${Math.round(a.since_s)} s`);
    at("state").textContent = [split.health.status, ...why].join("; ");
    at("stages").replaceChildren(...split.stages.map((stage, i) => {
      const is_away = stage.worker !== null && away.some((a) => a.stage.endsWith(stage.worker));
      const item = element("li", `blocks ${stage.blocks}, ${stage.worker ?? "this machine"}`, is_away ? "away" : "");
      const last = split.last?.stages[i];
      if (last) item.append(element("div", `${last.compute_ms.toFixed(1)} ms a token, ${last.wait_ms.toFixed(1)} ms waiting`));
      return item;
    }));
    const wire = split.last?.wire;
    const bytes = wire ? `; ${Math.round(wire.bytes_sent_per_token + wire.bytes_received_per_token)} bytes a token (${wire.dtype})` : "";
    const slots = split.slots ? `; ${split.slots.busy} of ${split.slots.total} slots busy, ${split.slots.waiting} waiting` : "";
    at("speed").textContent = `${split.tok_s.toFixed(1)} tok/s${bytes}${slots}`;
  } catch (error) {
    at("state").textContent = error.message;
  }
  setTimeout(look, 1000);
}

show();
look();
