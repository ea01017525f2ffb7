// The page of `dim-host serve --fallback local` in a real Chromium: its worker is killed (-9) while a reply streams and never comes
// back; the reply is the same, and the page says whose blocks run here since.
import assert from "node:assert/strict";
import { accessible, browser, complete, elsewhere, enter, is, loseTheWorker, page, reply, shot, wrong } from "./common.mjs";

try {
  await enter(120);
  assert.equal(await page.locator("#stages li.there").count(), 1);
  const expected = await loseTheWorker();
  await is("#health", /^ok, without .*127\.0\.0\.1.*: those blocks run here$/);
  await complete();
  assert.equal(await reply.textContent(), expected);
  assert.equal(await page.locator("#stages li.there, #stages li.away").count(), 0);
  await accessible("a worker's blocks run here");
  await shot("alone");
  assert.deepEqual(wrong, [], "errors of the page");
  assert.deepEqual(elsewhere, [], "the page asks nobody else");
} catch (error) {
  await shot("failed");
  throw error;
} finally {
  await browser.close();
}
console.log(`Chromium ${browser.version()}: a worker killed, its blocks run here, axe`);
