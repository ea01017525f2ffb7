// The page of `dim-host serve` in a real Chromium: ask, stream, stop, regenerate, edit, a worker killed (-9) while a reply streams
// and back, light and dark, a narrow screen, the keyboard alone, and axe's rules for people who hear the page or see it badly.
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { accessible, ask, browser, complete, elsewhere, enter, is, loseTheWorker, page, reply, said, shot, wide, wrong } from "./common.mjs";

await enter(60);
assert.equal(await page.textContent("#model"), "smol");
assert.equal(await page.locator("#strip span").count(), 30, "a mark for each block");
assert.equal(await page.locator("#strip .there").count(), 10);
await accessible("empty");
await shot("empty");
await page.click("#settings summary");

// ask, and see it come
await ask("What is the capital of France?");
await is("#talk li.assistant .text", /\w/);
assert(await page.locator("#stop").isVisible() || (await said.textContent()).startsWith("Complete"));
await complete();
const first = await reply.textContent();
assert(first.length > 10, first);
await accessible("a reply");

// regenerate: greedy, the same again
await page.getByRole("button", { name: "Regenerate this reply" }).last().click();
await is("#said", /^$/);
await complete();
assert.equal(await reply.textContent(), first);
assert.equal(await page.locator("#talk li").count(), 2);

// stop
await page.evaluate(() => (document.getElementById("max_tokens").value = "800"));
await ask("Count slowly from one to five hundred, one number on each line.");
await is("#talk li.assistant .text", /\w{1,}/);
await page.getByRole("button", { name: "Stop" }).click();
await is("#said", /^Stopped/);
assert.equal(await page.evaluate(() => document.activeElement.id), "text", "the keyboard goes on where it was");
const free = await page.waitForFunction(async (key) => {
  const props = await (await fetch("props", { headers: { Authorization: "Bearer " + key } })).json();
  return props.slots_busy === 0;
}, process.env.DIM_KEY);
assert(free, "the slot of a stopped reply is free");

// edit: the message comes back, what came after it goes when it is sent; Escape keeps it
await page.evaluate(() => (document.getElementById("max_tokens").value = "60"));
await page.getByRole("button", { name: "Edit this message" }).first().click();
assert.equal(await page.inputValue("#text"), "What is the capital of France?");
await shot("editing");
await page.keyboard.press("Escape");
assert.equal(await page.locator("#talk li").count(), 4);
await page.getByRole("button", { name: "Edit this message" }).first().click();
await ask("What is the capital of Italy?");
await complete();
assert.equal(await page.locator("#talk li").count(), 2);
assert.equal(await page.locator("#talk .user .text").textContent(), "What is the capital of Italy?");
assert.notEqual(await reply.textContent(), first);

// a worker killed while it streams, and back: the same words as without
await page.click("#clear");
await page.evaluate(() => (document.getElementById("max_tokens").value = "120"));
const expected = await loseTheWorker();
await is("#said", /^waiting for .*127\.0\.0\.1/);
await is("#health", /waiting for a worker/);
assert.equal(await page.locator("#stages li.away").count(), 1);
await accessible("a worker is away");
await shot("away");
const [worker, ...words] = JSON.parse(process.env.DIM_WORKER);
const again = spawn(worker, words, { stdio: "ignore" });
try {
  await complete();
  assert.equal(await reply.textContent(), expected);
  await is("#health", /^ok$/);

  // Markdown, and what would be HTML: a reply made of it, by the server's own renderer
  const text = "Two steps:\n\n1. **Add** the numbers\n2. Print them\n\n```rust\nfn main() {\n    println!(\"{}\", 1 + 2);\n}\n```\n\n" +
    "| blocks | where |\n|---|---|\n| 0..9 | here |\n| 10..19 | there |\n\n> A [link](https://example.com/) and <img src=x onerror=\"document.title='owned'\">";
  const part = (delta) => `data: ${JSON.stringify({ choices: [{ index: 0, delta }] })}\n\n`;
  const parts = [{ reasoning_content: "A sum, " }, { reasoning_content: "in <b>Rust</b>." }, { content: text }];
  await page.route("**/v1/chat/completions", (route) => route.fulfill({
    contentType: "text/event-stream",
    body: parts.map(part).join("") + "data: [DONE]\n\n",
  }));
  await page.click("#clear");
  await ask("How do I add 1 and 2 in Rust?");
  await page.waitForSelector("#talk table td");
  assert.equal(await page.locator("#talk img, #talk script").count(), 0, "HTML of a reply is text");
  assert(!(await page.title()).includes("owned"));
  assert.equal(await page.locator("#talk .assistant strong").textContent(), "Add");
  assert.equal(await page.locator("#talk .assistant ol li").count(), 2);
  assert.equal(await page.locator("#talk .thoughts .plain").textContent(), "A sum, in <b>Rust</b>.");
  assert(!(await page.locator("#talk .thoughts .plain").isVisible()), "thoughts are there for whoever opens them");
  await page.click("#talk .thoughts summary");
  await page.getByRole("button", { name: "Copy the code" }).click();
  assert.equal(await page.evaluate(() => navigator.clipboard.readText()), "fn main() {\n    println!(\"{}\", 1 + 2);\n}\n");
  await accessible("Markdown");
  await shot("light");
  await page.emulateMedia({ colorScheme: "dark" });
  const ground = await page.evaluate(() => getComputedStyle(document.documentElement).backgroundColor);
  assert(ground.match(/\d+/g).slice(0, 3).every((n) => n < 60), ground);
  await accessible("dark");
  await shot("dark");
  await page.setViewportSize({ width: 360, height: 740 });
  const fits = () => page.evaluate(() => document.documentElement.scrollWidth <= innerWidth);
  assert(await fits(), "nothing sticks out of a narrow screen");
  await accessible("narrow");
  await shot("narrow");
  await page.emulateMedia({ colorScheme: "light" });
  await page.click("#split summary");
  await shot("narrow-closed");
  await page.setViewportSize(wide);

  // the keyboard alone reaches what there is
  await page.evaluate(() => document.activeElement.blur());
  const reached = new Set();
  for (let i = 0; i < 40; i++) {
    await page.keyboard.press("Tab");
    reached.add(await page.evaluate(() => document.activeElement.id || document.activeElement.getAttribute("aria-label") || document.activeElement.parentElement?.id));
  }
  for (const name of ["clear", "text", "send", "split", "settings", "Edit this message", "Regenerate this reply", "Copy the code"]) {
    assert(reached.has(name), `the keyboard does not reach ${name}: ${[...reached]}`);
  }
  assert.deepEqual(wrong, [], "errors of the page");
  assert.deepEqual(elsewhere, [], "the page asks nobody else");
} catch (error) {
  await shot("failed");
  throw error;
} finally {
  again.kill("SIGKILL");
  await browser.close();
}
console.log(`Chromium ${browser.version()}: ask, stop, regenerate, edit, a worker killed and back, Markdown, dark, narrow, keyboard, axe`);
