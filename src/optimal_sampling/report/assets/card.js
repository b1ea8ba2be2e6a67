"use strict";

const ROLES = { student: "Student", mixture: "q*", teacher: "Teacher" };

/** The card of a token, beside it; on a narrow screen at the bottom. */
async function showCard(span, samples) {
  const card = document.getElementById("card");
  const article = span.closest(".sample");
  const place = Number(span.dataset.place);
  const index = Number(article.dataset.index);
  const detail = article.detail;
  card.span = span;
  const top = await topOf(index, samples);
  if (card.span !== span || !span.isConnected) return; // the pointer has gone on
  const values = valuesOf(detail, place, samples.metrics);
  const [start, number] =
    place < 0
      ? [detail.pieces.length ? extents(detail).at(-1)[0] + extents(detail).at(-1)[1] : 0, 1]
      : extents(detail)[place];
  card.replaceChildren(...cardParts(detail, place, values, { start, number, top }, samples));
  card.hidden = false;
  placeCard(card, span);
}

async function topOf(index, samples) {
  const chunk = await unpack(`tops-${Math.floor(index / samples.chunk)}`);
  return chunk ? chunk[index % samples.chunk] : null;
}

function cardParts(detail, place, values, { start, number, top }, samples) {
  const text = place < 0 ? detail.end : detail.pieces[place];
  const unit = detail.unit === "byte" ? "byte" : "token";
  const where =
    number > 1 ? `${unit}s ${start + 1}–${start + number}, means` : `${unit} ${start + 1}`;
  const facts = samples.metrics.filter(
    (metric) => values[metric.name] !== undefined && values[metric.name] !== null,
  );
  return [
    el(
      "div",
      { class: "token" },
      el("b", {}, marked(text, true)),
      el("span", { class: "soft" }, where),
    ),
    values.alpha !== undefined && values.alpha !== null ? lever(values.alpha) : null,
    el(
      "dl",
      {},
      facts.map((metric) =>
        el(
          "div",
          {},
          el("dt", {}, metric.title),
          el("dd", {}, valueText(metric, values[metric.name])),
        ),
      ),
    ),
    top
      ? el(
          "div",
          {},
          [...Array(number).keys()].slice(0, 4).map((n) => topColumns(top, start + n)),
        )
      : null,
  ].filter(Boolean);
}

function valueText(metric, value) {
  if (metric.name === "log_ratio")
    return `${short(Math.abs(value))} ${value < 0 ? "student" : "teacher"}`;
  if (metric.name === "vetoed") return percent(value);
  if (metric.name === "acceptance") return `≥ ${percent(value)}`; // of the tokens that are kept
  return short(value);
}

/** Where q lies between student and teacher. */
function lever(alpha) {
  const knob = el("i");
  knob.style.left = `${100 * alpha}%`;
  return el("div", { class: "lever", "aria-hidden": "true" }, knob);
}

/** What each would have said: the likeliest tokens of student, q* and teacher. */
function topColumns(top, token) {
  const names = Object.keys(ROLES).filter((name) => top.distributions.includes(name));
  return el(
    "div",
    { class: "tops", "--n": names.length },
    names.map((name) => {
      const first = (token * top.distributions.length + top.distributions.indexOf(name)) * top.k;
      const ranks = [...Array(top.k).keys()].filter((rank) => top.shares[first + rank] > 0);
      return el(
        "div",
        { class: `of-${name}` },
        el("h4", {}, ROLES[name]),
        el(
          "ol",
          {},
          ranks.map((rank) => topLine(top, first + rank, token)),
        ),
      );
    }),
  );
}

function topLine(top, at, token) {
  const share = top.shares[at] / 10000;
  const bar = el("i");
  bar.style.width = `${100 * share}%`;
  const isDrawn = top.places[at] === top.drawn[token];
  return el(
    "li",
    { class: isDrawn ? "drawn" : null, "aria-label": isDrawn ? "drawn" : null },
    bar,
    el("code", {}, marked(top.texts[top.places[at]], true)),
    el("span", {}, share < 0.001 ? "< 0.1%" : percent(share)),
  );
}

function placeCard(card, span) {
  if (innerWidth <= 640) return;
  const token = span.getClientRects()[0];
  const box = card.getBoundingClientRect();
  const left = Math.max(12, Math.min(innerWidth - box.width - 12, token.left - 16));
  const below = token.bottom + 10;
  const isAbove = below + box.height > innerHeight - 8 && token.top - box.height - 10 > 0;
  card.style.left = `${left}px`;
  card.style.top = `${isAbove ? token.top - box.height - 10 : below}px`;
}

/** While one scrolls, the card stays beside a focused token, and goes with the pointer's. */
function followToken() {
  const card = document.getElementById("card");
  if (!card.span || card.hidden) return;
  if (card.span === document.activeElement || card.span.matches(":hover"))
    placeCard(card, card.span);
  else hideCard();
}

function hideCard() {
  const card = document.getElementById("card");
  card.hidden = true;
  card.span = null;
}

/** Hover, focus and arrow keys of the tokens. */
function listenToTokens(list, samples) {
  const token = (event) => event.target.closest?.(".t");
  list.addEventListener("pointerover", (event) => {
    if (event.pointerType === "touch") return;
    if (token(event)) showCard(token(event), samples);
    else hideCard();
  });
  list.addEventListener("pointerleave", hideCard);
  list.addEventListener("focusin", (event) => token(event) && showCard(token(event), samples));
  list.addEventListener("focusout", hideCard);
  list.addEventListener("keydown", moveFocus);
  addEventListener("scroll", followToken, { passive: true });
}

function moveFocus(event) {
  const text = event.target.closest(".text") || event.target.querySelector(":scope > .text");
  if (!text || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  if (event.key === "Escape") {
    hideCard();
    text.focus();
    return;
  }
  const here = event.target.closest(".t");
  const spans = text.getElementsByClassName("t");
  const next = {
    ArrowRight: here ? here.nextElementSibling : spans[0],
    ArrowLeft: here ? here.previousElementSibling : spans[spans.length - 1],
    Home: spans[0],
    End: spans[spans.length - 1],
  }[event.key];
  if (!next) return;
  event.preventDefault();
  next.focus();
}
