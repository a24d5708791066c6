// Requests to the server that the page came from. Addresses are relative: a proxy may add a path.

export class ServerError extends Error {
  constructor(status, message, code) {
    super(message.replace(/\s+/g, " ").slice(0, 400));
    this.status = status;
    this.code = code;
  }
}

// `options`: method, key, session, mustExist (refuse a session that is not kept), body (an
// object to send), signal.
export async function request(path, options = {}) {
  const headers = {};
  if (options.key) headers.authorization = `Bearer ${options.key}`;
  if (options.session) headers["x-session-id"] = options.session;
  if (options.mustExist) headers["x-session-must-exist"] = "1";
  const init = { method: options.method, headers, cache: "no-store", signal: options.signal };
  if (options.body) {
    headers["content-type"] = "application/json";
    Object.assign(init, { method: "POST", body: JSON.stringify(options.body) });
  }
  let response;
  try {
    response = await fetch(path, init);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    // A key with characters that no header can hold is a TypeError, as a lost connection is.
    throw new ServerError(0, "the server cannot be reached (or the API key is no key)");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const error = (await response.json().catch(() => ({})))?.error;
  return new ServerError(
    response.status,
    String(error?.message ?? `the server answered ${response.status}`),
    error?.code,
  );
}

// Yields the objects of a stream of server-sent events, up to "[DONE]".
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new ServerError(0, "the connection ended before the answer did");
      const lines = (text + value).split(/\r\n|\n/);
      text = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        const found = JSON.parse(data);
        if (found.error) throw new ServerError(200, String(found.error.message), found.error.code);
        yield found;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
