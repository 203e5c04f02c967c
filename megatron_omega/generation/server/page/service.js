// The server's API: models, streams, masks. Knows no page.

export class Refused extends Error {}

const refusal = async (response) => {
  let sentence = `the server answered ${response.status}`;
  try {
    sentence = (await response.json()).error.message;
  } catch { /* not in our form */ }
  const error = new Refused(sentence);
  error.status = response.status;
  return error;
};

const headers = (key) => ({"Content-Type": "application/json", ...(key ? {Authorization: `Bearer ${key}`} : {})});

export async function models(key) {
  const response = await fetch("v1/models", {headers: headers(key)});
  if (!response.ok) throw await refusal(response);
  return (await response.json()).data;
}

async function post(path, body, key, signal) {
  const response = await fetch(path, {method: "POST", headers: headers(key), body: JSON.stringify(body), signal});
  if (!response.ok) throw await refusal(response);
  return response;
}

export async function fillMask(body, key, signal) {
  return (await post("v1/fill-mask", body, key, signal)).json();
}

// Yield the objects of a streamed completion.
export async function* complete(body, key, signal) {
  const response = await post("v1/completions", {...body, stream: true}, key, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let unread = "";
  for (;;) {
    const {done, value} = await reader.read();
    if (done) return;
    const events = (unread + value).split("\n\n");
    unread = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const found = JSON.parse(data);
      if (found.error) throw new Refused(found.error.message);
      yield found;
    }
  }
}
