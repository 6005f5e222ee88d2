/** A result, large: the picture, why it matched, what is known about it. */

import { connectExplanation, fitPicture } from "./explanation.js";
import { ask, showThumbnail } from "./serve-server.js";

/** @param {string} id @param {string | null} [path] */
export const nameOf = (id, path) => (path ?? id).split(/[/\\]/).pop() || id;

/**
 * Fill the dialog's content.
 *
 * @param {HTMLElement} content
 * @param {object} item A hit, or a stored item.
 * @param {object} page
 * @param {string} page.text Description that was searched for; "" where there was none.
 * @param {string} page.similar Link of the search for pictures like this one.
 * @param {boolean} page.writable
 * @param {AbortSignal} page.signal Given up when another is shown.
 * @param {(event: Event) => void} page.findSimilar
 * @param {() => Promise<void>} page.remove
 */
export function showResult(content, item, page) {
  const result = document.getElementById("result").content.cloneNode(true);
  const view = result.querySelector(".view");
  const picture = view.querySelector("img");
  picture.alt = nameOf(item.id, item.path);
  reserve(picture, item.metadata);
  fitPicture(view, picture);
  result.querySelector(".scores").textContent = scores(item);
  const similar = result.querySelector(".similar");
  similar.href = page.similar;
  similar.addEventListener("click", page.findSimilar);
  const copy = result.querySelector(".copy");
  const done = result.querySelector(".done");
  if (!item.path) copy.textContent = "Copy id";
  copy.addEventListener("click", async () => { done.textContent = await copied(item.path ?? item.id, content); });
  if (page.writable) offerDelete(result.querySelector(".delete"), done, page.remove);
  showMetadata(result.querySelector(".known"), item);
  content.replaceChildren(result);
  showThumbnail(picture, item.thumbnail, Math.min(1280, view.clientWidth || 640), { eager: true });
  if (page.text && item.thumbnail) explain(content, item, page);
}

/**
 * Keep the picture's place free until it has loaded, so that nothing below it moves.
 *
 * @param {HTMLImageElement} picture @param {object} metadata
 */
function reserve(picture, { width, height }) {
  if (width > 0 && height > 0) Object.assign(picture, { width, height });
}

/** @param {object} item */
function scores({ score, global_score: cosine, fine_score: fine, verdict, shard }) {
  if (score === undefined) return "";
  const parts = fine === null ? [] : [`global ${cosine.toFixed(3)}`, `fine ${fine.toFixed(3)}`];
  const said = verdict ? [verdict.charAt(0).toUpperCase() + verdict.slice(1)] : [];
  return [...said, `score ${score.toFixed(3)}`, ...parts, ...(shard ? [`from ${shard}`] : [])].join(" · ");
}

/** @param {HTMLElement} section @param {object} item */
function showMetadata(section, item) {
  const known = { ...(item.path ? { path: item.path } : {}), ...(item.id === item.path ? {} : { id: item.id }), ...item.metadata };
  const list = section.querySelector("dl");
  for (const [name, value] of Object.entries(known)) {
    const row = document.createElement("div");
    const [term, detail] = [document.createElement("dt"), document.createElement("dd")];
    term.textContent = name;
    detail.textContent = typeof value === "string" ? value : JSON.stringify(value);
    row.append(term, detail);
    list.append(row);
  }
  section.hidden = !list.children.length;
}

/**
 * @param {string} text
 * @param {HTMLElement} place Inside the dialog: what lies outside cannot be selected.
 * @returns {Promise<string>} What became of it.
 */
async function copied(text, place) {
  try {
    await navigator.clipboard.writeText(text);
    return "Copied.";
  } catch { // without HTTPS, browsers give no clipboard but on the machine itself
    const field = Object.assign(document.createElement("textarea"), { value: text, className: "visually-hidden" });
    place.append(field);
    field.select();
    const worked = document.execCommand("copy");
    field.remove();
    return worked ? "Copied." : "The browser did not allow it.";
  }
}

/** The first click asks, the second deletes. */
function offerDelete(button, done, remove) {
  button.hidden = false;
  let sure = false;
  button.addEventListener("click", async () => {
    if (!sure) {
      sure = true;
      button.textContent = "Delete for good";
      done.textContent = "Click again to delete it from the index.";
      return;
    }
    button.disabled = true;
    try {
      await remove();
    } catch (fault) {
      button.disabled = false;
      done.textContent = fault.message;
    }
  });
  button.addEventListener("blur", () => {
    if (button.disabled) return;
    sure = false;
    button.textContent = "Delete";
    done.textContent = "";
  });
}

/** Ask why the picture matched, and connect its words with its places. */
async function explain(content, item, { text, signal }) {
  const section = content.querySelector(".why");
  const reading = section.querySelector(".reading");
  section.hidden = false;
  reading.textContent = "Reading the picture …";
  let answer;
  try {
    answer = await ask("v1/explain", { method: "POST", json: { text, item: item.id, shard: item.shard }, signal });
  } catch (fault) {
    if (fault.name !== "AbortError") reading.textContent = fault.message;
    return;
  }
  if (signal.aborted) return;
  reading.textContent = "";
  fillWords(section.querySelector(".words"), text, answer);
  content.querySelector(".message").hidden = false;
  section.querySelector(".kinds").hidden = Object.keys(answer.maps).length < 2;
  connectExplanation(content, answer);
}

/** @param {HTMLElement} paragraph @param {string} text @param {object} answer Its places count code points. */
function fillWords(paragraph, text, { words, beyond }) {
  const letters = [...text];
  const slice = (start, end) => letters.slice(start, end).join("");
  let last = 0;
  for (const { text: word, start, end, adds } of words) {
    const mark = Object.assign(document.createElement("span"), { className: "word", textContent: word });
    mark.dataset.name = word.replace(/^\p{P}+|\p{P}+$/gu, "") || word;
    if (adds !== null) mark.dataset.adds = (adds < 0 ? "" : "+") + adds.toFixed(4);
    paragraph.append(slice(last, start), mark);
    last = end;
  }
  const rest = slice(Math.min(last, beyond), letters.length);
  if (!rest.trim()) return;
  const unread = Object.assign(document.createElement("s"), { textContent: rest, title: "beyond the context" });
  paragraph.append(unread);
}
