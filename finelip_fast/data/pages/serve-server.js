/** What the server is asked, and what went wrong as a sentence. */

const KEY = "finelip-key";

/** A request that failed; the message is a sentence for people. */
export class Fault extends Error {
  /** @param {string} message @param {{status?: number, param?: string | null, wait?: number}} [more] */
  constructor(message, { status = 0, param = null, wait = 0 } = {}) {
    super(message);
    Object.assign(this, { status, param, wait });
  }
}

/** @param {string} key */
export const keepKey = (key) => sessionStorage.setItem(KEY, key);
const key = () => sessionStorage.getItem(KEY);
const authorization = () => (key() ? { Authorization: `Bearer ${key()}` } : {});

/**
 * @param {string} address Relative to the page, so that the page may lie below another address.
 * @param {{method?: string, json?: object, form?: FormData, signal?: AbortSignal}} [request]
 * @returns {Promise<any>} The answer's JSON.
 * @throws {Fault} Whatever went wrong, but not that the request was given up.
 */
export async function ask(address, { method = "GET", json, form, signal } = {}) {
  const headers = { Accept: "application/json", ...authorization() };
  if (json) headers["Content-Type"] = "application/json";
  let response;
  let answer = null;
  try {
    response = await fetch(address, { method, headers, body: json ? JSON.stringify(json) : form, signal });
    answer = await response.json().catch((error) => { if (error.name === "AbortError") throw error; });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Fault(navigator.onLine
      ? "The server does not answer. It may have been stopped: start it again, then try again."
      : "You are offline. Try again when you are connected.");
  }
  if (response.ok && answer) return answer;
  const wait = Number(response.headers.get("Retry-After")) || 0;
  throw new Fault(sentence(response.status, answer?.error?.message, wait), {
    status: response.status, param: answer?.error?.param, wait,
  });
}

/** @param {number} status @param {string | undefined} message @param {number} wait Seconds. */
function sentence(status, message, wait) {
  const later = wait ? `Try again in ${wait} second${wait === 1 ? "" : "s"}.` : "Try again in a moment.";
  if (status === 401) return "The server asks for a key.";
  if (status === 429) return `The server has more to do than it can take. ${later}`;
  if (status === 504) return `The server took too long. ${later}`;
  if (!message) return status === 503 ? `The server is not ready. ${later}` : `The server failed (${status}). ${later}`;
  return status === 503 ? `${asSentence(message)} ${later}` : asSentence(message);
}

/** @param {string} message As the library writes them: in lower case, without a full stop. */
export const asSentence = (message) => message.charAt(0).toUpperCase() + message.slice(1) + (/[.!?]$/.test(message) ? "" : ".");

/** Sides of the thumbnails that the server makes. */
const SIDES = [160, 320, 640, 1280, 2048];

/** Halves of pairs, of names that are no UTF-8, have no address. */
const inAddress = (text) => encodeURIComponent(text.replace(/\p{Cs}/gu, "\ufffd"));

/** @param {string} id @returns {string} An item's address. */
export const addressOf = (id) => `v1/items/${inAddress(id)}`;

/** @param {string} id @param {string} shard "" where there are no shards. @returns {string} Address of an item's thumbnail. */
export const thumbnailOf = (id, shard) => `${addressOf(id)}/thumbnail${shard ? `?shard=${inAddress(shard)}` : ""}`;

/** @param {string} address @param {number} side */
function sized(address, side) {
  const url = new URL(address.replace(/^\//, ""), document.baseURI);
  url.searchParams.set("side", String(side));
  return url.href;
}

const visible = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting) continue;
    visible.unobserve(target);
    loadWithKey(target);
  }
}, { rootMargin: "400px" });

/** @param {HTMLImageElement} image */
async function loadWithKey(image) {
  const response = await fetch(image.dataset.address, { headers: authorization() }).catch(() => null);
  if (!response?.ok) return void image.dispatchEvent(new Event("error"));
  image.addEventListener("load", () => URL.revokeObjectURL(image.src), { once: true });
  image.src = URL.createObjectURL(await response.blob());
}

/**
 * Show a small copy of a picture, loaded once it is near the screen.
 *
 * @param {HTMLImageElement} image
 * @param {string | null} address
 * @param {number} width Of the place where it is shown, in CSS pixels.
 * @param {{eager?: boolean}} [how]
 */
export function showThumbnail(image, address, width, { eager = false } = {}) {
  const frame = image.parentElement;
  image.addEventListener("error", () => frame.classList.add("without"), { once: true });
  image.addEventListener("load", () => frame.classList.add("loaded"), { once: true });
  if (!address) return void frame.classList.add("without");
  const pixels = width * Math.min(3, window.devicePixelRatio);
  const source = sized(address, SIDES.find((side) => side >= pixels) ?? SIDES.at(-1));
  if (key()) {
    image.dataset.address = source;
    if (eager) loadWithKey(image);
    else visible.observe(image);
  } else {
    image.loading = eager ? "eager" : "lazy";
    image.src = source;
  }
}
