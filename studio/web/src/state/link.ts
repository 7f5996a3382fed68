/** Documents as addresses: prompt, seed and steps in the query, layers in the fragment, which no server logs. */
import { deflate, fromBase64, inflate, toBase64Url } from "../lib/bytes.ts";
import type { EditJson } from "../contract.ts";
import type { Size } from "../lib/raster.ts";
import type { Doc, Layer } from "./doc.ts";
import { editOf, layerOf } from "./wire.ts";

/** Longer fragments than this are cut off by programs that links pass through. */
export const MOST_FRAGMENT = 4096;

interface Packed {
  /** Version. */
  v: 1;
  l: { e: EditJson; n: string[]; c: number; on: boolean; lock: boolean }[];
}

export async function packLayers(layers: readonly Layer[]): Promise<string> {
  if (!layers.length) return "";
  const packed: Packed = {
    v: 1,
    l: layers.map((layer) => ({
      e: editOf(layer), n: layer.features.map((term) => term.label), c: layer.colour, on: layer.on, lock: layer.locked,
    })),
  };
  return toBase64Url(await deflate(new TextEncoder().encode(JSON.stringify(packed))));
}

export async function unpackLayers(text: string, size: Size): Promise<Layer[]> {
  if (!text) return [];
  const packed = JSON.parse(new TextDecoder().decode(await inflate(fromBase64(text)))) as Packed;
  if (packed.v !== 1 || !Array.isArray(packed.l)) throw new Error("a link of another version of the studio");
  return Promise.all(
    packed.l.map(async ({ e, n, c, on, lock }, at) => {
      const layer = await layerOf(e, at, size);
      const features = layer.features.map((term, i) => ({ ...term, label: n[i] ?? "" }));
      return { ...layer, features, colour: c, on, locked: lock };
    }),
  );
}

export function packSettings(doc: Doc): Record<string, string> {
  return { prompt: doc.prompt, seed: doc.seed, steps: String(doc.steps) };
}
