// @ts-check
/** The stand-alone page. Not a .js file: ComfyUI loads every one of those into its own page. */
import { VotePanel } from "./panel.js";

const root = /** @type {HTMLElement} */ (document.getElementById("votes"));

new VotePanel(
  root,
  {
    post: (path, body) =>
      fetch(new URL(path, import.meta.url), {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify(body),
      }),
    image: (name) => new URL(`images/${name}.png`, import.meta.url).href,
  },
  {
    keys: document,
    changed: (state) => {
      document.title = state?.mine ? `(${state.mine}) Vote` : "Vote";
    },
  },
);
