// Command kubecheck renders a kustomization and holds every object of it to a schema: of Kubernetes itself, or of a custom resource. Fields that
// the schema does not know are errors, and so are pods that take no secret.
//
//	go -C tools run ./kubecheck OPENAPI_DIR CRD_DIRS KUSTOMIZATION...
//
// The folders hold OpenAPI documents as Kubernetes publishes them, and CustomResourceDefinitions, the latter in a list as of PATH; scripts/kubernetes.sh says where from. No cluster is needed.
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
		fail(errors.New("want the arguments OPENAPI_DIR CRD_DIRS KUSTOMIZATION... and no fewer"))
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

// checkLogin wants a secret in each template of a pod: every process of ours logs in somewhere. A patch replaces a list such as envFrom as a whole, and
// what it takes away no schema misses.
func checkLogin(object map[string]any) error {
	spec, _ := object["spec"].(map[string]any)
	if template, ok := spec["template"]; ok && !has(template, "secretRef") && !has(template, "secretKeyRef") {
		return errors.New("its pods take no secret")
	}
	return nil
}

// has says whether there is such a field anywhere below.
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

// schemas are the places of schemas, by apiVersion and kind.
type schemas struct {
	compiler *jsonschema.Compiler
	places   map[string]string
}

func (s *schemas) check(object map[string]any) error {
	place, ok := s.places[fmt.Sprint(object["apiVersion"], " ", object["kind"])]
	if !ok {
		return fmt.Errorf("no schema for %v", object["apiVersion"])
	}
	schema, err := s.compiler.Compile(place)
	if err != nil {
		return err
	}
	return schema.Validate(object)
}

func load(openAPI, crds string) (*schemas, error) {
	s := &schemas{compiler: jsonschema.NewCompiler(), places: map[string]string{}}
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

// addOpenAPI takes a document of a group's version: each of its schemas names the kinds that it is of.
func (s *schemas) addOpenAPI(url string, document map[string]any) error {
	components, _ := document["components"].(map[string]any)
	all, _ := components["schemas"].(map[string]any)
	for name, schema := range all {
		kinds, _ := schema.(map[string]any)["x-kubernetes-group-version-kind"].([]any)
		for _, kind := range kinds {
			named := kind.(map[string]any)
			version := strings.TrimPrefix(fmt.Sprint(named["group"], "/", named["version"]), "/")
			s.places[fmt.Sprint(version, " ", named["kind"])] = url + "#/components/schemas/" + name
		}
	}
	return s.compiler.AddResource(url, document)
}

func (s *schemas) addCRD(url string, document map[string]any) error {
	spec, _ := document["spec"].(map[string]any)
	names, _ := spec["names"].(map[string]any)
	versions, _ := spec["versions"].([]any)
	for i, version := range versions {
		place := fmt.Sprintf("%s#/spec/versions/%d/schema/openAPIV3Schema", url, i)
		s.places[fmt.Sprint(spec["group"], "/", version.(map[string]any)["name"], " ", names["kind"])] = place
	}
	return s.compiler.AddResource(url, document)
}

// closeObjects forbids, in every schema that lists properties, any others. That is how the API server prunes or refuses what it does not know.
func closeObjects(node any) {
	switch node := node.(type) {
	case map[string]any:
		_, listed := node["properties"].(map[string]any)
		_, said := node["additionalProperties"]
		if open, _ := node["x-kubernetes-preserve-unknown-fields"].(bool); listed && !said && !open && node["type"] == "object" {
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
