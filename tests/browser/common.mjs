// A real Chromium at the page of `dim-host serve`, and what tests of it have in common. tests/clients/run.py starts the server. With
// DIM_SHOTS=FOLDER pictures are left there; with DIM_PAGE=src/serve/src/page the page is taken from there and not from the program.
import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { existsSync, readFileSync } from "node:fs";
import { chromium } from "playwright-core";

const { DIM_URL, DIM_KEY, DIM_SHOTS, DIM_PAGE } = process.env;
const program = ["/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"].find(existsSync);
const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
// in a container there are no namespaces for its sandbox; the page is ours
export const browser = await chromium.launch({ executablePath: program, args: ["--no-sandbox"] });
export const wide = { width: 1280, height: 860 };
const context = await browser.newContext({ viewport: wide });
await context.grantPermissions(["clipboard-read", "clipboard-write"]);
export const page = await context.newPage();
page.setDefaultTimeout(Number(process.env.DIM_PATIENCE_MS ?? 60_000));
export const wrong = [];
page.on("pageerror", (error) => wrong.push(String(error)));
// what the page's policy forbids is said here too
page.on("console", (message) => message.type() === "error" && !message.text().includes("401") && wrong.push(message.text()));
export const elsewhere = [];
page.on("request", (request) => new URL(request.url()).origin !== DIM_URL && elsewhere.push(request.url()));

if (DIM_PAGE) {
  for (const file of ["index.html", "page.css", "page.js"]) {
    await page.route(file === "index.html" ? `${DIM_URL}/` : `${DIM_URL}/${file}`, (route) => route.fulfill({ path: `${DIM_PAGE}/${file}` }));
  }
}
export const shot = async (name) => DIM_SHOTS && (await page.screenshot({ path: `${DIM_SHOTS}/${name}.png` }));
export const said = page.locator("#said");
export const reply = page.locator("#talk li.assistant .text").last();
export const ask = async (text) => {
  await page.fill("#text", text);
  await page.keyboard.press("Enter");
};
export const is = (locator, pattern) =>
  page.waitForFunction(([selector, source]) => new RegExp(source).test([...document.querySelectorAll(selector)].at(-1)?.textContent ?? ""), [locator, pattern.source]);
export const complete = () => is("#said", /^Complete/);

export async function accessible(what) {
  // by the protocol and not by the page, whose policy forbids it
  await page.evaluate(axe);
  const { violations } = await page.evaluate(() => window.axe.run({ resultTypes: ["violations"] }));
  const found = violations.map((v) => `${v.impact}: ${v.id}: ${v.help}: ${v.nodes.map((n) => n.target).join(" ")}`);
  if (found.length) console.log(`  axe, ${what}:\n    ${found.join("\n    ")}`);
  assert.deepEqual(violations.filter((v) => v.impact === "serious" || v.impact === "critical"), [], what);
}

// Opens the page, says the key, and asks for greedy replies of so many tokens.
export async function enter(tokens) {
  await page.goto(DIM_URL);
  await is("#health", /API key/);
  await page.click("#settings summary");
  await page.fill("#key", DIM_KEY);
  await page.fill("#temperature", "0");
  await page.fill("#max_tokens", String(tokens));
  await is("#health", /^ok$/);
}

// Asks twice for the same long reply, and kills the worker (-9) in the middle of the second one: what the first one was.
export async function loseTheWorker() {
  const long = "Write a long story about a dog and a fox.";
  await ask(long);
  await complete();
  const expected = await reply.textContent();
  await page.click("#clear");
  await ask(long);
  await is("#talk li.assistant .text", /\w{3}/);
  process.kill(Number(process.env.DIM_WORKER_PID), "SIGKILL");
  return expected;
}
