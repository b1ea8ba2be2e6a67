"use strict";

/** Scores with intervals: of the runs, and of each evaluation by benchmark. */
function scoresSection(data) {
  const blocks = [];
  const graded = data.runs.map((run, i) => [run, i]).filter(([run]) => run.accuracy);
  if (graded.length > 1) blocks.push(runScores(graded));
  for (const evaluation of data.evaluations) blocks.push(evaluationBlock(evaluation));
  if (!blocks.length) return null;
  return el(
    "section",
    { id: "scores" },
    el("h2", {}, "Scores"),
    el(
      "p",
      { class: "lead" },
      "95% intervals, clustered by question. Each is for one comparison: " +
        "the best of several looks better than it is.",
    ),
    blocks,
  );
}

function runScores(graded) {
  const rows = graded.map(([run, i]) => ({ name: run.name, colour: i, cells: [run.accuracy] }));
  const title = graded.some(([run]) => run.accuracy.is_of_rows)
    ? "right answers; of stages, rows solved"
    : "right answers";
  return el("div", { class: "more" }, el("h3", {}, "The runs"), scoreGrid([title], rows));
}

function evaluationBlock(evaluation) {
  const names = [...new Set(evaluation.rows.map((row) => row.benchmark))];
  const checkpoints = [...new Set(evaluation.rows.map((row) => row.checkpoint))];
  return el(
    "div",
    {},
    names.map((name) => {
      const rows = evaluation.rows.filter((row) => row.benchmark === name);
      const { questions, samples } = rows[0];
      return el(
        "div",
        { class: "more" },
        el("h3", {}, `${evaluation.name}: ${name}`),
        el(
          "p",
          { class: "small soft lead" },
          `${plural(questions, "question")} × ${plural(samples, "sample")}; ` +
            `differences from ${evaluation.baseline}, paired by question`,
        ),
        scoreGrid(
          evaluation.metrics,
          rows.map((row) => ({
            name: row.checkpoint,
            colour: checkpoints.indexOf(row.checkpoint),
            cells: evaluation.metrics.map((metric) => ({
              ...row.scores[metric],
              difference: row.differences[metric],
            })),
          })),
        ),
      );
    }),
    [...evaluation.notes, ...(evaluation.missing || [])].map((note) =>
      el("p", { class: "note" }, note),
    ),
  );
}

function scoreGrid(metrics, rows) {
  const head = ["", ...metrics].map((name) => el("div", { class: "head" }, name));
  const lines = rows.map((row) => [
    el("div", { class: `name c${row.colour % 6}` }, el("i", { class: "dot" }), ` ${row.name}`),
    row.cells.map((cell, i) =>
      el(
        "div",
        { class: `of c${row.colour % 6}`, "data-metric": metrics[i] },
        scoreText(cell),
        whisker(cell),
      ),
    ),
  ]);
  return el("div", { class: "scores", "--n": metrics.length }, head, lines);
}

function scoreText(cell) {
  const difference = cell.difference ? signedInterval(cell.difference) : "";
  return [
    el("b", {}, percent(cell.value)),
    el("span", { class: "soft" }, ` ${interval(cell)}`),
    difference ? el("div", { class: "small soft" }, `${difference} points`) : null,
  ];
}

function signedInterval({ value, low, high }) {
  return `${signed(value)} [${signed(low)}, ${signed(high)}]`;
}

const signed = (share) => `${share < 0 ? "−" : "+"}${Math.abs(100 * share).toFixed(1)}`;

/** A score and its interval on a line from 0 to 100%. */
function whisker({ value, low, high }) {
  const at = (share) => `${100 * share}%`;
  return svg(
    "svg",
    { role: "img", "aria-label": `${percent(value)}, from ${percent(low)} to ${percent(high)}` },
    svg("line", { class: "grid", x1: 0, x2: "100%", y1: 8, y2: 8 }),
    svg("line", { class: "whisker", x1: at(low), x2: at(high), y1: 8, y2: 8 }),
    svg("circle", { class: "point", cx: at(value), cy: 8, r: 4.5 }),
  );
}
