// @ts-check
/**
 * The panel people vote on, for any place that can show an element: the stand-alone page and the ComfyUI page.
 * Prompts come from files of others, so all text is set as text, never as markup.
 */
import { arrange, ballot, empty, fate, isEmpty, meaning, notice, position, toggle } from "./drafts.js";

/** @typedef {import("./drafts.js").State} State @typedef {import("./drafts.js").Group} Group */
/**
 * @typedef {{
 *   post: (path: string, body: object) => Promise<Response>,
 *   image: (name: string) => string,
 * }} Connection how the server is reached
 * @typedef {{keys?: EventTarget, changed?: (state: State | null) => void}} Options
 *   `keys`: where keys are heard, the panel itself unless given; `changed`: hears of every state
 */

const PERIOD = 1000; // milliseconds between two looks
const MOST_MISSES = 5; // looks without an answer until the group, and what is marked in it, is given up
const SPACES = { like: 38, rank: 0 }; // pixels under a picture
const GAP = 12;
const SMALLEST = 104; // then 16 square ones are all in sight at 1600 x 900
const LONG = 120; // letters of a prompt, from which on it is written smaller
const HINTS = {
  like: "Click or 1-9: like · right click or shift: dislike · Enter: submit · S: skip · Esc: clear",
  rank: "Click or 1-9 from best to worst; the rest is tied · Enter: submit · S: skip · Esc: clear",
};

/** The name this browser votes under; all its tabs are one voter. */
function voter() {
  const fresh = crypto.getRandomValues(new Uint32Array(4)).reduce((all, n) => all + n.toString(36), "");
  try {
    const known = localStorage.getItem("densegrpo.voter") ?? fresh;
    localStorage.setItem("densegrpo.voter", known);
    return known;
  } catch {
    return fresh; // storage is off
  }
}

/** An element. @param {string} tag @param {string} kind @param {string} [text] @param {Node[]} [children] */
function make(tag, kind, text = "", children = []) {
  const element = document.createElement(tag);
  element.className = kind;
  if (text) element.textContent = text;
  element.append(...children);
  return element;
}

/** A button. @param {string} kind @param {string} text @param {(event: Event) => void} act */
function button(kind, text, act) {
  const element = /** @type {HTMLButtonElement} */ (make("button", kind, text));
  element.type = "button";
  element.addEventListener("click", act);
  return element;
}

export class VotePanel {
  /** @param {HTMLElement} root gets the panel @param {Connection} connection @param {Options} [options] */
  constructor(root, connection, { keys = root, changed = () => {} } = {}) {
    this.root = root;
    this.connection = connection;
    this.keys = keys;
    this.changed = changed;
    this.voter = voter();
    /** @type {State | null} */ this.state = { state: "waiting" };
    /** @type {Group | null} */ this.group = null;
    this.draft = empty("like");
    /** @type {HTMLElement[]} */ this.tiles = [];
    /** @type {string | null} */ this.sent = null; // the group last voted on here
    /** @type {string | undefined} */ this.preloaded = undefined;
    this.misses = 0;
    this.columns = 1;
    this.active = false;
    this.busy = false; // a request of the user is on its way
    this.votes = 0; // answers to looks from before the last vote are outdated
    this.build();
    this.listen();
    this.look();
  }

  build() {
    this.place = make("p", "votes-place");
    this.fate = make("p", "votes-fate");
    this.prompt = make("h1", "votes-prompt");
    this.grid = make("div", "votes-grid");
    this.notice = make("p", "votes-notice");
    this.hint = make("p", "votes-hint");
    this.message = make("p", "votes-message");
    for (const element of [this.notice, this.message]) element.setAttribute("role", "status");
    this.submit = button("votes-submit", "Submit", () => this.send(ballot(this.draft)));
    this.skip = button("votes-skip", "Skip", () => this.send(null));
    this.stop = button("votes-stop", "Stop the run ...", () => this.confirm(true));
    this.yes = button("votes-yes", "Stop it", () => this.post("stop", { run: this.state?.key }));
    this.no = button("votes-no", "Go on", () => this.confirm(false));
    this.question = make("span", "votes-question", "Stop the run? What was learnt is saved.", [this.yes, this.no]);
    const bar = make("div", "votes-bar", "", [this.submit, this.skip, this.message, this.question, this.stop]);
    const head = make("header", "votes-head", "", [make("div", "votes-line", "", [this.place, this.fate]), this.prompt]);
    this.root.classList.add("votes");
    this.root.replaceChildren(head, this.notice, this.grid, make("footer", "votes-foot", "", [bar, this.hint]));
    this.confirm(false);
  }

  listen() {
    const signal = (this.ending = new AbortController()).signal;
    for (const kind of ["pointermove", "pointerdown", "keydown", "wheel", "touchmove"]) {
      this.root.addEventListener(kind, () => (this.active = true), { signal, passive: true });
    }
    this.keys.addEventListener("keydown", (event) => this.press(/** @type {KeyboardEvent} */ (event)), { signal });
    this.sizes = new ResizeObserver(() => this.fit());
    this.sizes.observe(this.grid);
  }

  /** Take the panel away. */
  end() {
    clearTimeout(this.timer);
    this.ended = true;
    this.ending.abort();
    this.sizes.disconnect();
    this.root.replaceChildren();
  }

  who() {
    return { voter: this.voter, showing: this.group?.id ?? null };
  }

  /** Ask what is to be voted on, again and again. */
  async look() {
    clearTimeout(this.timer);
    const { votes, active } = this;
    this.active = false;
    /** @type {State | null} */ let state = null;
    try {
      const answer = await this.connection.post("look", { ...this.who(), active });
      if (answer.ok) state = await answer.json();
    } catch {
      // no server: the page says so until it is back
    }
    if (this.ended) return;
    if (votes === this.votes && !this.busy) this.show(state);
    clearTimeout(this.timer);
    if (!this.ended) this.timer = setTimeout(() => this.look(), PERIOD);
  }

  /** Submit a ballot, or null to skip. @param {object | null} answer */
  send(answer) {
    if (!this.group || this.busy || (answer && isEmpty(this.draft))) return;
    this.sent = this.group.id;
    return this.post("vote", { group: this.group.id, ballot: answer });
  }

  /** @param {string} path @param {object} body */
  async post(path, body) {
    this.busy = true;
    this.votes++;
    this.render();
    let problem = "";
    try {
      const answer = await this.connection.post(path, { ...this.who(), ...body });
      const data = await answer.json();
      this.busy = false;
      if (answer.ok) this.show(data);
      else problem = data.error;
    } catch {
      problem = "The server did not answer; nothing was sent.";
    }
    this.busy = false;
    this.confirm(false);
    if (!problem) return;
    this.sent = null;
    this.say(problem);
    this.look();
  }

  /** @param {State | null} state */
  show(state) {
    const before = this.group;
    if (!state && before && ++this.misses < MOST_MISSES) return this.say("No answer; trying again ...");
    if (this.misses) this.say("");
    this.misses = 0;
    this.state = state;
    this.group = (state?.state === "voting" && state.group) || null;
    if (this.group?.id !== before?.id) {
      const lost = before && !isEmpty(this.draft) && before.id !== this.sent;
      this.say(lost ? "The last group was closed elsewhere, or ran out of time." : "");
      this.draft = empty(this.group?.mode ?? "like");
      this.lay();
    }
    this.render();
    this.preload(state?.next ?? []);
    this.changed(state);
  }

  /** Have the images of the next group in the browser's cache by then. @param {string[]} images */
  preload(images) {
    if (images[0] === this.preloaded) return;
    this.preloaded = images[0];
    for (const name of images) new Image().src = this.connection.image(name);
  }

  /** New tiles for another group. */
  lay() {
    const group = this.group;
    this.tiles = (group?.images ?? []).map((name, i) => this.tile(name, i));
    this.grid.replaceChildren(...this.tiles);
    this.grid.scrollTop = 0;
    this.fit();
  }

  /** One image. @param {string} name @param {number} index */
  tile(name, index) {
    const mark = (/** @type {"like" | "dislike"} */ kind) => {
      this.draft = toggle(this.draft, name, kind);
      this.say("");
      this.render();
    };
    const image = /** @type {HTMLImageElement} */ (make("img", "votes-image"));
    image.alt = "";
    image.draggable = false;
    image.addEventListener("load", () => this.fit());
    image.src = this.connection.image(name);
    const number = make("span", "votes-number", String(index + 1));
    const picture = button("votes-picture", "", (event) =>
      mark(/** @type {MouseEvent} */ (event).shiftKey ? "dislike" : "like"),
    );
    picture.append(image, number, make("span", "votes-badge"));
    picture.addEventListener("contextmenu", (event) => {
      event.preventDefault();
      mark("dislike");
    });
    const tile = make("div", "votes-tile", "", [picture]);
    if (this.draft.mode === "like") {
      const marks = /** @type {const} */ (["like", "dislike"]).map((kind) => {
        const element = button(`votes-${kind}`, kind === "like" ? "Like" : "Dislike", () => mark(kind));
        element.setAttribute("aria-label", `${element.textContent} image ${index + 1}`);
        return element;
      });
      tile.append(make("div", "votes-marks", "", marks));
    }
    return tile;
  }

  /** Pictures as large as the window allows; few pixels stay squares. */
  fit() {
    const images = /** @type {HTMLImageElement[]} */ (this.tiles.map((tile) => tile.querySelector("img")));
    const known = images.find((image) => image.naturalWidth);
    if (!this.group || !known) return;
    const ratio = known.naturalWidth / known.naturalHeight;
    const box = { width: this.grid.clientWidth, height: this.grid.clientHeight - 1 }; // it is rounded
    const spaces = { below: SPACES[this.draft.mode], gap: GAP, smallest: SMALLEST };
    const { columns, width } = arrange(images.length, ratio, box, spaces);
    this.columns = columns;
    this.grid.style.setProperty("--votes-columns", String(columns));
    this.grid.style.setProperty("--votes-width", `${width}px`);
    for (const image of images) {
      image.style.aspectRatio = String(ratio);
      image.classList.toggle("votes-pixels", width >= 1.5 * image.naturalWidth);
    }
  }

  /** Write what is known into the panel. */
  render() {
    const { state, group, draft } = this;
    this.root.dataset.state = group ? "voting" : (state?.state ?? "lost");
    this.notice.textContent = group ? "" : notice(state);
    this.place.textContent = group && state ? position(state, group) : (state?.run ?? "");
    this.fate.textContent = group ? fate(group) : "";
    this.fate.classList.toggle("votes-soon", Boolean(group && group.left < Math.min(60, group.seconds / 4)));
    this.prompt.textContent = group?.prompt ?? "";
    this.prompt.classList.toggle("votes-long", (group?.prompt.length ?? 0) > LONG);
    this.hint.textContent = group ? HINTS[group.mode] : "";
    this.submit.disabled = !group || this.busy || isEmpty(draft);
    this.skip.disabled = !group || this.busy;
    this.stop.hidden = !state?.key || state.state === "stopping" || !this.question.hidden;
    (group?.images ?? []).forEach((name, i) => this.renderTile(this.tiles[i], i + 1, name));
  }

  /** @param {HTMLElement} tile @param {number} number @param {string} name */
  renderTile(tile, number, name) {
    const place = this.draft.order.indexOf(name) + 1;
    const mark = place ? "like" : (this.draft.marks[name] ?? "");
    tile.dataset.mark = mark;
    const badge = /** @type {HTMLElement} */ (tile.querySelector(".votes-badge"));
    badge.textContent = place ? String(place) : mark === "like" ? "+" : mark === "dislike" ? "\u2212" : "";
    const picture = /** @type {HTMLElement} */ (tile.querySelector(".votes-picture"));
    picture.setAttribute("aria-label", `Image ${number}${place ? `, place ${place}` : mark ? `, ${mark}d` : ""}`);
    picture.setAttribute("aria-pressed", String(mark === "like"));
    for (const kind of ["like", "dislike"]) {
      tile.querySelector(`.votes-${kind}`)?.setAttribute("aria-pressed", String(mark === kind));
    }
  }

  /** @param {KeyboardEvent} event */
  press(event) {
    const target = /** @type {HTMLElement} */ (event.target);
    const found = meaning(event);
    if (!found || !this.group) return;
    // Enter on one of the buttons below is that button's, on a picture it submits.
    if (found.act === "submit" && target.closest?.("button:not(.votes-picture)")) return;
    event.preventDefault();
    event.stopPropagation();
    if (found.act === "submit") this.send(ballot(this.draft));
    else if (found.act === "skip") this.send(null);
    else if (found.act === "move") this.move(found.right + found.down * this.columns);
    else if (found.act === "mark" && found.index < this.group.images.length) {
      this.draft = toggle(this.draft, this.group.images[found.index], found.mark);
    } else if (found.act === "clear") {
      this.draft = empty(this.group.mode);
      this.confirm(false);
    }
    this.render();
  }

  /** The focus goes so many pictures on. @param {number} distance */
  move(distance) {
    const here = this.tiles.findIndex((tile) => tile.contains(document.activeElement));
    const there = this.tiles[here < 0 ? 0 : here + distance];
    /** @type {HTMLElement | null | undefined} */ (there?.querySelector(".votes-picture"))?.focus();
  }

  /** Show or hide the question. @param {boolean} asks */
  confirm(asks) {
    this.question.hidden = !asks;
    this.render();
    if (asks) this.no.focus();
  }

  /** @param {string} text */
  say(text) {
    this.message.textContent = text;
  }
}
