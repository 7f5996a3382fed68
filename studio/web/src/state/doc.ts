/** What is being made: prompt, seed, steps and layers, with everything that was done to it. */
import { computed, signal } from "@preact/signals";
import { encodeGrey } from "../lib/png.ts";
import { toBase64 } from "../lib/bytes.ts";
import { isEmpty, type Bytes, type Size } from "../lib/raster.ts";

export type Kind = "add" | "scale" | "set" | "replace";
export type Unit = "mean" | "raw" | "norm";

export interface Term {
  sae: string;
  index: number;
  label: string;
  weight?: number;
}

/** A mask is never changed, only replaced, so that states may share it. */
export interface Mask extends Size {
  readonly data: Bytes;
  /** Base64 of its PNG; made once. */
  readonly png: string;
}

export interface Layer {
  id: string;
  kind: Kind;
  features: readonly Term[];
  amount: number;
  unit: Unit;
  /** null: the whole picture. */
  mask: Mask | null;
  /** Half-open range of steps; null: all. */
  steps: readonly [number, number] | null;
  on: boolean;
  colour: number;
  locked: boolean;
}

export interface Doc {
  prompt: string;
  /** Decimal digits: a seed may be larger than a number holds exactly. */
  seed: string;
  steps: number;
  layers: readonly Layer[];
}

export const COLOURS = 8;
const MOST_STATES = 200;

export const newId = () => Math.random().toString(36).slice(2, 9);

export function makeMask(data: Bytes, size: Size): Mask {
  return { data, width: size.width, height: size.height, png: toBase64(encodeGrey(data, size.width, size.height)) };
}

export const doc = signal<Doc>({ prompt: "", seed: "7", steps: 1, layers: [] });
export const activeId = signal<string>("");
export const soloId = signal<string>("");
export const activeLayer = computed(() => doc.value.layers.find((layer) => layer.id === activeId.value) ?? doc.value.layers.at(-1));

interface Entry {
  doc: Doc;
  name: string;
}

/** States before and after this one. What is done within one gesture (a drag of a slider) is one state. */
const past = signal<readonly Entry[]>([]);
const future = signal<readonly Entry[]>([]);
let gesture = "";

export const canUndo = computed(() => past.value.at(-1)?.name ?? "");
export const canRedo = computed(() => future.value.at(-1)?.name ?? "");
/** Counts what was done for good; addresses and the autosave follow it. */
export const commits = signal(0);

/** Change the document. `during` names a gesture whose changes are one step back; `settle` ends it. */
export function change(name: string, next: Doc, during = ""): void {
  if (next === doc.value) return;
  if (!during || during !== gesture) past.value = [...past.value, { doc: doc.value, name }].slice(-MOST_STATES);
  gesture = during;
  future.value = [];
  doc.value = next;
  if (!during) commits.value++;
}

/** A gesture ended. */
export function settle(): void {
  if (!gesture) return;
  gesture = "";
  commits.value++;
}

export function undo(): void {
  const entry = past.value.at(-1);
  if (!entry) return;
  gesture = "";
  future.value = [...future.value, { doc: doc.value, name: entry.name }];
  past.value = past.value.slice(0, -1);
  doc.value = entry.doc;
  commits.value++;
}

export function redo(): void {
  const entry = future.value.at(-1);
  if (!entry) return;
  gesture = "";
  past.value = [...past.value, { doc: doc.value, name: entry.name }];
  future.value = future.value.slice(0, -1);
  doc.value = entry.doc;
  commits.value++;
}

/** Another document altogether, as from an address or a file, without a step back. */
export function load(next: Doc): void {
  gesture = "";
  doc.value = next;
}

export function changeLayer(id: string, name: string, part: Partial<Layer>, during = ""): void {
  const layers = doc.value.layers.map((layer) => (layer.id === id ? { ...layer, ...part } : layer));
  change(name, { ...doc.value, layers }, during);
}

export function setMask(id: string, name: string, data: Bytes | null, size: Size): void {
  changeLayer(id, name, { mask: data === null ? null : makeMask(data, size) });
}

export function addLayer(features: readonly Term[], part: Partial<Layer> = {}): Layer {
  const used = new Set(doc.value.layers.map((layer) => layer.colour));
  const colour = [...Array(COLOURS).keys()].find((one) => !used.has(one)) ?? doc.value.layers.length % COLOURS;
  const layer: Layer = {
    id: newId(), kind: "add", features, amount: 4, unit: "mean", mask: null, steps: null, on: true, colour, locked: false, ...part,
  };
  change("Add a layer", { ...doc.value, layers: [...doc.value.layers, layer] });
  activeId.value = layer.id;
  return layer;
}

export function removeLayer(id: string): void {
  change("Remove a layer", { ...doc.value, layers: doc.value.layers.filter((layer) => layer.id !== id) });
  if (soloId.value === id) soloId.value = "";
}

export function duplicateLayer(id: string): void {
  const at = doc.value.layers.findIndex((layer) => layer.id === id);
  const layer = doc.value.layers[at];
  if (!layer) return;
  const copy = { ...layer, id: newId() };
  change("Duplicate a layer", { ...doc.value, layers: doc.value.layers.toSpliced(at + 1, 0, copy) });
  activeId.value = copy.id;
}

export function moveLayer(id: string, by: number): void {
  const at = doc.value.layers.findIndex((layer) => layer.id === id);
  const layer = doc.value.layers[at];
  const to = at + by;
  if (!layer || to < 0 || to >= doc.value.layers.length) return;
  change("Reorder layers", { ...doc.value, layers: doc.value.layers.toSpliced(at, 1).toSpliced(to, 0, layer) });
}

/** Layers that act: on, or the one that is heard alone. */
export const acting = computed(() =>
  doc.value.layers.filter((layer) => (soloId.value ? layer.id === soloId.value : layer.on)),
);

/** Whether a layer changes nothing, and why; empty where it may. */
export function noEffect(layer: Layer): string {
  if (layer.mask && isEmpty(layer.mask.data)) return "its mask is empty";
  if (layer.kind === "add" && layer.amount === 0) return "its strength is 0";
  if (layer.kind === "scale" && layer.amount === 1) return "a factor of 1 changes nothing";
  return "";
}

export const refOf = (term: Term) => `${term.sae}/${term.index}`;

/** A label's own words, and what it says of them in brackets: "red (color of the thing)". */
export function wordsOf(label: string): [string, string] {
  const found = /^(.+?) \((.+)\)$/.exec(label);
  return found ? [found[1]!, found[2]!] : [label, ""];
}

/** What a layer is about, in words. */
export function nameOf(layer: Layer): string {
  const first = layer.features[0];
  if (!first) return "no feature";
  const name = wordsOf(first.label)[0] || refOf(first);
  return layer.features.length > 1 ? `${name} +${layer.features.length - 1}` : name;
}
