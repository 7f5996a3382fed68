/** Everything that was made in this browser: put back, branch off, compare, keep or throw away. */
import { useSignal } from "@preact/signals";
import { useRef } from "preact/hooks";
import { BlobImage, Empty, Go, IconButton, Segmented } from "../parts/controls.tsx";
import { Icon } from "../parts/icons.tsx";
import { ShareMenu } from "../parts/share.tsx";
import { nameOf } from "../state/doc.ts";
import { go } from "../state/router.ts";
import { forget, made, star, type Made } from "../state/store.ts";
import { restore } from "../state/studio.ts";
import { openDropped } from "../app.tsx";
import { compareA } from "./compare.tsx";

/** What is different from the one before, in words. */
export function changes(one: Made, parent: Made | undefined): string {
  const acting = one.doc.layers.filter((layer) => layer.on);
  if (!parent) return acting.length ? acting.map(nameOf).join(", ") : "plain";
  const said: string[] = [];
  if (one.run.prompt !== parent.run.prompt) said.push("prompt");
  if (String(one.run.seed) !== String(parent.run.seed)) said.push(`seed ${parent.run.seed} → ${one.run.seed}`);
  if (one.run.steps !== parent.run.steps) said.push(`steps ${parent.run.steps} → ${one.run.steps}`);
  const before = new Map(parent.doc.layers.map((layer) => [layer.id, layer]));
  for (const layer of acting) {
    const old = before.get(layer.id);
    const name = nameOf(layer);
    if (!old) said.push(`+ ${name}`);
    else {
      if (old.amount !== layer.amount) said.push(`${name} ${old.amount} → ${layer.amount}`);
      if (old.kind !== layer.kind) said.push(`${name}: ${layer.kind}`);
      if (old.mask?.png !== layer.mask?.png) said.push(`${name} repainted`);
    }
  }
  for (const layer of parent.doc.layers) if (!acting.some((other) => other.id === layer.id)) said.push(`− ${nameOf(layer)}`);
  return said.join(" · ") || "the same";
}

const when = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });

export function History() {
  const only = useSignal<"all" | "steered" | "starred">("all");
  const file = useRef<HTMLInputElement>(null);
  const byKey = new Map(made.value.map((one) => [one.key, one]));
  const shown = made.value.filter((one) => (only.value === "starred" ? one.starred : only.value === "steered" ? one.run.edits.length : true));
  return (
    <div class="history-grid">
      <div class="bar">
        <Segmented label="Show" value={only.value} options={[["all", "All"], ["steered", "Steered"], ["starred", "Starred"]]} onChange={(next) => (only.value = next)} />
        <span class="quiet">{shown.length} pictures, in this browser alone</span>
        <span class="spread" />
        <button type="button" class="small" onClick={() => file.current?.click()}><Icon name="download" size={15} /><span>Open a file</span></button>
        <input ref={file} type="file" accept=".png,.zip,.json,.yaml,.yml" hidden aria-label="Open a picture, zip or steering file" onChange={(event) => {
          const chosen = event.currentTarget.files?.[0];
          event.currentTarget.value = "";
          if (chosen) void openDropped(chosen);
        }} />
      </div>
      {!shown.length && (
        <Empty icon="history" title={made.value.length ? "None of these" : "Nothing was made yet"}>
          <p>Every picture that you make is kept here, with all that made it. A picture saved from the studio can be dropped anywhere on this page to go on from it.</p>
          <Go to={{ screen: "explore" }} class="button primary">Make one</Go>
        </Empty>
      )}
      <ul class="cards history">
        {shown.map((one) => (
          <li class="card" key={one.key} data-key={one.key}>
            <button type="button" class="card-link" onClick={() => restore(one.doc)} aria-label={`Put back: ${one.run.prompt}, seed ${one.run.seed}`}>
              <BlobImage blob={one.png} alt="" class="thumb" />
              <b>{changes(one, byKey.get(one.parent))}</b>
              <small>{one.run.prompt || "the empty prompt"}</small>
              <small class="quiet">seed {String(one.run.seed)} · {one.run.steps} step{one.run.steps === 1 ? "" : "s"} · {when.format(one.time)}</small>
            </button>
            <div class="card-acts">
              <IconButton icon="star" size={16} label={one.starred ? "Unstar" : "Star"} pressed={one.starred} onClick={() => void star(one.key)} />
              <IconButton icon="compare" size={16} label="Compare with what is on the easel" onClick={() => {
                compareA.value = one;
                go({ screen: "compare" });
              }} />
              <ShareMenu run={one.run} />
              <span class="spread" />
              <IconButton icon="trash" size={16} label="Throw away" onClick={() => void forget(one.key)} />
            </div>
          </li>
        ))}
      </ul>
    </div>
  );
}
