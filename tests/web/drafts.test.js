// node --test tests/web/drafts.test.js
import assert from "node:assert/strict";
import { test } from "node:test";
import { arrange, ballot, clock, empty, fate, isEmpty, meaning, notice, position, toggle } from "../../web/votes/drafts.js";

const key = (code, more = {}) =>
  meaning({ code, key: code, shiftKey: false, ctrlKey: false, altKey: false, metaKey: false, repeat: false, ...more });

test("a second click takes the mark off, another mark replaces it", () => {
  let draft = toggle(empty("like"), "a", "like");
  assert.deepEqual(ballot(draft), { likes: ["a"], dislikes: [] });
  draft = toggle(draft, "a", "dislike");
  assert.deepEqual(ballot(draft), { likes: [], dislikes: ["a"] });
  assert.ok(isEmpty(toggle(draft, "a", "dislike")));
});

test("clicks rank in their order, and a place taken back moves the others up", () => {
  let draft = empty("rank");
  for (const name of ["c", "a", "b", "c"]) draft = toggle(draft, name, "like");
  assert.deepEqual(ballot(draft), { order: ["a", "b"] });
});

test("digits mark by their place on the keyboard, with shift too", () => {
  assert.deepEqual(key("Digit3", { key: "#", shiftKey: true }), { act: "mark", index: 2, mark: "dislike" });
  assert.deepEqual(key("Numpad1"), { act: "mark", index: 0, mark: "like" });
  assert.equal(key("Digit0"), null);
});

test("keys of the browser and keys held down are left alone", () => {
  assert.deepEqual(key("Enter"), { act: "submit" });
  assert.deepEqual(key("KeyS", { key: "S" }), { act: "skip" });
  assert.equal(key("Enter", { repeat: true }), null);
  assert.equal(key("KeyS", { key: "s", ctrlKey: true }), null);
  assert.equal(key("KeyX", { key: "x" }), null);
  assert.deepEqual(key("ArrowDown", { repeat: true }), { act: "move", right: 0, down: 1 });
});

test("pictures are as large as the box allows", () => {
  const spaces = { below: 0, gap: 10, smallest: 100 };
  assert.deepEqual(arrange(4, 1, { width: 410, height: 410 }, spaces), { columns: 2, width: 200 });
  assert.deepEqual(arrange(4, 1, { width: 2000, height: 300 }, spaces), { columns: 4, width: 300 });
  assert.deepEqual(arrange(2, 2, { width: 400, height: 410 }, spaces), { columns: 1, width: 400 });
});

test("many pictures stay large enough to see, and the box scrolls", () => {
  const { columns, width } = arrange(200, 1, { width: 430, height: 300 }, { below: 0, gap: 10, smallest: 100 });
  assert.equal(columns, 4);
  assert.equal(width, 100);
});

test("a page without a group says why", () => {
  assert.match(notice(null), /tries again/);
  assert.match(notice({ state: "idle" }), /No run/);
  assert.match(notice({ state: "stopping" }), /saved/);
  assert.match(notice({ state: "waiting", open: 0 }), /next images/);
  assert.match(notice({ state: "voting", open: 2 }), /other people/);
});

test("place and time are said in words", () => {
  const group = { iteration: 12, number: 2, total: 4, left: 61.4, needed: 2, answers: 1, images: ["a", "b"] };
  assert.equal(position({ state: "voting", run: "r" }, group), "r · iteration 12 · group 2 of 4 · 2 images");
  assert.equal(position({ state: "voting" }, { ...group, iteration: null }), "group 2 of 4 · 2 images");
  assert.equal(fate(group), "1 of 2 people answered · closed in 1:01 if nobody is here");
  assert.equal(fate({ ...group, needed: 1, answers: 0 }), "skipped in 1:01 if nobody is here");
  assert.equal(clock(3661), "1:01:01");
});
