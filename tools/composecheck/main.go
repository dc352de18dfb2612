// Command composecheck loads docker-compose.yml as Compose does, with every profile, and checks this project's own
// rules.
//
//	go -C tools run ./composecheck ../docker-compose.yml
//
// It needs no Docker.
package main

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/compose-spec/compose-go/v2/cli"
	"github.com/compose-spec/compose-go/v2/types"
)

func main() {
	file, err := filepath.Abs(strings.Join(os.Args[1:], " "))
	if err != nil {
		fail(err)
	}
	// Pass no environment, because the file must be complete without it.
	options, err := cli.NewProjectOptions([]string{file}, cli.WithProfiles([]string{"*"}))
	if err != nil {
		fail(err)
	}
	project, err := options.LoadProject(context.Background())
	if err != nil {
		fail(err)
	}
	problems := 0
	for _, name := range slices.Sorted(maps.Keys(project.Services)) {
		for _, problem := range check(project, project.Services[name]) {
			fmt.Printf("%s: %s\n", name, problem)
			problems++
		}
	}
	for _, check := range projectChecks {
		if problem := check(project); problem != "" {
			fmt.Println(problem)
			problems++
		}
	}
	if problems > 0 {
		os.Exit(1)
	}
}

// projectChecks contains checks of the services together, which return a problem or "".
var projectChecks []func(*types.Project) string

func fail(err error) {
	fmt.Fprintln(os.Stderr, "composecheck:", err)
	os.Exit(1)
}

// pinned matches a tag with a version of three parts, or of two where a project has only two. The tag latest and a bare
// major version change over time.
var pinned = regexp.MustCompile(`:v?\d+\.\d+(\.\d+)?(-|$)`)

// credentials matches a user with a password in a URL.
var credentials = regexp.MustCompile(`://([^/@:]*):[^@]*@`)

// check returns the problems of a service.
func check(project *types.Project, s types.ServiceConfig) (problems []string) {
	reject := func(wrong bool, problem string) {
		if wrong {
			problems = append(problems, problem)
		}
	}
	built := s.Build != nil
	reject(!built && !pinned.MatchString(s.Image), "image "+s.Image+" is not pinned to a version")
	reject(s.ContainerName != "", "a container name allows only one replica")
	for _, port := range s.Ports {
		reject(port.HostIP != "127.0.0.1", "port "+port.Published+" is open to the network")
	}
	if built {
		reject(!s.ReadOnly, "the root file system is writable")
		reject(!slices.Contains(s.CapDrop, "ALL"), "the container keeps capabilities")
		reject(!slices.Contains(s.SecurityOpt, "no-new-privileges:true"), "the container can gain privileges")
	}
	for name, value := range s.Environment {
		if value == nil || !strings.HasSuffix(name, "_URL") {
			continue
		}
		reject(credentials.MatchString(*value), name+" contains a password, which a URL may have to escape: "+
			"use PGPASSWORD or AMQP_PASSWORD, which accept any text")
		admin := project.Services["rabbitmq"].Environment["RABBITMQ_DEFAULT_USER"]
		url := credentials.ReplaceAllString(*value, "://$1@")
		asAdmin := s.Restart != "no" && admin != nil && strings.Contains(url, "://"+*admin+"@rabbitmq")
		reject(asAdmin, name+" has the broker's administrator as user: each process needs its own user")
	}
	// Nothing waits for the observability services, so they need no health check.
	if once := s.Restart == "no"; !once && !slices.Contains(s.Profiles, "observability") {
		reject(s.HealthCheck == nil || s.HealthCheck.Disable, "the service has no health check")
	} else if once && len(s.Profiles) == 0 {
		// `up --wait` fails on a container that has ended, unless another service waits for its end.
		reject(!awaited(project, s.Name), "no service waits for its success, so `up --wait` would fail")
	}
	return problems
}

func awaited(project *types.Project, name string) bool {
	for _, other := range project.Services {
		if other.DependsOn[name].Condition == types.ServiceConditionCompletedSuccessfully {
			return true
		}
	}
	return false
}
