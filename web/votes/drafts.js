// @ts-check
/**
 * What one person has marked so far, and other things the page works out. Pure functions: the same file runs in the
 * page and under `node --test`.
 *
 * @typedef {{mode: "like" | "rank", marks: Record<string, "like" | "dislike">, order: string[]}} Draft
 * @typedef {{id: string, mode: "like" | "rank", prompt: string, images: string[], number: number, total: number,
 *   iteration: number | null, needed: number, answers: number, left: number, seconds: number}} Group
 * @typedef {{state: "idle" | "waiting" | "voting" | "stopping", run?: string, key?: string, open?: number,
 *   mine?: number, group?: Group | null, next?: string[]}} State what every POST is answered with, see
 *   engine/votes/pages.py; `open` groups in all, of which `mine` wait for this person
 */

/** Nothing marked. @param {"like" | "rank"} mode @returns {Draft} */
export const empty = (mode) => ({ mode, marks: {}, order: [] });

/** Mark an image, or take the same mark off again; in mode rank the next place. @param {Draft} draft
 * @param {string} name @param {"like" | "dislike"} mark @returns {Draft} */
export function toggle(draft, name, mark) {
  if (draft.mode === "rank") {
    const without = draft.order.filter((other) => other !== name);
    return { ...draft, order: without.length < draft.order.length ? without : [...without, name] };
  }
  const { [name]: before, ...marks } = draft.marks;
  return { ...draft, marks: before === mark ? marks : { ...marks, [name]: mark } };
}

/** Whether there is anything to submit. @param {Draft} draft */
export const isEmpty = (draft) => !draft.order.length && !Object.keys(draft.marks).length;

/** What is sent. @param {Draft} draft */
export function ballot(draft) {
  if (draft.mode === "rank") return { order: draft.order };
  const marked = (/** @type {string} */ mark) => Object.keys(draft.marks).filter((name) => draft.marks[name] === mark);
  return { likes: marked("like"), dislikes: marked("dislike") };
}

/** Seconds as m:ss, or h:mm:ss from an hour on. @param {number} seconds */
export function clock(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  const two = (/** @type {number} */ n) => String(n).padStart(2, "0");
  const hours = Math.floor(whole / 3600);
  const minutes = Math.floor(whole / 60) % 60;
  return hours ? `${hours}:${two(minutes)}:${two(whole % 60)}` : `${minutes}:${two(whole % 60)}`;
}

/**
 * How many columns make `count` pictures of `ratio` (width / height) largest in a box, each with `below` pixels of
 * its own under it and `gap` between; and the width of a picture, `smallest` at least (then the box scrolls).
 * @param {number} count @param {number} ratio @param {{width: number, height: number}} box
 * @param {{below: number, gap: number, smallest: number}} spaces
 */
export function arrange(count, ratio, box, { below, gap, smallest }) {
  let best = { columns: 1, width: 0 };
  for (let columns = 1; columns <= count; columns++) {
    const rows = Math.ceil(count / columns);
    const wide = (box.width - gap * (columns - 1)) / columns;
    const high = ((box.height - gap * (rows - 1)) / rows - below) * ratio;
    const width = Math.floor(Math.min(wide, high));
    if (width > best.width) best = { columns, width };
  }
  if (best.width >= smallest) return best;
  const columns = Math.max(1, Math.min(count, Math.floor((box.width + gap) / (smallest + gap))));
  return { columns, width: Math.floor(Math.min((box.width - gap * (columns - 1)) / columns, 2 * smallest)) };
}

/** @type {Record<string, [number, number]>} */
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

/**
 * What a key means: mark the n-th image, go to another, submit, skip, clear; null for all other keys. Digits go by
 * their place on the keyboard, since with shift they are other letters.
 * @param {{code: string, key: string, shiftKey: boolean, ctrlKey: boolean, altKey: boolean, metaKey: boolean,
 *   repeat: boolean}} event
 * @returns {{act: "mark", index: number, mark: "like" | "dislike"} | {act: "move", right: number, down: number}
 *   | {act: "submit" | "skip" | "clear"} | null}
 */
export function meaning(event) {
  if (event.ctrlKey || event.altKey || event.metaKey) return null;
  const arrow = ARROWS[event.key];
  if (arrow) return { act: "move", right: arrow[0], down: arrow[1] };
  if (event.repeat) return null; // a key held down must not answer the next group, too
  const digit = /^(?:Digit|Numpad)([1-9])$/.exec(event.code);
  if (digit) return { act: "mark", index: Number(digit[1]) - 1, mark: event.shiftKey ? "dislike" : "like" };
  if (event.key === "Enter") return { act: "submit" };
  if (event.key === "Escape") return { act: "clear" };
  return event.key.toLowerCase() === "s" ? { act: "skip" } : null;
}

/**
 * The line over the prompt; it counts the images, since some may be out of sight.
 * @param {State} state @param {Group} group
 */
export function position({ run }, { iteration, number, total, images }) {
  const count = `${images.length} images`;
  const parts = [run, iteration === null ? "" : `iteration ${iteration}`, `group ${number} of ${total}`, count];
  return parts.filter(Boolean).join(" · ");
}

/** What happens to the group, and when. @param {Group} group */
export function fate({ left, needed, answers }) {
  const others = needed > 1 ? `${answers} of ${needed} people answered · ` : "";
  return `${others}${answers ? "closed" : "skipped"} in ${clock(left)} if nobody is here`;
}

/** What a page without a group to show says. @param {State | null} state null: the server does not answer */
export function notice(state) {
  if (!state) return "No answer. The run has ended, or the connection is lost; this page tries again by itself.";
  if (state.state === "idle") return "No run asks for votes now.";
  if (state.state === "stopping") return "Stopping. What was learnt is saved; the run can be resumed later.";
  if (state.open) return "Thank you. Waiting for other people's votes ...";
  return "Waiting for the next images ...";
}
