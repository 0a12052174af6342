// node votes_browser.mjs ADDRESS CHROMIUM MODULES PICTURES
// Two people and three tabs vote on what the page shows: the darkest images are good, the brightest is bad.
// Round 1 (like, 2 groups): answered by keys, then skipped from another tab. Round 2 (rank): by clicks, with the
// second group closed by somebody else. Round 3: the run is stopped. Prints one line of JSON for test_votes_browser.py.
import { createRequire } from "node:module";
import path from "node:path";

const [address, executablePath, modules, pictures] = process.argv.slice(2);
const { chromium } = createRequire(path.join(modules, "package.json"))("playwright-core");
const OFFLINE = ["--disable-quic", "--disable-background-networking", "--disable-component-update", "--disable-sync"];
const errors = [];

/** @param {any} page */
const prompt = (page) => page.locator(".votes-prompt").textContent();
const place = (page) => page.locator(".votes-place").textContent();
const picture = (page, name) => page.screenshot({ path: path.join(pictures, `${name}.png`) });

/** Until the page shows the k-th group of the round, with its images. */
async function shows(page, group) {
  await page.waitForFunction(
    (text) =>
      document.querySelector(".votes-place")?.textContent.includes(text) &&
      [...document.querySelectorAll(".votes-image")].every((image) => image.naturalWidth && image.complete),
    group,
    { timeout: 15000 },
  );
}

/** Indices of the images, darkest first. */
const byDarkness = (page) =>
  page.evaluate(() => {
    const mean = (image) => {
      const canvas = document.createElement("canvas");
      canvas.width = image.naturalWidth;
      canvas.height = image.naturalHeight;
      const context = canvas.getContext("2d");
      context.drawImage(image, 0, 0);
      const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
      return data.reduce((sum, value, i) => sum + (i % 4 < 3 ? value : 0), 0);
    };
    const sums = [...document.querySelectorAll(".votes-image")].map(mean);
    return sums.map((_, i) => i).sort((a, b) => sums[a] - sums[b]);
  });

async function open(context) {
  const page = await context.newPage();
  page.on("pageerror", (error) => errors.push(String(error.stack)));
  page.on("console", (message) => message.type() === "error" && errors.push(message.text()));
  await page.goto(address);
  return page;
}

const browser = await chromium.launch({ executablePath, args: ["--no-sandbox", "--disable-gpu", ...OFFLINE] });
try {
  const size = { viewport: { width: 1280, height: 800 } };
  const [mine, yours] = [await browser.newContext(size), await browser.newContext({ ...size, colorScheme: "dark" })];
  const [first, second] = [await open(mine), await open(mine)];
  const seen = {};

  await shows(first, "group 1 of 2");
  await shows(second, "group 1 of 2");
  seen.prompt = await prompt(first);
  seen.hacked = await first.evaluate(() => window.hacked ?? false);
  let order = await byDarkness(first);
  await picture(first, "1_like");
  await first.keyboard.press("Enter"); // nothing is marked: nothing happens
  seen.submittable = await first.locator(".votes-submit").isEnabled();
  await first.keyboard.press(`Digit${order[0] + 1}`);
  await first.keyboard.press(`Digit${order[1] + 1}`);
  await first.keyboard.press(`Shift+Digit${order.at(-1) + 1}`);
  await picture(first, "2_marked");
  await first.keyboard.press("Enter");
  await shows(first, "group 2 of 2");
  await shows(second, "group 2 of 2"); // closed elsewhere
  await second.keyboard.press("s");

  await shows(second, "group 1 of 2");
  const third = await open(yours);
  await third.waitForTimeout(1200); // by now it knows what the other person has on the page
  seen.other = await place(third);
  order = await byDarkness(first);
  for (const index of order) await first.locator(".votes-picture").nth(index).click();
  await first.locator(".votes-picture").nth(order.at(-1)).click(); // the last is taken back: it is last anyway
  await picture(first, "3_rank");
  await shows(third, "group 2 of 2");
  order = await byDarkness(third);
  for (const index of order.slice(0, 2)) await third.locator(".votes-picture").nth(index).click({ button: "right" });
  await picture(third, "4_dark");
  await first.locator(".votes-submit").click();
  await third.locator(".votes-submit").click();

  await shows(first, "group 1 of 1");
  await picture(first, "5_small");
  await first.locator(".votes-stop").click();
  await picture(first, "6_question");
  await first.locator(".votes-yes").click();
  await first.locator(".votes-notice").filter({ hasText: /Stopping|No answer/ }).waitFor({ timeout: 9000 });
  await second.locator(".votes-notice").filter({ hasText: "No answer" }).waitFor({ timeout: 9000 });
  await picture(second, "7_over");
  console.log(JSON.stringify({ ...seen, errors: errors.filter((text) => !/ERR_CONNECTION_(REFUSED|RESET)/.test(text)) }));
} finally {
  await browser.close();
}
