// Calls to the server that this page came from, and to no other.

const base = new URL("..", import.meta.url);

export class ServerError extends Error {}

async function call(path, options = {}) {
  let answer;
  try {
    answer = await fetch(new URL(path, base), options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer. It may be starting again: try once more in a moment.");
  }
  const body = await answer.json().catch(() => ({}));
  if (!answer.ok) {
    const wait = answer.headers.get("Retry-After");
    throw new ServerError((body.detail || `The server said ${answer.status}.`) + (wait ? ` (in ${wait} s)` : ""));
  }
  return body;
}

export const get = (path) => call(path);

export const post = (path, body, signal) =>
  call(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });

export const remove = (path) => call(path, { method: "DELETE" });

// A new job's id: the page watches and cancels by it.
export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return "page-" + Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
