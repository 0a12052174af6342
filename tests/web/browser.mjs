// node browser.mjs HOST CHROMIUM MODULES PICTURES
// A newcomer's first minutes: opens the template browser, loads quickstart_demo, runs it, reloads the page.
// Prints one line of JSON that test_browser.py judges. MODULES holds playwright-core, PICTURES gets screenshots.
import { createRequire } from "node:module";
import path from "node:path";

const [host, executablePath, modules, pictures] = process.argv.slice(2);
const { chromium } = createRequire(path.join(modules, "package.json"))("playwright-core");

const PACK = "ComfyUI-DenseGRPO";
const TEMPLATE = "quickstart_demo";
const TRAIN_LOOP = "DenseGRPOTrainLoop";
const ITERATIONS = 2;
const SECOND = 1000;
const OFFLINE = ["--disable-quic", "--disable-background-networking", "--disable-component-update", "--disable-sync"];

/** All that is written on or drawn below the nodes of a type, and what the page heard of runs. */
const seen = (page) =>
  page.evaluate((type) => {
    const node = app.graph.nodes.find((n) => n.type === type);
    const texts = [...document.querySelectorAll(".densegrpo-text")].map((element) => element.textContent);
    return { texts, preview: Boolean(node?.imgs?.length), ...window.heard };
  }, TRAIN_LOOP);

/** Until the graph and all node types are there. */
async function open(page) {
  await page.waitForFunction(
    () => window.app?.graph && app.extensionManager && Object.keys(LiteGraph.registered_node_types).length > 50,
    null,
    { timeout: 120 * SECOND },
  );
}

/** By hand, as the README says. The first visit of all opens the dialog by itself. */
async function loadTemplate(page) {
  const pack = page.getByRole("option", { name: PACK });
  try {
    await pack.waitFor({ timeout: 5 * SECOND });
  } catch {
    await page.getByLabel("Templates").first().click();
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

const browser = await chromium.launch({ executablePath, args: ["--no-sandbox", "--disable-gpu", ...OFFLINE] });
try {
  const page = await browser.newPage({ viewport: { width: 2700, height: 1300 } });
  const errors = [];
  page.on("pageerror", (error) => errors.push(String(error.stack)));
  await page.route((url) => !url.href.startsWith(host), (route) => route.abort());
  await page.goto(host);
  await open(page);
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
  await page.getByTestId("queue-button").getByLabel("Run").first().click();
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
  await open(page);
  await page.waitForFunction(() => document.querySelector(".densegrpo-text")?.textContent.includes("iteration"), null, {
    timeout: 20 * SECOND,
  }).catch(() => {});
  await page.screenshot({ path: path.join(pictures, "5_reloaded.png") });
  const reloaded = await seen(page);
  console.log(JSON.stringify({ node, running, done, saved, reloaded, errors }));
} finally {
  await browser.close();
}
