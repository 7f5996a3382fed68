/** What stays in this browser: everything that was made, and what was being worked on. */
import { signal } from "@preact/signals";
import type { Doc, Layer } from "./doc.ts";
import type { Picture } from "./live.ts";
import { runOf, type Run } from "./wire.ts";

export interface Made {
  /** Of the run: the same run made twice is one entry. */
  key: string;
  name: string;
  run: Run;
  doc: Doc;
  png: Blob;
  time: number;
  starred: boolean;
  /** Key of what was on the screen before it. */
  parent: string;
}

const NAME = "turbolens-studio";
const MOST_KEPT = 500;

export const made = signal<readonly Made[]>([]);

let opened: Promise<IDBDatabase> | null = null;

function database(): Promise<IDBDatabase> {
  opened ??= new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("made", { keyPath: "key" });
      request.result.createObjectStore("work");
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error ?? new Error("no storage"));
  });
  return opened;
}

async function inStore<T>(store: "made" | "work", mode: IDBTransactionMode, act: (store: IDBObjectStore) => IDBRequest<T>): Promise<T> {
  const transaction = (await database()).transaction(store, mode);
  return new Promise((resolve, reject) => {
    const request = act(transaction.objectStore(store));
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error ?? new Error("storage failed"));
  });
}

export async function readMade(): Promise<void> {
  const all = await inStore<Made[]>("made", "readonly", (store) => store.getAll());
  made.value = all.sort((a, b) => b.time - a.time);
}

export async function keep(picture: Picture, doc: Doc, layers: readonly Layer[], parent: string): Promise<void> {
  const known = made.value.find((one) => one.key === picture.key);
  const entry: Made = {
    key: picture.key, name: picture.name, run: runOf(doc, layers), doc, png: picture.png, time: Date.now(),
    starred: known?.starred ?? false, parent: known?.parent ?? (parent === picture.key ? "" : parent),
  };
  const rest = made.value.filter((one) => one.key !== picture.key);
  made.value = [entry, ...rest];
  await inStore("made", "readwrite", (store) => store.put(entry));
  for (const old of made.value.slice(MOST_KEPT).filter((one) => !one.starred)) await forget(old.key);
}

export async function star(key: string): Promise<void> {
  const entry = made.value.find((one) => one.key === key);
  if (!entry) return;
  const next = { ...entry, starred: !entry.starred };
  made.value = made.value.map((one) => (one.key === key ? next : one));
  await inStore("made", "readwrite", (store) => store.put(next));
}

export async function forget(key: string): Promise<void> {
  made.value = made.value.filter((one) => one.key !== key);
  await inStore("made", "readwrite", (store) => store.delete(key));
}

export const saveWork = (doc: Doc) => inStore("work", "readwrite", (store) => store.put(doc, "doc"));
export const readWork = () => inStore<Doc | undefined>("work", "readonly", (store) => store.get("doc"));
