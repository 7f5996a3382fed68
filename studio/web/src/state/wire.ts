/** Documents as the runs that the server knows, in the contract's JSON, and back. */
import { decodeGrey } from "../lib/png.ts";
import { fromBase64 } from "../lib/bytes.ts";
import type { EditJson, MaskJson } from "../contract.ts";
import { box, polygon, type Bytes, type Size } from "../lib/raster.ts";
import { COLOURS, makeMask, newId, noEffect, type Doc, type Kind, type Layer, type Mask, type Unit } from "./doc.ts";

export interface Run {
  prompt: string;
  seed: string;
  steps: number;
  edits: EditJson[];
  features?: boolean;
  only?: string[];
  previews?: boolean;
}

const UNITS = { mean: "UNIT_MEAN", raw: "UNIT_RAW", norm: "UNIT_NORM" } as const;
const UNIT_NAMES: Record<string, Unit> = { UNIT_MEAN: "mean", UNIT_RAW: "raw", UNIT_NORM: "norm" };

export function editOf(layer: Layer): EditJson {
  const unit = UNITS[layer.unit];
  const edit: EditJson = {
    features: layer.features.map(({ sae, index, weight }) => ({
      feature: { sae, index },
      ...(weight === undefined || layer.kind === "scale" ? {} : { weight }),
    })),
  };
  if (layer.kind === "add") edit.add = { strength: layer.amount, unit };
  else if (layer.kind === "scale") edit.scale = { factor: layer.amount };
  else if (layer.kind === "set") edit.set = { value: layer.amount, unit };
  else edit.replace = { strength: layer.amount, unit };
  if (layer.mask) edit.mask = { png: layer.mask.png };
  if (layer.steps) edit.steps = { start: layer.steps[0], end: layer.steps[1] };
  return edit;
}

/** The run of a document, by the layers that act. Those without effect are left out: their picture is the plain one. */
export function runOf(doc: Doc, layers: readonly Layer[] = doc.layers.filter((layer) => layer.on)): Run {
  const edits = layers.filter((layer) => layer.features.length && !noEffect(layer)).map(editOf);
  return { prompt: doc.prompt, seed: doc.seed, steps: doc.steps, edits };
}

export const plain = (doc: Doc): Run => runOf(doc, []);

/** A mask in pixels; boxes and polygons, which other programs write, are drawn at the picture's size. */
async function maskOf(mask: MaskJson, size: Size): Promise<Mask> {
  if (mask.png) return { ...(await decodeGrey(fromBase64(mask.png))), png: mask.png };
  const { width, height } = size;
  let data: Bytes = new Uint8Array(width * height);
  const at = (x = 0, y = 0) => ({ x: x * width, y: y * height });
  for (const one of mask.boxes?.boxes ?? []) data = box(data, size, at(one.left, one.top), at(one.right, one.bottom), 1, false);
  for (const one of mask.polygons?.polygons ?? []) {
    data = polygon(data, size, (one.points ?? []).map((point) => at(point.x, point.y)), 1, false);
  }
  return makeMask(data, size);
}

/** A layer of an edit. */
export async function layerOf(edit: EditJson, at: number, size: Size): Promise<Layer> {
  const kind = (["add", "scale", "set", "replace"] as const).find((one) => edit[one]) as Kind;
  const unit = UNIT_NAMES[edit.add?.unit ?? edit.set?.unit ?? edit.replace?.unit ?? "UNIT_MEAN"] ?? "mean";
  const amount = edit.add?.strength ?? edit.scale?.factor ?? edit.set?.value ?? edit.replace?.strength ?? 0;
  return {
    id: newId(),
    kind,
    features: (edit.features ?? []).map(({ feature, weight }) => {
      const [sae, index] = [feature?.sae ?? "", feature?.index ?? 0];
      return { sae, index, label: "", ...(weight === undefined ? {} : { weight }) };
    }),
    amount,
    unit,
    mask: edit.mask ? await maskOf(edit.mask, size) : null,
    steps: edit.steps ? [edit.steps.start ?? 0, edit.steps.end ?? 0] : null,
    on: true,
    colour: at % COLOURS,
    locked: false,
  };
}

export async function docOf(run: Pick<Run, "prompt" | "edits"> & { seed: string; steps: number | null }, size: Size): Promise<Doc> {
  const layers = await Promise.all(run.edits.map((edit, at) => layerOf(edit, at, size)));
  return { prompt: run.prompt, seed: String(run.seed), steps: run.steps ?? 1, layers };
}
