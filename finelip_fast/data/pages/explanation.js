/**
 * A picture and the words of its description, lit by each other: on the page that `finelip explain` writes, and where
 * `finelip serve` shows a result.
 *
 * @typedef {{maps: string[], words: string[]}} Levels For each word the levels of all places, for each place those of all
 *   words; two hexadecimal digits each.
 * @typedef {{side: number, squashed?: boolean, maps: Object<string, Levels>}} Explained Places of a row; whether the model sees
 *   the whole picture, squashed to a square, instead of the square in its middle; the maps by their kind.
 * @typedef {{word: number} | {place: number} | null} Target What is pointed at.
 */

/** @param {string} hex */
const levelsOf = (hex) => Array.from(hex.match(/../g) ?? [], (pair) => parseInt(pair, 16) / 255);

const MOVES = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

/**
 * Make words and places answer to pointer, touch and keys. Words are one stop of the tab key, and so is the picture; arrow keys
 * move inside. A click keeps what it lights.
 *
 * @param {HTMLElement} root Holds `.view` with `img`, `.seen`, `canvas` and `.place`; `.words` of `.word`, named by `data-name`,
 *   and `data-adds` where they add to the score; `.message`; radio buttons named "kind" where there are several maps.
 * @param {Explained} explained
 */
export function connectExplanation(root, explained) {
  const { side, maps } = explained;
  const view = root.querySelector(".view");
  const picture = view.querySelector("img");
  const seen = view.querySelector(".seen");
  const canvas = seen.querySelector("canvas");
  const text = root.querySelector(".words");
  const words = [...text.querySelectorAll(".word")];
  const message = root.querySelector(".message");
  const clamp = (at) => Math.min(side - 1, Math.max(0, at));
  const kind = () => maps[root.querySelector("input[name=kind]:checked")?.value ?? "raw"];
  const adds = words.map((word) => Math.max(0, Number(word.dataset.adds ?? 0)));
  const mostAdded = Math.max(1e-12, ...adds);
  let row = Math.floor(side / 2);
  let column = Math.floor(side / 2);
  /** @type {Target} */
  let kept = null;
  /** @type {Target} */
  let shown = null;

  view.classList.add("explained");
  fitPicture(view, picture, (ratio) => {
    const [width, height] = explained.squashed ? [1, 1] : [Math.min(1, 1 / ratio), Math.min(1, ratio)];
    const sizes = { left: (1 - width) / 2, top: (1 - height) / 2, width, height };
    for (const [name, share] of Object.entries(sizes)) seen.style[name] = `${100 * share}%`;
  });
  seen.style.setProperty("--side", side);
  canvas.width = canvas.height = side;

  /** @param {Target} target */
  function show(target) {
    shown = target;
    seen.classList.toggle("lit", target?.word !== undefined);
    seen.classList.toggle("pointed", target?.place !== undefined);
    if (target?.word !== undefined) lightPlaces(target.word);
    else if (target?.place !== undefined) markWords(target.place);
    else rest();
  }

  /** How much each word adds. */
  function rest() {
    message.textContent = "";
    words.forEach((word, at) => mark(word, adds[at] / mostAdded));
  }

  /** @param {HTMLElement} word @param {number} level From 0 to 1. */
  function mark(word, level) {
    word.style.setProperty("--level", level.toFixed(3));
    word.style.textDecoration = level > 0.5 && shown ? `underline ${(5 * level - 1.5).toFixed(1)}px` : "";
  }

  /** @param {number} number A word's. */
  function lightPlaces(number) {
    const levels = levelsOf(kind().maps[number]);
    const draw = canvas.getContext("2d");
    const shades = draw.createImageData(side, side);
    levels.forEach((level, at) => { shades.data[4 * at + 3] = 217 * (1 - level); });
    draw.putImageData(shades, 0, 0);
    words.forEach((word) => mark(word, 0));
    const best = levels.indexOf(Math.max(...levels));
    const { name, adds: added } = words[number].dataset;
    message.textContent = `${name}:${added === undefined ? "" : ` adds ${added},`} most at ${nameOf(best)}`;
  }

  /** @param {number} place */
  function markWords(place) {
    const levels = levelsOf(kind().words[place]);
    words.forEach((word, at) => mark(word, levels[at] > 0.5 ? levels[at] : 0));
    const marker = seen.querySelector(".place");
    marker.style.left = `${100 * (place % side) / side}%`;
    marker.style.top = `${100 * Math.floor(place / side) / side}%`;
    const best = levels.map((level, at) => [level, at]).filter(([level]) => level > 0).sort((a, b) => b[0] - a[0]);
    const named = best.slice(0, 3).map(([level, at]) => `${words[at].dataset.name} ${Math.round(100 * level)} %`);
    message.textContent = `${nameOf(place)}: ${named.join(", ")}`;
  }

  const nameOf = (place) => `row ${Math.floor(place / side) + 1}, column ${place % side + 1}`;
  const here = () => ({ place: row * side + column });

  /** @param {Target} target Kept by a click, let go by another. */
  function keep(target) {
    const again = kept !== null && kept.word === target.word && kept.place === target.place;
    kept = again ? null : target;
    words.forEach((word, at) => word.setAttribute("aria-pressed", String(kept?.word === at)));
    show(kept);
  }

  const numberOf = (event) => words.indexOf(event.target.closest?.(".word"));

  text.setAttribute("role", "toolbar");
  text.setAttribute("aria-label", "Words: move with the arrow keys");
  words.forEach((word, at) => {
    word.setAttribute("role", "button");
    word.setAttribute("aria-pressed", "false");
    word.tabIndex = at === 0 ? 0 : -1;
  });
  text.addEventListener("pointerover", (event) => {
    if (event.pointerType === "mouse" && numberOf(event) >= 0) show({ word: numberOf(event) });
  });
  text.addEventListener("pointerout", (event) => event.pointerType === "mouse" && show(kept));
  text.addEventListener("focusin", (event) => {
    const number = numberOf(event);
    words.forEach((word, at) => { word.tabIndex = at === number ? 0 : -1; });
    show({ word: number });
  });
  text.addEventListener("focusout", () => show(kept));
  text.addEventListener("click", (event) => numberOf(event) >= 0 && keep({ word: numberOf(event) }));
  text.addEventListener("keydown", (event) => {
    const number = numberOf(event);
    if (number < 0) return;
    if (event.key === "Enter" || event.key === " ") keep({ word: number });
    else if (event.key in MOVES || event.key === "Home" || event.key === "End") goalOf(event.key, number).focus();
    else return;
    event.preventDefault();
  });

  /** @param {string} key @param {number} number @returns {HTMLElement} The word to which a key leads from another. */
  function goalOf(key, number) {
    if (key === "Home") return words[0];
    if (key === "End") return words[words.length - 1];
    const [down, across] = MOVES[key];
    if (across) return words[Math.min(words.length - 1, Math.max(0, number + across))];
    const from = words[number].getBoundingClientRect();
    const boxes = words.map((word) => ({ word, box: word.getBoundingClientRect() }));
    const beyond = boxes.filter(({ box }) => down * (box.top - from.top) > from.height / 2);
    const line = Math.min(...beyond.map(({ box }) => Math.abs(box.top - from.top)));
    const next = beyond.filter(({ box }) => Math.abs(box.top - from.top) < line + from.height / 2);
    next.sort((a, b) => Math.abs(a.box.left - from.left) - Math.abs(b.box.left - from.left));
    return next[0]?.word ?? words[number];
  }

  view.tabIndex = 0;
  view.setAttribute("role", "application");
  view.setAttribute("aria-label", "Places of the picture: move with the arrow keys");
  for (const name of ["pointermove", "pointerdown", "click"]) {
    view.addEventListener(name, (event) => {
      if (name === "click" && event.detail === 0) return keep(here());
      const box = seen.getBoundingClientRect();
      row = clamp(Math.floor((event.clientY - box.top) / box.height * side));
      column = clamp(Math.floor((event.clientX - box.left) / box.width * side));
      return name === "click" ? keep(here()) : show(here());
    });
  }
  view.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && show(kept));
  view.addEventListener("focus", () => show(here()));
  view.addEventListener("blur", () => show(kept));
  view.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") keep(here());
    else if (event.key in MOVES) {
      [row, column] = [clamp(row + MOVES[event.key][0]), clamp(column + MOVES[event.key][1])];
      show(here());
    } else return;
    event.preventDefault();
  });
  for (const input of root.querySelectorAll("input[name=kind]")) input.addEventListener("change", () => show(shown));
  show(null);
}

/**
 * Let a picture's frame have its proportions, so that it is as large as its place allows: until it has loaded, those of its
 * attributes `width` and `height`.
 *
 * @param {HTMLElement} view @param {HTMLImageElement} picture
 * @param {(ratio: number) => void} then Told the width as a multiple of the height, each time that it is known.
 */
export function fitPicture(view, picture, then = () => {}) {
  const fit = () => {
    const ratio = picture.naturalWidth / picture.naturalHeight || picture.getAttribute("width") / picture.getAttribute("height") || 1;
    view.style.setProperty("--ratio", String(ratio));
    then(ratio);
  };
  if (picture.complete) fit();
  picture.addEventListener("load", fit);
}
