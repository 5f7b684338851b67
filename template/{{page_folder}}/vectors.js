// What the page computes with vectors: plain arrays in, plain values out, no page and no network.

/** Cosine of two vectors of one length; 0 where one has no length. */
export function cosine(one, other) {
  let product = 0, a = 0, b = 0;
  for (let i = 0; i < one.length; i++) {
    product += one[i] * other[i];
    a += one[i] * one[i];
    b += other[i] * other[i];
  }
  return a && b ? product / Math.sqrt(a * b) : 0;
}

/** Length of a vector. */
export const length = (vector) => Math.hypot(...vector);

/** Cosines of all pairs: rows × rows. */
export const similarities = (vectors) => vectors.map((one) => vectors.map((other) => cosine(one, other)));

/** For each row the index of the most similar other row; null where there is none. */
export function nearest(matrix) {
  return matrix.map((row, self) => {
    let best = null;
    row.forEach((value, i) => {
      if (i !== self && (best === null || value > row[best])) best = i;
    });
    return best;
  });
}

/** Indexes and scores of `vectors` by similarity to `query`, best first. */
export function ranked(query, vectors) {
  return vectors
    .map((vector, index) => ({ index, score: cosine(query, vector) }))
    .sort((a, b) => b.score - a.score || a.index - b.index);
}

/**
 * The first two principal components: a point [x, y] per vector, and the share of the variance of each.
 *
 * By the matrix of inner products (rows × rows), since there are fewer texts than dimensions; its
 * eigenvectors by power iteration. The larger end of each axis is made positive, so that the same
 * texts give the same picture.
 */
export function principal(vectors, iterations = 200) {
  const rows = vectors.length, columns = vectors[0].length;
  const mean = Array.from({ length: columns }, (_, j) => vectors.reduce((sum, v) => sum + v[j], 0) / rows);
  const centred = vectors.map((v) => v.map((value, j) => value - mean[j]));
  const gram = centred.map((a) => centred.map((b) => a.reduce((sum, value, j) => sum + value * b[j], 0)));
  const total = gram.reduce((sum, row, i) => sum + row[i], 0);
  const axes = [];
  for (let axis = 0; axis < 2; axis++) {
    let vector = gram.map((_, i) => Math.cos(1 + i * (axis + 1)));
    let value = 0;
    for (let n = 0; n < iterations; n++) {
      for (const { vector: earlier } of axes) {
        const along = vector.reduce((sum, v, i) => sum + v * earlier[i], 0);
        vector = vector.map((v, i) => v - along * earlier[i]);
      }
      const next = gram.map((row) => row.reduce((sum, g, i) => sum + g * vector[i], 0));
      value = Math.hypot(...next);
      if (value <= 1e-12 * (total || 1)) { value = 0; vector = vector.map(() => 0); break; }
      vector = next.map((v) => v / value);
    }
    const peak = vector.reduce((best, v) => (Math.abs(v) > Math.abs(best) ? v : best), 0);
    axes.push({ value, vector: peak < 0 ? vector.map((v) => -v) : vector });
  }
  return {
    points: vectors.map((_, i) => axes.map(({ value, vector }) => vector[i] * Math.sqrt(value))),
    shares: axes.map(({ value }) => (total ? value / total : 0)),
  };
}

/** Middle of some numbers. */
export function median(numbers) {
  const sorted = [...numbers].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

/** Batch sizes to time: 1, 2, 4 … and the largest that the service takes. */
export function batchSizes(most) {
  const sizes = [];
  for (let size = 1; size < most; size *= 2) sizes.push(size);
  return [...sizes, most];
}

/** The lines of a text that hold something, without blanks at their ends. */
export const lines = (text) => text.split("\n").map((line) => line.trim()).filter(Boolean);

/** A list in pieces of at most `size`. */
export function pieces(list, size) {
  const out = [];
  for (let i = 0; i < list.length; i += size) out.push(list.slice(i, i + size));
  return out;
}

/** The prompt that belongs before a query or a passage, by the names that models give them; "" for none. */
export function promptFor(use, prompts) {
  const names = {
    query: ["query", "search_query", "retrieval.query", "web_search_query"],
    passage: ["passage", "document", "search_document", "retrieval.passage", "corpus"],
  }[use] ?? [];
  return names.find((name) => name in prompts) ?? "";
}
