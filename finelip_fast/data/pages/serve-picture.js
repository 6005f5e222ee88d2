/** Pictures to search by: kept for this tab, so that its links and the back button find them again. */

const LARGEST = 1_500_000; // bytes that are sent as they are; what is larger is scaled to SIDE pixels, more than models see
const SIDE = 1024;
const kept = new Map();

/** @param {Blob} file @returns {Promise<string>} A name for it. */
export async function keepPicture(file) {
  const uri = await uriOf(file.size > LARGEST ? await scaled(file) : file);
  const name = Date.now().toString(36);
  kept.set(name, uri);
  try {
    sessionStorage.setItem(`finelip-picture-${name}`, uri);
  } catch { // there is no more room: it is lost when the page is loaded again
  }
  return name;
}

/** @param {string} name @returns {string | null} A data URI, where the picture is still there. */
export const keptPicture = (name) => kept.get(name) ?? sessionStorage.getItem(`finelip-picture-${name}`);

/** @param {DataTransfer | null} data @returns {File | undefined} The first picture among what was dropped or pasted. */
export const pictureIn = (data) => [...(data?.files ?? [])].find((file) => file.type.startsWith("image/"));

/** @param {Blob} file @returns {Promise<Blob>} The file itself where the browser cannot read it; the server may. */
async function scaled(file) {
  try {
    const image = await createImageBitmap(file);
    const scale = Math.min(1, SIDE / Math.max(image.width, image.height));
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [image.width, image.height].map((length) => Math.max(1, Math.round(length * scale)));
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    return await new Promise((resolve) => canvas.toBlob((blob) => resolve(blob ?? file), "image/jpeg", 0.92));
  } catch {
    return file;
  }
}

/** @param {Blob} file @returns {Promise<string>} */
const uriOf = (file) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(String(reader.result));
  reader.onerror = () => reject(reader.error);
  reader.readAsDataURL(file);
});
