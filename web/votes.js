// @ts-check
/**
 * The vote panel over the ComfyUI page: it opens when a run asks, lets the canvas be used, and can be made small.
 * Nothing happens until `showVotes` is called.
 */
import { VotePanel } from "./votes/panel.js";

const EVENT = "densegrpo.votes";
const PATH = "/densegrpo/votes/";

/**
 * Follow the votes that runs of this host ask for. Call it once, in `setup`.
 * @param {any} api the host's api.js
 */
export function showVotes(api) {
  const post = (/** @type {string} */ path, /** @type {object} */ body) =>
    api.fetchApi(PATH + path, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
    });
  const image = (/** @type {string} */ name) => api.apiURL(`${PATH}images/${name}.png`);
  /** @type {Frame | null} */
  let frame = null;

  async function ask() {
    if (frame) return frame.panel.look();
    const answer = await api.fetchApi(`${PATH}open`);
    if (!answer.ok || !(await answer.json()).open || frame) return;
    frame = new Frame({ post, image }, api.apiURL(`${PATH}page`), () => {
      frame?.end();
      frame = null;
    });
  }

  api.addEventListener(EVENT, ask);
  ask(); // a run may have been waiting since before this page was loaded
}

/** A window at the edge of the page around the panel. */
class Frame {
  /** @param {import("./votes/panel.js").Connection} connection @param {string} page @param {() => void} over */
  constructor(connection, page, over) {
    const style = document.createElement("link");
    style.rel = "stylesheet";
    style.href = new URL("./votes/votes.css", import.meta.url).href;
    this.title = document.createElement("strong");
    const away = document.createElement("a");
    away.href = page;
    away.target = "densegrpo-votes";
    away.textContent = "own tab";
    this.toggle = document.createElement("button");
    this.toggle.type = "button";
    this.toggle.className = "votes-small";
    this.toggle.addEventListener("click", () => this.makeSmall(!this.small));
    const bar = document.createElement("div");
    bar.className = "votes-title";
    bar.append(this.title, away, this.toggle);
    const body = document.createElement("div");
    this.element = document.createElement("section");
    this.element.className = "votes-frame";
    this.element.tabIndex = -1; // takes the focus, and with it the keys, when it is clicked
    this.element.setAttribute("aria-label", "Vote on images");
    this.element.append(style, bar, body);
    this.makeSmall(false);
    document.body.append(this.element);
    this.panel = new VotePanel(body, connection, {
      keys: this.element,
      changed: (state) => {
        this.title.textContent = state?.mine ? `Vote (${state.mine})` : "Vote";
        this.element.classList.toggle("votes-asks", Boolean(state?.mine));
        if (state?.state === "idle") over();
      },
    });
  }

  /** @param {boolean} small */
  makeSmall(small) {
    this.small = small;
    this.element.classList.toggle("votes-minimised", small);
    this.toggle.textContent = small ? "Open" : "Minimise";
    this.toggle.setAttribute("aria-expanded", String(!small));
  }

  end() {
    this.panel.end();
    this.element.remove();
  }
}
