// Builds the console reproducibly into the Go package that embeds it. File names contain no hash, since the server
// sends each file with an ETag.
import { defineConfig } from "vite";

export default defineConfig({
  root: import.meta.dirname,
  base: "./",
  build: {
    outDir: "../../internal/console/dist",
    emptyOutDir: true,
    target: "es2022",
    modulePreload: { polyfill: false },
    // Inline nothing: the content security policy forbids inline styles and scripts.
    assetsInlineLimit: 0,
    rolldownOptions: {
      output: { entryFileNames: "console.js", assetFileNames: "console[extname]", codeSplitting: false },
    },
  },
});
