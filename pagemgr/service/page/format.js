"use strict";

const BINARY = ["B", "KiB", "MiB", "GiB", "TiB"];

function bytes(count) {
  let power = 0;
  while (Math.abs(count) >= 1024 && power < BINARY.length - 1) { count /= 1024; power += 1; }
  return `${power === 0 || count >= 100 ? Math.round(count) : count.toFixed(1)} ${BINARY[power]}`;
}

function whole(count) { return Math.round(count).toLocaleString("en"); }

function percent(ratio) { return ratio === null || ratio === undefined ? "–" : `${(100 * ratio).toFixed(1)} %`; }

function clock(seconds) { return new Date(1000 * seconds).toLocaleTimeString("en-GB"); }

function word(name) { return name.replaceAll("_", " "); }

function color(name) { return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim(); }

function element(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}
