/** A picture to paint on: strokes go into the active layer's mask. */
import { signal, type Signal } from "@preact/signals";
import { useRef, useState } from "preact/hooks";
import { box, cell as fillCell, coverage, fill, move, polygon, stroke, type Bytes, type Point, type Size } from "../lib/raster.ts";
import type { View } from "../lib/view.ts";
import { activeLayer, doc, setMask } from "../state/doc.ts";
import { gridOf, live, result, say, size, wet } from "../state/studio.ts";
import { drawCell, drawCoverage, drawMask, layerColour } from "./overlay.ts";
import { Stage, type Pointed } from "./stage.tsx";
import { brush, brushNow, maskBefore, pressureOn, radiusShare, tool } from "./tools.tsx";

interface Stroke {
  before: Bytes;
  points: Point[];
  value: number;
}

/** The cell that keys act on; shared by the two pictures. */
const cursor = signal<{ column: number; row: number } | null>(null);

export function PaintStage(props: {
  picture: ImageBitmap | null;
  view: Signal<View | null>;
  sees: boolean;
  /** Masks are always shown, or only while one is painted, since they hide the picture. */
  masks: "shown" | "while";
  label: string;
}) {
  const painting = useRef<Stroke | null>(null);
  const [pointer, setPointer] = useState<Point | null>(null);
  const [focused, setFocused] = useState(false);
  const layer = activeLayer.value;
  const grid: Size = gridOf(layer?.features[0]?.sae ?? "");
  const able = Boolean(layer && !layer.locked && layer.features.length);

  const painted = (of: Stroke): Bytes => {
    const now = { ...brushNow(), value: of.value };
    const [first, last] = [of.points[0]!, of.points.at(-1)!];
    if (tool.value === "brush") return stroke(of.before, size.value, of.points, now);
    if (tool.value === "box") return box(of.before, size.value, first, last, now.value, now.erase);
    if (tool.value === "lasso") return polygon(of.before, size.value, of.points, now.value, now.erase);
    if (tool.value === "move") return move(of.before, size.value, last.x - first.x, last.y - first.y);
    return fill(of.before, size.value, first, now.value, now.erase);
  };

  const down = ({ at, pressure }: Pointed): boolean => {
    if (!able || !layer) {
      if (layer?.locked) say("This layer is locked.");
      return false;
    }
    painting.current = { before: maskBefore(), points: [at], value: brush.value.value * (pressureOn.value ? pressure : 1) };
    wet.value = { id: layer.id, data: painted(painting.current) };
    cursor.value = null;
    return true;
  };

  const moved = ({ at, path }: Pointed): void => {
    setPointer(at);
    const now = painting.current;
    if (!now || !wet.value || !layer) return;
    now.points.push(...path);
    wet.value = { id: layer.id, data: painted(now) };
  };

  const up = (pointed: Pointed | null): void => {
    const now = painting.current;
    painting.current = null;
    const data = wet.value?.data;
    wet.value = null;
    if (!now || !data || !pointed || !layer) return;
    performance.clearMarks("stroke-end");
    performance.mark("stroke-end");
    setMask(layer.id, tool.value === "move" ? "Move the mask" : brush.value.erase ? "Erase" : "Paint", data, size.value);
  };

  const key = (event: KeyboardEvent): void => {
    const by = ({ ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] } as Record<string, [number, number]>)[event.key];
    if (event.altKey) return;
    if (event.key === "Escape") {
      painting.current = null;
      wet.value = null;
      return;
    }
    if (!by && event.key !== " ") return;
    event.preventDefault();
    event.stopPropagation();
    const at = cursor.value ?? { column: 0, row: 0 };
    if (by && cursor.value) {
      cursor.value = {
        column: Math.min(grid.width - 1, Math.max(0, at.column + by[0])),
        row: Math.min(grid.height - 1, Math.max(0, at.row + by[1])),
      };
    } else if (!cursor.value) cursor.value = at;
    if (!able || !layer || (by && !event.shiftKey)) return;
    const { column, row } = cursor.value!;
    const covered = coverage(maskBefore(), size.value, grid)[row * grid.width + column]! > 0.5;
    const value = event.shiftKey ? (brush.value.erase ? 0 : brush.value.value) : covered ? 0 : brush.value.value;
    setMask(layer.id, value ? "Paint a cell" : "Clear a cell", fillCell(maskBefore(), size.value, grid, column, row, value), size.value);
  };

  const maskNow = (id: string, own: Bytes | null): Bytes | null => (wet.value?.id === id ? wet.value.data : own);
  const says = cursor.value && layer
    ? `Row ${cursor.value.row + 1}, column ${cursor.value.column + 1} of ${grid.width}: ${
        layer.mask ? `${Math.round(100 * coverage(layer.mask.data, size.value, grid)[cursor.value.row * grid.width + cursor.value.column]!)} % covered` : "whole picture"}`
    : "";

  return (
    <div class="paint-stage" onFocusIn={() => setFocused(true)} onFocusOut={() => setFocused(false)}>
      <Stage
        picture={props.picture}
        size={size.value}
        view={props.view}
        label={`${props.label}; arrows walk over cells, Space paints one`}
        cursor={able ? (tool.value === "brush" ? "none" : tool.value === "move" ? "move" : "crosshair") : "grab"}
        depends={[doc.value, layer, wet.value, props.sees, pointer, cursor.value, focused, tool.value, radiusShare.value, brush.value, result.value, live.value]}
        onDown={down}
        onMove={moved}
        onUp={up}
        onLeave={() => setPointer(null)}
        onKeyDown={key}
        onWheel={(event) => {
          if (!event.ctrlKey || tool.value !== "brush") return false;
          radiusShare.value = Math.min(0.5, Math.max(1 / size.value.width, radiusShare.value * Math.exp(-event.deltaY / 400)));
          return true;
        }}
        draw={(context, place, ratio, scale) => {
          const shows = props.masks === "shown" || wet.value !== null;
          for (const one of doc.value.layers) {
            const mask = maskNow(one.id, one.mask?.data ?? null);
            const active = one.id === layer?.id;
            if (!mask || (!active && !one.on) || !(shows || (active && props.sees))) continue;
            if (active && props.sees) drawCoverage(context, coverage(mask, size.value, grid), grid, size.value, place, layerColour(one.colour), ratio);
            else if (shows) drawMask(context, mask, size.value, place, layerColour(one.colour), active ? 0.62 : 0.28);
          }
          if (props.sees && layer && !layer.mask && !wet.value) drawCoverage(context, new Float64Array(grid.width * grid.height).fill(1), grid, size.value, place, layerColour(layer.colour), ratio);
          if (cursor.value && focused) drawCell(context, cursor.value.column, cursor.value.row, grid, size.value, place, ratio);
          if (pointer && able && tool.value === "brush") {
            const at = place(pointer);
            for (const [style, width] of [["#000a", 3], ["#fff", 1.5]] as const) {
              context.beginPath();
              context.arc(at.x, at.y, brushNow().radius * scale * ratio, 0, 2 * Math.PI);
              context.strokeStyle = style;
              context.lineWidth = width * ratio;
              context.setLineDash(brush.value.erase ? [4 * ratio, 4 * ratio] : []);
              context.stroke();
            }
            context.setLineDash([]);
          }
        }}
      >
        {!props.picture && <div class="stage-wait loading" />}
      </Stage>
      <span class="hidden" aria-live="polite">{focused ? says : ""}</span>
    </div>
  );
}
