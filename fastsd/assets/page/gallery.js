// The images that were generated, kept in this browser (IndexedDB), so that they survive a reload.

const NAME = "fastsd";
const STORE = "images";
const MOST = 500; // the oldest go first
let unkept = 0;

function opened() {
  return new Promise((done, failed) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id", autoIncrement: true });
    request.onsuccess = () => done(request.result);
    request.onerror = () => failed(request.error);
  });
}

async function inStore(mode, work) {
  const database = await opened();
  try {
    return await new Promise((done, failed) => {
      const transaction = database.transaction(STORE, mode);
      const request = work(transaction.objectStore(STORE));
      transaction.oncomplete = () => done(request.result);
      transaction.onerror = transaction.onabort = () => failed(transaction.error);
    });
  } finally {
    database.close();
  }
}

// Each: {id, image: Blob, settings: text, time}; none where the browser gives this page no storage.
export const all = () => inStore("readonly", (store) => store.getAll()).catch(() => []);

// The entry of an image. It has a text as its id where it could not be kept, since the disk is full, for example.
export async function add(image, settings) {
  const entry = { image, settings, time: Date.now() };
  try {
    entry.id = await inStore("readwrite", (store) => store.add(entry));
    const keys = await inStore("readonly", (store) => store.getAllKeys());
    for (const key of keys.slice(0, Math.max(keys.length - MOST, 0))) await forget(key);
  } catch {
    entry.id ??= `unkept-${++unkept}`;
  }
  return entry;
}

export const isKept = (entry) => typeof entry.id === "number";

export const forget = async (id) => typeof id === "number" && inStore("readwrite", (store) => store.delete(id));

export function blobOf(base64, type = "image/png") {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return new Blob([bytes], { type });
}

export function dataOf(blob) {
  return new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => failed(reader.error);
    reader.readAsDataURL(blob);
  });
}
