"use strict";

/** An element with attributes and children. Text becomes a text node, never markup. */
function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name.startsWith("--"))
      node.style.setProperty(name, value); // the policy allows no style attribute
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return node;
}

const unpacked = new Map();

/** Data of the file by the id of its element, decompressed once. */
function unpack(id) {
  if (!unpacked.has(id)) unpacked.set(id, decompressed(document.getElementById(id)));
  return unpacked.get(id);
}

async function decompressed(element) {
  if (!element) return null;
  const stream = new Blob([bytesOf(element.textContent)]).stream();
  return new Response(stream.pipeThrough(new DecompressionStream("gzip"))).json();
}

function bytesOf(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const binary = atob(base64);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes;
}

const count = (value) =>
  value === null || value === undefined ? "–" : value.toLocaleString("en-US");
const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)}%`;
const plural = (number, word) => `${count(number)} ${word}${number === 1 ? "" : "s"}`;

/** A number with about three digits. */
function short(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size === 0 || size >= 100) return value.toFixed(0);
  return size < 0.0005 ? value.toExponential(0) : value.toFixed(size < 1 ? 3 : size < 10 ? 2 : 1);
}

function interval(estimate) {
  const [low, high] = [estimate.low, estimate.high].map((x) => (100 * x).toFixed(1));
  return `[${low}, ${high}]`;
}

/** Round numbers from 0 to `most`, about `wanted` of them. */
function ticks(most, wanted) {
  const rough = most / Math.max(1, wanted);
  const power = 10 ** Math.floor(Math.log10(rough || 1));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
  const found = [];
  for (let x = 0; x <= most * 1.0001; x += step) found.push(+x.toPrecision(6));
  return found;
}
