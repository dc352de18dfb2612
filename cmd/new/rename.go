package main

import (
	"go/format"
	"path"
	"regexp"
	"slices"
	"strings"
)

// What the template calls itself. "orders" is a name and a plural: what is renamed can only be the name, which is known by what stands beside it.
// The tables, fields and sentences of the example go on dealing with orders, whatever the service is called.
const (
	templateModule  = "example.com/orders"
	templateService = "orders"
)

// shape is one way in which the name is written. In what it becomes stand the groups of the pattern, NAME, UPPER and TITLE.
type shape struct {
	pattern *regexp.Regexp
	becomes string
}

func shaped(pattern, becomes string) shape { return shape{regexp.MustCompile(pattern), becomes} }

// commands are the program's own, and what stands for them in tests and documentation.
const commands = `api|relay|consumer|console|all|migrate|topology|doctor|outbox|dead|trace|apikey|healthcheck|rpc|version|COMMAND`

var shapes = []shape{
	shaped(`\bordersv1`, "NAMEv1"),                                                                    // Go packages of proto/orders/v1
	shaped(`\borders(\\*[./])v1\b`, "NAME${1}v1"),                                                     // its protobuf package and folder, in regular expressions, too
	shaped(`(\d{4}_|\b)orders((?:_test)?\.(?:go|sql|proto))\b`, "${1}NAME$2"),                         // files
	shaped(`/orders(_pb)?\b`, "/NAME$1"),                                                              // paths, and databases and vhosts in URLs
	shaped(`\borders-([a-z])`, "NAME-$1"),                                                             // orders-api, orders-load
	shaped(`(?m)(^|[^.\w])orders\.([A-Z]|fulfillment\b|notifications\b|operations\b)`, "${1}NAME.$2"), // what is used of the Go package, not of a field; the queues
	shaped(`\bFile_orders_v1`, "File_NAME_v1"),                                                        // what is generated for a file
	shaped("([\"`])orders( ?[\"`%.]|: )", "${1}NAME$2"),                                               // a string or a code span that begins with it
	shaped(`'orders( %)?'`, "'NAME$1'"),                                                               // the same in SQL
	shaped(`(?m)(^|\^)orders: `, "${1}NAME: "),                                                        // what errors begin with, also in regular expressions
	shaped(`\borders:([$A-Z])`, "NAME:$1"),                                                            // images, and user and password in URLs
	shaped(`((?:[nN]ame|part-of|namespace|target|image|_USER|_DB|_VHOST): )orders\b`, "${1}NAME"),     // values in YAML
	shaped(`([&*]|x-)orders\b`, "${1}NAME"),                                                           // anchors in YAML
	shaped(`(?m)(^# |### )orders( %s|$)`, "${1}NAME$2"),                                               // headings
	shaped(`(?m)^package orders(_test)?$`, "package NAME$1"),                                          //
	shaped(`\b(Package|Command|DATABASE|AS|target) orders\b`, "$1 NAME"),                              //
	shaped(`(-[Udn],?|-audience) orders\b`, "$1 NAME"),                                                // arguments of psql, pg_isready and kubectl
	shaped(`\borders (`+commands+`)\b`, "NAME $1"),                                                    // the program, called
	shaped(`\bORDERS_`, "UPPER_"),                                                                     // variables of docker-compose.yml
}

// bareShapes are for the core alone. Where it needs an example of a call, it takes one of the example's, and there one of the guide's.
var bareShapes = []shape{
	shaped(`OrderService`, "TITLEService"),
	shaped(`\bOrderPlaced\b`, "InvoiceCreated"),
	shaped(`\bOrder(Confirmed|Archived)\b`, "Invoice$1"),
	shaped(`(?:PlaceOrder|SetStock)`, "CreateInvoice"),
	shaped(`\bGetOrder\b`, "GetBalance"),
	shaped(`\border-(\d+)\b`, "invoice-$1"),
	shaped(`\{"sku": "apple", "total": 10\}`, `{"invoiceId": "0190c0de-0000-7000-8000-000000000001", "customerId": "ann", "cents": 1200}`),
	shaped(`\{"order_id": "\.\.\."\}`, `{"customer_id": "ann"}`),
}

// guideShapes are for the guide, which makes a service billing.
var guideShapes = []shape{
	shaped(`github\.com/acme/billing`, "MODULE"),
	shaped(`\bbilling`, "NAME"),
	shaped(`Billing`, "TITLE"),
}

// verbatim are files that are not ours, or that a tool writes.
func verbatim(name string) bool {
	return strings.HasPrefix(name, "proto/buf/") || path.Base(name) == "LICENSE" || path.Base(name) == "go.sum"
}

// hints are in every text that a shape may fit: to look for them is quick.
var hints = []string{templateService, "ORDERS", "Order", "SetStock", "order-", "order_id", "billing"}

// renamed gives a file its new name and its new text.
func (o *order) renamed(name, text string) (string, string, error) {
	if verbatim(name) {
		return name, text, nil
	}
	all := shapes
	if o.bare && !slices.Contains(measured, name) {
		all = slices.Concat(all, bareShapes)
	}
	if name == guide {
		all = guideShapes
	}
	// The name of the buf module is made of three parts, whatever the Go module is.
	text = strings.ReplaceAll(text, "name: "+templateModule+"/api", "name: example.com/"+o.service+"/api")
	text = strings.NewReplacer(templateModule, o.module, o.oldModule, o.module).Replace(text)
	if slices.ContainsFunc(hints, func(hint string) bool { return strings.Contains(text, hint) }) {
		for _, s := range all {
			text = s.pattern.ReplaceAllString(text, o.fill(s.becomes))
		}
	}
	name = regexp.MustCompile(`\b(cmd|internal|proto)/orders/|\b(migrations/\d+_)orders\b|\borders(\.go|_test\.go|\.proto)$`).
		ReplaceAllStringFunc(name, func(part string) string { return strings.Replace(part, templateService, o.service, 1) })
	if path.Ext(name) != ".go" {
		return name, text, nil
	}
	formatted, err := format.Source([]byte(text)) // imports sort anew
	return name, string(formatted), err
}

func (o *order) fill(becomes string) string {
	title := strings.ToUpper(o.service[:1]) + o.service[1:]
	return strings.NewReplacer("MODULE", o.module, "NAME", o.service, "UPPER", strings.ToUpper(o.service), "TITLE", title).Replace(becomes)
}
