// Uses the console in a real Chromium as a person does, and reports problems. A line on standard output requests an
// action on the stack from the test that runs this script; the test answers when the action is done.
//
//   node browser.mjs '{"url": ..., "key": ..., "chromium": ..., "screenshots": ...}'
import { mkdirSync } from "node:fs";
import { createInterface } from "node:readline";
import { chromium } from "playwright-core";

const { url, key, chromium: executablePath, screenshots } = JSON.parse(process.argv[2]);
mkdirSync(screenshots, { recursive: true });
const answers = createInterface({ input: process.stdin })[Symbol.asyncIterator]();

/** ask requests an action of the test. */
async function ask(action) {
  console.log(`do ${action}`);
  await answers.next();
}

const problems = [];
function check(ok, what) {
  if (!ok) problems.push(what);
}

const args = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"];
const browser = await chromium.launch({ executablePath, args });
const context = await browser.newContext({ viewport: { width: 1280, height: 860 }, reducedMotion: "reduce" });
const page = await context.newPage();
page.setDefaultTimeout(60_000); // the machine may be busy with other tests
page.on("request", (request) => {
  const own = request.url().startsWith(url) || request.url().startsWith("data:");
  check(own, `a request goes to ${request.url()}`);
});
page.on("pageerror", (error) => problems.push(`the page fails: ${error}`));
page.on("dialog", (dialog) => (problems.push(`a dialog opens: ${dialog.message()}`), dialog.dismiss()));
page.on("console", (message) => check(!message.text().includes("Content Security Policy"), message.text()));

/** settled waits until the page has loaded its content. */
async function settled() {
  await page.waitForFunction(() => !document.querySelector("[aria-busy=true], .skeleton"));
}

/** show opens a page, and makes the checks for every page. */
async function show(hash) {
  await page.goto(`${url}/console/#/${hash}`);
  await settled();
  const found = await page.evaluate(() => ({
    pwned: "pwned" in window,
    elements: document.querySelectorAll(
      "main script, main img, main iframe, main svg, main object, main [onerror], main [onload]",
    ).length,
    links: [...document.querySelectorAll("a")].filter((a) => !a.getAttribute("href")?.startsWith("#")).length,
  }));
  const safe = !found.pwned && found.elements === 0 && found.links === 0;
  check(safe, `${hash}: text of a message became part of the page: ${JSON.stringify(found)}`);
}

/** pictures takes screenshots of the page at each size, light and dark. */
async function pictures(name) {
  for (const width of [1280, 390]) {
    await page.setViewportSize({ width, height: width === 390 ? 844 : 860 });
    const wide = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
    check(wide <= 0, `${name} is ${wide} px too wide at ${width}`);
    for (const colorScheme of ["light", "dark"]) {
      await page.emulateMedia({ colorScheme });
      await page.screenshot({ path: `${screenshots}/${name}-${width}-${colorScheme}.png`, fullPage: width === 390 });
    }
  }
  await page.emulateMedia({ colorScheme: "light" });
  await page.setViewportSize({ width: 1280, height: 860 });
}

const station = (name, state) =>
  page.locator(`.station[data-state=${state}]`, { has: page.locator(`.name[title="${name}"]`) });

/** confirm fills in the dialog and confirms it. */
async function confirm(verb) {
  await page.locator("dialog textarea").fill("tried in a browser");
  await page.locator("dialog button[type=submit]", { hasText: verb }).click();
  await page.locator("dialog").waitFor({ state: "detached" });
}

async function signIn() {
  await page.goto(`${url}/`); // redirects to the console
  await page.locator("input[name=credential]").fill("nobody.AAAA");
  await page.keyboard.press("Enter");
  await page.locator("text=This credential is not accepted").waitFor();
  await page.screenshot({ path: `${screenshots}/sign-in.png` });
  await page.locator("input[name=credential]").fill(key);
  await page.keyboard.press("Enter");
  await page.locator(".station").first().waitFor();
  check((await context.cookies()).length === 0, "there is a cookie");
}

/** firstPaint takes the best of several, since the machine may be busy. */
async function firstPaint() {
  let best = Infinity;
  for (let i = 0; i < 5 && best > 500; i++) {
    await page.reload();
    await page.locator(".station").first().waitFor();
    const painted = await page.waitForFunction(
      () => performance.getEntriesByName("first-contentful-paint")[0]?.startTime,
    );
    best = Math.min(best, await painted.jsonValue());
  }
  console.log(`first paint after ${Math.round(best)} ms`);
  check(best < 1000, `first paint after ${best} ms`);
}

async function flow() {
  await page.locator(".headline[data-state=ok]", { hasText: "All stations work" }).waitFor();
  await ask("messages");
  await page.locator(".station.moves .name[title=shipping]").waitFor();
  await pictures("flow");
  await ask("stop broker");
  await station("RabbitMQ", "fault").waitFor();
  await page.locator(".headline[data-state=fault]", { hasText: "The broker cannot be reached" }).waitFor();
  await ask("messages");
  await station("relay", "attention").waitFor();
  await pictures("flow-broker-away");
  await ask("start broker");
  await station("RabbitMQ", "ok").waitFor();
  await page.locator(".headline[data-state=ok]").waitFor();
}

/** keyboard opens a page with the keyboard alone: past the skip link and along the navigation. */
async function keyboard() {
  await page.goto(`${url}/console/?keyboard#/flow`);
  await page.locator(".station").first().waitFor();
  const names = [];
  for (let i = 0; i < 12; i++) {
    await page.keyboard.press("Tab");
    names.push(await page.evaluate(() => document.activeElement?.textContent ?? ""));
    if (names.at(-1) === "Relays") break;
  }
  check(names.join().includes("Flow") && names.at(-1) === "Relays", `Tab leads to ${names.join(", ")}`);
  await page.keyboard.press("Enter");
  await page.locator("h1", { hasText: "Relays" }).waitFor();
}

async function deadLetters() {
  await ask("corpus");
  await show("dead");
  await pictures("dead-letters");
  await show("dead?key=plain");
  await page.locator("tbody a").first().click();
  await page.locator(".payload", { hasText: "a plain text" }).waitFor();
  await pictures("dead-letter");
  await page.locator("button", { hasText: "Discard" }).click();
  await page.keyboard.press("Escape");
  await page.locator("dialog").waitFor({ state: "detached" });
  await page.locator("button", { hasText: "Discard" }).click();
  await confirm("Discard");
  await page.locator("button", { hasText: "Reopen" }).click();
  await confirm("Reopen");
  await page.locator("button", { hasText: "Redrive" }).click();
  await page.locator("dialog button", { hasText: "Dry run" }).click();
  await page.locator("dialog", { hasText: "Dry run: 1 redriven" }).waitFor();
  await page.screenshot({ path: `${screenshots}/redrive.png` });
  await confirm("Redrive");
  await page.locator(".tag", { hasText: "redriven" }).waitFor();
  const done = await page.locator(".timeline .where").allTextContents();
  check(done.join() === "discarded,reopened,redriven", `the audit log contains ${done}`);
  await ask("effect of the redrive");
  await show("dead");
  for (const letter of await page.locator("tbody td a").allTextContents()) await show(`dead/${letter}`);
  await show("dead?cause=no_id");
  await page.locator("button", { hasText: "Discard all" }).click();
  await confirm("Discard");
  await page.locator(".state", { hasText: "No dead letter matches" }).waitFor();
}

async function messages() {
  await show("messages");
  await pictures("messages");
  await page.locator("input[name=key]").fill("customer-7");
  await page.keyboard.press("Enter");
  await page.waitForFunction(() => location.hash.includes("key=customer-7"));
  await settled();
  await page.locator("tbody a").first().click();
  await page.locator(".timeline", { hasText: "applied" }).waitFor();
  await pictures("journey");
  await show("messages/nobody");
  await page.locator(".state", { hasText: "could not be loaded" }).waitFor();
}

async function consumers() {
  await show("consumers");
  await pictures("consumers");
  await page.locator("tr", { hasText: "blocked-key" }).locator("button", { hasText: "Skip" }).click();
  await confirm("Skip");
  await page.locator("tr", { hasText: "shipping/blocked-key" }).waitFor();
  await page.locator("tr", { has: page.locator("strong", { hasText: "billing" }) }).locator("button").click();
  await confirm("Pause");
  await page.locator(".tag", { hasText: "paused by" }).waitFor();
  await show("flow");
  await station("billing", "attention").first().waitFor();
  await pictures("flow-paused");
  await show("consumers");
  await page.locator("button", { hasText: "Resume" }).click();
  await confirm("Resume");
}

async function others() {
  await show("operations");
  await pictures("operations");
  await page.locator("button", { hasText: "Cancel" }).first().click();
  await confirm("Cancel operation");
  await page.locator(".tag", { hasText: "cancelled" }).waitFor();
  await show("relays");
  await pictures("relays");
}

/** hour shows an hour of samples within seconds, and checks that it needs no more memory than 15 minutes of samples. */
async function hour() {
  const start = Date.now() - 3600_000;
  const sample = (i) => ({
    point: {
      at: new Date(start + i * 1000).toISOString(),
      inserted: i % 50,
      published: i % 49,
      applied: i % 48,
      backlog: String(i % 7),
      lag: 0.1,
    },
    stations: ["API", "OUTBOX", "RELAY"].map((kind) => ({
      kind: `STATION_KIND_${kind}`,
      name: kind,
      state: `STATION_STATE_${i % 9 ? "OK" : "FAULT"}`,
      sentence: i % 9 ? "" : "x",
      rate: i,
    })),
  });
  const frame = (flags, message) => {
    const text = Buffer.from(JSON.stringify(message));
    const head = Buffer.alloc(5);
    head.writeUInt8(flags, 0);
    head.writeUInt32BE(text.length, 1);
    return Buffer.concat([head, text]);
  };
  let next = 0;
  await page.route("**/ops.v1.OpsService/WatchFlow", (route) => {
    const frames = [];
    for (const end = next + 900; next < end; next++) frames.push(frame(0, sample(next)));
    const body = Buffer.concat([...frames, frame(2, {})]);
    if (next > 3600) return; // the stream stays open
    return route.fulfill({ status: 200, contentType: "application/connect+json", body });
  });
  const debug = await context.newCDPSession(page);
  const measure = async (points) => {
    await page.waitForFunction((n) => Number(document.querySelector(".charts")?.dataset.points) >= n, points);
    await debug.send("HeapProfiler.collectGarbage");
    const [heap, nodes, held] = await Promise.all([
      debug.send("Runtime.getHeapUsage"),
      debug.send("Memory.getDOMCounters"),
      page.evaluate(() => Number(document.querySelector(".charts").dataset.points)),
    ]);
    return { heap: heap.usedSize, nodes: nodes.nodes, held };
  };
  await page.goto(`${url}/console/?hour#/flow`);
  const first = await measure(890);
  while (next < 3600) await page.waitForTimeout(100);
  await page.waitForTimeout(500);
  const last = await measure(890);
  console.log(`an hour: ${JSON.stringify(first)} after 15 minutes, ${JSON.stringify(last)} after 60`);
  check(last.held <= 900, `the page holds ${last.held} points`);
  check(last.nodes < first.nodes * 1.5 + 200, `${first.nodes} nodes became ${last.nodes}`);
  check(last.heap < first.heap * 1.3 + 2e6, `${first.heap} bytes became ${last.heap}`);
}

try {
  for (const step of [signIn, firstPaint, flow, keyboard, deadLetters, messages, consumers, others, hour]) {
    const began = Date.now();
    await step();
    console.log(`${step.name}: ${((Date.now() - began) / 1000).toFixed(1)} s`);
  }
} catch (error) {
  problems.push(String(error?.stack ?? error));
  await page.screenshot({ path: `${screenshots}/failed.png` }).catch(() => {});
}
await browser.close();
for (const problem of new Set(problems)) console.log(`problem ${problem}`);
process.exit(problems.length > 0 ? 1 : 0);
