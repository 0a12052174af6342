// A ComfyUI page in Chromium, for the scripts that drive one. playwright-core is in MODULES, outside the repository.
import { createRequire } from "node:module";
import path from "node:path";

export const SECOND = 1000;
export const TRAIN_LOOP = "DenseGRPOTrainLoop";
const OFFLINE = ["--disable-quic", "--disable-background-networking", "--disable-component-update", "--disable-sync"];

/** A browser that asks nobody but the host. */
export function launch(executablePath, modules) {
  const { chromium } = createRequire(path.join(modules, "package.json"))("playwright-core");
  return chromium.launch({ executablePath, args: ["--no-sandbox", "--disable-gpu", ...OFFLINE] });
}

/** Until the graph and all node types are there. */
export async function ready(page) {
  await page.waitForFunction(
    () => window.app?.graph && app.extensionManager && Object.keys(LiteGraph.registered_node_types).length > 50,
    null,
    { timeout: 120 * SECOND },
  );
}

/** The page of the host; what breaks in it goes into `errors`. */
export async function visit(page, host, errors) {
  page.on("pageerror", (error) => errors.push(String(error.stack)));
  await page.route((url) => !url.href.startsWith(host), (route) => route.abort());
  await page.goto(host);
  await ready(page);
}

/** By mouse. */
export const pressRun = (page) => page.getByTestId("queue-button").getByLabel("Run").first().click();
