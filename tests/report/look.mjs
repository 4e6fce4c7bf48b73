// Opens a page in headless Chromium, at desktop and phone width, in light and dark, and printed; tells as JSON what axe
// finds, what was asked of the network, and what does not fit the window. Arguments: page, folder for screenshots, tools.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [page, out, tools] = process.argv.slice(2);
const require = createRequire(`${tools}/package.json`);
const puppeteer = require("puppeteer-core");
const axe = require.resolve("axe-core/axe.min.js");

const LOOKS = [
  ["desktop-light", 1280, 900, "light"],
  ["desktop-dark", 1280, 900, "dark"],
  ["phone-light", 390, 844, "light"],
  ["phone-dark", 390, 844, "dark"],
];

const browser = await puppeteer.launch({
  executablePath: process.env.CHROMIUM,
  args: ["--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"],
});
const told = [];
try {
  for (const [name, width, height, scheme] of LOOKS) {
    const tab = await browser.newPage();
    const asked = [], said = [];
    tab.on("request", (request) => asked.push(request.url()));
    tab.on("console", (message) => said.push(message.text()));
    tab.on("pageerror", (error) => said.push(String(error)));
    await tab.setJavaScriptEnabled(false);
    await tab.setViewport({ width, height, deviceScaleFactor: width < 500 ? 2 : 1, isMobile: width < 500 });
    await tab.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
    await tab.goto(pathToFileURL(page).href);
    await tab.screenshot({ path: `${out}/${name}.png`, fullPage: true });
    if (name === "desktop-light") await tab.pdf({ path: `${out}/print.pdf`, format: "A4" });
    // axe is a script: it runs in a page that would not let it in otherwise.
    await tab.setJavaScriptEnabled(true);
    await tab.setBypassCSP(true);
    await tab.reload();
    await tab.addScriptTag({ path: axe });
    const found = await tab.evaluate(() => window.axe.run());
    const [wide, text] = await tab.evaluate(() => [document.documentElement.scrollWidth, document.body.innerText]);
    told.push({
      name, width, wide, asked, said, text, rules: found.passes.length,
      violations: found.violations.map((v) => [v.impact, v.id, v.nodes.map((n) => n.html.slice(0, 200)), v.nodes[0].failureSummary]),
      unsure: found.incomplete.map((v) => [v.impact, v.id, v.nodes.length, v.nodes[0].html.slice(0, 200)]),
    });
    await tab.close();
  }
} finally {
  await browser.close();
}
process.stdout.write(JSON.stringify(told));
