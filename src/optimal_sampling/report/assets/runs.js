"use strict";

const VERDICTS = { correct: "correct", wrong: "wrong", no_answer: "no answer", truncated: "truncated", skipped: "not gradable" };

function runsSection(data) {
  const blocks = data.runs.map((run, i) => runBlock(run, i, data.runs.length > 1));
  return el("div", { class: `runs${data.runs.length > 1 ? " many" : ""}` }, blocks);
}

function runBlock(run, i, isOneOfMany) {
  const name = isOneOfMany ? el("h2", { class: "run-name" }, el("i", { class: `dot c${i % 6}` }), run.name) : null;
  return el("div", { class: "run" },
    name, el("p", { class: "lead" }, source(run)),
    run.notes.map((note) => el("p", { class: "note" }, note)),
    el("dl", { class: "figures" }, figures(run).map(([title, value, under]) =>
      el("div", {}, el("dt", {}, title), el("dd", {}, value, under ? el("small", {}, under) : null)))),
    verdictBar(run), stageTable(run), errorLines(run), moreOf(run));
}

/** Which models, and what was drawn from. */
function source(run) {
  const { student, teacher, mode, alpha_method: method } = run.options;
  if (!student) return "The models are not known.";
  if (run.stages.length) return ["Stages of ", role("student", student), " and ", role("teacher", teacher), "."];
  if (mode === "student" || mode === "teacher") return ["Drawn from the ", mode, " alone, ", role(mode, run.options[mode]), "."];
  return ["q* of ", role("student", student), " and ", role("teacher", teacher), ` by ${methodName(method)}.`];
}

const methodName = (name) => String(name).replaceAll("_", " ").replace("kl ", "KL ").replace("ess ", "ESS ");
const role = (name, model) => el("span", { class: name, title: name }, model);

function figures(run) {
  const found = [];
  const right = run.accuracy;
  if (right) {
    const title = right.is_of_rows ? "Solved" : "Right answers";
    found.push([title, percent(right.value), `${interval(right)}, ${plural(right.rows, "row")}`]);
  }
  const missing = [run.failed ? `${count(run.failed)} failed` : "", run.owed ? `${count(run.owed)} owed` : ""];
  found.push(["Samples", count(run.good), missing.filter(Boolean).join(", ")]);
  found.push(["Tokens", count(run.tokens), run.good ? `${short(run.tokens / run.good)} a sample` : ""]);
  const means = Object.fromEntries(run.means);
  const alpha = means["alpha where the models differ"];
  if (run.profiles.alpha_differ && alpha !== undefined) found.push(["α where the models differ", short(alpha), `${short(means["alpha mean"])} over all tokens`]);
  const speed = run.calls.reduce((sum, call) => sum + call.tokens_per_second, 0);
  if (speed) found.push(["Tokens/s", count(Math.round(speed)), run.calls.length > 1 ? `sum of ${run.calls.length} shards` : "of the last call"]);
  return found;
}

function verdictBar(run) {
  const total = Object.values(run.verdicts).reduce((a, b) => a + b, 0);
  if (!total) return null;
  const shares = Object.entries(run.verdicts);
  const ungraded = run.good - total;
  if (ungraded > 0) shares.push(["", ungraded]);
  return el("div", {},
    el("div", { class: "bar", "aria-hidden": "true" }, shares.map(([name, n]) => sized(el("i", { class: `v-${name}` }), n))),
    el("div", { class: "keys" }, shares.map(([name, n]) =>
      el("span", {}, el("i", { class: `v-${name}` }), `${VERDICTS[name] || "not graded"} ${count(n)}`))));
}

function sized(node, share) {
  node.style.flex = `${share} 1 0`;
  return node;
}

function errorLines(run) {
  if (!run.errors.length) return null;
  const more = run.more_errors ? [el("p", { class: "small soft" }, `and ${plural(run.more_errors, "more reason")}`)] : [];
  return [...run.errors.map(([text, n]) => el("p", { class: "error" }, `${count(n)} × failed: ${text}`)), ...more];
}

function moreOf(run) {
  const lengths = run.lengths.quantiles;
  const facts = [
    ...run.means.map(([title, value]) => [title, value.toFixed(4)]),
    ...Object.entries(lengths).map(([name, n]) => [`length, ${name}`, plural(n, "token")]),
    ["finish reasons", Object.entries(run.finish).map(([name, n]) => `${name} ${count(n)}`).join(", ") || "–"],
    ...run.calls.map((call) => ["speed", `${count(call.tokens_per_second)} tokens/s: ${count(call.tokens)} tokens in ${call.seconds} s, ${call.status}`]),
    ...run.calls.flatMap((call) => Object.entries(call.notes)),
    ["folder", run.path],
  ];
  return el("details", { class: "more" }, el("summary", {}, "Means, speed, options"),
    el("h3", {}, "The run"), facingTable(facts),
    el("h3", {}, "Options"), facingTable(Object.entries(run.options).map(([name, value]) => [optionName(name), shown(value)])));
}

const optionName = (name) => `--${name.replaceAll("_", "-")}`;
const shown = (value) => (value === null ? "–" : typeof value === "string" ? value : JSON.stringify(value));

function facingTable(rows) {
  return el("div", { class: "scroll" }, el("table", {}, rows.map(([name, value]) =>
    el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, value)))));
}

function stageTable(run) {
  if (!run.stages.length) return null;
  const columns = ["prompts", "tries", "solved", "student_tokens", "teacher_tokens"];
  return el("div", { class: "stages" }, el("div", { class: "scroll" }, el("table", {},
    el("tr", {}, ["stage", ...columns].map((name, i) => el("th", { class: i ? "n" : null }, name.replace("_", "’s ")))),
    run.stages.map((stage) => el("tr", {}, el("td", {}, stage.name), columns.map((name) => el("td", { class: "n" }, count(stage[name]))))))));
}

/** The options that are not the same in all runs. */
function differencesTable(data) {
  if (!data.differences.length) return null;
  return el("details", { class: "more", open: data.differences.length < 9 }, el("summary", {}, "Options in which the runs differ"),
    el("div", { class: "scroll" }, el("table", {},
      el("tr", {}, el("th"), data.runs.map((run, i) => el("th", {}, el("i", { class: `dot c${i % 6}` }), ` ${run.name}`))),
      data.differences.map((name) => el("tr", {}, el("th", { scope: "row" }, optionName(name)),
        data.runs.map((run) => el("td", {}, name in run.options ? shown(run.options[name]) : "–")))))));
}

/** Scores with intervals: of the runs, and of each evaluation by benchmark. */
function scoresSection(data) {
  const blocks = [];
  const graded = data.runs.map((run, i) => [run, i]).filter(([run]) => run.accuracy);
  if (graded.length > 1) blocks.push(runScores(graded));
  for (const evaluation of data.evaluations) blocks.push(evaluationBlock(evaluation));
  if (!blocks.length) return null;
  return el("section", { id: "scores" }, el("h2", {}, "Scores"),
    el("p", { class: "lead" }, "95% intervals, clustered by question. Each is for one comparison: the best of several looks better than it is."), blocks);
}

function runScores(graded) {
  const rows = graded.map(([run, i]) => ({ name: run.name, colour: i, cells: [run.accuracy] }));
  const title = graded.some(([run]) => run.accuracy.is_of_rows) ? "right answers; of stages, rows solved" : "right answers";
  return el("div", { class: "more" }, el("h3", {}, "The runs"), scoreGrid([title], rows));
}

function evaluationBlock(evaluation) {
  const names = [...new Set(evaluation.rows.map((row) => row.benchmark))];
  const checkpoints = [...new Set(evaluation.rows.map((row) => row.checkpoint))];
  return el("div", {}, names.map((name) => {
    const rows = evaluation.rows.filter((row) => row.benchmark === name);
    const { questions, samples } = rows[0];
    return el("div", { class: "more" },
      el("h3", {}, `${evaluation.name}: ${name}`), el("p", { class: "small soft lead" }, `${plural(questions, "question")} × ${plural(samples, "sample")}; differences from ${evaluation.baseline}, paired by question`),
      scoreGrid(evaluation.metrics, rows.map((row) => ({
        name: row.checkpoint, colour: checkpoints.indexOf(row.checkpoint),
        cells: evaluation.metrics.map((metric) => ({ ...row.scores[metric], difference: row.differences[metric] })),
      }))));
  }), [...evaluation.notes, ...(evaluation.missing || [])].map((note) => el("p", { class: "note" }, note)));
}

function scoreGrid(metrics, rows) {
  const head = ["", ...metrics].map((name) => el("div", { class: "head" }, name));
  const lines = rows.map((row) => [
    el("div", { class: `name c${row.colour % 6}` }, el("i", { class: "dot" }), ` ${row.name}`),
    row.cells.map((cell, i) => el("div", { class: `of c${row.colour % 6}`, "data-metric": metrics[i] }, scoreText(cell), whisker(cell))),
  ]);
  return el("div", { class: "scores", "--n": metrics.length }, head, lines);
}

function scoreText(cell) {
  const more = cell.difference ? ` ${signed(cell.difference.value)} [${signed(cell.difference.low)}, ${signed(cell.difference.high)}]` : "";
  return [el("b", {}, percent(cell.value)), el("span", { class: "soft" }, ` ${interval(cell)}`), more ? el("div", { class: "small soft" }, `${more} points`) : null];
}

const signed = (share) => `${share < 0 ? "−" : "+"}${Math.abs(100 * share).toFixed(1)}`;

/** A score and its interval on a line from 0 to 100%. */
function whisker({ value, low, high }) {
  const at = (share) => `${100 * share}%`;
  return svg("svg", { role: "img", "aria-label": `${percent(value)}, from ${percent(low)} to ${percent(high)}` },
    svg("line", { class: "grid", x1: 0, x2: "100%", y1: 8, y2: 8 }),
    svg("line", { class: "whisker", x1: at(low), x2: at(high), y1: 8, y2: 8 }),
    svg("circle", { class: "point", cx: at(value), cy: 8, r: 4.5 }));
}
