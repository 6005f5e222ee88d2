"use strict";

const maps = JSON.parse(document.getElementById("maps").textContent);
const view = document.getElementById("view");
const canvas = view.querySelector("canvas");
const draw = canvas.getContext("2d");
const words = [...document.querySelectorAll("[data-word]")];
const message = document.getElementById("message");
const cell = canvas.width / maps.side;
let row = 0;
let column = 0;

const kind = () => maps[document.querySelector("input:checked").value];
// Levels are two hexadecimal digits each.
const level = (levels, at) => parseInt(levels.slice(2 * at, 2 * at + 2), 16) / 255;
// On whole pixels, where neighbours neither overlap nor leave a gap.
const edge = (at) => Math.round(at * cell);
const clamp = (at) => Math.min(maps.side - 1, Math.max(0, at));

function clear() {
  draw.clearRect(0, 0, canvas.width, canvas.height);
  for (const word of words) word.style.cssText = "";
  message.textContent = "";
}

function lightPatches(word) {
  clear();
  const levels = kind().maps[word.dataset.word];
  let best = 0;
  for (let at = 0; at < maps.side ** 2; at++) {
    if (level(levels, at) > level(levels, best)) best = at;
    draw.fillStyle = `rgba(0, 0, 0, ${0.85 * (1 - level(levels, at))})`;
    const x = at % maps.side;
    const y = Math.floor(at / maps.side);
    draw.fillRect(edge(x), edge(y), edge(x + 1) - edge(x), edge(y + 1) - edge(y));
  }
  const place = `row ${Math.floor(best / maps.side) + 1}, column ${best % maps.side + 1}`;
  const adds = word.dataset.adds === undefined ? "" : ` adds ${word.dataset.adds},`;
  message.textContent = `${word.dataset.name}:${adds} most at ${place}`;
}

function markWords() {
  clear();
  const levels = words.map((_, at) => level(kind().words[row * maps.side + column], at));
  words.forEach((word, at) => {
    if (levels[at] <= 0.5) return;
    word.style.background = `rgba(128, 128, 128, ${levels[at] - 0.4})`;
    word.style.textDecoration = `underline ${(6 * levels[at] - 2).toFixed(1)}px`;
    word.style.textDecorationSkipInk = "none";
  });
  for (const [colour, width] of [["black", 5], ["white", 2]]) {
    draw.strokeStyle = colour;
    draw.lineWidth = width;
    draw.strokeRect(column * cell, row * cell, cell, cell);
  }
  const best = levels.map((value, at) => [value, at]).filter(([value]) => value > 0).sort((a, b) => b[0] - a[0]).slice(0, 3);
  const shares = best.map(([value, at]) => `${words[at].dataset.name} ${Math.round(100 * value)} %`);
  message.textContent = `row ${row + 1}, column ${column + 1}: ${shares.join(", ")}`;
}

function point(event) {
  const box = view.getBoundingClientRect();
  row = clamp(Math.floor((event.clientY - box.top) / box.height * maps.side));
  column = clamp(Math.floor((event.clientX - box.left) / box.width * maps.side));
  markWords();
}

for (const word of words) {
  for (const event of ["mouseenter", "focus", "click"]) word.addEventListener(event, () => lightPatches(word));
  for (const event of ["mouseleave", "blur"]) word.addEventListener(event, clear);
}
for (const event of ["pointermove", "pointerdown"]) view.addEventListener(event, point);
view.addEventListener("pointerleave", (event) => {
  if (event.pointerType === "mouse") clear();
});
view.addEventListener("focus", markWords);
view.addEventListener("blur", clear);
view.addEventListener("keydown", (event) => {
  const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  const move = moves[event.key];
  if (!move) return;
  event.preventDefault();
  row = clamp(row + move[0]);
  column = clamp(column + move[1]);
  markWords();
});
