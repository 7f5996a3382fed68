/** Several edits painted over a picture, and the picture that follows. */
import { computed, signal } from "@preact/signals";
import { useEffect } from "preact/hooks";
import type { View } from "../lib/view.ts";
import { IconButton, Segmented } from "../parts/controls.tsx";
import { Icon } from "../parts/icons.tsx";
import { LayerPanel } from "../parts/layers.tsx";
import { PaintStage } from "../parts/paintstage.tsx";
import { brush, cancelStroke, paintKey, Tools } from "../parts/tools.tsx";
import { activeId, activeLayer, canRedo, canUndo, doc, moveLayer, noEffect, redo, undo } from "../state/doc.ts";
import { apply, base, live, preview, result, settled, type Live } from "../state/studio.ts";
import { ShareMenu } from "../parts/share.tsx";
import { keysOn } from "./keys.tsx";

export const view = signal<View | null>(null);
/** Held down: the plain picture in place of the steered one. */
const holding = signal(false);
const narrowShows = signal<"result" | "plain">("result");
export const sees = signal(false);

const shown = computed(() => (holding.value ? base.value : result.value ?? base.value));

function onKey(event: KeyboardEvent): void {
  const target = event.target as HTMLElement;
  if (!keysOn.value || target.closest("dialog") || target.matches("input:not([type=range]), textarea, select")) return;
  const command = event.ctrlKey || event.metaKey;
  if (command && event.key.toLowerCase() === "z") {
    event.preventDefault();
    if (event.shiftKey) redo();
    else undo();
  } else if (command && event.key.toLowerCase() === "y") {
    event.preventDefault();
    redo();
  } else if (command) return;
  else if (event.altKey && (event.key === "ArrowUp" || event.key === "ArrowDown")) {
    event.preventDefault();
    const at = doc.value.layers.findIndex((layer) => layer.id === activeLayer.value?.id) + (event.key === "ArrowUp" ? -1 : 1);
    const next = doc.value.layers[at];
    if (next && event.shiftKey && activeLayer.value) moveLayer(activeLayer.value.id, event.key === "ArrowUp" ? -1 : 1);
    else if (next) activeId.value = next.id;
  } else if (event.key === "\\") holding.value = true;
  else if (event.key === "g" || event.key === "G") sees.value = !sees.value;
  else if (event.key === "0") view.value = null;
  else if (event.key === "Escape") cancelStroke();
  else if (event.key === "Enter" && !target.matches("button, a, summary, [role=radio]")) apply();
  else paintKey(event);
}

export function Paint() {
  useEffect(() => {
    const lift = (event: KeyboardEvent) => event.key === "\\" && (holding.value = false);
    const drop = () => (holding.value = false);
    addEventListener("keydown", onKey);
    addEventListener("keyup", lift);
    addEventListener("blur", drop);
    return () => {
      removeEventListener("keydown", onKey);
      removeEventListener("keyup", lift);
      removeEventListener("blur", drop);
      cancelStroke();
    };
  }, []);
  const layer = activeLayer.value;
  const nothing = doc.value.layers.length > 0 && doc.value.layers.every((one) => !one.on || noEffect(one));
  const why = layer && noEffect(layer);
  return (
    <div class={`paint-grid shows-${narrowShows.value}`}>
      <section class="easel" aria-label="Picture">
        <div class="easel-bar">
          <Tools />
          <div class="spread" />
          <IconButton icon="undo" label={canUndo.value ? `Undo: ${canUndo.value}` : "Undo"} keys="Ctrl Z" disabled={!canUndo.value} onClick={undo} />
          <IconButton icon="redo" label={canRedo.value ? `Redo: ${canRedo.value}` : "Redo"} keys="Ctrl Shift Z" disabled={!canRedo.value} onClick={redo} />
          <IconButton icon="grid" label="Show what the model sees" keys="G" pressed={sees.value} onClick={() => (sees.value = !sees.value)} />
          <IconButton icon="fit" label="Whole picture" keys="0" onClick={() => (view.value = null)} />
        </div>
        <div class="canvases">
          <figure class="canvas plain">
            <figcaption>Plain</figcaption>
            <PaintStage picture={preview.value?.bitmap ?? base.value?.bitmap ?? null} view={view} sees={sees.value} masks="shown" label="Plain picture, to paint on" />
          </figure>
          <figure class="canvas result">
            <figcaption>
              {holding.value ? "Plain" : "Steered"}
              {!settled.value && <em>not yet this mask</em>}
              {(nothing || why) && doc.value.layers.length > 0 && <em class="no-effect">no effect{why ? `: ${why}` : ""}</em>}
            </figcaption>
            <PaintStage picture={shown.value?.bitmap ?? null} view={view} sees={sees.value} masks="while" label="Steered picture, to paint on" />
          </figure>
        </div>
        <div class="easel-foot">
          <Segmented<"result" | "plain"> label="Picture shown" value={narrowShows.value} options={[["result", "Steered"], ["plain", "Plain"]]} onChange={(next) => (narrowShows.value = next)} />
          <Segmented<Live> label="Draw anew" value={live.value} options={[["while", "while I paint"], ["after", "after each stroke"], ["off", "when I say"]]}
            onChange={(next) => {
              live.value = next;
              if (next !== "off" && !settled.value) apply();
            }} />
          {live.value === "off" && <button type="button" class="small primary" onClick={apply}><Icon name="play" size={15} /><span>Apply</span></button>}
          <div class="spread" />
          <button type="button" class="small hold" onPointerDown={() => (holding.value = true)} onPointerUp={() => (holding.value = false)}
            onPointerLeave={() => (holding.value = false)} onClick={(event) => event.detail === 0 && (holding.value = !holding.value)} aria-pressed={holding.value}>
            Hold to see the plain one
          </button>
          <ShareMenu />
        </div>
        <p class="note">
          {layer
            ? layer.mask
              ? `Paint says where this layer acts: ${brush.value.erase ? "erasing" : "adding to"} its mask.`
              : "This layer acts on the whole picture. Paint to say where it acts."
            : "Add a layer to begin."}{" "}
          {doc.value.layers.length > 1 && "Where layers overlap, each acts on what the one above it in the list left."}
        </p>
      </section>
      <LayerPanel />
    </div>
  );
}
