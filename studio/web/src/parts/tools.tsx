/** What the pointer does to a mask, and the keys for it. */
import { signal } from "@preact/signals";
import { grow, invert, type Brush, type Bytes } from "../lib/raster.ts";
import { activeLayer, setMask } from "../state/doc.ts";
import { maskFrom } from "../state/api.ts";
import { decodeGrey } from "../lib/png.ts";
import { base, say, size, wet } from "../state/studio.ts";
import { fromHeat } from "../lib/raster.ts";
import { IconButton, Menu } from "./controls.tsx";
import { Icon, type IconName } from "./icons.tsx";
import { useRef } from "preact/hooks";

export type Tool = "brush" | "box" | "lasso" | "fill" | "move";

export const tool = signal<Tool>("brush");
/** Radius as a share of the picture's width, so that it fits pictures of all sizes. */
export const radiusShare = signal(0.12);
export const brush = signal<Omit<Brush, "radius">>({ hardness: 0.6, value: 1, erase: false });
export const pressureOn = signal(false);
export const brushNow = (): Brush => ({ ...brush.value, radius: Math.max(1, radiusShare.value * size.value.width) });

const TOOLS: readonly (readonly [Tool, IconName, string, string])[] = [
  ["brush", "brush", "Brush", "B"],
  ["box", "box", "Box", "R"],
  ["lasso", "lasso", "Lasso", "L"],
  ["fill", "fill", "Fill", "F"],
  ["move", "move", "Move the mask", "V"],
];

export function cancelStroke(): void {
  wet.value = null;
}

/** The active layer's mask as pixels: all of the picture where it has none, since there it acts everywhere. */
export function maskBefore(): Bytes {
  return activeLayer.value?.mask?.data ?? new Uint8Array(size.value.width * size.value.height);
}

function edit(name: string, act: (mask: Bytes) => Bytes): void {
  const layer = activeLayer.value;
  if (!layer || layer.locked) return;
  setMask(layer.id, name, act(layer.mask?.data ?? new Uint8Array(size.value.width * size.value.height).fill(255)), size.value);
}

export const clearMask = () => activeLayer.value && setMask(activeLayer.value.id, "Clear the mask", null, size.value);
const pixels = () => Math.max(1, Math.round(size.value.width / 64));

export function paintKey(event: KeyboardEvent): void {
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const found = TOOLS.find(([, , , letter]) => letter.toLowerCase() === key);
  if (event.shiftKey && key === "c") clearMask();
  else if (key === "e" || key === "x") brush.value = { ...brush.value, erase: key === "e" ? true : !brush.value.erase };
  else if (found) {
    tool.value = found[0];
    if (key === "b") brush.value = { ...brush.value, erase: false };
  } else if (key === "i") edit("Invert the mask", invert);
  else if (event.key === "{" || (event.shiftKey && event.key === "[")) brush.value = { ...brush.value, hardness: Math.max(0, brush.value.hardness - 0.1) };
  else if (event.key === "}" || (event.shiftKey && event.key === "]")) brush.value = { ...brush.value, hardness: Math.min(1, brush.value.hardness + 0.1) };
  else if (key === "[") radiusShare.value = Math.max(1 / size.value.width, radiusShare.value / 1.15);
  else if (key === "]") radiusShare.value = Math.min(0.5, radiusShare.value * 1.15);
  else if (/^[1-9]$/.test(key)) brush.value = { ...brush.value, value: Number(key) === 9 ? 1 : Number(key) / 9 };
}

export function Tools() {
  const file = useRef<HTMLInputElement>(null);
  const layer = activeLayer.value;
  const disabled = !layer || layer.locked;
  const first = layer?.features[0];
  const own = first && base.value?.blocks.find((block) => block.sae === first.sae);
  return (
    <div class="tools" role="toolbar" aria-label="Painting">
      {TOOLS.map(([one, icon, name, key]) => (
        <IconButton icon={icon} label={name} keys={key} pressed={tool.value === one} disabled={disabled} onClick={() => (tool.value = one)} />
      ))}
      <span class="rule" />
      <IconButton icon="eraser" label="Erase in place of painting" keys="E, X" pressed={brush.value.erase} disabled={disabled}
        onClick={() => (brush.value = { ...brush.value, erase: !brush.value.erase })} />
      <label class="size" title="Size of the brush ([ and ])">
        <span class="hidden">Size of the brush</span>
        <input type="range" min={1} max={50} value={radiusShare.value * 100} onInput={(event) => (radiusShare.value = Number(event.currentTarget.value) / 100)} />
      </label>
      <Menu label="More for the mask" summaryClass="icon-button" summary={<Icon name="more" />}>
          <label>Hardness<input type="range" min={0} max={100} value={brush.value.hardness * 100} onInput={(event) => (brush.value = { ...brush.value, hardness: Number(event.currentTarget.value) / 100 })} /></label>
          <label>Painted<input type="range" min={5} max={100} value={brush.value.value * 100} onInput={(event) => (brush.value = { ...brush.value, value: Number(event.currentTarget.value) / 100 })} /></label>
          <label class="switch"><input type="checkbox" checked={pressureOn.value} onChange={(event) => (pressureOn.value = event.currentTarget.checked)} /> pen's pressure paints</label>
          <hr />
          <button type="button" disabled={disabled} onClick={() => edit("Invert the mask", invert)}>Invert</button>
          <button type="button" disabled={disabled} onClick={() => edit("Grow the mask", (mask) => grow(mask, size.value, pixels()))}>Grow</button>
          <button type="button" disabled={disabled} onClick={() => edit("Shrink the mask", (mask) => grow(mask, size.value, -pixels()))}>Shrink</button>
          <button type="button" disabled={disabled || !own} onClick={() => own && first && edit("Mask from the feature", () =>
            fromHeat(own.heat(first.index), { width: own.width, height: own.height }, size.value, 0.3))}>Where the feature fires</button>
          <button type="button" disabled={disabled} onClick={() => file.current?.click()}>From a picture ...</button>
          <button type="button" disabled={disabled || !layer?.mask} onClick={clearMask}>Clear: whole picture</button>
      </Menu>
      <input ref={file} type="file" accept="image/*" hidden onChange={(event) => {
        const chosen = event.currentTarget.files?.[0];
        event.currentTarget.value = "";
        if (!chosen) return;
        void maskFrom(chosen).then(decodeGrey).then(({ data }) => edit("Mask from a picture", () => data))
          .catch((error: Error) => say(`${chosen.name}: ${error.message}`));
      }} />
    </div>
  );
}
