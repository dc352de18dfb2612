package app

import (
	"go/ast"
	"go/parser"
	"go/token"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"example.com/shop/internal/rpcserver"
)

// notForPages contains headers that pages need not send or read, with the reason.
var notForPages = map[string]string{
	"Accept-Encoding": "set by the browser", "If-None-Match": "set by the browser",
	"Connect-Content-Encoding": "the browser cannot compress", "Content-Type": "always readable",
	"Content-Length": "always readable", "Content-Encoding": "handled by the browser",
	"Cache-Control": "always readable",
	"ETag":          "only on our own pages", "Vary": "for caches", "Location": "only on our own pages",
	"X-Content-Type-Options": "for the browser", "Content-Security-Policy": "for the browser",
	"Referrer-Policy": "for the browser", "Cross-Origin-Resource-Policy": "for the browser",
	"Cross-Origin-Opener-Policy": "for the browser", "X-Frame-Options": "for the browser",
	"Strict-Transport-Security": "for the browser",
}

// touched finds the headers that a package reads from requests and writes to responses: the first arguments of Get,
// Values, Has, Set and Add on expressions named header.
func touched(t *testing.T, dir string) (read, written []string) {
	t.Helper()
	parsed, constants := []*ast.File{}, map[string]string{}
	names, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		parsed = append(parsed, file)
		ast.Inspect(file, func(n ast.Node) bool {
			if spec, ok := n.(*ast.ValueSpec); ok && len(spec.Values) == len(spec.Names) {
				for i, value := range spec.Values {
					if literal, ok := value.(*ast.BasicLit); ok && literal.Kind == token.STRING {
						constants[spec.Names[i].Name], _ = strconv.Unquote(literal.Value)
					}
				}
			}
			return true
		})
	}
	for _, file := range parsed {
		ast.Inspect(file, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok || len(call.Args) == 0 {
				return true
			}
			method, ok := call.Fun.(*ast.SelectorExpr)
			if !ok || !isHeader(method.X) {
				return true
			}
			var name string
			switch argument := call.Args[0].(type) {
			case *ast.BasicLit:
				name, _ = strconv.Unquote(argument.Value)
			case *ast.Ident:
				name = constants[argument.Name]
			}
			switch {
			case name == "":
			case slices.Contains([]string{"Get", "Values", "Has"}, method.Sel.Name):
				read = append(read, name)
			case slices.Contains([]string{"Set", "Add"}, method.Sel.Name):
				written = append(written, name)
			}
			return true
		})
	}
	return read, written
}

// isHeader tells whether an expression has a name of headers: header, r.Header, w.Header(), info.RequestHeader().
func isHeader(x ast.Expr) bool {
	switch x := x.(type) {
	case *ast.CallExpr:
		return isHeader(x.Fun)
	case *ast.SelectorExpr:
		return isHeader(x.Sel)
	case *ast.Ident:
		return strings.HasSuffix(strings.ToLower(x.Name), "header")
	}
	return false
}

// A page of an allowed origin may send every header that the code reads and read every header that it writes,
// including headers that are added to the code later.
func TestPagesOfOtherOriginsCanUseEverything(t *testing.T) {
	t.Parallel()
	const origin = "https://web.example"
	a := startAPI(t, Edge{NoAuth: true, Origins: []string{origin}})
	listed, listedOut := rpcserver.Headers()
	more, moreOut := names(t, probed(Config{})).headers()
	listed, listedOut = append(listed, more...), append(listedOut, moreOut...)
	dirs, err := filepath.Glob("../*")
	if err != nil {
		t.Fatal(err)
	}
	var read, written []string
	for _, dir := range dirs {
		// Skip clients, operators' tools, and what serves no pages.
		skip := slices.Contains([]string{"testenv", "localstack", "ops"}, filepath.Base(dir)) ||
			strings.HasPrefix(filepath.Base(dir), "rabbit")
		if info, err := os.Stat(dir); err != nil || !info.IsDir() || skip {
			continue
		}
		in, out := touched(t, dir)
		read, written = append(read, in...), append(written, out...)
	}
	if len(read) < 6 || len(written) < 10 {
		t.Fatalf("found only %q and %q", read, written)
	}
	has := func(list []string, name string) bool {
		listed := slices.ContainsFunc(list, func(header string) bool { return strings.EqualFold(header, name) })
		return listed || notForPages[name] != ""
	}
	for _, name := range append(read, "traceparent", "tracestate", "baggage") {
		if !has(listed, name) {
			t.Errorf("the code reads %s, but no package's Headers lists it: pages of allowed origins cannot send it",
				name)
		}
	}
	for _, name := range written {
		// The code also writes headers to its own requests; another package reads those.
		if !has(listedOut, name) && !has(listed, name) {
			t.Errorf("the code writes %s, but no package's Headers lists it: pages of allowed origins cannot read it",
				name)
		}
	}
	slices.Sort(listed)
	listed = slices.Compact(listed)
	for _, name := range listed {
		url := a.url + "/any.v1.Service/Method"
		request, err := http.NewRequestWithContext(t.Context(), http.MethodOptions, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		request.Header.Set("Origin", origin)
		request.Header.Set("Access-Control-Request-Method", http.MethodPost)
		request.Header.Set("Access-Control-Request-Headers", strings.ToLower(name))
		response, err := newHTTPClient(t, false).Do(request)
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		if response.Header.Get("Access-Control-Allow-Origin") != origin {
			t.Errorf("a preflight for %s is refused", name)
		}
	}
}

// A refusal of a caller without credentials names the accepted ones, over each protocol.
func TestUnauthenticatedNamesTheWaysIn(t *testing.T) {
	t.Parallel()
	_, lines := apiKeys(t, "customer")
	a := startAPI(t, Edge{APIKeys: lines}, registerUndeclared)
	var procedure string
	for spec := range a.server.Specs() {
		if strings.HasPrefix(spec.Procedure, "/grpc.reflection.v1.") {
			procedure = spec.Procedure
		}
	}
	for _, kind := range []string{
		"application/connect+json", "application/connect+proto", "application/grpc", "application/grpc-web+proto",
	} {
		request, err := http.NewRequestWithContext(t.Context(), http.MethodPost, a.url+procedure, http.NoBody)
		if err != nil {
			t.Fatal(err)
		}
		request.Header.Set("Content-Type", kind)
		response, err := newHTTPClient(t, true).Do(request)
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		got := response.Header.Values("WWW-Authenticate")
		if !slices.Equal(got, []string{`ApiKey header="X-Api-Key"`}) {
			t.Errorf("%s: %s, %q", kind, response.Status, got)
		}
	}
	for spec := range a.server.Specs() {
		if strings.HasPrefix(spec.Procedure, "/grpc.") || spec.StreamType != 0 {
			continue
		}
		response, err := newHTTPClient(t, false).Post(a.url+spec.Procedure, "application/json", strings.NewReader("{}"))
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		challenges := response.Header.Values("WWW-Authenticate")
		if response.StatusCode == http.StatusUnauthorized && len(challenges) != 1 {
			t.Errorf("%s: %q", spec.Procedure, challenges)
		}
	}
}
