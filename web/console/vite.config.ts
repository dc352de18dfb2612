// Builds the console into the Go package that embeds it. The same sources give the same bytes: file names have no hash in them, since the server
// sends each file with an ETag of its own.
import { defineConfig } from "vite";

export default defineConfig({
  root: import.meta.dirname,
  base: "./",
  build: {
    outDir: "../../internal/console/dist",
    emptyOutDir: true,
    target: "es2022",
    modulePreload: { polyfill: false },
    // Nothing is inlined: the policy allows no styles or scripts within the page.
    assetsInlineLimit: 0,
    rolldownOptions: {
      output: { entryFileNames: "console.js", assetFileNames: "console[extname]", codeSplitting: false },
    },
  },
});
