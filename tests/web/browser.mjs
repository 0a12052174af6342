// node browser.mjs HOST CHROMIUM MODULES PICTURES
// A newcomer's first minutes: opens the template browser, loads quickstart_demo, runs it, reloads the page.
// Prints one line of JSON that test_browser.py judges. MODULES holds playwright-core, PICTURES gets screenshots.
import path from "node:path";

import { launch, pressRun, ready, SECOND, TRAIN_LOOP, visit } from "./comfy_page.mjs";

const [host, executablePath, modules, pictures] = process.argv.slice(2);

const PACK = "ComfyUI-DenseGRPO";
const TEMPLATE = "quickstart_demo";
const ITERATIONS = 2;

/** All that is written on or drawn below the nodes of a type, and what the page heard of runs. */
const seen = (page) =>
  page.evaluate((type) => {
    const node = app.graph.nodes.find((n) => n.type === type);
    const texts = [...document.querySelectorAll(".densegrpo-text")].map((element) => element.textContent);
    return { texts, preview: Boolean(node?.imgs?.length), ...window.heard };
  }, TRAIN_LOOP);

/** By hand, as the README says. The first visit of all opens the dialog by itself. */
async function loadTemplate(page) {
  const pack = page.getByRole("option", { name: PACK });
  try {
    await pack.waitFor({ timeout: 5 * SECOND });
  } catch {
    // A slow page may open it just now, over the button.
    await page.getByLabel("Templates").first().click({ timeout: 10 * SECOND }).catch(() => {});
  }
  await pack.click({ timeout: 20 * SECOND });
  // Only the first twelve are there until one scrolls, in the order of the folder.
  await page.getByPlaceholder("Search templates").fill(TEMPLATE);
  const card = page.getByTestId(`template-workflow-${TEMPLATE}`);
  await card.waitFor({ timeout: 20 * SECOND });
  await page.waitForTimeout(SECOND); // pictures
  await page.screenshot({ path: path.join(pictures, "1_templates.png") });
  await card.click();
  await card.waitFor({ state: "detached", timeout: 20 * SECOND });
}

/** The whole graph in the window. */
async function fit(page) {
  await page.getByLabel(/^Fit View/).click();
  await page.waitForTimeout(SECOND);
}

/**
 * What a Reward Model says of a reward that lacks something, what a click on its command copies, and what it says after
 * key R once it is there; with its height.
 */
async function rewardModel(page) {
  let missing = "no folder; needed are files. Get them with:  get them from somewhere; package x is not installed";
  await page.route("**/densegrpo/reward?name=clipscore", (route) => route.fulfill({ json: { missing } }));
  const state = () =>
    page.evaluate(() => ({ text: document.querySelector(".densegrpo-text")?.textContent, height: node.size[1] }));
  await page.evaluate(() => {
    app.graph.clear();
    window.node = LiteGraph.createNode("DenseGRPORewardModel");
    app.graph.add(node);
  });
  const before = await state();
  await page.evaluate(() => {
    const widget = node.widgets.find(({ name }) => name === "reward");
    widget.value = "clipscore";
    widget.callback("clipscore");
  });
  await page.locator(".densegrpo-text").waitFor({ state: "attached", timeout: 10 * SECOND });
  const lacking = await state();
  await page.context().grantPermissions(["clipboard-read", "clipboard-write"]);
  await page.locator(".densegrpo-command").first().click();
  const copied = await page.evaluate(() => navigator.clipboard.readText());
  missing = "";
  await page.keyboard.press("r");
  await page.locator(".densegrpo-text", { hasText: "ready" }).waitFor({ state: "attached", timeout: 10 * SECOND });
  return { before, lacking, copied, ready: await state() };
}

const browser = await launch(executablePath, modules);
try {
  const page = await browser.newPage({ viewport: { width: 2700, height: 1300 } });
  const errors = [];
  await visit(page, host, errors);
  await loadTemplate(page);
  await page.waitForFunction((type) => app.graph.nodes.some((n) => n.type === type), TRAIN_LOOP);
  await fit(page);
  await page.screenshot({ path: path.join(pictures, "2_loaded.png") });

  await page.evaluate(
    ([type, iterations]) => {
      const node = app.graph.nodes.find((n) => n.type === type);
      node.widgets.find((widget) => widget.name === "iterations").value = iterations;
      const heard = (window.heard = { progress: [], previews: 0, rows: 0, end: null, error: null });
      app.api.addEventListener("progress", (e) => heard.progress.push([String(e.detail.node), e.detail.value]));
      app.api.addEventListener("b_preview", () => heard.previews++);
      app.api.addEventListener("densegrpo.progress", () => heard.rows++);
      for (const end of ["execution_success", "execution_error", "execution_interrupted"]) {
        app.api.addEventListener(end, (e) => {
          heard.end = end;
          heard.error = e.detail.exception_message ?? null;
        });
      }
    },
    [TRAIN_LOOP, ITERATIONS],
  );
  const node = await page.evaluate((type) => String(app.graph.nodes.find((n) => n.type === type).id), TRAIN_LOOP);
  await pressRun(page);
  await page.waitForFunction(() => heard.rows >= 2 || heard.end, null, { timeout: 180 * SECOND });
  await page.screenshot({ path: path.join(pictures, "3_running.png") });
  const running = await seen(page);
  await page.waitForFunction(() => heard.end, null, { timeout: 180 * SECOND });
  await page.waitForTimeout(2 * SECOND); // the last pictures
  await page.screenshot({ path: path.join(pictures, "4_done.png") });
  const done = await seen(page);
  const saved = await page.evaluate(() => app.graph.serialize().nodes.map((n) => [n.type, n.widgets_values ?? []]));
  await page.waitForTimeout(2 * SECOND); // the page keeps the graph for the next visit

  await page.reload();
  await ready(page);
  await page.waitForFunction(() => document.querySelector(".densegrpo-text")?.textContent.includes("iteration"), null, {
    timeout: 20 * SECOND,
  }).catch(() => {});
  await page.screenshot({ path: path.join(pictures, "5_reloaded.png") });
  const reloaded = await seen(page);
  const reward = await rewardModel(page);
  console.log(JSON.stringify({ node, running, done, saved, reloaded, reward, errors }));
} finally {
  await browser.close();
}
