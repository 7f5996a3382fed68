/** Where the page is: a screen, and what it shows, in the address. Everything is relative to where the page is served. */
import { signal } from "@preact/signals";

export type Screen = "explore" | "features" | "feature" | "paint" | "compare" | "history";

export interface Route {
  screen: Screen;
  /** Of the feature's page. */
  sae: string;
  index: number;
  query: Readonly<Record<string, string>>;
  /** Packed layers. */
  fragment: string;
}

const SCREENS: readonly Screen[] = ["explore", "features", "paint", "compare", "history"];
const root = new URL(document.baseURI).pathname;

export function parse(address: URL): Route {
  const parts = address.pathname.slice(root.length).split("/").filter(Boolean).map(decodeURIComponent);
  const query = Object.fromEntries(address.searchParams);
  const fragment = new URLSearchParams(address.hash.slice(1)).get("s") ?? "";
  const [first, sae, index] = parts;
  if (first === "features" && sae !== undefined) return { screen: "feature", sae, index: Number(index ?? 0), query, fragment };
  return { screen: SCREENS.find((one) => one === first) ?? "explore", sae: "", index: 0, query, fragment };
}

export function write(to: Pick<Route, "screen" | "query"> & Partial<Route>): string {
  const path = to.screen === "feature" ? `features/${encodeURIComponent(to.sae ?? "")}/${to.index ?? 0}` : to.screen;
  const query = new URLSearchParams(Object.entries(to.query).filter(([, value]) => value !== ""));
  return `${root}${path}${query.size ? `?${query}` : ""}${to.fragment ? `#s=${to.fragment}` : ""}`;
}

export const route = signal<Route>(parse(new URL(location.href)));

/** Settings of the document travel along with every screen; what a screen adds of its own does not. */
const SHARED = ["prompt", "seed", "steps"];

export function sharedQuery(): Record<string, string> {
  return Object.fromEntries(Object.entries(route.value.query).filter(([name]) => SHARED.includes(name)));
}

export function go(to: Partial<Route> & { screen: Screen }, how: "push" | "replace" = "push"): void {
  const next: Route = {
    sae: to.sae ?? "", index: to.index ?? 0, screen: to.screen,
    query: { ...sharedQuery(), ...to.query }, fragment: to.fragment ?? route.value.fragment,
  };
  const address = write(next);
  if (address === location.pathname + location.search + location.hash) how = "replace";
  history[how === "push" ? "pushState" : "replaceState"](history.state, "", address);
  const moved = next.screen !== route.value.screen || next.index !== route.value.index || next.sae !== route.value.sae;
  route.value = next;
  if (moved) {
    scrollTo(0, 0);
    document.getElementById("main")?.focus({ preventScroll: true });
  }
}

/** Change what the screen shows, in place. */
export function setQuery(part: Record<string, string>, how: "push" | "replace" = "replace"): void {
  go({ ...route.value, query: { ...route.value.query, ...part } }, how);
}

export const hrefOf = (to: Partial<Route> & { screen: Screen }) =>
  write({ sae: "", index: 0, fragment: route.value.fragment, ...to, query: { ...sharedQuery(), ...to.query } });
