// Command kubecheck renders kustomizations and validates every object against a schema of Kubernetes or of a custom
// resource. Fields that are not in the schema are errors, and so are pods without a secret.
//
//	go -C tools run ./kubecheck OPENAPI_DIR CRD_DIRS KUSTOMIZATION...
//
// OPENAPI_DIR contains OpenAPI documents as Kubernetes publishes them. CRD_DIRS is a list like PATH of folders with
// CustomResourceDefinitions. scripts/kubernetes.sh downloads both. It needs no cluster.
package main

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/santhosh-tekuri/jsonschema/v6"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"
	"sigs.k8s.io/yaml"
)

func main() {
	if len(os.Args) < 4 {
		fail(errors.New("usage: kubecheck OPENAPI_DIR CRD_DIRS KUSTOMIZATION"))
	}
	known, err := load(os.Args[1], os.Args[2])
	if err != nil {
		fail(err)
	}
	wrong := false
	for _, folder := range os.Args[3:] {
		rendered, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), folder)
		if err != nil {
			fail(err)
		}
		for _, object := range rendered.Resources() {
			content, err := object.Map()
			if err == nil {
				err = errors.Join(known.check(content), checkLogin(content))
			}
			if err != nil {
				wrong = true
				fmt.Printf("%s: %s %s: %v\n", folder, object.GetKind(), object.GetName(), err)
			}
		}
		fmt.Printf("%s: %d objects\n", folder, rendered.Size())
	}
	if wrong {
		os.Exit(1)
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "kubecheck:", err)
	os.Exit(1)
}

// checkLogin requires a secret in each pod template, because each of our processes logs in somewhere. A patch replaces
// lists such as envFrom completely, and no schema detects a removed element.
func checkLogin(object map[string]any) error {
	spec, _ := object["spec"].(map[string]any)
	if template, ok := spec["template"]; ok && !has(template, "secretRef") && !has(template, "secretKeyRef") {
		return errors.New("its pods have no secret")
	}
	return nil
}

// has reports whether the field exists anywhere below node.
func has(node any, field string) bool {
	switch node := node.(type) {
	case map[string]any:
		if _, ok := node[field]; ok {
			return true
		}
		for child := range maps.Values(node) {
			if has(child, field) {
				return true
			}
		}
	case []any:
		return slices.ContainsFunc(node, func(child any) bool { return has(child, field) })
	}
	return false
}

// schemas contains the URLs of schemas by apiVersion and kind.
type schemas struct {
	compiler *jsonschema.Compiler
	urls     map[string]string
}

func (s *schemas) check(object map[string]any) error {
	url, ok := s.urls[fmt.Sprint(object["apiVersion"], " ", object["kind"])]
	if !ok {
		return fmt.Errorf("no schema for %v", object["apiVersion"])
	}
	schema, err := s.compiler.Compile(url)
	if err != nil {
		return err
	}
	return schema.Validate(object)
}

func load(openAPI, crds string) (*schemas, error) {
	s := &schemas{compiler: jsonschema.NewCompiler(), urls: map[string]string{}}
	folders := map[string]func(name string, document map[string]any) error{openAPI: s.addOpenAPI}
	for _, folder := range filepath.SplitList(crds) {
		folders[folder] = s.addCRD
	}
	for folder, add := range folders {
		err := filepath.WalkDir(folder, func(path string, entry fs.DirEntry, err error) error {
			if err != nil || entry.IsDir() {
				return err
			}
			text, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			var document map[string]any
			if err := yaml.Unmarshal(text, &document); err != nil {
				return fmt.Errorf("%s: %w", path, err)
			}
			closeObjects(document)
			return add("file://"+filepath.ToSlash(path), document)
		})
		if err != nil {
			return nil, err
		}
	}
	return s, nil
}

// addOpenAPI adds the OpenAPI document of a group and version. Each of its schemas names its kinds.
func (s *schemas) addOpenAPI(url string, document map[string]any) error {
	components, _ := document["components"].(map[string]any)
	all, _ := components["schemas"].(map[string]any)
	for name, schema := range all {
		kinds, _ := schema.(map[string]any)["x-kubernetes-group-version-kind"].([]any)
		for _, kind := range kinds {
			kind := kind.(map[string]any)
			version := strings.TrimPrefix(fmt.Sprint(kind["group"], "/", kind["version"]), "/")
			s.urls[fmt.Sprint(version, " ", kind["kind"])] = url + "#/components/schemas/" + name
		}
	}
	return s.compiler.AddResource(url, document)
}

func (s *schemas) addCRD(url string, document map[string]any) error {
	spec, _ := document["spec"].(map[string]any)
	names, _ := spec["names"].(map[string]any)
	versions, _ := spec["versions"].([]any)
	for i, version := range versions {
		apiVersion := fmt.Sprint(spec["group"], "/", version.(map[string]any)["name"])
		s.urls[apiVersion+" "+fmt.Sprint(names["kind"])] = fmt.Sprintf("%s#/spec/versions/%d/schema/openAPIV3Schema",
			url, i)
	}
	return s.compiler.AddResource(url, document)
}

// closeObjects forbids other properties in every schema that lists properties. The API server prunes or rejects unknown
// properties too.
func closeObjects(node any) {
	switch node := node.(type) {
	case map[string]any:
		_, listed := node["properties"].(map[string]any)
		_, explicit := node["additionalProperties"]
		open, _ := node["x-kubernetes-preserve-unknown-fields"].(bool)
		if listed && !explicit && !open && node["type"] == "object" {
			node["additionalProperties"] = false
		}
		for child := range maps.Values(node) {
			closeObjects(child)
		}
	case []any:
		for _, child := range node {
			closeObjects(child)
		}
	}
}
