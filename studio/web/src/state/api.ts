/** What the studio's server answers, typed; an error says which field is wrong. */
import type { EditJson, ModelJson } from "../contract.ts";
import type { Run } from "./wire.ts";

export interface Violation {
  field: string;
  description: string;
}

export interface Refusal {
  code: string;
  message: string;
  violations: Violation[];
  retryAfter?: number | null;
}

export class ApiError extends Error {
  readonly refusal: Refusal;

  constructor(refusal: Refusal) {
    super(refusal.message);
    this.refusal = refusal;
  }
}

export interface Brief {
  sae: string;
  index: number;
  label: string;
  labelScore: number;
  frequency: number;
  mean: number;
  max: number;
  attribute: string;
  match?: number;
  reason?: string;
  inside?: number;
  outside?: number;
  effect?: number;
  together?: number;
  cosine?: number;
}

export interface Example {
  prompt: string;
  seed: string;
  steps: number;
  step: number;
  y: number;
  x: number;
  activation: number;
}

export interface Known extends Brief {
  /** Of `replace` on the empty prompt, where something shows; null: at none that was tried, or nobody looked. */
  iconStrength: number | null;
  labels: { attribute: string; value: string; region: string; score: number }[];
  examples: Example[];
}

export interface Sampled {
  state: "measuring" | "measured" | "none";
  done?: number;
  of?: number;
  runs?: number;
  cells?: number;
  active?: number;
  counts?: number[];
  top?: number;
  together?: Brief[];
}

export interface Numbers {
  equal: boolean;
  mean: number;
  max: number;
  changed: number;
  psnr: number | null;
  inside?: number | null;
  outside?: number | null;
}

export interface Listing {
  features: Brief[];
  total: number;
  attributes: Record<string, number>;
}

export interface Opened {
  prompt: string;
  seed: string;
  steps: number | null;
  edits: EditJson[];
}

const LOST: Refusal = { code: "UNAVAILABLE", message: "The studio itself does not answer.", violations: [] };

async function call(path: string, init?: RequestInit): Promise<Response> {
  const answer = await fetch(`api/${path}`, init).catch((error: unknown) => {
    if (error instanceof DOMException && error.name === "AbortError") throw error;
    throw new ApiError(LOST);
  });
  if (answer.ok) return answer;
  const body = (await answer.json().catch(() => null)) as { error?: Refusal } | null;
  throw new ApiError(body?.error ?? { ...LOST, message: `The studio answered ${answer.status}.` });
}

const json = async <T>(path: string, init?: RequestInit) => (await (await call(path, init)).json()) as T;
const post = (body: unknown): RequestInit => ({
  method: "POST", body: JSON.stringify(body), headers: { "content-type": "application/json" },
});

export const getModel = () => json<ModelJson>("model");
export const getFeatures = (query: Record<string, string>, signal?: AbortSignal) =>
  json<Listing>(`features?${new URLSearchParams(query)}`, signal ? { signal } : undefined);
export const getFeature = (sae: string, index: number) => json<Known>(`features/${encodeURIComponent(sae)}/${index}`);
export const getSampled = (sae: string, index: number) => json<Sampled>(`sampled/${encodeURIComponent(sae)}/${index}`);
export const getNearest = (sae: string, index: number) =>
  json<{ features: Brief[] }>(`nearest/${encodeURIComponent(sae)}/${index}`);
export const getThumb = async (sae: string, index: number, signal: AbortSignal) =>
  (await call(`thumbs/${encodeURIComponent(sae)}/${index}`, { signal })).blob();
export const contrast = (run: Run, region: string) => json<{ features: Brief[] }>("contrast", post({ run, region }));
export const compare = (a: Run, b: Run, mask?: string) => json<Numbers>("compare", post({ a, b, ...(mask ? { mask } : {}) }));
export const difference = async (a: Run, b: Run, gain: number) => (await call("difference", post({ a, b, gain }))).blob();
export const exportAs = async (run: Run, as: "png" | "zip" | "json" | "yaml" | "python") => (await call("export", post({ run, as }))).blob();
export const openFile = (file: Blob) => json<Opened>("open", { method: "POST", body: file });
export const maskFrom = async (file: Blob) => new Uint8Array(await (await call("mask", { method: "POST", body: file })).arrayBuffer());
