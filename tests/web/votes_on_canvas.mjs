// node votes_on_canvas.mjs HOST CHROMIUM MODULES PICTURES WORKFLOW
// Somebody who likes dark images votes in the ComfyUI page: with the mouse, after a reload, in a second tab with keys;
// skips a group; stops a second run, resumes it, cancels it, resumes it again. Prints one line of JSON for
// test_votes_on_canvas.py. PICTURES gets screenshots, WORKFLOW is human_votes.json.
import fs from "node:fs";
import path from "node:path";

import { launch, pressRun, ready, SECOND, TRAIN_LOOP, visit } from "./comfy_page.mjs";

const [host, executablePath, modules, pictures, workflow] = process.argv.slice(2);
const errors = [];
const SMALL = {
  [TRAIN_LOOP]: { resume: true, evaluate_every: 0, images_per_prompt: 1, train_batch: 64 },
  DenseGRPODenseSampler: { num_steps: 4, group_size: 4 },
  DenseGRPOTrainingPrompts: { limit: 2 },
};

const ATTACHED = { state: "attached", timeout: 10 * SECOND };

const picture = (page, name) => page.screenshot({ path: path.join(pictures, `votes_${name}.png`) });

/** Set widgets of all nodes of some types. */
const choose = (page, values) =>
  page.evaluate((values) => {
    for (const node of app.graph.nodes) {
      for (const [name, value] of Object.entries(values[node.type] ?? {})) {
        node.widgets.find((widget) => widget.name === name).value = value;
      }
    }
  }, values);

/** Until the panel asks about that iteration, with all its images. */
async function asks(page, iteration) {
  await page.waitForFunction(
    (text) =>
      document.querySelector(".votes-place")?.textContent.includes(text) &&
      [...document.querySelectorAll(".votes-image")].every((image) => image.naturalWidth && image.complete),
    `iteration ${iteration} `,
    { timeout: 60 * SECOND },
  );
}

/** Indices of the images, darkest first. */
const byDarkness = (page) =>
  page.evaluate(() => {
    const sums = [...document.querySelectorAll(".votes-image")].map((image) => {
      const canvas = Object.assign(document.createElement("canvas"), { width: 64, height: 64 });
      const context = canvas.getContext("2d");
      context.drawImage(image, 0, 0);
      return context.getImageData(0, 0, 64, 64).data.reduce((sum, value) => sum + value, 0);
    });
    return sums.map((_, i) => i).sort((a, b) => sums[a] - sums[b]);
  });

/** Like the darkest and dislike the brightest image, by mouse. */
async function voteByMouse(page) {
  const order = await byDarkness(page);
  await page.locator(".votes-picture").nth(order[0]).click();
  await page.locator(".votes-picture").nth(order.at(-1)).click({ button: "right" });
  await picture(page, "marked");
  await page.locator(".votes-submit").click();
}

/** Like the darkest image, by keys. */
async function voteByKeys(page) {
  await page.keyboard.press(`Digit${(await byDarkness(page))[0] + 1}`);
  await page.keyboard.press("Enter");
}

/** Until no run asks any more, and nothing is queued; how the last one ended. */
async function over(page) {
  await page.locator(".votes-frame").waitFor({ state: "detached", timeout: 60 * SECOND });
  for (;;) {
    const { queue_running: running, queue_pending: pending } = await (await fetch(`${host}/queue`)).json();
    if (!running.length && !pending.length) break;
    await page.waitForTimeout(100);
  }
  const found = Object.values(await (await fetch(`${host}/history?max_items=1`)).json());
  return found[0].status.messages.at(-1)[0];
}

/** The same graph in another browser, which did not start the run, but sees it go on. */
async function elsewhere(page) {
  const other = await (await browser.newContext()).newPage();
  await visit(other, host, errors);
  await other.evaluate((graph) => app.loadGraphData(graph), await page.evaluate(() => app.graph.serialize()));
  await other.locator(".densegrpo-text", { hasText: / left$/ }).waitFor(ATTACHED);
  return other;
}

const browser = await launch(executablePath, modules);
try {
  const context = await browser.newContext({ viewport: { width: 1600, height: 900 } });
  const page = await context.newPage();
  await visit(page, host, errors);
  await page.waitForTimeout(SECOND);
  await page.keyboard.press("Escape"); // the template dialog of a first visit
  await page.evaluate((graph) => app.loadGraphData(graph), JSON.parse(fs.readFileSync(workflow, "utf8")));
  await choose(page, SMALL);
  const seen = {};

  await choose(page, { [TRAIN_LOOP]: { run_name: "canvas", iterations: 3 } });
  await pressRun(page);
  await asks(page, 1);
  await picture(page, "panel");
  await voteByMouse(page);
  await asks(page, 2);
  await page.waitForTimeout(SECOND); // the page keeps the graph for the next visit
  await page.reload();
  await ready(page);
  await asks(page, 2);
  const loop = page.locator(".densegrpo-text", { hasText: "iteration 1 of 3" });
  await loop.waitFor({ state: "attached", timeout: 10 * SECOND });
  seen.waiting = await loop.textContent();
  await picture(page, "reloaded");
  const [second] = await Promise.all([context.waitForEvent("page"), page.getByText("own tab").click()]);
  await asks(second, 2);
  await voteByKeys(second);
  await second.close();
  await asks(page, 3);
  await page.locator(".votes-prompt").click(); // takes the keys from the canvas
  await page.keyboard.press("s");
  seen.voted = await over(page);
  await page.waitForTimeout(SECOND); // the last text
  seen.texts = await page.locator(".densegrpo-text").allTextContents();
  await picture(page, "done");

  await choose(page, { [TRAIN_LOOP]: { run_name: "canvas_stopped", iterations: 2 } });
  await pressRun(page);
  await asks(page, 1);
  await voteByMouse(page);
  await asks(page, 2);
  const other = await elsewhere(page);
  await page.locator(".votes-stop").click();
  await picture(page, "question");
  await page.locator(".votes-yes").click();
  seen.stopped = await over(page);
  await page.locator(".densegrpo-text", { hasText: "not running" }).waitFor({ timeout: 10 * SECOND });
  seen.goOn = await page.locator(".densegrpo-text").allTextContents();
  await other.locator(".densegrpo-text", { hasText: "not running" }).waitFor(ATTACHED);
  await other.close();
  await picture(page, "stopped");
  await pressRun(page);
  await asks(page, 2);
  await page.getByRole("button", { name: "Cancel current run" }).click(); // the panel does not cover it
  seen.cancelled = await over(page);
  await pressRun(page);
  await asks(page, 2);
  await voteByMouse(page);
  seen.resumed = await over(page);
  console.log(JSON.stringify({ ...seen, errors }));
} finally {
  await browser.close();
}
