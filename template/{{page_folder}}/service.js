// The service behind the page: same address, TEI's own API.
import { pieces } from "./vectors.js";

/** What went wrong, in words for the person at the page. */
export class ServiceError extends Error {
  /** `status` is that of the answer, where there was one. */
  constructor(message, status = null) {
    super(message);
    this.status = status;
  }
}

const WHY = {
  401: "the service wants an API key, or another one",
  404: "no embeddings service is behind this page",
  413: "the texts are too long for one request",
  429: "the service is overloaded: try again in a moment",
  502: "the service cannot be reached from here",
  503: "the service is not ready",
};

/** A client of the service; `key` is a function, so that the key is read when it is needed and kept nowhere. */
export class Service {
  constructor(key, fetcher = (...a) => fetch(...a)) {
    this.key = key;
    this.fetcher = fetcher;
    this.batch = 32;
  }

  async ask(path, body = null) {
    const headers = { "Content-Type": "application/json" };
    const key = this.key().trim();
    if (key) headers.Authorization = `Bearer ${key}`;
    let answer;
    try {
      answer = await this.fetcher(path, {
        method: body === null ? "GET" : "POST",
        headers,
        body: body === null ? null : JSON.stringify(body),
        redirect: "error",
        referrerPolicy: "no-referrer",
      });
    } catch (error) {
      throw new ServiceError(`The service does not answer (${error.message}).`);
    }
    let said = null;
    const text = await answer.text();
    try { said = JSON.parse(text); } catch { /* not JSON: told below */ }
    if (!answer.ok) {
      const message = said?.error?.message ?? said?.message ?? (typeof said?.error === "string" ? said.error : "");
      const why = message || WHY[answer.status] || "it gives no reason";
      throw new ServiceError(`The service answers ${answer.status}: ${why}`, answer.status);
    }
    if (said === null || typeof said !== "object") throw new ServiceError("What answers is not an embeddings service.");
    return said;
  }

  /** What TEI says of itself; null where it may not be asked from here. */
  async info() {
    const said = await this.ask("info");
    if (Number.isInteger(said.max_client_batch_size)) this.batch = said.max_client_batch_size;
    return said;
  }

  /** A vector per text, the tokens of all, and the milliseconds that it took. */
  async embed(texts, model) {
    const vectors = [];
    let tokens = 0;
    const started = performance.now();
    for (const part of pieces(texts, this.batch)) {
      const said = await this.ask("v1/embeddings", { model, input: part, encoding_format: "float" });
      const rows = Array.isArray(said.data) ? said.data : [];
      if (rows.length !== part.length || rows.some((row) => !Array.isArray(row?.embedding))) {
        throw new ServiceError("What answers is not an embeddings service.");
      }
      vectors.push(...rows.map((row) => row.embedding));
      tokens += said.usage?.prompt_tokens ?? 0;
    }
    return { vectors, tokens, milliseconds: performance.now() - started };
  }
}
