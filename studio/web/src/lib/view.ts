/**
 * The one place where pixels of the screen and of the picture meet.
 *
 * CSS pixels of an element -> fractions of the picture -> pixels of the picture or cells of a grid. Device pixels are
 * the canvas's alone: its drawing context is scaled once.
 */
import type { Point, Size } from "./raster.ts";

export interface View {
  /** CSS pixels a pixel of the picture. */
  scale: number;
  /** Where the picture's corner is, in CSS pixels from the element's. */
  x: number;
  y: number;
}

export const MIN_ZOOM = 0.25;
export const MAX_ZOOM = 32;

/** The whole picture in the middle of an element. */
export function fit(picture: Size, element: Size, margin = 0): View {
  const scale = Math.max(
    0.01,
    Math.min((element.width - 2 * margin) / picture.width, (element.height - 2 * margin) / picture.height),
  );
  return { scale, x: (element.width - picture.width * scale) / 2, y: (element.height - picture.height * scale) / 2 };
}

export const toPicture = (view: View, at: Point): Point => ({ x: (at.x - view.x) / view.scale, y: (at.y - view.y) / view.scale });
export const toElement = (view: View, at: Point): Point => ({ x: at.x * view.scale + view.x, y: at.y * view.scale + view.y });

/** Larger or smaller about a point of the element, which stays where it is. */
export function zoom(view: View, factor: number, about: Point): View {
  const scale = Math.min(MAX_ZOOM, Math.max(MIN_ZOOM, view.scale * factor));
  const ratio = scale / view.scale;
  return { scale, x: about.x - (about.x - view.x) * ratio, y: about.y - (about.y - view.y) * ratio };
}

export const pan = (view: View, dx: number, dy: number): View => ({ ...view, x: view.x + dx, y: view.y + dy });

/** The cell of a grid under a point of the picture; null outside. */
export function cellAt(at: Point, picture: Size, grid: Size): { column: number; row: number } | null {
  const column = Math.floor((at.x / picture.width) * grid.width);
  const row = Math.floor((at.y / picture.height) * grid.height);
  return column >= 0 && row >= 0 && column < grid.width && row < grid.height ? { column, row } : null;
}
