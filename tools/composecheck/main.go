// Command composecheck loads docker-compose.yml as Compose does, with every profile, and then holds it to this project's own rules.
//
//	go -C tools run ./composecheck ../docker-compose.yml
//
// It needs no Docker.
package main

import (
	"context"
	"encoding/base64"
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
	// No environment: what the file says by itself must be whole.
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
	if problem := checkCallKeys(project); problem != "" {
		fmt.Println(problem)
		problems++
	}
	if problems > 0 {
		os.Exit(1)
	}
}

// checkCallKeys: durable calls are on, which takes one key for who takes them and who executes them, of 32 bytes.
func checkCallKeys(project *types.Project) string {
	text := func(service string) string {
		if value := project.Services[service].Environment["CALL_KEYS"]; value != nil {
			return *value
		}
		return ""
	}
	if key, err := base64.StdEncoding.DecodeString(text("api")); err != nil || len(key) < 32 {
		return "api: CALL_KEYS is no key of 32 bytes in base64"
	}
	if text("api") != text("consumer") {
		return "api and consumer have different CALL_KEYS"
	}
	return ""
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "composecheck:", err)
	os.Exit(1)
}

// pinned is a tag that names a version of three parts, or of two where the project counts so. Latest and a bare major move on.
var pinned = regexp.MustCompile(`:v?\d+\.\d+(\.\d+)?(-|$)`)

// credentials finds a user with a password in a URL.
var credentials = regexp.MustCompile(`://([^/@:]*):[^@]*@`)

// check returns what is wrong with a service.
func check(project *types.Project, s types.ServiceConfig) (problems []string) {
	say := func(wrong bool, problem string) {
		if wrong {
			problems = append(problems, problem)
		}
	}
	built := s.Build != nil
	say(!built && !pinned.MatchString(s.Image), "image "+s.Image+" is not pinned to a version")
	say(s.ContainerName != "", "a container name allows one replica only")
	for _, port := range s.Ports {
		say(port.HostIP != "127.0.0.1", "port "+port.Published+" is open to the network")
	}
	if built {
		say(!s.ReadOnly, "the root file system can be written to")
		say(!slices.Contains(s.CapDrop, "ALL"), "it keeps capabilities")
		say(!slices.Contains(s.SecurityOpt, "no-new-privileges:true"), "it can gain privileges")
	}
	for name, value := range s.Environment {
		if value == nil || !strings.HasSuffix(name, "_URL") {
			continue
		}
		say(credentials.MatchString(*value), name+" has a password, which may have to be escaped there: PGPASSWORD and AMQP_PASSWORD take any text")
		admin := project.Services["rabbitmq"].Environment["RABBITMQ_DEFAULT_USER"]
		forAll := s.Restart != "no" && admin != nil && strings.Contains(credentials.ReplaceAllString(*value, "://$1@"), "://"+*admin+"@rabbitmq")
		say(forAll, name+" is that of the broker's administrator: a process has a user of its own")
	}
	// The observers report nothing that anybody waits for.
	if once := s.Restart == "no"; !once && !slices.Contains(s.Profiles, "observability") {
		say(s.HealthCheck == nil || s.HealthCheck.Disable, "nobody can tell when it is healthy")
	} else if once && len(s.Profiles) == 0 {
		// Compose counts a container that has ended as a failure of `up --wait`, unless another waits for its end.
		say(!awaited(project, s.Name), "nobody waits for its success, so `up --wait` would fail")
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
