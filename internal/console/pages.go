package console

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"embed"
	"fmt"
	"io/fs"
	"mime"
	"net/http"
	"path"
	"strconv"
	"strings"
)

// The built pages. `make console` builds them from web/console, and `make lint` fails if they are out of date.
//
//go:embed dist
var dist embed.FS

// Prefix is where the pages are served.
const Prefix = "/console/"

// policy lets the pages load their own files and call their own server. It forbids other origins, inline scripts and
// embedding in frames. uPlot sets its styles through the CSSOM, to which a policy does not apply.
const policy = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; " +
	"form-action 'none'; base-uri 'none'; frame-ancestors 'none'"

// page is a file, ready to be sent.
type page struct {
	kind, tag   string
	plain, gzip []byte
}

// Pages serves the console's files, which it compresses once.
func Pages() http.Handler {
	pages := map[string]*page{}
	err := fs.WalkDir(dist, "dist", func(name string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		content, err := dist.ReadFile(name)
		if err == nil {
			pages[strings.TrimPrefix(name, "dist/")], err = newPage(name, content)
		}
		return err
	})
	if err != nil || pages["index.html"] == nil {
		panic(fmt.Sprintf("console: the embedded pages are broken: %v", err))
	}
	pages[""] = pages["index.html"]
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		found := pages[strings.TrimPrefix(r.URL.Path, Prefix)]
		if found == nil {
			http.NotFound(w, r)
			return
		}
		found.serve(w, r)
	})
}

func newPage(name string, content []byte) (*page, error) {
	var packed bytes.Buffer
	writer, err := gzip.NewWriterLevel(&packed, gzip.BestCompression)
	if err == nil {
		_, err = writer.Write(content)
	}
	if err == nil {
		err = writer.Close()
	}
	kind, tag := mime.TypeByExtension(path.Ext(name)), fmt.Sprintf(`"%.16x"`, sha256.Sum256(content))
	return &page{kind, tag, content, packed.Bytes()}, err
}

func (p *page) serve(w http.ResponseWriter, r *http.Request) {
	header := w.Header()
	header.Set("Content-Security-Policy", policy)
	header.Set("X-Frame-Options", "DENY")
	header.Set("Cross-Origin-Opener-Policy", "same-origin")
	header.Set("Cache-Control", "no-cache") // browsers revalidate each time, and get 304
	header.Set("ETag", p.tag)
	header.Set("Vary", "Accept-Encoding")
	if r.Header.Get("If-None-Match") == p.tag {
		w.WriteHeader(http.StatusNotModified)
		return
	}
	header.Set("Content-Type", p.kind)
	body := p.plain
	if strings.Contains(r.Header.Get("Accept-Encoding"), "gzip") {
		body = p.gzip
		header.Set("Content-Encoding", "gzip")
	}
	header.Set("Content-Length", strconv.Itoa(len(body)))
	_, _ = w.Write(body) // fails if the browser has disconnected
}
