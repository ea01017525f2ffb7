// The page: a conversation, streamed, and the split beside it. The server reads Markdown and says which elements there are;
// here they are made by their names, and texts are put in as texts: nothing of a reply is ever read as HTML.
"use strict";

const at = (id) => document.getElementById(id);
const turns = []; // {role, content, item}
let under_way = null; // AbortController of the reply that streams
let edited = null; // index of the turn that is to be replaced

const headers = (type = "application/json") => {
  const key = at("key").value.trim();
  return key ? { "Content-Type": type, Authorization: "Bearer " + key } : { "Content-Type": type };
};

function element(tag, text, name) {
  const made = document.createElement(tag);
  if (text) made.textContent = text;
  if (name) made.className = name;
  return made;
}

function button(text, what, on_click) {
  const made = element("button", text);
  made.type = "button";
  made.setAttribute("aria-label", what);
  made.addEventListener("click", on_click);
  return made;
}

function say(text, is_bad = false) {
  at("said").textContent = text;
  at("said").classList.toggle("bad", is_bad);
}

// ---- Markdown ----

const ELEMENTS = new Set(["a", "blockquote", "br", "code", "del", "em", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "span", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul"]);

// A list of elements and texts, as src/markdown.rs says it, as a tree.
function built(pieces) {
  const top = document.createDocumentFragment();
  const open = [top];
  for (const piece of pieces) {
    if (piece === null) open.pop();
    else if (typeof piece === "string") open.at(-1).append(piece);
    else if (piece.open === "pre") {
      const code = element("div", "", "code");
      const pre = element("pre");
      const bar = element("div", "", "bar");
      bar.append(element("span", piece.language || "code"), button("Copy", "Copy the code", () => copy(pre.textContent)));
      pre.tabIndex = 0;
      pre.setAttribute("role", "region");
      pre.setAttribute("aria-label", `Code${piece.language ? ", " + piece.language : ""}`);
      code.append(bar, pre);
      open.at(-1).append(code);
      open.push(pre);
    } else {
      const made = document.createElement(ELEMENTS.has(piece.open) ? piece.open : "span");
      if (piece.href) Object.assign(made, { href: piece.href, target: "_blank", rel: "noopener noreferrer nofollow" });
      if (piece.start !== undefined) made.start = piece.start;
      open.at(-1).append(made);
      open.push(made);
    }
  }
  return top;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    say("Copied.");
  } catch {
    say("This browser does not let the page copy; select the text instead.", true);
  }
}

// Shows a turn's text as far as it has come, and is done when all of it is shown. At most one request at a time, and what comes
// meanwhile with the next.
function render(turn) {
  turn.is_stale = true;
  turn.rendering ??= rendered(turn).finally(() => (turn.rendering = null));
  return turn.rendering;
}

async function rendered(turn) {
  while (turn.is_stale) {
    turn.is_stale = false;
    const shown = turn.item.querySelector(".text");
    try {
      const response = await fetch("markdown", { method: "POST", headers: headers("text/markdown"), body: turn.content });
      if (!response.ok) throw new Error();
      const tree = built(await response.json());
      follow(() => {
        shown.classList.remove("plain");
        shown.replaceChildren(tree);
      });
    } catch {
      // as it is
      follow(() => {
        shown.classList.add("plain");
        shown.textContent = turn.content;
      });
    }
    await new Promise((next) => setTimeout(next, 60));
  }
}

// Whoever looks at the end keeps looking at it.
function follow(change) {
  const page = document.scrollingElement;
  const is_at_end = page.scrollHeight - page.scrollTop - page.clientHeight < 80;
  change();
  if (is_at_end) page.scrollTop = page.scrollHeight;
}

// ---- the conversation ----

function add(role, content) {
  const turn = { role, content, item: element("li", "", "turn " + role) };
  const tools = element("div", "", "tools");
  if (role === "user") {
    tools.append(button("Edit", "Edit this message", () => edit(turns.indexOf(turn))));
  } else {
    tools.append(
      button("Regenerate", "Regenerate this reply", () => again(turns.indexOf(turn))),
      button("Copy", "Copy this reply", () => copy(turn.content)));
  }
  turn.item.append(element("span", role === "user" ? "You:" : "Assistant:", "unseen"), element("div", content, "text"), tools);
  turns.push(turn);
  at("talk").append(turn.item);
  return turn;
}

// What a model that reasons says to itself before it answers: there for whoever wants to read it.
function think(turn, text) {
  if (!turn.thoughts) {
    const all = element("details", "", "thoughts");
    turn.thoughts = element("div", "", "plain");
    all.append(element("summary", "Thoughts"), turn.thoughts);
    turn.item.querySelector(".text").before(all);
  }
  follow(() => turn.thoughts.append(text));
}

function cut(n) {
  for (const turn of turns.splice(n)) turn.item.remove();
}

function update() {
  const is_busy = under_way !== null;
  at("send").hidden = is_busy;
  at("stop").hidden = !is_busy;
  at("empty").hidden = turns.length > 0;
  at("editing").hidden = edited === null;
  at("talk").setAttribute("aria-busy", is_busy);
  for (const tool of at("talk").querySelectorAll(".tools button")) tool.disabled = is_busy;
}

function edit(i) {
  edited = i;
  at("text").value = turns[i].content;
  update();
  at("text").focus();
}

function keep() {
  edited = null;
  at("text").value = "";
  update();
  at("text").focus();
}

function again(i) {
  cut(i);
  answer();
}

function request() {
  const system = at("system").value.trim();
  const messages = turns.map(({ role, content }) => ({ role, content }));
  const body = { messages: (system ? [{ role: "system", content: system }] : []).concat(messages), stream: true };
  for (const name of ["temperature", "top_p", "min_p", "top_k", "seed", "max_tokens"]) {
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
      if (line.startsWith(":") && line.length > 3) say(line.slice(2) + " … the reply goes on when it is back.");
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

async function answer() {
  const body = request();
  const turn = add("assistant", "");
  turn.item.classList.add("streams");
  under_way = new AbortController();
  say("");
  update();
  document.scrollingElement.scrollTop = document.scrollingElement.scrollHeight;
  let timings = null;
  try {
    const response = await fetch("v1/chat/completions", { method: "POST", headers: headers(), body, signal: under_way.signal });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      timings = event.timings ?? timings;
      const { content, reasoning_content } = event.choices[0]?.delta ?? {};
      if ((content || reasoning_content) && at("said").textContent) say("");
      if (reasoning_content) think(turn, reasoning_content);
      if (content) {
        turn.content += content;
        render(turn);
      }
    }
    await turn.rendering;
    say(timings ? `Complete: ${timings.predicted_n} tokens, ${timings.predicted_per_second.toFixed(1)} a second.` : "Complete.");
  } catch (error) {
    if (error.name === "AbortError") say("Stopped.");
    else say("Error: " + error.message, true);
    if (turn.content === "") cut(turns.indexOf(turn));
  }
  under_way = null;
  turn.item.classList.remove("streams");
  update();
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const content = at("text").value;
  if (under_way || content.trim() === "") return;
  if (edited !== null) cut(edited);
  edited = null;
  at("text").value = "";
  add("user", content);
  answer();
});
at("text").addEventListener("keydown", (event) => {
  if (event.key === "Escape" && edited !== null) keep();
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("ask").requestSubmit();
  }
});
at("stop").addEventListener("click", () => {
  under_way?.abort();
  at("text").focus();
});
at("keep").addEventListener("click", keep);
at("clear").addEventListener("click", () => {
  under_way?.abort();
  cut(0);
  say("");
  keep();
});

// ---- the split ----

// "3..7" as [3, 7]
const range = (blocks) => blocks.split("..").map(Number);

function draw(split) {
  const away = split.health.away;
  const of = (stage) => (stage.worker === null ? undefined : away.find((a) => a.stage.endsWith(stage.worker)));
  const kind = (stage) => [stage.worker === null ? "" : "there", of(stage) ? "away" : ""].join(" ").trim();
  at("strip").replaceChildren(...split.stages.flatMap((stage) => {
    const [first, last] = range(stage.blocks);
    return Array.from({ length: Math.max(0, last - first + 1) || 0 }, () => element("span", "", kind(stage)));
  }));
  const most = Math.max(0.01, ...(split.last?.stages ?? []).map((s) => s.compute_ms + s.wait_ms));
  at("stages").replaceChildren(...split.stages.map((stage, i) => {
    const item = element("li", "", kind(stage));
    item.append(element("div", stage.worker ?? "this machine", "where"), element("div", `${stage.role}, blocks ${stage.blocks}`, "what"));
    const gone = of(stage);
    if (gone) item.append(element("div", `${gone.state} for ${Math.round(gone.since_s)} s: ${gone.reason}`, "what bad"));
    const last = split.last?.stages[i];
    if (last) {
      const waits = last.wait_ms >= 0.05 ? `, ${last.wait_ms.toFixed(1)} ms waiting` : "";
      item.append(element("div", `${last.compute_ms.toFixed(1)} ms a token${waits}`, "what"));
      const bar = element("progress");
      Object.assign(bar, { max: most, value: last.compute_ms + last.wait_ms });
      bar.setAttribute("aria-label", "Its share of a token's time");
      item.append(bar);
    }
    return item;
  }));
  const wire = split.last?.wire;
  const bytes = (n) => Math.round(n).toLocaleString("en");
  at("wire").textContent = wire ? `${bytes(wire.bytes_sent_per_token)} bytes out and ${bytes(wire.bytes_received_per_token)} back a token (${wire.dtype})` : "";
  const { busy, total, waiting } = split.slots ?? {};
  at("slots").textContent = split.slots ? `${busy} of ${total} ${total === 1 ? "slot" : "slots"} busy${waiting ? `, ${waiting} waiting` : ""}` : "";
  at("speed").textContent = split.tok_s > 0 ? `${split.tok_s.toFixed(1)} tok/s` : "";
}

// Said aloud by a screen reader, so only when it changes.
function state(text) {
  if (at("health").textContent !== text) at("health").textContent = text;
}

async function look() {
  try {
    const response = await fetch("split", { headers: headers() });
    const split = await response.json();
    if (!response.ok) throw new Error(split.error.message);
    at("model").textContent = split.model ?? "";
    document.title = split.model ? `${split.model} · DIM` : "DIM";
    // workers that stayed away, and whose blocks run here since
    const missing = split.health.fallen_back;
    state(split.health.status + (missing.length ? `, without ${missing.join(" and ")}: those blocks run here` : ""));
    at("light").className = split.health.status === "ok" ? "ok" : "away";
    draw(split);
  } catch (error) {
    state(error instanceof TypeError ? "the server does not answer" : error.message);
    at("light").className = "bad";
  }
  setTimeout(look, 1000);
}

// where there is no room beside the conversation, it comes first
if (matchMedia("(max-width: 52rem)").matches) at("split").open = false;
update();
look();
