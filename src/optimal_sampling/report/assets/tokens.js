"use strict";

const AGREE = 0.001; // nats: below it to both models, every α gives nearly the same q
const LEVELS = 8;
const LONGEST = 3000; // pieces that are shown before one asks for the others

/** The class of a token's background: student's hue, teacher's, or that of an amount. */
function shade(metric, values) {
  const value = values[metric.name];
  if (value === null || value === undefined) return "";
  if (metric.name === "alpha" && modelsAgree(values)) return "";
  const share = Math.max(0, Math.min(1, (value - metric.low) / (metric.high - metric.low)));
  const level = Math.round(LEVELS * (metric.is_diverging ? Math.abs(2 * share - 1) : share));
  if (!level) return "";
  return `${metric.is_diverging ? (share > 0.5 ? "h" : "s") : "a"}${level}`;
}

function modelsAgree({ kl_student: student, kl_teacher: teacher }) {
  return (
    student !== undefined &&
    teacher !== undefined &&
    student !== null &&
    teacher !== null &&
    student < AGREE &&
    teacher < AGREE
  );
}

/** The diagnostics of a piece by name, not scaled. */
function valuesOf(detail, place, metrics) {
  const found = {};
  for (const metric of metrics) {
    const value =
      place < 0 ? detail.end_values?.[metric.name] : detail.columns[metric.name]?.[place];
    if (value !== undefined) found[metric.name] = value === null ? null : value / metric.scale;
  }
  return found;
}

/** Index of the first token of each piece, and the number of its tokens. */
function extents(detail) {
  if (detail.extents) return detail.extents;
  const counts = new Map(detail.counts);
  let start = 0;
  detail.extents = detail.pieces.map((_, place) => {
    const extent = [start, counts.get(place) || 1];
    start += extent[1];
    return extent;
  });
  return detail.extents;
}

/** The text of a sample, a span per piece. Copied, it is the text. */
function textOf(detail, metric, metrics, marks) {
  const node = el("div", {
    class: "text",
    tabindex: 0,
    role: "group",
    "aria-label": "Completion; arrow keys go from token to token",
  });
  const end = detail.end
    ? el("span", { class: "t end", tabindex: -1, "data-place": -1 }, detail.end)
    : null;
  const add = (from, to) => {
    const spans = document.createDocumentFragment();
    for (let place = from; place < to; place++)
      spans.append(tokenSpan(detail, place, metric, metrics, marks));
    node.append(spans);
  };
  const most =
    detail.unit === "none" || detail.isWhole
      ? detail.pieces.length
      : Math.min(LONGEST, detail.pieces.length);
  add(0, most);
  if (most === detail.pieces.length) {
    if (end) node.append(end);
    return [node];
  }
  const rest = el(
    "button",
    {
      type: "button",
      class: "rest",
      onclick: () => {
        detail.isWhole = true; // also in another colour
        add(most, detail.pieces.length);
        if (end) node.append(end);
        rest.remove();
      },
    },
    `Show the other ${count(detail.pieces.length - most)} tokens`,
  );
  return [node, rest];
}

function tokenSpan(detail, place, metric, metrics, marks) {
  const text = detail.pieces[place];
  if (detail.unit === "none") return el("span", {}, marked(text, marks && text.length < 20000));
  const kind = metric ? shade(metric, valuesOf(detail, place, metrics)) : "";
  return el("span", { class: `t ${kind}`, tabindex: -1, "data-place": place }, marked(text, marks));
}

const SPECIAL =
  /[ \t\n\u00a0\u0000-\u001f\u007f-\u009f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]/;
const HIDDEN = /[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]/;
const CONTROLS = (
  "NUL SOH STX ETX EOT ENQ ACK BEL BS TAB LF VT FF CR SO SI " +
  "DLE DC1 DC2 DC3 DC4 NAK SYN ETB CAN EM SUB ESC FS GS RS US"
).split(" ");
const SPACES = { " ": "·", "\u00a0": "°", "\t": "→", "\n": "↵" };

/** Text whose spaces, line breaks and control characters have a mark that is not copied. */
function marked(text, marks) {
  if (!(marks ? SPECIAL : HIDDEN).test(text)) return text;
  const parts = [];
  for (const character of text) {
    const mark = SPACES[character] && marks ? SPACES[character] : controlMark(character);
    if (!mark) {
      if (typeof parts.at(-1) === "string") parts.push(parts.pop() + character);
      else parts.push(character);
      continue;
    }
    const kind = SPACES[character] ? (character === "\n" ? "w" : "w over") : "w control";
    parts.push(el("i", { class: kind, "data-m": mark }, character));
  }
  return parts;
}

function controlMark(character) {
  if (SPACES[character] || !HIDDEN.test(character) || character === "\u200d") return "";
  const code = character.codePointAt(0);
  return code < 32
    ? CONTROLS[code]
    : `‹${code.toString(16).toUpperCase().padStart(4, "0")}›`;
}

function legend(metric) {
  if (!metric) return [el("span", {}, "These samples have no numbers per token.")];
  const steps = [...Array(2 * LEVELS + 1).keys()].map((n) => n / (2 * LEVELS));
  const shades = steps.map((share) =>
    el("i", {
      class: shade(metric, { [metric.name]: metric.low + share * (metric.high - metric.low) }),
    }),
  );
  const [low, high] = [metric.low, metric.high].map((value) => String(value).replace("-", "−"));
  const ends =
    metric.name === "alpha"
      ? ["0 student", "teacher 1"]
      : metric.name === "log_ratio"
        ? [`${low} student`, `teacher ${high}`]
        : [low, metric.low > metric.high ? high : `${high} and more`];
  return [
    el("span", {}, metric.meaning),
    el("span", {}, ends[0]),
    el(
      "span",
      { class: "scale", role: "img", "aria-label": `Scale from ${ends[0]} to ${ends[1]}` },
      shades,
    ),
    el("span", {}, ends[1]),
    metric.name === "alpha" ? el("span", {}, "no colour: ½, or the models agree") : null,
  ].filter(Boolean);
}
