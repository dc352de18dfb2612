// Command new makes a new service from this template:
//
//	go run ./cmd/new -module github.com/acme/billing -service billing ../billing
//
// It copies all tracked files, replaces names everywhere, generates code again, and leaves a repository with one
// commit. With -bare it omits the example domain, and with -without parts of the core. The rest builds, migrates,
// starts and passes its tests.
//
// The folder is either complete at the end or does not exist.
//
// A service keeps what the template made on a branch of its own. In a checkout of a newer template,
//
//	go run ./cmd/new -update ../billing
//
// renders that template with the service's options onto the branch, and merges it. With -dry-run it only shows what
// would change.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
)

const usage = "usage: go run ./cmd/new -module MODULE -service NAME [-example | -bare [-without FEATURES]] FOLDER, " +
	"or go run ./cmd/new -update FOLDER [-dry-run]"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	options, err := parse(os.Args[1:])
	if errors.Is(err, flag.ErrHelp) {
		fmt.Println(help)
		return
	}
	if err != nil {
		fail(2, err)
	}
	if options.updates {
		err = options.update(ctx, os.Stdout)
	} else if err = options.run(ctx, os.Stdout); err == nil {
		options.report(os.Stdout)
	}
	if err != nil {
		fail(1, err)
	}
}

const help = usage + `

Makes a service from this template in FOLDER, which must not exist.

  -module   path of the new Go module, such as github.com/acme/billing
  -service  name of the service: of its binary, packages, queues and database. Lower-case letters and digits
  -example  keep the example domain, under the new name (this is the default)
  -bare     omit it: an empty service, for docs/make-it-yours.md to fill
  -without  also omit parts of the core, separated by commas: console, durable-calls, rpc-over-rabbitmq

  -update   bring the service in FOLDER to this version of the template: commit it to the service's branch template,
            and merge that branch. git reports conflicts in files that were edited on both sides
  -dry-run  show what -update would change, and which files would conflict`

// options are the parsed command line.
type options struct {
	module, service string
	bare            bool
	without         []string // features that the new tree does not get
	folder          string   // absolute path of the new service
	template        string   // top folder of the checkout that is copied
	oldModule       string   // module of that checkout; not templateModule if gonew made it

	updates, dryRun bool
	old             record // of the service that is updated
	base            string // commit of its branch of the template
}

// parse returns checked options, or an error of one line.
func parse(args []string) (*options, error) {
	o := new(options)
	flags := flag.NewFlagSet("new", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.StringVar(&o.module, "module", "", "")
	flags.StringVar(&o.service, "service", "", "")
	flags.BoolVar(&o.bare, "bare", false, "")
	example := flags.Bool("example", false, "")
	flags.Func("without", "", o.setWithout)
	flags.StringVar(&o.folder, "update", "", "")
	flags.BoolVar(&o.dryRun, "dry-run", false, "")
	if err := flags.Parse(args); err != nil {
		return nil, err
	}
	if o.updates = o.folder != ""; o.updates {
		if flags.NFlag() > 2 || flags.NFlag() == 2 && !o.dryRun || flags.NArg() > 0 {
			return nil, errors.New("-update: the service has its options; " + usage)
		}
		return o, o.findService(context.Background())
	}
	if o.dryRun {
		return nil, errors.New("-dry-run needs -update")
	}
	if o.bare && *example {
		return nil, errors.New("-bare and -example exclude each other")
	}
	if len(o.without) > 0 && !o.bare {
		return nil, errors.New("-without needs -bare: the example uses every feature")
	}
	if o.module == "" || o.service == "" || flags.NArg() != 1 {
		return nil, errors.New(usage)
	}
	o.folder = flags.Arg(0)
	return o, o.check()
}

func (o *options) report(out io.Writer) {
	kind := "with the example domain"
	next := "make demo             # its worst day, then the ledger"
	if o.bare {
		kind, next = "without a domain", "docs/make-it-yours.md # your first RPC and event"
	}
	fmt.Fprintf(out, "\n%s: the service %s, module %s, %s, one commit. Next:\n\n"+
		"  cd %s\n  make test             # every test, on real servers\n  %s\n",
		o.folder, o.service, o.module, kind, o.folder, next)
}

func fail(status int, err error) {
	fmt.Fprintf(os.Stderr, "new: %s\n", strings.TrimSpace(err.Error()))
	os.Exit(status)
}
