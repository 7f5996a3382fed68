/** The socket to the studio: runs go out, pictures come back, and it comes back by itself when it is lost. */
import { signal } from "@preact/signals";
import { Block, type Part } from "../lib/heat.ts";
import type { Brief, Refusal } from "./api.ts";
import type { Run } from "./wire.ts";

export interface ServerState {
  state: "connecting" | "ready" | "lost" | "no-studio";
  detail: string;
  target: string;
  generation: number;
}

export const server = signal<ServerState>({ state: "connecting", detail: "", target: "", generation: 0 });

export interface Picture {
  index: number;
  /** Of the run. */
  key: string;
  /** By its pixels: equal pictures have one name. */
  name: string;
  width: number;
  height: number;
  png: Blob;
  bitmap: ImageBitmap;
  blocks: Block[];
  known: Record<string, Brief>;
  warnings: { code: string; message: string }[];
  cached: boolean;
  times: Times;
}

/** Milliseconds of a picture's way: asking, the server's part, the studio's part, and all of it until it was decoded. */
export interface Times {
  server: number;
  studio: number;
  all: number;
}

export interface Listener {
  queued?(position: number): void;
  step?(step: number, steps: number, preview: ImageBitmap | null): void;
  picture?(picture: Picture): void;
  done?(): void;
  cancelled?(): void;
  error?(refusal: Refusal): void;
}

interface Asked {
  rev: number;
  runs: Run[];
  listener: Listener;
  sent: number;
}

let socket: WebSocket | null = null;
let attempts = 0;
let lastRev = 0;
const lanes = new Map<string, Lane>();

/** Counts what was sent and what is being made, for the page's tests and its status line. */
export const traffic = signal({ sent: 0, running: 0 });

/** Runs for one purpose: one is being made, one waits, the newest wins. */
export class Lane {
  readonly name: string;
  private now: Asked | null = null;
  private next: Asked | null = null;
  private inLine = false;
  private heard: Promise<void> = Promise.resolve();
  readonly busy = signal(false);
  readonly position = signal(0);

  constructor(name: string) {
    this.name = name;
    lanes.set(name, this);
  }

  /** What only waits in the server's line, and a sweep, is given up for what is newer; what runs only where `hurry` says so. */
  run(runs: Run[], listener: Listener, hurry = false): void {
    this.next?.listener.cancelled?.();
    this.next = { rev: ++lastRev, runs, listener, sent: 0 };
    if (!this.now || this.inLine) this.send();
    else if (hurry) socket?.send(JSON.stringify({ kind: "cancel", lane: this.name })); // what waits is sent at its end
  }

  cancel(): void {
    this.next?.listener.cancelled?.();
    this.next = null;
    if (this.now) socket?.send(JSON.stringify({ kind: "cancel", lane: this.name }));
  }

  private send(): void {
    const asked = this.next;
    if (!asked || socket?.readyState !== WebSocket.OPEN || server.value.state !== "ready") return;
    this.now?.listener.cancelled?.();
    [this.now, this.next] = [asked, null];
    this.inLine = asked.runs.length > 1;
    this.busy.value = true;
    this.position.value = 0;
    asked.sent = performance.now();
    traffic.value = { ...traffic.value, sent: traffic.value.sent + asked.runs.length };
    socket.send(JSON.stringify({ kind: "run", lane: this.name, rev: asked.rev, runs: asked.runs }));
  }

  /** What was being made when the connection went is made again. */
  resume(): void {
    if (this.now && !this.next) this.next = this.now;
    this.now = null;
    this.send();
    if (!this.now) this.busy.value = false;
  }

  /** Answers are taken in order: decoding one picture must not let the next answer overtake it. */
  hear(header: Header, parts: ArrayBuffer[]): void {
    this.heard = this.heard.then(() => this.take(header, parts)).catch((error: unknown) => console.error(error));
  }

  private async take(header: Header, parts: ArrayBuffer[]): Promise<void> {
    const asked = this.now;
    if (!asked || header.rev !== asked.rev) return; // an answer to what nobody waits for any more
    const { listener } = asked;
    if (header.kind === "queued") {
      this.position.value = header.position;
      if (asked.runs.length === 1) this.inLine = header.position > 0;
      listener.queued?.(header.position);
      if (this.inLine && this.next) this.send();
    } else if (header.kind === "step") {
      if (asked.runs.length === 1) this.inLine = false;
      const preview = parts[0] ? await createImageBitmap(new Blob([parts[0]], { type: "image/png" })) : null;
      if (this.now === asked) listener.step?.(header.step, header.steps, preview);
    } else if (header.kind === "picture") {
      const picture = await pictureOf(header, parts, asked.sent);
      if (this.now === asked) listener.picture?.(picture);
      if (this.now === asked && asked.runs.length === 1) this.end(() => listener.done?.());
    } else if (header.kind === "done") {
      this.end(() => listener.done?.());
    } else if (header.kind === "cancelled") {
      this.end(() => listener.cancelled?.());
    } else if (header.kind === "error") {
      if (header.error.code === "UNAVAILABLE" && !this.next) this.next = asked; // once the server is there again
      else listener.error?.(header.error);
      this.end(() => undefined);
    }
  }

  private end(tell: () => void): void {
    this.now = null;
    this.inLine = false;
    this.busy.value = false;
    this.position.value = 0;
    tell();
    this.send();
  }
}

interface Place {
  lane: string;
  rev: number;
  parts: [number, number][];
}
type PictureHeader = Place & {
  kind: "picture";
  index: number;
  key: string;
  name: string;
  width: number;
  height: number;
  cached: boolean;
  warnings: { code: string; message: string }[];
  features?: { sae: string; step: number; height: number; width: number; size: number; count: number }[];
  known?: Record<string, Brief>;
  serverMs: number;
  studioMs: number;
};
type Header =
  | (Place & ServerState & { kind: "state" })
  | (Place & { kind: "queued"; position: number })
  | (Place & { kind: "step"; step: number; steps: number })
  | PictureHeader
  | (Place & { kind: "done" })
  | (Place & { kind: "cancelled" })
  | (Place & { kind: "error"; error: Refusal });

async function pictureOf(header: PictureHeader, parts: ArrayBuffer[], sent: number): Promise<Picture> {
  const png = new Blob([parts[0]!], { type: "image/png" });
  const bitmap = await createImageBitmap(png);
  const saes = new Map<string, Part[]>();
  header.features?.forEach(({ count, ...about }, i) => {
    const bytes = parts[i + 1]!;
    const part: Part = {
      ...about,
      rows: new Uint32Array(bytes, 0, count),
      indices: new Uint32Array(bytes, 4 * count, count),
      values: new Float32Array(bytes, 8 * count, count),
    };
    saes.set(about.sae, [...(saes.get(about.sae) ?? []), part]);
  });
  const { index, key, name, width, height, warnings, cached } = header;
  return {
    index, key, name, width, height, warnings, cached, png, bitmap,
    blocks: [...saes.values()].map((own) => new Block(own)),
    known: header.known ?? {},
    times: { server: header.serverMs, studio: header.studioMs, all: performance.now() - sent },
  };
}

function unpack(data: ArrayBuffer): [Header, ArrayBuffer[]] {
  const length = new DataView(data).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, length))) as Header;
  return [header, header.parts.map(([at, size]) => data.slice(4 + length + at, 4 + length + at + size))];
}

/** Connect, now and whenever the connection is lost. */
export function connect(): void {
  const address = new URL("api/live", document.baseURI);
  address.protocol = address.protocol.replace("http", "ws");
  const own = new WebSocket(address);
  own.binaryType = "arraybuffer";
  socket = own;
  own.onmessage = (event: MessageEvent<ArrayBuffer>) => {
    const [header, parts] = unpack(event.data);
    if (header.kind === "state") {
      attempts = 0;
      const before = server.value.state;
      const { state, detail, target, generation } = header;
      server.value = { state, detail, target, generation };
      if (state === "ready" && before !== "ready") lanes.forEach((lane) => lane.resume());
    } else lanes.get(header.lane)?.hear(header, parts);
  };
  own.onclose = () => {
    if (socket !== own) return;
    server.value = { ...server.value, state: "no-studio", detail: "The studio's own process does not answer." };
    lanes.forEach((lane) => lane.busy.value && (lane.busy.value = false));
    setTimeout(connect, Math.min(4000, 250 * 2 ** attempts++));
  };
}
