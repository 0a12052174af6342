// @ts-check
/** What our nodes show beyond the stock frontend: results as text on the node, and a run's state after a reload. */
// @ts-ignore served by the host
import { api } from "../../scripts/api.js";
// @ts-ignore served by the host
import { app } from "../../scripts/app.js";
import { append, countLines, newest, paragraphs, summary } from "./format.js";
import { showVotes } from "./votes.js";

/** @typedef {import("./format.js").Status} Status */

const TRAIN_LOOP = "DenseGRPOTrainLoop";
const REWARD_MODEL = "DenseGRPORewardModel";
const WITH_TEXT = [
  "DenseGRPORewardScore",
  "DenseGRPORemoteReward",
  "DenseGRPOJudge",
  "DenseGRPOInspectRollout",
  "DenseGRPOCalibrateExploration",
  "DenseGRPOSaveLoRA",
];
const NOT_STARTED = "no progress to show yet";
const ENDS = ["execution_success", "execution_error", "execution_interrupted"];
const LINE_HEIGHT = 15;
const LETTER_WIDTH = 6.7; // of the widest usual monospace font at 11px
const MOST_LINES = 12; // then it scrolls
const MARGIN = 10;
const PADDING = 6;

/** By node: its text, the height that gave it, and what is known of its run. @type {WeakMap<object, HTMLElement>} */
const elements = new WeakMap();
/** @type {WeakMap<object, number>} */
const heights = new WeakMap();
/** @type {WeakMap<object, Status>} */
const statuses = new WeakMap();
/** The nodes whose run goes on now. @type {Set<object>} */
const running = new Set();

/** A read-only text below the widgets of a node; made when there is something to say. @param {any} node */
function textOf(node) {
  const known = elements.get(node);
  if (known) return known;
  const element = document.createElement("div");
  element.className = "densegrpo-text";
  element.style.cssText =
    `font: 11px/${LINE_HEIGHT}px monospace; white-space: pre-wrap; overflow-wrap: anywhere; ` +
    `overflow: auto; padding: 4px ${PADDING}px; ` +
    "box-sizing: border-box; color: var(--input-text); background: var(--comfy-input-bg); border-radius: 4px; " +
    "user-select: text";
  const columns = () => Math.max(1, Math.floor((node.size[0] - 2 * (MARGIN + PADDING)) / LETTER_WIDTH));
  const lines = () => Math.min(MOST_LINES, countLines(element.textContent ?? "", columns()));
  const height = () => LINE_HEIGHT * lines() + 8 + 2 * MARGIN;
  const options = { serialize: false, margin: MARGIN, getMinHeight: height, getMaxHeight: height };
  // `options.serialize` keeps it out of the prompt, `widget.serialize` out of the saved workflow.
  node.addDOMWidget("densegrpo_text", "densegrpo_text", element, options).serialize = false;
  elements.set(node, element);
  return element;
}

/**
 * Write on a node, which grows when it has to, and shrinks again.
 * @param {any} node @param {...(string | Node)} content
 */
function show(node, ...content) {
  const mine = heights.get(node) === node.size[1]; // nobody else has made it so high
  textOf(node).replaceChildren(...content);
  const [width, height] = node.computeSize();
  node.setSize([Math.max(width, node.size[0]), mine ? height : Math.max(height, node.size[1])]);
  if (Math.abs(height - node.size[1]) < 1) heights.set(node, node.size[1]);
  node.setDirtyCanvas(true, true);
}

/** Keep and show what is known of a run. @param {any} node @param {Status} status */
function showStatus(node, status) {
  statuses.set(node, status);
  show(node, summary(status, running.has(node)));
}

/** Whether the host is busy with a run of that name. @param {string} name */
async function isRunning(name) {
  const answer = await api.fetchApi("/queue");
  const { queue_running } = await answer.json();
  const nodes = queue_running.flatMap((/** @type {any} */ item) => Object.values(item[2]));
  return nodes.some((/** @type {any} */ n) => n.class_type === TRAIN_LOOP && n.inputs.run_name === name);
}

/** No run goes on any more: say so on their nodes. */
function showEnded() {
  const ended = [...running];
  running.clear();
  for (const node of ended) {
    const status = statuses.get(node);
    if (status) showStatus(node, status);
  }
}

/** Ask the host for a run. @param {any} node @param {string} run */
async function refresh(node, run) {
  const answer = await api.fetchApi(`/densegrpo/status?run=${encodeURIComponent(run)}`);
  if (answer.ok) showStatus(node, await answer.json());
}

/** Show the run that a node of a loaded workflow belongs to, if it has one. @param {any} node */
async function rebuild(node) {
  const value = (/** @type {string} */ name) => node.widgets.find((/** @type {any} */ w) => w.name === name).value;
  const answer = await api.fetchApi("/densegrpo/status");
  const run = newest((await answer.json()).runs, value("run_name"), value("resume"));
  if (!run) return show(node, NOT_STARTED);
  if (await isRunning(value("run_name"))) running.add(node);
  await refresh(node, run);
}

/** A command that is copied by a click, or selected where the page may not copy. @param {string} text */
function commandOf(text) {
  const element = document.createElement("span");
  element.textContent = text;
  element.title = "Click to copy";
  element.className = "densegrpo-command";
  element.style.cssText = "cursor: copy; text-decoration: underline dotted; text-underline-offset: 3px";
  element.addEventListener("click", async () => {
    getSelection()?.selectAllChildren(element);
    try {
      await navigator.clipboard.writeText(text);
      element.title = "Copied";
    } catch {
      element.title = "Press Ctrl+C to copy"; // not over plain http from another machine
    }
  });
  return element;
}

/** Say on a Reward Model what its reward lacks; a node that never lacked anything stays small. @param {any} node */
async function showMissing(node) {
  const widget = node.widgets.find((/** @type {any} */ w) => w.name === "reward");
  const name = widget.value;
  const answer = await api.fetchApi(`/densegrpo/reward?name=${encodeURIComponent(name)}`);
  if (!answer.ok) return;
  const { missing } = await answer.json();
  if (widget.value !== name) return; // another one was chosen meanwhile
  if (!missing && !elements.has(node)) return;
  if (!missing) return show(node, "ready");
  const lines = paragraphs(`not installed: ${missing}`);
  show(node, ...lines.flatMap(({ text, command }, i) => [i ? "\n" : "", command ? commandOf(text) : text]));
}

/** Do that now and whenever another reward is chosen. @param {any} node */
function watchReward(node) {
  const widget = node.widgets.find((/** @type {any} */ w) => w.name === "reward");
  const before = widget.callback;
  widget.callback = function () {
    before?.apply(this, arguments);
    showMissing(node);
  };
}

/** The node of an execution id, which is a path through subgraphs such as "5:3". @param {string} id */
function nodeOf(id) {
  let graph = app.graph;
  let node = null;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(Number(part)) ?? null;
    graph = node?.subgraph;
  }
  return node;
}

app.registerExtension({
  name: "DenseGRPO.Nodes",

  setup() {
    showVotes(api);
    api.addEventListener("densegrpo.progress", (/** @type {CustomEvent} */ { detail }) => {
      const node = nodeOf(detail.node);
      if (node?.comfyClass !== TRAIN_LOOP) return; // another workflow is open
      running.add(node);
      const status = append(statuses.get(node), detail);
      if (status) showStatus(node, status);
      else refresh(node, detail.run);
    });
    for (const end of ENDS) api.addEventListener(end, showEnded);
    // The host tells an end only to the page that queued the run; all hear when nothing is left to do.
    api.addEventListener("status", (/** @type {CustomEvent} */ { detail }) => {
      if (detail?.exec_info?.queue_remaining === 0) showEnded();
    });
  },

  nodeCreated(/** @type {any} */ node) {
    // At once, so that it stands above the preview, which the stock frontend adds while the node runs.
    if (node.comfyClass === TRAIN_LOOP) show(node, NOT_STARTED);
    if (node.comfyClass === REWARD_MODEL) watchReward(node);
    if (!WITH_TEXT.includes(node.comfyClass)) return;
    const before = node.onExecuted;
    node.onExecuted = function (/** @type {any} */ output) {
      before?.apply(this, arguments);
      if (output?.text) show(this, output.text.join("\n"));
    };
  },

  // Key R: files may have been put there.
  refreshComboInNodes() {
    for (const node of app.graph.nodes) if (node.comfyClass === REWARD_MODEL) showMissing(node);
  },

  loadedGraphNode(/** @type {any} */ node) {
    if (node.comfyClass === TRAIN_LOOP) rebuild(node);
    if (node.comfyClass === REWARD_MODEL) showMissing(node);
  },
});
