// @ts-check
/**
 * What a run's metrics say, as text. Pure functions: the same file runs in the page and under `node --test`.
 *
 * @typedef {{iteration: number, reward?: number, seconds?: number, evaluation?: Record<string, number>, alarms?: string[], warnings?: string[]}} Row
 * @typedef {{run: string, total: number, rows: Row[]}} Status answer of GET /densegrpo/status?run=NAME
 */

const RECENT = 5; // iterations whose mean time predicts the rest

/** Seconds as m:ss, or h:mm:ss from an hour on. @param {number} seconds */
export function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  const two = (/** @type {number} */ n) => String(n).padStart(2, "0");
  const minutes = Math.floor(whole / 60) % 60;
  const hours = Math.floor(whole / 3600);
  return hours ? `${hours}:${two(minutes)}:${two(whole % 60)}` : `${minutes}:${two(whole % 60)}`;
}

/** "0.790 -> 0.812" of the first and the last number, or the only one. @param {number[]} values */
export function change(values) {
  const last = values[values.length - 1].toFixed(3);
  return values.length > 1 ? `${values[0].toFixed(3)} -> ${last}` : last;
}

/** Time to go at the speed of the last iterations; nothing at the end or before the first. @param {Status} status */
export function remaining({ total, rows }) {
  const times = finite(rows.map((row) => row.seconds)).slice(-RECENT);
  const left = total - (rows[rows.length - 1]?.iteration ?? 0);
  if (!times.length || left <= 0) return "";
  return `${duration((left * times.reduce((a, b) => a + b)) / times.length)} left`;
}

/** How to go on with a run that ended early; nothing after the last iteration. @param {Status} status */
export function resuming({ run, total, rows }) {
  const last = rows[rows.length - 1];
  if (!last || last.iteration >= total) return "";
  return `not running; to go on: run_name ${run}, resume on${last.alarms?.length ? ", when_gamed warn" : ""}`;
}

/**
 * The state of a run: training, each held-out reward, and the time to go, or how to go on when it does not run.
 * @param {Status} status @param {boolean} running
 */
export function summary({ run, total, rows }, running) {
  const lines = [`${run}: iteration ${rows[rows.length - 1]?.iteration ?? 0} of ${total}`];
  const rewards = finite(rows.map((row) => row.reward));
  if (rewards.length) lines.push(`training reward ${change(rewards)}`);
  const evaluations = rows.flatMap((row) => row.evaluation ?? []);
  for (const name of Object.keys(evaluations[0] ?? {})) {
    const means = finite(evaluations.map((means) => means[name]));
    if (means.length) lines.push(`held-out ${name.replace(/^held-out\//, "")} ${change(means)}`);
  }
  const alarms = rows.flatMap((row) => row.alarms ?? []);
  if (alarms.length) lines.push(`WARNING: ${alarms[alarms.length - 1]}`);
  const warned = rows.filter((row) => row.warnings?.length).pop();
  if (warned) lines.push(`iteration ${warned.iteration}: ${warned.warnings?.join("; ")}`);
  const end = (running ? remaining : resuming)({ run, total, rows });
  if (end) lines.push(end);
  return lines.join("\n");
}

/**
 * Which run a node shows before it has run in this page: the one it would continue, or the last one it started beside
 * others of its name (with resume off a number is added). Undefined when there is none.
 * @param {string[]} runs @param {string} name @param {boolean} resume
 */
export function newest(runs, name, resume) {
  if (resume) return runs.find((run) => run === name);
  const number = (/** @type {string} */ run) => (run === name ? 1 : Number(run.slice(name.length + 1)));
  const mine = runs.filter((run) => run === name || (run.startsWith(`${name}_`) && Number.isInteger(number(run))));
  return mine.sort((a, b) => number(a) - number(b)).pop();
}

/**
 * The status after one more row, or null when the row does not follow on it and all rows must be asked for again.
 * @param {Status | undefined} status
 * @param {{run: string, total: number, row: Row}} event
 * @returns {Status | null}
 */
export function append(status, { run, total, row }) {
  const last = status?.rows[status.rows.length - 1];
  if (!status || status.run !== run || !last || row.iteration !== last.iteration + 1) return null;
  return { run, total, rows: [...status.rows, row] };
}

/**
 * The lines of a message: what stands between ":  " and "; " is a command, and gets a line of its own.
 * @param {string} message @returns {{text: string, command: boolean}[]}
 */
export function paragraphs(message) {
  const parts = message.split(/:  (.*?)(?:; |$)/); // text, command, text, ...
  const lines = parts.map((text, i) => {
    const command = i % 2 === 1;
    return { text: command || i === parts.length - 1 ? text : `${text}:`, command };
  });
  return lines.filter(({ text }) => text);
}

/**
 * How many lines of `columns` letters of equal width a text takes; broken after blanks and hyphens, or else anywhere.
 * @param {string} text @param {number} columns
 */
export function countLines(text, columns) {
  return text.split("\n").reduce((sum, line) => sum + countWrapped(line, columns), 0);
}

/** The same for one line. @param {string} line @param {number} columns */
function countWrapped(line, columns) {
  let [count, used] = [1, 0];
  for (const word of line.match(/[^ -]*[ -]+|[^ -]+/g) ?? []) {
    const length = word.trimEnd().length; // blanks may stand over the edge
    if (used && used + length > columns) [count, used] = [count + 1, 0];
    const cuts = Math.max(0, Math.ceil(length / columns) - 1);
    [count, used] = [count + cuts, used + word.length - cuts * columns];
  }
  return count;
}

/** Those that are numbers, in order. @param {unknown[]} values @returns {number[]} */
function finite(values) {
  return /** @type {number[]} */ (values.filter(Number.isFinite));
}
