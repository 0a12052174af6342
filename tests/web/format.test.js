// @ts-check
// node --test tests/web/
import assert from "node:assert/strict";
import test from "node:test";

import { append, change, countLines, duration, newest, paragraphs, remaining, resuming, summary } from "../../web/format.js";

const before = { iteration: 0, evaluation: { jpeg: -2, "held-out/shapes strict": 0.5 } };
const first = { iteration: 1, reward: 0.4, seconds: 3 };
const second = { iteration: 2, reward: 0.6, seconds: 5, evaluation: { jpeg: -1.5, "held-out/shapes strict": 0.75 } };

test("durations have minutes, and hours only when needed", () => {
  assert.equal(duration(0), "0:00");
  assert.equal(duration(65.4), "1:05");
  assert.equal(duration(59.6), "1:00");
  assert.equal(duration(3600 + 62), "1:01:02");
});

test("a change names both ends, one number only itself", () => {
  assert.equal(change([0.1]), "0.100");
  assert.equal(change([0.1, 0.9, 0.25]), "0.100 -> 0.250");
});

test("the remaining time follows the last five iterations", () => {
  const rows = [...Array(10).keys()].map((i) => ({ iteration: i + 1, seconds: i < 5 ? 100 : 2 }));
  assert.equal(remaining({ run: "r", total: 40, rows }), "1:00 left");
});

test("nothing remains at the end, and nothing is known before the first iteration", () => {
  assert.equal(remaining({ run: "r", total: 2, rows: [first, second] }), "");
  assert.equal(remaining({ run: "r", total: 2, rows: [before] }), "");
});

test("a summary holds training, held-out and time", () => {
  const text = summary({ run: "my_run", total: 4, rows: [before, first, second] }, true);
  assert.deepEqual(text.split("\n"), [
    "my_run: iteration 2 of 4",
    "training reward 0.400 -> 0.600",
    "held-out jpeg -2.000 -> -1.500",
    "held-out shapes strict 0.500 -> 0.750",
    "0:08 left",
  ]);
});

test("a run without any row or any number has a summary too", () => {
  assert.equal(summary({ run: "r", total: 4, rows: [] }, false), "r: iteration 0 of 4");
  assert.equal(summary({ run: "r", total: 4, rows: [{ iteration: 0 }] }, true), "r: iteration 0 of 4");
});

test("a run that ended early says how to go on instead of a time", () => {
  const status = { run: "demo_2", total: 4, rows: [before, first, second] };
  assert.equal(summary(status, false).split("\n").pop(), "not running; to go on: run_name demo_2, resume on");
  const gamed = { ...status, rows: [before, { ...first, alarms: ["it is being gamed"] }] };
  assert.match(resuming(gamed), /resume on, when_gamed warn$/);
  assert.equal(resuming({ ...status, total: 2 }), "", "it is finished");
  assert.equal(resuming({ ...status, rows: [] }), "");
});

test("a node shows the run it would continue, or the last one of its name", () => {
  const runs = ["demo", "demo_10", "demo_2", "demo_b", "demolition"];
  assert.equal(newest(runs, "demo", true), "demo");
  assert.equal(newest(runs, "demo", false), "demo_10");
  assert.equal(newest(runs, "demo_b", false), "demo_b");
  assert.equal(newest(runs, "new", true), undefined);
  assert.equal(newest(runs, "new", false), undefined);
});

test("a row is added only right after its predecessor in the same run", () => {
  const status = { run: "r", total: 4, rows: [before, first] };
  assert.deepEqual(append(status, { run: "r", total: 8, row: second }), {
    run: "r",
    total: 8,
    rows: [before, first, second],
  });
  assert.equal(append(status, { run: "other", total: 4, row: second }), null);
  assert.equal(append(status, { run: "r", total: 4, row: first }), null);
  assert.equal(append(undefined, { run: "r", total: 4, row: before }), null);
});

test("a command stands on a line of its own", () => {
  const lines = (message) => paragraphs(message).map(({ text, command }) => (command ? `$ ${text}` : text));
  assert.deepEqual(
    lines("no folder; needed are a. Get them with:  hf get a --to c; package x is missing; get it with:  pip x"),
    ["no folder; needed are a. Get them with:", "$ hf get a --to c", "package x is missing; get it with:", "$ pip x"],
  );
  assert.deepEqual(lines("nothing: to copy; here"), ["nothing: to copy; here"]);
  assert.deepEqual(lines("get it with:  pip x; restart"), ["get it with:", "$ pip x", "restart"]);
});

test("lines are counted as they are broken", () => {
  assert.equal(countLines("", 10), 1);
  assert.equal(countLines("one two", 7), 1);
  assert.equal(countLines("one two ", 7), 1, "a blank may stand over the edge");
  assert.equal(countLines("one two", 6), 2);
  assert.equal(countLines("one\n\ntwo", 6), 3);
  assert.equal(countLines("aa bb cc dd", 5), 2);
  assert.equal(countLines("aa bb-cc dd", 6), 2, "broken after the hyphen");
  assert.equal(countLines("abcde", 5), 1);
  assert.equal(countLines("a abcdefghijkl", 5), 4, "a long word starts a line and is cut");
  assert.equal(countLines("abcdefg hi", 5), 2, "what is left of a long word is followed by others");
  assert.equal(countLines("abcdefg hijk", 5), 3);
});
