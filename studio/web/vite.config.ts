import { createHash } from "node:crypto";
import { readFileSync, readdirSync } from "node:fs";
import { join, relative } from "node:path";
import { defineConfig, type Plugin } from "vite";

const root = import.meta.dirname;

/** Files that decide what is built, sorted; `tests/studio/test_assets.py` lists them in the same way. */
function sources(): string[] {
  const below = (folder: string): string[] =>
    readdirSync(folder, { withFileTypes: true }).flatMap((entry) => {
      const path = join(folder, entry.name);
      return entry.isDirectory() ? below(path) : [path];
    });
  const named = ["index.html", "package-lock.json", "package.json", "tsconfig.json", "vite.config.ts"];
  return [...named.map((name) => join(root, name)), ...below(join(root, "src"))]
    .map((path) => relative(root, path).replaceAll("\\", "/"))
    .filter((path) => !path.endsWith(".test.ts"))
    .sort();
}

/** Adds the page, and the hash of what it was built from. */
function page(): Plugin {
  return {
    name: "page",
    generateBundle() {
      const hash = createHash("sha256");
      for (const path of sources()) hash.update(`${path}\0`).update(readFileSync(join(root, path))).update("\0");
      const digest = hash.digest("hex");
      const html = readFileSync(join(root, "index.html"), "utf-8").replaceAll("VERSION", digest.slice(0, 12));
      this.emitFile({ type: "asset", fileName: "index.html", source: html });
      this.emitFile({ type: "asset", fileName: "source.sha256", source: `${digest}\n` });
      const icon = readFileSync(join(root, "src", "icon.svg"), "utf-8");
      this.emitFile({ type: "asset", fileName: "icon.svg", source: icon });
    },
  };
}

export default defineConfig({
  plugins: [page()],
  publicDir: false,
  build: {
    outDir: "../turbolens_studio/static",
    emptyOutDir: true,
    target: "es2022",
    cssMinify: true,
    modulePreload: false,
    reportCompressedSize: true,
    rollupOptions: {
      input: join(root, "src", "main.tsx"),
      output: { entryFileNames: "studio.js", chunkFileNames: "[name].js", assetFileNames: "studio[extname]" },
    },
  },
});
