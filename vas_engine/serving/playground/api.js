// The server this page came from.

/** An answer that is an error: its status (0 when there was no answer) and the field it is about. */
export class ApiError extends Error {
  constructor(message, status = 0, param = null) {
    super(message);
    this.status = status;
    this.param = param;
  }
}

/** The card of the model that is served: its name, its values, what is known of their scales. */
export async function modelCard(key) {
  const response = await ask("v1/models", { key });
  return (await response.json()).data[0];
}

/** Named sets of weights: {name: {weights}}. */
export async function savedProfiles(key) {
  const response = await ask("v1/profiles", { key });
  return (await response.json()).profiles;
}

/** Chunks of a streamed completion. Throws ApiError; an aborted signal ends it with an AbortError. */
export async function* stream(path, body, key, signal) {
  const options = { include_usage: true };
  const response = await ask(path, { key, signal, body: { ...body, stream: true, stream_options: options } });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { done, value } = await reader.read();
    if (done) throw new ApiError("The server ended the connection before the text was complete.");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: ?/, "");
      signal.throwIfAborted();
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(chunk.error.message, Number(chunk.error.code) || 0, chunk.error.param);
      yield chunk;
    }
  }
}

/** Saves a named set of weights on the server; returns all that are saved there. */
export async function saveProfile(name, weights, adminKey) {
  const path = `admin/profiles/${encodeURIComponent(name)}`;
  const response = await ask(path, { key: adminKey, method: "PUT", body: { weights } });
  return (await response.json()).profiles;
}

async function ask(path, { key, signal, body, method = body ? "POST" : "GET" }) {
  const headers = {};
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method, headers, signal, body: body && JSON.stringify(body), cache: "no-store",
      // A key of ours goes alone: the browser then never asks for one with a dialog of its own.
      credentials: key ? "omit" : "same-origin",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(`The server cannot be reached (${error.message}).`);
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const { error } = await response.json().catch(() => ({}));
  return new ApiError(error?.message ?? response.statusText, response.status, error?.param);
}
